"""The event writer: commits buffered events that reach no checkpoint within 100 ms, or long text before that."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

import structlog

from perdure_service.durable.executions import Execution

LINGER_S = 0.09
TOGETHER_S = 0.01
"""How long an event waits for a checkpoint to ride on (the stream contract promises 50-100 ms), and for others that are
due then, so that a thread wakes once for them all."""

THREADS = 4
"""Writers at work at once. One run is written by one at a time, as they take its slot."""

log = structlog.get_logger()


class EventWriter:
    """Writes the buffers of executions, a transaction each, in a few threads; idle, it costs nothing."""

    def __init__(self, write: Callable[[Execution], bool], at_once: int = 1) -> None:
        """Creates the writer.

        Args:
            write: Commits what an execution has buffered, under its slot and its owner's lock, or has it committed;
                returns False when another commit of it is under way.
            at_once: How many a thread takes: more than one only if `write` does not wait for the commit.
        """
        self._at_once = at_once
        self._write = write
        self._due: list[tuple[float, int, Execution]] = []
        self._order = itertools.count()
        self._pending: dict[Execution, float] = {}
        self._changed = threading.Condition()
        self._clock_watched = False
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"event-writer-{n}", daemon=True) for n in range(THREADS)
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def wake(self, execution: Execution, *, at_once: bool = False) -> None:
        """Says that an execution has events. Called with every event, so it is cheap when it knows already.

        Args:
            execution: Whose.
            at_once: Whether they are too many to wait, or were given to the checkpoint writer in vain.
        """
        with self._changed:
            due = time.monotonic() + (0.0 if at_once else LINGER_S)
            known = self._pending.get(execution)
            if known is not None and (known <= due or not at_once):
                return
            self._pending[execution] = due
            heapq.heappush(self._due, (due, next(self._order), execution))
            if self._due[0][2] is execution:
                # Earlier than whatever a thread waits for. All else comes when it is due: one of them sees to that.
                self._changed.notify_all()

    def stop(self) -> None:
        """Ends the threads after what waits now."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)

    def _next(self) -> list[Execution]:
        """Waits for executions that are due and takes them; none at the end, when all of them have been."""
        with self._changed:
            while True:
                now = time.monotonic()
                if self._due and (self._stopping or self._due[0][0] <= now):
                    taken: list[Execution] = []
                    while self._due and len(taken) < self._at_once and (self._stopping or self._due[0][0] <= now):
                        due, _, execution = heapq.heappop(self._due)
                        if self._pending.get(execution) == due:  # else it was due earlier, and has been
                            del self._pending[execution]
                            taken.append(execution)
                    if self._due:
                        self._changed.notify()  # another thread looks at the clock meanwhile
                    if taken:
                        return taken
                elif self._stopping:
                    return []
                elif self._due and not self._clock_watched:
                    self._clock_watched = True
                    self._changed.wait(self._due[0][0] - now + TOGETHER_S)
                    self._clock_watched = False
                else:
                    self._changed.wait()

    def _run(self) -> None:
        while taken := self._next():
            # The checkpoint writer takes them at once; what it did not write may wait for long, and alone.
            while taken:
                execution = taken.pop()
                if execution.unanswered is not None:
                    self._give_back(taken)
                    taken = []
                self._write_one(execution)

    def _give_back(self, taken: list[Execution]) -> None:
        with self._changed:
            for execution in taken:
                self._pending[execution] = 0.0
                heapq.heappush(self._due, (0.0, next(self._order), execution))
            self._changed.notify()

    def _write_one(self, execution: Execution) -> None:
        try:
            if not self._write(execution) and not self._stopping:
                # What waits rides on the commit that is under way, or is next. That may be repeated for long, and
                # these threads are for all runs.
                self.wake(execution)
        except Exception as error:  # noqa: BLE001 - logged; kept for the next try
            # The events are back in the buffer; they go with the next checkpoint, or with the next wake.
            log.warning("event_writer.failed", run_id=execution.key.run_id, error=type(error).__name__)
            time.sleep(LINGER_S)
            if not execution.dead and not self._stopping:
                self.wake(execution)
