"""Makes spans with given ids, and keeps those of libraries random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token

from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags

from perdure_service.telemetry.ids import TraceParent
from perdure_service.telemetry.names import ERROR_TYPE, Attributes, SpanStatus


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
        """Adds an attribute, one of those in `names`."""
        if self._span is not None:
            self._span.set_attribute(name, value)

    def leave(self) -> None:
        """Makes it no longer the current span, and leaves it open: what it is about is over when it is committed."""
        token, self._token = self._token, None
        if token is not None:
            # A token of another context (a span left by another task) cannot be used, and need not be.
            with suppress(ValueError, RuntimeError):
                token.var.reset(token)

    def end(self, status: SpanStatus = "unset", error_type: str = "", *, end_ns: int | None = None) -> None:
        """Ends it, at `end_ns` (nanoseconds since 1970) or now. A second end does nothing.

        Args:
            status: How it went; error messages stay out of traces, as they may quote what users wrote.
            error_type: The name of the error's class, or of a status code.
            end_ns: When it ended; None for now.
        """
        self.leave()
        span, self._span = self._span, None
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
        links: Sequence[TraceParent] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        sampled: bool = True,
        activate: bool = False,
    ) -> RunSpan:
        """Opens a span with exactly these ids.

        Args:
            name: One of those in `names`.
            trace_id: The trace, 128 bits.
            span_id: Its own id, 64 bits.
            parent_span_id: The parent's id in the same trace, which may be another process's; None for the root.
            start_ns: When it began, nanoseconds since 1970; None for now.
            attributes: By the names in `names`.
            links: Spans of other traces that it goes back to.
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
                    name,
                    _parent(trace_id, parent_span_id, sampled),
                    kind,
                    dict(attributes or {}),
                    [Link(_context(*link)) for link in links],
                    start_time=start_ns,
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
        links: Sequence[TraceParent] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        sampled: bool = True,
        status: SpanStatus = "unset",
        error_type: str = "",
    ) -> None:
        """Writes a span that is over; arguments as of `span` and `RunSpan.end`."""
        self.span(
            name, trace_id=trace_id, span_id=span_id, parent_span_id=parent_span_id, start_ns=start_ns,
            attributes=attributes, links=links, kind=kind, sampled=sampled,
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
    return trace.set_span_in_context(NonRecordingSpan(_context(trace_id, span_id, sampled)), Context())


def _context(trace_id: int, span_id: int, sampled: bool) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)


def _activate(span: Span) -> Token[Context]:
    return attach(trace.set_span_in_context(span))
