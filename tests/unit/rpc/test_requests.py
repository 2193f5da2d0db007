"""Requests become commands, or every bad field is named by its path."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from perdure.v1 import agent_run_pb2, approval_pb2, approval_service_pb2, run_event_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.domain.approvals import ApprovalState, Decision
from perdure_service.domain.events import EventKind
from perdure_service.domain.runs import RunState
from perdure_service.durable.service import DeleteCommand, ForkCommand, RunFilter, StartCommand
from perdure_service.errors import InvalidArgument, PayloadTooLarge
from perdure_service.rpc import approval_requests, json_values, requests
from perdure_service.rpc.validation import MAX_VIOLATIONS, Violations

from tests.unit.rpc.doubles import NOON

MAX_INPUT_BYTES = 1_000
MAX_SIGNAL_BYTES = 100


def start(**fields: Any) -> StartCommand:
    request = pb.StartAgentRequest(**{"agent": "research"} | fields)
    return requests.start_command(request, caller="ann", trace_parent="00-1", now=NOON, max_input_bytes=MAX_INPUT_BYTES)


def signal(**fields: Any) -> requests.Signal:
    request = pb.SignalRunRequest(**{"run_id": "foo", "name": "go", "request_id": "r"} | fields)
    return requests.signal_run(request, max_bytes=MAX_SIGNAL_BYTES)


def decide(**fields: Any) -> tuple[approval_requests.ApprovalLookup, Decision]:
    values = {"approval_id": "foo/3", "decision": approval_service_pb2.DECISION_APPROVE} | fields
    request = approval_service_pb2.DecideApprovalRequest(**values)
    return approval_requests.decide_approval(request, caller="ann", max_bytes=MAX_SIGNAL_BYTES)


def watch(**fields: Any) -> requests.Watch:
    return requests.watch_run(pb.WatchRunRequest(**{"run_id": "foo"} | fields))


def list_runs(**fields: Any) -> requests.RunPage:
    return requests.list_runs(pb.ListRunsRequest(**fields))


def fork(**fields: Any) -> ForkCommand:
    fields = {"run_id": "foo", "request_id": "r"} | fields
    return requests.fork_run(
        pb.ForkRunRequest(**fields), caller="ann", trace_parent="", now=NOON, max_input_bytes=MAX_INPUT_BYTES
    )


def delete(**fields: Any) -> DeleteCommand:
    return requests.delete_runs(pb.DeleteRunsRequest(**{"run_ids": ["foo"]} | fields), caller="ann")


def list_events(**fields: Any) -> requests.LogPage:
    return requests.list_log(pb.ListRunEventsRequest(**{"run_id": "foo"} | fields))


def get(**fields: Any) -> requests.RunLookup:
    return requests.get_run(pb.GetRunRequest(**fields))


def cancel(**fields: Any) -> requests.Cancel:
    return requests.cancel_run(pb.CancelRunRequest(**{"run_id": "foo"} | fields))


def list_approvals(**fields: Any) -> approval_requests.ApprovalPage:
    return approval_requests.list_approvals(approval_service_pb2.ListApprovalsRequest(**fields))


def watch_approvals(**fields: Any) -> approval_requests.InboxWatch:
    return approval_requests.watch_approvals(approval_service_pb2.WatchApprovalsRequest(**fields))


def at(**delta: float) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(NOON + timedelta(**delta))
    return message


def struct(value: dict[str, Any]) -> Struct:
    message = Struct()
    message.update(value)
    return message


def nested_list(depth: int) -> Value:
    value = inner = Value()
    for _ in range(depth):  # in place, as a copy passes through the decoder, which has a limit of its own
        inner = inner.list_value.values.add()
    inner.null_value = 0
    return value


BAD: list[tuple[Any, dict[str, Any], str]] = [
    # StartAgent
    (start, {"agent": ""}, "agent"),
    (start, {"agent": "a\0"}, "agent"),
    (start, {"agent": "a" * 129}, "agent"),
    (start, {"agent_version": "1\n"}, "agent_version"),
    (start, {"namespace": "a\x00b"}, "namespace"),
    (start, {"request_id": "x" * 129}, "request_id"),
    (start, {"request_id": "a\tb"}, "request_id"),
    (start, {"context_id": "x" * 129}, "context_id"),
    (start, {"context_id": "\0"}, "context_id"),
    (start, {"conflict_policy": 7}, "conflict_policy"),
    (start, {"labels": {str(n): "" for n in range(33)}}, "labels"),
    (start, {"labels": {"": "x"}}, 'labels[""]'),
    (start, {"labels": {"-a": "x"}}, "labels.-a"),
    (start, {"labels": {"a b": "x"}}, 'labels["a b"]'),
    (start, {"labels": {"é": "x"}}, 'labels["\\u00e9"]'),
    (start, {"labels": {"a\n": "x"}}, 'labels["a\\n"]'),
    (start, {"labels": {"a" * 64: "x"}}, f"labels.{'a' * 64}"),
    (start, {"labels": {"a": "x" * 257}}, "labels.a"),
    (start, {"labels": {"a": "x\0"}}, "labels.a"),
    (start, {"start_time": Timestamp(nanos=-1)}, "start_time"),
    (start, {"start_time": Timestamp(nanos=1_000_000_000)}, "start_time"),
    (start, {"start_time": Timestamp(seconds=253_402_300_800)}, "start_time"),
    (start, {"start_time": Timestamp(seconds=-62_135_596_801)}, "start_time"),
    (start, {"start_time": at(days=36_526)}, "start_time"),
    (start, {"delay": Duration(seconds=-1)}, "delay"),
    (start, {"delay": Duration(nanos=-1)}, "delay"),
    (start, {"delay": Duration(seconds=1, nanos=-1)}, "delay"),
    (start, {"delay": Duration(nanos=1_000_000_000)}, "delay"),
    (start, {"delay": Duration(seconds=315_576_000_001)}, "delay"),
    (start, {"delay": Duration(seconds=4_000_000_000)}, "delay"),
    (start, {"deadline_time": Timestamp(seconds=1, nanos=-5)}, "deadline_time"),
    (start, {"deadline_time": at(seconds=-1)}, "deadline_time"),
    (start, {"deadline_time": at()}, "deadline_time"),
    (start, {"deadline_time": at(seconds=5), "start_time": at(seconds=5)}, "deadline_time"),
    (start, {"deadline_time": at(days=36_526)}, "deadline_time"),
    # The input, as text
    (start, {"input_json": "{"}, "input_json"),
    (start, {"input_json": " "}, "input_json"),
    (start, {"input_json": "{} {}"}, "input_json"),
    (start, {"input_json": "{'a': 1}"}, "input_json"),
    (start, {"input_json": '{"a": "\0"}'}, "input_json"),
    (start, {"input_json": '{"a": ' + "1" * 5_000 + "}"}, None),
    (start, {"input_json": "[]"}, "input"),
    (start, {"input_json": "null"}, "input"),
    (start, {"input_json": '"x"'}, "input"),
    (start, {"input_json": '{"a":{"b":["x\\u0000"]}}'}, "input.a.b[0]"),
    (start, {"input_json": '{"a":[{"x\\u0000y":1}]}'}, 'input.a[0]["x\\u0000y"]'),
    (start, {"input_json": '{"a b":{"c":"\\u0000"}}'}, 'input["a b"].c'),
    (start, {"input_json": '{"a":"\\ud800"}'}, "input.a"),
    (start, {"input_json": '{"a":[1,{"b":1,"b":2}]}'}, "input.a[1].b"),
    (start, {"input_json": '{"b":1,"b":1}'}, "input.b"),
    (start, {"input_json": '{"a":[0,NaN]}'}, "input.a[1]"),
    (start, {"input_json": '{"a":Infinity}'}, "input.a"),
    (start, {"input_json": '{"a":-Infinity}'}, "input.a"),
    (start, {"input_json": '{"a":1e999}'}, "input.a"),
    (start, {"input_json": '{"a":' + "[" * 64 + "]" * 64 + "}"}, "input"),
    (start, {"input_json": "[" * 900 + "]"}, "input_json"),
    # The input, as a Struct
    (start, {"input": struct({"a": {"b": [1, "x\0"]}})}, "input.a.b[1]"),
    (start, {"input": struct({"a": {"b\0": 1}})}, 'input.a["b\\u0000"]'),
    (start, {"input": struct({"a": [math.nan]})}, "input.a[0]"),
    (start, {"input": struct({"a": math.inf})}, "input.a"),
    (start, {"input": Struct(fields={"a": Value()})}, "input.a"),
    # Lookups
    (get, {"run_id": ""}, "run_id"),
    (get, {"run_id": "a" * 513}, "run_id"),
    (get, {"run_id": "a\0b"}, "run_id"),
    (get, {"run_id": "a\x85"}, "run_id"),
    (get, {"run_id": "foo", "view": 3}, "view"),
    (get, {"run_id": "foo", "namespace": "\n"}, "namespace"),
    (cancel, {"run_id": ""}, "run_id"),
    (cancel, {"reason": "x" * 1_001}, "reason"),
    (cancel, {"reason": "x\0"}, "reason"),
    # Lists
    (list_runs, {"page_size": -1}, "page_size"),
    (list_runs, {"page_token": "x" * 32_769}, "page_token"),
    (list_runs, {"page_token": "x\0"}, "page_token"),
    (list_runs, {"states": [agent_run_pb2.AGENT_RUN_STATE_RUNNING, 77]}, "states[1]"),
    (list_runs, {"states": [agent_run_pb2.AGENT_RUN_STATE_UNSPECIFIED]}, "states[0]"),
    (list_runs, {"agent": "a\0"}, "agent"),
    (list_runs, {"labels": {"a": "\0"}}, "labels.a"),
    (list_runs, {"context_id": "c\0"}, "context_id"),
    (list_runs, {"parent_run_id": "x" * 513}, "parent_run_id"),
    (list_runs, {"from_create_time": Timestamp(nanos=-1)}, "from_create_time"),
    (
        list_runs,
        {"from_create_time": Timestamp(seconds=9), "until_create_time": Timestamp(seconds=9)},
        "until_create_time",
    ),
    # ForkRun
    (fork, {"run_id": ""}, "run_id"),
    (fork, {"request_id": ""}, "request_id"),
    (fork, {"from_step_id": -1}, "from_step_id"),
    (fork, {"agent_version": "1\0"}, "agent_version"),
    (fork, {"labels": {"": "b"}}, 'labels[""]'),
    (fork, {"deadline_time": Timestamp(seconds=1)}, "deadline_time"),
    (fork, {"namespace": "a\0"}, "namespace"),
    (fork, {"input_json": "[]"}, "input"),
    (fork, {"input_json": "{"}, "input_json"),
    # DeleteRuns
    (delete, {"run_ids": []}, ""),
    (delete, {"namespace": "a\0"}, "namespace"),
    (delete, {"run_ids": ["a"] * 1_001}, "run_ids"),
    (delete, {"run_ids": ["a", "\0"]}, "run_ids[1]"),
    (delete, {"context_id": "c"}, "run_ids"),
    (delete, {"run_ids": [], "states": [agent_run_pb2.AGENT_RUN_STATE_QUEUED]}, "states"),
    (delete, {"run_ids": [], "until_end_time": Timestamp(seconds=2**62)}, "until_end_time"),
    (delete, {"run_ids": [], "agent": "a\0"}, "agent"),
    (list_events, {"run_id": ""}, "run_id"),
    (list_events, {"page_size": -5}, "page_size"),
    (list_events, {"kinds": [run_event_pb2.RUN_EVENT_KIND_UNSPECIFIED]}, "kinds[0]"),
    # WatchRun
    (watch, {"run_id": ""}, "run_id"),
    (watch, {"after_sequence": -1}, "after_sequence"),
    (watch, {"cursor": "\0"}, "cursor"),
    (watch, {"kinds": [run_event_pb2.RUN_EVENT_KIND_LOG, 99]}, "kinds[1]"),
    (watch, {"heartbeat_interval": Duration(seconds=4, nanos=999_999_999)}, "heartbeat_interval"),
    (watch, {"heartbeat_interval": Duration(seconds=60, nanos=1)}, "heartbeat_interval"),
    (watch, {"heartbeat_interval": Duration()}, "heartbeat_interval"),
    (watch, {"heartbeat_interval": Duration(seconds=10, nanos=-1)}, "heartbeat_interval"),
    # SignalRun
    (signal, {"run_id": ""}, "run_id"),
    (signal, {"name": ""}, "name"),
    (signal, {"name": "a b"}, "name"),
    (signal, {"name": "go\n"}, "name"),
    (signal, {"name": "a" * 65}, "name"),
    (signal, {"request_id": ""}, "request_id"),
    (signal, {"request_id": "é" * 129}, "request_id"),
    (signal, {"payload": Value()}, "payload"),
    (signal, {"payload": Value(number_value=math.nan)}, "payload"),
    (signal, {"payload": Value(struct_value=struct({"a": ["\0"]}))}, "payload.a[0]"),
    (signal, {"payload_json": "nope"}, "payload_json"),
    (signal, {"payload_json": '["\\u0000"]'}, "payload[0]"),
    # Approvals
    (decide, {"approval_id": ""}, "approval_id"),
    (decide, {"approval_id": "a\0"}, "approval_id"),
    (decide, {"decision": approval_service_pb2.DECISION_UNSPECIFIED}, "decision"),
    (decide, {"decision": 9}, "decision"),
    (decide, {"expected_revision": -1}, "expected_revision"),
    (decide, {"comment": "x" * 4_001}, "comment"),
    (decide, {"comment": "\0"}, "comment"),
    (decide, {"answer": Value()}, "answer"),
    (decide, {"answer": Value(string_value="\0")}, "answer"),
    (list_approvals, {"states": [approval_pb2.APPROVAL_STATE_UNSPECIFIED]}, "states[0]"),
    (list_approvals, {"page_size": -1}, "page_size"),
    (list_approvals, {"run_id": "\0"}, "run_id"),
    (watch_approvals, {"heartbeat_interval": Duration(seconds=61)}, "heartbeat_interval"),
    (watch_approvals, {"namespace": "\0"}, "namespace"),
]


@pytest.mark.parametrize(("make", "request_fields", "path"), BAD)
def test_a_bad_field_is_refused_under_its_path(make, request_fields, path):
    expected = PayloadTooLarge if path is None else InvalidArgument
    with pytest.raises(expected) as refused:
        make(**request_fields)
    if path is not None:
        assert [field for field, _ in refused.value.violations] == [path]
        assert all(text for _, text in refused.value.violations)


def test_all_bad_fields_are_told_at_once():
    with pytest.raises(InvalidArgument) as refused:
        start(agent="", request_id="\n", labels={"-": "\0"}, delay=Duration(seconds=-1), conflict_policy=9)
    fields = [field for field, _ in refused.value.violations]
    assert fields == ["delay", "agent", "request_id", "conflict_policy", "labels.-", "labels.-"]


def test_one_error_has_at_most_twenty_violations():
    found = Violations()
    for n in range(30):
        found.add(f"field_{n}", "is wrong")
    with pytest.raises(InvalidArgument) as refused:
        found.raise_any()
    assert len(refused.value.violations) == MAX_VIOLATIONS


def test_a_start_has_all_its_fields():
    command = start(
        namespace="lab",
        agent_version="2",
        run_id="foo",
        request_id="r-1",
        input_json='{"n": 9007199254740993}',
        conflict_policy=pb.CONFLICT_POLICY_FAIL,
        start_time=at(seconds=5),
        deadline_time=at(days=1),
        labels={"team/a": "b", "Z.y-x_w": ""},
        context_id="case 7",
        validate_only=True,
    )
    assert command == StartCommand(
        namespace="lab",
        agent="research",
        agent_version="2",
        run_id="foo",
        request_id="r-1",
        run_input={"n": 9007199254740993},
        caller="ann",
        refuse_existing=True,
        start_at=NOON + timedelta(seconds=5),
        deadline_at=NOON + timedelta(days=1),
        labels={"team/a": "b", "Z.y-x_w": ""},
        context_id="case 7",
        validate_only=True,
        trace_parent="00-1",
    )


def test_an_empty_start_has_the_defaults():
    command = start()
    assert (command.namespace, command.run_input, command.labels) == ("default", {}, {})
    assert (command.start_at, command.delay_s, command.deadline_at) == (None, None, None)
    assert not command.refuse_existing
    assert start(input_json="").run_input == {}
    assert not start(conflict_policy=pb.CONFLICT_POLICY_USE_EXISTING).refuse_existing


def test_a_start_time_in_the_past_is_kept_as_a_repeated_start_has_one():
    assert start(start_time=at(days=-1)).start_at == NOON - timedelta(days=1)
    assert start(start_time=Timestamp(seconds=-62_135_596_800)).start_at == datetime(1, 1, 1, tzinfo=UTC)


def test_a_delay_is_in_seconds():
    assert start(delay=Duration(seconds=2, nanos=500_000_000)).delay_s == 2.5
    assert start(delay=Duration()).delay_s == 0


def test_the_limits_themselves_are_allowed():
    start(request_id="x" * 128, context_id="x" * 128, labels={"a" * 63: "x" * 256})
    start(labels={str(n): "" for n in range(32)})
    start(input_json='{"a":' + "[" * 63 + "]" * 63 + "}")
    signal(payload=nested_list(40))
    assert get(run_id="a" * 512).run_id == "a" * 512
    assert watch(heartbeat_interval=Duration(seconds=5)).heartbeat_s == 5
    assert watch(heartbeat_interval=Duration(seconds=60)).heartbeat_s == 60


@pytest.mark.parametrize("run_id", ["foo", "foo.5", "foo.5.2", "A workflow's own id/✓", "x--y_Z"])
def test_any_id_that_may_exist_can_be_looked_up(run_id):
    assert get(run_id=run_id) == requests.RunLookup("default", run_id, False)


def test_the_view_says_whether_input_and_output_are_wanted():
    assert not get(run_id="foo", view=agent_run_pb2.AGENT_RUN_VIEW_BASIC).full
    assert get(run_id="foo", view=agent_run_pb2.AGENT_RUN_VIEW_FULL).full


@pytest.mark.parametrize(("asked", "given_size"), [(0, 50), (1, 1), (1_000, 1_000), (1_001, 1_000), (2**31 - 1, 1_000)])
def test_page_sizes_are_bounded(asked, given_size):
    assert list_runs(page_size=asked).page_size == given_size
    assert list_approvals(page_size=asked).page_size == given_size
    assert list_events(page_size=asked).page_size == given_size


def test_a_list_of_runs_has_all_its_filters():
    page = list_runs(
        namespace="lab",
        page_token="t",
        states=[agent_run_pb2.AGENT_RUN_STATE_RUNNING, agent_run_pb2.AGENT_RUN_STATE_FAILED],
        agent="research",
        labels={"a": "b"},
        context_id="c",
        parent_run_id="foo",
        from_create_time=Timestamp(seconds=5),
        until_create_time=Timestamp(seconds=6, nanos=7_000),
    )
    wanted = RunFilter(
        frozenset({RunState.RUNNING, RunState.FAILED}),
        "research",
        {"a": "b"},
        "c",
        "foo",
        datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC),
        datetime(1970, 1, 1, 0, 0, 6, 7, tzinfo=UTC),
    )
    assert page == requests.RunPage("lab", wanted, 50, "t")


def test_a_fork_has_what_was_asked_for_and_leaves_open_what_was_not():
    assert fork() == ForkCommand("default", "foo", "r", "ann", labels={})
    full = fork(
        namespace="lab", new_run_id="bar", from_step_id=4, agent_version="2", input_json='{"n": 9007199254740993}',
        deadline_time=Timestamp(seconds=int(NOON.timestamp()) + 60), labels={"a": "b"}, validate_only=True,
    )  # fmt: skip
    wanted = ForkCommand(
        "lab", "foo", "r", "ann", "bar", 4, "2", {"n": 9007199254740993}, {"a": "b"},
        NOON.replace(microsecond=0) + timedelta(seconds=60), True,
    )  # fmt: skip
    assert full == wanted
    struct = Struct()
    assert fork(input=struct).run_input == {}, "an empty object is an input"
    assert fork(input_json="").run_input is None


def test_a_deletion_has_ids_or_conditions():
    assert delete(run_ids=["b", "a", "b"], validate_only=True) == DeleteCommand(
        "default", "ann", ("b", "a"), RunFilter(), True
    )
    states = [agent_run_pb2.AGENT_RUN_STATE_FAILED]
    found = delete(run_ids=[], states=states, labels={"a": "b"}, until_end_time=Timestamp(seconds=5))
    wanted = RunFilter(
        frozenset({RunState.FAILED}), labels={"a": "b"}, until_end_time=datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC)
    )
    assert found == DeleteCommand("default", "ann", (), wanted)


def test_a_log_may_be_limited_to_kinds():
    page = list_events(kinds=[run_event_pb2.RUN_EVENT_KIND_LOG, run_event_pb2.RUN_EVENT_KIND_STATE_CHANGED])
    assert page.kinds == {EventKind.LOG, EventKind.STATE_CHANGED}
    assert requests.list_log(pb.ListStepsRequest(run_id="foo")).kinds == frozenset()


def test_a_watch_begins_where_it_is_told_to():
    assert watch() == requests.Watch("default", "foo")
    assert watch(cursor="c").cursor == "c"
    assert watch(cursor="").cursor is None
    assert watch(after_sequence=0).after_sequence == 0
    assert watch(from_now=True).from_now
    assert not watch(from_now=False).from_now
    assert watch(kinds=[run_event_pb2.RUN_EVENT_KIND_PROGRESS]).kinds == {EventKind.PROGRESS}
    assert watch(include_children=True, cursor="c").include_children


@pytest.mark.parametrize("sequence", [0, 3])
def test_a_sequence_is_no_place_in_a_watch_with_children(sequence):
    with pytest.raises(InvalidArgument) as refusal:
        watch(include_children=True, after_sequence=sequence)
    assert [field for field, _ in refusal.value.violations] == ["after_sequence"]


def test_a_signal_has_a_payload_of_any_json_value():
    assert signal().payload == {}
    assert signal(payload_json="").payload == {}
    assert signal(payload_json="[1, 2.0, null]").payload == [1, 2.0, None]
    assert signal(payload=Value(null_value=0)).payload is None
    assert signal(payload=Value(number_value=3)).payload == 3
    assert signal(payload=Value(string_value="x")).payload == "x"


def test_a_decision_has_its_answer_as_canonical_json():
    lookup, decision = decide(
        comment="fine", expected_revision=4, answer=Value(struct_value=struct({"b": 1, "a": "é"}))
    )
    assert lookup == approval_requests.ApprovalLookup("default", "foo/3")
    assert decision == Decision(True, "ann", "fine", '{"a":"\\u00e9","b":1}', 4)
    assert decide()[1].answer_json == ""
    assert decide(answer=Value(null_value=0))[1].answer_json == "null"
    assert not decide(decision=approval_service_pb2.DECISION_REJECT)[1].approve


def test_approvals_are_listed_by_state_and_run():
    page = list_approvals(states=[approval_pb2.APPROVAL_STATE_EXPIRED], run_id="foo", page_token="t")
    assert page == approval_requests.ApprovalPage("default", frozenset({ApprovalState.EXPIRED}), "foo", 50, "t")
    assert watch_approvals(namespace="lab") == approval_requests.InboxWatch("lab", 15.0)


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: start(input_json=json.dumps({"a": "x" * MAX_INPUT_BYTES})), "input"),
        (lambda: start(input_json="{}" + " " * MAX_INPUT_BYTES), "input"),
        (lambda: start(input_json=json.dumps({"a": "é" * 300}, ensure_ascii=False)), "input"),
        (lambda: start(input=struct({"a": "x" * MAX_INPUT_BYTES})), "input"),
        (lambda: signal(payload_json='"' + "x" * MAX_SIGNAL_BYTES + '"'), "payload"),
        (lambda: signal(payload=Value(string_value="x" * MAX_SIGNAL_BYTES)), "payload"),
        (lambda: decide(answer=Value(string_value="x" * MAX_SIGNAL_BYTES)), "answer"),
    ],
)
def test_what_is_too_large_is_told_with_the_limit(make, path):
    with pytest.raises(PayloadTooLarge) as refused:
        make()
    limit = MAX_INPUT_BYTES if path == "input" else MAX_SIGNAL_BYTES
    assert refused.value.metadata == {"field": path, "limit_bytes": str(limit)}


@pytest.mark.parametrize("depth", [65, 500, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_refused_without_running_out_of_stack(depth, opening, closing):
    text = opening * depth + ("" if opening == "[" else "1") + closing * depth
    with pytest.raises(InvalidArgument) as refused:
        json_values.read_text(text, field="input_json", root="input", max_bytes=10**7)
    assert refused.value.violations == (("input", "is nested deeper than 64"),)


def test_a_deep_struct_is_refused_as_deep_text_is():
    read = json_values.read_value
    assert read(nested_list(64), root="payload", max_bytes=10**4)
    for depth in (65, 90):
        with pytest.raises(InvalidArgument, match="payload: is nested deeper than 64"):
            read(nested_list(depth), root="payload", max_bytes=10**4)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (3.0, 3),
        (-0.0, 0),
        (2.0**53, 2**53),
        (-(2.0**53), -(2**53)),
        (2.0**53 + 2, 2.0**53 + 2),
        (1.5, 1.5),
        (1e300, 1e300),
    ],
)
def test_numbers_of_a_struct_are_integers_where_they_are_exact(number, expected):
    value = start(input=struct({"n": number})).run_input["n"]
    assert value == expected
    assert type(value) is type(expected)


PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text("ab é\n\x01😀", max_size=5)
VALUES = st.recursive(
    PLAIN | st.floats(allow_nan=False, allow_infinity=False).filter(lambda n: not n.is_integer()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab é", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", max_size=3), VALUES, max_size=3))
def test_an_input_is_the_same_as_text_and_as_a_struct(value):
    of_text = json_values.read_text(json.dumps(value), field="input_json", root="input", max_bytes=10**6)
    of_struct = json_values.read_struct(json_format.ParseDict(value, Struct()), root="input", max_bytes=10**6)
    assert of_text == value == of_struct
    assert json.dumps(of_text, sort_keys=True) == json.dumps(of_struct, sort_keys=True)


@given(st.text('{}[]",:01eE.- \\u0aNIn\x00\ud800', max_size=30))
def test_any_text_is_json_for_us_only_if_it_is_for_python_too_and_is_never_a_crash(text):
    try:
        value = json_values.read_text(text.encode("utf-8", "replace").decode(), field="f", root="r", max_bytes=10_000)
    except InvalidArgument:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value
