"""Turns the events of a run's log into messages. What a kind's members are is the contract with who writes the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message
from perdure.v1 import agent_run_pb2, agent_run_service_pb2, approval_pb2
from perdure.v1 import run_event_pb2 as pb

from perdure_service.domain.events import Event, EventKind
from perdure_service.durable.service import WatchBatch
from perdure_service.rpc import enums, fields
from perdure_service.rpc.convert import agent_run

T = TypeVar("T")
Data = Mapping[str, Any]


def run_event(event: Event, run_id: str) -> pb.RunEvent:
    """Returns an event as a message. Never raises: what does not fit a field is replaced or left out.

    Args:
        event: As the log has it.
        run_id: The run's id in the API.
    """
    message = pb.RunEvent(
        sequence=fields.int64(event.sequence),
        event_time=fields.timestamp_of_ms(event.time_ms),
        run_id=fields.text(run_id),
        step_id=fields.int32(event.step_id),
        step_name=fields.text(event.step_name),
        attempt=fields.int32(event.attempt),
        execution=fields.int32(event.execution),
    )
    getattr(message, event.kind.value).CopyFrom(_MEMBERS[event.kind](event.data))
    return message


def watch_responses(batch: WatchBatch, max_bytes: int) -> Iterator[agent_run_service_pb2.WatchRunResponse]:
    """Yields a batch as responses of about `max_bytes` at most: one, unless its events are large.

    A response that is not the batch's last has a cursor of its own, so a client may reconnect after any of them.
    """
    snapshot = None if batch.snapshot is None else agent_run(batch.snapshot, full=False)
    pending: list[pb.RunEvent] = []
    pending_bytes = 0
    for event in batch.events:
        message = run_event(event, batch.key.run_id)
        size_bytes = message.ByteSize()
        if pending and pending_bytes + size_bytes > max_bytes:
            yield _partial(pending, batch, snapshot)
            snapshot, pending, pending_bytes = None, [], 0
        pending.append(message)
        pending_bytes += size_bytes
    yield agent_run_service_pb2.WatchRunResponse(
        events=pending,
        cursor=batch.cursor.encode(),
        snapshot=snapshot,
        last_sequence=batch.cursor.sequence,
        caught_up=batch.caught_up,
        end_of_run=batch.end_of_run,
    )


def _partial(
    events: list[pb.RunEvent], batch: WatchBatch, snapshot: agent_run_pb2.AgentRun | None
) -> agent_run_service_pb2.WatchRunResponse:
    cursor = batch.cursor.after(batch.key.workflow_id, events[-1].sequence)
    return agent_run_service_pb2.WatchRunResponse(
        events=events, cursor=cursor.encode(), snapshot=snapshot, last_sequence=cursor.sequence
    )


def _enum(value: object, table: Mapping[Any, T], default: T) -> T:
    return table.get(value, default) if isinstance(value, str) else default


def _state_changed(data: Data) -> Message:
    unspecified = agent_run_pb2.AGENT_RUN_STATE_UNSPECIFIED
    return pb.StateChanged(
        from_state=_enum(data.get("from"), enums.RUN_STATES, unspecified),
        to_state=_enum(data.get("to"), enums.RUN_STATES, unspecified),
        reason=fields.text(data.get("reason")),
        failure=fields.failure_of_json(data.get("failure")),
        until_time=fields.timestamp_of_ms(data.get("until_ms")),
        executor_id=fields.text(data.get("executor_id")),
    )


def _step_started(data: Data) -> Message:
    return pb.StepStarted(max_attempts=fields.int32(data.get("max_attempts")))


def _step_retrying(data: Data) -> Message:
    return pb.StepRetrying(
        error=fields.failure_of_json(data.get("error")), delay=fields.duration_of_ms(data.get("delay_ms"))
    )


def _step_succeeded(data: Data) -> Message:
    return pb.StepSucceeded(
        duration=fields.duration_of_ms(data.get("duration_ms")),
        output_preview=fields.text(data.get("preview")),
        output_bytes=fields.int64(data.get("output_bytes")),
    )


def _step_failed(data: Data) -> Message:
    return pb.StepFailed(
        duration=fields.duration_of_ms(data.get("duration_ms")), error=fields.failure_of_json(data.get("error"))
    )


def _output_delta(data: Data) -> Message:
    return pb.OutputDelta(stream=fields.text(data.get("stream")), text=fields.text(data.get("text")))


def _attempt_reset(data: Data) -> Message:  # noqa: ARG001 - it has no members
    return pb.AttemptReset()


def _progress(data: Data) -> Message:
    return agent_run_pb2.RunProgress(
        message=fields.text(data.get("message")),
        completed=fields.int64(data.get("completed")),
        total=fields.int64(data.get("total")),
    )


def _published(data: Data) -> Message:
    return pb.Published(
        key=fields.text(data.get("key")),
        value_json=fields.text(data.get("value_json")),
        value_bytes=fields.int64(data.get("value_bytes")),
    )


def _approval_requested(data: Data) -> Message:
    return pb.ApprovalRequested(
        approval_id=fields.text(data.get("approval_id")),
        title=fields.text(data.get("title")),
        deadline_time=fields.timestamp_of_ms(data.get("deadline_ms")),
    )


def _approval_decided(data: Data) -> Message:
    return pb.ApprovalDecided(
        approval_id=fields.text(data.get("approval_id")),
        state=_enum(data.get("state"), enums.APPROVAL_STATES, approval_pb2.APPROVAL_STATE_UNSPECIFIED),
        decided_by=fields.text(data.get("decided_by")),
        comment=fields.text(data.get("comment")),
    )


def _signal_received(data: Data) -> Message:
    return pb.SignalReceived(
        name=fields.text(data.get("name")),
        payload_bytes=fields.int64(data.get("payload_bytes")),
        sender=fields.text(data.get("sender")),
    )


def _child_started(data: Data) -> Message:
    return pb.ChildStarted(child_run_id=fields.text(data.get("child_run_id")))


def _recovered(data: Data) -> Message:
    return pb.Recovered(
        from_executor_id=fields.text(data.get("from_executor_id")), gap=fields.duration_of_ms(data.get("gap_ms"))
    )


def _log(data: Data) -> Message:
    return pb.RunLog(message=fields.text(data.get("message")), level=fields.text(data.get("level")))


def _usage(data: Data) -> Message:
    return pb.ModelUsage(
        model=fields.text(data.get("model")),
        input_tokens=fields.int64(data.get("input_tokens")),
        output_tokens=fields.int64(data.get("output_tokens")),
    )


def _forked(data: Data) -> Message:
    return pb.RunForked(
        from_run_id=fields.text(data.get("from_run_id")), from_step_id=fields.int32(data.get("from_step_id"))
    )


def _artifact(data: Data) -> Message:
    return pb.ArtifactWritten(
        name=fields.text(data.get("name")),
        media_type=fields.text(data.get("media_type")),
        size_bytes=fields.int64(data.get("size_bytes")),
        sha256=fields.text(data.get("sha256")),
    )


_MEMBERS: dict[EventKind, Callable[[Data], Message]] = {
    EventKind.STATE_CHANGED: _state_changed,
    EventKind.STEP_STARTED: _step_started,
    EventKind.STEP_RETRYING: _step_retrying,
    EventKind.STEP_SUCCEEDED: _step_succeeded,
    EventKind.STEP_FAILED: _step_failed,
    EventKind.OUTPUT_DELTA: _output_delta,
    EventKind.ATTEMPT_RESET: _attempt_reset,
    EventKind.PROGRESS: _progress,
    EventKind.PUBLISHED: _published,
    EventKind.APPROVAL_REQUESTED: _approval_requested,
    EventKind.APPROVAL_DECIDED: _approval_decided,
    EventKind.SIGNAL_RECEIVED: _signal_received,
    EventKind.CHILD_STARTED: _child_started,
    EventKind.RECOVERED: _recovered,
    EventKind.LOG: _log,
    EventKind.USAGE: _usage,
    EventKind.FORKED: _forked,
    EventKind.ARTIFACT: _artifact,
}
