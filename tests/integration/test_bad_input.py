"""What is wrong with a request is told by field, and nothing of it is written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from perdure.v1 import agent_catalog_service_pb2 as catalog_pb
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure_service.domain import tokens

from tests.helpers.rpc import Refusal, Rpc, duration, in_seconds, new_id, refused
from tests.helpers.server import ServerProcess, sql

TABLES = ("perdure.run", "perdure.run_event", "perdure.approval", "dbos.workflow_status", "dbos.notifications")
WEIRD_IDS = [
    "x" * 512,
    "a.b",
    "a.1.2.3",
    "..",
    "a/b",
    "a%00b",
    "ä",
    "🙂",
    "'; DROP TABLE perdure.run; --",
    "A",
    " ",
    "-",
    "0",
]


def rows(database_url: str) -> dict[str, int]:
    with sql(database_url) as connection:
        return {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # type: ignore[index]
            for table in TABLES
        }


@pytest.fixture(scope="module")
def known(rpc: Rpc) -> str:
    """A run that exists."""
    run_id = rpc.start("counter", {"steps": 1})
    rpc.end_of(run_id)
    return run_id


@pytest.fixture
def nothing_is_written(known: str, database_url: str) -> Iterator[None]:
    before = rows(database_url)
    yield
    assert rows(database_url) == before


pytestmark = pytest.mark.usefixtures("nothing_is_written")


def start(rpc: Rpc, **fields: Any) -> None:
    """Asks StartAgent; what it refuses, StartAgents must refuse in the same words, and go on."""
    fields.setdefault("agent", "counter")
    request = pb.StartAgentRequest(**fields)
    try:
        rpc.runs.StartAgent(request)
    except grpc.RpcError as error:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        if details is not None:
            item = pb.StartAgentsRequest(start=request)
            answers = list(rpc.runs.StartAgents(iter([item, item])))
            assert [answer.error.SerializeToString(deterministic=True) for answer in answers] == [details] * 2
        raise


# ---- StartAgent ------------------------------------------------------------------------------------------------------


def test_an_unknown_agent_is_not_found(rpc: Rpc) -> None:
    with refused("NOT_FOUND", "AGENT_NOT_FOUND"):
        start(rpc, agent="nobody")
    with refused("NOT_FOUND", "AGENT_NOT_FOUND"):
        start(rpc, agent_version="99")
    with refused("NOT_FOUND", "AGENT_NOT_FOUND"):
        rpc.agents.GetAgent(catalog_pb.GetAgentRequest(agent="nobody"))


def test_an_agent_is_required(rpc: Rpc) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "agent"):
        start(rpc, agent="")


@pytest.mark.parametrize("namespace", ["other", "Default", "a.b", "x" * 33, "ä", "default."])
def test_an_unknown_namespace_is_not_found_everywhere(rpc: Rpc, known: str, namespace: str) -> None:
    calls = [
        lambda: start(rpc, namespace=namespace, run_id=new_id()),
        lambda: rpc.runs.GetRun(pb.GetRunRequest(namespace=namespace, run_id=known)),
        lambda: rpc.runs.ListRuns(pb.ListRunsRequest(namespace=namespace)),
        lambda: list(rpc.runs.WatchRun(pb.WatchRunRequest(namespace=namespace, run_id=known))),
        lambda: rpc.runs.WaitRun(pb.WaitRunRequest(namespace=namespace, run_id=known)),
        lambda: rpc.runs.ListRunEvents(pb.ListRunEventsRequest(namespace=namespace, run_id=known)),
        lambda: rpc.runs.ListSteps(pb.ListStepsRequest(namespace=namespace, run_id=known)),
        lambda: rpc.runs.SignalRun(pb.SignalRunRequest(namespace=namespace, run_id=known, name="a", request_id="r")),
        lambda: rpc.runs.CancelRun(pb.CancelRunRequest(namespace=namespace, run_id=known)),
        lambda: rpc.runs.ForkRun(pb.ForkRunRequest(namespace=namespace, run_id=known, request_id="r")),
        lambda: rpc.runs.DeleteRuns(pb.DeleteRunsRequest(namespace=namespace, run_ids=[known])),
        lambda: rpc.approvals.ListApprovals(approval_pb.ListApprovalsRequest(namespace=namespace)),
        lambda: rpc.approvals.GetApproval(approval_pb.GetApprovalRequest(namespace=namespace, approval_id="a/1")),
        lambda: rpc.approvals.DecideApproval(
            approval_pb.DecideApprovalRequest(namespace=namespace, approval_id="a/1", decision=1)
        ),
        lambda: list(rpc.approvals.WatchApprovals(approval_pb.WatchApprovalsRequest(namespace=namespace))),
    ]
    for call in calls:
        with refused("NOT_FOUND", "NAMESPACE_NOT_FOUND"):
            call()


@pytest.mark.parametrize(
    "run_id", ["A", "a b", "-a", "a.b", "a.1", "a_b", "ä", "x" * 65, "x" * 100_000, "a/b", " ", "a\x00", "a\n"]
)
def test_a_malformed_id_of_a_new_run_is_refused(rpc: Rpc, run_id: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "run_id"):
        start(rpc, run_id=run_id)


@pytest.mark.parametrize(
    ("agent", "text", "path"),
    [
        ("counter", '{"steps": "three"}', "input.steps"),
        ("counter", '{"steps": 1.5}', "input.steps"),
        ("counter", '{"steps": null}', "input.steps"),
        ("counter", '{"text": 3}', "input.text"),
        ("asker", '{"on_timeout": "PANIC"}', "input.on_timeout"),
        ("asker", '{"answer_schema": [1]}', "input.answer_schema"),
        ("plain", "{}", "input"),
        ("plain", '{"name": "x", "count": []}', "input.count"),
    ],
)
def test_an_input_that_violates_the_schema_is_refused_by_path(rpc: Rpc, agent: str, text: str, path: str) -> None:
    with refused("INVALID_ARGUMENT", "INPUT_SCHEMA_VIOLATION") as error:
        start(rpc, agent=agent, input_json=text)
    assert any(field == path or field.startswith(path + ".") for field in error.fields), error.fields


def test_every_violation_is_told_at_once(rpc: Rpc) -> None:
    with refused("INVALID_ARGUMENT", "INPUT_SCHEMA_VIOLATION") as error:
        start(rpc, input_json='{"steps": "three", "text": 3, "delay_s": []}')
    assert {"input.steps", "input.text", "input.delay_s"} <= set(error.fields)


def test_a_surplus_argument_of_a_plain_workflow_is_refused(rpc: Rpc) -> None:
    with refused("INVALID_ARGUMENT", "INPUT_SCHEMA_VIOLATION"):
        start(rpc, agent="plain", input_json='{"name": "x", "surplus": 1}')


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "null", "1", '"text"', "{'a': 1}", '{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}', "{} {}",
        '{"text": "a\\u0000b"}', '{"text": "\\ud800"}', '{"a\\u0000": 1}', '{"a":' * 100 + "1" + "}" * 100,
        "[" * 100_000, '{"a": 1e999}', "\x00", "\ufeff{}", '{"steps": ' + "9" * 5_000 + "}",
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_input_that_is_not_a_good_json_object_is_refused(rpc: Rpc, text: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as error:
        start(rpc, input_json=text)
    assert error.fields[0].startswith("input"), error.fields


@pytest.mark.parametrize("content", [{"text": "a\x00b"}, {"a\x00b": 1}, {"a": {"b": ["\x00"]}}], ids=repr)
def test_nul_in_a_struct_is_refused(rpc: Rpc, content: dict[str, Any]) -> None:
    struct = Struct()
    struct.update(content)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as error:
        start(rpc, input=struct)
    assert error.fields[0].startswith("input"), error.fields


def test_numbers_that_are_not_finite_are_refused_in_a_struct(rpc: Rpc) -> None:
    for number in (float("nan"), float("inf")):
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", "input.delay_s"):
            start(rpc, input=Struct(fields={"delay_s": Value(number_value=number)}))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "input.delay_s"):
        start(rpc, input=Struct(fields={"delay_s": Value()}))


def test_an_input_that_is_too_large_is_refused(rpc: Rpc) -> None:
    text = json.dumps({"text": "x" * 2**20})
    with refused("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE") as error:
        start(rpc, input_json=text)
    assert error.metadata["field"] == "input"
    assert error.retry_delay_s is None
    struct = Struct()
    struct.update({"text": "x" * 2**20})
    with refused("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE"):
        start(rpc, input=struct)


def test_a_message_that_is_too_large_is_refused_and_the_connection_lives(rpc: Rpc, known: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        start(rpc, input_json="x" * (9 * 2**20))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rpc.get(known).run_id == known


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\x00"}, "request_id"),
        ({"context_id": "x" * 129}, "context_id"),
        ({"context_id": "a\x00b"}, "context_id"),
        ({"agent_version": "\x00"}, "agent_version"),
        ({"agent": "a\x00"}, "agent"),
        ({"namespace": "a\x00"}, "namespace"),
        ({"conflict_policy": 99}, "conflict_policy"),
        ({"labels": {f"key-{number}": "" for number in range(33)}}, "labels"),
        ({"labels": {"": "x"}}, None),
        ({"labels": {"x" * 64: "x"}}, None),
        ({"labels": {"team": "x" * 257}}, "labels.team"),
        ({"labels": {"team": "a\x00b"}}, "labels.team"),
        ({"delay": duration(-1)}, "delay"),
        ({"deadline_time": in_seconds(-1)}, "deadline_time"),
        ({"deadline_time": Timestamp(seconds=2**62)}, "deadline_time"),
        ({"deadline_time": Timestamp(nanos=-1)}, "deadline_time"),
        ({"start_time": Timestamp(seconds=253_402_300_799)}, "start_time"),
        ({"start_time": in_seconds(60), "deadline_time": in_seconds(30)}, "deadline_time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_out_of_bounds_is_refused_by_its_path(rpc: Rpc, fields: dict[str, Any], path: str | None) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", path) as error:
        start(rpc, run_id=new_id(), **fields)
    assert path is not None or error.fields[0].startswith("labels")


def test_several_wrong_fields_are_told_at_once(rpc: Rpc) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "agent") as error:
        start(rpc, agent="", request_id="x" * 200, deadline_time=in_seconds(-1))
    assert {"request_id", "deadline_time"} <= set(error.fields)


def test_a_thousand_wrong_fields_still_make_an_error_that_arrives(rpc: Rpc) -> None:
    labels = {f"ä{number}" + "x" * 200: "\x00" * 300 for number in range(1000)}
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as error:
        start(rpc, labels=labels)
    assert len(error.fields) >= 1


# ---- look-ups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", WEIRD_IDS, ids=lambda text: repr(text[:20]))
def test_a_run_of_a_weird_id_is_not_found(rpc: Rpc, run_id: str) -> None:
    calls = [
        lambda: rpc.get(run_id),
        lambda: rpc.stream(run_id),
        lambda: rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run_id)),
        lambda: rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id)),
        lambda: rpc.runs.ListSteps(pb.ListStepsRequest(run_id=run_id)),
        lambda: rpc.signal(run_id),
        lambda: rpc.cancel(run_id),
    ]
    for call in calls:
        with refused("NOT_FOUND", "RUN_NOT_FOUND"):
            call()


@pytest.mark.parametrize("run_id", ["", "a\x00b", "a\nb", "x" * 513, "x" * 1_000_000], ids=lambda text: repr(text[:20]))
def test_an_id_that_no_run_can_have_is_refused(rpc: Rpc, run_id: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "run_id"):
        rpc.get(run_id)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "run_id"):
        rpc.stream(run_id)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "run_id"):
        rpc.signal(run_id)


def test_the_engines_own_id_of_a_run_is_not_another_name_for_it(rpc: Rpc, known: str) -> None:
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        rpc.get(f"default.{known}.r")


@pytest.mark.parametrize("approval_id", [*WEIRD_IDS, "a/1", "a/-1", "a/99999999999999999999", "/", "a/1/2"], ids=repr)
def test_an_approval_of_a_weird_id_is_not_found(rpc: Rpc, approval_id: str) -> None:
    with refused("NOT_FOUND", "APPROVAL_NOT_FOUND"):
        rpc.approvals.GetApproval(approval_pb.GetApprovalRequest(approval_id=approval_id))
    with refused("NOT_FOUND", "APPROVAL_NOT_FOUND"):
        rpc.decide(approval_id)


@pytest.mark.parametrize("field", ["comment", "approval_id"])
def test_nul_in_a_decision_is_refused(rpc: Rpc, field: str) -> None:
    fields = {"approval_id": "a/1", "decision": approval_pb.DECISION_APPROVE, field: "a\x00b"}
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", field):
        rpc.approvals.DecideApproval(approval_pb.DecideApprovalRequest(**fields))


def test_nul_in_an_answer_a_payload_or_a_reason_is_refused(rpc: Rpc, known: str) -> None:
    nul = ParseDict({"a": ["\x00"]}, Value())
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "answer.a[0]"):
        rpc.decide("a/1", answer=nul)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "payload.a[0]"):
        rpc.runs.SignalRun(pb.SignalRunRequest(run_id=known, name="a", request_id="r", payload=nul))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD"):
        rpc.signal(known, "a\x00")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "reason"):
        rpc.cancel(known, "a\x00")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "reason"):
        rpc.cancel(known, "x" * 1001)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "comment"):
        rpc.decide("a/1", comment="x" * 4001)


def test_a_signal_that_is_too_large_is_refused(rpc: Rpc, known: str) -> None:
    with refused("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE"):
        rpc.signal(known, "x" * 2**17)


# ---- pages -----------------------------------------------------------------------------------------------------------


def pages(rpc: Rpc, known: str) -> dict[str, Any]:
    return {
        "ListRuns": lambda **fields: rpc.runs.ListRuns(pb.ListRunsRequest(**fields)),
        "ListRunEvents": lambda **fields: rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=known, **fields)),
        "ListSteps": lambda **fields: rpc.runs.ListSteps(pb.ListStepsRequest(run_id=known, **fields)),
        "ListApprovals": lambda **fields: rpc.approvals.ListApprovals(approval_pb.ListApprovalsRequest(**fields)),
        "ListAgents": lambda **fields: rpc.agents.ListAgents(catalog_pb.ListAgentsRequest(**fields)),
    }


LISTS = ["ListRuns", "ListRunEvents", "ListSteps", "ListApprovals", "ListAgents"]
BAD_TOKENS = [
    "nonsense", "e30", "bnVsbA", "W10", "WzFd", "ä", "\x00", "x" * 5000, "WyJ4Il0", "W1tbW1tbW10",
    "W1siYSJdLCBbMSwgMiwgM11d", "W1tbW1tbW1tb" * 300, "eyJrIjogMX0",
]  # fmt: skip
BAD_POSITIONS = [None, True, -1, 2**31, 2**64, 10**400, 1.5, "", "x", "a\x00b", "\ud800", "infinity", [], {}]


@pytest.mark.parametrize("name", LISTS)
def test_a_negative_page_size_is_refused(rpc: Rpc, known: str, name: str) -> None:
    for size in (-1, -(2**31)):
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", "page_size"):
            pages(rpc, known)[name](page_size=size)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("token", BAD_TOKENS, ids=lambda text: repr(text[:16]))
def test_what_is_not_a_page_token_is_refused(rpc: Rpc, known: str, name: str, token: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "page_token"):
        pages(rpc, known)[name](page_token=token)


@pytest.mark.parametrize("name", LISTS)
def test_a_made_up_position_is_no_error_of_the_server(rpc: Rpc, known: str, name: str) -> None:
    """Tokens are not signed: a caller can change the position in one, and gets a page of the same list or is told."""
    workflow_id, at = f"default.{known}.r", "2026-01-01T00:00:00+00:00"
    position, made_for = {
        "ListRuns": ([at, workflow_id], ["default", {}]),
        "ListRunEvents": ([1], ["events", workflow_id, []]),
        "ListSteps": ([1], ["steps", workflow_id]),
        "ListApprovals": ([at, workflow_id, 1], ["approvals", "default", ["PENDING"], ""]),
        "ListAgents": (["counter", "1"], "agents"),
    }[name]

    def ask(forged: list[Any]) -> Any:
        return pages(rpc, known)[name](page_token=tokens.encode([1, forged, made_for]))

    ask(position)
    for index, value in itertools.product(range(len(position)), BAD_POSITIONS):
        told = ("page_token",)
        try:
            ask([*position[:index], value, *position[index + 1 :]])
        except grpc.RpcError as error:
            told = Refusal.of(error).fields
        assert told == ("page_token",), (index, value)
    for forged in ([], [*position, 1], [None] * len(position)):
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", "page_token"):
            ask(forged)


@pytest.mark.parametrize("name", LISTS)
def test_a_page_token_of_another_list_is_refused(rpc: Rpc, known: str, name: str) -> None:
    tokens = {}
    for other in ("ListRunEvents", "ListAgents"):
        tokens[other] = pages(rpc, known)[other](page_size=1).next_page_token
        assert tokens[other]
    for other, token in tokens.items():
        if other != name:
            with refused("INVALID_ARGUMENT", "INVALID_FIELD", "page_token"):
                pages(rpc, known)[name](page_token=token)


def test_a_page_token_with_another_filter_is_refused(rpc: Rpc, known: str) -> None:
    token = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=known, page_size=1)).next_page_token
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "page_token"):
        rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=known, page_token=token, kinds=[1]))


def test_unknown_enum_numbers_are_refused(rpc: Rpc, known: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "states[0]"):
        rpc.runs.ListRuns(pb.ListRunsRequest(states=[99]))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "states[1]"):
        rpc.approvals.ListApprovals(approval_pb.ListApprovalsRequest(states=[1, 0]))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "kinds[0]"):
        rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=known, kinds=[99]))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "view"):
        rpc.runs.GetRun(pb.GetRunRequest(run_id=known, view=99))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "decision"):
        rpc.approvals.DecideApproval(approval_pb.DecideApprovalRequest(approval_id="a/1", decision=99))


# ---- what is not a request at all ------------------------------------------------------------------------------------


def test_bytes_that_are_not_a_message_are_refused_without_a_word_of_python(rpc: Rpc) -> None:
    for method in ("GetRun", "StartAgent"):
        call = rpc.channel.unary_unary(f"/perdure.v1.AgentRunService/{method}")
        with refused("INVALID_ARGUMENT", "INVALID_FIELD") as error:
            call(b"\xff\xff\xff")
        assert "Error" not in error.text
        assert "google" not in error.text
    stream = rpc.channel.unary_stream("/perdure.v1.AgentRunService/WatchRun")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD"):
        list(stream(b"\xff\xff\xff"))


def test_a_method_that_nobody_serves_is_unimplemented(rpc: Rpc) -> None:
    for path in ("/perdure.v1.AgentRunService/Nothing", "/perdure.v1.Nothing/GetRun", "/nothing/at/all"):
        with pytest.raises(grpc.RpcError) as raised:
            rpc.channel.unary_unary(path)(b"")
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_stray_exception_is_told_by_an_id_alone(
    rpc: Rpc, server: ServerProcess, database_url: str, known: str
) -> None:
    with sql(database_url) as connection:
        saved = connection.execute(
            "UPDATE perdure.run_event SET events = 'secret-text' || events "
            "WHERE workflow_id = %s AND first_sequence = 1 RETURNING 1",
            (f"default.{known}.r",),
        ).fetchall()
    assert saved
    try:
        for call in (
            lambda: rpc.stream(known),
            lambda: rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=known)),
            lambda: rpc.runs.ListSteps(pb.ListStepsRequest(run_id=known)),
        ):
            with refused("INTERNAL", "INTERNAL") as error:
                call()
            assert error.text == "internal error; report this error id"
            assert set(error.metadata) == {"error_id"}
            assert error.metadata["error_id"] in server.log
            assert "JSON" not in str(error.refusal)
    finally:
        with sql(database_url) as connection:
            connection.execute(
                "UPDATE perdure.run_event SET events = substr(events, 12) "
                "WHERE workflow_id = %s AND first_sequence = 1",
                (f"default.{known}.r",),
            )
    assert isinstance(error.refusal, Refusal)
    assert rpc.events(known)
