"""Iterators for asyncio over listings and watches."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Generic, Self, TypeAlias, TypeVar

from perdure_client._bulk import AgentStart
from perdure_client._core import Pages
from perdure_client._events import RunEvent, WatchUpdate
from perdure_client._watch import Watcher

Starts: TypeAlias = AsyncIterable[AgentStart] | Iterable[AgentStart]

_T = TypeVar("_T")


class AsyncWatching(AsyncIterator[_T], Generic[_T]):
    """Iterates over what a watch brings. Leaving the loop ends the watch; so does `close`, or `async with`.

    A step of the iteration that is cancelled (`asyncio.wait_for`) loses nothing: the next one goes on from there.
    """

    def __init__(self, watcher: Watcher[_T]) -> None:
        self._watcher = watcher

    async def __anext__(self) -> _T:
        item = await self._watcher.read()
        if item is None:
            raise StopAsyncIteration
        return item

    def close(self) -> None:
        """Ends the watch, and with it an iteration that is waiting elsewhere. Runs go on."""
        self._watcher.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncWatch(AsyncWatching[WatchUpdate]):
    """Iterates over the updates of a run; see `AsyncClient.watch`."""

    async def events(self) -> AsyncIterator[RunEvent]:
        """Iterates over the events alone."""
        async for update in self:
            for event in update.events:
                yield event


async def iterate(pages: Pages[_T]) -> AsyncIterator[_T]:
    """Iterates over everything a listing has."""
    while (item := await pages.read()) is not None:
        yield item


async def iterate_closing(reader: Watcher[_T]) -> AsyncIterator[_T]:
    """Iterates over what is read until None, and closes it however the iteration ends."""
    try:
        while (item := await reader.read()) is not None:
            yield item
    finally:
        reader.close()
