"""Values that no message, database or decision should take are refused by name, and leave every table as it was."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from typing import Any

import grpc
import perdure.v1
import perdure_client
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb

from tests.helpers.mutations import rpcs
from tests.helpers.rpc import Refusal, Rpc, approval_state, new_id, refusal_of, refused
from tests.helpers.server import ServerProcess, sql

TABLES = (
    "perdure.run", "perdure.run_event", "perdure.approval", "dbos.workflow_status", "dbos.workflow_input",
    "dbos.workflow_output", "dbos.operation_outputs", "dbos.notifications",
)  # fmt: skip
NOT_UTF8 = b"a\xc3\x28"
RPCS = rpcs(
    *(
        importlib.import_module(f"perdure.v1.{module.name}")
        for module in pkgutil.iter_modules(perdure.v1.__path__)
        if module.name.endswith("_service_pb2")
    )
)


def contents(database_url: str) -> dict[str, Any]:
    """Returns how many rows each table has, and a digest of them."""
    with sql(database_url) as connection:
        return {
            table: connection.execute(
                f"SELECT count(*), md5(coalesce(string_agg(t::TEXT, '|' ORDER BY t::TEXT), '')) FROM {table} AS t"
            ).fetchone()
            for table in TABLES
        }


@pytest.fixture(scope="module")
def ids(rpc: Rpc) -> dict[str, str]:
    """Runs and approvals that rest: `done` has ended, `waiting` waits for a signal, `asking` and `other` for people."""
    runs = {"done": rpc.start("counter", {"steps": 1}), "waiting": rpc.start("listener")}
    rpc.end_of(runs["done"])
    for name, more in (("asking", {}), ("other", {}), ("late", {"timeout_s": 0.05})):
        run_id = rpc.start("asker", more)
        runs[name] = run_id
        runs[f"approval of {name}"] = rpc.approval_of(run_id, "PENDING", "EXPIRED").approval_id
    rpc.output_of(runs["late"])
    rpc.until(runs["waiting"], "AWAITING_INPUT")
    for name in ("asking", "other"):
        rpc.until(runs[name], "AWAITING_INPUT")
    return runs


@pytest.fixture
def unchanged(ids: dict[str, str], database_url: str) -> Iterator[None]:
    """Compares all tables before and after."""
    before = contents(database_url)
    yield
    assert contents(database_url) == before


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
def test_ten_megabytes_of_input_are_too_large_for_every_client(rpc: Rpc, server: ServerProcess) -> None:
    text = "x" * (10 * 2**20)
    with pytest.raises(grpc.RpcError) as raised:
        rpc.start("counter", {"text": text})
    refusal = Refusal.of(raised.value)
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refusal.text
    with (
        perdure_client.Client(server.address) as client,
        pytest.raises(perdure_client.PayloadTooLarge) as too_large,
    ):
        client.start("counter", {"text": text})
    assert too_large.value.metadata == {"field": "request", "limit_bytes": str(8 * 2**20)}
    assert "send a reference" in str(too_large.value)


@pytest.mark.usefixtures("unchanged")
def test_input_below_the_limit_of_a_message_is_measured_by_its_own(rpc: Rpc) -> None:
    for size in (2**20, 7 * 2**20):
        with refused("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE") as error:
            rpc.start("counter", {"text": "x" * size})
        assert error.metadata == {"field": "input", "limit_bytes": str(2**20)}


@pytest.mark.usefixtures("unchanged")
def test_an_answer_that_is_too_large_is_refused(rpc: Rpc, ids: dict[str, str]) -> None:
    with refused("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE") as error:
        rpc.decide(ids["approval of asking"], answer=Value(string_value="x" * 2**16))
    assert error.metadata == {"field": "answer", "limit_bytes": str(2**16)}


@pytest.mark.usefixtures("unchanged")
def test_a_compressed_message_that_is_large_when_it_is_unpacked_is_refused(rpc: Rpc) -> None:
    call = rpc.channel.unary_unary("/perdure.v1.AgentRunService/StartAgent")
    refusal = refusal_of(lambda: call(b"\x00" * (64 * 2**20), compression=grpc.Compression.Gzip))
    assert refusal is not None
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.usefixtures("unchanged")
def test_a_thousand_labels_are_refused_by_their_number(rpc: Rpc) -> None:
    labels = {f"key-{number}": "x" for number in range(1_000)}
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "labels"):
        rpc.start("counter", labels=labels)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "labels"):
        rpc.runs.ListRuns(pb.ListRunsRequest(labels=labels))


# ---- text ------------------------------------------------------------------------------------------------------------


def with_bad_text(message: Descriptor, depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yields (path, bytes) of messages in which one text is not UTF-8: each text field there is, three levels deep."""
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield field.name, delimited(field, NOT_UTF8)
        elif field.message_type is not None and depth < 3:
            for path, data in with_bad_text(field.message_type, depth + 1):
                yield f"{field.name}.{path}", delimited(field, data)


