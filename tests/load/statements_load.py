"""The ceiling: the service's own checkpoint writer, fed with the rows of two-step runs that nobody executes.

No gRPC, no DBOS, no agent: what the database and the writer's statements can carry, on this machine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.domain.runs import RunKey, RunStart
from perdure_service.store import checkpoints
from perdure_service.store.checkpoint_writer import CheckpointWriter
from perdure_service.store.engine import create_engine

from tests.load.loop import closed_loop, serve

STEPS = 2
SHA256 = "0" * 64


class Ceiling:
    """Runs whose rows are written one after the other, each when the one before is committed."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        engine = create_engine(url, pool_size=4, statement_timeout=timedelta(seconds=30))
        self._writer = CheckpointWriter(engine, lambda rows: self._loop.call_soon_threadsafe(self._answer, rows))
        self._writer.start()

    async def handle(self, order: dict[str, Any]) -> dict[str, Any]:
        """Works for some seconds."""
        return await closed_loop(self.run, order["clients"], order["seconds"])

    async def run(self) -> None:
        """Writes what a run of two steps writes."""
        owner, start = uuid.uuid4().hex, _start()
        workflow_id = start.key.workflow_id
        begun = Pack(
            workflow_id, [_event(EventKind.STATE_CHANGED, {"to": "RUNNING", "executor_id": "b"})], first_sequence=1
        )
        fields: dict[str, Any] = {"status": "PENDING", "name": "two-steps@1", "executor_id": "bench", "execution": 1}
        fields |= {"app_version": "1", "inputs": '{"args": [1]}', "input_argument": '{"number": 1}'}
        await self._write(checkpoints.StartRow(workflow_id, owner, begun, None, start=start, **fields))
        previous, first = 1, 2
        for number in range(1, STEPS + 1):
            events = [
                Event(EventKind.STEP_STARTED, _now_ms(), {}, number, "async-step", 1, 1),
                Event(EventKind.STEP_SUCCEEDED, _now_ms(), {"duration_ms": 1}, number, "async-step", 1, 1),
            ]
            row = checkpoints.StepRow(workflow_id, owner, Pack(workflow_id, events, first_sequence=first), previous)
            row.function_id, row.function_name, row.output = number, "async-step", json.dumps(number)
            row.started_ms = row.completed_ms = _now_ms()
            await self._write(row)
            previous, first = first, first + len(events)
        ended = Pack(workflow_id, [_event(EventKind.STATE_CHANGED, {"to": "SUCCEEDED"})], first_sequence=first)
        await self._write(
            checkpoints.OutcomeRow(workflow_id, owner, ended, previous, status="SUCCESS", output="3", shown="3")
        )

    async def _write(self, row: Any) -> None:
        self._waiting[row.workflow_id] = future = self._loop.create_future()
        if not self._writer.submit(row) or await future is None:
            raise RuntimeError(f"{type(row).__name__} of {row.workflow_id} was not written")

    def _answer(self, rows: Sequence[tuple[Any, Any]]) -> None:
        for row, written in rows:
            self._waiting.pop(row.workflow_id).set_result(written)


def _start() -> RunStart:
    return RunStart(
        key=RunKey.of_api("default", f"ceiling-{uuid.uuid4().hex}"),
        agent="two-steps",
        agent_version="1",
        input_sha256=SHA256,
        request_id=uuid.uuid4().hex,
        caller="bench",
    )


def _event(kind: EventKind, data: dict[str, Any]) -> Event:
    return Event(kind, _now_ms(), data, execution=1)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def main(url: str) -> None:
    """Answers orders."""
    await serve(Ceiling(url).handle)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
