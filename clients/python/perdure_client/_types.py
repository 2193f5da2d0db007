"""What the library returns: runs, steps, approvals and agents as frozen values, apart from the wire's messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, TypeAlias

JsonValue: TypeAlias = Any
"""Parsed JSON: None, bool, int, float, str, and lists and dicts of them."""


class RunState(StrEnum):
    """What a run is doing."""

    UNKNOWN = "UNKNOWN"
    """A state that this version of the library does not know; the server is newer."""
    SCHEDULED = "SCHEDULED"
    """Waits for its start time; it has never begun."""
    QUEUED = "QUEUED"
    """Waits for an executor with a free slot, at first or after a recovery."""
    RUNNING = "RUNNING"
    """An executor runs its code."""
    AWAITING_INPUT = "AWAITING_INPUT"
    """Waits for a decision or a signal."""
    SLEEPING = "SLEEPING"
    """Waits for a durable sleep to end."""
    SUCCEEDED = "SUCCEEDED"
    """Ended with an output."""
    FAILED = "FAILED"
    """Ended with an error; see `Run.failure`."""
    CANCELLED = "CANCELLED"
    """Ended by a cancellation of it, or of its parent."""
    EXPIRED = "EXPIRED"
    """Ended because its deadline passed."""

    @property
    def terminal(self) -> bool:
        """Whether the run has ended: nothing follows."""
        return self in _TERMINAL


_TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.EXPIRED})


class StepState(StrEnum):
    """Where a step stands."""

    UNKNOWN = "UNKNOWN"
    """A state that this version of the library does not know; the server is newer."""
    RUNNING = "RUNNING"
    """Its body runs, or waits for its next attempt."""
    SUCCEEDED = "SUCCEEDED"
    """Done; it never runs again."""
    FAILED = "FAILED"
    """Failed for good."""
    INTERRUPTED = "INTERRUPTED"
    """Its execution died in it; it runs again, or its run ended first."""


class StrandedReason(StrEnum):
    """Why nobody continues a run."""

    UNKNOWN = "UNKNOWN"
    """A reason that this version of the library does not know; the server is newer."""
    NO_EXECUTOR_OF_VERSION = "NO_EXECUTOR_OF_VERSION"
    """No living executor has its application version."""
    NO_EXECUTOR_OF_AGENT = "NO_EXECUTOR_OF_AGENT"
    """Executors of its application version live, and none of them has its agent."""
    NO_SUCH_QUEUE = "NO_SUCH_QUEUE"
    """No executor takes from its queue."""


class ExecutorState(StrEnum):
    """Whether an executor is alive."""

    UNKNOWN = "UNKNOWN"
    """A state that this version of the library does not know; the server is newer."""
    ALIVE = "ALIVE"
    """Its lease holds."""
    EXPIRED = "EXPIRED"
    """Its lease has expired, and nobody has taken its runs back yet."""
    GONE = "GONE"
    """It was declared gone, or stopped; its runs were given back."""
    DRAINING = "DRAINING"
    """It stops: it takes no more runs and gives back those it has."""
    STANDING_BY = "STANDING_BY"
    """Its lease holds, and it takes no runs: another region executes those of its cell."""


class ApprovalState(StrEnum):
    """Where an approval stands."""

    UNKNOWN = "UNKNOWN"
    """A state that this version of the library does not know; the server is newer."""
    PENDING = "PENDING"
    """Waits for a decision."""
    APPROVED = "APPROVED"
    """Decided: yes."""
    REJECTED = "REJECTED"
    """Decided: no."""
    EXPIRED = "EXPIRED"
    """Its deadline passed; `Approval.on_timeout` says what the agent was told."""
    WITHDRAWN = "WITHDRAWN"
    """Its run ended before a decision."""


class TimeoutOutcome(StrEnum):
    """What happens when nobody decides an approval before its deadline."""

    UNKNOWN = "UNKNOWN"
    """An outcome that this version of the library does not know; the server is newer."""
    REJECT = "REJECT"
    """The agent is told no."""
    APPROVE = "APPROVE"
    """The agent is told yes."""
    FAIL_RUN = "FAIL_RUN"
    """The run fails."""


class Decision(StrEnum):
    """A decision about an approval."""

    APPROVE = "APPROVE"
    """Yes."""
    REJECT = "REJECT"
    """No."""


class ConflictPolicy(StrEnum):
    """What a start does when its run_id exists already."""

    USE_EXISTING = "USE_EXISTING"
    """The same agent and input: return the existing run. Otherwise raise `RunInputMismatch`."""
    FAIL = "FAIL"
    """Raise `RunConflict`, unless the run was started by an earlier repeat of this very call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress as an agent reports it.

    Attributes:
        message: What is being done, for people.
        completed: How many units are done; 0 when the agent does not count.
        total: How many units there are; 0 when the agent does not know.
    """

    message: str = ""
    completed: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the model calls of a run used, failed attempts included.

    Attributes:
        input_tokens: Tokens sent.
        output_tokens: Tokens received.
    """

    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Sent and received together: what an agent's `max_tokens` bounds."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run, or a step, failed.

    Attributes:
        type: The name of the error's class.
        message: The error's message.
        step_name: The step that raised it; empty when it was not a step.
        retryable: Whether running the same again may succeed (the retries of a step were used up).
        cause: The class and message of the error's cause; empty for none.
    """

    type: str
    message: str = ""
    step_name: str = ""
    retryable: bool = False
    cause: str = ""

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactInfo:
    """What is known of an artifact.

    Attributes:
        name: Its name; empty for an input or output.
        media_type: Its media type, as `text/csv`.
        size_bytes: How many bytes it has.
        sha256: Their SHA-256 (hex).
    """

    name: str
    media_type: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One durable execution of an agent. All times are timezone-aware (UTC), by the database's clock.

    Attributes:
        namespace: The namespace the run belongs to.
        run_id: Its id, unique within its namespace. A child of run `a` is `a.<step>`.
        agent: The name of the agent.
        agent_version: The version of the agent that runs.
        input_sha256: SHA-256 (hex) of the canonical JSON of agent and input as they were sent.
        state: What the run is doing.
        state_reason: Why it is in this state, for people; empty when there is nothing to say.
        create_time: When it was created.
        start_time: When it first began to run; None while it never has.
        end_time: When it ended; None while it has not.
        deadline_time: When it will be ended as EXPIRED; None for never.
        execution: How often an executor has begun or continued it: 1 at first, one more for every recovery and wake.
        executor_id: The executor that runs it, or ran it last; empty while none has.
        progress: The last progress the agent reported; None for none.
        pending_approvals: How many approvals of this run wait for a decision.
        input: What it was started with, as parsed JSON; None where it was not asked for (`list`, `get(full=False)`).
        output: What it returned, as parsed JSON, once SUCCEEDED; None before, and where it was not asked for.
        failure: Why it failed, once FAILED.
        labels: The labels given at the start.
        context_id: The caller's grouping of runs; empty for none.
        parent_run_id: The run that started this one; empty for a run started by a client.
        trace_id: The W3C trace id (32 hex digits) of the run's one trace; empty for none.
        last_sequence: The number of events the run has: the sequence of its last event.
        usage: What its model calls used; None while nothing was reported.
        caller: Who started it, or whose run started it; empty where nobody knows.
        forked_from_run_id: The run that it was forked from; empty for none.
        forked_from_step_id: The first step that it ran itself, when it was forked; else 0.
        queue: The queue whose limits count for it.
        priority: Its place among the waiting runs of the queue: the lower the sooner.
        input_bytes: How many bytes the input has as JSON; 0 where it was not asked for.
        output_bytes: The same of the output; 0 while there is none.
        home_region: The region where it lives; empty where the service has no regions.
    """

    namespace: str
    run_id: str
    agent: str
    agent_version: str = ""
    input_sha256: str = ""
    state: RunState
    state_reason: str = ""
    create_time: datetime | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    deadline_time: datetime | None = None
    execution: int = 0
    executor_id: str = ""
    progress: Progress | None = None
    pending_approvals: int = 0
    input: JsonValue = None
    output: JsonValue = None
    failure: Failure | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    context_id: str = ""
    parent_run_id: str = ""
    trace_id: str = ""
    last_sequence: int = 0
    usage: Usage | None = None
    caller: str = ""
    forked_from_run_id: str = ""
    forked_from_step_id: int = 0
    queue: str = ""
    priority: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    home_region: str = ""

    @property
    def done(self) -> bool:
        """Whether the run has ended, well or not."""
        return self.state.terminal

    @property
    def succeeded(self) -> bool:
        """Whether the run has ended with an output."""
        return self.state is RunState.SUCCEEDED


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRun(Run):
    """The run that `start` or `fork` returns.

    Attributes:
        created: Whether this call created the run; False when this very run existed, made by another call.
    """

    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What `delete_runs` has deleted, or would delete.

    Attributes:
        deleted_count: How many runs, children included. Too low by what a call deleted whose answer was lost.
        sample_run_ids: Some of them, at most 100; the oldest first.
        more: Whether even more would be deleted than `validate_only` has counted.
        unfinished_run_ids: Those of the given runs that were left alone: they, a child of theirs, or a run that may
            still read their result, have not ended.
        missing_run_ids: Those of the given runs that do not exist (any more).
    """

    deleted_count: int = 0
    sample_run_ids: tuple[str, ...] = ()
    more: bool = False
    unfinished_run_ids: tuple[str, ...] = ()
    missing_run_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A unit of a run with its own checkpoint.

    Attributes:
        step_id: The engine's number of the operation within the run.
        step_name: Its name.
        state: Where it stands.
        attempts: How many attempts it took, in its last execution.
        execution: The execution of the run it last ran in.
        start_time: When it began.
        end_time: When it ended; None while it has not.
        error: Its last error; None for none.
        output_preview: The beginning of its output, for people.
        child_run_id: The run it started; empty when it started none.
    """

    step_id: int
    step_name: str
    state: StepState
    attempts: int = 0
    execution: int = 0
    start_time: datetime | None = None
    end_time: datetime | None = None
    error: Failure | None = None
    output_preview: str = ""
    child_run_id: str = ""

    @property
    def duration(self) -> timedelta | None:
        """How long it took, all attempts and delays together; None while it has not ended."""
        return self.end_time - self.start_time if self.start_time and self.end_time else None


