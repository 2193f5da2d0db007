"""How many starts become runs over one stream after the other: what is on its way, and what to send after a break."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timedelta
from typing import Any

import grpc
from perdure.v1 import agent_run_service_pb2 as pb

from perdure_client import _requests
from perdure_client._config import MAX_MESSAGE_BYTES, Config
from perdure_client._convert import started_run_from
from perdure_client._errors import PayloadTooLarge, PerdureError, ProtocolViolation, ServerUnavailable
from perdure_client._retry import Backoff, Patience
from perdure_client._rpc_errors import from_status, silence
from perdure_client._transport import START_AGENTS, Exchange, Silence, Transport
from perdure_client._types import ConflictPolicy, StartedRun
from perdure_client._watch import call_metadata, failure_from

_WINDOW = 256
"""Starts that are on their way, or answered and not yet read: twice what a server has at work of one stream."""
_WINDOW_BYTES = 16 * 2**20
"""What they may take together; one more is taken while they are below it."""
_SILENCE_S = 60.0
"""How long a stream may bring no answer to what was sent. A database that is away is told of much sooner."""
_GOODBYE_S = 5.0
"""How long to wait for the status after the last answer."""

_log = logging.getLogger("perdure_client")


@dataclass(frozen=True, slots=True)
class AgentStart:
    """One of many starts; each attribute is what the argument of `start` with its name is.

    Attributes:
        agent: The name of the agent.
        input: A JSON object; None means `{}`.
        run_id: Your idempotency key. None: the library makes one, the same in every repeat that it makes itself; but
            the same starts given to another `start_many` are other runs.
        traceparent: The W3C `traceparent` whose trace the run continues; empty gives it a trace of its own. Many runs
            do not go into the trace of the span that is current, as one does.
    """

    agent: str
    input: Mapping[str, Any] | None = None
    _: KW_ONLY
    run_id: str | None = None
    agent_version: str = ""
    labels: Mapping[str, str] | None = None
    context_id: str = ""
    delay: float | timedelta | None = None
    start_time: datetime | None = None
    deadline: datetime | timedelta | None = None
    conflict_policy: ConflictPolicy = ConflictPolicy.USE_EXISTING
    validate_only: bool = False
    queue: str = ""
    priority: int = 0
    traceparent: str = ""
    home_region: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartResult:
    """What came of one of many starts: a run, or an error.

    Attributes:
        start: The start as it was given.
        run: The run, as `start` would return it; None when it failed.
        error: What `start` would have raised; None when it did not fail.
    """

    start: AgentStart
    run: StartedRun | None = None
    error: PerdureError | None = None


@dataclass(slots=True)
class _Pending:
    """A start that has no answer yet; `error` when it cannot be sent at all."""

    start: AgentStart
    request: pb.StartAgentsRequest
    error: PerdureError | None = None


class BulkStarter:
    """Starts what it is given; read it until None. Nothing is taken or sent before the first read.

    What has no answer is kept, and sent again over the next stream when one breaks: with the same run_id and
    request_id, so that what was started already is answered, and not started again.
    """

    def __init__(
        self, transport: Transport, config: Config, starts: AsyncIterable[AgentStart] | Iterable[AgentStart]
    ) -> None:
        self._transport = transport
        self._config = config
        self._starts = aiter(starts) if isinstance(starts, AsyncIterable) else iter(starts)
        self._exhausted = False
        self._failure: BaseException | None = None
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0
        self._sent = 0
        self._most = 1
        self._backoff = Backoff()
        self._answered = False
        self._closed = False
        self._stream: Exchange[pb.StartAgentsRequest, pb.StartAgentsResponse] | None = None
        self._answers: deque[pb.StartAgentsResponse] = deque()
        """Of the stream's last message, those that nobody was told of yet."""

    async def read(self) -> StartResult | None:
        """Returns what came of the next start, in their order; None after the last, or after `close`.

        Raises:
            PerdureError: Nothing can be started, or there was no answer for too long. What is not told of may have been
                started.
            Exception: What the iteration of the starts raised, after all those that it gave are told of.
        """
        outage: Patience | None = None
        while not self._closed:
            try:
                result = await self._read_once()
            except PerdureError as failure:
                sent = self._sent
                self._cancel()
                if self._closed:
                    return None
                outage = outage or Patience.of_outage(self._config, self._backoff, answered=self._answered)
                if isinstance(failure, PayloadTooLarge):
                    # gRPC's own, of the stream as a whole. Sent alone, a start is the one that is meant.
                    if sent == 1:
                        return self._told(error=failure)
                    delay_s = 0.0
                elif (delay := outage.delay_before_repeat_s(failure)) is not None:
                    delay_s = delay
                else:
                    raise
                _log.info("stream of starts broke, going on in %.2f s: %s", delay_s, failure)
            except BaseException:
                self._cancel()
                raise
            else:
                if result is None and self._failure is not None:
                    raise self._failure
                return result
            await self._transport.sleep(delay_s)
        return None

    def close(self) -> None:
        """Ends the stream. What was sent may be started all the same."""
        self._closed = True
        self._cancel()

    async def _read_once(self) -> StartResult | None:
        while True:
            if self._pending and self._pending[0].error is not None:
                return self._told(error=self._pending[0].error)
            self._send()
            if self._answers or (self._stream is not None and self._stream.ready):
                return await self._take()
            if self._has_room:
                await self._give()
            elif self._pending:
                return await self._take()
            else:
                await self._finish()
                return None

    @property
    def _has_room(self) -> bool:
        return not self._exhausted and len(self._pending) < _WINDOW and self._pending_bytes < _WINDOW_BYTES

    async def _give(self) -> None:
        """Takes one more start from who has them."""
        try:
            start = await _next(self._starts)
        except Exception as error:  # noqa: BLE001 - the caller's own, told when the starts before it are
            self._failure = error
            start = None
        if start is None:
            self._exhausted = True
            return
        pending = _pending(self._config.namespace, start)
        self._pending.append(pending)
        self._pending_bytes += pending.request.ByteSize()

    def _send(self) -> None:
        """Sends what is waiting for it.

        A stream begins with one start, and with each answer twice as many may be without one. So it is the real reason
        that ends a stream which the server refuses: grpc.aio forgets it when it cannot write (`set_internal_error`).
        """
        while self._sent < min(self._most, len(self._pending)):
            pending = self._pending[self._sent]
            self._sent += 1
            if pending.error is None:
                if self._stream is None:
                    self._stream = self._transport.exchange(START_AGENTS, metadata=call_metadata(self._config))
                self._stream.send(pending.request)

    async def _take(self) -> StartResult:
        """Returns what the next answer says.

        Raises:
            PerdureError: The stream broke, or the answer is that it should be asked again.
        """
        response = self._answers.popleft() if self._answers else await self._receive()
        if response.request_id != self._pending[0].request.start.request_id:
            raise ProtocolViolation("an answer belongs to another start than the one whose turn it is")
        if response.WhichOneof("result") == "error":
            failure = from_status(response.error)
            if failure.retryable:
                raise failure
            return self._told(error=failure)
        return self._told(run=started_run_from(response.started.run, created=response.started.created))

    async def _receive(self) -> pb.StartAgentsResponse:
        """Returns the next message's first answer, and keeps the others."""
        if self._stream is None:
            raise ServerUnavailable("the stream is closed")
        try:
            response = await self._stream.read(_SILENCE_S)
        except grpc.RpcError as error:
            raise failure_from(error, self._config) from error
        except Silence as error:
            raise silence(self._config.address, _SILENCE_S) from error
        if response is None:
            raise ServerUnavailable(f"{self._config.address} ended the stream too early")
        self._answers.extend(response.more)
        return response

    def _told(self, *, run: StartedRun | None = None, error: PerdureError | None = None) -> StartResult:
        """Takes the first start off those that have no answer."""
        pending = self._pending.popleft()
        self._pending_bytes -= pending.request.ByteSize()
        self._sent = max(0, self._sent - 1)
        self._most = min(2 * self._most, _WINDOW)
        self._answered = True
        self._backoff.reset()
        return StartResult(start=pending.start, run=run, error=error)

    async def _finish(self) -> None:
        """Lets the stream end by itself after its last answer, so that the server counts it as OK."""
        if self._stream is not None:
            self._stream.finish()
            try:
                await self._stream.read(_GOODBYE_S)
            except (grpc.RpcError, Silence, PerdureError):
                pass
            finally:
                self._cancel()

    def _cancel(self) -> None:
        self._sent, self._most = 0, 1
        self._answers.clear()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()


