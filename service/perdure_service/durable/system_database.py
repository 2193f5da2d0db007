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

import contextvars
import copy
import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, cast

import sqlalchemy as sa
from dbos._context import current_owner_xid, get_local_dbos_context
from dbos._error import DBOSUnexpectedStepError, DBOSWorkflowCancelledError, DBOSWorkflowConflictIDError
from dbos._sys_db import OperationResultInternal, RecordedResult, SystemDatabase, WorkflowStatusInternal

from perdure_service.agents.catalogue import budget_of, queue_of
from perdure_service.domain.authoring import OutputTooLarge
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.domain.runs import WAITING_SLEEP, RunKey, RunStart, RunState
from perdure_service.durable import hops, metering, replay, values
from perdure_service.durable.checkpoints import Call, Commit, Presented, adopted
from perdure_service.durable.executions import Execution, now_ms
from perdure_service.durable.hops import refuse_to_block
from perdure_service.durable.ledger import StartRecord
from perdure_service.durable.operation import Operation
from perdure_service.durable.parking import WaitingDatabase
from perdure_service.durable.payloads import Stowed
from perdure_service.durable.recording import Answer, Recording
from perdure_service.durable.retries import repeated
from perdure_service.durable.substitutes import substitute
from perdure_service.durable.transactions import QUEUE, agent_of
from perdure_service.store import recordings
from perdure_service.store.checkpoints import EventsRow, OutcomeRow, StartRow, StepRow, Written, record_last_step
from perdure_service.store.recordings import RecordedOperation

GET_RESULT = "DBOS.getResult"
"""What DBOS records when a run takes the result of a child."""


STEP, OUTCOME = "step", "outcome"
EVENTS: Call = ("events", 0)
"""What the checkpoint writer is given; see `checkpoints.Call`."""

NO_PLAIN_START = (
    "class_name", "config_name", "authenticated_user", "authenticated_roles", "assumed_role", "workflow_timeout_ms",
    "deduplication_id", "queue_partition_key", "parent_workflow_id", "attributes", "schedule_name",
    "debounce_deadline_epoch_ms", "is_debounced", "shard_key",
)  # fmt: skip
"""What the checkpoint writer does not know of a start: no run that a caller starts has any of it."""


@dataclass(frozen=True, slots=True)
class WrittenStart:
    """What has become of the write of a start.

    Attributes:
        runs_here: Whether this process must now run it.
        created_at: When the run was created, by the database's clock, if it is certain that this write made it and
            that it is as it was written; else None.
    """

    runs_here: bool
    created_at: datetime | None = None


class RequestRepeated(Exception):
    """A start with a server-made id repeats a request that has its run already."""


