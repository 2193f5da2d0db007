"""Random ids are drawn many at a time, and nobody gets one twice: no thread, and no process that is forked."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from perdure_service.domain import ids
from perdure_service.domain.runs import uuid7


def test_an_id_is_128_bits_as_text() -> None:
    assert re.fullmatch("[0-9a-f]{32}", ids.random_hex())


def test_many_share_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    plain = ids.os.urandom

    def counted(size: int) -> bytes:
        draws.append(size)
        return plain(size)

    monkeypatch.setattr(ids.os, "urandom", counted)
    for _ in range(2 * ids.DRAWN):
        ids.random_hex()
    assert len(draws) <= 3


def test_no_thread_gets_the_id_of_another_one() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [one for some in pool.map(lambda _: [ids.random_hex() for _ in range(1_000)], range(8)) for one in some]
    assert len(set(made)) == len(made)


def test_a_forked_process_draws_its_own() -> None:
    ids.random_hex()  # so that some are left over
    context = multiprocessing.get_context("fork")
    received, sent = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sent.send([ids.random_hex() for _ in range(ids.DRAWN)]))
    child.start()
    theirs = received.recv()
    child.join()
    assert not {ids.random_hex() for _ in range(ids.DRAWN)} & set(theirs)


def test_a_uuid_of_version_7_is_random_but_for_its_time() -> None:
    made = {uuid7() for _ in range(1_000)}
    assert len(made) == 1_000
    assert all(re.fullmatch("[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", one) for one in made)
