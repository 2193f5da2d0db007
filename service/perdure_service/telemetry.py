"""Decides what spans are called and carry, which ids they have, and where they go (OTLP, when `OTEL_*` says so).

A run's trace is put together by several processes, some of which die, so nothing about it may depend on memory: every
span's id is derived from what the span is about, and a span can be written after the fact by whoever reads the log.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from typing import Literal, NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.resources import SERVICE_NAME as SERVICE_NAME_KEY
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags

from perdure_service.errors import ConfigurationError

SERVICE_NAME = "perdure"
SHUTDOWN_TIMEOUT_S = 5.0
"""How long `Telemetry.shutdown` waits for the last spans to be sent."""
QUEUE_SIZE = 16_384
"""Spans kept for export. OpenTelemetry's default of 2,048 is less than a second of a busy executor."""

# ---- names of spans --------------------------------------------------------------------------------------------------

EXECUTION_SPAN = "execution"
"""The time in which one executor ran a run; child of the run's span."""
ATTEMPT_SPAN = "attempt"
"""One try of a step; child of the step's span."""


def run_span_name(agent: str) -> str:
    """Returns the name of a run's span, from its creation to its end."""
    return f"agent_run {agent}"


def step_span_name(step_name: str) -> str:
    """Returns the name of a step's span, all attempts and delays together; child of an execution's span."""
    return f"step {step_name}"


def model_span_name(operation: str, model: str) -> str:
    """Returns the name of a model call's span as OpenTelemetry's `gen_ai` conventions have it, e.g. `chat qwen3`."""
    return f"{operation} {model}"


# ---- names of attributes ---------------------------------------------------------------------------------------------

# Numbers (execution, step_id, attempt) are those of the API.
RUN_ID = "perdure.run_id"
NAMESPACE = "perdure.namespace"
AGENT = "perdure.agent"
AGENT_VERSION = "perdure.agent_version"
EXECUTION = "perdure.execution"
STEP_ID = "perdure.step_id"
STEP_NAME = "perdure.step_name"
ATTEMPT = "perdure.attempt"
EXECUTOR_ID = "perdure.executor_id"
CALL_ID = "perdure.call_id"
"""The id of one gRPC call, as in the log."""

# https://opentelemetry.io/docs/specs/semconv/general/attributes/ and …/rpc/grpc/ and …/gen-ai/
ERROR_TYPE = "error.type"
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.response.status_code"
"""The name of the gRPC status code, e.g. `NOT_FOUND`."""
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"

Attributes = Mapping[str, str | int | float | bool]
SpanStatus = Literal["unset", "ok", "error"]

# ---- ids and the W3C header ------------------------------------------------------------------------------------------

# https://www.w3.org/TR/trace-context/#traceparent-header: version 00 ends after the flags, later ones may go on.
_TRACE_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceParent(NamedTuple):
    """A place in a trace: what a `traceparent` header says."""

    trace_id: int
    span_id: int
    sampled: bool


def derive_trace_id(workflow_id: str) -> int:
    """Returns the trace id (128 bits, not zero) of a run that no caller's trace contains."""
    return _digest(("trace", workflow_id), 16)


def derive_span_id(*parts: str | int) -> int:
    """Returns the span id (64 bits, not zero) of what the parts name; other parts have another id."""
    return _digest(("span", *parts), 8)


def _digest(parts: tuple[str | int, ...], size_bytes: int) -> int:
    text = json.dumps([str(part) for part in parts])  # quoted, so that ("a", "b c") and ("a b", "c") differ
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size_bytes]) or 1


def parse_traceparent(text: str) -> TraceParent | None:
    """Returns what a W3C `traceparent` header says, or None when it is not one."""
    match = _TRACE_PARENT.fullmatch(text)
    if match is None or (match[1] == "00" and match[5] is not None):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    if trace_id == 0 or span_id == 0:
        return None
    return TraceParent(trace_id, span_id, bool(int(match[4], 16) & TraceFlags.SAMPLED))


def format_traceparent(trace_id: int, span_id: int, sampled: bool = True) -> str:
    """Returns the W3C `traceparent` header of a span."""
    return f"00-{trace_id:032x}-{span_id:016x}-{int(sampled):02x}"