class PerdureSystemDatabase(WaitingDatabase):
    """See the module. Created by DBOS through `install`."""

    _numbering = threading.Lock()

    # ---- starts ------------------------------------------------------------------------------------------------------

    def start_run(
        self,
        status: WorkflowStatusInternal,
        start: RunStart,
        *,
        creator_xid: str,
        input_argument: str | None,
        unique_request_id: str | None,
        presented: Presented | None = None,
    ) -> WrittenStart:
        """Writes DBOS's rows, the run and its first event in one transaction.

        Args:
            status: DBOS's row.
            start: What was decided about the run.
            creator_xid: The token of this start.
            input_argument: See `runs.insert`.
            unique_request_id: See `runs.insert`.
            presented: What `present_start` returned, and the writer did not write.

        Returns:
            Whether this process must now run it: the row is PENDING and owned by `creator_xid`; and what is known of
            a run that this call has made.

        Raises:
            RequestRepeated: The request has its run already, under another id.
            DBOSConflictingWorkflowError: The id is another agent's.
        """
        stowed = self.payloads.stow(status["inputs"], patient=False)
        operation = Operation(
            None,
            adopted=presented,
            start=start,
            input_argument=input_argument,
            unique_request_id=unique_request_id,
            inputs=stowed,
        )
        try:
            with self.operations.open(operation):
                written, created = self.init_workflow(status, creator_xid=creator_xid)
        except BaseException:
            if presented is not None and presented.execution is not None:
                self.executions.remove(presented.execution)
            raise
        mine = created and written == "PENDING"
        if mine and operation.repeated:
            # Between a lost reply and the repeat, the run may have been given to another executor.
            mine = self.get_workflow_owner(status["workflow_uuid"]) == creator_xid
        if not mine:
            execution = self.executions.find(status["workflow_uuid"], creator_xid)
            if execution is not None:
                self.executions.remove(execution)
        record: StartRecord | None = operation.facts.get("record")
        if record is None or not created or operation.repeated:
            # Somebody else's, or, between a lost reply and the repeat, perhaps no longer as it was written.
            return WrittenStart(mine)
        return WrittenStart(mine, record.created_at)

    def present_start(
        self,
        status: WorkflowStatusInternal,
        start: RunStart,
        *,
        creator_xid: str,
        input_argument: str | None,
        unique_request_id: str | None,
    ) -> Presented | None:
        """Gives the checkpoint writer a start; arguments as of `start_run`. Does not block.

        Returns:
            None when it is none of those that the writer knows.
        """
        if not self.payloads.fits(status["inputs"]) or start.forked_from_workflow_id:
            return None
        if any(map(status.__getitem__, NO_PLAIN_START)):
            return None
        here = status["status"] == "PENDING"
        record = self.ledger.started(start, status, (self.executor_id or "") if here else "")
        queue = status["queue_name"] or QUEUE
        execution = None
        if here:
            execution = self.executions.add(
                self._execution_of(record, creator_xid, queue, status["serialization"]), perhaps=True
            )
        row = StartRow(
            start.key.workflow_id,
            creator_xid,
            Pack(start.key.workflow_id, record.events, first_sequence=1),
            None,
            start=start,
            status=status["status"],
            name=status["name"],
            executor_id=status["executor_id"] or "",
            app_version=status["app_version"],
            app_id=status["app_id"],
            application=status["application_name"],
            deadline_ms=status["workflow_deadline_epoch_ms"],
            serialization=status["serialization"],
            delay_until_ms=status["delay_until_epoch_ms"],
            inputs=status["inputs"],
            input_argument=input_argument,
            unique_request_id=unique_request_id,
            labels=json.dumps(dict(start.labels)) if start.labels else "{}",
            execution=1 if here else 0,
        )

        def after(_written: Written) -> None:
            if execution is not None:
                self.executions.stands(execution)
                metering.begun([execution])
            elif status["status"] == "ENQUEUED":
                self.placement.queued(queue)

        presented = self.checkpoints.present_start(row, execution, after)
        if presented is None and execution is not None:
            self.executions.remove(execution)
        return presented

    @staticmethod
    def _execution_of(record: StartRecord, creator_xid: str, queue: str, serialization: str | None) -> Execution:
        """Returns the execution of a run that is about to begin here."""
        execution = Execution(
            key=record.key,
            owner_xid=creator_xid,
            agent=record.agent,
            agent_version=record.agent_version,
            number=1,
            trace_id=record.trace_id,
            queue=queue,
            serialization=serialization,
            sampled=record.sampled,
            budget=budget_of(record.agent, record.agent_version),
            recording=Recording(nothing=True),
        )
        if record.events:
            execution.begun_ns = record.events[0].time_ms * 1_000_000
        return execution

    def _insert_workflow_status(
        self, status: WorkflowStatusInternal, conn: Any, *, creator_xid: str | None, reuse_policy: Any = None
    ) -> tuple[Any, bool]:
        agent = agent_of(status["name"])
        if status["queue_name"] is None:
            # A run that is given back must come to executors that have its agent, not to the unlimited internal queue.
            status["queue_name"] = queue_of(*agent)
        operation = self.operations.current
        facts = operation.facts if operation else {}
        if "start" in facts or status["status"] != "PENDING":
            return self._insert_placed(status, conn, creator_xid=creator_xid, reuse_policy=reuse_policy)
        # Once for all attempts: what the first one has counted as running must not stand in the second one's way.
        decided = f"here:{status['workflow_uuid']}"
        child = self.placement.child(status["queue_name"] or QUEUE, agent)
        with nullcontext(facts[decided]) if decided in facts else child as here:
            facts[decided] = here
            row = status if here else cast(WorkflowStatusInternal, {**status, "status": "ENQUEUED"})
            written, created = self._insert_placed(row, conn, creator_xid=creator_xid, reuse_policy=reuse_policy)
        # What is queued, a claim will run: DBOS waits for its result.
        return written, created and written == "PENDING"

    def _insert_placed(
        self, status: WorkflowStatusInternal, conn: Any, *, creator_xid: str | None, reuse_policy: Any
    ) -> tuple[Any, bool]:
        """Writes a run of which it is decided whether it begins here."""
        operation = self.operations.current
        workflow_id = status["workflow_uuid"]
        facts = operation.facts if operation else {}
        inputs = status["inputs"]
        stowed: Stowed | None = facts["inputs"] if "inputs" in facts else self.payloads.stow(inputs)
        if stowed is not None:
            status["inputs"] = stowed.pointer.text
        try:
            written, created = super()._insert_workflow_status(
                status, conn, creator_xid=creator_xid, reuse_policy=reuse_policy
            )
        finally:
            status["inputs"] = inputs  # whoever runs it here reads them from this
        if created:
            self.payloads.write(conn, workflow_id, stowed)
        start: RunStart | None = facts.get("start")
        queue = status["queue_name"] or QUEUE
        if created and written == "ENQUEUED" and operation is not None:
            operation.after(lambda: self.placement.queued(queue))
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
            if created and (known := self.ledger.known(conn, workflow_id)) is not None:
                # Written by an attempt of this very start, whose reply was lost.
                record = facts.get("record", known)
            elif created and facts.get("unique_request_id"):
                raise RequestRepeated(workflow_id)
        elif operation is not None:
            facts["record"] = record
            operation.add(workflow_id, *record.events)
        else:
            self.ledger.append(conn, workflow_id, record.events)
        if runs_here and record is not None and creator_xid is not None:
            # Known here before the commit: whoever looks for runs that nobody executes must not find this one.
            execution = self.executions.add(self._execution_of(record, creator_xid, queue, status["serialization"]))
            # Until it is known to run on its own, it may be a part of its parent's code.
            execution.begin_under(facts.get("parent"))
            if operation is not None and (operation.repeated or operation.adopted is not None):
                # Between a lost reply and this repeat, another executor may have had it.
                execution.recording = Recording()
            if operation is not None:
                operation.begins(execution)
                operation.undo(lambda: self.executions.remove(execution))
                operation.after(lambda: metering.begun([execution]))
        return written, created

    def init_child_workflow(
        self, status: WorkflowStatusInternal, *, parent_workflow_id: str, parent_function_id: int, **rest: Any
    ) -> tuple[Any, bool]:
        parent_owner = rest.get("parent_owner_xid") or current_owner_xid(parent_workflow_id)
        parent = self.executions.find(parent_workflow_id, parent_owner)
        if parent is not None:
            self.refuse_dead(parent)
        operation = Operation(parent, parent=parent, inputs=self.payloads.stow(status["inputs"]))

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
        stowed = {key: self.payloads.stow(status["inputs"]) for key, status in by_id.items()}

        def finish(conn: sa.Connection) -> None:
            for workflow_id in self._lock(conn, sorted(by_id)):
                record = self.ledger.record_start(conn, status=dict(by_id[workflow_id]))
                if record is not None:
                    operation.add(workflow_id, *record.events)
                    self.payloads.write(conn, workflow_id, stowed[workflow_id])

        operation.finish = finish
        with self.operations.open(operation):
            return super().init_workflows([_pointing(one, stowed[one["workflow_uuid"]]) for one in statuses])

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def check_operation_execution(
        self, workflow_id: str, function_id: int, function_name: str, *, owner_key: str | None = None
    ) -> RecordedResult | None:
        execution = self._execution_or_refuse(workflow_id)
        if execution is not None:
            execution.settle()
            self.refuse_dead(execution)
            execution.touch()
            self._move_on(execution)
            recorded = self._take_recorded(execution, function_id)
            if recorded is not Answer.ASK:
                return self._replayed(execution, function_id, function_name, recorded)
        refuse_to_block()
        try:
            found = super().check_operation_execution(workflow_id, function_id, function_name, owner_key=owner_key)
        except DBOSWorkflowCancelledError:
            self.close_ended([workflow_id])
            raise
        if found is not None:
            found["output"] = self.payloads.followed(found["output"])
        return found

    def _take_recorded(self, execution: Execution, function_id: int) -> RecordedOperation | Answer:
        """Returns what the execution's recording has under a number, and reads as much of it as that takes."""
        while (recorded := execution.recording.take(function_id)) is Answer.UNREAD:
            self.read_recording(execution)
        return recorded

    def read_recording(self, execution: Execution) -> None:
        """Reads the next page of an execution's recording, or waits for the thread that does. Blocks."""
        refuse_to_block()
        recording = execution.recording
        up_to = recording.up_to
        with recording.reading:
            if recording.up_to == up_to and not recording.complete:
                recording.extend(self._read_page(execution.key.workflow_id, up_to))

    @repeated()
    def _read_page(self, workflow_id: str, after: int) -> recordings.Page:
        with self._plain_begin() as conn:
            return recordings.read(conn, workflow_id, after)

    def _replayed(
        self, execution: Execution, function_id: int, function_name: str, recorded: RecordedOperation | Answer
    ) -> RecordedResult | None:
        """Returns what `check_operation_execution` does for an operation of which the recording tells."""
        if not isinstance(recorded, RecordedOperation):
            execution.passed(recorded=False)
            return None
        if recorded.name != function_name:
            error = DBOSUnexpectedStepError(execution.key.workflow_id, function_id, function_name, recorded.name)
            raise replay.unexpected(self.executions, error)
        execution.passed(recorded=True)
        return {
            "output": self.payloads.followed(recorded.output),
            "error": recorded.error,
            "serialization": recorded.serialization,
            "child_workflow_id": recorded.child_workflow_id,
            "child_shard_key": None,
        }

    def _check_operation_execution_txn(
        self, workflow_id: str, function_id: int, function_name: str, conn: Any
    ) -> RecordedResult | None:
        try:
            recorded = super()._check_operation_execution_txn(workflow_id, function_id, function_name, conn)
        except DBOSUnexpectedStepError as error:
            raise replay.unexpected(self.executions, error) from None
        execution = self._execution_here()
        if execution is not None and execution.key.workflow_id == workflow_id:
            execution.passed(recorded=recorded is not None)
        return recorded

    def record_operation_result(self, result: OperationResultInternal, **rest: Any) -> None:
        execution = self._execution_or_refuse(result["workflow_uuid"])
        call = (STEP, result["function_id"])
        presented = adopted(execution, call)
        if presented is None and execution is not None and result["function_id"] in execution.refused:
            return  # recorded below: what is raised there, DBOS records once more when the step is asynchronous
        refused = self.limit.refuse_result(result, self.serializer)
        stowed = self.payloads.stow(result["output"])
        events = None
        if getattr(self._local, "records_sleep", False):
            events = _sleep_events(result["function_id"], rest.get("completed_at_epoch_ms"))
        if presented is None and execution is not None and stowed is None and events is None and not rest:
            presented = self._present_step(execution, result, call)
            if presented is not None and presented.ahead:
                again = partial(contextvars.copy_context().run, self.record_operation_result, result)
                execution.ahead = hops.Ahead(presented.written, partial(self.checkpoints.hurry, presented), again)
                return
        if not self._committed(presented):
            if presented is not None:  # what the writer may have committed has this time
                rest["completed_at_epoch_ms"] = cast(StepRow, presented.row).completed_ms
            if stowed is not None:
                result = {**result, "output": stowed.pointer.text}
            with self._own(
                result["workflow_uuid"],
                call,
                events=events,
                finish=stowed and (lambda conn: self.payloads.write(conn, result["workflow_uuid"], stowed)),
            ):
                super().record_operation_result(result, **rest)
        if refused is not None:
            if execution is not None:
                execution.refused.add(result["function_id"])
            raise refused

    def _present_step(self, execution: Execution, result: OperationResultInternal, call: Call) -> Presented | None:
        """Gives the checkpoint writer a step, when it is one of those that the writer knows."""
        if result["child_workflow_id"] is not None:
            return None
        self._go_on(execution)
        events = self.ledger.checkpoint_events(execution, result, self.serializer)
        function_id = result["function_id"]

        def row(pack: Pack, previous_first: int | None) -> StepRow:
            return StepRow(
                pack.workflow_id,
                execution.owner_xid,
                pack,
                previous_first,
                function_id=function_id,
                function_name=result["function_name"],
                started_ms=result["started_at_epoch_ms"],
                completed_ms=now_ms(),
                output=result["output"],
                error=result["error"],
                serialization=result["serialization"],
            )

        if not events:
            return None
        deferral = hops.deferral()
        own = deferral.ahead if deferral is not None else execution.thread == threading.get_ident()
        ahead = own and execution.goes_ahead and result["error"] is None
        commit = Commit(call, execution, events, row, lambda _: self.ledger.step_done(execution, function_id))
        return self.checkpoints.present(commit, ahead=ahead)

    @staticmethod
    def _committed(presented: Presented | None) -> bool:
        """Waits for what was presented, or has what DBOS runs here wait; returns whether the writer has written it."""
        if presented is None:
            return False
        deferral = hops.deferral()
        if deferral is None:
            return presented.written.result()
        deferral.wait_for(presented.written)
        return True

    def record_with_payload(
        self, result: OperationResultInternal, stowed: Stowed, events: Callable[[Execution], list[Event]]
    ) -> None:
        """Records an operation of the workflow's own code, with a payload and events in the same transaction."""
        workflow_id = result["workflow_uuid"]
        with self._own(workflow_id, events=events, finish=lambda conn: self.payloads.write(conn, workflow_id, stowed)):
            super().record_operation_result(result)

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
            operation.add(execution.key.workflow_id, *self.ledger.checkpoint_events(execution, result, self.serializer))
        else:
            operation.add(execution.key.workflow_id, *events(execution))
        function_id = result["function_id"]
        operation.after(lambda: self.ledger.step_done(execution, function_id))

    def record_sleep(
        self, workflow_uuid: str, function_id: int, seconds: float, *, project_completion_time: bool = False
    ) -> float:
        execution = self._execution_here()
        self._local.records_sleep = True
        try:
            remaining = super().record_sleep(
                workflow_uuid, function_id, seconds, project_completion_time=project_completion_time
            )
        finally:
            self._local.records_sleep = False
        if execution is not None and project_completion_time and remaining > 0 and execution.state is RunState.RUNNING:
            # Replayed: the sleep goes on where another execution began it.
            until = now_ms() + int(remaining * 1000)
            execution.note(execution.moved(RunState.SLEEPING, until_ms=until, waiting_for=WAITING_SLEEP))
        return remaining

    def set_event_from_workflow(
        self, workflow_uuid: str, function_id: int, key: str, message: Any, **rest: Any
    ) -> None:
        self._check_new(workflow_uuid, function_id, f"the value of {key!r}", message)
        with self._own(workflow_uuid, events=self.ledger.published(function_id, key, message)):
            super().set_event_from_workflow(workflow_uuid, function_id, key, message, **rest)

    def set_event_from_step(self, workflow_uuid: str, function_id: int, key: str, message: Any, **rest: Any) -> None:
        self.limit.check(f"the value of {key!r}", message)
        with self._own(workflow_uuid) as operation:
            operation.finish = lambda _conn: self._add_own(operation, self.ledger.published(function_id, key, message))
            super().set_event_from_step(workflow_uuid, function_id, key, message, **rest)

    def write_stream_from_workflow(
        self, workflow_uuid: str, function_id: int, key: str, value: Any, **rest: Any
    ) -> None:
        self._check_new(workflow_uuid, function_id, f"an entry of the stream {key!r}", value)
        with self._own(workflow_uuid, events=self.ledger.streamed(function_id, key, value)):
            super().write_stream_from_workflow(workflow_uuid, function_id, key, value, **rest)

    def write_stream_from_step(self, workflow_uuid: str, function_id: int, key: str, value: Any, **rest: Any) -> None:
        self.limit.check(f"an entry of the stream {key!r}", value)
        with self._own(workflow_uuid) as operation:
            operation.finish = lambda _conn: self._add_own(operation, self.ledger.streamed(function_id, key, value))
            super().write_stream_from_step(workflow_uuid, function_id, key, value, **rest)

    # What DBOS records in transactions of its own, and repeats: one operation around all attempts, as that of a second
    # one would not know what the first had committed.

    def send_bulk(self, *arguments: Any, **rest: Any) -> None:
        execution = self._execution_here()
        if execution is not None:
            self.refuse_dead(execution, retiring_too=False)
        with self.operations.open(Operation(execution)):
            super().send_bulk(*arguments, **rest)
        messages = arguments[0] if arguments else rest["messages"]
        destinations = [message.destination_id for message in messages]
        self.waits.look_for(destinations)
        self.nudge(destinations)

    def patch(self, *, workflow_id: str, function_id: int, patch_name: str) -> bool:
        with self._own(workflow_id):
            return super().patch(workflow_id=workflow_id, function_id=function_id, patch_name=patch_name)

    def call_txn_as_step(self, workflow_uuid: str, *arguments: Any, **rest: Any) -> Any:
        with self._own(workflow_uuid):
            return super().call_txn_as_step(workflow_uuid, *arguments, **rest)

    def _check_new(self, workflow_id: str, function_id: int, what: str, value: Any) -> None:
        """Refuses a value that is too large, unless it is recorded: a limit that was lowered changes no replay."""
        try:
            self.limit.check(what, value)
        except OutputTooLarge:
            with self._plain_begin() as conn:
                recorded = self.ledger.recorded_name(conn, workflow_id, function_id) is not None
            if not recorded:
                raise

    @staticmethod
    def _add_own(operation: Operation, events: Callable[[Execution], list[Event]]) -> None:
        if operation.execution is not None:
            operation.add(operation.execution.key.workflow_id, *events(operation.execution))

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
        if ctx is None:
            # DBOS counts here, not before the wait, and in a thread: of two results at once both would have one number.
            with self._numbering:
                ctx = copy.copy(own)
                ctx.function_id = own.function_id = own.function_id + 1
        function_id = ctx.function_id
        execution = self.executions.find(own.workflow_id, own.owner_xid)
        if execution is not None:
            self.refuse_dead(execution, retiring_too=False)
        operation = Operation(execution)
        stowed = self.payloads.stow(output)

        def begin(conn: sa.Connection) -> None:
            recorded = self.ledger.recorded_name(conn, own.workflow_id, function_id)
            operation.facts["replayed"] = recorded is not None
            if recorded not in (None, GET_RESULT) and execution is not None:
                # DBOS compares nothing here.
                raise replay.diverge(execution, function_id, recorded or "", f"the replay met {GET_RESULT!r}")
            if recorded is not None and execution is not None:
                execution.followed = True

        def finish(conn: sa.Connection) -> None:
            if not operation.facts["replayed"]:
                self.payloads.write(conn, own.workflow_id, stowed)
            if execution is not None and not operation.facts["replayed"]:
                kind = EventKind.STEP_SUCCEEDED if error is None else EventKind.STEP_FAILED
                data: dict[str, Any] = {"duration_ms": max(0, now_ms() - started_at_epoch_ms)}
                if error is not None:
                    data["error"] = values.stored_failure(error, serialization, self.serializer).to_json()
                operation.add(
                    own.workflow_id,
                    Event(kind, now_ms(), data, function_id, GET_RESULT, 0, execution.number),
                )

        operation.begin, operation.finish = begin, finish
        stored = output if stowed is None else stowed.pointer.text
        with self.operations.open(operation):
            super().record_get_result(
                result_workflow_id, stored, error, serialization, ctx, started_at_epoch_ms=started_at_epoch_ms
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
        presented = adopted(execution, (OUTCOME, 0))
        if presented is None and execution is not None and execution.dead:
            # Its code may have caught what refused its calls: how it ends says nothing about the run.
            self.executions.remove(execution)
            return False
        if execution is not None:
            execution.passed(recorded=False)
        stowed = self.payloads.stow(output)
        if presented is None and execution is not None and stowed is None:
            presented = self._present_outcome(execution, status, output, error)
            if self._committed(presented):
                return True
        operation = Operation(execution, adopted=presented)
        shown, shown_stowed = (None, None) if stowed is None else self._stow_shown(workflow_id, output)

        def finish(conn: sa.Connection) -> None:
            for ended in self.ledger.ended(conn, [workflow_id]):
                if ended.status == status:
                    if execution is not None and execution.last_step is not None:
                        record_last_step(conn, execution.last_step)
                    events, after = self.ledger.close_own(conn, ended, execution, output, error, self.serializer, shown)
                    operation.add(workflow_id, *events)
                    operation.after(after)
                    self._use(conn, workflow_id, stowed, shown_stowed)

        operation.finish = finish
        stored = output if stowed is None else stowed.pointer.text
        with self.operations.open(operation):
            landed = super().update_workflow_outcome(
                workflow_id, status, output=stored, error=error, owner_xid=owner_xid
            )
        if execution is not None:
            self.executions.remove(execution)
            if operation.repeated:
                self.ledger.ended_perhaps(workflow_id)
        if not landed:
            self.close_ended([workflow_id])
        return landed

    def _present_outcome(
        self, execution: Execution, status: str, output: str | None, error: str | None
    ) -> Presented | None:
        """Gives the checkpoint writer the end of a run, when it is one of those that the writer knows."""
        serialization = execution.serialization
        if serialization is None:
            return None
        failure = self.ledger.failure_of(execution, error, serialization, self.serializer)
        terminal, told = self.ledger.ending(execution, status, failure)

        def row(pack: Pack, previous_first: int | None) -> OutcomeRow:
            return OutcomeRow(
                pack.workflow_id,
                execution.owner_xid,
                pack,
                previous_first,
                status=status,
                output=output,
                error=error,
                shown=values.output_json(output, serialization, self.serializer),
                failure=None if failure is None else json.dumps(failure.to_json()),
                last_step=execution.last_step,
            )

        def after(written: Written) -> None:
            told(written)
            self.executions.remove(execution)

        commit = Commit((OUTCOME, 0), execution, [terminal], row, after)
        return self.checkpoints.join(commit) or self.checkpoints.present(commit)

    def _stow_shown(self, workflow_id: str, output: str | None) -> tuple[str | None, Stowed | None]:
        """Returns what the run's row shows of a large output, its JSON text or a pointer, and what that points to."""
        with self._plain_begin() as conn:
            serialization = self.ledger.serialization(conn, workflow_id)
        text = values.output_json(output, serialization, self.serializer)
        stowed = self.payloads.stow(text)
        return (text if stowed is None else stowed.pointer.text), stowed

    def _use(self, conn: sa.Connection, workflow_id: str, *stowed: Stowed | None) -> None:
        """Makes a run use payloads, in order of their hashes, as everybody locks them."""
        for one in sorted((one for one in stowed if one is not None), key=lambda one: one.pointer.sha256):
            self.payloads.write(conn, workflow_id, one)

    # ---- what rides alone ----------------------------------------------------------------------------------------

    def write_buffered(self, execution: Execution) -> bool:
        """Commits the buffered events of an execution, or has them committed, if it still owns its run.

        Returns:
            Whether they are; False while another commit of the execution is under way, on which they may ride.
        """
        presented = adopted(execution, EVENTS)
        if presented is None:
            if execution.dead or not execution.has_events:
                return True
            commit = Commit(EVENTS, execution, [], partial(_events_row, execution), lambda _: None)
            presented = self.checkpoints.present(commit, wait=False)
            if presented is not None:
                presented.written.add_done_callback(lambda done: done.result() or self.write_alone(execution))
                return True
            if not execution.slot.acquire(blocking=False):
                return False
        try:
            self._write_alone(execution, presented)
        finally:
            if presented is None:
                execution.slot.release()
        return True

    def _write_alone(self, execution: Execution, presented: Presented | None) -> None:
        operation = Operation(execution, adopted=presented)

        def finish(conn: sa.Connection) -> None:
            self._check_owner_txn(conn, execution.key.workflow_id, execution.owner_xid)
            operation.add(execution.key.workflow_id)  # a repeat, too, which finds the buffer empty

        operation.finish = finish
        try:
            self.run_operation(operation)
        except DBOSWorkflowConflictIDError:
            self.executions.kill(execution, "it lost its run")


def _events_row(execution: Execution, pack: Pack, previous_first: int | None) -> EventsRow:
    return EventsRow(pack.workflow_id, execution.owner_xid, pack, previous_first)


def _sleep_events(function_id: int, until_ms: int | None) -> Callable[[Execution], list[Event]]:
    """Returns what is told of a sleep that DBOS records until `until_ms`, in milliseconds since 1970.

    None is the timeout of a recv or get_event, which has an event of its own.
    """

    def events(execution: Execution) -> list[Event]:
        if until_ms is None:
            return []
        done = Event(
            EventKind.STEP_SUCCEEDED, now_ms(), {"duration_ms": 0}, function_id, "DBOS.sleep", 0, execution.number
        )
        return [done, execution.moved(RunState.SLEEPING, until_ms=until_ms, waiting_for=WAITING_SLEEP)]

    return events


def _pointing(status: WorkflowStatusInternal, stowed: Stowed | None) -> WorkflowStatusInternal:
    """Returns a status as it is stored."""
    return status if stowed is None else {**status, "inputs": stowed.pointer.text}


def install(build: Callable[..., SystemDatabase]) -> None:
    """Makes DBOS use `build` wherever it creates a system database; it is given DBOS's keyword arguments."""

    def create(**arguments: Any) -> SystemDatabase:
        arguments.pop("sharding", None)
        return build(**arguments)

    substitute(SystemDatabase, "create", staticmethod(create))
