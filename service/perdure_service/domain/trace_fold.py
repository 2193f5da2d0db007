"""Makes the spans of a run out of its log: one pure fold, for what is exported live, after a crash, and on request.

The same events give the same spans, wherever and how often they are folded: ids are derived from what a span is about,
times are those of the events, attributes are what the log and the run's row say. So a span that is written twice (by
the executor that did the work, and by whoever read the log after its death) is one span to every collector.

`ExecutionFold` knows one execution, as its executor sees it; `RunFold` the whole run, by way of the first. The tree:

    run › wait (scheduled, queued, recovery, parked)
        › execution › step › attempt
                    › wait (sleep, signal)
                    › approval
                    › run of a child (whose `traceparent` names this execution)

An execution ends when its run is parked or handed over, and the one that goes on is another. What an executor's death
cut off ends at the recovery, with the error type `ExecutionLost`; what its run's end cut off, with the state in which
the run ended. An approval outlives the execution that asked it. Of an attempt whose beginning did not reach the log
before a crash (events wait up to 100 ms) nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from perdure_service import telemetry
from perdure_service.domain.approvals import ApprovalState
from perdure_service.domain.events import APPROVAL_STEP, Event, EventKind
from perdure_service.domain.runs import WAITING_SIGNAL, RunState
from perdure_service.domain.trace import (
    TracedRun,
    TraceSpan,
    TraceSpanKind,
    attempt_span_id,
    execution_span_id,
    run_span,
    run_span_id,
)
from perdure_service.telemetry import SpanStatus, derive_span_id

RUN_ENDED = "RunEnded"
"""The error type of a step that its run did not wait for."""

USAGE = "usage"
"""The kind of the event that a model call was paid for."""

_NO_STEP = frozenset({APPROVAL_STEP, "DBOS.sleep", "DBOS.recv"})
"""Operations that wait: they are `wait` and `approval` spans, from the events that say so."""


@dataclass(slots=True)
class _OpenStep:
    """A step that has begun and is not over."""

    span: TraceSpan
    attempt: int
    attempt_start_ms: int
    """In the future while the step waits for its next attempt."""
    usage: dict[str, str | int] = field(default_factory=dict)


class ExecutionFold:
    """The spans of one execution; `apply` its events in order and get those that each ends."""

    def __init__(self, run: TracedRun, number: int, executor_id: str, start_ms: int) -> None:
        self._run = run
        self.number = number
        self._attributes = {
            **run.attributes,
            telemetry.EXECUTION: number,
            telemetry.EXECUTOR_ID: executor_id,
        }
        self._span = TraceSpan(
            execution_span_id(run.key.workflow_id, number),
            run_span_id(run.key.workflow_id),
            telemetry.EXECUTION_SPAN,
            TraceSpanKind.EXECUTION,
            run.key.run_id,
            start_ms,
            attributes=self._attributes,
        )
        self._steps: dict[int, _OpenStep] = {}
        self._wait: TraceSpan | None = None
        self.over = False

    def apply(self, event: Event) -> list[TraceSpan]:
        """Returns the spans that an event ends, inner ones first."""
        if self.over:
            return []
        match event.kind:
            case EventKind.STATE_CHANGED:
                return self._moved(event)
            case EventKind.RECOVERED:
                return self._end(event.time_ms, "error", telemetry.ERROR_CUT_OFF, telemetry.ERROR_CUT_OFF)
            case EventKind.STEP_STARTED:
                self._steps[event.step_id] = _OpenStep(self._step(event, event.time_ms), 1, event.time_ms)
                return []
            case EventKind.STEP_RETRYING:
                return self._retrying(event)
            case EventKind.STEP_SUCCEEDED | EventKind.STEP_FAILED:
                return self._step_over(event)
            case _:
                if event.kind == USAGE:
                    self._paid(event)
                return []

    def open_spans(self, now_ms: int | None = None) -> list[TraceSpan]:
        """Returns the spans that have not ended, outer ones first; an attempt that is yet to come is none."""
        if self.over:
            return []
        found = [self._span]
        for step in self._steps.values():
            found.append(step.span)
            if now_ms is None or step.attempt_start_ms <= now_ms:
                found.append(self._attempt(step))
        if self._wait is not None:
            found.append(self._wait)
        return found

    # ---- states ------------------------------------------------------------------------------------------------------

    def _moved(self, event: Event) -> list[TraceSpan]:
        state = RunState(event.data["to"])
        if state.terminal:
            cut_off = RUN_ENDED if state is RunState.SUCCEEDED else state.value
            return self._end(event.time_ms, *_outcome(event), cut_off)
        if event.data.get("parked"):
            return self._end(event.time_ms, "unset", "", "")
        if event.data.get("handed_over"):
            return self._end(event.time_ms, "unset", "", telemetry.ERROR_CUT_OFF)
        if state in (RunState.QUEUED, RunState.SCHEDULED) or event.execution > self.number:
            return self._end(event.time_ms, "error", telemetry.ERROR_CUT_OFF, telemetry.ERROR_CUT_OFF)
        closed = self._end_wait(event.time_ms)
        waiting_for = str(event.data.get("waiting_for") or "")
        if state is RunState.SLEEPING:
            self._wait = self._waiting(event, telemetry.WAIT_SLEEP)
        elif state is RunState.AWAITING_INPUT and waiting_for.startswith(WAITING_SIGNAL):
            self._wait = self._waiting(event, telemetry.WAIT_SIGNAL, waiting_for.partition(":")[2])
        return closed

    def _waiting(self, event: Event, what: str, signal: str = "") -> TraceSpan:
        attributes = {**self._attributes, telemetry.WAITING_FOR: what}
        if signal:
            attributes[telemetry.SIGNAL_NAME] = signal
        return _wait_span(self._run, event, f"{what} {signal}".strip(), self._span.span_id, attributes)

    def _end_wait(self, at_ms: int) -> list[TraceSpan]:
        wait, self._wait = self._wait, None
        return [] if wait is None else [wait.ended(at_ms)]

    def _end(self, at_ms: int, status: SpanStatus, error_type: str, cut_off: str) -> list[TraceSpan]:
        closed = self._end_wait(at_ms)
        for step in self._steps.values():
            if step.attempt_start_ms <= at_ms:
                closed.append(self._attempt(step).ended(at_ms, "error", cut_off))
            closed.append(step.span.ended(at_ms, "error", cut_off))
        self._steps.clear()
        self.over = True
        return [*closed, self._span.ended(at_ms, status, error_type)]

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _step(self, event: Event, start_ms: int) -> TraceSpan:
        return TraceSpan(
            derive_span_id(self._run.key.workflow_id, self.number, event.step_id),
            self._span.span_id,
            telemetry.step_span_name(event.step_name),
            TraceSpanKind.STEP,
            self._run.key.run_id,
            start_ms,
            attributes={
                **self._attributes,
                telemetry.STEP_ID: event.step_id,
                telemetry.STEP_NAME: event.step_name,
            },
        )

    def _attempt(self, step: _OpenStep) -> TraceSpan:
        step_id = int(step.span.attributes[telemetry.STEP_ID])
        return replace(
            step.span,
            span_id=attempt_span_id(self._run.key.workflow_id, self.number, step_id, step.attempt),
            parent_span_id=step.span.span_id,
            name=telemetry.ATTEMPT_SPAN,
            kind=TraceSpanKind.ATTEMPT,
            start_ms=step.attempt_start_ms,
            attributes={**step.span.attributes, telemetry.ATTEMPT: step.attempt, **step.usage},
        )

    def _retrying(self, event: Event) -> list[TraceSpan]:
        step = self._steps.get(event.step_id)
        if step is None:
            return []
        failed = self._attempt(step).ended(event.time_ms, "error", _type_of(event))
        step.attempt = max(1, event.attempt) + 1
        step.attempt_start_ms = next_attempt_ms(event)
        step.usage = {}
        return [failed]

    def _step_over(self, event: Event) -> list[TraceSpan]:
        failed = event.kind is EventKind.STEP_FAILED
        status: SpanStatus = "error" if failed else "ok"
        error_type = _type_of(event) if failed else ""
        step = self._steps.pop(event.step_id, None)
        if step is None:
            if event.step_name in _NO_STEP:
                return []
            begun_ms = event.time_ms - int(event.data.get("duration_ms", 0))
            return [self._step(event, begun_ms).ended(event.time_ms, status, error_type)]
        step.attempt_start_ms = min(step.attempt_start_ms, event.time_ms)
        attempt_error = _last_attempt_type(event) if failed else ""
        return [
            self._attempt(step).ended(event.time_ms, status, attempt_error),
            step.span.ended(event.time_ms, status, error_type),
        ]

    def _paid(self, event: Event) -> None:
        step = self._steps.get(event.step_id)
        if step is None or event.attempt != step.attempt:
            return
        for name, member in ((telemetry.INPUT_TOKENS, "input_tokens"), (telemetry.OUTPUT_TOKENS, "output_tokens")):
            step.usage[name] = int(step.usage.get(name, 0)) + int(event.data.get(member, 0))


class RunFold:
    """The spans of a whole run; `apply` all events of its log in order and get those that each ends."""

    def __init__(self, run: TracedRun) -> None:
        self._run = run
        self._execution: ExecutionFold | None = None
        self._number = 0
        self._wait: TraceSpan | None = None
        self._approvals: dict[int, TraceSpan] = {}
        self._over = False
        self.cut_ms: int | None = None
        """When the last execution that is over was last known to be at work; None when none is over."""

    def apply(self, event: Event) -> list[TraceSpan]:
        """Returns the spans that an event ends, inner ones first."""
        match event.kind:
            case EventKind.STATE_CHANGED:
                return self._moved(event)
            case EventKind.RECOVERED:
                return self._recovered(event)
            case EventKind.APPROVAL_REQUESTED:
                self._approvals[event.step_id] = self._asked(event)
                return []
            case EventKind.APPROVAL_DECIDED:
                return self._decided(event)
            case _:
                return self._in_execution(event)

    def open_spans(self, now_ms: int | None = None) -> list[TraceSpan]:
        """Returns the spans that have not ended, outer ones first; see `ExecutionFold.open_spans`."""
        found = [] if self._over else [run_span(self._run, self._number)]
        if self._wait is not None:
            found.append(self._wait)
        if self._execution is not None:
            found += self._execution.open_spans(now_ms)
        return [*found, *self._approvals.values()]

    def _in_execution(self, event: Event) -> list[TraceSpan]:
        return [] if self._execution is None else self._execution.apply(event)

    def _moved(self, event: Event) -> list[TraceSpan]:
        state = RunState(event.data["to"])
        waits = state in (RunState.QUEUED, RunState.SCHEDULED)
        if self._execution is not None and not self._execution.over and (waits or state.terminal):
            self.cut_ms = event.time_ms
        closed = self._in_execution(event)
        begins = state is RunState.RUNNING and event.execution > self._number
        if event.data.get("parked"):
            self.cut_ms = event.time_ms
            self._wait = self._waiting(event, telemetry.WAIT_PARKED)
            return closed
        if begins or waits or state.terminal:
            closed += self._end_wait(event.time_ms)
        if begins:
            self._number, self._over = event.execution, False  # over: a foreign client may revive a run that ended
            executor_id = str(event.data.get("executor_id", ""))
            self._execution = ExecutionFold(self._run, event.execution, executor_id, event.time_ms)
        elif waits:
            what = telemetry.WAIT_QUEUED if state is RunState.QUEUED else telemetry.WAIT_SCHEDULED
            self._wait = self._waiting(event, what)
            if event.sequence == 1:
                self._wait = replace(self._wait, start_ms=self._run.create_ms)
        elif state.terminal:
            self._over = True
            closed += [span.ended(event.time_ms) for span in self._approvals.values()]
            self._approvals.clear()
            closed.append(ended_run_span(self._run, event))
        return closed

    def _end_wait(self, at_ms: int) -> list[TraceSpan]:
        wait, self._wait = self._wait, None
        return [] if wait is None else [wait.ended(at_ms)]

    def _waiting(self, event: Event, what: str) -> TraceSpan:
        attributes = {**self._run.attributes, telemetry.WAITING_FOR: what}
        return _wait_span(self._run, event, what, run_span_id(self._run.key.workflow_id), attributes)

    def _recovered(self, event: Event) -> list[TraceSpan]:
        closed = self._in_execution(event)
        seen_ms = event.time_ms - int(event.data.get("gap_ms", 0))
        self.cut_ms = seen_ms
        gap = replace(self._waiting(event, telemetry.WAIT_RECOVERY), start_ms=seen_ms)
        lost = {telemetry.FROM_EXECUTOR_ID: str(event.data.get("from_executor_id", ""))}
        return [*closed, gap.ended(event.time_ms, more=lost)]

    def _asked(self, event: Event) -> TraceSpan:
        run = self._run
        return TraceSpan(
            derive_span_id(run.key.workflow_id, event.execution, event.step_id),
            execution_span_id(run.key.workflow_id, event.execution),
            telemetry.APPROVAL_SPAN,
            TraceSpanKind.APPROVAL,
            run.key.run_id,
            event.time_ms,
            attributes={
                **run.attributes,
                telemetry.EXECUTION: event.execution,
                telemetry.STEP_ID: event.step_id,
                telemetry.APPROVAL_ID: str(event.data.get("approval_id", "")),
            },
        )

    def _decided(self, event: Event) -> list[TraceSpan]:
        asked = self._approvals.pop(event.step_id, None)
        if asked is None:
            return []
        state = str(event.data.get("state", ""))
        more: dict[str, str | int] = {telemetry.APPROVAL_STATE: state}
        if event.data.get("decided_by"):
            more[telemetry.DECIDED_BY] = str(event.data["decided_by"])
        return [asked.ended(event.time_ms, "ok" if state == ApprovalState.APPROVED else "unset", more=more)]


def fold_trace(run: TracedRun, events: Iterable[Event], now_ms: int | None = None) -> list[TraceSpan]:
    """Returns all spans that a run's log tells of, in no special order, those that go on included.

    Args:
        run: The run.
        events: Its whole log, in order.
        now_ms: The time, so that an attempt that is yet to come is left out; None to show it.
    """
    fold = RunFold(run)
    found = {span.span_id: span for event in events for span in fold.apply(event)}
    return [*found.values(), *(span for span in fold.open_spans(now_ms))]


def ended_run_span(run: TracedRun, terminal: Event) -> TraceSpan:
    """Returns the span of a run that has ended, from the last event of its log."""
    return run_span(run, terminal.execution).ended(terminal.time_ms, *_outcome(terminal))


def _outcome(terminal: Event) -> tuple[SpanStatus, str]:
    """Returns status and error type of a run, and of the execution in which it ended."""
    state = RunState(terminal.data["to"])
    if state is RunState.SUCCEEDED:
        return "ok", ""
    failure = terminal.data.get("failure") or {}
    return "error", str(failure.get("type") or state.value)


def next_attempt_ms(retrying: Event) -> int:
    """Returns when the attempt begins that a `step_retrying` event announces."""
    return retrying.time_ms + int(retrying.data.get("delay_ms", 0))


def _wait_span(
    run: TracedRun, event: Event, what: str, parent_span_id: int, attributes: Mapping[str, str | int]
) -> TraceSpan:
    """Returns the span of a wait that an event begins, or tells of; its number in the log makes the id."""
    return TraceSpan(
        derive_span_id(run.key.workflow_id, "wait", event.sequence),
        parent_span_id,
        telemetry.wait_span_name(what),
        TraceSpanKind.WAIT,
        run.key.run_id,
        event.time_ms,
        attributes=attributes,
    )


def _type_of(event: Event) -> str:
    error: Mapping[str, Any] = event.data.get("error") or {}
    return str(error.get("type") or "Error")


def _last_attempt_type(event: Event) -> str:
    """Returns the class of what the last attempt of a step raised: the cause, when its retries were used up."""
    error: Mapping[str, Any] = event.data.get("error") or {}
    cause = str(error.get("cause") or "").partition(":")[0] if error.get("retryable") else ""
    return cause or _type_of(event)
