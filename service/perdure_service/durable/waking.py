"""Wakes parked runs for what this process has just committed, at once, and for what others have, in a slow sweep.

A message and the end of a child are committed first, and the runs that they may concern are looked at in a transaction
of their own, so nobody holds two runs' locks. If we die between the two, or a foreign client sent the message, the
sweep of any executor finds it: one query for all parked runs. (Signals and decisions of callers wake in their own
transaction: that holds the run's lock anyway. A time that comes is the sweep of released delays.)

Two wakers at once: the second finds no mark. A waker and the parker: see `parking`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import sqlalchemy as sa
import structlog

from perdure_service.durable.executions import Executions
from perdure_service.store import parked
from perdure_service.store.sqlstates import JITTER, reading

SWEEP_S = 5.0
"""How often, on average, all parked runs are looked at; what nobody here knows of waits so long at most, about."""

BATCH = 200
"""Runs woken in one transaction."""

log = structlog.get_logger()


class Waker:
    """One thread; `nudge` may be called from any, and returns at once."""

    def __init__(
        self,
        engine: sa.Engine,
        executions: Executions,
        wake: Callable[[Sequence[str]], Sequence[str]],
        sweep_s: float = SWEEP_S,
    ) -> None:
        """Creates it; `start` starts the thread.

        Args:
            engine: The database.
            executions: What is executed here.
            wake: Puts those of the runs back into their queues for which something has come.
            sweep_s: Seconds between two sweeps, on average.
        """
        self._engine = engine
        self._executions = executions
        self._wake = wake
        self._sweep_s = sweep_s
        self._nudged: set[str] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="waker", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def nudge(self, workflow_ids: Iterable[str]) -> None:
        """Says that something was committed for which these runs may be parked."""
        # What is awake here is told in memory; should it be parked after this line, its parker sees what was committed.
        ids = [one for one in workflow_ids if not any(not e.parked for e in self._executions.of(one))]
        if ids:
            with self._changed:
                self._nudged.update(ids)
                self._changed.notify()

    def sweep(self) -> int:
        """Wakes all parked runs for which something has come; returns how many. Blocks."""
        count = 0
        while True:
            due = reading(self._engine, "parked.due", lambda conn: parked.due(conn, BATCH))
            woken = len(self._wake(due)) if due else 0
            count += woken
            if len(due) < BATCH or not woken:
                return count

    def _run(self) -> None:
        next_sweep = time.monotonic() + self._sweep_s * JITTER.uniform(0.5, 1.5)
        while True:
            with self._changed:
                while not self._stopping and not self._nudged and (left_s := next_sweep - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                if self._stopping:
                    return
                nudged, self._nudged = sorted(self._nudged), set()
            try:
                for first in range(0, len(nudged), BATCH):
                    self._wake(nudged[first : first + BATCH])
                if time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + self._sweep_s * JITTER.uniform(0.5, 1.5)
                    if self.sweep():
                        log.info("parked.woken_by_sweep")
            except Exception as error:  # noqa: BLE001 - logged; the next sweep finds them
                log.warning("parked.wake_failed", error=type(error).__name__)
