"""DBOS's own way to follow a workflow: it writes a stream, and a reader in this or another process reads it.

python -m tests.load.stream_load URL
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from dbos import DBOS

from tests.load.loop import serve
from tests.load.plain_dbos import configure


@DBOS.workflow(name="pulse-stream")
async def pulse_stream(values: int, pause_s: float) -> list[int]:
    """Writes a value after a pause, again and again; returns when each was committed (ns since 1970)."""
    committed_ns = []
    for number in range(values):
        await asyncio.sleep(pause_s)
        await DBOS.write_stream_async("pulse", number)
        committed_ns.append(time.time_ns())
    await DBOS.close_stream_async("pulse")
    return committed_ns


async def handle(order: dict[str, Any]) -> dict[str, Any]:
    """Begins to write, reads to the end, or says what was written."""
    if (count := order.get("write")) is not None:
        handle = await DBOS.start_workflow_async(pulse_stream, count, order["pause_s"])
        return {"workflow_id": handle.workflow_id}
    if (workflow_id := order.get("read")) is not None:
        return {"arrived": [time.time_ns() async for _ in DBOS.read_stream_async(workflow_id, "pulse")]}
    written = await DBOS.retrieve_workflow_async(order["committed"])
    return {"committed": await written.get_result()}


async def main() -> None:
    """Answers orders."""
    DBOS.launch()
    await serve(handle)


if __name__ == "__main__":
    # Each process an executor of its own: none takes the other's workflows back.
    configure(sys.argv[1], "psycopg", executor_id=f"bench-{os.getpid()}")
    asyncio.run(main())
    sys.stdout.flush()
    os._exit(0)
