"""Load on a server through gRPC: `StartAgent` and `WaitRun`, a `StartAgent` that waits, or the streams for many.

One process with one event loop and one channel, so that on two cores it takes little from the server; its own CPU is
counted. Generators of single calls do not fit: each client waits for the end of the run that it has just started.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import agent_run_service_pb2_grpc

from tests.load.loop import answer, closed_loop, serve

TIMEOUT_S = 60.0
REPEATED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED})
REPEAT_PAUSE_S = 0.1
WAIT_S = 30
BULK = hasattr(pb, "StartAgentsRequest")
"""Whether this version of the API has `StartAgents`."""


class Load:
    """The calls, on one channel."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.stub: Any = agent_run_service_pb2_grpc.AgentRunServiceStub(self.channel)
        self._prefix = f"bench-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self.repeats = 0

    async def handle(self, order: dict[str, Any]) -> dict[str, Any]:
        """Works for some seconds."""
        if order.get("bulk"):
            return await self.bulk(order["agent"], order["clients"], order["seconds"])

        waits = bool(order.get("waits"))

        async def once() -> None:
            request = self.request(order["agent"])
            if waits:
                request.wait.seconds = WAIT_S
            started = await self.call(self.stub.StartAgent, request)
            if not waits or started.run.state != run_pb.AGENT_RUN_STATE_SUCCEEDED:
                await self.end_of(started.run.run_id)

        repeats = self.repeats
        return {**await closed_loop(once, order["clients"], order["seconds"]), "repeats": self.repeats - repeats}

    async def call(self, method: Any, request: Any) -> Any:
        """Makes a call, and repeats it where the server says that a repeat helps, as the client library does."""
        while True:
            try:
                return await method(request, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() not in REPEATED:
                    raise
                self.repeats += 1
                await asyncio.sleep(REPEAT_PAUSE_S)

    def request(self, agent: str) -> pb.StartAgentRequest:
        """Returns a start, as the client library sends it: with an id and a request id."""
        run_id = f"{self._prefix}-{next(self._numbers)}"
        return pb.StartAgentRequest(agent=agent, run_id=run_id, request_id=run_id, input_json='{"number": 1}')

    async def end_of(self, run_id: str) -> None:
        """Waits for the end of a run."""
        ended = await self.call(self.stub.WaitRun, pb.WaitRunRequest(run_id=run_id))
        assert not ended.timed_out, run_id
        assert ended.run.state == run_pb.AGENT_RUN_STATE_SUCCEEDED, ended.run

    async def bulk(self, agent: str, window: int, seconds: float) -> dict[str, Any]:
        """Starts runs on one stream, as many at a time as the window has room for those that have not ended."""
        clock = asyncio.get_running_loop().time
        room, began = asyncio.Semaphore(window), clock()
        begun: dict[str, float] = {}
        latencies_s: list[float] = []

        async def requests() -> AsyncIterator[Any]:
            while clock() - began < seconds:
                await room.acquire()
                request = self.request(agent)
                begun[request.run_id] = clock()
                yield pb.StartAgentsRequest(start=request, pack_answers=True)

        started: list[str] = []
        more, all_started = asyncio.Event(), False

        async def waits() -> AsyncIterator[Any]:
            """Names all runs that were started since it was last asked."""
            while started or not all_started:
                if started:
                    named, started[:] = started[:], []
                    yield pb.WaitRunsRequest(run_ids=named)
                else:
                    more.clear()
                    await more.wait()

        async def ends() -> None:
            async for response in self.stub.WaitRuns(waits(), timeout=TIMEOUT_S + seconds):
                for waited in response.runs:
                    assert waited.run.state == run_pb.AGENT_RUN_STATE_SUCCEEDED, waited
                    latencies_s.append(clock() - begun.pop(waited.run_id))
                    room.release()

        async with asyncio.TaskGroup() as group:
            group.create_task(ends())
            async for response in self.stub.StartAgents(requests(), timeout=TIMEOUT_S + seconds):
                for one in (response, *response.more):
                    assert one.WhichOneof("result") == "started", one
                    started.append(one.started.run.run_id)
                more.set()
            all_started = True
            more.set()
        assert not begun
        return answer(latencies_s, clock() - began)


async def main(address: str) -> None:
    """Answers orders."""
    load = Load(address)
    try:
        await serve(load.handle)
    finally:
        await load.channel.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
