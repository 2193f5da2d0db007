"""What a person watching a run wants to know, folded from its events; rendering is elsewhere.

A `RunView` is a value: `view.apply(event)` returns the next one. So another thread may draw it at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from perdure_client._events import (
    ApprovalDecided,
    ApprovalRequested,
    ArtifactWritten,
    AttemptReset,
    ChildStarted,
    LogLine,
    ModelUsage,
    OutputDelta,
    Published,
    Recovered,
    RunEvent,
    RunForked,
    SignalReceived,
    StateChanged,
    StepFailed,
    StepRetrying,
    StepStarted,
    StepSucceeded,
)
from perdure_client._types import Approval, ApprovalState, Failure, JsonValue, Progress, Run, RunState, StepState, Usage

TAIL_CHARACTERS = 8_000
"""How much of a stream's text is kept: what a large terminal can show."""
NOTES = 50
"""How many notes are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """A step as its watcher sees it.

    Attributes:
        step_id: The engine's number of the operation.
        name: Its name.
        state: Where it stands; INTERRUPTED while it waits to run again after a recovery.
        attempt: The attempt that runs, or ran last.
        max_attempts: How many there are at most; 0 for unknown.
        start_time: When it began, in this execution.
        end_time: When it ended; None while it has not.
        duration: How long it took, as the server measured it; None while it has not ended.
        error: The error of its last failed attempt; None once it has succeeded.
        next_attempt_time: When it will be tried again; None unless it waits for that.
        preview: The beginning of its output.
        child_run_id: The run it started; empty for none.
    """

    step_id: int
    name: str
    state: StepState = StepState.RUNNING
    attempt: int = 1
    max_attempts: int = 0
    start_time: datetime | None = None
    end_time: datetime | None = None
    duration: timedelta | None = None
    error: Failure | None = None
    next_attempt_time: datetime | None = None
    preview: str = ""
    child_run_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalView:
    """A question of the run.

    Attributes:
        approval_id: What to decide with.
        title: What is asked.
        deadline_time: Until when; None for no deadline.
        state: Where it stands.
        decided_by: Who decided; empty while nobody has.
        comment: The comment given with the decision.
    """

    approval_id: str
    title: str = ""
    deadline_time: datetime | None = None
    state: ApprovalState = ApprovalState.PENDING
    decided_by: str = ""
    comment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A line for people: a log line, a signal, a recovery.

    Attributes:
        time: When.
        text: What.
        level: `debug`, `info`, `warning` or `error`.
    """

    time: datetime | None
    text: str
    level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run as its watcher sees it.

    Attributes:
        run_id: Its id.
        agent: Its agent; empty before the snapshot.
        agent_version: The agent's version.
        state: What it is doing.
        state_reason: Why.
        until_time: Until when it sleeps; None for not at all.
        create_time: When it was created.
        start_time: When it first began.
        end_time: When it ended; None while it has not.
        execution: How often it has begun: 1, and one more for every recovery and wake.
        recoveries: How often it was given back after its executor was gone.
        standstill: How long it stood still in all, until it was given back.
        steps: By step_id, in the order in which they began.
        streams: The end of every stream's text, by (step_id, name of the stream), the latest last.
        published: What it published, by key.
        approvals: Its questions by approval_id, in the order in which they were asked.
        progress: The last progress.
        notes: The last lines for people.
        failure: Why it failed.
        output: What it returned; only after `with_run`.
        trace_id: Its trace; empty for none.
        usage: What its model calls used, as far as the view knows.
        last_sequence: The last event seen.
        known_sequence: The last event that the snapshot's state includes already.
        event_execution: The execution of the last event seen; the snapshot's may be ahead of it.
    """

    run_id: str
    agent: str = ""
    agent_version: str = ""
    state: RunState = RunState.UNKNOWN
    state_reason: str = ""
    until_time: datetime | None = None
    create_time: datetime | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    execution: int = 0
    recoveries: int = 0
    standstill: timedelta = timedelta()
    steps: Mapping[int, StepView] = field(default_factory=dict[int, StepView])
    streams: Mapping[tuple[int, str], str] = field(default_factory=dict[tuple[int, str], str])
    published: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    approvals: Mapping[str, ApprovalView] = field(default_factory=dict[str, ApprovalView])
    progress: Progress | None = None
    notes: tuple[Note, ...] = ()
    failure: Failure | None = None
    output: JsonValue = None
    trace_id: str = ""
    usage: Usage = field(default_factory=Usage)
    last_sequence: int = 0
    known_sequence: int = 0
    event_execution: int = 0

    @property
    def pending_approvals(self) -> tuple[ApprovalView, ...]:
        """The questions that wait for a decision; none once the run has ended."""
        return (
            () if self.state.terminal else tuple(a for a in self.approvals.values() if a.state is ApprovalState.PENDING)
        )

    def with_run(self, run: Run) -> RunView:
        """Returns the view with what the run itself says: a snapshot at the beginning, or the result at the end."""
        return replace(
            self._interrupted() if run.done else self,
            agent=run.agent,
            agent_version=run.agent_version,
            state=run.state,
            state_reason=run.state_reason,
            create_time=run.create_time or self.create_time,
            start_time=run.start_time or self.start_time,
            end_time=run.end_time,
            execution=max(run.execution, self.execution),
            progress=run.progress or self.progress,
            failure=run.failure,
            output=run.output,
            trace_id=run.trace_id,
            usage=run.usage or self.usage,
            known_sequence=run.last_sequence,
        )

    def with_approvals(self, approvals: Iterable[Approval]) -> RunView:
        """Returns the view with questions that were asked before the first event it will see."""
        asked = {a.approval_id: _approval_view(a) for a in approvals}
        return replace(self, approvals={**asked, **self.approvals})

    def apply(self, event: RunEvent) -> RunView:
        """Returns the view after an event; the same view for an event it has seen."""
        if event.sequence <= self.last_sequence:
            return self
        view = replace(
            self._next_execution(event.execution), run_id=event.run_id or self.run_id, last_sequence=event.sequence
        )
        match event.data:
            case StateChanged():
                return view._change_state(event, event.data)
            case StepStarted() | StepRetrying() | StepSucceeded() | StepFailed() | ChildStarted():
                return view._change_step(event)
            case OutputDelta(stream=stream, text=text):
                key = (event.step_id, stream)
                others = {k: v for k, v in view.streams.items() if k != key}
                tail = (view.streams.get(key, "") + text)[-TAIL_CHARACTERS:]
                return replace(view, streams={**others, key: tail})
            case AttemptReset():
                kept = {key: text for key, text in view.streams.items() if key[0] != event.step_id}
                return replace(view, streams=kept)
            case Progress():
                return replace(view, progress=event.data)
            case Published(key=key, value=value):
                return replace(view, published={**view.published, key: value})
            case ApprovalRequested() | ApprovalDecided():
                return view._change_approval(event.data)
            case SignalReceived(name=name, sender=sender):
                return view._note(event, f"signal {name}" + (f" from {sender}" if sender else ""))
            case Recovered(gap=gap):
                text = f"recovered after its executor was gone; stood still for {gap.total_seconds():.1f} s"
                view = replace(view, recoveries=view.recoveries + 1, standstill=view.standstill + gap)
                return view._interrupted()._note(event, text, "warning")
            case LogLine(message=message, level=level):
                return view._note(event, message, level)
            case ModelUsage(input_tokens=sent, output_tokens=received):
                if event.sequence <= view.known_sequence:
                    return view  # the snapshot counts it
                usage = Usage(
                    input_tokens=view.usage.input_tokens + sent, output_tokens=view.usage.output_tokens + received
                )
                return replace(view, usage=usage)
            case ArtifactWritten(name=name, size_bytes=size_bytes):
                return view._note(event, f"artifact {name} ({size_bytes} bytes)")
            case RunForked(from_run_id=origin, from_step_id=step_id):
                return view._note(event, f"forked from {origin}, goes on at step {step_id}")
            case _:  # of a newer server
                return view

    def _next_execution(self, execution: int) -> RunView:
        """Returns the view in the event's execution; what ran in an earlier one does not run any more."""
        if execution <= self.event_execution:
            return self
        return replace(self._interrupted(), execution=max(execution, self.execution), event_execution=execution)

    def _change_state(self, event: RunEvent, change: StateChanged) -> RunView:
        view = self
        if event.sequence > self.known_sequence:  # else the snapshot is newer
            view = replace(
                view,
                state=change.to_state,
                state_reason=change.reason,
                until_time=change.until_time,
                failure=change.failure or view.failure,
            )
            if change.to_state.terminal:
                view = replace(view, end_time=event.event_time)
        if change.to_state is RunState.RUNNING and view.start_time is None:
            view = replace(view, start_time=event.event_time)
        if change.to_state is RunState.QUEUED or change.to_state.terminal:
            view = view._interrupted()
        return replace(view, create_time=view.create_time or event.event_time)

    def _change_step(self, event: RunEvent) -> RunView:
        step = self.steps.get(event.step_id) or StepView(
            step_id=event.step_id, name=event.step_name, start_time=event.event_time
        )
        attempt = max(1, event.attempt)
        match event.data:
            case StepStarted(max_attempts=max_attempts):
                step = replace(
                    StepView(step_id=event.step_id, name=event.step_name, start_time=event.event_time),
                    attempt=attempt,
                    max_attempts=max_attempts,
                )
            case StepRetrying(error=error, delay=delay):
                again = event.event_time + delay if event.event_time else None
                step = replace(step, state=StepState.RUNNING, attempt=attempt + 1, error=error, next_attempt_time=again)
            case StepSucceeded(duration=duration, output_preview=preview):
                step = replace(_ended(step, event, StepState.SUCCEEDED, duration), error=None, preview=preview)
            case StepFailed(error=error, duration=duration):
                step = replace(_ended(step, event, StepState.FAILED, duration), error=error)
            case ChildStarted(child_run_id=child_run_id):
                step = replace(_ended(step, event, StepState.SUCCEEDED, None), child_run_id=child_run_id)
            case _:
                pass
        return replace(self, steps={**self.steps, event.step_id: step})

    def _change_approval(self, data: ApprovalRequested | ApprovalDecided) -> RunView:
        known = self.approvals.get(data.approval_id) or ApprovalView(approval_id=data.approval_id)
        if isinstance(data, ApprovalRequested):
            approval = replace(known, title=data.title, deadline_time=data.deadline_time)
        else:
            approval = replace(known, state=data.state, decided_by=data.decided_by, comment=data.comment)
        return replace(self, approvals={**self.approvals, data.approval_id: approval})

    def _interrupted(self) -> RunView:
        """Returns the view after the execution died: what ran will run again, or never ends."""
        if not any(step.state is StepState.RUNNING for step in self.steps.values()):
            return self
        steps = {
            step_id: replace(step, state=StepState.INTERRUPTED, next_attempt_time=None)
            if step.state is StepState.RUNNING
            else step
            for step_id, step in self.steps.items()
        }
        return replace(self, steps=steps)

    def _note(self, event: RunEvent, text: str, level: str = "info") -> RunView:
        return replace(self, notes=(*self.notes, Note(time=event.event_time, text=text, level=level))[-NOTES:])


def _ended(step: StepView, event: RunEvent, state: StepState, duration: timedelta | None) -> StepView:
    attempt = max(step.attempt, event.attempt)
    return replace(
        step, state=state, attempt=attempt, end_time=event.event_time, duration=duration, next_attempt_time=None
    )


def _approval_view(approval: Approval) -> ApprovalView:
    return ApprovalView(
        approval_id=approval.approval_id,
        title=approval.title,
        deadline_time=approval.deadline_time,
        state=approval.state,
        decided_by=approval.decided_by,
        comment=approval.comment,
    )
