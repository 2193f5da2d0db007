"""Agents whose steps do nothing but count how often their bodies ran: what is left is what the engine does."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

from dbos import DBOS
from perdure_service.agents import agent

bodies: Counter[str] = Counter()
"""How often each body ran, by run and number; a crash of the engine leaves it."""

threads: set[int] = set()
"""The threads in which they ran."""


@DBOS.step(name="square")
async def square(number: int) -> int:
    bodies[f"{DBOS.workflow_id} {number}"] += 1
    threads.add(threading.get_ident())
    if number < 0:
        raise ValueError(f"{number} has no square here")
    return number * number


@agent(name="hop-pair")
async def hop_pair() -> int:
    """Makes two steps."""
    return await square(1) + await square(2)


@agent(name="hop-gather")
async def hop_gather(width: int = 5) -> int:
    """Makes a step, several at once, one that fails, and a last one."""
    total = await square(width)
    total += sum(await asyncio.gather(*(square(number) for number in range(width))))
    try:
        await square(-1)
    except ValueError:
        total += 1
    return total + await square(100)


@agent(name="hop-failing")
async def hop_failing() -> int:
    """Fails with its only step."""
    return await square(-1)


@DBOS.step(name="square-again", retries_allowed=True, max_attempts=2)
async def square_again(number: int) -> int:
    return number * number


@agent(name="hop-retries")
async def hop_retries() -> int:
    """Makes a step that would be tried again."""
    return await square_again(3)
