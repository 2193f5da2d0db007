"""What a caller learns of an error: code, reason and details as the API says, and no word that is not meant for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import sqlalchemy as sa
from google.protobuf.struct_pb2 import ListValue, Value
from grpc_health.v1 import health_pb2, health_pb2_grpc
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service import errors
from perdure_service.rpc import agent_runs, failures
from perdure_service.rpc.status import DETAILS_KEY, wire_error

from tests.helpers.waiting import eventually_async, scaled
from tests.unit.rpc.doubles import a_batch, a_run, failing, fails_with, serving, streams

SECRET = "hunter2 of the database"

# The table of errors in the API's documentation: class, code, reason, retry delay in seconds.
TABLE: list[tuple[errors.PerdureError, str, str, float | None]] = [
    (errors.InvalidArgument("run_id", "is wrong"), "INVALID_ARGUMENT", "INVALID_FIELD", None),
    (errors.InputSchemaViolation("input.n", "is no integer"), "INVALID_ARGUMENT", "INPUT_SCHEMA_VIOLATION", None),
    (errors.Unauthenticated("no token"), "UNAUTHENTICATED", "TOKEN_INVALID", None),
    (errors.TokenMissing("no token"), "UNAUTHENTICATED", "TOKEN_MISSING", None),
    (errors.TokenExpired("old token"), "UNAUTHENTICATED", "TOKEN_EXPIRED", None),
    (errors.PermissionDenied("no role"), "PERMISSION_DENIED", "ROLE_REQUIRED", None),
    (errors.NamespaceNotFound("no namespace lab"), "NOT_FOUND", "NAMESPACE_NOT_FOUND", None),
    (errors.RunNotFound("no run foo", run_id="foo"), "NOT_FOUND", "RUN_NOT_FOUND", None),
    (errors.AgentNotFound("no agent x", agent="x"), "NOT_FOUND", "AGENT_NOT_FOUND", None),
    (errors.ArtifactNotFound("no artifact"), "NOT_FOUND", "ARTIFACT_NOT_FOUND", None),
    (errors.OffsetOutOfRange("far", size_bytes="7"), "OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE", None),
    (errors.ApprovalNotFound("no approval"), "NOT_FOUND", "APPROVAL_NOT_FOUND", None),
    (errors.RunConflict("taken", run_id="foo"), "ALREADY_EXISTS", "RUN_ID_IN_USE", None),
    (errors.RunInputMismatch("other", given="ab", stored="cd"), "ALREADY_EXISTS", "RUN_INPUT_MISMATCH", None),
    (errors.RunFinished("ended"), "FAILED_PRECONDITION", "RUN_FINISHED", None),
    (errors.ApprovalClosed("decided", state="APPROVED"), "FAILED_PRECONDITION", "APPROVAL_CLOSED", None),
    (errors.VersionUnavailable("no executor"), "FAILED_PRECONDITION", "VERSION_UNAVAILABLE", None),
    (errors.RevisionConflict("changed", revision="2"), "ABORTED", "REVISION_CONFLICT", None),
    (errors.Contention("again"), "ABORTED", "CONTENTION", 0.2),
    (errors.CursorOutOfRange("old", earliest_sequence="7"), "OUT_OF_RANGE", "EVENTS_TRUNCATED", None),
    (errors.ViewTooLarge("many", limit="1000"), "FAILED_PRECONDITION", "VIEW_TOO_LARGE", None),
    (errors.NobodyStandsBy("nobody"), "FAILED_PRECONDITION", "NOBODY_STANDS_BY", None),
    (errors.StoreUnavailable("gone"), "UNAVAILABLE", "STORE_UNAVAILABLE", 1.0),
    (errors.KeysUnavailable("no keys"), "UNAVAILABLE", "KEYS_UNAVAILABLE", 2.0),
    (errors.RegionUnavailable("lost", region="west"), "UNAVAILABLE", "REGION_UNAVAILABLE", 2.0),
    (errors.CellNotServed("not here", cell="ww1"), "UNAVAILABLE", "CELL_NOT_SERVED", 1.0),
    (errors.NamespacePaused("being moved"), "UNAVAILABLE", "NAMESPACE_PAUSED", 5.0),
    (errors.Draining("stopping"), "UNAVAILABLE", "DRAINING", 0.5),
    (errors.Overloaded("slow down"), "RESOURCE_EXHAUSTED", "OVERLOADED", 1.0),
    (errors.QuotaExceeded("fast", 0.25, limit_per_second="4"), "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", 0.25),
    (errors.PayloadTooLarge("large"), "RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE", None),
    (errors.TooManyStreams("many"), "RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS", 5.0),
]

REQUEST = pb.GetRunRequest(run_id="foo")


def _classes(base: type[errors.PerdureError]) -> Iterator[type[errors.PerdureError]]:
    for child in base.__subclasses__():
        yield child
        yield from _classes(child)


def test_the_table_has_every_error_that_a_caller_may_see():
    of_the_product = {c for c in _classes(errors.PerdureError) if c.__module__ == errors.__name__}
    assert of_the_product - {type(error) for error, *_ in TABLE} == {errors.NotFound, errors.ConfigurationError}


@pytest.mark.parametrize(("error", "code", "reason", "retry_delay_s"), TABLE, ids=[type(e).__name__ for e, *_ in TABLE])
async def test_every_error_of_the_table_arrives_as_the_table_says(service, rpc_log, error, code, reason, retry_delay_s):
    service.script["get"] = fails_with(error)
    async with serving(service) as served:
        failure = await failing(served.runs.GetRun(REQUEST))
    assert failure.code.name == code
    assert failure.text == failure.status.message == error.message
    assert failure.status.code == failure.code.value[0]
    assert (failure.info.reason, failure.info.domain) == (reason, "perdure.dev")
    assert dict(failure.info.metadata) == error.metadata
    assert failure.retry_delay_s == retry_delay_s
    assert failure.violations == dict(getattr(error, "violations", ()))
    [line] = rpc_log
    assert (line["event"], line["code"], line["reason"]) == ("rpc.failed", code, reason)
    assert line["rpc"] == "perdure.v1.AgentRunService/GetRun"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(SECRET),
        KeyError(SECRET),
        errors.ConfigurationError(SECRET),
        errors.PerdureError(SECRET),
        BaseExceptionGroup(SECRET, [RuntimeError(SECRET)]),
        type("ParkedError", (BaseException,), {})(SECRET),
        asyncio.CancelledError(SECRET),
        TimeoutError(SECRET),
        grpc.aio.UsageError(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
async def test_any_other_exception_is_an_id_to_the_caller_and_a_cause_in_the_log(service, rpc_log, error, stream):
    async def fail_late(*args: Any, **kwargs: Any) -> Any:
        yield a_batch(1)
        raise error

    service.script["get"] = fails_with(error)
    service.script["watch"] = fail_late
    async with serving(service) as served:
        call = served.runs.WatchRun(pb.WatchRunRequest(run_id="foo")) if stream else served.runs.GetRun(REQUEST)
        failure = await asyncio.wait_for(failing(call), 10)
    assert failure.code is grpc.StatusCode.INTERNAL
    assert failure.text == "internal error; report this error id"
    assert failure.info.reason == "INTERNAL"
    assert SECRET not in failure.raw
    assert SECRET not in str(failure.status)
    [line] = rpc_log
    assert line["error_id"] == failure.info.metadata["error_id"]
    assert line["log_level"] == "error"
    assert SECRET in line["exception"]
    assert "doubles.py" in line["exception"] or stream  # where it was raised


async def test_a_method_of_the_schema_that_this_server_does_not_have_is_unimplemented(service, monkeypatch, rpc_log):
    monkeypatch.delattr(agent_runs.AgentRuns, "GetRun")  # what is left is the generated servicer's own
    async with serving(service) as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.runs.GetRun(REQUEST)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert raised.value.details() == "this server does not have the method"
    assert rpc_log == []


async def test_an_error_that_cannot_be_logged_is_answered_all_the_same(service, monkeypatch):
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise UnicodeEncodeError("utf-8", SECRET, 0, 1, SECRET)

    monkeypatch.setattr(failures, "_log", Broken())
    async with serving(service) as served:
        for error in (RuntimeError(SECRET), errors.RunNotFound(SECRET)):
            service.script["get"] = fails_with(error)
            failure = await failing(served.runs.GetRun(REQUEST, metadata=(("x-request-id", "abc"),)))
            assert failure.code is grpc.StatusCode.INTERNAL
            assert failure.info.metadata["error_id"] == "abc"
            assert SECRET not in failure.raw


async def test_error_ids_differ(service, rpc_log):
    service.script["get"] = fails_with(RuntimeError())
    async with serving(service) as served:
        failures = [await failing(served.runs.GetRun(REQUEST)) for _ in range(3)]
    assert len({failure.info.metadata["error_id"] for failure in failures}) == 3


async def test_a_lost_database_connection_that_nobody_translated_is_unavailable(service, rpc_log):
    lost = sa.exc.OperationalError("SELECT 1", {"input": SECRET}, OSError("connection refused"))
    service.script["get"] = fails_with(lost)
    async with serving(service) as served:
        failure = await failing(served.runs.GetRun(REQUEST))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.retry_delay_s is not None
    assert SECRET not in failure.raw
    [line] = rpc_log
    assert "connection refused" in line["cause"]
    assert SECRET not in repr(line)


async def test_the_parameters_of_a_failed_statement_stay_out_of_the_log(service, rpc_log):
    def statement_error() -> sa.exc.ProgrammingError:
        return sa.exc.ProgrammingError("INSERT", {"input": SECRET}, ValueError("syntax"))

    def fail(*args: Any, **kwargs: Any) -> Any:
        try:
            raise statement_error()
        except sa.exc.ProgrammingError as error:
            raise ExceptionGroup("no run was written", [statement_error()]) from error

    service.script["get"] = fail
    async with serving(service) as served:
        failure = await failing(served.runs.GetRun(REQUEST))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "INSERT" in rpc_log[0]["exception"]
    assert SECRET not in repr(rpc_log)


async def test_the_log_names_bad_fields_but_not_what_was_in_them(service, rpc_log):
    service.script["get"] = fails_with(errors.InputSchemaViolation("input.n", f"{SECRET!r} is not an integer"))
    async with serving(service) as served:
        failure = await failing(served.runs.GetRun(REQUEST))
    assert SECRET in failure.violations["input.n"]
    assert rpc_log[0]["fields"] == ["input.n"]
    assert SECRET not in repr(rpc_log)


async def test_the_cause_of_an_error_is_logged_and_not_sent(service, rpc_log):
    error = errors.StoreUnavailable("the database cannot be reached")
    error.__cause__ = OSError(SECRET)
    service.script["get"] = fails_with(error)
    async with serving(service) as served:
        failure = await failing(served.runs.GetRun(REQUEST))
    assert SECRET not in failure.raw
    assert rpc_log[0]["cause"] == f"OSError: {SECRET}"
    assert rpc_log[0]["log_level"] == "warning"


async def test_an_error_in_a_stream_comes_after_what_was_sent(service, rpc_log):
    service.script["watch"] = fails_with(errors.CursorOutOfRange("old", earliest_sequence="7"))
    async with serving(service) as served:
        failure = await failing(served.runs.WatchRun(pb.WatchRunRequest(run_id="foo", after_sequence=1)))
        assert failure.code is grpc.StatusCode.OUT_OF_RANGE
        assert failure.info.metadata["earliest_sequence"] == "7"

        async def then_fail(*args: Any, **kwargs: Any) -> Any:
            yield a_batch(1)
            raise errors.StoreUnavailable("gone")

        service.script["watch"] = then_fail
        call = served.runs.WatchRun(pb.WatchRunRequest(run_id="foo"))
        assert (await call.read()).last_sequence == 1
        assert (await failing(call)).info.reason == "STORE_UNAVAILABLE"
    assert service.closed == ["watch", "watch"]


async def test_a_request_that_is_no_message_is_refused_without_the_decoders_words(service, rpc_log):
    async with serving(service) as served:
        for method in ("GetRun", "StartAgent"):
            failure = await failing(served.channel.unary_unary(f"/perdure.v1.AgentRunService/{method}")(b"\xff\xff"))
            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
            assert "pars" not in failure.raw
        failure = await failing(served.channel.unary_stream("/perdure.v1.AgentRunService/WatchRun")(b"\xff\xff"))
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_struct_deeper_than_protobuf_reads_is_refused(service, rpc_log):
    value = inner = Value(list_value=ListValue())
    for _ in range(80):
        inner = inner.list_value.values.add()
    request = pb.StartAgentRequest(agent="research")
    request.input.fields["a"].list_value.values.add()
    data = value.SerializeToString()

    def field(number: int, content: bytes) -> bytes:
        length, prefix = len(content), b""
        while length > 127:
            prefix, length = prefix + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + prefix + bytes([length]) + content

    entry = field(1, field(1, b"a") + field(2, data))
    async with serving(service) as served:
        start = served.channel.unary_unary("/perdure.v1.AgentRunService/StartAgent")
        failure = await failing(start(field(2, b"research") + field(6, entry)))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "nested" in failure.text


async def test_an_unknown_method_is_unimplemented(service, rpc_log):
    async with serving(service) as served:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.channel.unary_unary("/perdure.v1.AgentRunService/Nothing")(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert rpc_log == []


async def test_an_answer_of_grpcs_own_servicers_passes(service, rpc_log):
    async with serving(service) as served:
        stub = health_pb2_grpc.HealthStub(served.channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert rpc_log == []


@pytest.mark.parametrize("width", ["x", "é", "😀", "\ud800"])
async def test_an_error_always_fits_the_metadata_that_carries_it(service, rpc_log, width):
    more = [(f"input.a[{n}].{width * 300}", width * 500) for n in range(20)]
    service.script["get"] = fails_with(errors.InputSchemaViolation(*more[0], *more[1:]))
    service.script["cancel"] = fails_with(
        errors.RunConflict(width * 10_000, **{f"k{n}": width * 9_000 for n in range(3)})
    )
    async with serving(service) as served:
        failure = await failing(served.runs.GetRun(REQUEST))
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.violations
        failure = await failing(served.runs.CancelRun(pb.CancelRunRequest(run_id="foo")))
        assert failure.code is grpc.StatusCode.ALREADY_EXISTS


def test_twenty_ordinary_violations_are_all_sent():
    error = errors.InvalidArgument(
        "input.a", "is wrong", *[(f"input.b[{n}]", "'x' is not an integer") for n in range(19)]
    )
    wire = wire_error(error)
    assert wire.details.count(b"input.b[") == 19
    assert DETAILS_KEY.endswith("-bin")


async def test_an_error_does_not_end_the_connection(service, rpc_log):
    service.script["get"] = fails_with(RuntimeError("x"))
    async with serving(service) as served:
        await failing(served.runs.GetRun(REQUEST))
        service.script["get"] = lambda *args, **kwargs: a_run()
        assert (await served.runs.GetRun(REQUEST)).run.run_id == "foo"


async def test_a_call_that_the_client_gives_up_is_cancelled_and_no_failure(service, rpc_log):
    cancelled = asyncio.Event()

    async def wait_long(*args: Any, **kwargs: Any) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    service.script["get"] = wait_long
    async with serving(service) as served:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.GetRun(REQUEST, timeout=scaled(0.5))
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(cancelled.wait(), 5)
        call = served.runs.GetRun(REQUEST)
        await eventually_async(lambda: len(service.calls) == 2)
        cancelled.clear()
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 5)
    assert rpc_log == []


async def test_the_log_line_has_the_callers_request_id_or_one_made_here(service, rpc_log):
    service.script["get"] = fails_with(errors.RunNotFound("no run foo"))
    async with serving(service, caller="dev") as served:
        await failing(served.runs.GetRun(REQUEST, metadata=(("x-request-id", "abc-1"),)))
        await failing(served.runs.GetRun(REQUEST, metadata=(("x-request-id", "x" * 200),)))
        await failing(served.runs.GetRun(REQUEST))
    first, second, third = (line["call_id"] for line in rpc_log)
    assert first == "abc-1"
    assert len(second) == len(third) == 16
    assert second != third
    assert {line["caller"] for line in rpc_log} == {"dev"}


async def test_streams_of_many_clients_that_leave_midway_leave_neither_errors_nor_streams(service, rpc_log, rng):
    service.script["watch"] = streams(*[a_batch(n) for n in range(1, 400)], then_stay=True)
    async with serving(service) as served:

        async def leave_midway(reads: int) -> None:
            call = served.runs.WatchRun(pb.WatchRunRequest(run_id="foo"))
            for _ in range(reads):
                await call.read()
            call.cancel()

        for _ in range(5):
            await asyncio.gather(*[leave_midway(rng.randrange(30)) for _ in range(40)])
        await eventually_async(lambda: served.server.streams.count == 0)
        assert len(service.closed) == len(service.calls)
    assert rpc_log == []
