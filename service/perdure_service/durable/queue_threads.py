"""Wakes DBOS's queue threads of this process at once, which by themselves sleep from poll to poll.

What this process queues rings at once, what others queue a little later if it is much. A queue that is quiet is polled
seldom while hints of what others queue arrive.

DBOS has a thread for every queue; it waits on the event that ends it. Ours gets an event in its place that also a bell
ends: `Bells.ring` makes the thread look now. Rings while it looks are one ring.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from dbos import _dbos, _queue
from dbos._core import ActiveWorkflowById

from perdure_service.durable.executions import Executions
from perdure_service.durable.substitutes import substitute
from perdure_service.store.tailer import HINTED_POLL_FACTOR

STOP_POLL_S = 0.25
"""How often a waiting thread looks whether it is to end: DBOS sets an event that it does not wait on."""

MAX_BACKOFF_S = 5.0
"""DBOS doubles the time between polls, up to two minutes, whenever claims collide; a run must not wait for that."""

OTHERS_PAUSE_S = 0.1
"""How long after a look at the soonest a queue is looked into for others, who may queue a lot: so ten times a second at
most, and the first time at once. All servers look then, and one of them has most of what there is."""

QUICK_POLLS = 3
"""Polls at the queue's own interval after anything rang; those after that are seldom while hints arrive."""

LIST_S = 30.0
"""How often it is looked whether a queue has lost its thread, once each has one. DBOS lists its queues every second."""

_plain_manager_thread = _queue.queue_thread
_plain_worker_thread = _queue.queue_worker_thread


class _Bell:
    """What rings for one queue. Rings while its thread looks are one ring."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.own = False
        self.others = True
        """From the beginning: what was queued before its thread began, nobody rings for."""

    def ring(self, *, own: bool) -> None:
        """Rings for what this process, or another one, has changed."""
        with self.changed:
            self.own, self.others = self.own or own, self.others or not own
            self.changed.notify_all()


class _StopOrBell:
    """What a queue's thread waits on: DBOS's event to stop, or a ring."""

    def __init__(
        self, stop: threading.Event, bell: _Bell, longest_s: float, seldom: Callable[[], bool] = lambda: False
    ) -> None:
        self._stop = stop
        self._bell = bell
        self._longest_s = longest_s
        self._seldom = seldom
        self._quick_polls = QUICK_POLLS
        self._looked_at = 0.0

    def is_set(self) -> bool:
        return self._stop.is_set()

    def wait(self, timeout: float) -> bool:
        """Waits for the end, a ring or the time to be up; returns whether it is the end."""
        began = time.monotonic()
        timeout = min(timeout, self._longest_s)
        with self._bell.changed:
            while not self._stop.is_set():
                now = time.monotonic()
                if self._bell.own or (self._bell.others and now >= self._looked_at + OTHERS_PAUSE_S):
                    self._quick_polls = QUICK_POLLS
                    break
                seldom = self._quick_polls <= 0 and self._seldom()
                left = began + timeout * (HINTED_POLL_FACTOR if seldom else 1) - now
                if left <= 0:
                    self._quick_polls -= 1
                    break
                if self._bell.others:
                    left = min(left, self._looked_at + OTHERS_PAUSE_S - now)
                self._bell.changed.wait(min(left, STOP_POLL_S))
            self._bell.own = self._bell.others = False
        self._looked_at = time.monotonic()
        return self._stop.is_set()


class _SeldomStop:
    """What the thread waits on that gives each queue its own, in place of DBOS's event to stop."""

    def __init__(self, stop: threading.Event, complete: Callable[[], bool]) -> None:
        self._stop = stop
        self._complete = complete

    def is_set(self) -> bool:
        return self._stop.is_set()

    def wait(self, timeout: float) -> bool:
        return self._stop.wait(LIST_S if self._complete() else timeout)


class Bells:
    """A bell for every queue. Thread-safe."""

    def __init__(self, poll_s: float, hinted: Callable[[], bool] = lambda: False) -> None:
        """Creates them.

        Args:
            poll_s: How often DBOS is told to poll.
            hinted: Whether hints of what other servers queue are known to arrive.
        """
        self._bells: dict[str, _Bell] = {}
        self._lock = threading.Lock()
        self._served: set[str] = set()
        self._hinted = hinted
        self._longest_s = max(poll_s * 1.05, MAX_BACKOFF_S)  # DBOS waits a twentieth longer or shorter each time

    def ring(self, queue: str) -> None:
        """Makes this process look into a queue now, or as soon as its thread has begun."""
        self._of(queue).ring(own=True)

    def ring_all(self) -> None:
        """Makes this process look into each of its queues now."""
        for queue in list(self._bells):
            self.ring(queue)

    def ring_for_others(self, queues: Collection[str] | None) -> None:
        """Makes it look soon into those of its queues in which others have changed something; None for all."""
        for queue, bell in list(self._bells.items()):
            if queues is None or queue in queues:
                bell.ring(own=False)

    def _of(self, queue: str) -> _Bell:
        with self._lock:
            return self._bells.setdefault(queue, _Bell())

    def install(self, executions: Executions, queues: Collection[str]) -> None:
        """Makes DBOS's queue threads wait for the bells, and count what is running as we do.

        DBOS counts an execution from its dispatch until its thread has ended; a thread that is woken between would
        find a slot free that is taken, or taken that is free.

        Args:
            executions: What is executed here.
            queues: The names of the queues that get a thread.
        """

        def manager_thread(stop: threading.Event, dbos: Any) -> None:
            waited_on = _SeldomStop(stop, lambda: self._served.issuperset(queues))
            _plain_manager_thread(waited_on, dbos)  # type: ignore[arg-type]

        def worker_thread(stop: threading.Event, dbos: Any, queue: Any) -> None:
            self._served.add(queue.name)
            # What a rate allows comes with the time, and nobody rings then.
            hinted = (lambda: False) if queue._limiter else self._hinted
            waited_on = _StopOrBell(stop, self._of(queue.name), self._longest_s, hinted)
            try:
                _plain_worker_thread(waited_on, dbos, queue)  # type: ignore[arg-type]
            finally:
                self._served.discard(queue.name)

        substitute(_dbos, "queue_thread", manager_thread)
        substitute(_queue, "queue_worker_thread", worker_thread)
        substitute(ActiveWorkflowById, "count_for_queue", lambda _active, name: executions.of_queue(name))
