"""Waiting, the only place of the tests that sleeps."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

TIME_FACTOR = float(os.environ.get("PERDURE_TEST_TIME_FACTOR", "1"))
"""Larger on a slow machine or database; every wait of the tests is scaled by it."""
FIRST_PAUSE_S = 0.01
MAX_PAUSE_S = 0.05
"""Half of it is lost in every wait: a suite has thousands."""


def scaled(seconds: float) -> float:
    """Returns a duration for this machine."""
    return seconds * TIME_FACTOR


def eventually(fn: Callable[[], T], timeout: float = 10.0, *, what: str = "") -> T:
    """Calls `fn` until it returns something true without an AssertionError, and returns that.

    Raises:
        AssertionError: It did not within `timeout` (scaled) seconds; the message has its last answer.
    """
    deadline = time.monotonic() + scaled(timeout)
    pause = FIRST_PAUSE_S
    while True:
        late = time.monotonic() > deadline
        answer: object
        try:
            if answer := fn():
                return answer
        except AssertionError as error:
            answer = error
        if late:
            raise _too_late(fn, what, timeout, answer)
        time.sleep(pause)
        pause = min(pause * 1.5, MAX_PAUSE_S)


async def eventually_async(
    fn: Callable[[], T | Awaitable[T]],
    timeout: float = 10.0,  # noqa: ASYNC109 - of the condition, not of the coroutine
    *,
    what: str = "",
) -> T:
    """As `eventually`, on the event loop; `fn` may be a coroutine function."""
    deadline = time.monotonic() + scaled(timeout)
    pause = FIRST_PAUSE_S
    while True:
        late = time.monotonic() > deadline
        answer: object
        try:
            result = fn()
            if inspect.isawaitable(result):
                result = await result
            if answer := result:
                return answer
        except AssertionError as error:
            answer = error
        if late:
            raise _too_late(fn, what, timeout, answer)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, MAX_PAUSE_S)


def _too_late(fn: Callable[..., object], what: str, timeout: float, answer: object) -> AssertionError:
    return AssertionError(f"{what or fn} did not become true within {scaled(timeout):g} s; the last answer: {answer!r}")


def free_port() -> int:
    """Returns a TCP port of the loopback interface that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
