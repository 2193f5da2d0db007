"""An agent that does nothing of which a log tells, for as long as it runs."""

from __future__ import annotations

import asyncio

from perdure_service.agents import agent

SLOTS = 3


@agent(name="still", max_running=SLOTS)
async def still(seconds: float = 600.0) -> None:
    """Waits in its own code, which is no step."""
    await asyncio.sleep(seconds)
