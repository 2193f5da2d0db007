"""Calls servers of other cells: over which connections, as whom, and what is said when nobody answers.

**Why a forwarded call is trusted.** It is not. It carries the caller's own token, and the server that it comes to
checks that as if the caller had come itself: same provider, same audience, same roles. So there is no word by which one
server vouches for a caller, none that could be forged, and nothing that a stolen server certificate could do in a
caller's name; without authentication everybody is one caller in every cell. Between servers the connection is TLS
wherever the public port is (`tls.peer_ca_file` says whom to believe), and where that asks clients for certificates, the
server shows its own. What the call is marked with (`FORWARDED_KEY`) gives no right: it only keeps the receiver from
forwarding again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog

from perdure_service.domain.regions import Cell, Place
from perdure_service.errors import CellNotServed, ConfigurationError, PerdureError, RegionUnavailable
from perdure_service.rpc.authentication import AUTHORIZATION_KEY
from perdure_service.rpc.calls import REQUEST_ID_KEY, TRACE_PARENT_KEY, current_call
from perdure_service.rpc.remote_errors import remote_error
from perdure_service.rpc.watched_files import WatchedFiles
from perdure_service.settings import Settings, TlsSettings, is_loopback

FORWARDED_KEY = "perdure-forwarded"
"""Metadata of a forwarded call: the cell it was sent to."""
TRACE_STATE_KEY = "tracestate"
PASSED_ON = frozenset({AUTHORIZATION_KEY, TRACE_PARENT_KEY, TRACE_STATE_KEY})
"""What the caller sent that is passed on as it is: who it is, and in which trace."""
CONNECT_TIMEOUT_MS = 2_000
"""How long a connection may take. gRPC's default is 20 s, and its callers would wait that long for a lost region."""
RECONNECT_PAUSE_MS = 3_000
"""The longest pause between attempts to connect, so that a region that is back is found soon."""
KEEPALIVE_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 10_000
"""A region that went silent under open streams is noticed after both; servers bear a ping every 10 s."""
OLD_CHANNEL_GRACE_S = 3_600.0
"""How long what is open on a connection may go on after the certificates have changed."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Forward:
    """What a call keeps when it is sent on.

    Attributes:
        metadata: The caller's, as far as it is passed on.
        timeout_s: What is left of the caller's deadline; None for none.
    """

    metadata: tuple[tuple[str, str | bytes], ...]
    timeout_s: float | None

    @classmethod
    def of(cls, context: grpc.aio.ServicerContext[Any, Any]) -> Forward:
        """Returns what a call keeps."""
        metadata = tuple((key, value) for key, value in context.invocation_metadata() or () if key in PASSED_ON)
        return cls((*metadata, (REQUEST_ID_KEY, current_call().call_id)), context.time_remaining())

    def in_trace(self, trace_parent: str) -> Forward:
        """Returns the same in the trace of a `traceparent`; empty means in none."""
        others = tuple((key, value) for key, value in self.metadata if key not in (TRACE_PARENT_KEY, TRACE_STATE_KEY))
        return Forward((*others, (TRACE_PARENT_KEY, trace_parent)) if trace_parent else others, self.timeout_s)

    def within(self, seconds: float) -> Forward:
        """Returns the same with less time, if it has more."""
        return Forward(self.metadata, seconds if self.timeout_s is None else min(seconds, self.timeout_s))


def forwarded_to(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    """Returns the cell that a forwarded call was sent to; None for a call that comes from its caller."""
    for key, value in context.invocation_metadata() or ():
        if key == FORWARDED_KEY:
            return value if isinstance(value, str) else ""
    return None


class Peers:
    """The connections to servers of other cells. Used on the server's event loop only."""

    def __init__(self, settings: Settings, place: Place) -> None:
        """Makes them; nothing connects until it is called.

        Raises:
            ConfigurationError: Tokens would travel between servers in plaintext.
        """
        check_wire(settings, place)
        self._tls = settings.tls
        files = [
            path for path in (settings.tls.certificate_file, settings.tls.key_file, settings.tls.peer_ca_file) if path
        ]
        self._files = WatchedFiles(*files)
        self._options = (
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
            ("grpc.initial_reconnect_backoff_ms", CONNECT_TIMEOUT_MS // 4),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_PAUSE_MS),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ("grpc.enable_retries", 0),  # what is repeated is the caller's to say
            # A name of several servers (a headless service): all get their share, and one that is gone is passed over.
            ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
        )
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Closes the connections, and ends what is open on them."""
        for task in self._closing:
            task.cancel()
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    async def unary(self, cell: Cell, path: str, request: Any, answer: type[Any], forward: Forward) -> Any:
        """Returns the answer of a cell.

        Args:
            cell: Whose servers are asked.
            path: The method's, `/package.Service/Method`.
            request: The message.
            answer: The type of the answer.
            forward: As whom, and until when.

        Raises:
            RegionUnavailable: No server of the cell answers.
            PerdureError: One answered with this error.
        """
        for address in _addresses(cell):
            method = self._channel(address).unary_unary(
                path, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
            )
            try:
                return await method(request, timeout=forward.timeout_s, metadata=_metadata(cell, forward))
            except grpc.aio.AioRpcError as error:
                _raise_answer(error, cell, address)
        raise _unavailable(cell)

    async def stream(
        self, cell: Cell, path: str, request: Any, answer: type[Any], forward: Forward
    ) -> AsyncIterator[Any]:
        """Yields the answers of a cell; arguments and errors as of `unary`."""
        for address in _addresses(cell):
            method = self._channel(address).unary_stream(
                path, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
            )
            call = method(request, timeout=forward.timeout_s, metadata=_metadata(cell, forward))
            begun = False
            try:
                async for message in call:
                    begun = True
                    yield message
                return
            except grpc.aio.AioRpcError as error:
                _raise_answer(error, cell, address)
                if begun:  # the caller has a part of it, and continues by its cursor
                    raise _unavailable(cell) from error
            finally:
                call.cancel()
        raise _unavailable(cell)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._files.changed():
            channels, self._channels = self._channels, {}
            for channel in channels.values():
                task = asyncio.get_running_loop().create_task(channel.close(OLD_CHANNEL_GRACE_S))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        found = self._channels.get(address)
        if found is None:
            found = self._channels[address] = self._connect(address)
        return found

    def _connect(self, address: str) -> grpc.aio.Channel:
        if not self._tls.enabled:
            return grpc.aio.insecure_channel(address, options=self._options)
        return grpc.aio.secure_channel(address, peer_credentials(self._tls), options=self._options)


def check_wire(settings: Settings, place: Place) -> None:
    """Refuses to send callers' tokens to other machines in plaintext.

    Raises:
        ConfigurationError: With the way out.
    """
    if settings.tls.enabled or not settings.auth.enabled or settings.insecure:
        return
    for cell in place.regions.cells.values():
        for address in _addresses(cell):
            if cell is not place.cell and not is_loopback(address.rpartition(":")[0]):
                raise ConfigurationError(
                    f"calls for the cell {cell.name} would be sent to {address} with their tokens in plaintext: set "
                    "PERDURE_TLS__CERTIFICATE_FILE and __KEY_FILE, or PERDURE_INSECURE=1 if the network keeps others "
                    "out"
                )


def peer_credentials(tls: TlsSettings) -> grpc.ChannelCredentials:
    """Returns what a server shows, and whom it believes, when it calls another one.

    Raises:
        RegionUnavailable: A file cannot be read, perhaps in the middle of a replacement.
    """
    try:
        return grpc.ssl_channel_credentials(*map(_read, (tls.peer_ca_file, tls.key_file, tls.certificate_file)))
    except OSError as error:
        raise RegionUnavailable("this server cannot read its certificates; wait and repeat the call") from error


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _addresses(cell: Cell) -> Iterator[str]:
    """Yields where a cell's servers may be: at home, then where they are when its region is lost."""
    yield cell.address
    if cell.standby_address:
        yield cell.standby_address


def _metadata(cell: Cell, forward: Forward) -> Sequence[tuple[str, str | bytes]]:
    return (*forward.metadata, (FORWARDED_KEY, cell.name))


def _raise_answer(error: grpc.aio.AioRpcError, cell: Cell, address: str) -> None:
    """Raises what a server of the cell answered; returns when there was none at the address."""
    told = remote_error(error)
    if told is not None and told.reason != CellNotServed.reason:
        raise told from None
    why = told.message if told is not None else f"{error.code().name}: {error.details()}"
    _log.warning("peers.no_answer", cell=cell.name, region=cell.region, address=address, error=why[:200])


def _unavailable(cell: Cell) -> PerdureError:
    return RegionUnavailable(
        f"the region {cell.region}, where the run lives, cannot be reached; wait and repeat the call",
        region=cell.region,
        cell=cell.name,
    )
