"""What an executor is for those who look at it from outside: where it is, what it runs, whether it lives."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class ExecutorState(StrEnum):
    """Whether an executor is alive; names as in the API without their prefix."""

    ALIVE = "ALIVE"
    STANDING_BY = "STANDING_BY"
    DRAINING = "DRAINING"
    EXPIRED = "EXPIRED"
    GONE = "GONE"


@dataclass(frozen=True, slots=True)
class Executor:
    """An executor, by the database's clock.

    Attributes:
        executor_id: Its id, new at every start.
        address: Where it listens, for people.
        application_version: Of its runs.
        region: Where it is; empty without regions.
        state: Whether its lease holds.
        running: Runs that it executes now.
        max_running: How many it executes at most.
        start_time: When it started.
        expire_time: When its lease expires, or expired.
    """

    executor_id: str
    address: str
    application_version: str
    region: str
    state: ExecutorState
    running: int
    max_running: int
    start_time: datetime
    expire_time: datetime
