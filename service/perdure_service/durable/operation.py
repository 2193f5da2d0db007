"""One commit of DBOS's, with our rows in it: what it adds to which log, and what it does when it is repeated.

Every transaction that DBOS begins through our system database runs inside an `Operation`. The operation takes the
execution's slot before the transaction takes the owner's lock, collects events while DBOS's own SQL runs, and appends
one pack a run as the transaction's last statements. It outlives the transaction: when DBOS repeats it (a lost
connection, a serialization conflict, a COMMIT whose reply never came), the same packs are presented again, and the
log recognises them. It keeps the slot until then: what the execution says meanwhile comes after what may be in the log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import sqlalchemy as sa
import structlog

from perdure_service.domain.events import MAX_PACK_CHARS, Event, Pack, in_pieces
from perdure_service.domain.runs import RunState
from perdure_service.durable.executions import Execution, LogEnd, slot_of
from perdure_service.durable.hops import refuse_to_block
from perdure_service.store import event_log, runs
from perdure_service.store.engine import CheckpointTooSlow
from perdure_service.store.sqlstates import QUERY_CANCELED, sqlstate_of
from perdure_service.telemetry.metrics import DB_RETRIES, METERS, SQLSTATE

Hook = Callable[[sa.Connection], object]

log = structlog.get_logger()


class Adoptable(Protocol):
    """A commit that was tried elsewhere: its pack, and the events that rode on it."""

    pack: Pack
    riding: list[Event]


class Operation:
    """A logical commit.

    Attributes:
        execution: Whose buffered events ride along; None for a commit that no live execution makes.
        attempts: How often the transaction under way has been begun.
        repeated: Whether any transaction of it was begun more than once: what it finds may be its own doing.
        begin: Runs first in each transaction.
        finish: Runs last, before the packs are written; may add events.
        adopted: What the checkpoint writer was given of this very commit and is not known to have written.
        done: Runs once after COMMIT.
        facts: What the code around DBOS's call wants to tell the hooks inside it.
    """

    def __init__(
        self,
        execution: Execution | None,
        *,
        begin: Hook | None = None,
        finish: Hook | None = None,
        done: Callable[[], None] | None = None,
        adopted: Adoptable | None = None,
        **facts: Any,
    ) -> None:
        self.execution = execution
        self.begin = begin
        self.finish = finish
        self.done = done
        self.facts = facts
        self._after: list[Callable[[], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._state = RunState.RUNNING
        self.attempts = 0
        self.repeated = False
        self._events: dict[str, list[Event]] = {}
        self._packs: dict[str, list[Pack]] = {}
        self._failed_by = "none"
        self._riding: list[Event] = []
        self._begins: dict[str, Execution] = {}
        self.adopted = adopted
        if adopted is not None:
            # The writer's was the first attempt: this one is a repeat, and looks whether that one was committed.
            self.attempts = 1
            self._packs[adopted.pack.workflow_id] = [adopted.pack]
            self._riding = list(adopted.riding)
            if execution is not None:
                self._state = execution.state

    def begins(self, execution: Execution) -> None:
        """Says that an execution begins with this commit: it is told where its log ends."""
        self._begins[execution.key.workflow_id] = execution

    def note_ends(self) -> None:
        """Tells the executions whose logs this commit has extended where they end now; they hold their slots."""
        for workflow_id, packs in self._packs.items():
            own = self.execution is not None and self.execution.key.workflow_id == workflow_id
            execution = self.execution if own else self._begins.get(workflow_id)
            if execution is not None and packs and packs[-1].first_sequence is not None:
                execution.log_end = LogEnd.of(packs[-1])

    def add(self, workflow_id: str, *events: Event) -> None:
        """Adds events of a run to this commit."""
        self._events.setdefault(workflow_id, []).extend(events)

    def after(self, callback: Callable[[], None]) -> None:
        """Adds something to do once this transaction, and not a failed one before it, is committed."""
        self._after.append(callback)

    def undo(self, callback: Callable[[], None]) -> None:
        """Adds something to do if the operation fails for good."""
        self._undo.append(callback)

    @property
    def packs(self) -> list[Pack]:
        """What this commit wrote, of each run in the order of its log."""
        return [pack for packs in self._packs.values() for pack in packs]

    def written(self) -> Iterator[tuple[str, Sequence[Pack]]]:
        """Yields the runs that this commit wrote events of, each with what it wrote."""
        yield from self._packs.items()

    def begun(self, conn: sa.Connection) -> None:
        """Is called in each new transaction."""
        self.attempts += 1
        self.repeated = self.repeated or self.attempts > 1
        if self.attempts > 1:
            METERS.add(DB_RETRIES, {SQLSTATE: self._failed_by})
        if self.execution is not None:
            # Events made in a transaction that failed have moved the execution's state; a repeat starts where it was,
            # unless that transaction was committed after all.
            packs = self._packs.get(self.execution.key.workflow_id)
            if self.attempts == 1:
                self._state = self.execution.state
            elif not packs or not event_log.is_committed(conn, packs[0]):
                self.execution.state = self._state
        self._events.clear()
        self._after.clear()
        self._begins.clear()
        if self.begin is not None:
            self.begin(conn)

    def write(self, conn: sa.Connection) -> None:
        """Appends the packs, in order of run ids so that two operations cannot wait for each other."""
        if self.finish is not None:
            self.finish(conn)
        for workflow_id in sorted(self._events):
            events = self._events[workflow_id]
            if self.execution is not None and workflow_id == self.execution.key.workflow_id:
                if workflow_id not in self._packs:
                    # Frozen with the first attempt: a repeat must present the pack it may already have committed.
                    self._riding = self.execution.take()
                events = [*self._riding, *events]
            if not events:
                continue
            if self._append(conn, workflow_id, events):
                runs.apply_events(conn, workflow_id, events)
        for workflow_id in self._packs.keys() - self._events.keys():
            self._drop_unwritten(conn, workflow_id)

    def _drop_unwritten(self, conn: sa.Connection, workflow_id: str) -> None:
        """Forgets what an attempt that failed was to write of a run, when this one found that it must not."""
        packs = self._packs[workflow_id]
        if packs and event_log.is_committed(conn, packs[0]):
            return
        del self._packs[workflow_id]
        if self.execution is not None and workflow_id == self.execution.key.workflow_id:
            self.execution.give_back(self._riding)
            self._riding = []

    def _append(self, conn: sa.Connection, workflow_id: str, events: list[Event]) -> bool:
        """Appends a run's events, as one pack unless they are very long; returns False when they lie there already."""
        packs = self._packs.setdefault(workflow_id, [])
        if packs and event_log.is_committed(conn, packs[0]):
            return False
        packs[:] = [Pack(workflow_id, piece) for piece in in_pieces(events, MAX_PACK_CHARS)]
        for pack in packs:
            event_log.append(conn, pack)
        return True

    def committed(self) -> None:
        """Is called after COMMIT; a further transaction is another commit."""
        self._riding = []
        self._packs.clear()
        self._undo.clear()
        self.attempts = 0
        after, self._after = self._after, []
        for callback in [*after, *([self.done] if self.done else [])]:
            callback()

    def failed_with(self, error: sa.exc.DBAPIError) -> None:
        """Is told why a transaction of it failed; it may be begun again."""
        self._failed_by = sqlstate_of(error) or "none"

    def failed(self) -> None:
        """Is called when the operation has failed for good: events that only rode along are kept for the next one."""
        if self.execution is not None and not self.execution.dead:
            self.execution.give_back(self._riding)
        self._riding = []
        while self._undo:
            self._undo.pop()()


