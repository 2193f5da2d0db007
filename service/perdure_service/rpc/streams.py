"""Knows the calls that stay open, so that they are bounded in number and age, and all end when the server drains."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TypeVar

from perdure_service.errors import Draining, PerdureError, TooManyStreams

T = TypeVar("T")

RESPONSE_BYTES = 2**20
"""About the most that one response of a stream carries. Clients take 4 MiB unless they say otherwise."""
DRAIN_TEXT = "this server is stopping; call again, and another one will answer"
AGE_TEXT = "this stream is as old as it may get; open it again after its last cursor"

QUIET_S = 0.1
"""Without a call for so long, nobody is likely to make one in the moment of stopping."""
REFUSING_S = 1.0
"""How long calls are refused at most: some clients never wait before they come back."""


class Streams:
    """The open calls of one server. Used from the server's event loop only."""

    def __init__(self, limit: int, max_age_s: float | None = None, *, per_caller: int | None = None) -> None:
        """Makes a registry.

        Args:
            limit: How many streams may be open at once.
            per_caller: How many of them may be one caller's; None for all.
            max_age_s: After about this long a stream is ended with UNAVAILABLE and RetryInfo. It must be less than the
                time after which gRPC closes an old connection, which would end the stream without saying what to do.
        """
        self._limit = limit
        self._per_caller = per_caller
        self._max_age_s = max_age_s
        self._open: set[Stay] = set()
        self._streams = 0
        self._of_caller: Counter[str] = Counter()
        self._draining = False
        self._refusing = False
        self._last_arrival_s = 0.0

    @property
    def draining(self) -> bool:
        """Whether the server is stopping."""
        return self._draining

    @property
    def count(self) -> int:
        """How many calls are open here, streams and waits."""
        return len(self._open)

    def stream(self, caller: str = "", *, stop: Callable[[], None] | None = None) -> Stay:
        """Returns a context for the life of a stream, which counts and ages.

        Args:
            caller: Whose it is; empty when that is not known, and nobody's share is counted.
            stop: Called to end the stream in peace: it takes no more requests, and answers those that it has taken.
                None: it is cancelled where it stands.

        Raises, when it is entered or while it is open (with `stop`, when it is left):
            TooManyStreams: There are as many as may be, at all or of this caller.
            Draining: The server is stopping, or the stream has reached its age.
        """
        # Not all at once: streams that were opened together shall not come back together.
        age_s = None if self._max_age_s is None else self._max_age_s * random.uniform(0.8, 0.9)
        return Stay(self, counts=True, max_age_s=age_s, caller=caller, stop=stop)

    def wait(self) -> Stay:
        """Returns a context for a unary call that waits for long: it ends when the server drains.

        Raises, when it is entered or while it is open:
            Draining: The server is stopping.
        """
        return Stay(self, counts=False)

    def drain(self) -> None:
        """Ends every open call, and every later one at once. Cannot be undone."""
        self._draining = True
        for stay in tuple(self._open):
            stay.end(Draining(DRAIN_TEXT))

    def arrive(self, at_s: float) -> None:
        """Notes that a call of any kind has come, at a time of the monotonic clock.

        Raises:
            Draining: The server is about to stop.
        """
        self._last_arrival_s = at_s
        if self._refusing:
            raise Draining(DRAIN_TEXT)

    async def refuse(self) -> None:
        """Refuses every later call, and returns when none has come for `QUIET_S`, or after `REFUSING_S`.

        gRPC's own server cancels what reaches it after it was told to stop, without a word that it may be repeated. Who
        is refused before that knows, and comes back later, or elsewhere.
        """
        self._refusing = True
        latest_s = time.monotonic() + REFUSING_S
        while True:
            left_s = min(self._last_arrival_s + QUIET_S, latest_s) - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(left_s)

    def _enter(self, stay: Stay) -> None:
        if self._draining:
            raise Draining(DRAIN_TEXT)
        if stay.counts and self._streams >= self._limit:
            raise TooManyStreams(
                f"this server has {self._limit} open streams and takes no more; close some, or call again later",
                limit=str(self._limit),
            )
        if stay.caller and self._per_caller is not None and self._of_caller[stay.caller] >= self._per_caller:
            raise TooManyStreams(
                f"you have {self._per_caller} open streams here, which is as many as one caller may; close some",
                limit=str(self._per_caller),
            )
        self._open.add(stay)
        self._streams += stay.counts
        if stay.caller:
            self._of_caller[stay.caller] += 1

    def _leave(self, stay: Stay) -> None:
        self._open.discard(stay)
        self._streams -= stay.counts
        if stay.caller:
            self._of_caller[stay.caller] -= 1
            if not self._of_caller[stay.caller]:
                del self._of_caller[stay.caller]


class Stay:
    """The time in which a call is open: cancels its task to end it, and turns that cancellation into an error.

    The way of asyncio.timeout(): a cancellation from elsewhere (the client went away) stays what it is.
    """

    def __init__(
        self,
        streams: Streams,
        *,
        counts: bool,
        max_age_s: float | None = None,
        caller: str = "",
        stop: Callable[[], None] | None = None,
    ) -> None:
        self.counts = counts
        self.caller = caller
        self._stop = stop
        self._streams = streams
        self._max_age_s = max_age_s
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._timers: list[asyncio.TimerHandle] = []
        self._expiry: tuple[float, PerdureError] | None = None
        self._ended: PerdureError | None = None

    def end(self, error: PerdureError) -> None:
        """Ends the call; `error` tells the client why. The first one counts."""
        if self._task is not None and self._ended is None:
            self._ended = error
            if self._stop is None:
                self._task.cancel()
            else:
                self._stop()

    def expire(self, after_s: float, error: PerdureError) -> None:
        """Ends the call `after_s` after it is entered, with an error of its own."""
        self._expiry = (after_s, error)

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stay belongs to a task")
        self._streams._enter(self)
        self._task = task
        self._cancelling = task.cancelling()
        loop = asyncio.get_running_loop()
        if self._max_age_s is not None:
            self._timers.append(loop.call_later(self._max_age_s, self.end, Draining(AGE_TEXT)))
        if self._expiry is not None:
            after_s, error = self._expiry
            self._timers.append(loop.call_later(max(after_s, 0.0), self.end, error))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._streams._leave(self)
        for timer in self._timers:
            timer.cancel()
        task, self._task = self._task, None
        if self._ended is None or task is None:
            return
        if self._stop is not None:
            if kind is None:
                raise self._ended
        else:
            others = task.uncancel() > self._cancelling
            if kind is asyncio.CancelledError and not others:
                raise self._ended from None


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Closes what yields `items` at the end, as soon as nobody reads on, if it can be closed."""
    try:
        yield items
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()
