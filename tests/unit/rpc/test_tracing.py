"""Each call of ours is a span, in the caller's trace; health is not; a client that leaves a watch has not failed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.proto.trace.v1 import trace_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.errors import RunNotFound
from perdure_service.telemetry import Telemetry, format_traceparent, start_telemetry

from tests.helpers.waiting import eventually_async
from tests.unit.rpc.doubles import a_batch, a_run, failing, fails_with, serving, streams
from tests.unit.telemetry.sink import Sink, attributes_of, grpc_sink, ids_of

CALLER = (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
REQUEST = pb.GetRunRequest(run_id="foo")
GET = "perdure.v1.AgentRunService/GetRun"
WATCH = "perdure.v1.AgentRunService/WatchRun"
ERROR, UNSET = trace_pb2.Status.STATUS_CODE_ERROR, trace_pb2.Status.STATUS_CODE_UNSET


@pytest.fixture
def sink() -> Iterator[Sink]:
    with grpc_sink() as sink:
        yield sink


@pytest.fixture
def telemetry(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
    telemetry = start_telemetry()
    yield telemetry
    telemetry.shutdown()


async def sent(telemetry: Telemetry, sink: Sink) -> dict[str, trace_pb2.Span]:
    await asyncio.to_thread(telemetry.shutdown)
    return {span.name: span for span in sink.spans}


async def test_a_call_is_a_child_of_the_callers_span_and_the_parent_of_what_is_done_in_it(service, telemetry, sink):
    def get(*args: Any, **kwargs: Any) -> Any:
        with telemetry._provider.get_tracer("library").start_as_current_span("query"):
            return a_run()

    service.script["get"] = get
    async with serving(service, tracer=telemetry.tracer) as served:
        metadata = (("traceparent", format_traceparent(*CALLER)), ("x-request-id", "abc"))
        await served.runs.GetRun(REQUEST, metadata=metadata)
    spans = await sent(telemetry, sink)
    trace_id, span_id, parent = ids_of(spans[GET])
    assert (trace_id, parent) == CALLER
    assert ids_of(spans["query"])[2] == span_id
    assert spans[GET].kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert spans[GET].status.code == UNSET
    assert attributes_of(spans[GET]) == {
        "rpc.system.name": "grpc",
        "rpc.method": GET,
        "rpc.response.status_code": "OK",
        "perdure.call_id": "abc",
    }


async def test_a_call_without_a_trace_begins_one_and_one_that_is_not_sampled_leaves_no_span(service, telemetry, sink):
    service.script["get"] = lambda *args, **kwargs: a_run()
    async with serving(service, tracer=telemetry.tracer) as served:
        await served.runs.GetRun(REQUEST)
        await served.runs.GetRun(REQUEST, metadata=(("traceparent", format_traceparent(*CALLER, sampled=False)),))
        await served.runs.GetRun(REQUEST, metadata=(("traceparent", "nonsense"),))
    await sent(telemetry, sink)
    assert [ids_of(span)[2] for span in sink.spans] == [None, None]
    assert len({span.trace_id for span in sink.spans}) == 2


@pytest.mark.parametrize(
    ("error", "status", "code", "error_type"),
    [
        (RunNotFound("no run foo"), UNSET, "NOT_FOUND", "RUN_NOT_FOUND"),
        (RuntimeError("secret"), ERROR, "INTERNAL", "INTERNAL"),
    ],
)
async def test_only_the_servers_faults_are_errors(service, telemetry, sink, rpc_log, error, status, code, error_type):
    service.script["get"] = fails_with(error)
    async with serving(service, tracer=telemetry.tracer) as served:
        await failing(served.runs.GetRun(REQUEST))
    span = (await sent(telemetry, sink))[GET]
    assert span.status.code == status
    assert attributes_of(span)["rpc.response.status_code"] == code
    assert attributes_of(span)["error.type"] == error_type
    assert b"secret" not in span.SerializeToString()


async def test_a_watch_that_its_client_leaves_is_no_error_and_neither_is_one_that_is_drained(service, telemetry, sink):
    service.script["watch"] = streams(a_batch(1), then_stay=True)
    async with serving(service, tracer=telemetry.tracer) as served:
        calls = [served.runs.WatchRun(pb.WatchRunRequest(run_id="foo")) for _ in range(2)]
        for call in calls:
            await call.read()
        calls[0].cancel()
        await eventually_async(lambda: service.closed)
        await served.server.drain()
        await failing(calls[1])
    await sent(telemetry, sink)
    assert [span.name for span in sink.spans] == [WATCH, WATCH]
    assert [span.status.code for span in sink.spans] == [UNSET, UNSET]
    assert [attributes_of(span)["rpc.response.status_code"] for span in sink.spans] == ["CANCELLED", "UNAVAILABLE"]


async def test_health_leaves_no_span(service, telemetry, sink):
    async with serving(service, tracer=telemetry.tracer) as served:
        await health_pb2_grpc.HealthStub(served.channel).Check(health_pb2.HealthCheckRequest())
    assert await sent(telemetry, sink) == {}


async def test_calls_do_not_see_each_others_spans(service, telemetry, sink):
    gate = asyncio.Barrier(10)
    seen: set[int] = set()

    async def get(*args: Any, **kwargs: Any) -> Any:
        before = trace.get_current_span().get_span_context().span_id
        await gate.wait()
        assert trace.get_current_span().get_span_context().span_id == before
        seen.add(before)
        return a_run()

    service.script["get"] = get
    async with serving(service, tracer=telemetry.tracer) as served:
        await asyncio.gather(*[served.runs.GetRun(REQUEST) for _ in range(10)])
    await sent(telemetry, sink)
    assert seen == {ids_of(span)[1] for span in sink.spans}
    assert len(seen) == 10