class Operations:
    """The operations under way, a stack for each thread."""

    def __init__(
        self,
        committed: Callable[[list[Pack]], None],
        told: Callable[[Execution | None, str, Sequence[Pack]], None] = lambda _execution, _workflow_id, _packs: None,
    ) -> None:
        """Creates the stack.

        Args:
            committed: Told the packs that a commit has written, after the commit.
            told: Told what a commit has written to each log, and which execution here has written it to its own.
                Called in the order of the log, as the execution's slot is still held; must not raise.
        """
        self._local = threading.local()
        self._committed = committed
        self._told = told

    @property
    def current(self) -> Operation | None:
        """The innermost operation of this thread."""
        stack = self._stack()
        return stack[-1] if stack else None

    @contextmanager
    def open(self, operation: Operation) -> Iterator[Operation]:
        """Makes an operation current for the calls inside; DBOS may repeat its transaction as often as it likes.

        The slot is held between the attempts, too: while nobody knows whether the first one was committed, what came
        later must not reach the log before it.
        """
        refuse_to_block()
        execution = operation.execution
        if execution is not None and operation.adopted is None and not execution.slot.held_here:
            execution.settle()
        with slot_of(execution, operation.adopted):
            stack = self._stack()
            stack.append(operation)
            try:
                yield operation
            except BaseException:
                operation.failed()
                raise
            finally:
                stack.pop()

    @contextmanager
    def transaction(
        self, begin: Callable[[], Any], execution: Callable[[], Execution | None]
    ) -> Iterator[sa.Connection]:
        """Runs a transaction of DBOS's in the current operation, or in one of its own.

        Args:
            begin: Begins the transaction: a context manager of its connection.
            execution: Finds the execution on whose behalf this thread works, for an operation of its own.
        """
        operation = self.current
        if operation is None:
            operation = Operation(execution())
            with self.open(operation), self._run(operation, begin) as conn:
                yield conn
        else:
            with self._run(operation, begin) as conn:
                yield conn

    @contextmanager
    def _run(self, operation: Operation, begin: Callable[[], Any]) -> Iterator[sa.Connection]:
        try:
            with begin() as conn:
                operation.begun(conn)
                yield conn
                operation.write(conn)
        except sa.exc.DBAPIError as error:
            operation.failed_with(error)
            if operation.execution is None or sqlstate_of(error) != QUERY_CANCELED:
                raise
            slow = CheckpointTooSlow(str(error.orig))
            raise sa.exc.OperationalError(error.statement, None, slow, hide_parameters=True) from error
        operation.note_ends()
        written = operation.packs
        for workflow_id, packs in operation.written():
            own = operation.execution is not None and operation.execution.key.workflow_id == workflow_id
            self.tell(operation.execution if own else None, workflow_id, packs)
        if written:
            self.hint(written)
        operation.committed()

    def tell(self, execution: Execution | None, workflow_id: str, packs: Sequence[Pack]) -> None:
        """Tells of what a commit has written; see `told` of the constructor."""
        self._told(execution, workflow_id, packs)

    def hint(self, packs: list[Pack]) -> None:
        """Tells what commits have written; see `committed` of the constructor. Raises nothing: they have happened."""
        try:
            self._committed(packs)
        except Exception as error:  # noqa: BLE001 - logged; everybody also looks by himself
            log.error("hints.not_told", packs=len(packs), error=type(error).__name__)

    def _stack(self) -> list[Operation]:
        stack: list[Operation] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack
