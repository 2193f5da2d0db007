"""The agent of the benchmarks."""

from __future__ import annotations

import asyncio

from dbos import DBOS
from perdure_service.agents import agent


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
