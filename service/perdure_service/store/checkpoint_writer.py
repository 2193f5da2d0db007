"""The checkpoint writer: while one commit is under way the next batch gathers, and two may be under way at once.

A row that is submitted waits for nothing but a writer that is free, so a lone row is written at once, and many share a
commit because they came while the last one was under way. Two writers of 64 rows wrote more than one of 128, and more
than four of 32 (on two cores with PostgreSQL; larger batches gained nothing). The second one joins when it has
something to gain: when a whole batch waits, or when the first one takes long.

**Pace.** A commit costs the interpreter nearly the same with two rows as with twenty. While the process has all the
work that it can do (`Pace`), small batches would take the time in which their successors could have gathered: then one
waits for most of the runs that move to have a row in it, but begins 20 ms after the one before it at the latest. With
128 clients that was a third as many commits, and 15 % more runs a second. A process that has time to spare never waits,
nor does a run that moves alone.

**What a caller is told**: that its row is written, once the commit has returned; or that it is not known to be. Then
its own transaction must find out, as `checkpoints` says. Nothing here ever says that a row is *not* committed.

**Errors.** A conflict, a lost connection or an ambiguous commit repeats the batch a few times: a row that an earlier
attempt has committed is not written again, and whoever asked for it finds that out. Any other error is one row's, so
the batch is halved until that row is alone. Nobody waits here for a database that is away: callers do that in their
own way.

**Order.** Rows of one run never meet, as its execution presents one at a time (its slot). Checkpoints go before events
that ride alone.

**If the process dies**, a batch is committed as a whole or not at all; who waited for it is gone, too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import sqlalchemy as sa
import structlog

from perdure_service.store.checkpoints import CheckpointRow, EventsRow, Written, commit_all
from perdure_service.store.engine import is_cockroach
from perdure_service.store.sqlstates import (
    CONFLICTS,
    JITTER,
    LOCK_NOT_AVAILABLE,
    QUERY_CANCELED,
    STATEMENT_COMPLETION_UNKNOWN,
    is_connection_lost,
    sqlstate_of,
)
from perdure_service.telemetry.metrics import DB_RETRIES, METERS, SQLSTATE

WRITERS = 2
MAX_ROWS = 64
"""See the module."""

JOIN_AFTER_S = 0.02
"""How long the first writer must be busy before the second one begins with less than a batch: small batches cost the
database and us nearly as much as large ones. And how long a batch waits at most for its size, after the one before."""

FULL = 0.85
"""Of a core, that the process must use to have all the work that it can do: the interpreter's lock lets it use one."""
LOOK_EVERY_S = 0.05
MOVED_WITHIN_S = 0.25
"""A run moves when its code has called within this time: who waits for people or models brings no rows."""
SHARE = 0.7
"""Of the runs that move, whose rows make a batch large enough. 0.35 gained half as much; 1 waits for the slowest."""
FADES_FULL, FADES = 0.9, 0.5
"""What is left, at the next look, of how many moved: runs that began together also end together, and for a moment few
seem to move. When the process is not full any more, it should soon be forgotten."""

MAX_WAITING = 4096
"""Rows that wait at most; who comes then writes alone, and so waits for a connection as everybody did."""

ATTEMPTS = 4
"""How often a batch is tried when it conflicts."""
LOST_ATTEMPTS = 2
"""How often when the connection is lost: the second one is new."""
FIRST_PAUSE_S = 0.005

STOP_S = 5.0
"""How long what waits may take to be written when it is stopped."""

TOO_SLOW = frozenset({QUERY_CANCELED, LOCK_NOT_AVAILABLE})
"""Nobody knows because of which row; each goes on alone, at its own pace."""

_SESSION = (
    # A plan made while the tables were empty would scan them for ever; these statements live on their keys.
    "SET plan_cache_mode = force_generic_plan", "SET enable_seqscan = off", "SET enable_hashjoin = off",
    "SET enable_mergejoin = off", "SET lock_timeout = '1s'",
)  # fmt: skip
"""Of PostgreSQL's sessions only; CockroachDB refuses most of them."""