class SpanKind(StrEnum):
    """What a span of a trace is about."""

    UNKNOWN = "UNKNOWN"
    """Something that this version of the library does not know; the server is newer."""
    RUN = "RUN"
    """A run, from its creation to its end."""
    EXECUTION = "EXECUTION"
    """One execution of a run, by one executor."""
    STEP = "STEP"
    """A step, all attempts and delays together."""
    ATTEMPT = "ATTEMPT"
    """One try of a step."""
    WAIT = "WAIT"
    """A time in which the run waited: in the queue, for a signal, for a sleep to end."""
    APPROVAL = "APPROVAL"
    """A question put to a person, until it was answered."""


class SpanStatus(StrEnum):
    """How what a span is about went."""

    UNSET = "UNSET"
    """Not over, or neither good nor bad."""
    OK = "OK"
    """It succeeded."""
    ERROR = "ERROR"
    """It failed, or was cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLink:
    """A span of another run that a span goes back to.

    Attributes:
        trace_id: Its W3C trace id (32 hex digits).
        span_id: Its span id (16 hex digits).
        run_id: The run it is the span of.
    """

    trace_id: str
    span_id: str
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSpan:
    """A span of a run's trace, as it is exported.

    Attributes:
        span_id: Its id (16 hex digits).
        parent_span_id: Its parent's id; the caller's span is one that the trace does not contain. Empty for none.
        name: Its name.
        kind: What it is about.
        run_id: The run it belongs to.
        start_time: When it began.
        end_time: When it ended; None while it has not.
        status: How it went.
        error_type: The class of its error, or what cut it off; empty for none.
        attributes: What else is known of it; numbers as text.
        links: What it goes back to.
    """

    span_id: str
    parent_span_id: str = ""
    name: str
    kind: SpanKind
    run_id: str
    start_time: datetime | None = None
    end_time: datetime | None = None
    status: SpanStatus = SpanStatus.UNSET
    error_type: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])
    links: tuple[SpanLink, ...] = ()

    @property
    def duration(self) -> timedelta | None:
        """How long it took; None while it has not ended."""
        return self.end_time - self.start_time if self.start_time and self.end_time else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTrace:
    """A run's trace.

    Attributes:
        trace_id: The W3C trace id (32 hex digits).
        spans: The spans, parents before children, siblings by their beginning.
        truncated: Whether there are more spans than one answer holds, and the last ones are missing.
    """

    trace_id: str
    spans: tuple[TraceSpan, ...]
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A question put to a person.

    Attributes:
        approval_id: `<run_id>/<step>`, unique within the namespace.
        namespace: The namespace of the run.
        run_id: The run that waits.
        agent: The agent of that run.
        step_id: The step that waits.
        title: What is asked, for people.
        payload: What it is about, as parsed JSON.
        answer_schema: The JSON Schema that an answer must satisfy; None when any answer, or none, will do.
        assignees: Who is asked, in the words of the agent; empty for anyone. Not enforced.
        create_time: When it was asked.
        deadline_time: Until when it can be decided; None for no deadline.
        on_timeout: What happens then.
        state: Where it stands.
        decided_by: Who decided; empty while nobody has.
        decide_time: When it was decided, expired or was withdrawn; None while it is pending.
        comment: The comment given with the decision.
        answer: The answer given with the decision, as parsed JSON.
        revision: Grows with every change; `decide` gives it back, so that you decide what you saw.
    """

    approval_id: str
    namespace: str
    run_id: str
    agent: str = ""
    step_id: int = 0
    title: str = ""
    payload: JsonValue = None
    answer_schema: JsonValue = None
    assignees: tuple[str, ...] = ()
    create_time: datetime | None = None
    deadline_time: datetime | None = None
    on_timeout: TimeoutOutcome = TimeoutOutcome.REJECT
    state: ApprovalState
    decided_by: str = ""
    decide_time: datetime | None = None
    comment: str = ""
    answer: JsonValue = None
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentInfo:
    """An agent that can be started.

    Attributes:
        agent: Its name.
        agent_version: Its version.
        description: What it does, for people.
        input_schema: The JSON Schema of its input; None when it does not say.
        output_schema: The JSON Schema of its output; None when it does not say.
        current: Whether `start` takes this version when it is given none.
        max_steps: How many steps a run of it may begin; 0 for no limit.
        max_tokens: How many tokens the model calls of a run may use; 0 for no limit.
        queue: The queue of its runs when a start names none; empty means the default queue.
        max_running: How many runs of it one executor runs at once; 0 for no limit but the executor's own.
    """

    agent: str
    agent_version: str
    description: str = ""
    input_schema: JsonValue = None
    output_schema: JsonValue = None
    current: bool = False
    max_steps: int = 0
    max_tokens: int = 0
    queue: str = ""
    max_running: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo:
    """A process that executes runs, by the database's clock.

    Attributes:
        executor_id: Its id, new at every start.
        address: Where it listens, for people: host name and port.
        application_version: The application version of its runs.
        region: The region that it is in; empty without regions.
        state: Whether it is alive.
        running: Runs that it executes now, those that wait included.
        max_running: How many it executes at most.
        start_time: When it started.
        expire_time: When its lease expires, or expired.
    """

    executor_id: str
    address: str = ""
    application_version: str = ""
    region: str = ""
    state: ExecutorState
    running: int = 0
    max_running: int = 0
    start_time: datetime | None = None
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueInfo:
    """A queue: limits that runs share over the whole fleet. 0 means no limit.

    Attributes:
        queue: Its name.
        worker_concurrency: How many of its runs one executor runs at once.
        global_concurrency: How many of its runs the whole fleet runs at once.
        rate_limit: How many of its runs begin in each `rate_period`, over the whole fleet.
        rate_period: The period of `rate_limit`; None without one.
        queued: Runs of it that wait for a slot now.
        running: Runs of it that are running now.
        oldest_queued_time: When the run that waits longest began to; None when none waits.
    """

    queue: str
    worker_concurrency: int = 0
    global_concurrency: int = 0
    rate_limit: int = 0
    rate_period: timedelta | None = None
    queued: int = 0
    running: int = 0
    oldest_queued_time: datetime | None = None


