"""Wakes DBOS's queue threads of this process at once, which by themselves sleep from poll to poll.

DBOS has a thread for every queue; it waits on the event that ends it. Ours gets an event in its place that also a bell
ends: `Bells.ring` makes the thread look now. Rings while it looks are one ring.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from dbos import _queue
from dbos._core import ActiveWorkflowById

from perdure_service.durable.executions import Executions
from perdure_service.durable.substitutes import substitute

STOP_POLL_S = 0.25
"""How often a waiting thread looks whether it is to end: DBOS sets an event that it does not wait on."""

MAX_BACKOFF_S = 5.0
"""DBOS doubles the time between polls, up to two minutes, whenever claims collide; a run must not wait for that."""

_plain_worker_thread = _queue.queue_worker_thread


class _StopOrBell:
    """What a queue's thread waits on: DBOS's event to stop, or a ring."""

    def __init__(self, stop: threading.Event, bell: threading.Event, longest_s: float) -> None:
        self._stop = stop
        self._bell = bell
        self._longest_s = longest_s

    def is_set(self) -> bool:
        return self._stop.is_set()

    def wait(self, timeout: float) -> bool:
        """Waits for the end, a ring or the time to be up; returns whether it is the end."""
        until = time.monotonic() + min(timeout, self._longest_s)
        while not self._stop.is_set():
            left = until - time.monotonic()
            if left <= 0 or self._bell.wait(min(left, STOP_POLL_S)):
                self._bell.clear()
                break
        return self._stop.is_set()


class Bells:
    """A bell for every queue. Thread-safe."""

    def __init__(self, poll_s: float) -> None:
        """Creates them.

        Args:
            poll_s: How often DBOS is told to poll.
        """
        self._bells: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self._longest_s = max(poll_s * 1.05, MAX_BACKOFF_S)  # DBOS waits a twentieth longer or shorter each time

    def ring(self, queue: str) -> None:
        """Makes this process look into a queue now, or as soon as its thread has begun."""
        with self._lock:
            self._bells.setdefault(queue, threading.Event()).set()

    def ring_all(self) -> None:
        """Makes this process look into each of its queues now."""
        for queue in list(self._bells):
            self.ring(queue)

    def install(self, executions: Executions) -> None:
        """Makes DBOS's queue threads wait for the bells, and count what is running as we do.

        DBOS counts an execution from its dispatch until its thread has ended; a thread that is woken between would
        find a slot free that is taken, or taken that is free.
        """

        def worker_thread(stop: threading.Event, dbos: Any, queue: Any) -> None:
            with self._lock:
                bell = self._bells.setdefault(queue.name, threading.Event())
            _plain_worker_thread(_StopOrBell(stop, bell, self._longest_s), dbos, queue)  # type: ignore[arg-type]

        substitute(_queue, "queue_worker_thread", worker_thread)
        substitute(ActiveWorkflowById, "count_for_queue", lambda _active, name: executions.of_queue(name))
