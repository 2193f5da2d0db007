"""The asyncio transport: single attempts over `grpc.aio`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from perdure_client._config import Config
from perdure_client._errors import ClientClosed
from perdure_client._transport import Metadata, Method, Silence

_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT", bound=Message)


class AioStream(Generic[_ResponseT]):
    """An open stream."""

    def __init__(self, transport: AioTransport, call: grpc.aio.UnaryStreamCall[Any, _ResponseT]) -> None:
        self._transport = transport
        self._call = call
        self._cancelled = False

    async def read(self, timeout_s: float) -> _ResponseT | None:
        """See `Stream.read`."""
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._call.read()
        except TimeoutError:
            raise Silence from None
        except asyncio.CancelledError:
            self._transport.raise_if_closed()
            if self._cancelled and not _is_being_cancelled():
                raise ClientClosed("the watch is closed") from None
            raise
        return None if message is grpc.aio.EOF else cast(_ResponseT, message)

    def cancel(self) -> None:
        """See `Stream.cancel`."""
        self._cancelled = True
        self._call.cancel()


class AioExchange(Generic[_RequestT, _ResponseT]):
    """An open stream in both directions: what comes is taken at once, so that sending never waits for a reader."""

    def __init__(self, transport: AioTransport, opener: Any, metadata: Metadata) -> None:
        self._transport = transport
        self._outgoing: asyncio.Queue[_RequestT | None] = asyncio.Queue()
        self._incoming: asyncio.Queue[_ResponseT | Exception | None] = asyncio.Queue()
        self._call: grpc.aio.StreamStreamCall[_RequestT, _ResponseT] = opener(self._requests(), metadata=metadata)
        self._taker = asyncio.create_task(self._take())

    @property
    def ready(self) -> bool:
        """See `Exchange.ready`."""
        return not self._incoming.empty()

    def send(self, request: _RequestT) -> None:
        """See `Exchange.send`."""
        self._outgoing.put_nowait(request)

    def finish(self) -> None:
        """See `Exchange.finish`."""
        self._outgoing.put_nowait(None)

    async def read(self, timeout_s: float) -> _ResponseT | None:
        """See `Exchange.read`."""
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._incoming.get()
        except TimeoutError:
            raise Silence from None
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None:
        """See `Exchange.cancel`."""
        self._taker.cancel()
        self._call.cancel()
        self._incoming.put_nowait(ClientClosed("the stream is closed"))  # for who reads in another task

    async def _requests(self) -> AsyncIterator[_RequestT]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _take(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._incoming.put_nowait(cast(_ResponseT, message))
            self._incoming.put_nowait(None)
        except grpc.RpcError as error:
            self._incoming.put_nowait(error)
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            self._incoming.put_nowait(ClientClosed("the client is closed"))


class AioTransport:
    """A channel of one event loop: the one that makes the first call."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._open: grpc.aio.Channel | None = None
        self._callables: dict[str, Any] = {}
        self._closed = False

    async def unary(
        self, method: Method[_RequestT, _ResponseT], request: _RequestT, *, timeout_s: float, metadata: Metadata
    ) -> _ResponseT:
        """See `Transport.unary`."""
        attempt: grpc.aio.UnaryUnaryMultiCallable[_RequestT, _ResponseT] | None = self._callables.get(method.path)
        if attempt is None:
            attempt = self._channel().unary_unary(method.path, method.encode, method.decode)
            self._callables[method.path] = attempt
        self.raise_if_closed()
        try:
            return await attempt(request, timeout=timeout_s, metadata=metadata)
        except asyncio.CancelledError:  # closing a channel cancels its calls, which must not look like a cancelled task
            self.raise_if_closed()
            raise

    def stream(
        self, method: Method[_RequestT, _ResponseT], request: _RequestT, *, metadata: Metadata
    ) -> AioStream[_ResponseT]:
        """See `Transport.stream`."""
        opener = self._channel().unary_stream(method.path, method.encode, method.decode)
        return AioStream(self, opener(request, metadata=metadata))

    def exchange(
        self, method: Method[_RequestT, _ResponseT], *, metadata: Metadata
    ) -> AioExchange[_RequestT, _ResponseT]:
        """See `Transport.exchange`."""
        opener = self._channel().stream_stream(method.path, method.encode, method.decode)
        return AioExchange(self, opener, metadata)

    async def sleep(self, delay_s: float) -> None:
        """See `Transport.sleep`."""
        await asyncio.sleep(delay_s)
        self.raise_if_closed()

    async def close(self) -> None:
        """See `Transport.close`."""
        self._closed = True
        if self._open is not None:
            await self._open.close()

    def raise_if_closed(self) -> None:
        """Raises ClientClosed once the client was closed, unless it is the task that is being cancelled."""
        if self._closed and not _is_being_cancelled():
            raise ClientClosed("the client is closed")

    def _channel(self) -> grpc.aio.Channel:
        """Returns the channel; made late, as it belongs to the event loop that is running then."""
        self.raise_if_closed()
        if self._open is None:
            address, credentials = self._config.address, self._config.credentials
            if credentials is None:
                self._open = grpc.aio.insecure_channel(address, self._config.channel_options)
            else:
                self._open = grpc.aio.secure_channel(address, credentials, self._config.channel_options)
        return self._open


def _is_being_cancelled() -> bool:
    """Whether somebody cancels the current task; else a CancelledError comes from a call that was ended under it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
