"""The agents of the benchmarks."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from dbos import DBOS
from perdure_service.agents import agent, run

GATE_POLL_S = 0.5
"""How often a step looks for its file: a thousand of them must cost next to nothing."""


@DBOS.step(name="tick")
async def tick(number: int, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return number


@agent(name="ticker")
async def ticker(seconds: float = 0.05, steps: int = 1_000_000) -> int:
    """Makes one short step after the other, until it is cancelled."""
    for number in range(steps):
        await tick(number, seconds)
    return steps


@DBOS.step(name="first")
async def first() -> int:
    return 1


@DBOS.step(name="second")
async def second(gate: str) -> int:
    while not Path(gate).exists():  # noqa: ASYNC110, ASYNC240 - made by another process; a look takes no time
        await asyncio.sleep(GATE_POLL_S)
    return 2


@agent(name="gated")
async def gated(gate: str) -> int:
    """Makes one step, and another one that ends when a file is there."""
    return await first() + await second(gate)


@DBOS.step(name="async-step")
async def async_step(number: int) -> int:
    return number + 1


@agent(name="two-steps")
async def two_steps(number: int) -> int:
    """Makes two steps that do nothing."""
    return await async_step(await async_step(number))


@DBOS.step(name="sync-step")
def sync_step(number: int) -> int:
    return number + 1


@agent(name="two-steps-blocking")
def two_steps_blocking(number: int) -> int:
    """The same in blocking code."""
    return sync_step(sync_step(number))


@agent(name="listener")
async def listener() -> int:
    """Waits for a signal."""
    await run.signal("go")
    return 1


@agent(name="asking")
async def asking() -> bool:
    """Asks for an approval."""
    return (await run.approval("Go on?")).approved


@DBOS.step(name="beat")
async def beat(number: int) -> int:
    return number


@agent(name="pulse")
async def pulse(steps: int, pause_s: float) -> list[int]:
    """Makes a step after a pause, again and again; returns when each was committed (ns since 1970)."""
    committed_ns = []
    for number in range(steps):
        await asyncio.sleep(pause_s)
        await asyncio.create_task(beat(number))  # code in a task of its own goes on when its step is committed
        committed_ns.append(time.time_ns())
    return committed_ns


@DBOS.step(name="stand-still")
async def stand_still() -> None:
    await asyncio.sleep(3_600)


@agent(name="still")
async def still() -> int:
    """Is in a step that does nothing for an hour."""
    await stand_still()
    return 1