Answer = Callable[[Sequence[tuple[CheckpointRow, Written | None]]], None]

log = structlog.get_logger()


class CheckpointWriter:
    """See the module. `submit` may be called from any thread."""

    def __init__(self, engine: sa.Engine, answer: Answer, moving: Callable[[float], int] = lambda _within: 0) -> None:
        """Creates it; `start` begins to write.

        Args:
            engine: Of its own, with a connection for each writer (`reserve_connections`).
            answer: Is told of each row of a batch what was written, None for not known to be. Called from the writer's
                thread, which waits for it; must not raise.
            moving: Returns how many runs here have moved within so many seconds.
        """
        self._engine = engine
        self._answer = answer
        self._mixed = not is_cockroach(engine)
        self._rows: deque[CheckpointRow] = deque()
        self._events: deque[CheckpointRow] = deque()
        self._changed = threading.Condition()
        self._open = False
        self._busy = 0
        self._busy_since = 0.0
        self._begun = 0.0
        self._pace = Pace(moving)
        self._clock_watched = False
        self._called = False
        self._threads = [
            threading.Thread(target=self._run, name=f"checkpoint-writer-{n}", daemon=True) for n in range(WRITERS)
        ]

    def start(self) -> None:
        """Starts the threads."""
        self._open = True
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Writes what waits, and ends the threads; those that hang in the database are not waited for longer."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        latest = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=max(0.0, latest - time.monotonic()))
        self._engine.dispose()

    def submit(self, row: CheckpointRow) -> bool:
        """Takes a row to be written; returns False when it takes none: the caller writes it by itself."""
        with self._changed:
            if not self._open or len(self._rows) + len(self._events) >= MAX_WAITING:
                return False
            (self._events if type(row) is EventsRow else self._rows).append(row)
            self._call()
        return True

    def _call(self) -> None:
        """Wakes a writer if there is something to take, or a clock to watch.

        One that was called and still sleeps will do: it looks before it waits again.
        """
        if not self._called and (self._may_take() or not self._clock_watched):
            self._called = True
            self._changed.notify()

    def _run(self) -> None:
        session = _Session(self._engine, tuned=self._mixed)
        while (rows := self._take()) is not None:
            written: dict[str, Written] = {}
            try:
                written = self._write(session, rows)
            except Exception as error:  # noqa: BLE001 - logged; whoever is not written asks by itself
                log.warning("checkpoints.batch_failed", rows=len(rows), error=type(error).__name__)
                session.drop()
            with self._changed:
                self._busy -= 1
                if self._rows or self._events:
                    self._call()  # another one may begin while this one tells
            try:
                self._answer([(row, written.get(row.workflow_id)) for row in rows])
            except Exception as error:  # noqa: BLE001 - logged; this thread is for all runs
                log.error("checkpoints.answer_failed", rows=len(rows), error=type(error).__name__)
        session.drop()

    def _take(self) -> list[CheckpointRow] | None:
        """Waits for rows and takes a batch; None when there are no more and will be none."""
        with self._changed:
            while not self._may_take():
                some = bool(self._rows or self._events)
                if not some and not self._open:
                    return None
                self._called = False  # from here on a call is needed: it has just looked
                if some and not self._clock_watched:
                    self._clock_watched = True
                    self._changed.wait(self._due_in())
                    self._clock_watched = False
                else:
                    self._changed.wait()
            self._called = False
            self._begun = time.monotonic()
            self._busy_since = self._begun if not self._busy else self._busy_since
            self._busy += 1
            taken: list[CheckpointRow] = []
            keys: set[str] = set()
            kind = None if self._mixed else type(self._rows[0] if self._rows else self._events[0])
            for waiting in (self._rows, self._events):
                left: list[CheckpointRow] = []
                while waiting and len(taken) < MAX_ROWS:
                    row = waiting.popleft()
                    if keys.isdisjoint(row.keys) and kind in (None, type(row)):
                        taken.append(row)
                        keys.update(row.keys)
                    else:
                        left.append(row)
                waiting.extendleft(reversed(left))
            if self._rows or self._events:
                self._call()
        taken.sort(key=lambda row: row.workflow_id)
        return taken

    def _may_take(self) -> bool:
        waiting = len(self._rows) + len(self._events)
        if not waiting or waiting >= MAX_ROWS:
            return bool(waiting)
        return (not self._busy and waiting >= self._pace.rows()) or self._due_in() <= 0

    def _due_in(self) -> float:
        """Returns in how many seconds a batch begins that is not whole."""
        return (self._busy_since if self._busy else self._begun) + JOIN_AFTER_S - time.monotonic()

    def _write(self, session: _Session, rows: Sequence[CheckpointRow]) -> dict[str, Written]:
        """Writes a batch, repeated as the module says; returns what was written, by workflow id."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.commit(session.connection, rows)
            except (sa.exc.DBAPIError, ValueError) as error:  # psycopg2 refuses some values before it sends them
                code = sqlstate_of(error)
                lost = is_connection_lost(error) or code == STATEMENT_COMPLETION_UNKNOWN
                if lost:
                    session.drop()
                else:
                    session.roll_back()
                if code in TOO_SLOW or (lost and attempt >= LOST_ATTEMPTS):
                    break
                if not lost and code not in CONFLICTS:
                    if len(rows) == 1:
                        log.warning("checkpoints.row_refused", workflow_id=rows[0].workflow_id, sqlstate=code)
                        break
                    half = len(rows) // 2
                    return self._write(session, rows[:half]) | self._write(session, rows[half:])
                METERS.add(DB_RETRIES, {SQLSTATE: code or "none"})
                time.sleep(FIRST_PAUSE_S * 4 ** (attempt - 1) * JITTER.uniform(0.5, 1.5))
        return {}

    def commit(self, conn: sa.Connection, rows: Sequence[CheckpointRow]) -> dict[str, Written]:
        """Writes rows and commits them, in one transaction."""
        return commit_all(conn, rows)


class Pace:
    """How many rows a batch had better have, see the module. For one thread at a time.

    It is asked under the writer's lock, and `moving` may take a lock under which nobody submits a row.
    """

    def __init__(self, moving: Callable[[float], int]) -> None:
        self._moving = moving
        self._looked, self._spent = self._read()
        self._rows = 0.0

    def rows(self) -> float:
        """Returns the number; any is enough when the process has time to spare."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            now, spent = self._read()
            full = spent - self._spent >= FULL * (now - self._looked)
            self._looked, self._spent = now, spent
            self._rows *= FADES_FULL if full else FADES
            if full:
                self._rows = max(self._rows, SHARE * self._moving(MOVED_WITHIN_S))
        return self._rows

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.monotonic(), time.process_time()


class _Session:
    """A writer's connection, which commits each statement by itself; made anew when it is lost."""

    def __init__(self, engine: sa.Engine, *, tuned: bool) -> None:
        self._engine = engine
        self._tuned = tuned
        self._conn: sa.Connection | None = None

    @property
    def connection(self) -> sa.Connection:
        if self._conn is None:
            self._conn = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            for statement in _SESSION if self._tuned else ():
                self._conn.exec_driver_sql(statement)
        return self._conn

    def roll_back(self) -> None:
        """Ends what failed; drops the connection if it cannot."""
        try:
            self.connection.rollback()
        except sa.exc.SQLAlchemyError:
            self.drop()

    def drop(self) -> None:
        """Ends the connection."""
        conn, self._conn = self._conn, None
        if conn is not None:
            with suppress(sa.exc.SQLAlchemyError):
                conn.invalidate()
            with suppress(sa.exc.SQLAlchemyError):
                conn.close()
