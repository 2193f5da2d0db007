"""A promise: what one thread will know, and others wait for.

It does what a `concurrent.futures.Future` does, with one lock for all promises instead of a condition for each, which
was a thirtieth of what held the interpreter's lock with 128 clients (ADR 28), and lets go of its callbacks when it has
called them: who is told often has the promise itself, and they would keep each other until the collector comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any, Generic, TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger()

_lock = threading.Lock()
"""Of the callbacks of all promises; held for an assignment."""


class Promise(Generic[T]):
    """See the module; the methods are those of `concurrent.futures.Future`. Thread-safe."""

    __slots__ = ("_calls", "_error", "_value")

    def __init__(self) -> None:
        self._calls: tuple[Callable[[Promise[T]], object], ...] | None = ()
        """Who wants to be told; None once it is settled."""
        self._value: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Returns whether it is settled."""
        return self._calls is None

    def cancelled(self) -> bool:
        """Returns whether it was given up."""
        return isinstance(self._error, CancelledError)

    def exception(self) -> BaseException | None:
        """Returns what it failed with, None if it did not; waits until it is settled."""
        self._wait()
        return self._error

    def result(self) -> T:
        """Returns what was promised; waits until it is settled.

        Raises:
            CancelledError: It was given up.
            BaseException: What it failed with.
        """
        self._wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[no-any-return]

    def add_done_callback(self, call: Callable[[Promise[T]], object]) -> None:
        """Calls something with it once it is settled, in the thread that settles it; at once if it is."""
        with _lock:
            if self._calls is not None:
                self._calls = (*self._calls, call)
                return
        call(self)

    def set_result(self, value: T) -> None:
        """Settles it. Call one of these once."""
        self._value = value
        self._settle()

    def set_exception(self, error: BaseException) -> None:
        """Settles it: nothing comes of it."""
        self._error = error
        self._settle()

    def cancel(self) -> None:
        """Settles it: it is given up."""
        self.set_exception(CancelledError())

    def _settle(self) -> None:
        with _lock:
            calls, self._calls = self._calls, None
        assert calls is not None, "it is settled already"
        for call in calls:
            try:
                call(self)
            except Exception as error:  # noqa: BLE001 - logged; one must not keep the others from being told
                log.error("promise.not_told", error=type(error).__name__)

    def _wait(self) -> None:
        if self._calls is not None:
            told = threading.Event()
            self.add_done_callback(lambda _: told.set())
            told.wait()
