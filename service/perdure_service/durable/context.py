"""What a running agent gets when it asks for `run`: progress, output, logs, approvals and signals of its own run.

**An approval** is one operation of the workflow with a number of its own. It is asked in one transaction of the run's
owner (the row, the event), waited for in memory, and answered in another: that one locks the row, expires it when its
deadline has passed by the database's clock, and records the checkpoint from what the row says. A decision writes a
message to the run's topic `perdure.approval.<step>`; the message only wakes. So whoever dies, between any two lines,
leaves a row that says the truth, and the next execution finds it: a replay before the checkpoint asks nothing new
(the row is there), waits again, and reads the same row.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from dbos import DBOS
from dbos._context import EnterDBOSStepCtx, get_local_dbos_context, snapshot_step_context
from dbos._serialization import DBOSPortableJSON

from perdure_service.domain.approvals import ApprovalResult, ApprovalState, TimeoutOutcome
from perdure_service.domain.authoring import ApprovalTimeout, OutputStream, SignalTimeout
from perdure_service.domain.events import APPROVAL_STEP, ARTIFACT_STEP, MAX_TEXT_CHARS, Event, EventKind, text_pieces
from perdure_service.domain.runs import WAITING_APPROVAL, RunState
from perdure_service.durable import values
from perdure_service.durable.executions import Execution, StepProgress, Wait, now_ms
from perdure_service.durable.hops import in_few_threads
from perdure_service.durable.operation import Operation
from perdure_service.durable.payloads import Stowed
from perdure_service.durable.retries import repeated
from perdure_service.durable.steps import CurrentStep, current_step
from perdure_service.durable.system_database import PerdureSystemDatabase
from perdure_service.store import approvals, parked, runs
from perdure_service.store.dbos_tables import NOTIFICATIONS

FOREVER_S = 10 * 365 * 86_400.0
"""The timeout of a wait that has none: DBOS asks for a number."""

RECHECK_S = 30.0
"""How often a wait for a decision looks at the row although nothing woke it: a lost notification costs no more."""


ARTIFACT_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}")
"""The names of artifacts."""

MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}( *;[ -~]{1,200})?")
"""The media types of artifacts."""

MAX_NAME_CHARS = 256
"""The longest name of a model that an event keeps."""


def approval_topic(step_id: int) -> str:
    """Returns the topic on which a decision wakes the run."""
    return f"{APPROVAL_STEP}.{step_id}"


class _Output:
    """A stream of text of one attempt of one step (or of the workflow's own code)."""

    def __init__(self, execution: Execution, stream: str, step: CurrentStep | None) -> None:
        self._execution = execution
        self._stream = stream
        self._step = step

    def write(self, text: str) -> None:
        """See `domain.authoring.OutputStream`."""
        step = self._step
        if step is not None and step.closed:
            raise RuntimeError("the attempt of the step that opened this output stream is over")
        if not text:
            return
        step_id = step.step_id if step else 0
        progress = self._execution.steps.get(step_id)
        if progress is not None:
            progress.wrote_output = True
        for piece in text_pieces(str(text)):
            data = {"stream": self._stream, "text": piece}
            event = self._execution.event(
                EventKind.OUTPUT_DELTA, data, step_id=step_id, attempt=step.attempt if step else 0
            )
            self._execution.note(event)


class BoundRun:
    """`domain.authoring.RunContext` for one execution."""

    def __init__(self, execution: Execution, system_database: PerdureSystemDatabase) -> None:
        self._execution = execution
        self._db = system_database

    @property
    def id(self) -> str:
        """See `RunContext`."""
        return self._execution.key.run_id

    @property
    def namespace(self) -> str:
        """See `RunContext`."""
        return self._execution.key.namespace

    def progress(self, message: str, completed: int = 0, total: int = 0) -> None:
        """See `RunContext`."""
        data = {"message": str(message)[:MAX_TEXT_CHARS], "completed": int(completed), "total": int(total)}
        self._note(EventKind.PROGRESS, data)

    def output(self, stream: str = "output") -> OutputStream:
        """See `RunContext`."""
        return _Output(self._execution, stream, current_step.get())

    def log(self, message: str, level: Literal["debug", "info", "warning", "error"] = "info") -> None:
        """See `RunContext`."""
        self._note(EventKind.LOG, {"message": str(message)[:MAX_TEXT_CHARS], "level": level})

    def usage(self, *, input_tokens: int, output_tokens: int, model: str = "") -> None:
        """See `RunContext`."""
        if current_step.get() is None:
            raise RuntimeError("usage belongs to the step that called the model; call this inside a @DBOS.step()")
        sent, received = int(input_tokens), int(output_tokens)
        if sent < 0 or received < 0:
            raise ValueError(f"a call cannot use {sent} and {received} tokens")
        name = str(model)[:MAX_NAME_CHARS]
        self._note(EventKind.USAGE, {"model": name, "input_tokens": sent, "output_tokens": received})

    def _note(self, kind: EventKind, data: dict[str, Any]) -> None:
        step = current_step.get()
        step_id, attempt = (step.step_id, step.attempt) if step else (0, 0)
        self._execution.note(self._execution.event(kind, data, step_id=step_id, attempt=attempt))

    def artifact(self, name: str, data: bytes | str, *, media_type: str = "") -> None:
        """See `RunContext`."""
        self._artifact(name, data, media_type, current_step.get())

    async def artifact_async(self, name: str, data: bytes | str, *, media_type: str = "") -> None:
        """See `RunContext`."""
        step = current_step.get()
        if step is not None:
            await asyncio.to_thread(self._artifact, name, data, media_type, step)
            return
        context = snapshot_step_context()
        assert context is not None, "bound inside a workflow"
        with EnterDBOSStepCtx({"name": ARTIFACT_STEP}, context):
            await asyncio.to_thread(self._record_artifact, name, data, media_type, context.function_id)

    def _artifact(self, name: str, data: bytes | str, media_type: str, step: CurrentStep | None) -> None:
        if step is None:
            context = snapshot_step_context()
            assert context is not None, "bound inside a workflow"
            with EnterDBOSStepCtx({"name": ARTIFACT_STEP}, context):
                self._record_artifact(name, data, media_type, context.function_id)
            return
        stowed, known = self._stow_artifact(name, data, media_type)
        execution = self._execution
        operation = Operation(execution)

        def finish(conn: sa.Connection) -> None:
            self._db._check_owner_txn(conn, execution.key.workflow_id, execution.owner_xid)
            self._db.payloads.write(conn, execution.key.workflow_id, stowed)
            event = execution.event(EventKind.ARTIFACT, known, step_id=step.step_id, attempt=step.attempt)
            operation.add(execution.key.workflow_id, event)

        operation.finish = finish
        self._db.run_operation(operation)

    def _record_artifact(self, name: str, data: bytes | str, media_type: str, step_id: int) -> None:
        """Writes an artifact as an operation of the workflow with a checkpoint, unless that is recorded."""
        workflow_id, started_ms = self._execution.key.workflow_id, now_ms()
        if self._db.check_operation_execution(workflow_id, step_id, ARTIFACT_STEP) is not None:
            return
        stowed, known = self._stow_artifact(name, data, media_type)

        def events(execution: Execution) -> list[Event]:
            return [Event(EventKind.ARTIFACT, now_ms(), known, step_id, ARTIFACT_STEP, 0, execution.number)]

        self._db.record_with_payload(
            {
                "workflow_uuid": workflow_id,
                "function_id": step_id,
                "function_name": ARTIFACT_STEP,
                "started_at_epoch_ms": started_ms,
                "output": DBOSPortableJSON.serialize(None),
                "error": None,
                "serialization": DBOSPortableJSON.name(),
                "child_workflow_id": None,
            },
            stowed,
            events,
        )

    def _stow_artifact(self, name: str, data: bytes | str, media_type: str) -> tuple[Stowed, dict[str, Any]]:
        """Returns an artifact as a payload, and what its event tells."""
        if not ARTIFACT_NAME.fullmatch(name):
            raise ValueError("an artifact's name has 1 to 256 characters, none of them a control character")
        kind = media_type or ("text/plain; charset=utf-8" if isinstance(data, str) else "application/octet-stream")
        if not MEDIA_TYPE.fullmatch(kind):
            raise ValueError(f"{kind[:100]!r} is no media type, as text/csv is")
        content = data.encode(errors="backslashreplace") if isinstance(data, str) else bytes(data)
        self._db.limit.check_size(f"the artifact {name!r}", len(content))
        stowed = self._db.payloads.stow_bytes(content)
        pointer = stowed.pointer
        known = {"name": name, "media_type": kind, "size_bytes": pointer.size_bytes, "sha256": pointer.sha256}
        return stowed, known

    def idempotency_key(self) -> str:
        """See `RunContext`."""
        step = current_step.get()
        if step is None:
            raise RuntimeError("an idempotency key belongs to a step; call this inside a @DBOS.step()")
        return f"{self._execution.key.workflow_id}:{step.step_id}"

    async def signal(self, name: str, *, timeout: timedelta | None = None) -> Any:  # noqa: ASYNC109 - durable
        """See `RunContext`."""
        seconds = FOREVER_S if timeout is None else timeout.total_seconds()
        payload = await DBOS.recv_async(name, timeout_seconds=seconds)
        if payload is None:
            raise SignalTimeout(f"no signal {name!r} came within {seconds:g} s")
        return payload

    async def approval(
        self,
        title: str,
        *,
        payload: Any = None,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - durable, for people
        on_timeout: Literal["REJECT", "APPROVE", "FAIL_RUN"] = "REJECT",
        assignees: Sequence[str] = (),
        answer_schema: dict[str, Any] | None = None,
    ) -> ApprovalResult:
        """See `RunContext`."""
        if current_step.get() is not None:
            raise RuntimeError("an approval is asked by the agent itself, not inside a @DBOS.step()")
        outcome = TimeoutOutcome(on_timeout)
        context = snapshot_step_context()
        assert context is not None, "bound inside a workflow"
        question = approvals.Question(
            key=self._execution.key,
            agent=self._execution.agent,
            step_id=context.function_id,
            title=str(title)[:MAX_TEXT_CHARS].replace("\0", " "),
            payload_json=values.to_json(payload),
            answer_schema_json="" if answer_schema is None else json.dumps(answer_schema),
            assignees=tuple(assignees),
            timeout_s=None if timeout is None else timeout.total_seconds(),
            on_timeout=outcome,
        )
        with self._execution.working(), EnterDBOSStepCtx({"name": APPROVAL_STEP}, context):
            recorded = await in_few_threads(self._recorded, question)
            if recorded is None:
                self._db.limit.check_row("the approval's payload", question.payload_json)
                recorded = await self._ask_and_wait(question)
        result = ApprovalResult(**{**recorded, "state": ApprovalState(recorded["state"])})
        if result.state is ApprovalState.EXPIRED and outcome is TimeoutOutcome.FAIL_RUN:
            raise ApprovalTimeout(f"nobody decided {question.title!r} in time")
        return result

    def _recorded(self, question: approvals.Question) -> dict[str, Any] | None:
        found = self._db.check_operation_execution(question.key.workflow_id, question.step_id, APPROVAL_STEP)
        if found is None or found["output"] is None:
            return None
        stored: dict[str, Any] = DBOSPortableJSON.deserialize(found["output"])
        return stored

    async def _ask_and_wait(self, question: approvals.Question) -> dict[str, Any]:
        workflow_id, step_id = question.key.workflow_id, question.step_id
        payload, components = self._db._waiter(workflow_id, approval_topic(step_id))
        wait = Wait((f"{parked.APPROVAL}{step_id}",))
        self._db.notifications_map.add(payload, wait.event, components)
        started_ms = now_ms()
        self._execution.steps[step_id] = StepProgress(APPROVAL_STEP)
        try:
            await in_few_threads(self._ask, question)
            while True:
                remaining_s = await in_few_threads(self._answer, question, started_ms)
                if isinstance(remaining_s, dict):
                    return remaining_s
                wait_s = RECHECK_S if remaining_s is None else min(RECHECK_S, max(0.02, remaining_s))
                wait.deadline = None if remaining_s is None else time.monotonic() + remaining_s
                await self._db.nap_async(self._execution, wait, wait_s)
                wait.event.clear()
        finally:
            self._db.notifications_map.pop(payload, wait.event)

    def _ask(self, question: approvals.Question) -> None:
        """Asks, unless an earlier execution has; one owner-fenced transaction."""
        execution = self._execution
        operation = Operation(execution)

        def finish(conn: sa.Connection) -> None:
            self._db._check_owner_txn(conn, question.key.workflow_id, execution.owner_xid)
            asked = approvals.ask(conn, question)
            if asked is False:
                # An earlier execution has asked. If that is still open, the wait goes on; the state follows.
                standing = approvals.stand(conn, question.key.workflow_id, question.step_id, lock=True)
                if standing is None or standing.approval.state is not ApprovalState.PENDING:
                    return
            else:
                data: dict[str, Any] = {"approval_id": question.approval_id, "title": question.title}
                if isinstance(asked, datetime):
                    data["deadline_ms"] = int(asked.timestamp() * 1000)
                event = Event(
                    EventKind.APPROVAL_REQUESTED, now_ms(), data, question.step_id, APPROVAL_STEP, 0, execution.number
                )
                operation.add(question.key.workflow_id, event)
            if execution.state is not RunState.AWAITING_INPUT:
                why = f"asks: {question.title}"
                moved = execution.moved(RunState.AWAITING_INPUT, reason=why, waiting_for=WAITING_APPROVAL)
                operation.add(question.key.workflow_id, moved)

        operation.finish = finish
        self._db.run_operation(operation)

    @repeated()
    def _stand(self, workflow_id: str, step_id: int) -> approvals.Standing | None:
        with self._db.engine.connect() as conn:
            return approvals.stand(conn, workflow_id, step_id, lock=False)

    def _answer(self, question: approvals.Question, started_ms: int) -> dict[str, Any] | float | None:
        """Records the checkpoint when the approval is closed; else returns the seconds to its deadline (None: none).

        Locks in the order of every outside writer: first the run, then the approval.
        """
        workflow_id, step_id, execution = question.key.workflow_id, question.step_id, self._execution
        self._db.refuse_dead(execution)
        standing = self._stand(workflow_id, step_id)
        assert standing is not None, "asked before"
        if standing.approval.state is ApprovalState.PENDING and (
            standing.remaining_s is None or standing.remaining_s > 0
        ):
            return standing.remaining_s
        result: dict[str, Any] = {}

        def events(_execution: Execution) -> list[Event]:
            data = {"duration_ms": max(0, now_ms() - started_ms), "preview": str(result["state"]).lower()}
            done = Event(EventKind.STEP_SUCCEEDED, now_ms(), data, step_id, APPROVAL_STEP, 0, execution.number)
            return [*operation.facts.pop("before", []), done]

        operation = Operation(execution, events=events)

        def finish(conn: sa.Connection) -> None:
            operation.facts.pop("before", None)
            self._db._check_owner_txn(conn, workflow_id, execution.owner_xid)
            locked = approvals.stand(conn, workflow_id, step_id, lock=True)
            assert locked is not None, "approvals are not deleted while their run lives"
            approval = locked.approval
            result.clear()
            if approval.state is ApprovalState.PENDING:
                if locked.remaining_s is None or locked.remaining_s > 0:
                    operation.facts["open"] = locked.remaining_s
                    return
                approval = approvals.close(conn, workflow_id, step_id, ApprovalState.EXPIRED)
                data = {"approval_id": approval.approval_id, "state": ApprovalState.EXPIRED.value}
                operation.facts["before"] = [
                    Event(EventKind.APPROVAL_DECIDED, now_ms(), data, step_id, APPROVAL_STEP, 0, execution.number)
                ]
            if approvals.count_open(conn, workflow_id) == 0 and execution.state is RunState.AWAITING_INPUT:
                back = execution.moved(RunState.RUNNING)
                if runs.waits_for(conn, workflow_id)[0] == WAITING_APPROVAL:
                    # Else whoever decided has told of it.
                    operation.facts.setdefault("before", []).append(back)
            expired = approval.state is ApprovalState.EXPIRED
            result.update(
                approved=approval.on_timeout is TimeoutOutcome.APPROVE
                if expired
                else approval.state is ApprovalState.APPROVED,
                state=approval.state.value,
                decided_by=approval.decided_by,
                comment=approval.comment,
                answer=json.loads(approval.answer_json) if approval.answer_json else None,
            )
            conn.execute(
                sa.text(
                    f"UPDATE {NOTIFICATIONS} SET consumed = true, consumed_by_function_id = :step "
                    "WHERE destination_uuid = :id AND topic = :topic AND consumed = false"
                ),
                {"id": workflow_id, "topic": approval_topic(step_id), "step": step_id},
            )
            self._db._record_operation_result_txn(
                {
                    "workflow_uuid": workflow_id,
                    "function_id": step_id,
                    "function_name": APPROVAL_STEP,
                    "started_at_epoch_ms": started_ms,
                    "output": DBOSPortableJSON.serialize(result),
                    "error": None,
                    "serialization": DBOSPortableJSON.name(),
                    "child_workflow_id": None,
                },
                operation.facts.setdefault("completed_ms", now_ms()),
                conn,
                owner_xid=execution.owner_xid,
            )

        operation.finish = finish
        self._db.run_operation(operation)
        if not result:
            open_s: float | None = operation.facts["open"]
            return open_s
        return result


def current_run(system_database: PerdureSystemDatabase) -> BoundRun | None:
    """Returns the run that this task or thread executes, None outside of runs."""
    context = get_local_dbos_context()
    if context is None or not context.workflow_id:
        return None
    execution = system_database.executions.find(context.workflow_id, context.owner_xid)
    return None if execution is None else BoundRun(execution, system_database)
