"""What happened in a run: the events of its log, each with a kind and data of that kind's own type.

For example: `match event.data: case StepRetrying(error=error, delay=delay): …`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeAlias

from perdure_client._types import ApprovalState, Failure, JsonValue, Progress, Run, RunState


class EventKind(StrEnum):
    """The kind of an event; it names the type of `RunEvent.data`."""

    UNKNOWN = "unknown"
    """`UnknownData`: the server is newer than this library."""
    STATE_CHANGED = "state_changed"
    """`StateChanged`: the first event of every run and, with a terminal state, its last."""
    STEP_STARTED = "step_started"
    """`StepStarted`: a step's body begins for the first time in this execution."""
    STEP_RETRYING = "step_retrying"
    """`StepRetrying`: an attempt failed and will be repeated."""
    STEP_SUCCEEDED = "step_succeeded"
    """`StepSucceeded`: a step is done, and its checkpoint is committed."""
    STEP_FAILED = "step_failed"
    """`StepFailed`: a step failed for good, and its checkpoint is committed."""
    OUTPUT_DELTA = "output_delta"
    """`OutputDelta`: a piece of streamed text."""
    ATTEMPT_RESET = "attempt_reset"
    """`AttemptReset`: every earlier delta of this event's step is void."""
    PROGRESS = "progress"
    """`Progress`: the agent reported progress."""
    PUBLISHED = "published"
    """`Published`: the agent published a value (DBOS `set_event`)."""
    APPROVAL_REQUESTED = "approval_requested"
    """`ApprovalRequested`: the agent asked for a decision."""
    APPROVAL_DECIDED = "approval_decided"
    """`ApprovalDecided`: a decision was made, or the deadline made it."""
    SIGNAL_RECEIVED = "signal_received"
    """`SignalReceived`: a signal arrived."""
    CHILD_STARTED = "child_started"
    """`ChildStarted`: the run started a child run."""
    RECOVERED = "recovered"
    """`Recovered`: the run's executor was gone, and the run was given back to the queue."""
    LOG = "log"
    """`LogLine`: a line the agent logged for its watchers."""
    USAGE = "usage"
    """`ModelUsage`: a model call was paid for."""
    FORKED = "forked"
    """`RunForked`: the run goes on from the recorded steps of another one."""
    ARTIFACT = "artifact"
    """`ArtifactWritten`: the agent wrote an artifact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """The run's state changed.

    Attributes:
        from_state: The state before; None in the first event.
        to_state: The state from now on. The same as before when the run was parked: it waits on, outside of memory.
        reason: Why, for people; empty when there is nothing to say.
        failure: Why it failed, when `to_state` is FAILED.
        until_time: Until when, when `to_state` is SLEEPING or SCHEDULED.
        executor_id: The executor that takes the run, when `to_state` is RUNNING.
    """

    to_state: RunState
    from_state: RunState | None = None
    reason: str = ""
    failure: Failure | None = None
    until_time: datetime | None = None
    executor_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted:
    """A step's body begins.

    Attributes:
        max_attempts: How many attempts the step has at most; 0 when the server does not say.
    """

    max_attempts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRetrying:
    """An attempt failed and will be repeated.

    Attributes:
        error: The error of the attempt.
        delay: How long until the next attempt.
    """

    error: Failure
    delay: timedelta = timedelta()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSucceeded:
    """A step is done.

    Attributes:
        duration: How long it took, all attempts and delays together.
        output_preview: The beginning of its output, for people; may be cut.
        output_bytes: The size of the stored output.
    """

    duration: timedelta = timedelta()
    output_preview: str = ""
    output_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """A step failed for good.

    Attributes:
        error: The error that the agent's code sees.
        duration: How long it took, all attempts and delays together.
    """

    error: Failure
    duration: timedelta = timedelta()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDelta:
    """A piece of streamed text. Pieces of one stream and step, joined in order, are its text.

    Attributes:
        stream: The name of the stream.
        text: The text to append.
    """

    stream: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReset:
    """Every earlier `OutputDelta` of this event's step is void: the attempt that wrote it died or failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A value the agent published under a key; a later one under the same key replaces it.

    Attributes:
        key: The key.
        value: The value, as parsed JSON.
    """

    key: str
    value: JsonValue = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRequested:
    """The agent asked for a decision.

    Attributes:
        approval_id: What to decide with: `client.approve(approval_id)`.
        title: What is asked, for people.
        deadline_time: Until when; None for no deadline.
    """

    approval_id: str
    title: str = ""
    deadline_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalDecided:
    """A decision was made.

    Attributes:
        approval_id: Which approval.
        state: What was decided.
        decided_by: Who decided; empty when the deadline or the end of the run did.
        comment: The comment given with the decision.
    """

    approval_id: str
    state: ApprovalState
    decided_by: str = ""
    comment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalReceived:
    """A signal arrived.

    Attributes:
        name: The name of the signal.
        payload_bytes: The size of its payload.
        sender: Who sent it.
    """

    name: str
    payload_bytes: int = 0
    sender: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildStarted:
    """The run started a child run.

    Attributes:
        child_run_id: The child's id.
    """

    child_run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The run was given back to the queue after its executor was gone.

    Attributes:
        from_executor_id: The executor that was gone.
        gap: How long the run stood still: from the executor's last sign of life to now.
    """

    from_executor_id: str = ""
    gap: timedelta = timedelta()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line the agent logged for its watchers.

    Attributes:
        message: The text.
        level: `debug`, `info`, `warning` or `error`.
    """

    message: str
    level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUsage:
    """A model call was paid for, whatever became of its step.

    Attributes:
        model: The model's name; empty when the agent did not say.
        input_tokens: Tokens sent.
        output_tokens: Tokens received.
    """

    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForked:
    """The run goes on from the recorded steps of another one; the events about those follow, with execution 0.

    Attributes:
        from_run_id: The run whose steps it took over.
        from_step_id: The first step that it runs itself.
    """

    from_run_id: str
    from_step_id: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactWritten:
    """The agent wrote an artifact; `Client.read_artifact` reads it. Of several of one name the last one is read.

    Attributes:
        name: Its name within the run.
        media_type: Its media type.
        size_bytes: How many bytes it has.
        sha256: Their SHA-256 (hex).
    """

    name: str
    media_type: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownData:
    """What happened is of a kind that this version of the library does not know; the server is newer."""


EventData: TypeAlias = (
    StateChanged
    | StepStarted
    | StepRetrying
    | StepSucceeded
    | StepFailed
    | OutputDelta
    | AttemptReset
    | Progress
    | Published
    | ApprovalRequested
    | ApprovalDecided
    | SignalReceived
    | ChildStarted
    | Recovered
    | LogLine
    | ModelUsage
    | RunForked
    | ArtifactWritten
    | UnknownData
)
"""The types of `RunEvent.data`."""

_KIND_OF: dict[type[EventData], EventKind] = {
    StateChanged: EventKind.STATE_CHANGED,
    StepStarted: EventKind.STEP_STARTED,
    StepRetrying: EventKind.STEP_RETRYING,
    StepSucceeded: EventKind.STEP_SUCCEEDED,
    StepFailed: EventKind.STEP_FAILED,
    OutputDelta: EventKind.OUTPUT_DELTA,
    AttemptReset: EventKind.ATTEMPT_RESET,
    Progress: EventKind.PROGRESS,
    Published: EventKind.PUBLISHED,
    ApprovalRequested: EventKind.APPROVAL_REQUESTED,
    ApprovalDecided: EventKind.APPROVAL_DECIDED,
    SignalReceived: EventKind.SIGNAL_RECEIVED,
    ChildStarted: EventKind.CHILD_STARTED,
    Recovered: EventKind.RECOVERED,
    LogLine: EventKind.LOG,
    ModelUsage: EventKind.USAGE,
    RunForked: EventKind.FORKED,
    ArtifactWritten: EventKind.ARTIFACT,
    UnknownData: EventKind.UNKNOWN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """One change in a run.

    Attributes:
        sequence: The number of the event in its run: 1, 2, 3 … without gaps.
        event_time: When it happened, by the clock of the process that recorded it.
        run_id: The run it belongs to.
        step_id: The step it is about; 0 for none.
        step_name: The name of that step; empty for none.
        attempt: The try of that step, from 1; 0 when it is not about a try.
        execution: The execution of the run it happened in, from 1; 0 before the first.
        data: What happened; its type says of which kind.
    """

    sequence: int
    event_time: datetime | None = None
    run_id: str
    step_id: int = 0
    step_name: str = ""
    attempt: int = 0
    execution: int = 0
    data: EventData

    @property
    def kind(self) -> EventKind:
        """What kind of event it is."""
        return _KIND_OF[type(self.data)]

    @property
    def ends_run(self) -> bool:
        """Whether this is the last event of its run."""
        return isinstance(self.data, StateChanged) and self.data.to_state.terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchUpdate:
    """A piece of a run's stream.

    Attributes:
        events: What is new, each run's in order; may be empty where one of the other attributes is news.
        cursor: Give it to `watch(cursor=…)` to continue after this update, in any process.
        snapshot: The run as it was when the connection was made, without input and output; None but in the first
            update, and in the first after every reconnect.
        last_sequence: The sequence of the last event seen of the watched run.
        caught_up: Whether everything that existed when this was sent has been sent, of every run in the view.
        end_of_run: Whether the run, and its children where they are in the view, has ended; this is the last update.
    """

    events: tuple[RunEvent, ...] = field(default=())
    cursor: str = ""
    snapshot: Run | None = None
    last_sequence: int = 0
    caught_up: bool = False
    end_of_run: bool = False
