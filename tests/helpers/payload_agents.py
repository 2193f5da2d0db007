"""Agents whose steps, inputs, outputs and artifacts are larger than a row."""

from __future__ import annotations

import asyncio
import random

from dbos import DBOS
from perdure_service.agents import agent, run

from tests.helpers.agents import effect


def noise(size: int, seed: int = 1) -> str:
    """Returns a text of a size that no compression shrinks, the same for the same seed."""
    return random.Random(seed).randbytes(size // 2).hex()


@DBOS.step()
async def make(size: int, seed: int) -> str:
    await asyncio.to_thread(effect, f"make {seed}")
    return noise(size, seed)


@agent(name="keeper")
async def keeper(size: int, seed: int = 1, wait: bool = False) -> str:
    """Has a step with a large result, waits when told to, and returns that result."""
    found = await make(size, seed)
    if wait:
        await run.signal("more")
    return found


@agent(name="keeper-parent")
async def keeper_parent(size: int, seed: int = 1) -> int:
    """Takes the large result of a child."""
    return len(await keeper(size, seed))


@agent(name="measurer")
async def measurer(text: str, wait: bool = False) -> int:
    """Measures a large input, after a wait when told to."""
    if wait:
        await run.signal("more")
    return len(text)


@DBOS.step()
def write_inside(size: int) -> None:
    run.artifact("inside", noise(size, 7).encode(), media_type="application/x-noise")


@agent(name="writer")
async def writer(size: int, wait: bool = False) -> str:
    """Writes artifacts inside a step and outside of steps; the name `twice` twice."""
    write_inside(size)
    run.artifact("twice", "first")
    await run.artifact_async("twice", "second, and the last ☂")
    if wait:
        await run.signal("more")
    return "written"
