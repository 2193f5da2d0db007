"""A thread of the writer that takes something leaves the clock to the other one; nobody takes another's watch away."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa
from perdure_service.store import checkpoint_writer, writer_sessions
from perdure_service.store.checkpoint_writer import CheckpointWriter, Flight
from perdure_service.store.checkpoints import CheckpointRow
from perdure_service.store.writer_sessions import LoopSession

ENGINE = sa.create_engine("postgresql+psycopg://nowhere")


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> CheckpointWriter:
    """A writer without threads, for which everything is due at once."""
    monkeypatch.setattr(checkpoint_writer, "JOIN_AFTER_S", 0.0)
    writer = CheckpointWriter(ENGINE, lambda _: None)
    writer._open = writer._posted = True
    return writer


def a_row(name: str) -> CheckpointRow:
    return cast(CheckpointRow, SimpleNamespace(workflow_id=name, keys=(name,), instead=None, waits=True))


def in_flight(writer: CheckpointWriter) -> Flight:
    exchange: Any = SimpleNamespace(over=False, has_more=lambda: False)
    writer._flight = Flight([a_row("in flight")], exchange)
    writer._flying, writer._busy = True, 1
    return writer._flight


@pytest.mark.parametrize("watched", [False, True])
def test_who_takes_a_batch_while_a_flight_is_under_way_leaves_the_clock(
    writer: CheckpointWriter, watched: bool
) -> None:
    in_flight(writer)
    writer._rows.append(a_row("other"))
    writer._clock_watched = watched
    taken = writer._take()
    assert isinstance(taken, list)
    assert [row.workflow_id for row in taken] == ["other"]
    assert writer._called is not watched


def test_who_adopts_a_flight_leaves_what_waits_to_the_other_one(writer: CheckpointWriter) -> None:
    flight = in_flight(writer)
    writer._late = True
    writer._rows.append(a_row("other"))
    assert writer._take() is flight
    assert writer._called


def test_who_takes_all_that_there_is_calls_nobody(writer: CheckpointWriter) -> None:
    writer._rows.append(a_row("alone"))
    writer._called = True
    assert writer._take()
    assert not writer._called


def test_a_loop_that_comes_to_watch_a_flight_that_has_landed_leaves_the_watch_of_the_next_one(
    writer: CheckpointWriter,
) -> None:
    landed = in_flight(writer)
    in_flight(writer)
    touched: list[str] = []
    writer._session = cast(LoopSession, SimpleNamespace(unwatch=lambda: touched.append("unwatched")))
    writer._watch(landed)
    assert not touched


def test_a_connection_that_cannot_be_made_ends_no_thread_and_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_session: object) -> None:
        raise OSError("no descriptor is left")

    monkeypatch.setattr(writer_sessions.Session, "connection", property(fails))
    session = LoopSession(ENGINE)
    loop = session.loop = asyncio.new_event_loop()
    session.connect_again()
    assert 0 < session._connect_from < math.inf
    loop.close()
    monkeypatch.setattr(writer_sessions.Session, "socket", lambda _session: 0)
    session.watch(lambda: None, sending=False)  # says so in the log only
    session.unwatch()
