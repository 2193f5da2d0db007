"""Records what a commit says of steps and runs: durations, attempts, how long a run waited for its first execution.

All from what is in memory anyway; the only queries that metrics make are those of `OpenRuns`, one in
`REFRESH_S` at most, and only while somebody looks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa
import structlog

from perdure_service.domain.events import EventKind, Pack
from perdure_service.domain.runs import RunState
from perdure_service.durable.executions import Execution
from perdure_service.store import run_counts
from perdure_service.store.sqlstates import reading
from perdure_service.telemetry import AGENT, STEP_NAME
from perdure_service.telemetry import metrics as m
from perdure_service.telemetry.metrics import METERS

REFRESH_S = 15.0
"""How old the counts of runs may be. Prometheus usually looks every 15 to 60 seconds."""

_OUTCOMES = {
    EventKind.STEP_SUCCEEDED: "succeeded",
    EventKind.STEP_FAILED: "failed",
    EventKind.STEP_RETRYING: "retried",
}

log = structlog.get_logger()


class telling:
    """Surrounds what tells of a commit. It has happened, so nothing that goes wrong here may look like its failure."""

    __slots__ = ("_workflow_id",)

    def __init__(self, workflow_id: str) -> None:
        self._workflow_id = workflow_id

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> bool:
        if not isinstance(error, Exception):
            return False
        log.error("telemetry.failed", workflow_id=self._workflow_id, error=type(error).__name__)
        return True


def committed(execution: Execution | None, packs: Sequence[Pack]) -> None:
    """Records the steps and attempts that an execution of this process has just committed."""
    if execution is None:
        return
    for event in (event for pack in packs for event in pack.events):
        outcome = _OUTCOMES.get(event.kind)
        if outcome is None:
            continue
        attributes = {AGENT: execution.agent, STEP_NAME: event.step_name, m.OUTCOME: outcome}
        if event.attempt:
            METERS.add(m.STEP_ATTEMPTS, attributes)
        if event.kind is not EventKind.STEP_RETRYING:
            METERS.record(m.STEP_DURATION, event.data.get("duration_ms", 0) / 1000, attributes)


def begun(executions: Iterable[Execution]) -> None:
    """Records how long runs waited, when it is their first execution."""
    for execution in executions:
        if execution.number == 1:
            METERS.record(m.START_LATENCY, execution.waited_s, {AGENT: execution.agent})


def run_ended(agent: str, state: RunState, created_at: datetime, at_ms: int) -> None:
    """Records the end of a run."""
    METERS.record(m.RUN_DURATION, at_ms / 1000 - created_at.timestamp(), {AGENT: agent, m.STATE: state.value})


class OpenRuns:
    """The counts of runs that have not ended, asked for when somebody looks, and kept for a while."""

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] = time.monotonic) -> None:
        """Creates them; nothing is asked yet.

        Args:
            engine: The database.
            clock: Returns seconds.
        """
        self._engine = engine
        self._clock = clock
        self._lock = threading.Lock()
        self._until: float | None = None
        self._counts = run_counts.OpenRunCounts()

    def runs(self) -> list[tuple[int, Mapping[str, str]]]:
        """Returns how many runs there are of each agent in each state."""
        counts = self._read().runs
        return [(count, {AGENT: agent, m.STATE: state.value}) for (agent, state), count in sorted(counts.items())]

    def queue_age(self) -> list[tuple[float, Mapping[str, str]]]:
        """Returns how long the oldest queued run has been waiting, in seconds."""
        return [(self._read().queue_age_s, {})]

    def _read(self) -> run_counts.OpenRunCounts:
        with self._lock:
            if self._until is None or self._clock() >= self._until:
                self._until = self._clock() + REFRESH_S
                try:
                    self._counts = reading(self._engine, "metrics.open_runs", run_counts.count_open)
                except Exception as error:  # noqa: BLE001 - logged; the last counts stand until the next look
                    log.warning("metrics.read_failed", error=type(error).__name__)
            return self._counts


def observe_pool(engine: sa.Engine) -> None:
    """Lets metrics see the connections of an engine."""
    pool = engine.pool
    assert isinstance(pool, sa.QueuePool), "the pool that `create_engine` makes"

    def connections() -> list[tuple[int, Mapping[str, str]]]:
        return [
            (pool.checkedout(), {m.POOL_NAME: "perdure", m.POOL_STATE: "used"}),
            (pool.checkedin(), {m.POOL_NAME: "perdure", m.POOL_STATE: "idle"}),
        ]

    METERS.observe(m.POOL, connections)
    METERS.observe(m.POOL_MAX, lambda: [(pool.size(), {m.POOL_NAME: "perdure"})])
