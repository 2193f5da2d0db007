"""The asyncio transport: single attempts over `grpc.aio`."""

from __future__ import annotations

import asyncio
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
