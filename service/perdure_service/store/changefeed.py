"""Hints on CockroachDB: a changefeed without a sink, whose rows say which keys were written, read as they come.

One statement that never ends, on a connection of its own, by psycopg 3 (also where the engine's driver is psycopg2,
which cannot read rows before a statement has ended). It sees what every server commits, this one included, about when
the commit returns, so nobody has to tell anybody. Only keys come, and only of tables that somebody may wait for.

Rows that say how far the feed has come (`resolved`) arrive every few seconds, whether anything was written or not: they
are its heartbeat. When none has come for three times as long, the connection is ended and made anew. After each start
the first hint is that everything may have changed, as is the last one when it breaks: rows may have been missed.

The options, and what was seen of them, are in docs/cockroachdb.md.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import structlog

from perdure_service.store.dbos_tables import NOTIFICATION_CHANNELS, NOTIFICATIONS, STREAMS, WORKFLOW_EVENTS
from perdure_service.store.hints import EVERYTHING, FIRST_RETRY_S, LAST_RETRY_S, NOTHING, Heard, Hint
from perdure_service.store.silence import SilenceWatch, process_watch
from perdure_service.store.sqlstates import INSUFFICIENT_PRIVILEGE, JITTER, sqlstate_of

TABLES = ("perdure.run_event", "perdure.approval", NOTIFICATIONS, WORKFLOW_EVENTS, STREAMS)

STATEMENT = (
    f"CREATE CHANGEFEED FOR TABLE {', '.join(TABLES)} WITH envelope = 'key_only', initial_scan = 'no', "
    "resolved = '1s', min_checkpoint_frequency = '1s', schema_change_policy = 'nobackfill', full_table_name"
)

HEARTBEAT_S = 3.0
"""How often `resolved` rows come, at most: they are asked for every second, and were seen every 2 to 3."""

SILENT_S = 3 * HEARTBEAT_S
"""How long no row may come before the feed counts as broken."""

REFUSED_RETRY_S = 60.0
"""How long a feed that may not be created is not tried again."""

_, _VALUES, _STREAMS = NOTIFICATION_CHANNELS

log = structlog.get_logger()


class Rows(Protocol):
    """What yields a statement's rows as they come: psycopg's cursor."""

    def stream(self, query: Any, /) -> Iterator[Sequence[Any]]:
        """Runs a statement."""
        ...


class FeedConnection(Protocol):
    """What is needed of psycopg's connection."""

    def cursor(self) -> Rows:
        """Returns a cursor."""
        ...

    def fileno(self) -> int:
        """Returns the socket's descriptor."""
        ...

    def close(self) -> None:
        """Closes it."""
        ...


def hint_of(row: Sequence[Any]) -> Hint | None:
    """Returns what a row (table, key, value) says; None for a heartbeat. Of what is not understood, everything."""
    table, key = row[0], row[1]
    if table is None:
        return None
    try:
        parts = [str(part) for part in json.loads(bytes(key) if isinstance(key, memoryview) else key)]
        match str(table).rpartition(".")[2]:
            case "run_event":
                return Hint(runs=frozenset({parts[0]}))
            case "approval":
                return Hint(runs=frozenset({parts[0]}), approvals=True)
            case "notifications":
                return Hint(messages=True)  # keyed by the message
            case "workflow_events":
                return Hint(wakes=frozenset({(_VALUES, f"{parts[0]}::{parts[1]}")}))
            case "streams":
                return Hint(wakes=frozenset({(_STREAMS, f"{parts[0]}::{parts[1]}")}))
            case _:
                return EVERYTHING
    except (ValueError, TypeError, IndexError):
        return EVERYTHING


def way_out(error: BaseException) -> str | None:
    """Returns what an operator can do when the feed may not be created; None for an error that may pass."""
    if "rangefeed" in str(error):
        return "an administrator can allow it: SET CLUSTER SETTING kv.rangefeed.enabled = true"
    if sqlstate_of(error) == INSUFFICIENT_PRIVILEGE:
        return f"the server's user needs SELECT (or CHANGEFEED) on {', '.join(TABLES)}"
    return None


class Changefeed:
    """See the module. Reads in a thread of its own."""

    tells_all = False

    def __init__(self, connect: Callable[[], FeedConnection], heard: Heard, watch: SilenceWatch | None = None) -> None:
        """Creates it.

        Args:
            connect: Makes a connection in autocommit mode, without a statement timeout; blocks.
            heard: Told of each hint, from the feed's thread.
            watch: Ends the connection when no row comes; by default the process's own.
        """
        self._connect = connect
        self._heard = heard
        self._watch = watch or process_watch()
        self._stop = threading.Event()
        self._told = ""
        self._conn: FeedConnection | None = None
        self._last_row: float | None = None
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)

    @property
    def arrives(self) -> bool:
        """Whether a row has come lately."""
        return self._last_row is not None and time.monotonic() - self._last_row < SILENT_S

    def start(self) -> None:
        """Begins to read."""
        self._thread.start()

    def stop(self) -> None:
        """Ends."""
        self._stop.set()
        conn = self._conn
        if conn is not None:
            self._watch.end(conn)
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @property
    def alone(self) -> bool:
        """True: the others hear of commits by themselves."""
        return True

    def send(self, hint: Hint) -> None:
        """Does nothing: the others see what is committed."""

    def _run(self) -> None:
        pause_s = FIRST_RETRY_S
        while not self._stop.is_set():
            try:
                self._conn = conn = self._connect()
                try:
                    for hint in self._hints(conn):
                        self._heard(hint)
                        pause_s = FIRST_RETRY_S
                finally:
                    self._conn = None
                    conn.close()
                log.warning("hints.feed_ended")
            except Exception as error:  # noqa: BLE001 - logged; it is created again
                if not self._stop.is_set():
                    pause_s = max(pause_s, self._tell(error))
            was_open, self._last_row = self._last_row is not None, None
            if was_open and not self._stop.is_set():
                self._heard(EVERYTHING)  # whoever waits must look by himself again
            self._stop.wait(pause_s * JITTER.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, LAST_RETRY_S)

    def _hints(self, conn: FeedConnection) -> Iterator[Hint]:
        """Yields what the rows say, once the first one shows that the feed is there: until then nothing is known."""
        rows = conn.cursor().stream(STATEMENT)

        def next_row(_conn: FeedConnection) -> Sequence[Any] | None:
            return next(rows, None)

        while (row := self._watch.watched(next_row, SILENT_S)(conn)) is not None:
            begins, self._last_row = self._last_row is None, time.monotonic()
            if begins:
                self._told = ""
                yield EVERYTHING
            hint = hint_of(row)
            if hint is not None and hint != NOTHING:
                yield hint

    def _tell(self, error: Exception) -> float:
        """Logs why there is no feed, each reason with a way out once; returns how long to wait at least, seconds."""
        advice = way_out(error)
        if advice is None:
            log.warning("hints.connection_lost", error=type(error).__name__)
            return 0.0
        if advice != self._told:
            self._told = advice
            log.error("hints.feed_refused", way_out=advice, until_then="everything is polled")
        return REFUSED_RETRY_S
