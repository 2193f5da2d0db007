"""How the wire's messages become the library's values. Enum values and event kinds of a newer server become UNKNOWN."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from perdure.v1 import (
    agent_catalog_service_pb2,
    agent_run_pb2,
    agent_run_service_pb2,
    approval_pb2,
    operator_service_pb2,
    run_event_pb2,
)

from perdure_client import _events as events
from perdure_client._events import EventData, RunEvent
from perdure_client._types import (
    AgentInfo,
    Approval,
    ApprovalState,
    CellInfo,
    Deletion,
    ExecutorInfo,
    ExecutorState,
    Failure,
    JsonValue,
    Progress,
    QueueInfo,
    Run,
    RunState,
    RunTrace,
    SpanKind,
    SpanLink,
    SpanStatus,
    StartedRun,
    Step,
    StepState,
    StrandedReason,
    StrandedRun,
    SurvivalGoal,
    TimeoutOutcome,
    TraceSpan,
    Usage,
)

RUN_STATES = {
    getattr(agent_run_pb2, f"AGENT_RUN_STATE_{state}"): state for state in RunState if state is not RunState.UNKNOWN
}
APPROVAL_STATES = {
    getattr(approval_pb2, f"APPROVAL_STATE_{state}"): state
    for state in ApprovalState
    if state is not ApprovalState.UNKNOWN
}
_STEP_STATES = {
    getattr(agent_run_service_pb2, f"STEP_STATE_{state}"): state
    for state in StepState
    if state is not StepState.UNKNOWN
}
_EXECUTOR_STATES = {
    getattr(operator_service_pb2, f"EXECUTOR_STATE_{state}"): state
    for state in ExecutorState
    if state is not ExecutorState.UNKNOWN
}
_SURVIVAL_GOALS = {
    operator_service_pb2.SurvivalGoal.Value(f"SURVIVAL_GOAL_{goal}"): goal
    for goal in SurvivalGoal
    if goal is not SurvivalGoal.UNKNOWN
}
_STRANDED_REASONS = {
    getattr(operator_service_pb2, f"STRANDED_REASON_{reason}"): reason
    for reason in StrandedReason
    if reason is not StrandedReason.UNKNOWN
}
_TIMEOUT_OUTCOMES = {
    getattr(approval_pb2, f"APPROVAL_TIMEOUT_OUTCOME_{outcome}"): outcome
    for outcome in TimeoutOutcome
    if outcome is not TimeoutOutcome.UNKNOWN
} | {approval_pb2.APPROVAL_TIMEOUT_OUTCOME_UNSPECIFIED: TimeoutOutcome.REJECT}


_SPAN_KINDS = {
    getattr(agent_run_service_pb2, f"SPAN_KIND_{kind}"): kind for kind in SpanKind if kind is not SpanKind.UNKNOWN
}
_SPAN_STATUSES = {
    agent_run_service_pb2.SPAN_STATUS_OK: SpanStatus.OK,
    agent_run_service_pb2.SPAN_STATUS_ERROR: SpanStatus.ERROR,
}


def run_from(message: agent_run_pb2.AgentRun) -> Run:
    """Returns a run."""
    return Run(**_run_fields(message))


def started_run_from(message: agent_run_pb2.AgentRun, *, created: bool) -> StartedRun:
    """Returns the run of a start, or of a fork."""
    return StartedRun(**_run_fields(message), created=created)


def _run_fields(message: agent_run_pb2.AgentRun) -> dict[str, Any]:
    return {
        "namespace": message.namespace,
        "run_id": message.run_id,
        "agent": message.agent,
        "agent_version": message.agent_version,
        "input_sha256": message.input_sha256,
        "state": RUN_STATES.get(message.state, RunState.UNKNOWN),
        "state_reason": message.state_reason,
        "create_time": _time(message, "create_time"),
        "start_time": _time(message, "start_time"),
        "end_time": _time(message, "end_time"),
        "deadline_time": _time(message, "deadline_time"),
        "execution": message.execution,
        "executor_id": message.executor_id,
        "progress": _progress(message.progress) if message.HasField("progress") else None,
        "pending_approvals": message.pending_approvals,
        "input": _json(message.input_json),
        "output": _json(message.output_json),
        "failure": _failure(message.failure) if message.HasField("failure") else None,
        "labels": dict(message.labels),
        "context_id": message.context_id,
        "parent_run_id": message.parent_run_id,
        "trace_id": message.trace_id,
        "last_sequence": message.last_sequence,
        "usage": _run_usage(message.usage) if message.HasField("usage") else None,
        "caller": message.caller,
        "forked_from_run_id": message.forked_from_run_id,
        "forked_from_step_id": message.forked_from_step_id,
        "queue": message.queue,
        "priority": message.priority,
        "input_bytes": message.input_bytes,
        "output_bytes": message.output_bytes,
        "home_region": message.home_region,
    }


def _run_usage(message: agent_run_pb2.RunUsage) -> Usage:
    return Usage(input_tokens=message.input_tokens, output_tokens=message.output_tokens)


def deletion_from(response: agent_run_service_pb2.DeleteRunsResponse) -> Deletion:
    """Returns what a call has deleted."""
    return Deletion(
        deleted_count=response.deleted_count,
        sample_run_ids=tuple(response.sample_run_ids),
        more=response.more,
        unfinished_run_ids=tuple(response.unfinished_run_ids),
        missing_run_ids=tuple(response.missing_run_ids),
    )


def step_from(message: agent_run_service_pb2.Step) -> Step:
    """Returns a step."""
    return Step(
        step_id=message.step_id,
        step_name=message.step_name,
        state=_STEP_STATES.get(message.state, StepState.UNKNOWN),
        attempts=message.attempts,
        execution=message.execution,
        start_time=_time(message, "start_time"),
        end_time=_time(message, "end_time"),
        error=_failure(message.error) if message.HasField("error") else None,
        output_preview=message.output_preview,
        child_run_id=message.child_run_id,
    )


def trace_from(response: agent_run_service_pb2.GetRunTraceResponse) -> RunTrace:
    """Returns a trace."""
    return RunTrace(
        trace_id=response.trace_id,
        spans=tuple(_span_from(span) for span in response.spans),
        truncated=response.truncated,
    )


def _span_from(message: agent_run_service_pb2.TraceSpan) -> TraceSpan:
    return TraceSpan(
        span_id=message.span_id,
        parent_span_id=message.parent_span_id,
        name=message.name,
        kind=_SPAN_KINDS.get(message.kind, SpanKind.UNKNOWN),
        run_id=message.run_id,
        start_time=_time(message, "start_time"),
        end_time=_time(message, "end_time"),
        status=_SPAN_STATUSES.get(message.status, SpanStatus.UNSET),
        error_type=message.error_type,
        attributes=dict(sorted(message.attributes.items())),
        links=tuple(
            SpanLink(trace_id=link.trace_id, span_id=link.span_id, run_id=link.run_id) for link in message.links
        ),
    )


def approval_from(message: approval_pb2.Approval) -> Approval:
    """Returns an approval."""
    return Approval(
        approval_id=message.approval_id,
        namespace=message.namespace,
        run_id=message.run_id,
        agent=message.agent,
        step_id=message.step_id,
        title=message.title,
        payload=_json(message.payload_json),
        answer_schema=_json(message.answer_schema_json),
        assignees=tuple(message.assignees),
        create_time=_time(message, "create_time"),
        deadline_time=_time(message, "deadline_time"),
        on_timeout=_TIMEOUT_OUTCOMES.get(message.on_timeout, TimeoutOutcome.UNKNOWN),
        state=APPROVAL_STATES.get(message.state, ApprovalState.UNKNOWN),
        decided_by=message.decided_by,
        decide_time=_time(message, "decide_time"),
        comment=message.comment,
        answer=_json(message.answer_json),
        revision=message.revision,
    )


def executor_from(message: operator_service_pb2.Executor) -> ExecutorInfo:
    """Returns an executor."""
    return ExecutorInfo(
        executor_id=message.executor_id,
        address=message.address,
        application_version=message.application_version,
        region=message.region,
        state=_EXECUTOR_STATES.get(message.state, ExecutorState.UNKNOWN),
        running=message.running,
        max_running=message.max_running,
        start_time=_time(message, "start_time"),
        expire_time=_time(message, "expire_time"),
    )


def queue_from(message: operator_service_pb2.Queue) -> QueueInfo:
    """Returns a queue."""
    return QueueInfo(
        queue=message.queue,
        worker_concurrency=message.worker_concurrency,
        global_concurrency=message.global_concurrency,
        rate_limit=message.rate_limit,
        rate_period=_duration(message.rate_period) if message.HasField("rate_period") else None,
        queued=message.queued,
        running=message.running,
        oldest_queued_time=_time(message, "oldest_queued_time"),
    )


def cell_from(message: operator_service_pb2.Cell) -> CellInfo:
    """Returns a cell."""
    return CellInfo(
        cell=message.cell,
        home_region=message.home_region,
        secondary_region=message.secondary_region,
        survival_goal=_SURVIVAL_GOALS.get(message.survival_goal, SurvivalGoal.UNKNOWN),
        database=message.database,
        address=message.address,
        standby_address=message.standby_address,
        namespaces=tuple(message.namespaces),
        served_here=message.served_here,
        reachable=message.reachable,
        serving_region=message.serving_region,
        epoch=message.epoch,
        claim_time=_time(message, "claim_time"),
        executors=message.executors,
        standing_by=message.standing_by,
    )


def stranded_from(message: operator_service_pb2.StrandedRun) -> StrandedRun:
    """Returns a run that nobody continues."""
    return StrandedRun(
        namespace=message.namespace,
        run_id=message.run_id,
        agent=message.agent,
        agent_version=message.agent_version,
        application_version=message.application_version,
        state=RUN_STATES.get(message.state, RunState.UNKNOWN),
        reason=_STRANDED_REASONS.get(message.reason, StrandedReason.UNKNOWN),
        advice=message.advice,
        create_time=_time(message, "create_time"),
    )


def agent_from(message: agent_catalog_service_pb2.Agent) -> AgentInfo:
    """Returns an agent."""
    return AgentInfo(
        agent=message.agent,
        agent_version=message.agent_version,
        description=message.description,
        input_schema=_json(message.input_schema_json),
        output_schema=_json(message.output_schema_json),
        current=message.current,
        max_steps=message.max_steps,
        max_tokens=message.max_tokens,
        queue=message.queue,
        max_running=message.max_running,
    )


def event_from(message: run_event_pb2.RunEvent) -> RunEvent:
    """Returns an event."""
    kind = message.WhichOneof("kind")
    convert = _EVENT_DATA.get(kind or "")
    return RunEvent(
        sequence=message.sequence,
        event_time=_time(message, "event_time"),
        run_id=message.run_id,
        step_id=message.step_id,
        step_name=message.step_name,
        attempt=message.attempt,
        execution=message.execution,
        data=convert(getattr(message, kind or "")) if convert else events.UnknownData(),
    )


def _state_changed(message: run_event_pb2.StateChanged) -> events.StateChanged:
    return events.StateChanged(
        to_state=RUN_STATES.get(message.to_state, RunState.UNKNOWN),
        from_state=RUN_STATES.get(message.from_state, RunState.UNKNOWN) if message.from_state else None,
        reason=message.reason,
        failure=_failure(message.failure) if message.HasField("failure") else None,
        until_time=_time(message, "until_time"),
        executor_id=message.executor_id,
    )


def _step_started(message: run_event_pb2.StepStarted) -> events.StepStarted:
    return events.StepStarted(max_attempts=message.max_attempts)


def _step_retrying(message: run_event_pb2.StepRetrying) -> events.StepRetrying:
    return events.StepRetrying(error=_failure(message.error), delay=_duration(message.delay))


def _step_succeeded(message: run_event_pb2.StepSucceeded) -> events.StepSucceeded:
    return events.StepSucceeded(
        duration=_duration(message.duration), output_preview=message.output_preview, output_bytes=message.output_bytes
    )


def _step_failed(message: run_event_pb2.StepFailed) -> events.StepFailed:
    return events.StepFailed(error=_failure(message.error), duration=_duration(message.duration))


def _output_delta(message: run_event_pb2.OutputDelta) -> events.OutputDelta:
    return events.OutputDelta(stream=message.stream, text=message.text)


def _attempt_reset(_message: run_event_pb2.AttemptReset) -> events.AttemptReset:
    return events.AttemptReset()


def _progress(message: agent_run_pb2.RunProgress) -> Progress:
    return Progress(message=message.message, completed=message.completed, total=message.total)


def _published(message: run_event_pb2.Published) -> events.Published:
    return events.Published(key=message.key, value=_json(message.value_json))


def _approval_requested(message: run_event_pb2.ApprovalRequested) -> events.ApprovalRequested:
    return events.ApprovalRequested(
        approval_id=message.approval_id, title=message.title, deadline_time=_time(message, "deadline_time")
    )


def _approval_decided(message: run_event_pb2.ApprovalDecided) -> events.ApprovalDecided:
    return events.ApprovalDecided(
        approval_id=message.approval_id,
        state=APPROVAL_STATES.get(message.state, ApprovalState.UNKNOWN),
        decided_by=message.decided_by,
        comment=message.comment,
    )


def _signal_received(message: run_event_pb2.SignalReceived) -> events.SignalReceived:
    return events.SignalReceived(name=message.name, payload_bytes=message.payload_bytes, sender=message.sender)


def _child_started(message: run_event_pb2.ChildStarted) -> events.ChildStarted:
    return events.ChildStarted(child_run_id=message.child_run_id)


def _recovered(message: run_event_pb2.Recovered) -> events.Recovered:
    return events.Recovered(from_executor_id=message.from_executor_id, gap=_duration(message.gap))


def _log(message: run_event_pb2.RunLog) -> events.LogLine:
    return events.LogLine(message=message.message, level=message.level)


def _usage(message: run_event_pb2.ModelUsage) -> events.ModelUsage:
    return events.ModelUsage(
        model=message.model, input_tokens=message.input_tokens, output_tokens=message.output_tokens
    )


def _forked(message: run_event_pb2.RunForked) -> events.RunForked:
    return events.RunForked(from_run_id=message.from_run_id, from_step_id=message.from_step_id)


def _artifact(message: run_event_pb2.ArtifactWritten) -> events.ArtifactWritten:
    return events.ArtifactWritten(
        name=message.name, media_type=message.media_type, size_bytes=message.size_bytes, sha256=message.sha256
    )


_EVENT_DATA: dict[str, Callable[[Any], EventData]] = {
    "state_changed": _state_changed,
    "step_started": _step_started,
    "step_retrying": _step_retrying,
    "step_succeeded": _step_succeeded,
    "step_failed": _step_failed,
    "output_delta": _output_delta,
    "attempt_reset": _attempt_reset,
    "progress": _progress,
    "published": _published,
    "approval_requested": _approval_requested,
    "approval_decided": _approval_decided,
    "signal_received": _signal_received,
    "child_started": _child_started,
    "recovered": _recovered,
    "log": _log,
    "usage": _usage,
    "forked": _forked,
    "artifact": _artifact,
}


def _failure(message: agent_run_pb2.AgentRunFailure) -> Failure:
    return Failure(
        type=message.type,
        message=message.message,
        step_name=message.step_name,
        retryable=message.retryable,
        cause=message.cause,
    )


def _time(message: Any, field: str) -> datetime | None:
    """Returns a time field, timezone-aware; None when it is unset."""
    if not message.HasField(field):
        return None
    value: Timestamp = getattr(message, field)
    return value.ToDatetime(tzinfo=UTC)


def _duration(message: Duration) -> timedelta:
    return message.ToTimedelta()


def _json(text: str) -> JsonValue:
    """Returns parsed JSON text; None for no text."""
    return json.loads(text) if text else None
