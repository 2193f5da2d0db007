"""The loops of the service, gRPC's and the agents': they ask the kernel less often while they have something to do.

In each of its turns asyncio asks which sockets are ready, also when callbacks wait that are ready anyway. That is a
system call, and it lets go of the interpreter's lock, for which this thread then stands in line again behind the
others. With 128 clients half of the turns of gRPC's loop are such, and a tenth more runs a second came of leaving most
of these questions out (8 of 9; 64 of 65 gained hardly more). The agents' loop, which writes checkpoints, has a run that
moves alone end a twentieth sooner by it.

What comes from a socket waits up to eight turns for it, in which only what was ready before runs. Calls from other
threads (`call_soon_threadsafe`) and timers do not come by a socket, and are not later. A loop that has nothing to do
asks at once, as ever.

**Calls from other threads** wake asyncio's loops by a byte in a socket, which is then read until there is no more:
three system calls in which both threads let go of the lock, while each waits for the other. Here a loop is only woken
when it sleeps, by an eventfd whose edges are watched, so that nothing has to be read: a run that moves alone ends a
twentieth sooner. None is missed. Whoever calls adds the call first, then sets `_called`, then looks whether the loop
sleeps; the loop unsets `_called` before it looks for calls, then says that it sleeps, and then looks at `_called`. So
at least one of them sees the other. (The interpreter's lock orders these.) Where there is no eventfd, and for signals,
it is asyncio's socket, as ever.
"""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from io import FileIO
from typing import Any, TypeVar

T = TypeVar("T")

UNASKED = 8
"""Turns with something to do that follow one another without a question."""


class SeldomAsking(selectors.DefaultSelector):
    """A selector that leaves out questions for which nobody would wait, and whose sleep others can end; see the module.

    Attributes:
        can_be_woken: Whether there is an eventfd.
    """

    can_be_woken = hasattr(os, "eventfd") and issubclass(
        selectors.DefaultSelector, getattr(selectors, "EpollSelector", ())
    )

    def __init__(self) -> None:
        super().__init__()
        self._unasked = 0
        self._called = self._sleeps = False
        self._bell: FileIO | None = None
        if self.can_be_woken:
            # A file, as that knows when it is closed: a number would be another file's by then.
            self._bell = FileIO(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), "wb")
            self._selector.register(self._bell, select.EPOLLIN | select.EPOLLET)  # type: ignore[attr-defined]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Returns what is ready, see `selectors`; nothing when it was not to wait and has asked a moment ago."""
        if timeout is not None and timeout <= 0 and self._unasked < UNASKED:
            self._called = False
            self._unasked += 1
            return []
        self._unasked = 0
        self._sleeps = True
        found = super().select(0 if self._called else timeout)
        self._sleeps = self._called = False
        return found

    def wake(self) -> None:
        """Ends a `select` that waits, or keeps the next one from waiting; from any thread."""
        self._called = True
        if self._sleeps and self._bell is not None:
            with suppress(ValueError):  # it was closed just now: who calls a loop that is closed is told by asyncio
                self._bell.write(_ONE)

    def close(self) -> None:
        """Ends it."""
        if self._bell is not None:
            self._bell.close()
        super().close()


_ONE = (1).to_bytes(8, sys.byteorder)
"""What an eventfd counts. It would take 2^64 of them to fill it."""


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._seldom = SeldomAsking()
        super().__init__(self._seldom)

    def _write_to_self(self) -> None:  # what asyncio calls when it has added a call of another thread
        self._seldom.wake()

    @property
    def callbacks(self) -> int:
        """How many wait for their turn."""
        return len(self._ready)  # type: ignore[attr-defined]


def new() -> asyncio.AbstractEventLoop:
    """Returns such a loop."""
    return _Loop() if SeldomAsking.can_be_woken else asyncio.SelectorEventLoop(SeldomAsking())


def running() -> asyncio.AbstractEventLoop | None:
    """Returns the loop that runs in this thread, None when none does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def only_one_waits() -> bool:
    """Returns whether the running loop has just one callback to call when this one is over, as far as that is known."""
    loop = running()
    return isinstance(loop, _Loop) and loop.callbacks == 1


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
