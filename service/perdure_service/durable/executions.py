"""The executions alive in this process: who owns which run here, and the events that wait for their next commit.

An execution is keyed by (workflow id, ownership token): a run that was given back and taken again by this same
process has two, and the older one is dead. A dead execution is marked here, and each of its next DBOS calls raises.

**The slot.** One unacknowledged pack per run: whoever appends for an execution holds its slot from before the owner's
lock until the COMMIT is known, through all repeats, so that events reach the log in the order in which they happened,
whether they ride on a checkpoint or alone. Lock order: slot, then database rows, always; nobody takes a slot while
holding rows.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from dbos._utils import LoopAwareEvent

from perdure_service.domain.budgets import UNLIMITED, Budget
from perdure_service.domain.events import MAX_TEXT_CHARS, Event, EventKind, Pack
from perdure_service.domain.queues import DEFAULT_QUEUE
from perdure_service.domain.runs import Failure, Run, RunKey, RunState
from perdure_service.domain.trace_fold import ExecutionFold
from perdure_service.durable.hops import Ahead, refuse_to_block
from perdure_service.durable.recording import Recording
from perdure_service.telemetry import RunSpan

AgentKey = tuple[str, str]
"""An agent by name and version; of a workflow that is no agent, what stands before and after the @ of its name."""

REPLAYED_KINDS = frozenset({EventKind.PROGRESS, EventKind.LOG})
"""What a replay must not say again. Text of the workflow's own code is void after a recovery, and is written again."""


def now_ms() -> int:
    """Returns this host's time in milliseconds since 1970: for events, never for decisions."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class StepProgress:
    """What this process knows of a step it runs."""

    name: str
    attempt: int = 0
    next_attempt_ms: int | None = None
    """When the attempt begins that has been announced, milliseconds since 1970; None when none has."""
    wrote_output: bool = False
    preview: str = ""
    error: BaseException | None = None


AT_ONCE_CHARS = 2_048
"""Streamed text that is written at once; less waits for more, or a checkpoint, up to 100 ms."""

KEEP_END_S = 1.0
MAX_ENDS = 1_000
"""How long, and of how many runs at most, the end is kept in memory. As an ended run changes no more, it is what a read
would find, unless the run was deleted meanwhile by another server."""

FEW = 64
"""Among how many executions it is looked for each commit whether one moves alone: it costs microseconds then."""

SETTLE_S = 0.05
"""How long nothing of an execution may have moved before it is parked: between two calls its code is on its way."""


class Slot:
    """What lets one commit of an execution be under way: held by a thread, again and again, or by a commit itself.

    A commit that no thread waits for holds it under its own name, from when its thread has handed it over until
    whoever knows how it ended releases it, or takes it over to find out.
    """

    __slots__ = ("_depth", "_holder", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: object = None
        self._depth = 0

    def acquire(self, *, blocking: bool = True) -> bool:
        """Takes it for this thread, which may have it already; returns whether it has it now."""
        thread = threading.get_ident()
        if self._holder == thread:
            self._depth += 1
            return True
        if not self._lock.acquire(blocking=blocking):
            return False
        self._holder, self._depth = thread, 1
        return True

    def release(self) -> None:
        """Gives it up as often as this thread has taken it."""
        self._depth -= 1
        if not self._depth:
            self.release_by(threading.get_ident())

    @property
    def held(self) -> bool:
        """Whether a commit is under way."""
        return self._holder is not None

    @property
    def held_here(self) -> bool:
        """Whether this thread has it."""
        return self._holder == threading.get_ident()

    @property
    def nested(self) -> bool:
        """Whether this thread, which has it, has taken it more than once."""
        return self._depth > 1

    @property
    def holder(self) -> object:
        """The commit that holds it, or the id of the thread that does; None for nobody."""
        return self._holder

    def hand_to(self, commit: object) -> None:
        """Makes a commit hold what this thread has taken once."""
        assert self._depth == 1, "an outer call of this thread goes on"
        self._holder = commit

    def pass_on(self, commit: object, to: object) -> None:
        """Makes another commit hold what a commit holds."""
        assert self._holder is commit, "the commit does not hold it"
        self._holder = to

    def take_over(self, commit: object) -> None:
        """Makes this thread hold what a commit holds."""
        assert self._holder is commit, "the commit does not hold it"
        self._holder = threading.get_ident()

    def release_by(self, holder: object) -> None:
        """Gives it up for a holder; from any thread."""
        assert self._holder == holder, "it is somebody else's"
        self._holder, self._depth = None, 0
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class LogEnd:
    """The last pack of a run's log, as far as its execution knows: others may append behind it."""

    first: int
    """The sequence of its first event."""
    last: int
    """That of its last."""

    @classmethod
    def of(cls, pack: Pack) -> LogEnd:
        """Returns the end that a pack makes which has its place."""
        assert pack.first_sequence is not None, "it has been written"
        return cls(pack.first_sequence, pack.first_sequence + len(pack.events) - 1)


