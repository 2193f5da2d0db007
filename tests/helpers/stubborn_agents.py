"""An agent that takes its server down with it."""

from __future__ import annotations

import asyncio
import os

from dbos import DBOS
from perdure_service.agents import agent

from tests.helpers.agents import effect
from tests.helpers.server import KILLED


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
