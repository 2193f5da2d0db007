"""A stretch of network on one machine: what goes over it takes time, and calls of gRPC that go over it are counted."""

from __future__ import annotations

import asyncio
import threading
from collections import deque

CHUNK_BYTES = 2**16
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client of HTTP/2 says first. https://www.rfc-editor.org/rfc/rfc9113#name-http-2-connection-preface"""
FRAME_HEADER_BYTES = 9
HEADERS = 1
"""The type of the frame that opens a stream. https://www.rfc-editor.org/rfc/rfc9113#name-frame-format"""


class Distance:
    """Forwards TCP connections to an address, as if that were far away.

    Attributes:
        one_way_s: How much later everything arrives on the other side, in both directions; may be changed at any time.
            What is sent at once arrives at once: it is distance that costs, and no lack of bandwidth.
        calls: How many calls of gRPC were begun over it, streaming ones included.
    """

    def __init__(self, address: str) -> None:
        """Listens at a port of its own; `address` (host:port) needs to be there only when somebody connects."""
        self.one_way_s = 0.0
        self.calls = 0
        self._host, _, port = address.rpartition(":")
        self._target_port = int(port)
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listening = asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        self.port = int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """Where its near side is, host:port."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """Ends it, and what goes over it."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._connections)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._target_port)
        except OSError:  # nobody listens there
            writer.close()
            return
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._carry(reader, far_writer, _Calls(self)), self._carry(far_reader, writer, None))
        finally:
            self._writers -= {writer, far_writer}

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, calls: _Calls | None) -> None:
        """Carries one direction until its end."""
        on_its_way: deque[bytes] = deque()

        def arrive() -> None:
            # Whatever is the oldest: nothing overtakes, also when the way has just become shorter.
            if data := on_its_way.popleft():
                writer.write(data)
            else:
                writer.close()

        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except OSError:
                data = b""  # broken off: on the other side it just ends
            if calls is not None:
                calls.note(data)
            on_its_way.append(data)
            self._loop.call_later(self.one_way_s, arrive)


class _Calls:
    """Finds the calls in what a client of gRPC sends over one connection."""

    def __init__(self, distance: Distance) -> None:
        self._distance = distance
        self._buffer = bytearray()
        self._begun = False
        self._last_stream = 0
        self._other_protocol = False

    def note(self, data: bytes) -> None:
        """Counts the streams that are opened in what is sent; does nothing with another protocol."""
        if self._other_protocol:
            return
        self._buffer += data
        if not self._begun:
            if len(self._buffer) < len(PREFACE):
                return
            if not self._buffer.startswith(PREFACE):
                self._other_protocol = True
                return
            self._begun = True
            del self._buffer[: len(PREFACE)]
        while len(self._buffer) >= FRAME_HEADER_BYTES:
            end = FRAME_HEADER_BYTES + int.from_bytes(self._buffer[:3])
            if len(self._buffer) < end:
                return
            stream = int.from_bytes(self._buffer[5:9]) & 0x7FFFFFFF
            if self._buffer[3] == HEADERS and stream > self._last_stream:
                self._last_stream = stream
                self._distance.calls += 1
            del self._buffer[:end]
