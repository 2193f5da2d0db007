"""Decides how a stream of requests is read and answered: in order, so many at once, no faster than it is read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

import grpc.aio

from perdure_service.errors import InvalidArgument

T = TypeVar("T")
R = TypeVar("R")

MAX_AT_WORK = 128
"""Requests of one stream that are at work, or answered and not yet taken by the client."""
MAX_AT_WORK_BYTES = 8 * 2**20
"""What they may take together: one more is read while they are below it. As much as the largest message may take."""


class Requests(AsyncIterator[Any]):
    """The requests of a stream, until the client has no more, or `stop`."""

    def __init__(self, read: Callable[[], Awaitable[Any]], decode: Callable[[bytes], Any]) -> None:
        """Takes a stream that nobody has read from.

        Args:
            read: Returns the next message as bytes, or `grpc.aio.EOF`.
            decode: Makes a request of it. One that cannot be decoded comes as the error, for it is an answer's matter.
        """
        self._read = read
        self._decode = decode
        self._stopped = False
        self._stops: list[Callable[[], object]] = []
        self._reader: asyncio.Task[Any] | None = None

    @property
    def stopped(self) -> bool:
        """Whether it was the server that ended them."""
        return self._stopped

    def stop(self) -> None:
        """Ends the requests, also under a read."""
        self._stopped = True
        if self._reader is not None:
            self._reader.cancel()
        for call in self._stops:
            call()

    def on_stop(self, call: Callable[[], object]) -> None:
        """Has something called when the server ends them."""
        self._stops.append(call)

    async def __anext__(self) -> Any:
        """Returns the next request, or an InvalidArgument in its place."""
        if self._stopped:
            raise StopAsyncIteration
        reader = self._reader = asyncio.current_task()
        cancelling = reader.cancelling() if reader is not None else 0
        try:
            data = await self._read()
        except asyncio.CancelledError:
            # As in asyncio.timeout(): a cancellation from elsewhere stays what it is.
            if self._stopped and reader is not None and reader.uncancel() <= cancelling:
                raise StopAsyncIteration from None
            raise
        finally:
            self._reader = None
        if data is grpc.aio.EOF:
            raise StopAsyncIteration
        try:
            return self._decode(data)
        except InvalidArgument as error:
            return error


class _Room:
    """How much is at work, and whether there is room for one more request."""

    def __init__(self) -> None:
        self._count = 0
        self._bytes = 0
        self._free = asyncio.Event()
        self._free.set()

    async def wait(self) -> None:
        """Returns when one more request may be read."""
        await self._free.wait()

    def take(self, size_bytes: int) -> None:
        """Counts a request that was read."""
        self._change(1, size_bytes)

    def give_back(self, size_bytes: int) -> None:
        """Counts a request whose answer was taken."""
        self._change(-1, -size_bytes)

    def _change(self, count: int, size_bytes: int) -> None:
        self._count += count
        self._bytes += size_bytes
        if self._count < MAX_AT_WORK and self._bytes < MAX_AT_WORK_BYTES:
            self._free.set()
        else:
            self._free.clear()


class InOrder(Generic[T, R]):
    """Answers the requests of a stream at the same time, and yields the answers in the order of the requests.

    An answer whose turn it is goes out before the next request is read when there is no room for more: who does not
    take the answers is not read from. HTTP/2's flow control passes that on to the client.
    """

    def __init__(
        self, requests: AsyncIterator[T], serve: Callable[[T], Coroutine[Any, Any, R]], size_of: Callable[[T], int]
    ) -> None:
        """Takes what to answer, and how.

        Args:
            requests: In order.
            serve: Answers one, in a task of its own. What it raises ends the stream.
            size_of: The bytes of one.
        """
        self._requests = requests
        self._serve = serve
        self._size_of = size_of
        self._room = _Room()
        self._turns: deque[tuple[asyncio.Task[R], int]] = deque()
        self._all_read = False
        self._changed = asyncio.Event()
        self._working: set[asyncio.Task[R]] = set()

    async def answers(self) -> AsyncIterator[R]:
        """Yields the answers. Closed before its end, it cancels what is at work and waits for that."""
        reader = asyncio.create_task(self._read())
        try:
            while not await self._ended():
                task, size_bytes = self._turns.popleft()
                answer = await task
                self._working.discard(task)
                yield answer
                self._room.give_back(size_bytes)
            await reader  # raises what ended the requests, if it was not their end
        finally:
            left: tuple[asyncio.Task[Any], ...] = (reader, *self._working)
            for unfinished in left:
                unfinished.cancel()
            await asyncio.wait(left)

    @property
    def ready(self) -> bool:
        """Whether the next answer is there, and is none that ends the stream."""
        if not self._turns:
            return False
        task, _ = self._turns[0]
        return task.done() and not task.cancelled() and task.exception() is None

    async def _ended(self) -> bool:
        """Returns whether all requests are read and answered; waits until that is known."""
        while not self._turns and not self._all_read:
            self._changed.clear()
            await self._changed.wait()
        return not self._turns

    async def _read(self) -> None:
        try:
            async for request in self._requests:
                size_bytes = self._size_of(request)
                task = asyncio.create_task(self._serve(request))
                self._working.add(task)
                self._room.take(size_bytes)
                self._turns.append((task, size_bytes))
                self._changed.set()
                await self._room.wait()
        finally:
            self._all_read = True
            self._changed.set()
