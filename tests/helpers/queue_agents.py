"""Agents with queues and limits of their own."""

from __future__ import annotations

import asyncio

from dbos import DBOS
from perdure_service.agents import agent


@DBOS.step()
async def busy(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


@agent(name="narrow", queue="narrow")
async def narrow(seconds: float = 0.1) -> float:
    """In a queue with a limit over the fleet."""
    return await busy(seconds)


@agent(name="slow")
async def slow(seconds: float = 2.0) -> float:
    return await busy(seconds)


@agent(name="quick")
async def quick(seconds: float = 0.0) -> float:
    return await busy(seconds)


@agent(name="single", max_running=1)
async def single(seconds: float = 0.1) -> float:
    """One at a time on an executor."""
    return await busy(seconds)


@agent(name="family")
async def family(seconds: float = 0.1) -> float:
    """Has children in a queue with a limit, and of an agent with one."""
    return await narrow(seconds) + await single(seconds)
