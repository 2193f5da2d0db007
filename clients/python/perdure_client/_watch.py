"""How a watch survives its connections: what is new in a response, and what to ask for after a break.

`WatchPosition` is the state machine, without I/O. `RunWatcher` and `ApprovalWatcher` drive one over a transport.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from perdure.v1 import agent_run_service_pb2, approval_service_pb2, run_event_pb2

from perdure_client._config import Config
from perdure_client._convert import approval_from, event_from, run_from
from perdure_client._errors import (
    ApprovalNotFound,
    ConfigurationError,
    PerdureError,
    ProtocolViolation,
    ServerUnavailable,
    TokenExpired,
)
from perdure_client._events import WatchUpdate
from perdure_client._retry import LONGEST_DELAY_S, Backoff, Patience
from perdure_client._rpc_errors import from_rpc_error, silence
from perdure_client._tracing import trace_metadata
from perdure_client._transport import WATCH_APPROVALS, WATCH_RUN, Metadata, Method, Silence, Stream, Transport
from perdure_client._types import Approval, ApprovalState

OnReconnect = Callable[[PerdureError, float], None]
"""Told of every break: the error, and the seconds until the next attempt."""

DEFAULT_HEARTBEAT_S = 15.0  # the server's own default
_MISSED_HEARTBEATS = 4
"""So many in a row, and the connection counts as dead, whatever TCP thinks of it."""
_GOODBYE_S = 2.0
"""How long to wait for the status after the last message."""

_log = logging.getLogger("perdure_client")

_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT", bound=Message)
_ItemT = TypeVar("_ItemT", covariant=True)


class HoleInLog(ServerUnavailable):
    """A response skipped events. Asked for again, from the last one seen; twice is `ProtocolViolation`."""

    reason = "HOLE_IN_LOG"


class WatchPosition:
    """Where the watch of a run stands. Every event of a run is returned once and in order, however often it is sent.

    Args:
        request: The caller's: what to watch, and where to begin.
    """

    def __init__(self, request: agent_run_service_pb2.WatchRunRequest) -> None:
        self._request = request
        self._cursor = ""
        self._caught_up = False
        self._complete = not request.kinds  # filtered, sequences have gaps by right
        position = request.WhichOneof("position")
        # The last event seen of each run. A run that is not there begins at its first event; with a watch that begins
        # by cursor or from now on, wherever the server begins.
        self._seen: dict[str, int] = {}
        self._before_any: int | None = 0 if position is None else None
        if position == "after_sequence":
            self._seen[request.run_id] = request.after_sequence
        self._hole: tuple[str, int] | None = None
        self.ended = False

    def next_request(self) -> agent_run_service_pb2.WatchRunRequest:
        """Returns what to ask for now: the same view, from where the watch stands."""
        request = agent_run_service_pb2.WatchRunRequest()
        request.CopyFrom(self._request)
        if self._hole is not None and not request.include_children:
            request.after_sequence = self._hole[1]
        elif self._cursor:
            request.cursor = self._cursor
        return request

    def accept(self, response: agent_run_service_pb2.WatchRunResponse) -> WatchUpdate | None:
        """Returns what is new in a response; None when nothing is, as in a heartbeat.

        Raises:
            HoleInLog: Events are missing before this response's; none of it was taken.
            ProtocolViolation: The same events are missing again.
        """
        root = self._request.run_id
        if self._request.from_now and not self._seen:
            self._seen[root] = response.last_sequence
        snapshot = run_from(response.snapshot) if response.HasField("snapshot") else None
        fresh = self._take(response.events)
        self._cursor = response.cursor or self._cursor
        self.ended = response.end_of_run
        newly_caught_up = response.caught_up and not self._caught_up
        self._caught_up = self._caught_up or response.caught_up
        if not (fresh or snapshot or newly_caught_up or response.end_of_run):
            return None
        return WatchUpdate(
            events=tuple(event_from(event) for event in fresh),
            cursor=self._cursor,
            snapshot=snapshot,
            last_sequence=self._seen.get(root, 0),
            caught_up=response.caught_up,
            end_of_run=response.end_of_run,
        )

    def _take(self, events: Iterable[run_event_pb2.RunEvent]) -> list[run_event_pb2.RunEvent]:
        """Returns the events that were not seen yet, and counts them as seen; all of them or, at a hole, none."""
        fresh: list[run_event_pb2.RunEvent] = []
        moved: dict[str, int] = {}
        for event in events:
            known = moved.get(event.run_id, self._seen.get(event.run_id, self._before_any))
            if known is not None and event.sequence <= known:
                continue
            if self._complete and known is not None and event.sequence != known + 1:
                self._report_hole(event.run_id, known, event.sequence)
            moved[event.run_id] = event.sequence
            fresh.append(event)
        if fresh:
            self._seen |= moved
            self._hole = None
        return fresh

    def _report_hole(self, run_id: str, before: int, after: int) -> None:
        text = f"events {before + 1} to {after - 1} of run {run_id} are missing from its stream"
        # Where to go on: what precedes the hole in this response was not taken either.
        hole = run_id, self._seen.get(run_id, self._before_any) or 0
        if self._hole == hole:
            raise ProtocolViolation(text, metadata={"run_id": run_id, "last_sequence": str(before)})
        self._hole = hole
        raise HoleInLog(text)


class _Reader(Generic[_RequestT, _ResponseT]):
    """One stream after the other: reads a message, and after a break the next one from a new stream."""

    def __init__(
        self,
        transport: Transport,
        config: Config,
        method: Method[_RequestT, _ResponseT],
        *,
        heartbeat_s: float | None,
        on_reconnect: OnReconnect | None,
    ) -> None:
        self._transport = transport
        self._config = config
        self._method = method
        self._silence_s = _MISSED_HEARTBEATS * (heartbeat_s or DEFAULT_HEARTBEAT_S)
        self._on_reconnect = on_reconnect
        self._backoff = Backoff()
        self._answered = False
        self._closed = False
        self._opened_s = 0.0
        self._stream: Stream[_ResponseT] | None = None

    async def read(self, next_request: Callable[[], _RequestT], accept: Callable[[_ResponseT], None]) -> None:
        """Hands the next message to `accept`, after as many attempts as it takes; none after `close`.

        A read that is cancelled costs the connection and nothing else: the next one goes on where `accept` left off.

        Raises:
            PerdureError: Not worth repeating, or there was no answer for too long.
        """
        outage: Patience | None = None
        while not self._closed:
            try:
                await self._read_once(next_request, accept)
            except PerdureError as failure:
                self._cancel()
                if self._closed:
                    return
                if outage is None:
                    outage = Patience.of_outage(self._config, self._backoff, answered=self._answered)
                delay_s = outage.delay_before_repeat_s(failure)
                if delay_s is None:
                    raise
                _log.info("stream broke, reconnecting in %.2f s: %s", delay_s, failure)
                if self._on_reconnect is not None:
                    self._on_reconnect(failure, delay_s)
            except BaseException:
                self._cancel()
                raise
            else:
                return
            await self._transport.sleep(delay_s)

    async def _read_once(self, next_request: Callable[[], _RequestT], accept: Callable[[_ResponseT], None]) -> None:
        address = self._config.address
        try:
            if self._stream is None:
                self._stream = self._open(next_request())
            response = await self._stream.read(self._silence_s)
        except grpc.RpcError as error:
            raise failure_from(error, self._config) from error
        except Silence as error:
            raise silence(address, self._silence_s) from error
        if response is None:
            raise ServerUnavailable(f"{address} ended the stream too early")
        accept(response)
        self._answered = True
        if time.monotonic() - self._opened_s >= LONGEST_DELAY_S:
            self._backoff.reset()  # it held; one that breaks at once, again and again, is asked for ever more rarely

    def _open(self, request: _RequestT) -> Stream[_ResponseT]:
        self._opened_s = time.monotonic()
        return self._transport.stream(self._method, request, metadata=call_metadata(self._config))

    async def finish(self) -> None:
        """Lets the stream end by itself after its last message, so that the server counts it as OK."""
        if self._stream is not None:
            try:
                await self._stream.read(_GOODBYE_S)
            except (grpc.RpcError, Silence, PerdureError):
                pass
            finally:
                self._cancel()

    def close(self) -> None:
        """Ends the stream, also under a read in another task or thread."""
        self._closed = True
        self._cancel()

    def _cancel(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()


def call_metadata(config: Config) -> Metadata:
    """Returns what goes with every call: the token, and the caller's trace.

    Raises:
        ConfigurationError: gRPC would refuse the token, as an error of its own that does not name it.
    """
    token = config.current_token()
    if not (token.isascii() and token.isprintable()):
        raise ConfigurationError("the token holds characters that no header may have; copy it again (PERDURE_TOKEN)")
    credentials: Metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return credentials + trace_metadata()


def failure_from(error: grpc.RpcError, config: Config) -> PerdureError:
    """Returns what a failed call raises; an expired token is worth a repeat where the next one is another."""
    failure = from_rpc_error(error, config.address)
    if isinstance(failure, TokenExpired) and config.renews_token:
        failure.retryable = True
    return failure


class Watcher(Protocol[_ItemT]):
    """A watch of something; read it until None."""

    async def read(self) -> _ItemT | None:
        """Returns what is new; None after the end, or after `close`."""
        ...

    def close(self) -> None:
        """Ends the watch, and nothing else."""
        ...


class RunWatcher:
    """The watch of a run; read it until None."""

    def __init__(
        self,
        transport: Transport,
        config: Config,
        request: agent_run_service_pb2.WatchRunRequest,
        *,
        heartbeat_s: float | None,
        on_reconnect: OnReconnect | None,
    ) -> None:
        self._position = WatchPosition(request)
        self._reader = _Reader(transport, config, WATCH_RUN, heartbeat_s=heartbeat_s, on_reconnect=on_reconnect)
        self._update: WatchUpdate | None = None
        self._closed = False

    async def read(self) -> WatchUpdate | None:
        """Returns what is new; None after the end of the run, or after `close`."""
        while not (self._closed or self._position.ended):
            await self._reader.read(self._position.next_request, self._accept)
            update, self._update = self._update, None
            if update is not None:
                return update
        await self._reader.finish()
        return None

    def close(self) -> None:
        """Ends the watch. The run goes on."""
        self._closed = True
        self._reader.close()

    def _accept(self, response: agent_run_service_pb2.WatchRunResponse) -> None:
        self._update = self._position.accept(response)


class ApprovalWatcher:
    """The live inbox: every approval once per revision, also those that were decided while the connection was down."""

    def __init__(
        self,
        transport: Transport,
        config: Config,
        request: approval_service_pb2.WatchApprovalsRequest,
        *,
        get_approval: Callable[[str], Awaitable[Approval]],
        heartbeat_s: float | None,
        on_reconnect: OnReconnect | None,
    ) -> None:
        self._request = request
        self._get_approval = get_approval
        self._reader = _Reader(transport, config, WATCH_APPROVALS, heartbeat_s=heartbeat_s, on_reconnect=on_reconnect)
        self._news: deque[Approval] = deque()
        self._revisions: dict[str, int] = {}
        self._pending: set[str] = set()
        self._unconfirmed: set[str] = set()
        self._catching_up = True
        self._closed = False

    async def read(self) -> Approval | None:
        """Returns the next approval that is pending or has changed; None only after `close`."""
        while not self._closed:
            if self._news:
                return self._news.popleft()
            if not self._catching_up and self._unconfirmed:
                await self._ask_for(next(iter(self._unconfirmed)))
            else:
                await self._reader.read(self._next_request, self._accept)
        return None

    def close(self) -> None:
        """Ends the watch."""
        self._closed = True
        self._reader.close()

    def _next_request(self) -> approval_service_pb2.WatchApprovalsRequest:
        """Called for every new stream: it tells again what is pending, and not what ceased to be meanwhile."""
        self._catching_up = True
        self._unconfirmed = set(self._pending)
        self._revisions = {approval_id: self._revisions[approval_id] for approval_id in self._pending}
        return self._request

    async def _ask_for(self, approval_id: str) -> None:
        """Takes what became of an approval that was pending before a break and is not any more."""
        try:
            self._take(await self._get_approval(approval_id))
        except ApprovalNotFound:  # its run was deleted
            self._unconfirmed.discard(approval_id)
            self._pending.discard(approval_id)

    def _accept(self, response: approval_service_pb2.WatchApprovalsResponse) -> None:
        for message in response.approvals:
            self._take(approval_from(message))
        if response.caught_up:
            self._catching_up = False

    def _take(self, approval: Approval) -> None:
        approval_id = approval.approval_id
        self._unconfirmed.discard(approval_id)
        if approval.revision <= self._revisions.get(approval_id, -1):
            return
        self._revisions[approval_id] = approval.revision
        if approval.state is ApprovalState.PENDING:
            self._pending.add(approval_id)
        else:
            self._pending.discard(approval_id)
        self._news.append(approval)