class Parked(BaseException):
    """Raised into the code of an execution whose run was parked; no failure, so `except Exception` lets it pass."""

    def __init__(self, execution: Execution) -> None:
        super().__init__(f"{execution.key.workflow_id} waits outside of memory")
        self.execution = execution


@dataclass(eq=False, slots=True)
class Wait:
    """A durable wait of an execution.

    Attributes:
        marks: What ends it, as `store.parked` spells it; none when nothing could wake a run that was parked on it.
        deadline: When it ends by itself, on the monotonic clock; None when it does not.
        at_once: Whether its end is known, so that waiting a while first tells nothing.
        event: Set when it may be over, and when the execution is.
    """

    marks: tuple[str, ...]
    deadline: float | None = None
    at_once: bool = False
    event: LoopAwareEvent = field(default_factory=LoopAwareEvent)


@dataclass(eq=False)
class Execution:
    """One execution of one run in this process."""

    key: RunKey
    owner_xid: str
    agent: str
    agent_version: str
    number: int
    trace_id: str
    queue: str = DEFAULT_QUEUE
    """The queue whose limits count for it."""
    sampled: bool = True
    """Whether its caller wanted it traced."""
    begun_ns: int = field(default_factory=time.time_ns)
    """When it began, nanoseconds since 1970: as the event says that told of it."""
    waited_s: float = 0.0
    """How long its run waited for its first execution: since its creation, or the time it was scheduled for."""
    state: RunState = RunState.RUNNING
    dead: str = ""
    """Why it is dead; empty while it lives."""
    retiring: bool = False
    """Whether it may finish the step bodies it is in, and begin nothing more: this executor stops."""
    bodies: int = 0
    """Step bodies in progress."""
    budget: Budget = UNLIMITED
    """What the run may use."""
    tokens: int = 0
    """What its model calls have used: what was committed when it was claimed, and what this execution added."""
    steps_met: int = 0
    """Steps with a body that its code has come to, recorded ones included, so that every replay counts the same."""
    last_failure: Failure | None = None
    """The failure of the step that failed last, to say where a failed run failed."""
    steps: dict[int, StepProgress] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    """The steps whose result was too large, and whose checkpoint says so."""
    counted: bool = False
    """Whether `Executions` counts it."""
    ended: bool = False
    """Whether a commit of this process has ended its run; true before anybody is told of that commit."""
    end: Callable[[], Run] | None = None
    """Returns the run as that commit left it, if it told."""
    task: Any = None
    """The asyncio task of an asynchronous workflow, on DBOS's loop."""
    loop: Any = None
    thread: int = 0
    """The id of the thread of a blocking one."""
    goes_ahead: bool = False
    """Whether its own code may go on with what a step returned before that is committed: unless something is written
    that does not wait for that, as DBOS's data sources do."""
    slot: Slot = field(default_factory=Slot)
    log_end: LogEnd | None = None
    """Where its next pack goes behind; None while it has committed none."""
    unanswered: Any = None
    """What the checkpoint writer was given and did not write, while it waits to be adopted; see `checkpoints`."""
    ahead: Ahead | None = None
    """The step whose commit its code has gone ahead of; see `hops`."""
    last_step: Any = None
    """The row of the step that goes with its run's end; see `checkpoints`."""
    left: bool = False
    """Whether `Executions` has forgotten it: no call of it comes any more that could adopt something."""
    serialization: str | None = None
    """How DBOS stores its input and output, by DBOS's name; None when nobody has looked."""
    replaying: bool = False
    """Whether its code has not yet come to an operation that is not recorded."""
    fold: ExecutionFold | None = None
    """What its committed events say of its spans; None while nobody wants any."""
    attempt_spans: dict[int, RunSpan] = field(default_factory=dict)
    """The spans of attempts that the log does not yet have as over, by their ids."""
    recording: Recording = field(default_factory=Recording)
    """What was recorded of the run when it began."""
    followed: bool = False
    """Whether its code has come to an operation that is recorded."""
    diverged: Failure | None = None
    """Why it must not go on: its replay left the recording. See `replay`."""
    parked: bool = False
    """Whether it is dead because its run waits outside of memory; its code ends with `Parked`."""
    busy: int = 0
    """Calls in progress that do not rest in a durable wait: while there are any, the run is not parked."""
    waits: set[Wait] = field(default_factory=set)
    """The durable waits in which its code rests."""
    touched: float = field(default_factory=time.monotonic)
    """When its code last began or ended a call, on the monotonic clock."""
    told: dict[str, Any] = field(default_factory=dict)
    """What the last change of its state said of the wait."""
    inline: bool = True
    """Whether it runs within the task or thread of the execution that called it, as far as is known."""
    parent: Execution | None = None
    """The execution here that started it."""
    _holds_parent: bool = False
    _replayed_notes: list[Event] = field(default_factory=list)
    _buffer: list[Event] = field(default_factory=list)
    _lent: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _text_chars: int = 0
    """How much streamed text is in the buffer."""
    _wake_writer: Callable[..., None] | None = None

    def note(self, event: Event) -> None:
        """Buffers an event that nobody waits for; it is committed with the next checkpoint, or alone within 100 ms.

        Of streamed text no more than 2 KiB waits.

        Text that continues the last delta of the same stream, step and attempt joins it.
        """
        if event.kind is EventKind.USAGE:
            with self._lock:
                self.tokens += event.data["input_tokens"] + event.data["output_tokens"]
        if self.dead:
            return
        if self.replaying and event.step_id == 0 and event.kind in REPLAYED_KINDS:
            self._replayed_notes.append(event)
            return
        with self._lock:
            last = self._buffer[-1] if self._buffer else None
            if last is not None and _continues(last, event):
                text = last.data["text"] + event.data["text"]
                self._buffer[-1] = replace(last, data={**last.data, "text": text})
            else:
                self._buffer.append(event)
            if event.kind is EventKind.OUTPUT_DELTA:
                self._text_chars += len(event.data["text"])
            at_once = self._text_chars >= AT_ONCE_CHARS
        if self._wake_writer is not None:
            self._wake_writer(self, at_once=at_once)

    def settle(self) -> None:
        """Waits for the commit that its code has gone ahead of, before it does anything durable. Blocks.

        Raises:
            NeedsThread: It must not block here.
            BaseException: The commit could not be, as its step says.
        """
        ahead = self.ahead
        if ahead is not None:
            if not ahead.over:
                refuse_to_block()
            try:
                ahead.wait()
            finally:
                self._caught_up(ahead)

    async def settled(self) -> None:
        """Does what `settle` does, on the loop."""
        ahead = self.ahead
        if ahead is not None:
            try:
                await ahead.settled()
            finally:
                self._caught_up(ahead)

    def _caught_up(self, ahead: Ahead) -> None:
        if ahead.over and self.ahead is ahead:
            self.ahead = None

    def meet_step(self) -> int:
        """Counts a step with a body that the code comes to; returns how many they are with it."""
        with self._lock:
            self.steps_met += 1
            return self.steps_met

    def passed(self, *, recorded: bool) -> None:
        """Is told of every operation that the workflow's code comes to, and whether it had been recorded before.

        What the code says between operations that are recorded, an earlier execution has said. Only what it says
        after the last of them may be new.
        """
        self.followed = self.followed or recorded
        if not self.replaying:
            return
        notes, self._replayed_notes = self._replayed_notes, []
        if not recorded:
            self.replaying = False
            for event in notes:
                self.note(event)

    def event(self, kind: EventKind, data: dict[str, Any], *, step_id: int = 0, attempt: int = 0) -> Event:
        """Returns an event of this execution, now."""
        step = self.steps.get(step_id)
        return Event(kind, now_ms(), data, step_id, step.name if step else "", attempt, self.number)

    def moved(self, to: RunState, **data: Any) -> Event:
        """Returns the event that the run's state changes, and remembers the new state."""
        event = self.event(EventKind.STATE_CHANGED, {"from": self.state.value, "to": to.value, **data})
        self.state = to
        self.told = {name: data[name] for name in ("reason", "waiting_for", "until_ms") if name in data}
        return event

    # ---- parking: see `durable.parking` ------------------------------------------------------------------------------

    def working(self) -> Working:
        """Surrounds a call of the run's code, from before its first to after its last use of the database.

        Raises:
            Parked: The run was parked.
        """
        return Working(self)

    @contextmanager
    def resting(self, wait: Wait) -> Iterator[None]:
        """Surrounds the part of such a call that only waits.

        Raises:
            Parked: The run was parked meanwhile.
        """
        with self._lock:
            self.busy -= 1
            self.waits.add(wait)
        try:
            yield
        finally:
            with self._lock:
                self.busy += 1
                self.waits.discard(wait)
        if self.parked:
            raise Parked(self)

    def work(self) -> None:
        """Begins what `working` surrounds."""
        with self._lock:
            if self.parked:
                raise Parked(self)
            self.busy += 1
            self.touched = time.monotonic()

    def rest(self) -> None:
        """Ends it."""
        with self._lock:
            self.busy -= 1
            self.touched = time.monotonic()

    def touch(self) -> None:
        """Is told that its code moves."""
        self.touched = time.monotonic()

    def begin_under(self, parent: Execution | None) -> None:
        """Keeps the execution that started this one from being parked until this one is known to stand by itself."""
        if parent is None or self.parent is not None:
            return
        self.parent = parent
        with parent._lock:
            parent.busy += 1
        self._holds_parent = True

    def leave_parent(self) -> None:
        """Is called when it runs on its own, or is over."""
        with self._lock:
            held, self._holds_parent = self._holds_parent, False
        if held and self.parent is not None:
            with self.parent._lock:
                self.parent.busy -= 1
                self.parent.touched = time.monotonic()

    def parkable_in(self, park_after_s: float) -> float | None:
        """Returns in how many seconds it may be parked if nothing moves until then; None while it may not."""
        with self._lock:
            return self._parkable_in(park_after_s)

    def park(self, park_after_s: float) -> list[Wait]:
        """Ends it for good, if it may be parked; returns the waits on which its run is to be parked, else none.

        From here on nothing of it begins: what it was about to do is refused, and done by the execution after it.
        """
        with self._lock:
            due_s = self._parkable_in(park_after_s)
            if due_s is None or due_s > 0:
                return []
            self.parked, self.dead = True, "its run is parked"
            return list(self.waits)

    def _parkable_in(self, park_after_s: float) -> float | None:
        if self.dead or self.busy or self.bodies or not self.waits or self.diverged is not None:
            return None
        now = time.monotonic()
        soon = now + max(park_after_s, SETTLE_S)
        if any(not wait.marks or (wait.deadline is not None and wait.deadline <= soon) for wait in self.waits):
            return None
        quiet_s = SETTLE_S if all(wait.at_once for wait in self.waits) else max(park_after_s, SETTLE_S)
        return max(0.0, self.touched + quiet_s - now)

    def begin_body(self) -> None:
        """Counts a step body in progress; blocking steps of one run may be in several threads.

        Raises:
            Parked: The run was parked.
        """
        with self._lock:
            if self.parked:
                raise Parked(self)
            self.bodies += 1

    def end_body(self) -> None:
        """Is called when the body is over."""
        with self._lock:
            self.bodies -= 1

    def take(self) -> list[Event]:
        """Takes the buffered events, for a commit of who has the slot; none while they are lent."""
        with self._lock:
            return [] if self._lent else self._take()

    def lend(self) -> list[Event]:
        """Takes them for a commit that may not come to be, of who has not the slot yet; `end_loan` must follow.

        Nobody takes later events meanwhile, which would come into the log before these.
        """
        with self._lock:
            self._lent = True
            return self._take()

    def end_loan(self) -> None:
        """Is called when what was lent is taken for good, or given back."""
        self._lent = False

    def _take(self) -> list[Event]:
        taken, self._buffer = self._buffer, []
        self._text_chars = 0
        return taken

    def give_back(self, events: list[Event]) -> None:
        """Returns events whose commit failed to the front of the buffer."""
        if events:
            with self._lock:
                self._buffer = events + self._buffer

    # ---- commits of which nobody knows whether they happened: see `durable.checkpoints` ------------------------------

    def leave_unanswered(self, commit: object) -> bool:
        """Keeps a commit, which holds the slot, for the call it is of; returns False when that comes no more."""
        with self._lock:
            self.unanswered = None if self.left else commit
            return not self.left

    def adopt(self, commit: object) -> bool:
        """Lets the call of a commit have it; returns whether it still holds the slot."""
        with self._lock:
            found, self.unanswered = self.unanswered is commit, None
            return found

    def leave(self) -> None:
        """Is told that it is forgotten; gives up what no call of it will adopt."""
        with self._lock:
            self.left = True
            unanswered, self.unanswered = self.unanswered, None
        if unanswered is not None:
            self.slot.release_by(unanswered)

    @property
    def may_go_on(self) -> bool:
        """Whether it may begin something."""
        return not self.dead and not self.retiring

    @property
    def has_events(self) -> bool:
        """Whether events wait."""
        return bool(self._buffer)


