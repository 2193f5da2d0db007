"""Agents that return, publish, stream, ask with and raise what is too large, or no text."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from dbos import DBOS
from perdure_service.agents import OutputTooLarge, agent, expose, run

from tests.helpers.agents import effect


@agent(name="bulky")
async def bulky(size: int, text: str = "x") -> str:
    """Returns a text of a size."""
    return text * size


@agent(name="blocking-bulky")
def blocking_bulky(size: int) -> str:
    """The same in blocking code."""
    return "x" * size


@DBOS.workflow()
def plain_bulky(size: int) -> str:
    """The same in plain DBOS code."""
    return "x" * size


expose(plain_bulky, name="plain-bulky")


@DBOS.step(retries_allowed=True, max_attempts=3, interval_seconds=0.01)
async def bulky_step(size: int) -> str:
    await asyncio.to_thread(effect, "bulky step")
    return "x" * size


@agent(name="bulky-stepper")
async def bulky_stepper(size: int, catch: bool = False) -> str:
    """Has a step with a result of a size; catches its error, waits for a signal, and goes on, when told to."""
    try:
        await bulky_step(size)
    except OutputTooLarge as error:
        if not catch:
            raise
        await run.signal("more")
        return type(error).__name__
    return "fits"


@agent(name="bulky-asker")
async def bulky_asker(size: int) -> bool:
    """Asks with a payload of a size."""
    return (await run.approval("?" * size, payload="x" * size)).approved


@agent(name="bulky-publisher")
async def bulky_publisher(size: int, how: str) -> str:
    """Publishes or streams a value of a size, from its own code or from a step."""
    if how == "set_event":
        await DBOS.set_event_async("key", "x" * size)
    elif how == "write_stream":
        await DBOS.write_stream_async("key", "x" * size)
    else:
        await bulky_publishing_step(size, how)
    return "published"


@DBOS.step()
async def bulky_publishing_step(size: int, how: str) -> None:
    publish = DBOS.set_event_async if how == "set_event in a step" else DBOS.write_stream_async
    await publish("key", "x" * size)


@agent(name="bulky-parent")
async def bulky_parent(size: int) -> str:
    """Has a child whose output is too large, and tells how it learns of it."""
    handle = await DBOS.start_workflow_async(bulky_child, size)
    try:
        return await handle.get_result()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:80]


@DBOS.workflow()
async def bulky_child(size: int) -> str:
    return "x" * size


@DBOS.workflow()
def no_text(how: str, text: str) -> Any:
    """Returns or raises what is escaped in a text."""
    plain = json.loads(f'"{text}"')
    if how == "raise":
        raise ValueError(plain)
    return {"text": plain}


expose(no_text, name="no-text")


@agent(name="async-no-text")
async def async_no_text(how: str, text: str) -> Any:
    """The same as an agent, whose output is checked."""
    plain = json.loads(f'"{text}"')
    if how == "raise":
        raise ValueError(plain)
    return {"text": plain}
