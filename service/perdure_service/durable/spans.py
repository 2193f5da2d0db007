"""Writes the spans of runs: made by the fold of `domain.trace_fold` from what this process has committed.

What an executor commits in an execution of its own is folded as it is committed, so a step's span is sent when its
checkpoint is. An attempt's span is open, and current, while its body runs, so that what the body does nests in it; it
begins and ends at the times of its events, and what never reached the log is never sent. Everything that an executor
does not see whole is left to the `TraceWriter`, which reads the log: the waits before a claim, an execution that died,
an approval, the end of a run from outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from perdure_service import telemetry
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.domain.runs import RunKey, RunState
from perdure_service.domain.trace import (
    RunLink,
    TracedRun,
    TraceSpan,
    attempt_span_id,
    execution_span_id,
)
from perdure_service.domain.trace_fold import ExecutionFold, ended_run_span
from perdure_service.durable.executions import Execution, StepProgress
from perdure_service.durable.trace_writer import TraceWriter, What
from perdure_service.telemetry import RunSpan, RunTracer, derive_span_id, format_traceparent


class Spans:
    """See the module. Does nothing, cheaply, when there is nowhere to send them."""

    def __init__(self, tracer: RunTracer, executor_id: str = "", writer: TraceWriter | None = None) -> None:
        self._tracer = tracer
        self._executor_id = executor_id
        self._writer = writer

    @staticmethod
    def traceparent_of_execution(workflow_id: str, trace_id: str, execution: int, *, sampled: bool) -> str:
        """Returns what a child run started by this execution has as its caller."""
        return format_traceparent(int(trace_id, 16), execution_span_id(workflow_id, execution), sampled)

    def attempt(self, execution: Execution, step_id: int, step: StepProgress, start_ms: int) -> RunSpan:
        """Opens the span of an attempt and makes it current, so that what its body does nests in it.

        Args:
            execution: Which execution.
            step_id: Which step.
            step: The step; its `attempt` is the one that begins.
            start_ms: When, as the log tells.
        """
        if not self._tracer.enabled:
            return RunSpan(None)
        workflow_id = execution.key.workflow_id
        span_id = attempt_span_id(workflow_id, execution.number, step_id, step.attempt)
        span = self._tracer.span(
            telemetry.ATTEMPT_SPAN,
            trace_id=int(execution.trace_id, 16),
            span_id=span_id,
            parent_span_id=derive_span_id(workflow_id, execution.number, step_id),
            start_ns=start_ms * 1_000_000,
            sampled=execution.sampled,
            activate=True,
        )
        if span.recording:
            execution.attempt_spans[span_id] = span
        return span

    def committed(self, execution: Execution | None, workflow_id: str, packs: Sequence[Pack]) -> None:
        """Is told of events that have just been committed, in the order of a run's log.

        Args:
            execution: The execution of this process that committed them; None for an outside writer.
            workflow_id: Whose log they are in.
            packs: What it was, and where in the log.
        """
        if not self._tracer.enabled:
            return
        events = [
            replace(event, sequence=(pack.first_sequence or 0) + index)
            for pack in packs
            for index, event in enumerate(pack.events)
        ]
        if execution is not None:
            if execution.fold is None:
                run = TracedRun(execution.key, execution.agent, execution.agent_version, execution.trace_id)
                begun_ms = execution.begun_ns // 1_000_000
                execution.fold = ExecutionFold(run, execution.number, self._executor_id, begun_ms)
            for event in events:
                for span in execution.fold.apply(event):
                    self._end(execution, span)
        if self._writer is not None:
            for event in events:
                what = _left_to_the_log(event, outside=execution is None)
                if what is not None:
                    self._writer.ask(workflow_id, what, event.time_ms)

    def run_ended(self, row: Mapping[str, Any], terminal: Event) -> None:
        """Writes the span of a run that an execution of this process has ended.

        Args:
            row: The run's.
            terminal: The last event of its log.
        """
        if not self._tracer.enabled:
            return
        if row["forked_from_workflow_id"] is not None and self._writer is not None:
            self._writer.ask(row["workflow_id"], What.RUN, terminal.time_ms)  # it knows where the origin's span is
            return
        run = traced_run(row)
        record(self._tracer, run, ended_run_span(run, terminal))

    def run_ended_perhaps(self, workflow_id: str) -> None:
        """Makes sure of the span of a run whose end had to be committed twice, so that nobody knows by whom it was."""
        if self._tracer.enabled and self._writer is not None:
            self._writer.ask(workflow_id, What.RUN, 0)

    def executors_gone(self, executor_ids: Sequence[str]) -> None:
        """Makes sure of the spans of runs that executors which are gone had ended just before."""
        if self._tracer.enabled and self._writer is not None:
            self._writer.ask_of(executor_ids)

    def _end(self, execution: Execution, span: TraceSpan) -> None:
        """Sends a span of a live execution: an attempt that is held open ends, all others are written."""
        held = execution.attempt_spans.pop(span.span_id, None)
        if held is None:
            run = TracedRun(execution.key, execution.agent, execution.agent_version, execution.trace_id)
            record(self._tracer, run, span, sampled=execution.sampled)
            return
        for name, value in span.attributes.items():
            held.set_attribute(name, value)
        assert span.end_ms is not None, "the fold returns what has ended"
        held.end(span.status, span.error_type, end_ns=span.end_ms * 1_000_000)


def record(tracer: RunTracer, run: TracedRun, span: TraceSpan, *, sampled: bool | None = None) -> None:
    """Writes a span that has ended."""
    assert span.end_ms is not None, "only what has ended is written"
    tracer.record_span(
        span.name,
        trace_id=int(run.trace_id, 16),
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        start_ns=span.start_ms * 1_000_000,
        end_ns=span.end_ms * 1_000_000,
        attributes=span.attributes,
        links=[link.place for link in span.links],
        sampled=run.sampled if sampled is None else sampled,
        status=span.status,
        error_type=span.error_type,
    )


def traced_run(row: Mapping[str, Any]) -> TracedRun:
    """Returns what the fold must know of a run, from its row and, if it has them, its origin's columns."""
    origin = None
    if row.get("origin_trace_id"):
        origin = RunLink(row["origin_trace_id"], row["forked_from_workflow_id"], row["origin_run_id"])
    return TracedRun(
        RunKey(row["namespace"], row["run_id"], row["workflow_id"]),
        row["agent"],
        row["agent_version"],
        row["trace_id"],
        row["traceparent"],
        int(row["created_at"].timestamp() * 1000),
        origin,
    )


def _left_to_the_log(event: Event, *, outside: bool) -> What | None:
    """Returns what an event ends that its writer cannot tell of, None for nothing."""
    if event.kind is EventKind.APPROVAL_DECIDED:
        return What.APPROVALS
    if event.kind is not EventKind.STATE_CHANGED or not outside:
        return None
    # An outside writer's RUNNING with an executor is a claim; a start that runs at once has waited for nothing.
    claimed = event.data["to"] == RunState.RUNNING and "executor_id" in event.data and "from" in event.data
    return What.LOST if claimed or event.ends_run else None
