"""The blocking transport: single attempts over blocking gRPC, in coroutines that never suspend.

So the operations are written once, and `run_blocking` runs them to their end in one go, in any thread, with or without
an event loop.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Coroutine
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from perdure_client._config import Config
from perdure_client._errors import ClientClosed
from perdure_client._transport import Metadata, Method, Silence

_T = TypeVar("_T")
_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT", bound=Message)
_ReadT = TypeVar("_ReadT", bound=Message, covariant=True)


def run_blocking(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Returns the result of a coroutine that never suspends, as those over `SyncTransport` are."""
    try:
        coroutine.send(None)
    except StopIteration as result:
        value: _T = result.value
        return value
    coroutine.close()
    raise RuntimeError("a coroutine over the blocking transport suspended")


class _Call(Protocol[_ReadT]):
    """What is used of gRPC's blocking stream call."""

    def __next__(self) -> _ReadT: ...
    def cancel(self) -> bool: ...


class _Watchdog:
    """Cancels calls on which a read takes too long: a blocking read cannot time out by itself.

    Its one thread lives only while reads are going on, and a little longer.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reads: dict[int, tuple[float, _Call[Any]]] = {}
        self._thread: threading.Thread | None = None
        self._wakes_s = 0.0

    def guard(self, call: _Call[Any], timeout_s: float) -> None:
        """Begins to watch a read."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            self._reads[id(call)] = (until_s, call)
            if self._thread is None:
                self._wakes_s = until_s
                self._thread = threading.Thread(target=self._run, name="perdure-watchdog", daemon=True)
                self._thread.start()
            elif until_s < self._wakes_s:
                self._changed.notify()

    def release(self, call: _Call[Any]) -> bool:
        """Ends to watch a read; returns whether it took too long."""
        with self._changed:
            return self._reads.pop(id(call), None) is None

    def stop(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._reads.clear()
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._reads:
                self._wakes_s = min(until_s for until_s, _ in self._reads.values())
                self._changed.wait(max(0.0, self._wakes_s - time.monotonic()))
                now_s = time.monotonic()
                for key in [key for key, (until_s, _) in self._reads.items() if until_s <= now_s]:
                    self._reads.pop(key)[1].cancel()
            self._thread = None


class SyncStream(Generic[_ResponseT]):
    """An open stream."""

    def __init__(self, transport: SyncTransport, call: _Call[_ResponseT], watchdog: _Watchdog) -> None:
        self._transport = transport
        self._call = call
        self._watchdog = watchdog

    async def read(self, timeout_s: float) -> _ResponseT | None:
        """See `Stream.read`."""
        self._watchdog.guard(self._call, timeout_s)
        silent = False
        try:
            try:
                return next(self._call)
            finally:
                silent = self._watchdog.release(self._call)
        except StopIteration:
            return None
        except grpc.RpcError:
            self._transport.raise_if_closed()
            if silent:
                raise Silence from None
            raise

    def cancel(self) -> None:
        """See `Stream.cancel`."""
        self._call.cancel()


class SyncExchange(Generic[_RequestT, _ResponseT]):
    """An open stream in both directions: a thread takes what comes, so that a reader can know whether there is any."""

    def __init__(self, transport: SyncTransport, opener: Any, metadata: Metadata) -> None:
        self._transport = transport
        self._outgoing: queue.SimpleQueue[_RequestT | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[_ResponseT | Exception | None] = queue.SimpleQueue()
        self._call = opener(iter(self._outgoing.get, None), metadata=metadata)
        threading.Thread(target=self._take, name="perdure-answers", daemon=True).start()

    @property
    def ready(self) -> bool:
        """See `Exchange.ready`."""
        return not self._incoming.empty()

    def send(self, request: _RequestT) -> None:
        """See `Exchange.send`."""
        self._outgoing.put(request)

    def finish(self) -> None:
        """See `Exchange.finish`."""
        self._outgoing.put(None)

    async def read(self, timeout_s: float) -> _ResponseT | None:
        """See `Exchange.read`."""
        try:
            message = self._incoming.get(timeout=timeout_s)
        except queue.Empty:
            raise Silence from None
        if isinstance(message, Exception):
            self._transport.raise_if_closed()
            raise message
        return message

    def cancel(self) -> None:
        """See `Exchange.cancel`."""
        self._outgoing.put(None)  # else gRPC's thread would wait for it for ever
        self._call.cancel()

    def _take(self) -> None:
        try:
            for message in self._call:
                self._incoming.put(message)
            self._incoming.put(None)
        except grpc.RpcError as error:
            self._incoming.put(error)


class SyncTransport:
    """A channel, for any number of threads."""

    def __init__(self, config: Config) -> None:
        address, credentials = config.address, config.credentials
        if credentials is None:
            self._channel = grpc.insecure_channel(address, config.channel_options)
        else:
            self._channel = grpc.secure_channel(address, credentials, config.channel_options)
        self._callables: dict[str, Any] = {}
        self._watchdog = _Watchdog()
        self._closed = threading.Event()

    async def unary(
        self, method: Method[_RequestT, _ResponseT], request: _RequestT, *, timeout_s: float, metadata: Metadata
    ) -> _ResponseT:
        """See `Transport.unary`."""
        self.raise_if_closed()
        attempt: grpc.UnaryUnaryMultiCallable[_RequestT, _ResponseT] | None = self._callables.get(method.path)
        if attempt is None:
            attempt = self._channel.unary_unary(method.path, method.encode, method.decode)
            self._callables[method.path] = attempt
        try:
            return attempt(request, timeout=timeout_s, metadata=metadata)
        except (grpc.RpcError, ValueError):  # ValueError: the channel was closed just now
            self.raise_if_closed()
            raise

    def stream(
        self, method: Method[_RequestT, _ResponseT], request: _RequestT, *, metadata: Metadata
    ) -> SyncStream[_ResponseT]:
        """See `Transport.stream`."""
        self.raise_if_closed()
        opener = self._channel.unary_stream(method.path, method.encode, method.decode)
        try:
            call = opener(request, metadata=metadata)
        except ValueError:
            self.raise_if_closed()
            raise
        return SyncStream(self, call, self._watchdog)

    def exchange(
        self, method: Method[_RequestT, _ResponseT], *, metadata: Metadata
    ) -> SyncExchange[_RequestT, _ResponseT]:
        """See `Transport.exchange`."""
        self.raise_if_closed()
        opener = self._channel.stream_stream(method.path, method.encode, method.decode)
        try:
            return SyncExchange(self, opener, metadata)
        except ValueError:
            self.raise_if_closed()
            raise

    async def sleep(self, delay_s: float) -> None:
        """See `Transport.sleep`."""
        self._closed.wait(delay_s)
        self.raise_if_closed()

    async def close(self) -> None:
        """See `Transport.close`."""
        self._closed.set()
        self._watchdog.stop()
        self._channel.close()

    def raise_if_closed(self) -> None:
        """Raises ClientClosed once the client was closed."""
        if self._closed.is_set():
            raise ClientClosed("the client is closed")
