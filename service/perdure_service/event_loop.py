"""The loops of the service, gRPC's and the agents': they ask the kernel less often while they have something to do.

In each of its turns asyncio asks which sockets are ready, also when callbacks wait that are ready anyway. That is a
system call, and it lets go of the interpreter's lock, for which this thread then stands in line again behind the
others. With 128 clients half of the turns of gRPC's loop are such, and a tenth more runs a second came of leaving most
of these questions out (8 of 9; 64 of 65 gained hardly more). The agents' loop, which writes checkpoints, has a run that
moves alone end a twentieth sooner by it.

What comes from a socket waits up to eight turns for it, in which only what was ready before runs. Calls from other
threads (`call_soon_threadsafe`) and timers do not come by a socket, and are not later. A loop that has nothing to do
asks at once, as ever.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")

UNASKED = 8
"""Turns with something to do that follow one another without a question."""


class SeldomAsking(selectors.DefaultSelector):
    """A selector that leaves out questions for which nobody would wait."""

    _unasked = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Returns what is ready, see `selectors`; nothing when it was not to wait and has asked a moment ago."""
        if timeout is not None and timeout <= 0 and self._unasked < UNASKED:
            self._unasked += 1
            return []
        self._unasked = 0
        return super().select(timeout)


def new() -> asyncio.AbstractEventLoop:
    """Returns such a loop."""
    return asyncio.SelectorEventLoop(SeldomAsking())


def running() -> asyncio.AbstractEventLoop | None:
    """Returns the loop that runs in this thread, None when none does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object], context: Context | None = None) -> None:
    """Makes a loop call something soon, from any thread; from its own one it need not be woken.

    Args:
        loop: It.
        call: What it calls.
        context: In which; by default a copy of the caller's.

    Raises:
        RuntimeError: The loop is closed.
    """
    if running() is loop:
        loop.call_soon(call, context=context)
    else:
        loop.call_soon_threadsafe(call, context=context)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Does what `asyncio.run` does, on such a loop."""
    with asyncio.Runner(loop_factory=new) as runner:
        return runner.run(main)
