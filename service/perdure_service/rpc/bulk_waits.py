"""Serves WaitRuns: each run is waited for as by a call of WaitRun, and ends that come together are one message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

from google.rpc import status_pb2
from perdure.v1 import agent_run_service_pb2 as pb

from perdure_service.domain.runs import DEFAULT_NAMESPACE
from perdure_service.errors import InvalidArgument, Overloaded
from perdure_service.rpc import access
from perdure_service.rpc.calls import current_call, record_duration, rights_of
from perdure_service.rpc.failures import described, passes
from perdure_service.rpc.request_streams import Requests
from perdure_service.rpc.validation import Violations
from perdure_service.store.sqlstates import JITTER

MAX_RUNS = 1_000
"""Runs that one request may name."""
MAX_WAITING = 10_000
"""Runs that a stream waits for, or has not yet told of: below it, one more request is read."""

Wait = Callable[[pb.WaitRunRequest], Awaitable[pb.WaitRunResponse]]
"""Waits for a run, for the caller of the call that is being served; may come back before its end."""


class BulkWaits:
    """The waits of one stream."""

    def __init__(self, wait: Wait, namespaces: Collection[str], response_bytes: int) -> None:
        """Makes one for the call that is being served.

        Args:
            wait: What WaitRun does.
            namespaces: Those that are declared.
            response_bytes: About how much one message may take.
        """
        self._wait = wait
        self._namespaces = namespaces
        self._response_bytes = response_bytes
        self._call = current_call()
        self._waits: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._ended: list[pb.WaitedRun] = []
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def answers(self, requests: Requests) -> AsyncIterator[pb.WaitRunsResponse]:
        """Yields the ends of the runs that are named. Closed before that, it waits no more."""
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._changed.set())
        requests.on_stop(self._room.set)
        try:
            while True:
                while self._ended:
                    yield pb.WaitRunsResponse(runs=self._taken())
                    self._room.set()
                if reader.done() and (not self._waits or requests.stopped or reader.exception() is not None):
                    break
                self._changed.clear()
                await self._changed.wait()
            await reader  # raises what ended the requests, if it was not their end
        finally:
            left: tuple[asyncio.Task[None], ...] = (reader, *self._waits.values())
            for unfinished in left:
                unfinished.cancel()
            await asyncio.wait(left)

    def _taken(self) -> list[pb.WaitedRun]:
        """Takes as many of the ends as fit into a message."""
        size_bytes = count = 0
        for count, one in enumerate(self._ended, 1):  # noqa: B007 - as many as were looked at
            size_bytes += one.ByteSize()
            if size_bytes >= self._response_bytes:
                break
        taken, self._ended = self._ended[:count], self._ended[count:]
        return taken

    async def _read(self, requests: Requests) -> None:
        async for request in requests:
            if isinstance(request, InvalidArgument):
                raise request
            _check(request)
            namespace = request.namespace or DEFAULT_NAMESPACE
            for run_id in request.run_ids:
                key = namespace, run_id
                if key not in self._waits:
                    self._waits[key] = asyncio.create_task(self._await_end(key))
            while len(self._waits) + len(self._ended) >= MAX_WAITING and not requests.stopped:
                self._room.clear()
                await self._room.wait()

    async def _await_end(self, key: tuple[str, str]) -> None:
        call, began = self._call, time.monotonic()
        namespace, run_id = key
        told = pb.WaitedRun(namespace=namespace, run_id=run_id)
        request = pb.WaitRunRequest(namespace=namespace, run_id=run_id)
        try:
            access.check(call.method, rights_of(call), request, self._namespaces)
            while (answer := await self._wait_in_time(request)).timed_out:
                pass
            told.run.CopyFrom(answer.run)
            record_duration(call, "OK", began)
        except BaseException as error:
            if passes(error):
                raise
            failure, _ = described(error, call, time.monotonic() - began)
            told.error.CopyFrom(status_pb2.Status.FromString(failure.details))
            record_duration(call, failure.code.name, began)
        del self._waits[key]
        self._ended.append(told)
        self._changed.set()

    async def _wait_in_time(self, request: pb.WaitRunRequest) -> pb.WaitRunResponse:
        """Waits for a run, as soon as the server can look at it.

        Who names thousands of runs that have ended asks for more looks than calls may wait. Were each that is too many
        an error, the client would ask for all of them again, and none would ever be told.
        """
        while True:
            try:
                return await self._wait(request)
            except Overloaded as refusal:
                await asyncio.sleep((refusal.retry_delay_s or 1.0) * JITTER.uniform(0.25, 1))


def _check(request: pb.WaitRunsRequest) -> None:
    """Refuses a request that names too many runs, or none that could be one."""
    found = Violations()
    if len(request.run_ids) > MAX_RUNS:
        found.add("run_ids", f"has {len(request.run_ids)} entries; at most {MAX_RUNS}")
    found.raise_any()
