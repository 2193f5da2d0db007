"""When to repeat a call: what is worth repeating, after how long, and when to give up."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from perdure_client._config import Config
from perdure_client._errors import DeadlineExceeded, PerdureError, ServerUnavailable

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
_GROWTH = 2.0
_JITTER = 0.5
"""A delay is drawn from the upper half of its range, so that a fleet's repeats spread but no one hurries."""


@dataclass(slots=True)
class Backoff:
    """Delays that grow from 0.1 s to 5 s, with jitter; never shorter than the server wants."""

    _failures: int = field(default=0, init=False)

    def next_delay_s(self, advised_s: float | None) -> float:
        """Returns the seconds to wait after one more failure.

        Args:
            advised_s: The server's RetryInfo; None for none.
        """
        longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * _GROWTH**self._failures)
        self._failures = min(self._failures + 1, 32)
        own = longest * random.uniform(1 - _JITTER, 1)
        return own if advised_s is None else max(own, advised_s * random.uniform(1, 1 + _JITTER))

    def reset(self) -> None:
        """Begins anew: there was an answer."""
        self._failures = 0


class Patience:
    """How long one call, or one outage of a stream, may go on without an answer. Its clock starts when it is made.

    Args:
        total_s: Seconds in all.
        connect_s: Seconds in which some server must be reached at all.
        backoff: To go on with; None for a fresh one.
    """

    def __init__(self, total_s: float, connect_s: float, backoff: Backoff | None = None) -> None:
        self._total_s = total_s
        self._connect_s = min(total_s, connect_s)
        self._backoff = backoff or Backoff()
        self._began_s = time.monotonic()

    def reached(self) -> None:
        """Is told that a server was there: from then on only the total counts."""
        self._connect_s = self._total_s

    @classmethod
    def of_outage(cls, config: Config, backoff: Backoff, *, answered: bool) -> Patience:
        """Returns that with an outage of a stream.

        Args:
            config: The client's.
            backoff: To go on with.
            answered: Whether a server has ever answered: an address where none has may be wrong.
        """
        total_s = config.reconnect_timeout_s
        return cls(total_s, total_s if answered else config.connect_timeout_s, backoff)

    @property
    def remaining_s(self) -> float:
        """Seconds left; at least a millisecond."""
        return max(0.001, self._total_s - (time.monotonic() - self._began_s))

    def delay_before_repeat_s(self, error: PerdureError) -> float | None:
        """Returns the seconds to wait before the next attempt; None to give up with this error.

        A deadline is worth a repeat when it was only that attempt's, not all the time there was.
        """
        if not (error.retryable or isinstance(error, DeadlineExceeded)):
            return None
        delay_s = self._backoff.next_delay_s(error.retry_delay_s)
        limit_s = self._connect_s if isinstance(error, ServerUnavailable) else self._total_s
        return delay_s if time.monotonic() - self._began_s + delay_s < limit_s else None
