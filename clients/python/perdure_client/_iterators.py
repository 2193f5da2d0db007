"""Blocking iterators over listings and watches; written by make_sync_client.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeAlias, TypeVar

from perdure_client._bulk import AgentStart
from perdure_client._core import Pages
from perdure_client._events import RunEvent, WatchUpdate
from perdure_client._transport_sync import run_blocking
from perdure_client._watch import Watcher

Starts: TypeAlias = Iterable[AgentStart]

_T = TypeVar("_T")


class Watching(Iterator[_T], Generic[_T]):
    """Iterates over what a watch brings. Leaving the loop ends the watch; so does `close`, or `with`.

    A step of the iteration that is interrupted (Ctrl-C) loses nothing: the next one goes on from there.
    """

    def __init__(self, watcher: Watcher[_T]) -> None:
        self._watcher = watcher

    def __next__(self) -> _T:
        item = run_blocking(self._watcher.read())
        if item is None:
            raise StopIteration
        return item

    def close(self) -> None:
        """Ends the watch, and with it an iteration that is waiting elsewhere. Runs go on."""
        self._watcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Watch(Watching[WatchUpdate]):
    """Iterates over the updates of a run; see `Client.watch`."""

    def events(self) -> Iterator[RunEvent]:
        """Iterates over the events alone."""
        for update in self:
            yield from update.events


def iterate(pages: Pages[_T]) -> Iterator[_T]:
    """Iterates over everything a listing has."""
    while (item := run_blocking(pages.read())) is not None:
        yield item


def iterate_closing(reader: Watcher[_T]) -> Iterator[_T]:
    """Iterates over what is read until None, and closes it however the iteration ends."""
    try:
        while (item := run_blocking(reader.read())) is not None:
            yield item
    finally:
        reader.close()
