"""Watchers: thousands of open streams in one process, of which some note when a run's steps arrive.

    python -m tests.load.watch_load ADDRESS

Many streams share a channel, and are opened some at a time: opening is not what is measured.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import grpc
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import agent_run_service_pb2_grpc

from tests.load.loop import serve

STREAMS_PER_CHANNEL = 250
OPENING = 32
"""Streams that are being opened at a time."""
TIMEOUT_S = 3_600.0


class Watchers:
    """All streams of this process."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stubs: list[Any] = []
        self._channels: list[Any] = []
        self._idle: list[asyncio.Task[None]] = []
        self._watching: list[asyncio.Task[dict[int, int]]] = []

    async def handle(self, order: dict[str, Any]) -> dict[str, Any]:
        """Opens idle streams (`idle`: how many there shall be), or watches a run, or says what arrived."""
        if (count := order.get("idle")) is not None:
            return await self._open_idle(count, order["run_ids"])
        if (run_id := order.get("watch")) is not None:
            opened = [asyncio.Event() for _ in range(order["count"])]
            self._watching = [asyncio.create_task(self._note(run_id, number, one)) for number, one in enumerate(opened)]
            await asyncio.gather(*(one.wait() for one in opened))
            return {}
        return {"arrivals": [await one for one in self._watching]}

    async def _open_idle(self, count: int, run_ids: list[str]) -> dict[str, Any]:
        began = time.monotonic()
        limit = asyncio.Semaphore(OPENING)

        async def open_one(number: int) -> None:
            async with limit:
                call = self._stub(number).WatchRun(
                    pb.WatchRunRequest(run_id=run_ids[number % len(run_ids)], from_now=True), timeout=TIMEOUT_S
                )
                response = await call.read()
                while not response.caught_up:
                    response = await call.read()
            self._idle.append(asyncio.create_task(self._drain(call)))

        await asyncio.gather(*(open_one(number) for number in range(len(self._idle), count)))
        return {"streams": len(self._idle), "seconds": time.monotonic() - began}

    def _stub(self, number: int) -> Any:
        place = number // STREAMS_PER_CHANNEL
        while len(self._stubs) <= place:
            options = [("grpc.use_local_subchannel_pool", 1)]
            self._channels.append(grpc.aio.insecure_channel(self._address, options=options))
            self._stubs.append(agent_run_service_pb2_grpc.AgentRunServiceStub(self._channels[-1]))
        return self._stubs[place]

    @staticmethod
    async def _drain(call: Any) -> None:
        async for _ in call:
            pass

    async def _note(self, run_id: str, number: int, opened: asyncio.Event) -> dict[int, int]:
        """Returns when each step that was not there before arrived (ns since 1970), by its number."""
        arrived: dict[int, int] = {}
        async for response in self._stub(number).WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=TIMEOUT_S):
            now_ns = time.time_ns()
            if opened.is_set():
                for event in response.events:
                    if event.WhichOneof("kind") == "step_succeeded":
                        arrived[event.step_id] = now_ns
            elif response.caught_up or response.end_of_run:
                opened.set()
        return arrived

    async def close(self) -> None:
        """Ends all streams."""
        for task in self._idle:
            task.cancel()
        await asyncio.gather(*self._idle, return_exceptions=True)
        for channel in self._channels:
            await channel.close()


async def main(address: str) -> None:
    """Answers orders."""
    watchers = Watchers(address)
    try:
        await serve(watchers.handle)
    finally:
        await watchers.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
