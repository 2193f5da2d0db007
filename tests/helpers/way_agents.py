"""Agents with all that the plain ways must do as DBOS does; on request everything goes DBOS's way."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from dbos import DBOS
from perdure_service.agents import agent
from perdure_service.durable import plain_runs, plain_steps

if os.environ.get("PERDURE_TEST_DBOS_WAY"):
    plain_steps.is_plain = lambda _options: False
    plain_runs.is_plain = lambda _status, _code: False
    plain_runs.begin = lambda _dbos, _status, _owner_xid: False


class Unreadable(Exception):
    """An error that pickle cannot read back."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@DBOS.step(name="returns")
async def returns(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


@DBOS.step(name="raises")
async def raises(error: str) -> None:
    raise {"value": ValueError("no"), "unreadable": Unreadable("a", "b")}[error]


@DBOS.step(name="returns-a-lock")
async def returns_a_lock() -> Any:
    return threading.Lock()


@DBOS.step(name="cancels-itself")
async def cancels_itself() -> None:
    raise asyncio.CancelledError


@DBOS.step(name="slow")
async def slow(number: int) -> int:
    await asyncio.sleep(0.1 * number)  # so far apart that a busy machine keeps their order
    return number


@agent(name="values")
async def values() -> list[Any]:
    """Returns what its steps return."""
    return [await returns(value) for value in (None, True, 0, -1, 1.5, "text", "ä\0", [1, {"a": None}], {"b": "c"})]


@agent(name="caught")
async def caught() -> list[str]:
    """Catches what its steps raise, and goes on."""
    found = []
    for error in ("value", "unreadable"):
        try:
            await raises(error)
        except Exception as raised:
            found.append(f"{type(raised).__name__}: {raised}")
    return [*found, await returns("after")]


@agent(name="uncaught")
async def uncaught() -> None:
    """Does not catch what its step raises."""
    await returns(1)
    await raises("unreadable")


@agent(name="unserializable")
async def unserializable() -> str:
    """Has a step whose output cannot be stored."""
    try:
        await returns_a_lock()
    except Exception as raised:
        return f"{type(raised).__name__}, and {await returns('goes on')}"
    return "stored"


@agent(name="large-output")
async def large_output() -> str:
    """Has a step whose output is larger than the limit."""
    try:
        await returns("x" * 70_000)
    except Exception as raised:
        return f"{type(raised).__name__}, and {await returns('goes on')}"
    return "stored"


@agent(name="large-end")
async def large_end() -> str:
    """Returns more than the limit."""
    return "x" * 70_000


@agent(name="together")
async def together() -> list[int]:
    """Has steps under way at the same time."""
    return list(await asyncio.gather(*(slow(number) for number in (3, 1, 2))))


@agent(name="in-steps")
async def in_steps() -> Any:
    """Runs functions as steps, and gives up a step that takes too long."""
    first = await DBOS.run_step_async({"name": "by name"}, returns_plain, 5)
    try:
        async with asyncio.timeout(0.05):
            await slow(500)
    except TimeoutError:
        return [first, await returns("gave it up")]
    return "it ended"


async def returns_plain(value: int) -> int:
    return value


@agent(name="cancelled-by-a-step")
async def cancelled_by_a_step() -> str:
    """Has a step that raises a cancellation."""
    try:
        await cancels_itself()
    except asyncio.CancelledError:
        return str(await returns("cancelled"))
    return "went on"
