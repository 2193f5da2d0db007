"""Hints between servers, as they are sent: whole, short enough, and nothing when they are not ours."""

from __future__ import annotations

import threading
from functools import reduce
from operator import or_
from typing import NoReturn

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from perdure_service.store import hints
from perdure_service.store.hints import MAX_PAYLOAD_BYTES, MAX_RUNS, NOTHING, Hint, NotifyFeed, decode, encode

from tests.helpers.waiting import eventually

ids = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=200)


@given(st.frozensets(ids, max_size=150), st.frozensets(ids, max_size=20), st.frozensets(ids, max_size=5), st.booleans())
def test_what_is_sent_in_pieces_is_heard_as_a_whole(
    runs: frozenset[str], ended: frozenset[str], queues: frozenset[str], approvals: bool
) -> None:
    hint = Hint(runs=runs | ended, ended=ended, queues=queues, approvals=approvals)
    payloads = encode("me", hint)
    assert all(len(payload.encode()) <= MAX_PAYLOAD_BYTES for payload in payloads)
    heard = [decode(payload) for payload in payloads]
    assert {sender for sender, _ in heard} == {"me"}
    assert reduce(or_, (one for _, one in heard)) == hint


def test_an_id_that_fits_no_payload_is_left_out_and_the_others_are_sent() -> None:
    hint = Hint(runs=frozenset({"x" * MAX_PAYLOAD_BYTES, "short"}))
    heard = [decode(payload)[1] for payload in encode("me", hint)]
    assert reduce(or_, heard) == Hint(runs=frozenset({"short"}))


def test_a_sign_of_life_names_its_sender_and_nothing_else() -> None:
    assert [decode(payload) for payload in encode("me", NOTHING)] == [("me", NOTHING)]


@pytest.mark.parametrize("payload", ["", "{", "[]", "7", "null", "{}", '{"f": "x", "r": 7}', '"f"'])
def test_a_payload_of_somebody_else_says_nothing(payload: str) -> None:
    assert decode(payload) == ("", NOTHING)


def test_more_runs_than_can_be_told_of_are_everything() -> None:
    many = Hint(runs=frozenset(map(str, range(MAX_RUNS + 1))), queues=frozenset({"mail"}))
    assert many.bounded.everything
    assert not many.bounded.runs
    assert many.bounded.queues == {"mail"}
    few = Hint(runs=frozenset({"a"}))
    assert few.bounded == few


class Ending(threading.Event):
    """A feed's end, which comes with its first pause."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        self.set()
        return True


def test_what_is_to_be_sent_does_not_shorten_the_pauses_while_there_is_no_database() -> None:
    tries: list[int] = []

    def connect() -> NoReturn:
        tries.append(1)
        if len(tries) > 1:
            ending.set()  # it was not to come to this; end it all the same
        feed.send(Hint(runs=frozenset({"r"})))
        raise psycopg.OperationalError("away")

    feed = NotifyFeed(connect, "me", lambda _hint: None)
    ending = feed._stop = Ending()
    feed.start()
    eventually(lambda: not feed._thread.is_alive())
    assert (len(tries), len(ending.pauses)) == (1, 1)
    assert ending.pauses[0] >= hints.FIRST_RETRY_S / 2
