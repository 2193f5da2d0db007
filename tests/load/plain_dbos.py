"""Plain DBOS in this process: `start_workflow` and `get_result` of the same two steps, on a database of its own.

    python -m tests.load.plain_dbos URL async|sync psycopg|psycopg2

DBOS with its own defaults; only the log is quiet, and the pool is what the service has (20, DBOS's default).
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import sqlalchemy as sa
from dbos import DBOS, DBOSConfig

from tests.load.loop import closed_loop, serve, serve_blocking, threads_loop

POOL_SIZE = 20


@DBOS.step(name="async-step")
async def async_step(number: int) -> int:
    return number + 1


@DBOS.workflow(name="async-two-steps")
async def async_two_steps(number: int) -> int:
    return await async_step(await async_step(number))


@DBOS.step(name="sync-step")
def sync_step(number: int) -> int:
    return number + 1


@DBOS.workflow(name="sync-two-steps")
def sync_two_steps(number: int) -> int:
    return sync_step(sync_step(number))


@DBOS.workflow(name="waiting")
async def waiting() -> Any:
    return await DBOS.recv_async("go", timeout_seconds=3_600)


@DBOS.workflow(name="writing")
async def writing() -> int:
    await DBOS.write_stream_async("log", 1)
    return await async_step(1)


def configure(url: str, driver: str, executor_id: str = "bench") -> None:
    """Makes the DBOS of this process."""
    config: DBOSConfig = {
        "name": "bench",
        "system_database_url": url,
        "application_version": "1",
        "executor_id": executor_id,
        "log_level": "CRITICAL",
    }
    if driver == "psycopg2":
        engine = sa.make_url(url).set(drivername="postgresql+psycopg2")
        config["system_database_engine"] = sa.create_engine(
            engine, pool_size=POOL_SIZE, max_overflow=0, pool_pre_ping=True
        )
    DBOS(config=config)


def blocking(order: dict[str, Any]) -> dict[str, Any]:
    """Works for some seconds, each client a thread."""

    def once() -> None:
        DBOS.start_workflow(sync_two_steps, 1).get_result()

    return threads_loop([once] * order["clients"], order["seconds"])


async def handle(order: dict[str, Any]) -> dict[str, Any]:
    """Works for some seconds, or starts workflows that wait (`waiting`: how many)."""
    if (count := order.get("waiting")) is not None:
        for _ in range(count):
            await DBOS.start_workflow_async(waiting)
        return {}

    async def once() -> None:
        started = await DBOS.start_workflow_async(async_two_steps, 1)
        await started.get_result()

    return await closed_loop(once, order["clients"], order["seconds"])


async def main() -> None:
    """Answers orders on the event loop, which is then DBOS's, too."""
    DBOS.launch()
    await serve(handle)


if __name__ == "__main__":
    _, url, mode, driver = sys.argv
    configure(url, driver)
    if mode == "sync":
        DBOS.launch()
        serve_blocking(blocking)
    else:
        asyncio.run(main())
    sys.stdout.flush()
    os._exit(0)  # what waits in DBOS would be waited for
