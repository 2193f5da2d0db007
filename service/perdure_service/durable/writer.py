"""The event writer: commits buffered events of executions that reach no checkpoint within 100 ms."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import structlog

from perdure_service.durable.executions import Execution

LINGER_S = 0.1
"""How long an event waits for a checkpoint to ride on (the stream contract promises 50-100 ms)."""

THREADS = 4
"""Writers at work at once. One run is written by one at a time, as they take its slot."""

log = structlog.get_logger()


class EventWriter:
    """Writes the buffers of executions, a transaction each, in a few threads; idle, it costs nothing."""

    def __init__(self, write: Callable[[Execution], bool]) -> None:
        """Creates the writer.

        Args:
            write: Commits what an execution has buffered, under its slot and its owner's lock, or has it committed;
                returns False when another commit of it is under way.
        """
        self._write = write
        self._due: queue.SimpleQueue[tuple[float, Execution] | None] = queue.SimpleQueue()
        self._pending: set[Execution] = set()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"event-writer-{n}", daemon=True) for n in range(THREADS)
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def wake(self, execution: Execution) -> None:
        """Says that an execution has events. Called with every event, so it is cheap when it knows already."""
        with self._lock:
            if execution in self._pending:
                return
            self._pending.add(execution)
        self._due.put((time.monotonic() + LINGER_S, execution))

    def write_now(self, execution: Execution) -> None:
        """Has an execution looked at at once: what the checkpoint writer did not write of it must be written alone."""
        self._due.put((0.0, execution))

    def stop(self) -> None:
        """Ends the threads after what is due now."""
        for _ in self._threads:
            self._due.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)

    def _run(self) -> None:
        while (item := self._due.get()) is not None:
            due, execution = item
            time.sleep(max(0.0, due - time.monotonic()))
            with self._lock:
                self._pending.discard(execution)
            try:
                if not self._write(execution):
                    # What waits rides on the commit that is under way, or is next. That may be repeated for long, and
                    # these threads are for all runs.
                    self.wake(execution)
            except Exception as error:  # noqa: BLE001 - logged; kept for the next try
                # The events are back in the buffer; they go with the next checkpoint, or with the next wake.
                log.warning("event_writer.failed", run_id=execution.key.run_id, error=type(error).__name__)
                time.sleep(LINGER_S)
                if not execution.dead:
                    self.wake(execution)
