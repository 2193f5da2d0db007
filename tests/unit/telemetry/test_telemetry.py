"""Spans arrive at a real receiver with exactly the ids a run derives, or nothing is done at all."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import socket
import threading
import time
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.trace import SpanKind
from perdure_service import telemetry as names
from perdure_service.errors import ConfigurationError
from perdure_service.telemetry import (
    RunTracer,
    Telemetry,
    TraceParent,
    derive_span_id,
    derive_trace_id,
    format_traceparent,
    parse_traceparent,
    start_telemetry,
)

from tests.helpers.waiting import eventually
from tests.unit.telemetry.sink import attributes_of, http_sink, ids_of

TRACE = derive_trace_id("default.foo.r")
RUN = derive_span_id("default.foo.r")
STEP = derive_span_id("default.foo.r", 1, 3)


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_ids_are_the_same_in_every_process_and_version():
    assert f"{TRACE:032x}" == "d5928afcb4167b254b976e8b4894c8bc"
    assert f"{STEP:016x}" == "f114d879ee4d6d5f"


@given(st.lists(st.text() | st.integers(), max_size=4), st.lists(st.text() | st.integers(), max_size=4))
def test_span_ids_are_valid_and_differ_with_what_they_name(one, other):
    first, second = derive_span_id(*one), derive_span_id(*other)
    assert 0 < first < 2**64
    assert (first == second) == ([str(part) for part in one] == [str(part) for part in other])


@given(st.text())
def test_trace_ids_are_valid_and_no_span_ids(workflow_id):
    assert 0 < derive_trace_id(workflow_id) < 2**128
    assert derive_trace_id(workflow_id) >> 64 != derive_span_id(workflow_id)


def test_parts_are_not_just_joined():
    assert derive_span_id("a", "b c") != derive_span_id("a b", "c") != derive_span_id("a b c")


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_a_traceparent_is_read_as_it_was_written(trace_id, span_id, sampled):
    assert parse_traceparent(format_traceparent(trace_id, span_id, sampled)) == (trace_id, span_id, sampled)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        "00-0AF7651916CD43DD8448EB211C80319C-B7AD6B7169203331-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
        "00-0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        " 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ],
)
def test_what_is_no_traceparent_is_none(text):
    assert parse_traceparent(text) is None


def test_later_versions_and_other_flags_are_understood():
    later = "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03-what-comes-then"
    assert parse_traceparent(later) == TraceParent(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)
    unsampled = parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-02")
    assert unsampled is not None
    assert not unsampled.sampled


# ---- nowhere to send spans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "TRUE"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_a_place_to_send_spans_there_are_none(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    telemetry = start_telemetry()
    assert not telemetry.tracer.enabled
    telemetry.install()
    with telemetry.tracer.span("x", trace_id=TRACE, span_id=RUN, activate=True) as span:
        assert not span.recording
        assert not trace.get_current_span().get_span_context().is_valid
        span.set_attribute(names.RUN_ID, "foo")
    telemetry.tracer.record_span("x", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2)
    telemetry.tracer.server_span("x", caller=None, attributes={}).end()
    telemetry.shutdown()


def test_an_unknown_protocol_is_told(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json'"):
        start_telemetry()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier-pigeon")
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is 'carrier-pigeon'"):
        start_telemetry()


def test_a_malformed_variable_is_told(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    with pytest.raises(ConfigurationError, match="OTEL_"):
        start_telemetry()


# ---- spans -----------------------------------------------------------------------------------------------------------


def test_a_runs_trace_arrives_with_exactly_its_ids(telemetry, sink):
    tracer = telemetry.tracer
    caller = 0xB7AD6B7169203331
    execution = derive_span_id("default.foo.r", "execution", 1)
    attempt = derive_span_id("default.foo.r", 1, 3, 2)
    with tracer.span(
        names.step_span_name("ask_model"),
        trace_id=TRACE,
        span_id=STEP,
        parent_span_id=execution,
        attributes={names.STEP_ID: 3, names.STEP_NAME: "ask_model"},
    ):
        span = tracer.span(
            names.ATTEMPT_SPAN, trace_id=TRACE, span_id=attempt, parent_span_id=STEP, attributes={names.ATTEMPT: 2}
        )
        span.end("error", "TimeoutError")
    tracer.record_span(
        names.EXECUTION_SPAN, trace_id=TRACE, span_id=execution, parent_span_id=RUN, start_ns=2_000, end_ns=3_000
    )
    tracer.record_span(
        names.run_span_name("research"),
        trace_id=TRACE,
        span_id=RUN,
        parent_span_id=caller,
        start_ns=1_000,
        end_ns=4_000,
        attributes={names.RUN_ID: "foo", names.NAMESPACE: "default"},
        kind=SpanKind.CONSUMER,
        status="ok",
    )
    telemetry.shutdown()
    assert {span.name: ids_of(span) for span in sink.spans} == {
        "agent_run research": (TRACE, RUN, caller),
        "execution": (TRACE, execution, RUN),
        "step ask_model": (TRACE, STEP, execution),
        "attempt": (TRACE, attempt, STEP),
    }
    run = sink.named("agent_run research")
    assert (run.start_time_unix_nano, run.end_time_unix_nano) == (1_000, 4_000)
    assert attributes_of(run) == {"perdure.run_id": "foo", "perdure.namespace": "default"}
    assert run.kind == trace_pb2.Span.SPAN_KIND_CONSUMER
    assert run.status.code == trace_pb2.Status.STATUS_CODE_OK
    failed = sink.named("attempt")
    assert failed.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert attributes_of(failed) == {"perdure.attempt": 2, "error.type": "TimeoutError"}
    assert sink.named("step ask_model").status.code == trace_pb2.Status.STATUS_CODE_UNSET


def test_a_root_has_the_given_trace_id_and_no_parent(telemetry, sink):
    telemetry.tracer.record_span("root", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2)
    telemetry.shutdown()
    assert ids_of(sink.named("root")) == (TRACE, RUN, None)


def test_the_same_span_written_twice_is_the_same_span(telemetry, sink):
    """Whoever reads the log may write what another process had written already."""
    for _ in range(2):
        telemetry.tracer.record_span("run", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2)
    telemetry.shutdown()
    assert sink.spans[0] == sink.spans[1]


def test_libraries_spans_nest_in_an_active_span_and_have_ids_of_their_own(telemetry, sink):
    library = telemetry._provider.get_tracer("library")
    step = telemetry.tracer.span("step a", trace_id=TRACE, span_id=STEP, parent_span_id=RUN, activate=True)
    with step, library.start_as_current_span("chat"), library.start_as_current_span("http"):
        pass
    with library.start_as_current_span("outside"):
        pass
    with telemetry.tracer.span("step b", trace_id=TRACE, span_id=RUN), library.start_as_current_span("beside"):
        pass
    telemetry.shutdown()
    chat, http = ids_of(sink.named("chat")), ids_of(sink.named("http"))
    assert (chat[0], chat[2]) == (TRACE, STEP)
    assert (http[0], http[2]) == (TRACE, chat[1])
    for name in ("outside", "beside"):
        trace_id, span_id, parent = ids_of(sink.named(name))
        assert trace_id not in (0, TRACE)
        assert span_id not in (0, STEP, RUN)
        assert parent is None


def test_what_a_caller_does_not_want_sampled_is_not_recorded_inside_neither(telemetry, sink):
    library = telemetry._provider.get_tracer("library")
    with telemetry.tracer.span("step a", trace_id=TRACE, span_id=STEP, sampled=False, activate=True) as span:
        assert not span.recording
        current = trace.get_current_span().get_span_context()
        assert (current.trace_id, current.span_id, current.trace_flags) == (TRACE, STEP, 0)
        with library.start_as_current_span("chat"):
            pass
    caller = TraceParent(TRACE, RUN, False)
    telemetry.tracer.server_span("call", caller=caller, attributes={}).end()
    telemetry.tracer.record_span("run", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2, sampled=False)
    telemetry.shutdown()
    assert sink.spans == []


def test_a_span_goes_back_to_spans_of_other_traces(telemetry, sink):
    origin = TraceParent(derive_trace_id("default.bar.r"), derive_span_id("default.bar.r", "run"), True)
    telemetry.tracer.record_span("run", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2, links=[origin])
    telemetry.shutdown()
    [link] = sink.named("run").links
    assert (int.from_bytes(link.trace_id), int.from_bytes(link.span_id)) == origin[:2]


def test_a_span_may_be_left_and_ended_later(telemetry, sink):
    span = telemetry.tracer.span("attempt", trace_id=TRACE, span_id=RUN, start_ns=1_000, activate=True)
    span.leave()
    assert not trace.get_current_span().get_span_context().is_valid
    assert span.recording
    span.set_attribute(names.ATTEMPT, 1)
    span.end("ok", end_ns=2_000)
    telemetry.shutdown()
    sent = sink.named("attempt")
    assert (sent.start_time_unix_nano, sent.end_time_unix_nano) == (1_000, 2_000)
    assert attributes_of(sent) == {"perdure.attempt": 1}


def test_an_exception_marks_the_span_with_its_class_and_not_with_its_words(telemetry, sink):
    span = telemetry.tracer.span("step a", trace_id=TRACE, span_id=STEP, activate=True)
    with pytest.raises(ValueError, match="secret"), span:
        raise ValueError("secret")
    assert not trace.get_current_span().get_span_context().is_valid
    telemetry.shutdown()
    sent = sink.named("step a")
    assert sent.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert attributes_of(sent) == {"error.type": "ValueError"}
    assert b"secret" not in sent.SerializeToString()


async def test_concurrent_steps_keep_their_ids_apart(telemetry, sink):
    library = telemetry._provider.get_tracer("library")
    gate = asyncio.Barrier(20)

    async def step(number: int) -> None:
        with telemetry.tracer.span(f"step {number}", trace_id=TRACE, span_id=1_000 + number, activate=True):
            await gate.wait()
            with library.start_as_current_span(f"chat {number}"):
                await gate.wait()

    await asyncio.gather(*[step(number) for number in range(20)])
    await asyncio.to_thread(telemetry.shutdown)
    for number in range(20):
        assert ids_of(sink.named(f"step {number}"))[:2] == (TRACE, 1_000 + number)
        assert ids_of(sink.named(f"chat {number}"))[2] == 1_000 + number


def test_a_span_may_end_in_another_thread_or_context_and_twice(telemetry, sink, caplog):
    spans = [telemetry.tracer.span(f"s{n}", trace_id=TRACE, span_id=n, activate=True) for n in (1, 2)]
    thread = threading.Thread(target=spans[1].end, args=("ok",))
    thread.start()
    thread.join()
    contextvars.copy_context().run(spans[0].end)
    spans[0].end("error", "Late")
    spans[0].set_attribute(names.RUN_ID, "late")
    telemetry.shutdown()
    assert sorted(span.name for span in sink.spans) == ["s1", "s2"]
    assert sink.named("s1").status.code == trace_pb2.Status.STATUS_CODE_UNSET
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_server_span_is_a_child_of_the_callers_span(telemetry, sink):
    caller = TraceParent(TRACE, RUN, True)
    with telemetry.tracer.server_span("call", caller=caller, attributes={names.RPC_SYSTEM: "grpc"}):
        assert trace.get_current_span().get_span_context().trace_id == TRACE
    telemetry.tracer.server_span("lonely", caller=None, attributes={}).end()
    telemetry.shutdown()
    trace_id, span_id, parent = ids_of(sink.named("call"))
    assert (trace_id, parent) == (TRACE, RUN)
    assert span_id != RUN
    assert sink.named("call").kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert ids_of(sink.named("lonely"))[2] is None


# ---- the process -----------------------------------------------------------------------------------------------------


def test_the_resource_says_which_process_it_was(telemetry, sink):
    telemetry.tracer.record_span("x", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2)
    telemetry.shutdown()
    [resource] = sink.resources
    assert resource["service.name"] == "perdure"
    assert resource["service.instance.id"] == "host-1"
    assert resource["service.version"] == "0.1.0"
    assert resource["telemetry.sdk.language"] == "python"


def test_the_environment_names_the_service_before_we_do(sink, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", sink.endpoint)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "agents-eu")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test,service.version=9")
    telemetry = start_telemetry(version="0.1.0")
    telemetry.tracer.record_span("x", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2)
    telemetry.shutdown()
    [resource] = sink.resources
    assert resource["service.name"] == "agents-eu"
    assert (resource["deployment.environment"], resource["service.version"]) == ("test", "9")


def test_spans_go_by_http_when_the_protocol_says_so(monkeypatch):
    with http_sink() as sink:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        telemetry = start_telemetry()
        telemetry.tracer.record_span("x", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2)
        telemetry.shutdown()
        assert ids_of(sink.named("x")) == (TRACE, RUN, None)
        assert sink.paths == ["/v1/traces"]


def test_more_spans_than_one_batch_all_arrive(telemetry, sink):
    for number in range(1, 2_001):
        telemetry.tracer.record_span("x", trace_id=TRACE, span_id=number, start_ns=1, end_ns=2)
    telemetry.shutdown()
    assert sorted(ids_of(span)[1] for span in sink.spans) == list(range(1, 2_001))


@pytest.mark.parametrize(("protocol", "timeout_s"), [("grpc", 5), ("http/protobuf", 1)])
def test_a_receiver_that_does_not_answer_does_not_hold_up_the_end(monkeypatch, protocol, timeout_s):
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(timeout_s))
        telemetry = start_telemetry()
        telemetry.tracer.record_span("x", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2)
        began = time.monotonic()
        telemetry.shutdown(0.3)
        assert time.monotonic() - began < 1.5
        eventually(lambda: "perdure-telemetry-shutdown" not in {thread.name for thread in threading.enumerate()})
        telemetry.shutdown()
        telemetry.tracer.record_span("late", trace_id=TRACE, span_id=RUN, start_ns=1, end_ns=2)


def test_it_can_be_what_libraries_find(telemetry, monkeypatch):
    found: list[object] = []
    monkeypatch.setattr(trace, "set_tracer_provider", found.append)
    telemetry.install()
    Telemetry().install()
    assert found == [telemetry._provider]


def test_a_tracer_of_nothing_is_cheap_to_have():
    tracer = RunTracer()
    assert not tracer.enabled
    tracer.span("x", trace_id=1, span_id=2).end("error", "X")


def test_names_of_spans():
    assert names.run_span_name("research") == "agent_run research"
    assert names.step_span_name("ask_model") == "step ask_model"
    assert names.model_span_name("chat", "qwen3") == "chat qwen3"
    assert (names.EXECUTION_SPAN, names.ATTEMPT_SPAN) == ("execution", "attempt")
