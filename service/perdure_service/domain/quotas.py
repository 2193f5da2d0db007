"""How many starts a namespace may make in a second: a token bucket for each, in the memory of one server process.

Every server counts for itself, so a namespace that is served by three of them may start three times as many. It
guards a server's database and slots against a caller that has gone wild; it is no accounting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

BURST_S = 1.0
"""How many seconds' worth of starts may come at once after a pause; one start always may."""


@dataclass(slots=True)
class _Bucket:
    """Tokens that are left, and when that was so (monotonic seconds)."""

    tokens: float
    at_s: float


class StartQuota:
    """A bucket for each namespace. Thread-safe."""

    def __init__(self, per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes full buckets.

        Args:
            per_second: Starts a second in each namespace; None for no limit.
            clock: Monotonic seconds.
        """
        self._per_second = per_second
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()

    @property
    def per_second(self) -> float | None:
        """The limit; None for none."""
        return self._per_second

    def take(self, namespace: str) -> float:
        """Takes a token for one start.

        Args:
            namespace: One that exists, so that there are never more buckets than namespaces.

        Returns:
            0 when there was one; else the seconds until there is, and nothing is taken.
        """
        if self._per_second is None:
            return 0.0
        most = self._most
        with self._lock:
            now_s = self._clock()
            bucket = self._buckets.setdefault(namespace, _Bucket(most, now_s))
            bucket.tokens = min(most, bucket.tokens + (now_s - bucket.at_s) * self._per_second)
            bucket.at_s = now_s
            if bucket.tokens < 1:
                return (1 - bucket.tokens) / self._per_second
            bucket.tokens -= 1
            return 0.0

    def give_back(self, namespace: str) -> None:
        """Returns a token that was taken for a start that made no run."""
        with self._lock:
            bucket = self._buckets.get(namespace)
            if bucket is not None:
                bucket.tokens = min(self._most, bucket.tokens + 1)

    @property
    def _most(self) -> float:
        """Returns how many tokens a full bucket has."""
        return max(1.0, (self._per_second or 0.0) * BURST_S)
