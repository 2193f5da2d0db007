"""Serves StartAgents: each item is checked, started, audited and measured as a call of StartAgent is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

from google.rpc import status_pb2
from perdure.v1 import agent_run_service_pb2 as pb

from perdure_service.errors import InvalidArgument, QuotaExceeded
from perdure_service.logs import audit_written
from perdure_service.rpc import access
from perdure_service.rpc.audit import audit
from perdure_service.rpc.calls import current_call, record_duration, rights_of
from perdure_service.rpc.failures import described, passes
from perdure_service.rpc.request_streams import InOrder
from perdure_service.rpc.streams import closing
from perdure_service.telemetry import parse_traceparent

PACKED_BYTES = 2**18
"""Answers that become one message: with another one it is still far below what clients take."""

Item = pb.StartAgentsRequest | InvalidArgument
"""A request, or why it cannot be read."""
Start = Callable[[pb.StartAgentRequest, str], Awaitable[pb.StartAgentResponse]]
"""Starts one run, for the caller of the call that is being served, in the trace of a `traceparent`."""


class BulkStarts:
    """The starts of one stream."""

    def __init__(self, start: Start, namespaces: Collection[str]) -> None:
        """Makes one for the call that is being served.

        Args:
            start: What StartAgent does.
            namespaces: Those that are declared.
        """
        self._start = start
        self._namespaces = namespaces
        self._call = current_call()
        self._refused = asyncio.Lock()
        self._packs: bool | None = None
        """Whether the client asked for several answers in a message, with its first item."""

    async def answers(self, items: AsyncIterator[Item]) -> AsyncIterator[pb.StartAgentsResponse]:
        """Yields one answer per item, in order; to who understands that, those that are there together as one message.

        A message costs the server and the client more than anything else that they do for a start.
        """
        in_order = InOrder(items, self._answer, _size)
        message, size_bytes = None, 0
        async with closing(in_order.answers()) as answers:
            async for answer in answers:
                if message is None:
                    message, size_bytes = answer, 0
                else:
                    message.more.append(answer)
                size_bytes += answer.ByteSize() if self._packs else PACKED_BYTES
                if size_bytes >= PACKED_BYTES or not in_order.ready:
                    yield message
                    message = None

    async def _answer(self, item: Item) -> pb.StartAgentsResponse:
        call, began = self._call, time.monotonic()
        if self._packs is None:
            self._packs = not isinstance(item, InvalidArgument) and item.pack_answers
        request = None if isinstance(item, InvalidArgument) else item.start
        request_id = "" if request is None else request.request_id
        try:
            if isinstance(item, InvalidArgument):
                raise item
            access.check(call.method, rights_of(call), item.start, self._namespaces)
            if item.start.HasField("wait"):
                raise InvalidArgument("wait", "is for StartAgent alone; name the run in WaitRuns instead")
            started = await self._start_in_time(item.start, _trace_parent(item))
        except BaseException as error:
            if passes(error):
                # The client went away. Whether it was started is not known; it may have been.
                audit(call, request, None, "CANCELLED")
                record_duration(call, "CANCELLED", began)
                raise
            failure, reason = described(error, call, time.monotonic() - began)
            audit(call, request, None, failure.code.name, reason)
            await audit_written()
            record_duration(call, failure.code.name, began)
            status = status_pb2.Status.FromString(failure.details)
            return pb.StartAgentsResponse(request_id=request_id, error=status)
        audit(call, request, started, "OK")
        await audit_written()
        record_duration(call, "OK", began)
        return pb.StartAgentsResponse(request_id=request_id, started=started)

    async def _start_in_time(self, request: pb.StartAgentRequest, trace_parent: str) -> pb.StartAgentResponse:
        """Starts a run, as soon as its namespace may start one more.

        Who sends a hundred thousand starts knows that they take their time. An error for each that is too early would
        have every client build what is built here: waiting, repeating, and keeping the order. While a start waits, the
        stream fills up and is not read from, so nothing piles up. One start of a stream asks at a time, for each time
        that it is refused costs a look whether the run is there.
        """
        try:
            return await self._start(request, trace_parent)
        except QuotaExceeded as refusal:
            delay_s = refusal.retry_delay_s
        async with self._refused:
            while True:
                await asyncio.sleep(delay_s or 0)
                try:
                    return await self._start(request, trace_parent)
                except QuotaExceeded as refusal:
                    delay_s = refusal.retry_delay_s


def _size(item: Item) -> int:
    return 0 if isinstance(item, InvalidArgument) else item.ByteSize()


def _trace_parent(item: pb.StartAgentsRequest) -> str:
    """Returns the item's `traceparent`; one that is malformed is ignored, as it is in metadata."""
    return item.trace_parent if parse_traceparent(item.trace_parent) else ""
