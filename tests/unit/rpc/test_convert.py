"""What the service answers becomes messages: every field where it belongs, and nothing an agent wrote can break it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perdure.v1 import agent_run_pb2, agent_run_service_pb2, approval_pb2, run_event_pb2
from perdure_service.domain.agents import AgentSpec
from perdure_service.domain.approvals import ApprovalState, TimeoutOutcome
from perdure_service.domain.budgets import Budget
from perdure_service.domain.cursors import Cursor
from perdure_service.domain.events import Event, EventKind, Step, StepState
from perdure_service.domain.runs import Failure, Progress, RunKey, RunState, Usage
from perdure_service.rpc import convert, convert_events, enums, fields

from tests.unit.rpc.doubles import KEY, NOON, a_batch, a_run, an_approval, an_event

FAILURE = Failure("ValueError", "no", "ask_model", True, "KeyError: x")
FAILURE_MESSAGE = agent_run_pb2.AgentRunFailure(
    type="ValueError", message="no", step_name="ask_model", retryable=True, cause="KeyError: x"
)

EVENTS: list[tuple[EventKind, dict[str, Any], dict[str, Any]]] = [
    (
        EventKind.STATE_CHANGED,
        {"from": "RUNNING", "to": "FAILED", "reason": "it broke", "failure": FAILURE.to_json()},
        {
            "from_state": agent_run_pb2.AGENT_RUN_STATE_RUNNING,
            "to_state": agent_run_pb2.AGENT_RUN_STATE_FAILED,
            "reason": "it broke",
            "failure": FAILURE_MESSAGE,
        },
    ),
    (
        EventKind.STATE_CHANGED,
        {"to": "SCHEDULED", "until_ms": 1_500, "executor_id": "host-1"},
        {
            "to_state": agent_run_pb2.AGENT_RUN_STATE_SCHEDULED,
            "until_time": fields.timestamp_of_ms(1_500),
            "executor_id": "host-1",
        },
    ),
    (EventKind.STEP_STARTED, {"max_attempts": 4}, {"max_attempts": 4}),
    (
        EventKind.STEP_RETRYING,
        {"error": FAILURE.to_json(), "delay_ms": 1_250},
        {"error": FAILURE_MESSAGE, "delay": fields.duration_of_ms(1_250)},
    ),
    (
        EventKind.STEP_SUCCEEDED,
        {"duration_ms": 31, "preview": "[1,", "output_bytes": 9},
        {"duration": fields.duration_of_ms(31), "output_preview": "[1,", "output_bytes": 9},
    ),
    (
        EventKind.STEP_FAILED,
        {"duration_ms": 31, "error": FAILURE.to_json()},
        {"duration": fields.duration_of_ms(31), "error": FAILURE_MESSAGE},
    ),
    (EventKind.OUTPUT_DELTA, {"stream": "output", "text": "Hel"}, {"stream": "output", "text": "Hel"}),
    (EventKind.ATTEMPT_RESET, {}, {}),
    (
        EventKind.PROGRESS,
        {"message": "read", "completed": 1, "total": 3},
        {"message": "read", "completed": 1, "total": 3},
    ),
    (EventKind.PUBLISHED, {"key": "k", "value_json": "[]"}, {"key": "k", "value_json": "[]"}),
    (
        EventKind.APPROVAL_REQUESTED,
        {"approval_id": "foo/3", "title": "Publish?", "deadline_ms": 7},
        {"approval_id": "foo/3", "title": "Publish?", "deadline_time": fields.timestamp_of_ms(7)},
    ),
    (
        EventKind.APPROVAL_DECIDED,
        {"approval_id": "foo/3", "state": "APPROVED", "decided_by": "ann", "comment": "fine"},
        {
            "approval_id": "foo/3",
            "state": approval_pb2.APPROVAL_STATE_APPROVED,
            "decided_by": "ann",
            "comment": "fine",
        },
    ),
    (
        EventKind.SIGNAL_RECEIVED,
        {"name": "go", "payload_bytes": 2, "sender": "ann"},
        {"name": "go", "payload_bytes": 2, "sender": "ann"},
    ),
    (EventKind.CHILD_STARTED, {"child_run_id": "foo.5"}, {"child_run_id": "foo.5"}),
    (
        EventKind.RECOVERED,
        {"from_executor_id": "host-1", "gap_ms": 15_000},
        {"from_executor_id": "host-1", "gap": fields.duration_of_ms(15_000)},
    ),
    (EventKind.LOG, {"message": "hm", "level": "warning"}, {"message": "hm", "level": "warning"}),
    (
        EventKind.USAGE,
        {"model": "small", "input_tokens": 7, "output_tokens": 3},
        {"model": "small", "input_tokens": 7, "output_tokens": 3},
    ),
    (EventKind.FORKED, {"from_run_id": "foo", "from_step_id": 3}, {"from_run_id": "foo", "from_step_id": 3}),
    (
        EventKind.ARTIFACT,
        {"name": "report", "media_type": "text/csv", "size_bytes": 3, "sha256": "ab" * 32},
        {"name": "report", "media_type": "text/csv", "size_bytes": 3, "sha256": "ab" * 32},
    ),
]


MEMBERS = st.sampled_from(sorted({name for _, data, _ in EVENTS for name in data} | set(FAILURE.to_json())))
# Halves of surrogate pairs, alone or together, NUL, and ordinary text.
TEXTS = st.text(st.sampled_from("ab \0\n\ud83d\ude00\udfffé😀"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(["RUNNING", "APPROVED"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MEMBERS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(("kind", "data", "expected"), EVENTS, ids=[kind for kind, _, _ in EVENTS])
def test_every_member_of_every_kind_has_its_field(kind, data, expected):
    event = Event(kind, 1_700_000_000_123, data, 5, "ask_model", 2, 3, 8)
    message = convert_events.run_event(event, "foo")
    assert message == run_event_pb2.RunEvent(
        sequence=8,
        event_time=fields.timestamp_of_ms(1_700_000_000_123),
        run_id="foo",
        step_id=5,
        step_name="ask_model",
        attempt=2,
        execution=3,
        **{kind.value: expected},
    )
    assert message.WhichOneof("kind") == kind.value


def test_the_examples_cover_every_kind_and_the_schema_has_no_other():
    assert {kind for kind, _, _ in EVENTS} == set(EventKind)
    members = {member.name for member in run_event_pb2.RunEvent.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert members == {kind.value for kind in EventKind}
    assert len(enums.EVENT_KINDS) == len(run_event_pb2.RunEventKind.keys()) - 1


def test_every_name_of_the_domain_has_a_number_of_its_own_and_no_number_is_left():
    for table, enum in (
        (enums.RUN_STATES, agent_run_pb2.AgentRunState),
        (enums.STEP_STATES, agent_run_service_pb2.StepState),
        (enums.APPROVAL_STATES, approval_pb2.ApprovalState),
        (enums.TIMEOUT_OUTCOMES, approval_pb2.ApprovalTimeoutOutcome),
    ):
        assert set(table.values()) | {0} == set(enum.values())


@given(
    kind=st.sampled_from(EventKind),
    data=st.dictionaries(MEMBERS, JSON, max_size=6),
    name=TEXTS,
    numbers=st.tuples(*[st.integers()] * 5),
)
def test_whatever_an_event_holds_it_becomes_a_message(kind, data, name, numbers):
    time_ms, step_id, attempt, execution, sequence = numbers
    event = Event(kind, time_ms, data, step_id, name, attempt, execution, sequence)
    message = convert_events.run_event(event, name)
    assert message.WhichOneof("kind") == kind.value
    assert run_event_pb2.RunEvent.FromString(message.SerializeToString()) == message
    message.event_time.ToDatetime()


@given(TEXTS)
def test_text_is_kept_but_for_what_no_message_can_carry(text):
    cleaned = fields.text(text)
    cleaned.encode()
    assert "\0" not in cleaned
    if all(character != "\0" and not "\ud800" <= character <= "\udfff" for character in text):
        assert cleaned == text


def test_halves_of_one_character_are_joined_and_single_ones_replaced():
    assert fields.text("a\ud83d\ude00b\ud83dc\0") == "a😀b\ufffdc\ufffd"


@pytest.mark.parametrize("value", [None, 3, 1.5, True, [], {}])
def test_what_is_not_text_is_no_text(value):
    assert fields.text(value) == ""


@given(st.datetimes(timezones=st.just(UTC)))
def test_times_keep_their_microseconds(time):
    message = fields.timestamp(time)
    assert message is not None
    assert message.ToDatetime(UTC) == time


def test_a_time_of_another_zone_is_the_same_moment():
    zone = datetime.fromisoformat("2030-05-06T14:00:00.25+02:00")
    assert fields.timestamp(zone) == fields.timestamp(NOON)


@given(st.integers() | st.floats())
def test_milliseconds_become_a_valid_time_and_a_valid_duration(ms):
    time, duration = fields.timestamp_of_ms(ms), fields.duration_of_ms(ms)
    assert time is not None
    assert duration is not None
    time.ToJsonString()
    assert duration.ToTimedelta() >= timedelta() or duration.seconds > timedelta.max.total_seconds()


def test_milliseconds_are_exact_before_and_after_1970():
    for ms in (0, 1, -1, 1_700_000_000_123, -1_500):
        message = fields.timestamp_of_ms(ms)
        assert message is not None
        assert message.ToMilliseconds() == ms
        assert message.nanos >= 0


def test_a_run_has_all_its_fields():
    run = a_run(
        state=RunState.FAILED,
        state_reason="the step ask_model failed",
        start_time=NOON + timedelta(seconds=1),
        end_time=NOON + timedelta(seconds=2),
        deadline_time=NOON + timedelta(days=1),
        execution=2,
        progress=Progress("read", 1, 3),
        pending_approvals=1,
        labels={"team": "a"},
        context_id="case-7",
        parent_run_id="bar",
        failure=FAILURE,
        input_json='{"q":1}',
        output_json="null",
        usage=Usage(12, 5),
        caller="ann",
        forked_from_run_id="old",
        forked_from_step_id=4,
        input_bytes=7,
        output_bytes=4,
        queue="mail",
        priority=7,
    )
    message = convert.agent_run(run, full=True)
    assert message == agent_run_pb2.AgentRun(
        namespace="default",
        run_id="foo",
        agent="research",
        agent_version="1",
        input_sha256="ab" * 32,
        state=agent_run_pb2.AGENT_RUN_STATE_FAILED,
        state_reason="the step ask_model failed",
        create_time=fields.timestamp(NOON),
        start_time=fields.timestamp(run.start_time),
        end_time=fields.timestamp(run.end_time),
        deadline_time=fields.timestamp(run.deadline_time),
        execution=2,
        executor_id="host-1",
        progress=agent_run_pb2.RunProgress(message="read", completed=1, total=3),
        pending_approvals=1,
        input_json='{"q":1}',
        output_json="null",
        failure=FAILURE_MESSAGE,
        labels={"team": "a"},
        context_id="case-7",
        parent_run_id="bar",
        trace_id="0" * 31 + "1",
        last_sequence=3,
        usage=agent_run_pb2.RunUsage(input_tokens=12, output_tokens=5),
        caller="ann",
        forked_from_run_id="old",
        forked_from_step_id=4,
        input_bytes=7,
        output_bytes=4,
        queue="mail",
        priority=7,
    )
    filled = {field.name for field, _ in message.ListFields()}
    # Where it lives is known to whoever knows the cells; see test_forwarding.
    assert filled == {field.name for field in agent_run_pb2.AgentRun.DESCRIPTOR.fields} - {"home_region"}


def test_what_a_run_does_not_have_is_unset():
    message = convert.agent_run(a_run(), full=True)
    unset = ("start_time", "end_time", "deadline_time", "progress", "failure", "usage")
    assert not any(message.HasField(name) for name in unset)
    assert message.output_json == ""


def test_input_and_output_stay_out_of_the_basic_view():
    message = convert.agent_run(a_run(input_json="{}", output_json="1"), full=False)
    assert (message.input_json, message.output_json) == ("", "")


def test_a_step_has_all_its_fields():
    step = Step(3, "ask_model", StepState.FAILED, 4, 2, 1_000, 2_500, FAILURE.to_json(), "pre", "foo.3")
    assert convert.step(step) == agent_run_service_pb2.Step(
        step_id=3,
        step_name="ask_model",
        state=agent_run_service_pb2.STEP_STATE_FAILED,
        attempts=4,
        execution=2,
        start_time=fields.timestamp_of_ms(1_000),
        end_time=fields.timestamp_of_ms(2_500),
        error=FAILURE_MESSAGE,
        output_preview="pre",
        child_run_id="foo.3",
    )
    assert not convert.step(Step(3, "s", StepState.RUNNING, 1, 1, 1_000)).HasField("end_time")


def test_an_approval_has_all_its_fields():
    approval = an_approval(
        state=ApprovalState.APPROVED,
        on_timeout=TimeoutOutcome.FAIL_RUN,
        answer_schema_json="{}",
        deadline_time=NOON + timedelta(days=2),
        decided_by="ann",
        decide_time=NOON + timedelta(hours=1),
        comment="fine",
        answer_json="true",
        revision=2,
    )
    message = convert.approval(approval)
    filled = {field.name for field, _ in message.ListFields()}
    assert filled == {field.name for field in approval_pb2.Approval.DESCRIPTOR.fields}
    assert message.state == approval_pb2.APPROVAL_STATE_APPROVED
    assert message.on_timeout == approval_pb2.APPROVAL_TIMEOUT_OUTCOME_FAIL_RUN
    assert (message.approval_id, message.step_id, message.revision) == ("foo/3", 3, 2)
    assert list(message.assignees) == ["ann"]


def test_an_agent_has_its_schemas_as_json_in_their_own_order():
    spec = AgentSpec("research", "1", "Reads.", {"type": "object", "properties": {"b": {}, "a": {}}}, None, True)
    message = convert.agent(spec)
    assert list(json.loads(message.input_schema_json)["properties"]) == ["b", "a"]
    assert message.output_schema_json == ""
    assert (message.agent, message.agent_version, message.current) == ("research", "1", True)
    assert (message.max_steps, message.max_tokens) == (0, 0)
    with_output = AgentSpec("research", "1", "", {}, {"type": "string"}, False, Budget(20, 1_000))
    limited = convert.agent(with_output)
    assert (limited.max_steps, limited.max_tokens) == (20, 1_000)
    assert json.loads(convert.agent(with_output).output_schema_json) == {"type": "string"}


def test_a_batch_is_one_response():
    [response] = convert_events.watch_responses(a_batch(4, 5, snapshot=a_run(), caught_up=True), 10_000)
    assert [event.sequence for event in response.events] == [4, 5]
    assert (response.cursor, response.last_sequence) == (Cursor(KEY.workflow_id, 5).encode(), 5)
    assert response.snapshot.run_id == "foo"
    assert response.caught_up
    assert not response.end_of_run


def test_a_heartbeat_has_no_events_and_no_snapshot():
    [response] = convert_events.watch_responses(a_batch(last_sequence=9), 10_000)
    assert not response.events
    assert not response.HasField("snapshot")
    assert response.last_sequence == 9


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.integers(100, 600))
def test_large_batches_are_split_without_losing_order_and_each_piece_can_be_resumed(sizes, max_bytes):
    events = [an_event(n, message="x" * size) for n, size in enumerate(sizes, 1)]
    batch = a_batch(events=events, last_sequence=len(sizes) + 2, snapshot=a_run(), end_of_run=True)
    responses = list(convert_events.watch_responses(batch, max_bytes))
    assert [event.sequence for r in responses for event in r.events] == list(range(1, len(sizes) + 1))
    assert [r.HasField("snapshot") for r in responses] == [True] + [False] * (len(responses) - 1)
    for piece in responses[:-1]:
        cursor = Cursor.decode(piece.cursor, KEY.workflow_id, include_children=False)
        assert cursor.sequence == piece.last_sequence == piece.events[-1].sequence
        assert not piece.end_of_run
        assert sum(event.ByteSize() for event in piece.events) <= max_bytes or len(piece.events) == 1
    assert responses[-1].end_of_run
    last = len(sizes) + 2
    assert (responses[-1].cursor, responses[-1].last_sequence) == (Cursor(KEY.workflow_id, last).encode(), last)


def test_a_piece_of_a_childs_events_keeps_the_places_of_the_other_runs():
    child = RunKey("default", "foo.3", KEY.workflow_id + "-3")
    events = [an_event(n, message="x" * 200) for n in (1, 2, 3)]
    place = Cursor(KEY.workflow_id, 7, {child.workflow_id: 3, KEY.workflow_id + "-5": 9})
    responses = list(convert_events.watch_responses(a_batch(key=child, events=events, cursor=place), 400))
    assert len(responses) == 3
    assert [response.last_sequence for response in responses] == [7, 7, 7]
    cursors = [Cursor.decode(r.cursor, KEY.workflow_id, include_children=True) for r in responses]
    assert [cursor.children[child.workflow_id] for cursor in cursors] == [1, 2, 3]
    assert {cursor.children[KEY.workflow_id + "-5"] for cursor in cursors} == {9}
    assert {event.run_id for response in responses for event in response.events} == {"foo.3"}