class SurvivalGoal(StrEnum):
    """What the database of a cell survives without losing what was committed."""

    UNKNOWN = "UNKNOWN"
    """A goal that this version of the library does not know; the server is newer."""
    REGION = "REGION"
    """The loss of a region."""
    ZONE = "ZONE"
    """The loss of a zone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellInfo:
    """A cell: one home database and the executors that serve it.

    Attributes:
        cell: Its name: what the ids begin with that its servers make.
        home_region: Its home region.
        secondary_region: The region that has the next copies of its data; empty for none.
        survival_goal: What its database survives.
        database: Its database.
        address: Where servers of other cells reach its servers.
        standby_address: Where those are that take over when its region is lost; empty for none.
        namespaces: Those whose home it is.
        served_here: Whether the server that was asked serves it.
        reachable: Whether one of its servers answered the one that was asked.
        serving_region: The region whose executors take its runs. This and what follows only of a cell with
            `served_here`.
        epoch: How often it has got another serving region, from 1.
        claim_time: When it got the serving region; None while that is its home since ever.
        executors: How many living executors take its runs.
        standing_by: How many living executors stand by for it.
    """

    cell: str
    home_region: str
    secondary_region: str = ""
    survival_goal: SurvivalGoal = SurvivalGoal.UNKNOWN
    database: str = ""
    address: str = ""
    standby_address: str = ""
    namespaces: tuple[str, ...] = ()
    served_here: bool = False
    reachable: bool = False
    serving_region: str = ""
    epoch: int = 0
    claim_time: datetime | None = None
    executors: int = 0
    standing_by: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StrandedRun:
    """A run that no living executor can continue.

    Attributes:
        namespace: The namespace of the run.
        run_id: The run.
        agent: Its agent.
        agent_version: The version of its agent.
        application_version: The version of the deployment that its executor must have.
        state: What it is doing, or would be.
        reason: Why nobody continues it.
        advice: What can be done, for people.
        create_time: When it was created.
    """

    namespace: str
    run_id: str
    agent: str = ""
    agent_version: str = ""
    application_version: str = ""
    state: RunState
    reason: StrandedReason
    advice: str = ""
    create_time: datetime | None = None
