"""How messages become values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from perdure.v1 import agent_catalog_service_pb2, agent_run_pb2, agent_run_service_pb2, approval_pb2, run_event_pb2
from perdure_client import (
    ApprovalDecided,
    ApprovalRequested,
    ApprovalState,
    ArtifactWritten,
    AttemptReset,
    ChildStarted,
    EventKind,
    Failure,
    LogLine,
    ModelUsage,
    OutputDelta,
    Progress,
    Published,
    Recovered,
    RunEvent,
    RunForked,
    RunState,
    SignalReceived,
    StateChanged,
    StepFailed,
    StepRetrying,
    StepStarted,
    StepState,
    StepSucceeded,
    TimeoutOutcome,
    UnknownData,
    Usage,
)
from perdure_client._convert import agent_from, approval_from, event_from, run_from, step_from

AT = {"seconds": 1_700_000_000, "nanos": 500_000_000}
TIME = datetime(2023, 11, 14, 22, 13, 20, 500_000, tzinfo=UTC)
FAILED = {"type": "ValueError", "message": "no"}
FAILURE = Failure(type="ValueError", message="no")

EVENTS: list[tuple[dict[str, Any], Any]] = [
    (
        {"state_changed": {"from_state": 3, "to_state": 7, "reason": "x", "failure": FAILED, "until_time": AT}},
        StateChanged(
            from_state=RunState.RUNNING, to_state=RunState.FAILED, reason="x", failure=FAILURE, until_time=TIME
        ),
    ),
    ({"state_changed": {"to_state": 2}}, StateChanged(from_state=None, to_state=RunState.QUEUED)),
    ({"step_started": {"max_attempts": 4}}, StepStarted(max_attempts=4)),
    (
        {"step_retrying": {"error": FAILED, "delay": {"seconds": 2}}},
        StepRetrying(error=FAILURE, delay=timedelta(seconds=2)),
    ),
    (
        {"step_succeeded": {"duration": {"nanos": 1_000_000}, "output_preview": "p", "output_bytes": 3}},
        StepSucceeded(duration=timedelta(milliseconds=1), output_preview="p", output_bytes=3),
    ),
    ({"step_failed": {"error": FAILED}}, StepFailed(error=FAILURE)),
    ({"output_delta": {"stream": "s", "text": "t"}}, OutputDelta(stream="s", text="t")),
    ({"attempt_reset": {}}, AttemptReset()),
    ({"progress": {"message": "m", "completed": 1, "total": 2}}, Progress(message="m", completed=1, total=2)),
    ({"published": {"key": "k", "value_json": '{"a":[1]}'}}, Published(key="k", value={"a": [1]})),
    (
        {"approval_requested": {"approval_id": "r/1", "title": "?", "deadline_time": AT}},
        ApprovalRequested(approval_id="r/1", title="?", deadline_time=TIME),
    ),
    (
        {"approval_decided": {"approval_id": "r/1", "state": 2, "decided_by": "me", "comment": "c"}},
        ApprovalDecided(approval_id="r/1", state=ApprovalState.APPROVED, decided_by="me", comment="c"),
    ),
    (
        {"signal_received": {"name": "go", "payload_bytes": 2, "sender": "me"}},
        SignalReceived(name="go", payload_bytes=2, sender="me"),
    ),
    ({"child_started": {"child_run_id": "r.1"}}, ChildStarted(child_run_id="r.1")),
    (
        {"recovered": {"from_executor_id": "e", "gap": {"seconds": 3}}},
        Recovered(from_executor_id="e", gap=timedelta(seconds=3)),
    ),
    ({"log": {"message": "m", "level": "warning"}}, LogLine(message="m", level="warning")),
    ({"forked": {"from_run_id": "foo", "from_step_id": 3}}, RunForked(from_run_id="foo", from_step_id=3)),
    (
        {"usage": {"model": "small", "input_tokens": 7, "output_tokens": 3}},
        ModelUsage(model="small", input_tokens=7, output_tokens=3),
    ),
    (
        {"artifact": {"name": "a.csv", "media_type": "text/csv", "size_bytes": 3, "sha256": "ab"}},
        ArtifactWritten(name="a.csv", media_type="text/csv", size_bytes=3, sha256="ab"),
    ),
    ({}, UnknownData()),
]


@pytest.mark.parametrize(("fields", "data"), EVENTS, ids=[next(iter(fields), "unknown") for fields, _ in EVENTS])
def test_events_have_data_of_their_kind(fields: dict[str, Any], data: Any) -> None:
    message = run_event_pb2.RunEvent(
        sequence=3, run_id="r", step_id=2, step_name="s", attempt=1, execution=1, event_time=AT, **fields
    )
    event = event_from(message)
    assert event == RunEvent(
        sequence=3, run_id="r", step_id=2, step_name="s", attempt=1, execution=1, event_time=TIME, data=data
    )
    assert event.kind == (next(iter(fields)) if fields else "unknown")


def test_every_kind_of_the_schema_has_a_value_here() -> None:
    schema = {field.name for field in run_event_pb2.RunEvent.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert schema == {kind.value for kind in EventKind} - {"unknown"}
    assert schema == {next(iter(fields)) for fields, _ in EVENTS if fields}


@pytest.mark.parametrize(
    ("wire", "ours", "prefix"),
    [
        (agent_run_pb2.AgentRunState, RunState, "AGENT_RUN_STATE_"),
        (agent_run_service_pb2.StepState, StepState, "STEP_STATE_"),
        (approval_pb2.ApprovalState, ApprovalState, "APPROVAL_STATE_"),
        (approval_pb2.ApprovalTimeoutOutcome, TimeoutOutcome, "APPROVAL_TIMEOUT_OUTCOME_"),
    ],
)
def test_enums_are_those_of_the_schema(wire: Any, ours: Any, prefix: str) -> None:
    names = {name.removeprefix(prefix) for name in wire.keys()}  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == {member.value for member in ours} - {"UNKNOWN"}


def test_values_of_a_newer_server_are_unknown_and_not_an_error() -> None:
    assert run_from(agent_run_pb2.AgentRun(state=99)).state is RunState.UNKNOWN  # type: ignore[arg-type]
    assert step_from(agent_run_service_pb2.Step(state=99)).state is StepState.UNKNOWN  # type: ignore[arg-type]
    assert not RunState.UNKNOWN.terminal


def test_a_run_has_parsed_json_aware_times_and_nothing_that_was_not_sent() -> None:
    run = run_from(
        agent_run_pb2.AgentRun(
            run_id="r",
            state=agent_run_pb2.AGENT_RUN_STATE_SUCCEEDED,
            create_time=AT,  # type: ignore[arg-type]
            input_json=f'{{"n":{2**60}}}',
            output_json='"done"',
            labels={"a": "b"},
        )
    )
    assert (run.input, run.output, run.labels) == ({"n": 2**60}, "done", {"a": "b"})
    assert run.create_time == TIME
    assert run.create_time.tzinfo is UTC
    assert (run.start_time, run.end_time, run.progress, run.failure, run.usage) == (None,) * 5
    assert run.done
    assert run.succeeded


def test_a_run_and_its_agent_tell_what_was_used_and_what_may_be() -> None:
    run = run_from(agent_run_pb2.AgentRun(usage={"input_tokens": 7, "output_tokens": 3}))  # type: ignore[arg-type]
    assert run.usage == Usage(input_tokens=7, output_tokens=3)
    assert run.usage.total_tokens == 10
    agent = agent_from(agent_catalog_service_pb2.Agent(max_steps=4, max_tokens=5))
    assert (agent.max_steps, agent.max_tokens) == (4, 5)


def test_an_approval_that_does_not_say_what_its_timeout_means_is_rejected_then() -> None:
    assert approval_from(approval_pb2.Approval()).on_timeout is TimeoutOutcome.REJECT


def test_a_failure_reads_like_pythons() -> None:
    assert str(FAILURE) == "ValueError: no"
    assert str(Failure(type="Timeout")) == "Timeout"
