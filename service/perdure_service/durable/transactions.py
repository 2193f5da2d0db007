"""DBOS's system database on our transactions: each is an `Operation` with the run's events in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sqlalchemy as sa
from dbos._context import current_owner_xid, get_local_dbos_context
from dbos._error import DBOSWorkflowConflictIDError
from dbos._sys_db_postgres import PostgresSystemDatabase

from perdure_service.agents.catalogue import by_workflow
from perdure_service.domain.queues import DEFAULT_QUEUE
from perdure_service.domain.runs import RunState
from perdure_service.durable.checkpoints import Call, Checkpoints, adopted
from perdure_service.durable.executions import AgentKey, Execution, Executions, Parked
from perdure_service.durable.hops import refuse_to_block
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.operation import Operation, Operations
from perdure_service.durable.output_limit import OutputLimit
from perdure_service.durable.payloads import Payloads
from perdure_service.durable.placement import Placement
from perdure_service.durable.replay import refuse_diverged
from perdure_service.durable.retries import repeated
from perdure_service.store.dbos_tables import STATUS

QUEUE = DEFAULT_QUEUE
"""The queue of runs that have none of their own: each executor takes from it what it has registered."""

CALLER_PATIENCE_S = 5.0
"""How long a caller's write goes on while the database is away; then the caller is told to repeat it."""


def agent_of(workflow_name: str) -> AgentKey:
    """Returns the agent, or what counts as one, that a workflow of this name in DBOS is."""
    declared = by_workflow(workflow_name)
    if declared is not None:
        return declared.spec.name, declared.spec.version
    name, _, version = workflow_name.partition("@")
    return name, version


