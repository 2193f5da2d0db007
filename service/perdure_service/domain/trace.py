"""What a span of a run is: its id, its name, what it carries, and the order in which a tree of them is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from perdure_service import telemetry
from perdure_service.domain.runs import RunKey
from perdure_service.telemetry import SpanStatus, TraceParent, derive_span_id, parse_traceparent


class TraceSpanKind(StrEnum):
    """What a span is about; names as in the API without their prefix."""

    RUN = "RUN"
    EXECUTION = "EXECUTION"
    STEP = "STEP"
    ATTEMPT = "ATTEMPT"
    WAIT = "WAIT"
    APPROVAL = "APPROVAL"


@dataclass(frozen=True, slots=True)
class RunLink:
    """The span of another run that a run goes back to."""

    trace_id: str
    workflow_id: str
    run_id: str

    @property
    def span_id(self) -> int:
        """The id of that run's span."""
        return run_span_id(self.workflow_id)

    @property
    def place(self) -> TraceParent:
        """The span as a tracer wants it."""
        return TraceParent(int(self.trace_id, 16), self.span_id, sampled=True)


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """A span. Times in milliseconds since 1970; `end_ms` is None while what it is about goes on."""

    span_id: int
    parent_span_id: int | None
    name: str
    kind: TraceSpanKind
    run_id: str
    start_ms: int
    end_ms: int | None = None
    status: SpanStatus = "unset"
    error_type: str = ""
    attributes: Mapping[str, str | int] = field(default_factory=dict)
    links: tuple[RunLink, ...] = ()

    def ended(
        self,
        at_ms: int,
        status: SpanStatus = "unset",
        error_type: str = "",
        more: Mapping[str, str | int] | None = None,
    ) -> TraceSpan:
        """Returns it as it is when it is over. Clocks of two hosts may disagree; nothing ends before it begins."""
        return replace(
            self,
            end_ms=max(at_ms, self.start_ms),
            status=status,
            error_type=error_type,
            attributes={**self.attributes, **(more or {})},
        )


@dataclass(frozen=True, slots=True)
class TracedRun:
    """What is known of a run beside its log.

    Attributes:
        traceparent: The span that started it, W3C; empty for none.
        create_ms: When it was created, milliseconds since 1970.
        forked_from: The run whose steps it took over.
    """

    key: RunKey
    agent: str
    agent_version: str
    trace_id: str
    traceparent: str = ""
    create_ms: int = 0
    forked_from: RunLink | None = None

    @property
    def sampled(self) -> bool:
        """Whether its caller wanted it traced."""
        caller = parse_traceparent(self.traceparent)
        return caller.sampled if caller else True

    @property
    def attributes(self) -> dict[str, str | int]:
        """What each of its spans carries."""
        return {
            telemetry.RUN_ID: self.key.run_id,
            telemetry.NAMESPACE: self.key.namespace,
            telemetry.AGENT: self.agent,
            telemetry.AGENT_VERSION: self.agent_version,
        }


def run_span_id(workflow_id: str) -> int:
    """Returns the id of a run's span."""
    return derive_span_id(workflow_id, "run")


def execution_span_id(workflow_id: str, execution: int) -> int:
    """Returns the id of the span of an execution, the parent of its steps and of the runs that it starts."""
    return derive_span_id(workflow_id, execution)


def attempt_span_id(workflow_id: str, execution: int, step_id: int, attempt: int) -> int:
    """Returns the id of an attempt's span, the parent of what its body does."""
    return derive_span_id(workflow_id, execution, step_id, attempt)


def run_span(run: TracedRun, execution: int = 0) -> TraceSpan:
    """Returns the span of a run that goes on, under its caller's span if it had one."""
    caller = parse_traceparent(run.traceparent)
    return TraceSpan(
        run_span_id(run.key.workflow_id),
        caller.span_id if caller else None,
        telemetry.run_span_name(run.agent),
        TraceSpanKind.RUN,
        run.key.run_id,
        run.create_ms,
        attributes={**run.attributes, telemetry.EXECUTION: execution},
        links=(run.forked_from,) if run.forked_from else (),
    )


def in_tree_order(spans: Iterable[TraceSpan]) -> Iterator[TraceSpan]:
    """Yields spans as a tree is read: each parent before its children, siblings by their beginning."""
    all_spans = list(spans)
    known = {span.span_id for span in all_spans}
    below: dict[int | None, list[TraceSpan]] = {}
    for span in all_spans:
        below.setdefault(span.parent_span_id if span.parent_span_id in known else None, []).append(span)
    stack = sorted(below.get(None, ()), key=_place)[::-1]
    while stack:
        span = stack.pop()
        yield span
        stack += sorted(below.get(span.span_id, ()), key=_place)[::-1]


def _place(span: TraceSpan) -> tuple[int, int]:
    # What ends first comes first of those that begin in one millisecond: an execution after the wait for it.
    return span.start_ms, span.end_ms if span.end_ms is not None else 2**63
