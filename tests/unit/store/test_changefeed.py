"""The changefeed's rows and how it begins again, with connections that play what CockroachDB was seen to send."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from perdure_service.store import changefeed
from perdure_service.store.changefeed import STATEMENT, Changefeed, hint_of
from perdure_service.store.hints import EVERYTHING, Hint
from perdure_service.store.silence import SilenceWatch
from structlog.testing import capture_logs

from tests.helpers.waiting import eventually

RESOLVED = (None, None, b'{"resolved":"1764000000000000000.0000000000"}')
EVENT = ("defaultdb.perdure.run_event", b'["default.use1-7.r", 4]', b"")


class Played:
    """A connection that plays rows, and then an error, or waits until it is closed or its socket is shut down."""

    def __init__(self, rows: Sequence[Any], error: Exception | None = None) -> None:
        self._rows, self._error = rows, error
        self._ours, self._theirs = socket.socketpair()
        self.statements: list[str] = []
        self.closed = False

    def cursor(self) -> Played:
        return self

    def stream(self, query: Any, /) -> Iterator[Sequence[Any]]:
        self.statements.append(query)
        yield from self._rows
        if self._error is None:
            self._ours.recv(1)  # nothing comes until the socket is shut down
            raise psycopg.OperationalError("the connection is lost")
        raise self._error

    def fileno(self) -> int:
        return self._ours.fileno()

    def close(self) -> None:
        self.closed = True
        self._ours.close()
        self._theirs.close()


@contextmanager
def feed(*connections: Played, watch: SilenceWatch | None = None) -> Iterator[tuple[Changefeed, list[Hint]]]:
    """A feed that gets these connections one after the other, and what it has told."""
    heard: list[Hint] = []
    played = [*connections, Played([])]
    waiting = iter(played)
    made = Changefeed(lambda: next(waiting), heard.append, watch)
    made.start()
    try:
        yield made, heard
    finally:
        made.stop()
        for one in played:
            one.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_RETRY_S", "LAST_RETRY_S", "REFUSED_RETRY_S"):
        monkeypatch.setattr(changefeed, name, 0.01)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (RESOLVED, None),
        (EVENT, Hint(runs=frozenset({"default.use1-7.r"}))),
        (("run_event", '["a", 1]', None), Hint(runs=frozenset({"a"}))),
        (("run_event", memoryview(b'["a", 1]'), None), Hint(runs=frozenset({"a"}))),
        (("db.perdure.approval", b'["a", 3]', b""), Hint(runs=frozenset({"a"}), approvals=True)),
        (("db.dbos.notifications", b'["some-message"]', b""), Hint(messages=True)),
        (
            ("db.dbos.workflow_events", b'["a", "key"]', b""),
            Hint(wakes=frozenset({("dbos_workflow_events_channel", "a::key")})),
        ),
        (("db.dbos.streams", b'["a", "s", 7]', b""), Hint(wakes=frozenset({("dbos_streams_channel", "a::s")}))),
        (("db.perdure.other", b'["a"]', b""), EVERYTHING),
        (("run_event", b"[]", b""), EVERYTHING),
        (("run_event", b"{", b""), EVERYTHING),
        (("run_event", None, b""), EVERYTHING),
    ],
)
def test_a_row_says_where_to_look(row: tuple[Any, ...], hint: Hint | None) -> None:
    assert hint_of(row) == hint


def test_the_first_row_makes_everything_dirty_and_the_rows_after_it_tell_what_else() -> None:
    played = Played([RESOLVED, EVENT, RESOLVED])
    with feed(played) as (made, heard):
        eventually(lambda: heard == [EVERYTHING, Hint(runs=frozenset({"default.use1-7.r"}))])
        assert made.arrives
        assert played.statements == [STATEMENT]
    assert played.closed
    assert not made.arrives


def test_until_a_row_has_come_nothing_is_known_to_arrive() -> None:
    with feed(Played([])) as (made, heard):
        assert not made.arrives
        assert heard == []


def test_a_feed_that_breaks_is_made_anew_and_everything_is_dirty_at_both_ends() -> None:
    drained = psycopg.errors.AdminShutdown("the node drains")
    with feed(Played([RESOLVED], drained), Played([RESOLVED])) as (_, heard):
        eventually(lambda: heard == [EVERYTHING, EVERYTHING, EVERYTHING])


def test_a_feed_without_a_heartbeat_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changefeed, "SILENT_S", 0.05)
    silent = Played([RESOLVED])
    with feed(silent, Played([RESOLVED]), watch=SilenceWatch()) as (_, heard):
        eventually(lambda: len(heard) >= 3)
    assert silent.closed


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (psycopg.errors.lookup("55000")("rangefeeds require the kv.rangefeed.enabled setting"), "SET CLUSTER SETTING"),
        (psycopg.errors.InsufficientPrivilege("no"), "needs SELECT"),
    ],
)
def test_a_feed_that_may_not_be_created_says_so_once_with_the_way_out(error: Exception, advice: str) -> None:
    refused = [Played([], error) for _ in range(4)]
    with capture_logs() as logs, feed(*refused) as (made, heard):
        eventually(lambda: refused[-1].closed)
        assert not made.arrives
        assert heard == []
    told = [line for line in logs if line["event"] == "hints.feed_refused"]
    assert len(told) == 1
    assert advice in told[0]["way_out"]


def test_a_connection_that_cannot_be_made_is_tried_again() -> None:
    heard: list[Hint] = []
    tries: list[Callable[[], Played]] = [_refuse, _refuse, lambda: Played([RESOLVED])]
    made = Changefeed(lambda: tries.pop(0)(), heard.append)
    made.start()
    try:
        eventually(lambda: heard == [EVERYTHING])
    finally:
        made.stop()


def _refuse() -> Played:
    raise psycopg.OperationalError("connection refused")