@dataclass(frozen=True, slots=True)
class JustEnded:
    """A run that ended here, without all that its execution was."""

    key: RunKey
    end: Callable[[], Run]
    """Returns it as it is since."""


class Working:
    """See `Execution.working`. No generator: each step has three of these."""

    __slots__ = ("_execution",)

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    def __enter__(self) -> None:
        self._execution.work()

    def __exit__(self, *_: object) -> None:
        self._execution.rest()


def _continues(last: Event, event: Event) -> bool:
    return (
        event.kind is EventKind.OUTPUT_DELTA
        and last.kind is EventKind.OUTPUT_DELTA
        and (last.step_id, last.attempt, last.data["stream"]) == (event.step_id, event.attempt, event.data["stream"])
        and len(last.data["text"]) + len(event.data["text"]) <= MAX_TEXT_CHARS
    )


class Executions:
    """The set of live executions of this process, and the dead ones whose code still runs. Thread-safe."""

    def __init__(self, wake_writer: Callable[..., None] | None = None) -> None:
        self._by_key: dict[tuple[str, str], Execution] = {}
        self._dead: WeakValueDictionary[tuple[str, str], Execution] = WeakValueDictionary()
        """Those that were killed, while their code still has them."""
        self._newest: dict[str, Execution] = {}
        """The one that lives, by workflow id."""
        self._ends: dict[str, tuple[float, JustEnded]] = {}
        self._of_queue: Counter[str] = Counter()
        self._of_agent: Counter[AgentKey] = Counter()
        self._lock = threading.Lock()
        self._wake_writer = wake_writer
        self._retiring = 0
        self.wake_waits: Callable[[str], None] = lambda _workflow_id: None
        """Wakes what waits in a run, so that it finds itself dead; set by the system database, which knows them."""
        self.left: Callable[[Execution], None] = lambda _execution: None
        """Is told of every execution that leaves, and has given up its slot; set by the placement."""

    def add(self, execution: Execution, *, perhaps: bool = False) -> Execution:
        """Adds an execution, and marks older ones of the same run dead.

        Args:
            execution: It.
            perhaps: Whether it is of a start that may turn out to be of a run that exists: it ends no other one, and
                is not the newest before `stands`.
        """
        execution._wake_writer = self._wake_writer
        execution.retiring = execution.retiring or self._retiring > 0
        with self._lock:
            older = (
                []
                if perhaps
                else [
                    one
                    for (workflow_id, owner_xid), one in self._by_key.items()
                    if workflow_id == execution.key.workflow_id and owner_xid != execution.owner_xid
                ]
            )
            known = self._by_key.setdefault((execution.key.workflow_id, execution.owner_xid), execution)
            if known is execution and not execution.counted:
                execution.counted = True
                self._count(execution, 1)
            if not perhaps:
                self._newest[execution.key.workflow_id] = known
        for one in older:
            self.kill(one, "another execution of this run began")
        return known

    def stands(self, execution: Execution) -> None:
        """Says that the start has made the run of an execution that was added with `perhaps`."""
        with self._lock:
            if (execution.key.workflow_id, execution.owner_xid) in self._by_key:
                self._newest[execution.key.workflow_id] = execution

    def find(self, workflow_id: str, owner_xid: str | None) -> Execution | None:
        """Returns the execution of a run under an ownership token; also a dead one, whose code has not ended yet."""
        if owner_xid is None:
            return None
        key = (workflow_id, owner_xid)
        return self._by_key.get(key) or self._dead.get(key)

    def has(self, workflow_id: str, owner_xid: str | None) -> bool:
        """Returns whether an execution under an ownership token lives."""
        return (workflow_id, owner_xid) in self._by_key

    def newest(self, workflow_id: str) -> Execution | None:
        """Returns the execution of a run that lives here, if one does."""
        return self._newest.get(workflow_id)

    def of(self, workflow_id: str) -> list[Execution]:
        """Returns the executions of a run."""
        with self._lock:
            return [one for (id_, _), one in self._by_key.items() if id_ == workflow_id]

    def remove(self, execution: Execution) -> None:
        """Forgets an execution that has ended."""
        key = (execution.key.workflow_id, execution.owner_xid)
        with self._lock:
            held = self._by_key.pop(key, None) is not None
            self._dead.pop(key, None)
            if held:
                self._uncount(execution)
            if execution.end is not None:
                self._keep_end(execution)
        execution.leave()
        execution.leave_parent()
        if held:
            self.left(execution)

    def _keep_end(self, execution: Execution) -> None:
        """Keeps how a run ended for those who ask in a moment: they were on their way when it did."""
        assert execution.end is not None
        now = time.monotonic()
        self._ends[execution.key.workflow_id] = now + KEEP_END_S, JustEnded(execution.key, execution.end)
        while self._ends:
            oldest = next(iter(self._ends))
            if self._ends[oldest][0] > now and len(self._ends) <= MAX_ENDS:
                break
            del self._ends[oldest]

    def just_ended(self, workflow_id: str) -> JustEnded | None:
        """Returns how an execution here ended a run a moment ago; from any thread."""
        until, ended = self._ends.get(workflow_id, (0.0, None))
        return ended if time.monotonic() < until else None

    def forget_end(self, workflow_ids: Iterable[str]) -> None:
        """Is told of runs that are deleted."""
        with self._lock:
            for workflow_id in workflow_ids:
                self._ends.pop(workflow_id, None)

    def of_queue(self, queue: str) -> int:
        """Returns how many there are of a queue."""
        return self._of_queue[queue]

    def of_agent(self, agent: AgentKey) -> int:
        """Returns how many there are of an agent."""
        return self._of_agent[agent]

    def _count(self, execution: Execution, change: int) -> None:
        self._of_queue[execution.queue] += change
        self._of_agent[execution.agent, execution.agent_version] += change

    def _uncount(self, execution: Execution) -> None:
        execution.counted = False
        if self._newest.get(execution.key.workflow_id) is execution:
            del self._newest[execution.key.workflow_id]
        self._count(execution, -1)

    def kill(self, execution: Execution, reason: str) -> None:
        """Marks an execution dead: its next DBOS call raises; if it only waits, it is ended now.

        It frees its slot at once, and is remembered until its code has ended: what code that catches everything still
        tries must find that it is dead.
        """
        if execution.dead:
            return
        execution.dead = reason
        execution.take()
        key = (execution.key.workflow_id, execution.owner_xid)
        with self._lock:
            # Its code does not know yet: each of its calls must find it dead, not find nothing and go on unobserved.
            self._dead[key] = execution
            held = self._by_key.pop(key, None) is not None
            if held:
                self._uncount(execution)
        execution.leave_parent()
        self.wake_waits(execution.key.workflow_id)
        self.end_waits(execution)
        if held:
            self.left(execution)

    @staticmethod
    def end_waits(execution: Execution) -> None:
        """Ends what only waits in an execution that is dead."""
        for wait in list(execution.waits):
            wait.event.set()
        loop, task = execution.loop, execution.task
        if loop is None or task is None:
            return

        def cancel_if_waiting() -> None:
            # On the loop's own thread, where `bodies` of an asynchronous step cannot change beneath us.
            if execution.bodies == 0 and not task.done():
                task.cancel()

        if execution.parked:  # the wait that parked it is about to end it; what else its code awaits is not waited for
            loop.call_soon_threadsafe(loop.call_later, SETTLE_S, cancel_if_waiting)
        else:
            loop.call_soon_threadsafe(cancel_if_waiting)

    def retire_all(self) -> None:
        """Lets every execution finish the step bodies it is in, and begin nothing more; also those that come yet."""
        with self._lock:
            self._retiring += 1
        for execution in list(self):
            execution.retiring = True

    def retire_no_more(self) -> None:
        """Undoes one `retire_all` for those that come yet; who was retired then stays so."""
        with self._lock:
            self._retiring -= 1

    @property
    def retired(self) -> list[Execution]:
        """Those that are to be handed over."""
        return [one for one in self if one.retiring]

    def kill_all(self, reason: str) -> None:
        """Marks every execution dead: this executor is over."""
        for execution in list(self):
            self.kill(execution, reason)

    def moving(self, within_s: float) -> int:
        """Returns how many there are whose code has called within the last seconds."""
        since = time.monotonic() - within_s
        return sum(one.touched >= since for one in self)

    def alone(self, within_s: float) -> bool:
        """Returns whether one at most has moved within the last seconds; not when there are too many to look at."""
        there_are = len(self._by_key)
        return there_are <= 1 or (there_are <= FEW and self.moving(within_s) <= 1)

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Execution]:
        with self._lock:
            return iter(list(self._by_key.values()))


@contextmanager
def slot_of(execution: Execution | None, adopted: object = None) -> Iterator[None]:
    """Holds the slot of an execution, if there is one; what an adopted commit holds, it takes over."""
    if execution is None:
        yield
        return
    if adopted is not None and execution.adopt(adopted):
        execution.slot.take_over(adopted)
    else:
        execution.slot.acquire()
    try:
        yield
    finally:
        execution.slot.release()