class TransactionalDatabase(PostgresSystemDatabase):
    """See the module. `StatusDatabase` and `PerdureSystemDatabase` add what is written in the transactions."""

    def __init__(
        self,
        *,
        executions: Executions,
        operations: Operations,
        ledger: Ledger,
        placement: Placement,
        registered: Callable[[], list[str]],
        limit: OutputLimit,
        payloads: Payloads,
        checkpoints: Checkpoints,
        **arguments: Any,
    ) -> None:
        self._local = threading.local()
        super().__init__(**arguments)
        self.executions = executions
        self.operations = operations
        self.ledger = ledger
        self.placement = placement
        self._registered = registered
        self.limit = limit
        self.payloads = payloads
        self.checkpoints = checkpoints
        self.write_alone: Callable[[Execution], None] = lambda _execution: None
        """Has buffered events committed that the checkpoint writer did not write; set by the runtime."""
        self._engine_begin = self.engine.begin
        self.stopping = False
        """Whether this executor takes no more runs."""
        self.poke: Callable[[], None] = lambda: None
        """Makes this process look into its queues now; set by the runtime."""
        self.nudge: Callable[[Sequence[str]], None] = lambda _workflow_ids: None
        """Told of runs for which something was committed that they may be parked for; set by the runtime."""
        # Every transaction of DBOS's goes through this one method of its engine.
        self.engine.begin = self._begin_operation  # type: ignore[method-assign]
        executions.wake_waits = self._wake_waits

    # ---- transactions ------------------------------------------------------------------------------------------------

    def _plain_begin(self) -> AbstractContextManager[sa.Connection]:
        """Begins a transaction that is no operation's."""
        refuse_to_block()
        return self._engine_begin()

    @contextmanager
    def _begin_operation(self) -> Iterator[sa.Connection]:
        with self.operations.transaction(self._plain_begin, self._execution_here) as conn:
            yield conn

    @property
    def _retry_connection_errors(self) -> bool:
        """Whether a transaction that failed is repeated: for a run always, for a caller not for long."""
        until: float | None = getattr(self._local, "retry_until", None)
        return until is None or time.monotonic() < until

    @_retry_connection_errors.setter
    def _retry_connection_errors(self, _value: bool) -> None:
        """DBOS sets it once; what it sets is what we do for runs."""

    @property
    def patience_left_s(self) -> float | None:
        """How long this thread's calls may still be repeated, None for ever; see `retries`."""
        until: float | None = getattr(self._local, "retry_until", None)
        return None if until is None else max(0.0, until - time.monotonic())

    @contextmanager
    def bounded(self, seconds: float = CALLER_PATIENCE_S) -> Iterator[None]:
        """Makes this thread's calls of DBOS give up after some seconds without a database: somebody waits for them.

        Inside another `bounded` that one's end counts, if it is earlier.
        """
        outer: float | None = getattr(self._local, "retry_until", None)
        until = time.monotonic() + seconds
        self._local.retry_until = until if outer is None else min(until, outer)
        try:
            yield
        finally:
            self._local.retry_until = outer

    @contextmanager
    def unbounded(self) -> Iterator[None]:
        """Undoes `bounded` for what is a run's, although a caller's thread does it: it must not fail."""
        outer: float | None = getattr(self._local, "retry_until", None)
        self._local.retry_until = None
        try:
            yield
        finally:
            self._local.retry_until = outer

    def _move_on(self, execution: Execution) -> None:
        """Tells that a run which slept goes on."""
        if execution.state is RunState.SLEEPING:
            execution.note(execution.moved(RunState.RUNNING))

    def _wake_waits(self, workflow_id: str) -> None:
        """Wakes every recv and approval of a run that waits in this process."""
        for _, components, signal in self.notifications_map.snapshot():
            if components[0] == workflow_id:
                signal.set()

    def _execution_here(self) -> Execution | None:
        """Returns the execution on whose behalf this thread works, if it does."""
        context = get_local_dbos_context()
        if context is None or not context.workflow_id:
            return None
        return self.executions.find(context.workflow_id, context.owner_xid)

    def _execution_or_refuse(self, workflow_id: str) -> Execution | None:
        """Returns the execution whose code is in this thread, if it is this run's.

        Raises:
            DBOSWorkflowConflictIDError: It is forgotten, as a task or thread that it has left behind does not know: its
                run has ended, or goes on elsewhere.
        """
        execution = self._execution_here()
        if execution is not None:
            return execution if execution.key.workflow_id == workflow_id else None
        context = get_local_dbos_context()
        if context is not None and context.workflow_id == workflow_id and context.owner_xid is not None:
            raise DBOSWorkflowConflictIDError(workflow_id)
        return None

    def _own(self, workflow_id: str, call: Call | None = None, **hooks: Any) -> Any:
        """Opens an operation of the run's owner, which adopts what the checkpoint writer did not write of this call."""
        execution = self._execution_here()
        if execution is not None and execution.key.workflow_id != workflow_id:
            execution = self.executions.find(workflow_id, current_owner_xid(workflow_id))
        presented = adopted(execution, call) if call else None
        if execution is not None and presented is None:
            self._go_on(execution)
        return self.operations.open(Operation(execution, adopted=presented, **hooks))

    def _go_on(self, execution: Execution) -> None:
        """Is called when the code of a run comes to a commit."""
        self.refuse_dead(execution, retiring_too=False)
        execution.touch()
        self._move_on(execution)

    @staticmethod
    def refuse_dead(execution: Execution, *, retiring_too: bool = True) -> None:
        """Raises in an execution that must not go on; DBOS then waits for the owner's outcome, if it was not parked.

        Args:
            execution: On whose behalf this thread works.
            retiring_too: Whether one that may only finish what it has begun is refused, too.
        """
        if execution.parked:
            raise Parked(execution)
        refuse_diverged(execution)
        if execution.dead or (retiring_too and execution.retiring):
            raise DBOSWorkflowConflictIDError(execution.key.workflow_id)

    def run_operation(self, operation: Operation) -> None:
        """Runs an operation whose hooks are all its transaction does, repeated as DBOS repeats its own."""
        with self.operations.open(operation):
            self._empty_transaction()

    @repeated()
    def _empty_transaction(self) -> None:
        with self.engine.begin():
            pass

    def _lock(self, conn: sa.Connection, workflow_ids: Sequence[str]) -> list[str]:
        """Locks status rows in order of their ids; returns those that exist."""
        rows = conn.execute(
            sa.text(
                f"SELECT workflow_uuid FROM {STATUS} WHERE workflow_uuid = ANY(:ids) "
                "ORDER BY workflow_uuid FOR NO KEY UPDATE"
            ),
            {"ids": list(workflow_ids)},
        )
        return [row[0] for row in rows]
