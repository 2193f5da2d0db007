"""The checkpoint writer: while one commit is under way the next batch gathers, and two may be under way at once.

A row that is submitted waits for nothing but a writer that is free, so a lone row is written at once, and many share a
commit because they came while the last one was under way. Two writers of 64 rows wrote more than one of 128, and more
than four of 32 (on two cores with PostgreSQL; larger batches gained nothing). The second one joins when it has
something to gain: when a whole batch waits, or when the first one takes long.

**With few runs the first writer is a loop.** A hand-over from thread to thread, and the wait for the interpreter's lock
after it, cost more than many a commit. So the agents' loop, where most rows come from, sends a batch when it comes to
it, and is told of the answer as of any socket's. What a loop should not do is left to a thread: to connect, and to
repeat what failed. And as code of agents may block their loop, a thread watches a clock: rows that the loop leaves for
longer than 40 ms the threads write from then on, until the loop moves again; and an answer that the loop leaves they
take. When large batches are wanted (`MANY_ROWS`), without such a loop, or with a driver that cannot, both writers are
threads.

**Here and now.** When a run moves alone and commits are fast, the loop waits for the answer at once, for `HERE_S` at
most, and so does a thread that submits a row and runs no loop of its own: nobody else has anything to do meanwhile.
What takes longer goes on as every batch of the loop. Starts come from gRPC's loop, and are left to the agents': it goes
on with the run at once, and gRPC's tells the caller while the run's first step is being committed.

**Pace.** A commit costs the interpreter nearly the same with two rows as with twenty. While the process has all the
work that it can do (`pace`), small batches would take the time in which their successors could have gathered: then one
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

**Who has what.** Under the lock `_changed` a row goes from the queue to one batch. A batch belongs to the thread that
took it; the loop's, a *flight*, from when it was left to the loop, to whoever holds `taking`: the loop while it looks,
or the thread from when it adopts the flight, for good. The loop's session has one flight at a time; who may close it
is said in `writer_sessions`.

**If the process dies**, a batch is committed as a whole or not at all; who waited for it is gone, too.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import sqlalchemy as sa
import structlog

from perdure_service import event_loop
from perdure_service.store import hot_statements
from perdure_service.store.checkpoints import CheckpointRow, EventsRow, Written, begin_all, commit_all, written_by
from perdure_service.store.engine import is_cockroach
from perdure_service.store.pace import MOVED_WITHIN_S, Pace
from perdure_service.store.sqlstates import (
    CONFLICTS,
    JITTER,
    LOCK_NOT_AVAILABLE,
    QUERY_CANCELED,
    STATEMENT_COMPLETION_UNKNOWN,
    is_connection_lost,
    sqlstate_of,
)
from perdure_service.store.writer_sessions import LoopSession, Session
from perdure_service.telemetry.metrics import DB_RETRIES, METERS, SQLSTATE

WRITERS = 2
MAX_ROWS = 64
"""See the module."""
CONNECTIONS = WRITERS + 1
"""Of the two threads, and of the loop."""

MANY_ROWS = 16
"""If a batch had better have so many, it is the threads': then batches are larger, and with 128 clients 5 to 10 % more
runs a second; with 32 it is the same, with 8 it is the loop that makes 5 % more."""

JOIN_AFTER_S = 0.02
"""How long the first writer must be busy before the second one begins with less than a batch: small batches cost the
database and us nearly as much as large ones. And how long a batch waits at most for its size, after the one before."""

GRACE_S = 0.02
"""How much later than the loop the thread takes what is due: a turn of a loop that has much to do is long."""

HERE_S = 0.002
"""How long whoever submits a row may wait for it, and how fast the last commit must have been for that to be tried."""

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

Answer = Callable[[Sequence[tuple[CheckpointRow, Written | None]]], None]

log = structlog.get_logger()


class Flight:
    """A batch that was sent on the loop's session; see the module."""

    __slots__ = ("adopted", "begun", "exchange", "rows", "seen", "taking")

    def __init__(self, rows: Sequence[CheckpointRow], exchange: hot_statements.Exchange) -> None:
        self.rows = rows
        self.exchange = exchange
        self.begun = time.monotonic()
        self.taking = threading.Lock()
        self.adopted = False
        self.seen = False
        """Whether the thread has seen that the loop leaves what has come."""


class CheckpointWriter:
    """See the module. `submit` may be called from any thread."""

    def __init__(
        self,
        engine: sa.Engine,
        answer: Answer,
        moving: Callable[[float], int] = lambda _within: 0,
        alone: Callable[[float], bool] = lambda _within: False,
    ) -> None:
        """Creates it; `start` begins to write.

        Args:
            engine: Of its own, with `CONNECTIONS` (`reserve_connections`).
            answer: Is told of each row of a batch what was written, None for not known to be. Called from a writer's
                thread, on the loop, or by whoever submits a row, before `submit` returns; must neither wait nor raise.
            moving: Returns how many runs here have moved within so many seconds.
            alone: Returns whether they are one at most. Both are asked under the writer's lock, and may take one under
                which nobody submits a row.
        """
        self._engine = engine
        self._answer = answer
        self._alone = alone
        self._mixed = not is_cockroach(engine)
        self._rows: deque[CheckpointRow] = deque()
        self._events: deque[CheckpointRow] = deque()
        self._again: deque[Sequence[CheckpointRow]] = deque()
        """Batches of the loop that failed: for the thread, each by itself."""
        self._changed = threading.Condition()
        self._open = False
        self._busy = 0
        self._busy_since = 0.0
        self._begun = 0.0
        self._waiting_since = 0.0
        """When the row came that waits longest, or one that was taken before it."""
        self._took = 0.0
        """How long the last commit took, seconds."""
        self._pace = Pace(moving)
        self._clock_watched = False
        self._called = False
        self._session = LoopSession(engine)
        self._flight: Flight | None = None
        self._flying = False
        """Whether the loop's session is in use."""
        self._posted = False
        self._timer: asyncio.TimerHandle | None = None
        self._late = False
        """Whether the loop does not come to what it should do."""
        self._threads: list[threading.Thread] = []

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Begins to write. Blocks while it connects.

        Args:
            loop: Whose turns it may use; None to write from threads only.
        """
        if loop is not None and hot_statements.is_direct(self._engine):
            self._session.attach(loop)
        self._open = True
        for number in range(WRITERS):
            thread = threading.Thread(target=self._run, name=f"checkpoint-writer-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Writes what waits, and ends the threads; those that hang in the database are not waited for longer."""
        with self._changed:
            self._open = False
            self._late = True
            self._changed.notify_all()
        latest = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, latest - time.monotonic()))
        self._session.retire()
        self._engine.dispose()

    def submit(self, row: CheckpointRow, *, soon: bool = True) -> bool:
        """Takes a row to be written; returns False when it takes none: the caller writes it by itself.

        Args:
            row: It.
            soon: False if its run may have more to say before it waits: then it is not waited for here and now.
        """
        with self._changed:
            if not self._open or len(self._rows) + len(self._events) >= MAX_WAITING:
                return False
            here = soon and not (self._rows or self._events) and self._may_wait_here()
            if not here:
                if not (self._rows or self._events):
                    self._waiting_since = time.monotonic()
                row.waits = True
                (self._events if type(row) is EventsRow else self._rows).append(row)
                self._call()
                return True
            self._flying = True
            self._begin()
        self._fly([row], wait=True)
        return True

    def replace(self, row: CheckpointRow, by: CheckpointRow, then: Callable[[], None]) -> bool:
        """Writes a row in the place of one that waits, of the same run; returns False if that is taken already.

        Args:
            row: The one that waits.
            by: The other one, which is what `answer` is told of.
            then: Called when it is so, before anybody can take it; must take no lock.
        """
        with self._changed:
            if not row.waits:
                return False
            row.waits, by.waits, row.instead = False, True, by
            then()
            return True

    def hurry(self, row: CheckpointRow) -> None:
        """Is told that somebody waits now for a row that was submitted: writes it here if that may be done."""
        if not (row.waits and self._loop_writes):
            return
        with self._changed:
            if not (row.waits and self._may_wait_here()):
                return
            self._flying = True
            rows = self._take_batch()
        self._fly(rows, wait=True)

    def stand_in(self) -> None:
        """Is called by whoever is about to wait for a row: if it holds up the loop by that, the threads write."""
        if self._loop is not None and event_loop.running() is self._loop:
            with self._changed:
                self._note_late()
                self._called = True
                self._changed.notify_all()

    def _may_wait_here(self) -> bool:
        """Returns whether this thread may send a lone row on the loop's session, and wait for it."""
        return self._loop_writes and event_loop.running() in (self._loop, None) and self._may_wait()

    def _may_wait(self) -> bool:
        """Returns whether whoever begins a batch now may wait for it."""
        return not self._busy and self._took < HERE_S and self._pace.rows() <= 1 and self._alone(MOVED_WITHIN_S)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop | None:
        return self._session.loop

    @property
    def _loop_writes(self) -> bool:
        """Whether the loop is the first writer now, and it has what it needs."""
        return not self._late and self._session.connected and self._pace.rows() < MANY_ROWS

    def _call(self) -> None:
        """Sees to it that a writer looks if there is something to take, or a clock to watch.

        One that was called and has not looked yet will do.
        """
        by_loop = self._loop_writes
        if by_loop and not (self._flying or self._posted) and (not self._timer or self._may_take(first=True)):
            self._post_turn()
        if not self._called and (not self._clock_watched or self._may_take(first=not by_loop)):
            self._called = True
            self._changed.notify()

    def _run(self) -> None:
        """What the threads do."""
        session = Session(self._engine)
        while (taken := self._take()) is not None:
            if isinstance(taken, Flight):
                taken.exchange.wait()
                self._land(taken)
                continue
            written: dict[str, Written] = {}
            began = time.monotonic()
            try:
                written = self._write(session, taken)
            except Exception as error:  # noqa: BLE001 - logged; whoever is not written asks by itself
                log.warning("checkpoints.batch_failed", rows=len(taken), error=type(error).__name__)
                session.drop()
            with self._changed:
                self._busy -= 1
                self._took = time.monotonic() - began
                if self._rows or self._events:
                    self._call()  # another one may begin while this one tells
            self._tell(taken, written)
            if written and not self._session.connected:
                self._session.connect_again()
        session.drop()

    def _tell(self, rows: Sequence[CheckpointRow], written: dict[str, Written]) -> None:
        """Tells what came of a batch, in a context of its own, whoever's thread it is."""
        try:
            contextvars.Context().run(self._answer, [(row, written.get(row.workflow_id)) for row in rows])
        except Exception as error:  # noqa: BLE001 - logged; this thread is for all runs
            log.error("checkpoints.answer_failed", rows=len(rows), error=type(error).__name__)

    def _take(self) -> Sequence[CheckpointRow] | Flight | None:
        """Waits for something that a thread must do, and takes it; None when there is no more and will be none."""
        with self._changed:
            taken = self._wait_and_take()
            if taken is not None and (self._rows or self._events or self._flying):
                self._call()  # this one does not watch the clock any more
            return taken

    def _wait_and_take(self) -> Sequence[CheckpointRow] | Flight | None:
        while True:
            self._called = False  # from here on a call is needed: it looks now
            if self._again:
                self._begin()
                return self._again.popleft()
            flight = self._left_flight()
            if flight is not None:
                self._note_late()
                return flight
            if self._may_take(first=not self._loop_writes):
                if self._loop_writes and not self._busy:
                    self._note_late()
                return self._take_batch()
            if not (self._open or self._rows or self._events or self._flying):
                self._changed.notify_all()  # the other one may have waited for the same
                return None
            wait_s = self._clock()
            if wait_s is not None and not self._clock_watched:
                self._clock_watched = True
                self._changed.wait(wait_s)
                self._clock_watched = False
            else:
                self._changed.wait()

    def _note_late(self) -> None:
        """Notes that the loop does not come to what it should do, until it has its next turn."""
        self._late = True
        if not self._posted:
            self._post_turn()

    def _clock(self) -> float | None:
        """Returns after how many seconds a thread must look again though nobody calls it; None for never."""
        due: list[float] = []
        if self._rows or self._events:
            due.append(self._left_in() if self._loop_writes and not self._busy else self._due_in())
        if self._flying:
            due.append(JOIN_AFTER_S)
        return max(min(due), 0.001) if due else None

    def _take_batch(self) -> list[CheckpointRow]:
        self._called = False
        self._begin()
        taken: list[CheckpointRow] = []
        keys: set[str] = set()
        kind = None
        for waiting in (self._rows, self._events):
            left: list[CheckpointRow] = []
            while waiting and len(taken) < MAX_ROWS:
                row = waiting.popleft()
                row = row.instead or row
                if keys.isdisjoint(row.keys) and (self._mixed or kind in (None, type(row))):
                    kind = type(row)
                    row.waits = False
                    taken.append(row)
                    keys.update(row.keys)
                else:
                    left.append(row)
            waiting.extendleft(reversed(left))
        if self._rows or self._events:
            self._call()
        taken.sort(key=lambda row: row.workflow_id)
        return taken

    def _begin(self) -> None:
        """Notes that a batch begins."""
        self._begun = time.monotonic()
        self._busy_since = self._begun if not self._busy else self._busy_since
        self._busy += 1

    def _may_take(self, *, first: bool) -> bool:
        """Returns whether a batch may begin now; by the first writer, or by the other one."""
        waiting = len(self._rows) + len(self._events)
        if not waiting or self._busy >= WRITERS:
            return False
        if self._busy:
            return waiting >= MAX_ROWS or self._due_in() <= 0
        if first:
            return waiting >= min(self._pace.rows(), MAX_ROWS) or self._due_in() <= 0
        return self._left_in() <= 0

    def _due_in(self) -> float:
        """Returns in how many seconds a batch begins that is not whole."""
        return (self._busy_since if self._busy else self._begun) + JOIN_AFTER_S - time.monotonic()

    def _left_in(self) -> float:
        """Returns in how many seconds the loop has left what it should have taken."""
        return max(self._begun, self._waiting_since) + JOIN_AFTER_S + GRACE_S - time.monotonic()

    def _write(self, session: Session, rows: Sequence[CheckpointRow]) -> dict[str, Written]:
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

    # ---- the loop's part ---------------------------------------------------------------------------------------------

    def begin(self, conn: sa.Connection, rows: Sequence[CheckpointRow]) -> hot_statements.Exchange | None:
        """Begins to `commit`; None when that must be waited for, by a thread."""
        return begin_all(conn, rows)

    def _post_turn(self) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # it is closed; the thread will see that it does nothing
            event_loop.call_soon(self._loop, self._turn, contextvars.Context())
            self._posted = True

    def _turn(self) -> None:
        """Takes a batch, on the loop, if there is one to be taken now; else when the next one is due."""
        rows, wait = None, False
        with self._changed:
            self._posted = False
            self._late = self._late and not self._open
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not self._loop_writes and (self._rows or self._events):
                self._call()
            elif not self._flying:
                wait = self._may_wait()
                rows = self._take_next()
        if rows is not None:
            self._fly(rows, wait=wait and len(rows) == 1)

    def _take_next(self) -> list[CheckpointRow] | None:
        if self._may_take(first=True):
            self._flying = True
            return self._take_batch()
        due = (self._rows or self._events) and self._busy < WRITERS  # else it is called when one of them has ended
        if due and self._loop is not None and self._timer is None:
            self._timer = self._loop.call_later(max(0.0, self._due_in()), self._turn, context=contextvars.Context())
        return None

    def _fly(self, rows: Sequence[CheckpointRow], *, wait: bool) -> None:
        """Sends a batch that was taken for the loop's session, and leaves it, or waits for it a little before."""
        flight = self._send(rows)
        if flight is None:
            return
        if wait and flight.exchange.wait(HERE_S):
            self._land(flight)
        else:
            self._leave(flight)

    def _send(self, rows: Sequence[CheckpointRow]) -> Flight | None:
        """Sends a batch on the loop's session; None when it could not, and the thread has it."""
        try:
            exchange = self.begin(self._session.connection, rows)
        except Exception as error:  # noqa: BLE001 - the thread tries it again, and tells
            self._repeat(rows, lost=is_connection_lost(error))
            return None
        if exchange is None:
            self._repeat(rows, lost=False)
            return None
        return Flight(rows, exchange)

    def _leave(self, flight: Flight) -> None:
        """Leaves a flight to the loop."""
        assert self._loop is not None
        flight.exchange.begin_waiting()
        with self._changed:
            self._flight = flight
            self._call()  # the clock must be watched
        if event_loop.running() is self._loop:
            self._watch(flight)
        else:
            with suppress(RuntimeError):  # it is closed; the thread will see that
                self._loop.call_soon_threadsafe(self._watch, flight, context=contextvars.Context())

    def _watch(self, flight: Flight) -> None:
        if flight is not self._flight:
            return  # a thread has landed it before the loop came here, and the watch is another one's by now
        self._session.unwatch()
        if not flight.adopted:  # and if it cannot be watched, the thread will find that nobody looks
            self._session.watch(partial(self._arrived, flight), sending=not flight.exchange.sent)

    def _arrived(self, flight: Flight) -> None:
        """Is called on the loop when something has come, or can be sent."""
        if flight.adopted:
            self._session.unwatch()
        elif flight.taking.acquire(blocking=False):  # else the thread is just looking
            try:
                over = flight.exchange.advance()
            finally:
                flight.taking.release()
            if over:
                self._session.unwatch()
                self._land(flight)
            elif flight.exchange.sent:
                self._session.sent()

    def _land(self, flight: Flight) -> None:
        """Tells what came of a flight; on the loop, by the thread that adopted it, or by whoever waited for it here."""
        flight.exchange.end_waiting()
        try:
            written = written_by(flight.exchange)
        except Exception as error:  # noqa: BLE001 - the thread tries it again, and tells
            self._repeat(flight.rows, lost=is_connection_lost(error))
            return
        rows = None
        with self._changed:
            self._busy -= 1
            self._flying = False
            self._flight = None
            self._took = time.monotonic() - flight.begun
            if self._rows or self._events:
                if self._loop_writes and event_loop.running() is self._loop:
                    rows = self._take_next()
                else:
                    self._call()
        try:
            if rows is not None:
                self._fly(rows, wait=False)  # before telling, so that it is under way meanwhile
        finally:
            self._tell(flight.rows, written)

    def _repeat(self, rows: Sequence[CheckpointRow], *, lost: bool) -> None:
        """Gives the thread what has failed on the loop's session."""
        if lost:
            self._session.retire()
        with self._changed:
            self._busy -= 1
            self._flying = False
            self._flight = None
            self._again.append(rows)
            self._called = True
            self._changed.notify_all()

    def _left_flight(self) -> Flight | None:
        """Returns the flight, for the thread to adopt, if the loop leaves it: now, or when the thread looked before."""
        flight = self._flight
        if flight is None or not flight.taking.acquire(blocking=False):
            return None
        if not flight.exchange.over:
            if flight.seen or self._late:
                flight.adopted = True  # and `taking` is kept
                return flight
            if time.monotonic() >= flight.begun + JOIN_AFTER_S:
                flight.seen = flight.exchange.has_more()
        flight.taking.release()
        return None