class ForcedIds(IdGenerator):
    """Gives a span the ids that were forced for it in this context; all others, e.g. of libraries, are random."""

    _forced: ContextVar[tuple[int, int] | None] = ContextVar("perdure_forced_ids", default=None)
    _random = RandomIdGenerator()

    @contextmanager
    def force(self, trace_id: int, span_id: int) -> Iterator[None]:
        """Makes these the ids of the span that is created inside."""
        token = self._forced.set((trace_id, span_id))
        try:
            yield
        finally:
            self._forced.reset(token)

    def generate_trace_id(self) -> int:
        """Returns the forced trace id, else a random one."""
        forced = self._forced.get()
        return forced[0] if forced else self._random.generate_trace_id()

    def generate_span_id(self) -> int:
        """Returns the forced span id, else a random one."""
        forced = self._forced.get()
        return forced[1] if forced else self._random.generate_span_id()


# ---- spans -----------------------------------------------------------------------------------------------------------


class RunSpan:
    """A span that is open; ends once, with `end` or at the end of a `with`. Never raises. Not tied to a thread."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Span | None, token: Token[Context] | None = None) -> None:
        self._span = span
        self._token = token

    @property
    def recording(self) -> bool:
        """Whether anybody will see it."""
        return self._span is not None and self._span.is_recording()

    def set_attribute(self, name: str, value: str | int | float | bool) -> None:
        """Adds an attribute, one of this module's names."""
        if self._span is not None:
            self._span.set_attribute(name, value)

    def end(self, status: SpanStatus = "unset", error_type: str = "", *, end_ns: int | None = None) -> None:
        """Ends it, at `end_ns` (nanoseconds since 1970) or now. A second end does nothing.

        Args:
            status: How it went; error messages stay out of traces, as they may quote what users wrote.
            error_type: The name of the error's class, or of a status code.
            end_ns: When it ended; None for now.
        """
        span, token, self._span, self._token = self._span, self._token, None, None
        if token is not None:
            # A token of another context (a span ended by another task) cannot be used, and need not be.
            with suppress(ValueError, RuntimeError):
                token.var.reset(token)
        if span is not None:
            span.set_status(StatusCode[status.upper()])
            if error_type:
                span.set_attribute(ERROR_TYPE, error_type)
            span.end(end_ns)

    def __enter__(self) -> RunSpan:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()
        else:
            self.end("error", kind.__qualname__)


class RunTracer:
    """Makes spans with given ids; does nothing, cheaply, when there is nowhere to send them."""

    def __init__(self, provider: TracerProvider | None = None, ids: ForcedIds | None = None) -> None:
        self._tracer = provider.get_tracer("perdure") if provider is not None else None
        self._ids = ids or ForcedIds()

    @property
    def enabled(self) -> bool:
        """Whether spans go anywhere."""
        return self._tracer is not None

    def span(
        self,
        name: str,
        *,
        trace_id: int,
        span_id: int,
        parent_span_id: int | None = None,
        start_ns: int | None = None,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        sampled: bool = True,
        activate: bool = False,
    ) -> RunSpan:
        """Opens a span with exactly these ids.

        Args:
            name: One of this module's names.
            trace_id: The trace, 128 bits.
            span_id: Its own id, 64 bits.
            parent_span_id: The parent's id in the same trace, which may be another process's; None for the root.
            start_ns: When it began, nanoseconds since 1970; None for now.
            attributes: By this module's names.
            kind: As in OpenTelemetry.
            sampled: False when the caller's `traceparent` said so: then nothing is recorded, inside neither.
            activate: Whether it is the current OpenTelemetry span until its end, so that libraries' spans nest in it.
                End it in the task that opened it.
        """
        if self._tracer is None:
            return RunSpan(None)
        span: Span
        if sampled:
            with self._ids.force(trace_id, span_id):
                span = self._tracer.start_span(
                    name, _parent(trace_id, parent_span_id, sampled), kind, dict(attributes or {}), start_time=start_ns
                )
        else:
            span = NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=False))
        return RunSpan(span, _activate(span) if activate else None)

    def record_span(
        self,
        name: str,
        *,
        trace_id: int,
        span_id: int,
        parent_span_id: int | None = None,
        start_ns: int,
        end_ns: int,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        sampled: bool = True,
        status: SpanStatus = "unset",
        error_type: str = "",
    ) -> None:
        """Writes a span that is over; arguments as of `span` and `RunSpan.end`."""
        self.span(
            name, trace_id=trace_id, span_id=span_id, parent_span_id=parent_span_id, start_ns=start_ns,
            attributes=attributes, kind=kind, sampled=sampled,
        ).end(status, error_type, end_ns=end_ns)  # fmt: skip

    def server_span(self, name: str, *, caller: TraceParent | None, attributes: Attributes) -> RunSpan:
        """Opens and activates the span of a gRPC call, a child of the caller's span when there is one."""
        if self._tracer is None:
            return RunSpan(None)
        parent = _parent(*caller) if caller else Context()
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, dict(attributes))
        return RunSpan(span, _activate(span))


