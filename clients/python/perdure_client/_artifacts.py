"""Reads an artifact piece by piece, goes on where a broken stream left off, and compares the hash at the end."""

from __future__ import annotations

import hashlib

import grpc
from perdure.v1 import agent_run_service_pb2 as pb

from perdure_client import _transport
from perdure_client._config import Config
from perdure_client._errors import PerdureError, ProtocolViolation, ServerUnavailable
from perdure_client._retry import Patience
from perdure_client._transport import Stream, Transport
from perdure_client._types import ArtifactInfo
from perdure_client._watch import call_metadata, failure_from

_SILENCE_S = 30.0
"""How long a stream that should bring bytes may bring none."""


class ArtifactReader:
    """The bytes of one artifact."""

    def __init__(self, transport: Transport, config: Config, request: pb.ReadArtifactRequest) -> None:
        self._transport = transport
        self._config = config
        self._request = request
        self._stream: Stream[pb.ReadArtifactResponse] | None = None
        self._hash = hashlib.sha256()
        self._read_bytes = 0
        self.info: ArtifactInfo | None = None
        """What is known of it, once something was read."""

    async def read(self) -> bytes | None:
        """Returns the next bytes; None at the end, when they are all there and are what the hash says.

        Raises:
            PerdureError: Not worth repeating, or there was no answer for too long.
        """
        patience = Patience(self._config.reconnect_timeout_s, self._config.reconnect_timeout_s)
        while True:
            try:
                return await self._read_once()
            except PerdureError as failure:
                self.close()
                delay_s = patience.delay_before_repeat_s(failure)
                if delay_s is None:
                    raise
            except BaseException:
                self.close()
                raise
            await self._transport.sleep(delay_s)

    def close(self) -> None:
        """Ends the stream; a later `read` opens another one where this one was."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None

    async def _read_once(self) -> bytes | None:
        try:
            if self._stream is None:
                self._request.offset = self._read_bytes
                self._stream = self._transport.stream(
                    _transport.READ_ARTIFACT, self._request, metadata=call_metadata(self._config)
                )
            while (response := await self._stream.read(_SILENCE_S)) is not None:
                if response.HasField("artifact"):
                    self._accept(response.artifact)
                if response.data:
                    self._hash.update(response.data)
                    self._read_bytes += len(response.data)
                    return response.data
        except grpc.RpcError as error:
            raise failure_from(error, self._config) from error
        except _transport.Silence:
            raise ServerUnavailable("the server sent nothing for too long") from None
        self._check_end()
        return None

    def _accept(self, message: pb.ArtifactInfo) -> None:
        found = ArtifactInfo(
            name=message.name, media_type=message.media_type, size_bytes=message.size_bytes, sha256=message.sha256
        )
        if self.info is not None and self._read_bytes and self.info.sha256 != found.sha256:
            raise ProtocolViolation("the artifact was written anew while it was read; read it again")
        self.info = found

    def _check_end(self) -> None:
        if self.info is None:
            raise ProtocolViolation("the server did not say what the artifact is")
        if self._read_bytes != self.info.size_bytes or self._hash.hexdigest() != self.info.sha256:
            raise ProtocolViolation(
                f"{self._read_bytes} of {self.info.size_bytes} bytes came, or others than the hash says; read it again"
            )


async def read_all(reader: ArtifactReader) -> bytes:
    """Returns all bytes of an artifact."""
    pieces: list[bytes] = []
    while (data := await reader.read()) is not None:
        pieces.append(data)
    return b"".join(pieces)
