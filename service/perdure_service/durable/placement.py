"""Which runs this executor takes, and when it looks for some: slots, limits of agents and queues, and who wakes whom.

**Slots.** An execution holds one from before its claim or start is committed until it leaves `Executions`. What is
about to be taken is reserved first, so that claims of several queues and starts, all at once, never take more than
there is. One claim at a time in a process; starts go on beside it with what it has not reserved.

**Fairness.** A start does not overtake what waits: where the last claim of its queue had to leave something, or
something was queued since, it is queued, too, and claimed in order. An agent that has its share of the slots (all of
them by the number of agents) lets the others go first among equal priorities; nobody keeps a slot free for those who
may come. An agent that must never take all has `max_running`.

**Who waits for what.** A claim that leaves something notes for what: a slot of the executor, the end of a run of its
queue, or of an agent. The end of an execution wakes the queues that wait for it, and no others, so a run that ends
while nothing waits costs no statement. Other executors are told of what is queued, and of the end of a run whose queue
has limits that they share (`announce`); what they were not told of they find by polling.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from perdure_service.agents import catalogue
from perdure_service.domain.queues import QueueLimits
from perdure_service.durable.executions import AgentKey, Execution, Executions

CLAIM_BATCH = 100
"""Runs that one claim takes at most: a fraction of a second's work, and starts go on beside it. If more wait, the next
claim follows at once."""

LOOK_SLOTS = 8
"""Free slots that a claim holds at least, if there are as many, when nothing is known to wait; else half of them."""


@dataclass(slots=True)
class _Waits:
    """What the runs wait for that the last claim of a queue left; empty when it left none."""

    for_slot: bool = False
    for_queue: bool = False
    for_agents: frozenset[AgentKey] = frozenset()

    @property
    def any(self) -> bool:
        """Whether some are known to wait."""
        return self.for_slot or self.for_queue or bool(self.for_agents)

    def blocks(self, agent: AgentKey) -> bool:
        """Whether a new run of this agent would overtake some."""
        return self.for_slot or self.for_queue or agent in self.for_agents

    def ended(self, agent: AgentKey, *, of_this_queue: bool) -> bool:
        """Whether the end of a run of this agent may let one of them go on."""
        return self.for_slot or (self.for_queue and of_this_queue) or agent in self.for_agents


@dataclass(slots=True)
class Room:
    """What a claim under way may take, and what it has taken.

    Attributes:
        queue: The queue.
        total: How many runs at most.
        bounded_by_queue: Whether the queue's own limit on this executor is what bounds `total`.
        agents: How many of each agent that has a limit it may still take.
        share: How many slots an agent may hold before others go first; None when there is one agent only.
        taken: How many runs it has taken.
        left_over: How many it had found and let go, as their agent has no more room.
        limit_reached: Whether a limit that the fleet shares ended it.
        cut_short: Whether it failed when it had taken some: nobody knows what else waits.
    """

    queue: str
    total: int
    bounded_by_queue: bool
    agents: dict[AgentKey, int]
    share: int | None
    taken: int = 0
    left_over: int = 0
    limit_reached: bool = False
    cut_short: bool = False

    @property
    def left(self) -> int:
        """How many it may still take."""
        return self.total - self.taken

    @property
    def full_agents(self) -> frozenset[AgentKey]:
        """The agents of which nothing more may be taken."""
        return frozenset(agent for agent, left in self.agents.items() if left <= 0)


@dataclass(slots=True)
class _Reserved:
    total: int = 0
    queues: Counter[str] = field(default_factory=Counter)
    agents: Counter[AgentKey] = field(default_factory=Counter)


class _Held:
    """Holds a slot of a placement, if there is one: a context manager that says whether."""

    __slots__ = ("_agent", "_child", "_here", "_placement", "_queue")

    def __init__(self, placement: Placement, queue: str, agent: AgentKey, *, child: bool) -> None:
        self._placement, self._queue, self._agent, self._child = placement, queue, agent, child
        self._here = False

    def __enter__(self) -> bool:
        self._here = self._placement._hold_one(self._queue, self._agent, child=self._child)
        return self._here

    def __exit__(self, *_: object) -> None:
        if self._here:
            self._placement._let_go(self._queue, self._agent)


class Placement:
    """See the module. Thread-safe."""

    def __init__(
        self, executions: Executions, max_running: int, limits: Callable[[], Mapping[AgentKey, int]] | None = None
    ) -> None:
        """Creates it, with queues that have no limits.

        Args:
            executions: What this executor runs; it tells when one leaves.
            max_running: How many at once.
            limits: Returns every agent there is and how many of its runs may run here at once, 0 for no limit; by
                default what the catalogue says.
        """
        self._executions = executions
        self._max_running = max_running
        self._limits = limits or catalogue.running_limits
        self._lock = threading.Lock()
        self._claiming = threading.Lock()
        self._reserved = _Reserved()
        self._queues: dict[str, QueueLimits] = {}
        self._waits: dict[str, _Waits] = {}
        self.wake: Callable[[str], None] = lambda _queue: None
        """Makes this process look into a queue now; set by `queue_threads`."""
        self.announce: Callable[[str], None] = lambda _queue: None
        """Tells the other executors to look into a queue; set by the runtime."""
        self.standing_by = False
        """Whether this executor takes nothing, as another region executes the runs of its cell."""
        executions.left = self._left

    def saw(self, limits: QueueLimits) -> None:
        """Takes note of a queue's limits in the database: what some executor has written there counts for all."""
        self._queues[limits.name] = limits

    # ---- starts ------------------------------------------------------------------------------------------------------

    def start(self, queue: str, agent: AgentKey) -> _Held:
        """Says whether a new run begins here at once, and holds a slot for it while its start is committed."""
        return _Held(self, queue, agent, child=False)

    def child(self, queue: str, agent: AgentKey) -> _Held:
        """Says whether a child begins with its parent, and holds its place while its start is committed.

        Not for want of a slot of the executor is it queued: an executor full of parents that wait for their children
        would stand still. The limits of its agent and its queue hold.
        """
        return _Held(self, queue, agent, child=True)

    def _hold_one(self, queue: str, agent: AgentKey, *, child: bool) -> bool:
        """Reserves a slot if a new run may begin here; returns whether."""
        with self._lock:
            here = self._may_begin(queue, agent, child=child)
            if here:
                self._reserve(queue, agent, 1)
        return here

    def _let_go(self, queue: str, agent: AgentKey) -> None:
        with self._lock:
            self._reserve(queue, agent, -1)

    def _may_begin(self, queue: str, agent: AgentKey, *, child: bool) -> bool:
        limits = self._queues.get(queue)
        if self.standing_by or (limits is not None and limits.shared):
            return False
        if limits is not None and limits.worker_concurrency and self._queue_left(limits) <= 0:
            return False
        limit = self._limits().get(agent, 0)
        if limit and self._agent_left(agent, limit) <= 0:
            return False
        if child:
            return True
        waits = self._waits.get(queue)
        return self._slots_left() > 0 and not (waits is not None and waits.blocks(agent))

    def _reserve(self, queue: str, agent: AgentKey, count: int) -> None:
        self._reserved.total += count
        self._reserved.queues[queue] += count
        self._reserved.agents[agent] += count

    def _slots_left(self) -> int:
        return 0 if self.standing_by else self._max_running - len(self._executions) - self._reserved.total

    def _queue_left(self, limits: QueueLimits) -> int:
        running = self._executions.of_queue(limits.name)
        return limits.worker_concurrency - running - self._reserved.queues[limits.name]

    def _agent_left(self, agent: AgentKey, limit: int) -> int:
        return limit - self._executions.of_agent(agent) - self._reserved.agents[agent]

    # ---- claims ------------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, limits: QueueLimits) -> Iterator[Room]:
        """Holds what a claim may take while it is under way; what it has taken then decides who is woken when.

        Args:
            limits: Of the queue, as they are in the database.
        """
        self.saw(limits)
        with self._claiming:
            # Before the claim looks: what is queued from now on is noted beside, and not forgotten with what was.
            before, waits = self._waits.get(limits.name), _Waits()
            self._waits[limits.name] = waits
            with self._lock:
                room = self._room(limits, sure=before is not None and before.any)
                held = replace(room, agents=dict(room.agents))
                self._hold(held, 1)
            try:
                yield room
            except BaseException:
                waits.for_slot = True  # nobody knows what is there
                raise
            finally:
                with self._lock:
                    self._hold(held, -1)
            if room.left <= 0:
                waits.for_queue |= room.bounded_by_queue
                waits.for_slot |= not room.bounded_by_queue
            waits.for_queue |= room.limit_reached
            waits.for_slot |= room.cut_short
            waits.for_agents |= room.full_agents
        if room.left_over or room.cut_short or self._has_room_again(room, limits):
            # There is more than one claim takes, or what it could not take was in the way of others, or it failed, or
            # somebody left before it was noted that this is waited for.
            self.wake(limits.name)

    def _has_room_again(self, room: Room, limits: QueueLimits) -> bool:
        """Returns whether there is what a claim has ended for want of."""
        agents = self._limits()
        if any(self._agent_left(agent, agents.get(agent, 0)) > 0 for agent in room.full_agents):
            return True
        if room.left > 0 or self._slots_left() <= 0:
            return False
        return not room.bounded_by_queue or self._queue_left(limits) > 0

    def _room(self, limits: QueueLimits, *, sure: bool) -> Room:
        agents = self._limits()
        total = min(CLAIM_BATCH, self._slots_left())
        if not sure:
            # A look that will mostly find nothing must not send those to the queue who come to start meanwhile.
            total = min(total, max(LOOK_SLOTS, self._slots_left() // 2))
        bounded_by_queue = False
        if limits.worker_concurrency:
            of_queue = self._queue_left(limits)
            bounded_by_queue = of_queue <= total
            total = min(total, of_queue)
        return Room(
            queue=limits.name,
            total=max(0, total),
            bounded_by_queue=bounded_by_queue,
            agents={agent: self._agent_left(agent, limit) for agent, limit in agents.items() if limit},
            share=math.ceil(self._max_running / len(agents)) if len(agents) > 1 else None,
        )

    def _hold(self, room: Room, sign: int) -> None:
        """Reserves all that a claim may take, or gives it back."""
        self._reserved.total += sign * room.total
        self._reserved.queues[room.queue] += sign * room.total
        for agent, left in room.agents.items():
            self._reserved.agents[agent] += sign * max(0, left)

    def choose(
        self, room: Room, found: Sequence[AgentKey], limit: int, *, fair: bool
    ) -> tuple[list[int], set[AgentKey]]:
        """Chooses among the runs that a claim has found and locked.

        Args:
            room: Of the claim.
            found: The agents of the runs, in the order of the queue.
            limit: How many it has looked for; as many found means that perhaps more wait.
            fair: Whether agents that hold their share let others go first.

        Returns:
            The places in `found` of those that are taken, and the agents that must let others go first.
        """
        chosen: list[int] = []
        over_share: set[AgentKey] = set()
        now: Counter[AgentKey] = Counter()
        for place, agent in enumerate(found):
            if agent in room.agents and room.agents[agent] <= now[agent]:
                room.left_over += 1
            elif (
                fair
                and room.share is not None
                and len(found) >= limit
                and self._executions.of_agent(agent) + now[agent] >= room.share
            ):
                over_share.add(agent)
            else:
                chosen.append(place)
                now[agent] += 1
        for agent, count in now.items():
            if agent in room.agents:
                room.agents[agent] -= count
        room.taken += len(chosen)
        return chosen, over_share

    # ---- who wakes whom ----------------------------------------------------------------------------------------------

    def queued(self, queue: str) -> None:
        """Is told that something was queued, or given back, by this process: it is looked for now."""
        self._waits.setdefault(queue, _Waits()).for_slot = True
        self.wake(queue)
        self.announce(queue)

    def polls(self, queue: str) -> None:
        """Is told that a queue will be looked into, unless it has no room here: then nobody knows what waits."""
        limits = self._queues.get(queue)
        if limits is not None and limits.worker_concurrency and self._queue_left(limits) <= 0:
            self._waits.setdefault(queue, _Waits()).for_queue = True

    def _left(self, execution: Execution) -> None:
        agent = (execution.agent, execution.agent_version)
        for queue, waits in list(self._waits.items()):
            if waits.ended(agent, of_this_queue=queue == execution.queue):
                self.wake(queue)
        limits = self._queues.get(execution.queue)
        if limits is not None and limits.shared:
            self.announce(execution.queue)