def _parent(trace_id: int, span_id: int | None, sampled: bool) -> Context:
    """Returns an OpenTelemetry context whose current span has these ids; an empty one without a span id."""
    if span_id is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    parent = NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags))
    return trace.set_span_in_context(parent, Context())


def _activate(span: Span) -> Token[Context]:
    return attach(trace.set_span_in_context(span))


# ---- where spans go --------------------------------------------------------------------------------------------------


class Telemetry:
    """The process's tracer provider, if there is one, and the tracer that uses it."""

    def __init__(
        self, provider: TracerProvider | None = None, exporter: SpanExporter | None = None, ids: ForcedIds | None = None
    ) -> None:
        self._provider = provider
        self._exporter = exporter
        self.tracer = RunTracer(provider, ids)

    def install(self) -> None:
        """Makes it the provider that libraries (pydantic-ai, openai) find. Once per process; OpenTelemetry's rule."""
        if self._provider is not None:
            trace.set_tracer_provider(self._provider)

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Sends what is left, for at most `timeout_s`; then gives it up. Blocks. Never raises."""
        provider, self._provider = self._provider, None
        if provider is None:
            return

        # The provider's own shutdown waits up to 30 s for an exporter that repeats itself.
        def shut_down() -> None:
            with suppress(Exception):
                provider.shutdown()

        thread = threading.Thread(target=shut_down, name="perdure-telemetry-shutdown", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive() and self._exporter is not None:
            with suppress(Exception):
                self._exporter.shutdown()


def start_telemetry(*, instance_id: str = "", version: str = "") -> Telemetry:
    """Returns the process's telemetry, as OpenTelemetry's own variables want it.

    Spans are exported only when `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set and
    neither `OTEL_SDK_DISABLED=true` nor `OTEL_TRACES_EXPORTER=none`; otherwise nothing is recorded.

    Args:
        instance_id: `service.instance.id`: the executor's id.
        version: `service.version`: the package's version.

    Raises:
        ConfigurationError: The protocol is neither `grpc` nor `http/protobuf`, or another variable is malformed.
    """
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if not endpoint or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return Telemetry()
    queue_size = None if os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") else QUEUE_SIZE
    try:
        exporter = _exporter()
        processor = BatchSpanProcessor(exporter, max_queue_size=queue_size)
    except ValueError as error:
        raise ConfigurationError(f"an OTEL_* variable is malformed: {error}") from error
    ids = ForcedIds()
    provider = TracerProvider(
        sampler=ParentBased(ALWAYS_ON),  # everything, unless a caller's `traceparent` says that nobody looks
        resource=_resource(instance_id, version),
        id_generator=ids,
        shutdown_on_exit=False,  # `Telemetry.shutdown` is bounded, OpenTelemetry's exit hook is not
    )
    provider.add_span_processor(processor)
    return Telemetry(provider, exporter, ids)


def _exporter() -> SpanExporter:
    variable = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    variable = variable if os.environ.get(variable) else "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = os.environ.get(variable, "").strip() or "grpc"
    # Imported here: each takes a tenth of a second, and most processes need none.
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    raise ConfigurationError(f"{variable} is {protocol!r}; it can be grpc (the default) or http/protobuf")


def _resource(instance_id: str, version: str) -> Resource:
    """Returns what all spans say of this process; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` win."""
    ours = {SERVICE_NAME_KEY: SERVICE_NAME, SERVICE_INSTANCE_ID: instance_id, SERVICE_VERSION: version}
    told = OTELResourceDetector().detect().attributes
    return Resource.create().merge(Resource({key: value for key, value in ours.items() if value and key not in told}))