async def _next(starts: AsyncIterator[AgentStart] | Iterator[AgentStart]) -> AgentStart | None:
    """Returns the next start; None after the last."""
    if isinstance(starts, AsyncIterator):
        return await anext(starts, None)
    return next(starts, None)


def _pending(namespace: str, start: AgentStart) -> _Pending:
    try:
        request = _requests.start_agent(
            namespace,
            start.agent,
            start.input,
            run_id=start.run_id,
            agent_version=start.agent_version,
            labels=start.labels,
            context_id=start.context_id,
            delay=start.delay,
            start_time=start.start_time,
            deadline=start.deadline,
            conflict_policy=start.conflict_policy,
            validate_only=start.validate_only,
            queue=start.queue,
            priority=start.priority,
            home_region=start.home_region,
        )
        item = _requests.message(
            pb.StartAgentsRequest, start=request, trace_parent=start.traceparent, pack_answers=True
        )
    except PerdureError as error:
        return _Pending(start, pb.StartAgentsRequest(), error)
    if item.ByteSize() > MAX_MESSAGE_BYTES:  # of which gRPC would say nothing but that the stream has failed
        return _Pending(start, pb.StartAgentsRequest(), _too_large(item.ByteSize()))
    return _Pending(start, item)


def _too_large(size_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the start takes {size_bytes} bytes, more than the {MAX_MESSAGE_BYTES} of one message; "
        "send a reference to what is large instead",
        metadata={"field": "request", "limit_bytes": str(MAX_MESSAGE_BYTES)},
    )
