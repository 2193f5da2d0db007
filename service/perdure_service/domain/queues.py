"""What a queue is: a name, and limits that its runs share, on one executor or over the whole fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from perdure_service.errors import ConfigurationError, InvalidArgument
from perdure_service.settings import QueueSettings

DEFAULT_QUEUE = "perdure"
"""The queue of runs that neither their caller nor their agent gave another one."""

MAX_PRIORITY = 2**31 - 1
"""What the column in DBOS's table holds."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """A queue's limits; 0 means none.

    Attributes:
        name: The queue's.
        worker_concurrency: How many of its runs one executor runs at once.
        global_concurrency: How many of its runs the fleet runs at once.
        rate_limit: How many of its runs begin, or go on, in each `rate_period_s`, over the fleet.
        rate_period_s: The period of `rate_limit`, in seconds.
    """

    name: str
    worker_concurrency: int = 0
    global_concurrency: int = 0
    rate_limit: int = 0
    rate_period_s: float = 0.0

    @property
    def shared(self) -> bool:
        """Whether executors share a limit of it: only a claim, which locks the queue, can keep it."""
        return bool(self.global_concurrency or self.rate_limit)


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue as operators see it.

    Attributes:
        limits: What is in force: as the executor that started last has written it.
        queued: How many of its runs wait for a slot.
        running: How many of its runs are running.
        oldest_queued_time: Since when the run waits that waits longest; None when none does.
    """

    limits: QueueLimits
    queued: int
    running: int
    oldest_queued_time: datetime | None


class Queues:
    """The queues that a deployment has declared, the default one among them."""

    def __init__(self, declared: Iterable[QueueLimits] = ()) -> None:
        """Creates them; the default queue has no limits unless it is declared with some."""
        self._limits = {one.name: one for one in declared}
        self._limits.setdefault(DEFAULT_QUEUE, QueueLimits(DEFAULT_QUEUE))

    @classmethod
    def of_settings(cls, declared: Mapping[str, QueueSettings]) -> Queues:
        """Returns the queues that the settings declare."""
        return cls(
            QueueLimits(
                name,
                one.worker_concurrency or 0,
                one.global_concurrency or 0,
                one.rate_limit or 0,
                one.rate_period.total_seconds() if one.rate_period else 0.0,
            )
            for name, one in declared.items()
        )

    @property
    def names(self) -> list[str]:
        """The names of all, in order."""
        return sorted(self._limits)

    @property
    def limits(self) -> list[QueueLimits]:
        """All, by name."""
        return [self._limits[name] for name in self.names]

    def of_start(self, asked: str, of_agent: str) -> str:
        """Returns the queue of a new run: the one asked for, else its agent's, else the default one.

        Raises:
            InvalidArgument: The queue asked for is not declared; it names those that are.
        """
        if asked and asked not in self._limits:
            raise InvalidArgument("queue", f"there is no queue {asked!r}; this deployment has {', '.join(self.names)}")
        return asked or of_agent or DEFAULT_QUEUE

    def check_agents(self, queue_of: Mapping[str, str]) -> None:
        """Refuses agents whose own queue nobody would take from.

        Args:
            queue_of: The queue of each agent, by a name for people; empty for the default one.

        Raises:
            ConfigurationError: A queue is not declared; it names the agent, and says what to do.
        """
        for agent, name in sorted(queue_of.items()):
            if name and name not in self._limits:
                raise ConfigurationError(
                    f"the agent {agent} wants the queue {name!r}, which is not declared; "
                    f'add it to PERDURE_QUEUES, e.g. {{"{name}": {{}}}}'
                )