def delimited(field: FieldDescriptor, data: bytes) -> bytes:
    """Returns a field of the wire type LEN (https://protobuf.dev/programming-guides/encoding/)."""
    return varint(field.number << 3 | 2) + varint(len(data)) + data


def varint(number: int) -> bytes:
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


@pytest.mark.usefixtures("unchanged")
def test_text_that_is_not_utf_8_is_refused_in_every_field_of_every_request(rpc: Rpc) -> None:
    tried = 0
    for one in RPCS:
        for path, data in with_bad_text(one.request.DESCRIPTOR):
            if one.path.endswith("/StartAgents"):  # each item has its own answer
                (answer,) = rpc.channel.stream_stream(one.path)(iter([data]))
                error = pb.StartAgentsResponse.FromString(answer).error
                info = error_details_pb2.ErrorInfo()
                assert any(packed.Unpack(info) for packed in error.details), (one.path, path)
                assert (error.code, info.reason) == (code_pb2.INVALID_ARGUMENT, "INVALID_FIELD"), (one.path, path)
                tried += 1
                continue
            if one.both_ways:
                both_ways = rpc.channel.stream_stream(one.path)
                refusal = refusal_of(lambda call=both_ways, data=data: list(call(iter([data]))))
            else:
                call = rpc.channel.unary_stream(one.path) if one.streaming else rpc.channel.unary_unary(one.path)
                refusal = refusal_of(
                    lambda call=call, data=data, one=one: list(call(data)) if one.streaming else call(data)
                )
            assert refusal is not None, (one.path, path)
            if refusal.code is grpc.StatusCode.UNIMPLEMENTED:
                continue  # a service of another port
            assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD"), (one.path, path)
            assert "utf" not in refusal.text.lower().replace("utf-8", ""), refusal.text
            tried += 1
    assert tried > 60


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "text", ['"a\\u0000b"', '"\\ud800"', '{"\\udfff": 1}', '["\\ud83d"]', "1e999", "NaN", '{"a":1,"a":2}', "9" * 5_000]
)
def test_a_payload_that_is_no_good_json_is_refused(rpc: Rpc, ids: dict[str, str], text: str) -> None:
    request = pb.SignalRunRequest(run_id=ids["waiting"], name="more", request_id=new_id(), payload_json=text)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as error:
        rpc.runs.SignalRun(request)
    assert error.fields[0].startswith("payload"), error.fields


# ---- nesting and numbers ---------------------------------------------------------------------------------------------


def nested_value(depth: int) -> bytes:
    """Returns the bytes of a google.protobuf.Value of lists in lists; the library refuses to build such a one."""
    data = Value(number_value=1).SerializeToString()
    list_value = Value.DESCRIPTOR.fields_by_name["list_value"]
    values = ListValue.DESCRIPTOR.fields_by_name["values"]
    for _ in range(depth):
        data = delimited(list_value, delimited(values, data))
    return data


def nested_struct(depth: int) -> bytes:
    """Returns the bytes of a Struct that holds lists in lists."""
    entry = Struct.DESCRIPTOR.fields_by_name["fields"]
    key, value = entry.message_type.fields
    return delimited(entry, delimited(key, b"a") + delimited(value, nested_value(depth)))


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("depth", [65, 10_000])
def test_json_that_is_nested_too_deep_is_refused_as_text(rpc: Rpc, ids: dict[str, str], depth: int) -> None:
    for text in ('{"a":' * depth + "1" + "}" * depth, '{"a":' + "[" * depth + "]" * depth + "}"):
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", "input"):
            rpc.runs.StartAgent(pb.StartAgentRequest(agent="counter", input_json=text))
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", "payload"):
            request = pb.SignalRunRequest(run_id=ids["waiting"], name="more", request_id="r", payload_json=text)
            rpc.runs.SignalRun(request)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("depth", [65, 10_000])
