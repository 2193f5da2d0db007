"""DBOS's system database with our rows in its transactions: who writes a status writes the event.

DBOS asks one factory for its system database; `install` puts this subclass there. DBOS's own SQL runs unchanged,
and around it:

* every transaction is an `Operation` (see there), so a checkpoint and its events are one commit;
* everything that writes a *status* is covered: by `_insert_workflow_status` (starts of all kinds), by the claim in
  `_begin`, by `update_workflow_outcome`, and, for statuses that somebody changes from outside (cancel, resume, rewind,
  dead letter, delay, recovery), by `_changing`: it locks the rows, lets DBOS write, and logs what changed;
* the two sweeps (released delays, passed deadlines) are ours, as DBOS's use the host's clock.

A contract test compares the list of DBOS's writers of `status` with the one handled here.

Locks: an outside writer locks the status rows in order of their ids by a statement of its own *before* it reads or
appends, so its snapshot is newer than the lock. Reads of the log's end always come after that lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from dbos._context import current_owner_xid, get_local_dbos_context
from dbos._error import DBOSException, DBOSWorkflowCancelledError, DBOSWorkflowConflictIDError
from dbos._sys_db import OperationResultInternal, RecordedResult, SystemDatabase, WorkflowStatusInternal, db_retry
from dbos._sys_db_postgres import PostgresSystemDatabase

from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.runs import (
    DEADLINE_PASSED,
    TERMINAL_STATUSES,
    WAITING_SIGNAL,
    WAITING_SLEEP,
    RunKey,
    RunStart,
    RunState,
)
from perdure_service.durable import values
from perdure_service.durable.executions import Execution, Executions, now_ms
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.operation import Operation, Operations
from perdure_service.store import runs
from perdure_service.store.dbos_tables import STATUS

QUEUE = "perdure"
"""The queue of every agent: each executor takes from it what it has registered, up to its slots."""

SWEEP_LIMIT = 200
"""Rows that one sweep changes; the next one follows within a second."""


class RequestRepeated(Exception):
    """A start with a server-made id repeats a request that has its run already."""


@dataclass
class Claim:
    """A claim under way: its ownership token, and the rows it may take."""

    owner_xid: str
    workflow_ids: set[str] = field(default_factory=set)


class PerdureSystemDatabase(PostgresSystemDatabase):
    """See the module. Created by DBOS through `install`."""

    def __init__(
        self,
        *,
        executions: Executions,
        operations: Operations,
        ledger: Ledger,
        registered: Callable[[], list[str]],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.executions = executions
        self.operations = operations
        self.ledger = ledger
        self._registered = registered
        self._plain_begin = self.engine.begin
        self._local = threading.local()
        # Every transaction of DBOS's goes through this one method of its engine.
        self.engine.begin = self._begin_operation  # type: ignore[method-assign]

    # ---- transactions ------------------------------------------------------------------------------------------------

    @contextmanager
    def _begin_operation(self) -> Iterator[sa.Connection]:
        with self.operations.transaction(self._plain_begin, self._execution_here) as conn:
            yield conn

    def _execution_here(self) -> Execution | None:
        """Returns the execution on whose behalf this thread works, if it does."""
        context = get_local_dbos_context()
        if context is None or not context.workflow_id:
            return None
        return self.executions.find(context.workflow_id, context.owner_xid)

    def _own(self, workflow_id: str, **hooks: Any) -> Any:
        """Opens an operation of the run's owner."""
        execution = self._execution_here()
        if execution is not None and execution.key.workflow_id != workflow_id:
            execution = self.executions.find(workflow_id, current_owner_xid(workflow_id))
        return self.operations.open(Operation(execution, **hooks))

    # ---- starts ------------------------------------------------------------------------------------------------------

    def start_run(
        self,
        status: WorkflowStatusInternal,
        start: RunStart,
        *,
        creator_xid: str,
        input_argument: str | None,
        unique_request_id: str | None,
    ) -> bool:
        """Writes DBOS's rows, the run and its first event in one transaction.

        Returns:
            Whether this process must now run it: the row is PENDING and owned by `creator_xid`.

        Raises:
            RequestRepeated: The request has its run already, under another id.
            DBOSConflictingWorkflowError: The id is another agent's.
        """
        operation = Operation(None, start=start, input_argument=input_argument, unique_request_id=unique_request_id)
        with self.operations.open(operation):
            written, created = self.init_workflow(status, creator_xid=creator_xid)
        mine = created and written == "PENDING"
        if mine and operation.attempts > 1:
            # Between a lost reply and the repeat, the run may have been given to another executor.
            mine = self.get_workflow_owner(status["workflow_uuid"]) == creator_xid
        if not mine:
            execution = self.executions.find(status["workflow_uuid"], creator_xid)
            if execution is not None:
                self.executions.remove(execution)
        return mine

    def _insert_workflow_status(
        self, status: WorkflowStatusInternal, conn: Any, *, creator_xid: str | None, reuse_policy: Any = None
    ) -> tuple[Any, bool]:
        operation = self.operations.current
        workflow_id = status["workflow_uuid"]
        if status["queue_name"] is None:
            # A run that is given back must come to executors that have its agent, not to the unlimited internal queue.
            status["queue_name"] = QUEUE
        written, created = super()._insert_workflow_status(
            status, conn, creator_xid=creator_xid, reuse_policy=reuse_policy
        )
        facts = operation.facts if operation else {}
        start: RunStart | None = facts.get("start")
        runs_here = created and written == "PENDING" and status["status"] == "PENDING"
        record = self.ledger.record_start(
            conn,
            status=dict(status, status=written),
            start=start,
            input_argument=facts.get("input_argument"),
            unique_request_id=facts.get("unique_request_id"),
            executor_id=(self.executor_id or "") if runs_here else "",
        )
        if record is None:
            if created and facts.get("unique_request_id"):
                raise RequestRepeated(workflow_id)
            if created and operation is not None and operation.attempts > 1:
                record = self.ledger.known(conn, workflow_id)
        elif operation is not None:
            operation.add(workflow_id, *record.events)
        else:
            self.ledger.append(conn, workflow_id, record.events)
        if runs_here and record is not None and creator_xid is not None:
            self.executions.add(
                Execution(
                    key=record.key,
                    owner_xid=creator_xid,
                    agent=record.agent,
                    agent_version=record.agent_version,
                    number=1,
                    trace_id=record.trace_id,
                    sampled=record.sampled,
                )
            )
        return written, created

    def init_child_workflow(
        self, status: WorkflowStatusInternal, *, parent_workflow_id: str, parent_function_id: int, **rest: Any
    ) -> tuple[Any, bool]:
        parent_owner = rest.get("parent_owner_xid") or current_owner_xid(parent_workflow_id)
        parent = self.executions.find(parent_workflow_id, parent_owner)
        operation = Operation(parent)

        def finish(_conn: sa.Connection) -> None:
            if parent is None:
                return
            key = RunKey.of_workflow(status["workflow_uuid"], parent.key.namespace)
            event = Event(
                EventKind.CHILD_STARTED, now_ms(), {"child_run_id": key.run_id}, parent_function_id,
                rest.get("function_name", ""), 0, parent.number,
            )  # fmt: skip
            operation.add(parent_workflow_id, event)

        operation.finish = finish
        with self.operations.open(operation):
            return super().init_child_workflow(
                status, parent_workflow_id=parent_workflow_id, parent_function_id=parent_function_id, **rest
            )

    def init_workflows(self, statuses: list[WorkflowStatusInternal]) -> set[str]:
        operation = Operation(None)
        by_id = {status["workflow_uuid"]: status for status in statuses}

        def finish(conn: sa.Connection) -> None:
            for workflow_id in self._lock(conn, sorted(by_id)):
                record = self.ledger.record_start(conn, status=dict(by_id[workflow_id]))
                if record is not None:
                    operation.add(workflow_id, *record.events)

        operation.finish = finish
        with self.operations.open(operation):
            return super().init_workflows(statuses)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def check_operation_execution(
        self, workflow_id: str, function_id: int, function_name: str, *, owner_key: str | None = None
    ) -> RecordedResult | None:
        execution = self._execution_here()
        if execution is not None and execution.key.workflow_id == workflow_id:
            self.refuse_dead(execution)
            if execution.state is RunState.SLEEPING:
                execution.note(execution.moved(RunState.RUNNING))
        try:
            return super().check_operation_execution(workflow_id, function_id, function_name, owner_key=owner_key)
        except DBOSWorkflowCancelledError:
            self.close_ended([workflow_id])
            raise

    @staticmethod
    def refuse_dead(execution: Execution) -> None:
        """Raises in an execution that must not go on; DBOS then waits for the owner's outcome."""
        if execution.dead:
            raise DBOSWorkflowConflictIDError(execution.key.workflow_id)

    def record_operation_result(self, result: OperationResultInternal, **rest: Any) -> None:
        with self._own(result["workflow_uuid"], events=getattr(self._local, "sleep_events", None)):
            super().record_operation_result(result, **rest)

    def _record_operation_result_txn(
        self, result: OperationResultInternal, completed_at_epoch_ms: int, conn: Any, **rest: Any
    ) -> None:
        super()._record_operation_result_txn(result, completed_at_epoch_ms, conn, **rest)
        operation = self.operations.current
        execution = operation.execution if operation else None
        if operation is None or execution is None or execution.key.workflow_id != result["workflow_uuid"]:
            return
        events = operation.facts.get("events")
        if events is None:
            operation.add(execution.key.workflow_id, *self.ledger.checkpoint_events(execution, result))
        else:
            operation.add(execution.key.workflow_id, *events(execution))
        function_id = result["function_id"]
        operation.after(lambda: self.ledger.step_done(execution, function_id))

    def record_sleep(
        self, workflow_uuid: str, function_id: int, seconds: float, *, project_completion_time: bool = False
    ) -> float:
        def events(execution: Execution) -> list[Event]:
            if not project_completion_time:
                return []  # the timeout of a recv or get_event, which has an event of its own
            until = now_ms() + int(seconds * 1000)
            done = Event(
                EventKind.STEP_SUCCEEDED, now_ms(), {"duration_ms": 0}, function_id, "DBOS.sleep", 0, execution.number
            )
            return [done, execution.moved(RunState.SLEEPING, until_ms=until, waiting_for=WAITING_SLEEP)]

        execution = self._execution_here()
        self._local.sleep_events = events
        try:
            remaining = super().record_sleep(
                workflow_uuid, function_id, seconds, project_completion_time=project_completion_time
            )
        finally:
            self._local.sleep_events = None
        if execution is not None and project_completion_time and remaining > 0 and execution.state is RunState.RUNNING:
            # Replayed: the sleep goes on where another execution began it.
            until = now_ms() + int(remaining * 1000)
            execution.note(execution.moved(RunState.SLEEPING, until_ms=until, waiting_for=WAITING_SLEEP))
        return remaining

    def set_event_from_workflow(
        self, workflow_uuid: str, function_id: int, key: str, message: Any, **rest: Any
    ) -> None:
        with self._own(workflow_uuid, events=self.ledger.published(function_id, key, message)):
            super().set_event_from_workflow(workflow_uuid, function_id, key, message, **rest)

    def set_event_from_step(self, workflow_uuid: str, function_id: int, key: str, message: Any, **rest: Any) -> None:
        with self._own(workflow_uuid) as operation:
            operation.finish = lambda _conn: self._add_own(operation, self.ledger.published(function_id, key, message))
            super().set_event_from_step(workflow_uuid, function_id, key, message, **rest)

    def write_stream_from_workflow(
        self, workflow_uuid: str, function_id: int, key: str, value: Any, **rest: Any
    ) -> None:
        with self._own(workflow_uuid, events=self.ledger.streamed(function_id, key, value)):
            super().write_stream_from_workflow(workflow_uuid, function_id, key, value, **rest)

    def write_stream_from_step(self, workflow_uuid: str, function_id: int, key: str, value: Any, **rest: Any) -> None:
        with self._own(workflow_uuid) as operation:
            operation.finish = lambda _conn: self._add_own(operation, self.ledger.streamed(function_id, key, value))
            super().write_stream_from_step(workflow_uuid, function_id, key, value, **rest)

    @staticmethod
    def _add_own(operation: Operation, events: Callable[[Execution], list[Event]]) -> None:
        if operation.execution is not None:
            operation.add(operation.execution.key.workflow_id, *events(operation.execution))

    def recv_setup(self, workflow_uuid: str, function_id: int, *arguments: Any, **rest: Any) -> Any:
        setup = super().recv_setup(workflow_uuid, function_id, *arguments, **rest)
        execution = self._execution_here()
        if not setup[0] and execution is not None:
            topic = arguments[1] if len(arguments) > 1 else rest.get("topic")
            waiting = f"{WAITING_SIGNAL}:{topic or ''}"
            execution.note(
                execution.moved(
                    RunState.AWAITING_INPUT, reason=f"waits for signal {topic or ''}".strip(), waiting_for=waiting
                )
            )
            execution.on_death.append(setup[1].set)
        return setup

    def recv_consume(self, workflow_uuid: str, function_id: int, topic: str | None, start_time: int) -> Any:
        execution = self._execution_here()
        if execution is not None:
            self.refuse_dead(execution)

        def events(execution: Execution) -> list[Event]:
            back = [execution.moved(RunState.RUNNING)] if execution.state is RunState.AWAITING_INPUT else []
            data = {"duration_ms": max(0, now_ms() - start_time)}
            return [
                *back,
                Event(EventKind.STEP_SUCCEEDED, now_ms(), data, function_id, "DBOS.recv", 0, execution.number),
            ]

        with self._own(workflow_uuid, events=events):
            return super().recv_consume(workflow_uuid, function_id, topic, start_time)

    def record_get_result(
        self,
        result_workflow_id: str,
        output: str | None,
        error: str | None,
        serialization: str | None,
        ctx: Any = None,
        *,
        started_at_epoch_ms: int,
    ) -> None:
        own = ctx or get_local_dbos_context()
        if own is None or not own.is_workflow():
            return super().record_get_result(
                result_workflow_id, output, error, serialization, ctx, started_at_epoch_ms=started_at_epoch_ms
            )
        function_id = own.function_id if ctx is not None else own.function_id + 1
        execution = self.executions.find(own.workflow_id, own.owner_xid)
        operation = Operation(execution)

        def begin(conn: sa.Connection) -> None:
            operation.facts["replayed"] = self.ledger.has_checkpoint(conn, own.workflow_id, function_id)

        def finish(_conn: sa.Connection) -> None:
            if execution is not None and not operation.facts["replayed"]:
                kind = EventKind.STEP_SUCCEEDED if error is None else EventKind.STEP_FAILED
                data: dict[str, Any] = {"duration_ms": max(0, now_ms() - started_at_epoch_ms)}
                if error is not None:
                    data["error"] = values.stored_failure(error, serialization, self.serializer).to_json()
                operation.add(
                    own.workflow_id,
                    Event(kind, now_ms(), data, function_id, "DBOS.getResult", 0, execution.number),
                )

        operation.begin, operation.finish = begin, finish
        with self.operations.open(operation):
            super().record_get_result(
                result_workflow_id, output, error, serialization, ctx, started_at_epoch_ms=started_at_epoch_ms
            )

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _outcome_in_one_statement(self) -> bool:
        return False  # the outcome and the terminal event are one transaction

    def update_workflow_outcome(
        self,
        workflow_id: str,
        status: Any,
        *,
        output: str | None = None,
        error: str | None = None,
        owner_xid: str | None = None,
    ) -> bool:
        if owner_xid is None:
            owner_xid = current_owner_xid(workflow_id)
        execution = self.executions.find(workflow_id, owner_xid)
        operation = Operation(execution)

        def finish(conn: sa.Connection) -> None:
            for ended in self.ledger.ended(conn, [workflow_id]):
                if ended.status == status:
                    events, after = self.ledger.close_own(conn, ended, execution, output, error, self.serializer)
                    operation.add(workflow_id, *events)
                    operation.after(after)

        operation.finish = finish
        with self.operations.open(operation):
            landed = super().update_workflow_outcome(
                workflow_id, status, output=output, error=error, owner_xid=owner_xid
            )
        if execution is not None:
            self.executions.remove(execution)
            self.ledger.execution_over(execution, None if landed else "lost its run")
        if not landed:
            self.close_ended([workflow_id])
        return landed

    def run_operation(self, operation: Operation) -> None:
        """Runs an operation whose hooks are all its transaction does, repeated as DBOS repeats its own."""
        with self.operations.open(operation):
            self._empty_transaction()

    @db_retry()
    def _empty_transaction(self) -> None:
        with self.engine.begin():
            pass

    def close_ended(self, workflow_ids: Sequence[str]) -> None:
        """Appends the terminal event of runs that ended without one: a foreign client cancelled them."""
        operation = Operation(None)

        def finish(conn: sa.Connection) -> None:
            self._lock(conn, workflow_ids)
            for ended in self.ledger.ended(conn, workflow_ids):
                events, after = self.ledger.close(conn, ended)
                operation.add(ended.key.workflow_id, *events)
                operation.after(after)

        operation.finish = finish
        self.run_operation(operation)

    def close_ended_if_any(self, workflow_ids: Sequence[str]) -> None:
        """Does what `close_ended` does when one of the runs needs it; else it only reads."""
        with self._plain_begin() as conn:
            ended = [one.key.workflow_id for one in self.ledger.ended(conn, workflow_ids)]
        if ended:
            self.close_ended(ended)

    # ---- statuses that are changed from outside ----------------------------------------------------------------------

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

    @contextmanager
    def _changing(self, workflow_ids: Sequence[str], reason: str = "", end_reason: str | None = None) -> Iterator[None]:
        """Lets DBOS change the statuses of these runs and logs each change in the same transaction."""
        operation = Operation(None)

        def begin(conn: sa.Connection) -> None:
            self._lock(conn, workflow_ids)
            self.ledger.adopt(conn, workflow_ids)
            operation.facts["before"] = self.ledger.states(conn, workflow_ids)
            operation.facts["logged"] = runs.logged_states(conn, workflow_ids)

        def finish(conn: sa.Connection) -> None:
            before = operation.facts["before"]
            changed: list[str] = []
            for workflow_id, (status, state) in self.ledger.states(conn, workflow_ids).items():
                old = before.get(workflow_id)
                if old is None or old == (status, state):
                    continue
                changed.append(workflow_id)
                told = operation.facts["logged"].get(workflow_id, (old[1], 0))[0]
                if status in TERMINAL_STATUSES:
                    for ended in self.ledger.ended(conn, [workflow_id]):
                        events, after = self.ledger.close(conn, ended, told, reason=reason, end_reason=end_reason)
                        operation.add(workflow_id, *events)
                        operation.after(after)
                else:
                    data = {"from": told, "to": state, "reason": reason}
                    operation.add(workflow_id, Event(EventKind.STATE_CHANGED, now_ms(), data))
            operation.facts["changed"] = changed

        def done() -> None:
            for workflow_id in operation.facts["changed"]:
                for execution in self.executions.of(workflow_id):
                    self.executions.kill(execution, reason or "its run was taken away")
                    self.ledger.execution_over(execution, reason or "its run was taken away")

        operation.begin, operation.finish, operation.done = begin, finish, done
        with self.operations.open(operation):
            yield

    def cancel_workflows(
        self, workflow_ids: list[str], cancel_children: bool = False, *, reason: str = "cancelled"
    ) -> None:
        seen: set[str] = set()
        frontier = list(workflow_ids)
        while frontier:
            seen.update(frontier)
            # What has ended stays ended: DBOS would cancel a dead-lettered run once more.
            open_ids = self.ledger.open_ids(self.engine, frontier)
            if open_ids:
                with self._changing(open_ids, reason):
                    super().cancel_workflows(open_ids)
            if not cancel_children:
                return
            frontier = [child for child in self._get_direct_children(frontier) if child not in seen]
            reason = "its parent was cancelled"

    def resume_workflows(self, workflow_ids: list[str], **rest: Any) -> None:
        ended = set(workflow_ids) - set(self.ledger.open_ids(self.engine, workflow_ids))
        if ended & set(self.ledger.known_ids(self.engine, workflow_ids)):
            raise DBOSException(f"{', '.join(sorted(ended))} has ended, and a run that ended is not revived; fork it")
        with self._changing(workflow_ids, "resumed"):
            super().resume_workflows(workflow_ids, **{**rest, "queue_name": rest.get("queue_name") or QUEUE})

    def rewind_workflow(self, workflow_id: str, start_step: int, **_rest: Any) -> None:
        raise DBOSException(f"{workflow_id}: a run that ended is not revived in place; fork it from step {start_step}")

    def fork_workflow(
        self, original_workflow_ids: list[str], forked_workflow_ids: list[str], start_steps: list[int], **rest: Any
    ) -> list[str]:
        operation = Operation(None)

        def finish(conn: sa.Connection) -> None:
            self.ledger.adopt(conn, forked_workflow_ids, operation.add)

        operation.finish = finish
        rest["queue_name"] = rest.get("queue_name") or QUEUE
        with self.operations.open(operation):
            return super().fork_workflow(original_workflow_ids, forked_workflow_ids, start_steps, **rest)

    def set_workflow_delay(self, workflow_id: str, **rest: Any) -> None:
        with self._changing([workflow_id], "its delay was changed"):
            super().set_workflow_delay(workflow_id, **rest)

    def dead_letter_workflows(self, workflow_ids: list[str], *, min_recovery_attempts: int) -> None:
        with self._changing(workflow_ids, "recovered too often"):
            super().dead_letter_workflows(workflow_ids, min_recovery_attempts=min_recovery_attempts)

    def reenqueue_for_recovery(self, workflow_id: str, executor_ids: list[str], recovery_queue_name: str) -> bool:
        del recovery_queue_name  # the unlimited internal queue
        with self._changing([workflow_id], "given back to the queue"):
            return super().reenqueue_for_recovery(workflow_id, executor_ids, QUEUE)

    # ---- claims ------------------------------------------------------------------------------------------------------

    def _claim_gate(self, queue_name: str, partition_key: str | None) -> list[Any]:
        """Only what is registered here is taken: DBOS would take a run and then find that it has no code for it."""
        return [
            *super()._claim_gate(queue_name, partition_key),
            self.tables.workflow_status.c.name.in_(self._registered()),
        ]

    def start_queued_workflows(self, *arguments: Any, **rest: Any) -> Any:
        with self._claiming(rest.get("owner_xid")):
            return super().start_queued_workflows(*arguments, **rest)

    def start_queued_partitioned_workflows(self, *arguments: Any, **rest: Any) -> Any:
        with self._claiming(rest.get("owner_xid")):
            return super().start_queued_partitioned_workflows(*arguments, **rest)

    @contextmanager
    def _claiming(self, owner_xid: str | None) -> Iterator[None]:
        self._local.claim = Claim(owner_xid) if owner_xid else None
        try:
            yield
        finally:
            self._local.claim = None

    def _wf_in(self, table: Any, workflow_ids: Sequence[str], *arguments: Any, **rest: Any) -> Any:
        """Sees which rows a claim is about to take, so that an idle poll costs no statement of ours."""
        claim: Claim | None = getattr(self._local, "claim", None)
        if claim is not None:
            claim.workflow_ids.update(workflow_ids)
        return super()._wf_in(table, workflow_ids, *arguments, **rest)

    @contextmanager
    def _begin(self, isolation: str | None) -> Iterator[sa.Connection]:
        """Begins a claim: what it takes is logged, and is known to be executed here, before it commits."""
        operation = Operation(None)
        taken: list[Execution] = []

        claim: Claim | None = getattr(self._local, "claim", None)

        def finish(conn: sa.Connection) -> None:
            if claim is None or not claim.workflow_ids:
                return
            taken[:] = self.ledger.claimed(
                conn, sorted(claim.workflow_ids), claim.owner_xid, self.executor_id or "", operation.add
            )
            for execution in taken:
                self.executions.add(execution)

        operation.finish = finish
        with self.operations.open(operation):
            try:
                with self.operations.transaction(
                    lambda: super(PerdureSystemDatabase, self)._begin(isolation), lambda: None
                ) as conn:
                    yield conn
            except BaseException:
                for execution in taken:
                    self.executions.remove(execution)
                raise

    # ---- sweeps, on the database's clock -------------------------------------------------------------------------

    def transition_delayed_workflows(self) -> None:
        """Releases what was delayed until now."""
        ws = self.tables.workflow_status
        operation = Operation(None)
        with self.operations.open(operation), self.engine.begin() as conn:
            due = (
                sa.select(ws.c.workflow_uuid)
                .where(ws.c.status == "DELAYED", ws.c.delay_until_epoch_ms <= self._now_ms_sql())
                .where(self._name_filter(ws.c.application_name, self.app_name))
                .order_by(ws.c.workflow_uuid)
                .limit(SWEEP_LIMIT)
                .with_for_update(skip_locked=True, key_share=True)
            )
            ids = [row[0] for row in conn.execute(due)]
            if not ids:
                return
            self.ledger.adopt(conn, ids)
            released = {
                "status": "ENQUEUED",
                "deduplication_id": sa.case((ws.c.is_debounced.is_(True), None), else_=ws.c.deduplication_id),
            }
            conn.execute(sa.update(ws).where(ws.c.workflow_uuid.in_(ids), ws.c.status == "DELAYED").values(**released))
            for workflow_id in ids:
                data = {"from": RunState.SCHEDULED.value, "to": RunState.QUEUED.value, "reason": "its time has come"}
                operation.add(workflow_id, Event(EventKind.STATE_CHANGED, now_ms(), data))

    def cancel_timed_out_workflows(self, limit: int) -> list[str]:
        """Ends runs whose deadline has passed, as EXPIRED."""
        ws = self.tables.workflow_status
        with self.operations.open(Operation(None)), self.engine.begin() as conn:
            due = (
                sa.select(ws.c.workflow_uuid)
                .where(
                    ws.c.status.in_(["ENQUEUED", "PENDING", "DELAYED"]),
                    ws.c.workflow_deadline_epoch_ms <= self._now_ms_sql(),
                    self._name_filter(ws.c.application_name, self.app_name),
                )
                .order_by(ws.c.workflow_deadline_epoch_ms)
                .limit(min(limit, SWEEP_LIMIT))
            )
            ids = [row[0] for row in conn.execute(due)]
        if ids:
            # Not one transaction with the search: each row is looked at again under its lock.
            with self._changing(ids, "its deadline has passed", DEADLINE_PASSED):
                PostgresSystemDatabase.cancel_workflows(self, ids)
        return ids

    # ---- what rides alone ----------------------------------------------------------------------------------------

    def write_buffered(self, execution: Execution) -> None:
        """Commits the buffered events of an execution, if it still owns its run."""
        operation = Operation(execution)

        def finish(conn: sa.Connection) -> None:
            owner = conn.execute(
                sa.text(f"SELECT owner_xid FROM {STATUS} WHERE workflow_uuid = :id FOR NO KEY UPDATE"),
                {"id": execution.key.workflow_id},
            ).scalar()
            if owner != execution.owner_xid:
                operation.facts["lost"] = True
            elif execution.has_events:
                operation.add(execution.key.workflow_id)

        operation.finish = finish
        self.run_operation(operation)
        if operation.facts.get("lost"):
            self.executions.kill(execution, "it lost its run")


def install(build: Callable[..., SystemDatabase]) -> None:
    """Makes DBOS use `build` wherever it creates a system database; it is given DBOS's keyword arguments."""

    def create(**arguments: Any) -> SystemDatabase:
        arguments.pop("sharding", None)
        return build(**arguments)

    SystemDatabase.create = staticmethod(create)  # type: ignore[method-assign,assignment]
