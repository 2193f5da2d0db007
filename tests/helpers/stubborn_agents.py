"""Agents whose server stops, or dies, in the middle of what they do."""

from __future__ import annotations

import asyncio
import os
import threading

from dbos import DBOS
from perdure_service.agents import agent

from tests.helpers.agents import effect
from tests.helpers.server import KILLED


@DBOS.step()
async def slow(seconds: float) -> str:
    """Takes a while, and is worth waiting for."""
    effect("slow began")
    await asyncio.sleep(seconds)
    effect("slow done")
    return "done"


@DBOS.step()
async def after(_: str) -> None:
    """Comes after it."""
    effect("after")


@agent(name="slow-one")
async def slow_one(seconds: float) -> str:
    """Does one slow step, and a quick one."""
    result = await slow(seconds)
    await after(result)
    return result


@DBOS.step()
def call_that_hangs() -> str:
    """Calls something that does not answer in its first execution: no timeout, in a thread of its own."""
    effect("called")
    if os.environ.get("PERDURE_TEST_HANGS"):
        threading.Event().wait()
    return "answered"


@agent(name="caller")
def caller() -> str:
    """Blocks in a step."""
    return call_that_hangs()


@agent(name="blocked-listener")
def blocked_listener() -> object:
    """Blocks a thread in a wait for a signal."""
    return DBOS.recv("go", timeout_seconds=600)


@DBOS.step()
async def kill_the_server() -> None:
    """Takes its server down, as a step that needs all of the memory does."""
    await asyncio.sleep(1)
    effect("killed it")
    os._exit(KILLED)


@agent(name="killer")
async def killer() -> None:
    """Kills every server that runs it."""
    await kill_the_server()