def test_values_that_are_nested_too_deep_are_refused_as_messages(rpc: Rpc, ids: dict[str, str], depth: int) -> None:
    by_path = {
        "StartAgent": (pb.StartAgentRequest(agent="counter"), "input", nested_struct(depth)),
        "SignalRun": (
            pb.SignalRunRequest(run_id=ids["done"], name="more", request_id="r"), "payload", nested_value(depth)
        ),
    }  # fmt: skip
    for method, (request, field, data) in by_path.items():
        number = type(request).DESCRIPTOR.fields_by_name[field]
        call = rpc.channel.unary_unary(f"/perdure.v1.AgentRunService/{method}")
        refusal = refusal_of(
            lambda call=call, r=request, n=number, d=data: call(r.SerializeToString() + delimited(n, d))
        )
        assert refusal is not None
        assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD"), refusal


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_in_every_value(rpc: Rpc, ids: dict[str, str], number: float) -> None:
    value = Value(list_value=ListValue(values=[Value(number_value=number)]))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "input.a[0]"):
        rpc.runs.StartAgent(pb.StartAgentRequest(agent="counter", input=Struct(fields={"a": value})))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "payload[0]"):
        rpc.runs.SignalRun(pb.SignalRunRequest(run_id=ids["waiting"], name="more", request_id="r", payload=value))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "answer[0]"):
        rpc.decide(ids["approval of asking"], answer=value)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("seconds", [2**62, -(2**62), 253_402_300_800, -62_135_596_801])
def test_times_out_of_range_are_refused_in_every_field_of_every_request(rpc: Rpc, seconds: int) -> None:
    time = Timestamp(seconds=seconds)
    for field in ("start_time", "deadline_time"):
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", field):
            rpc.start("counter", **{field: time})


# ---- decisions and tokens of others ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
def test_a_decision_that_comes_too_late_is_refused_and_changes_nothing(rpc: Rpc, ids: dict[str, str]) -> None:
    for approve in (True, False):
        with refused("FAILED_PRECONDITION", "APPROVAL_CLOSED"):
            rpc.decide(ids["approval of late"], approve)
    found = rpc.approvals.GetApproval(approval_pb.GetApprovalRequest(approval_id=ids["approval of late"])).approval
    assert approval_state(found) == "EXPIRED"


@pytest.mark.usefixtures("unchanged")
def test_a_decision_about_a_step_that_asked_nothing_is_not_found(rpc: Rpc, ids: dict[str, str]) -> None:
    step = ids["approval of asking"].rpartition("/")[2]
    for run_id in (ids["done"], ids["waiting"], new_id(), f"default.{ids['asking']}.r"):
        with refused("NOT_FOUND", "APPROVAL_NOT_FOUND"):
            rpc.decide(f"{run_id}/{step}")
    for other_name in (f"default.{ids['asking']}.r/{step}", f"{ids['asking']}/0{step}"):
        with refused("NOT_FOUND", "APPROVAL_NOT_FOUND"):
            rpc.decide(other_name)
    with refused("NOT_FOUND", "NAMESPACE_NOT_FOUND"):
        rpc.decide(ids["approval of asking"], namespace="elsewhere")


def test_a_second_decision_changes_nothing_whether_it_is_equal_or_not(
    rpc: Rpc, ids: dict[str, str], database_url: str
) -> None:
    approval_id = ids["approval of other"]
    decided = rpc.decide(approval_id, comment="first")
    rpc.output_of(ids["other"])
    before = contents(database_url)
    assert rpc.decide(approval_id, comment="first") == decided
    for approve, comment in ((False, "first"), (True, "second")):
        with refused("FAILED_PRECONDITION", "APPROVAL_CLOSED"):
            rpc.decide(approval_id, approve, comment=comment)
    assert contents(database_url) == before


@pytest.mark.usefixtures("unchanged")
def test_a_cursor_of_another_run_is_refused(rpc: Rpc, ids: dict[str, str]) -> None:
    cursor = rpc.stream(ids["done"])[-1].cursor
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cursor"):
        rpc.stream(ids["late"], cursor=cursor)
    token = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=ids["done"], page_size=1)).next_page_token
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "page_token"):
        rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=ids["late"], page_token=token))
    assert json.loads(rpc.get(ids["done"]).output_json) == {"total": 0}
