"""Agents whose code goes on with what a step returned while that is being committed."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta

from dbos import DBOS
from perdure_service.agents import agent, run

bodies: Counter[str] = Counter()
"""How often each body ran, by run and name; a crash of the engine leaves it."""

went_on: Counter[str] = Counter()
"""How often the code of each run had what its step returned."""

go_on = threading.Event()
"""What an agent waits for that blocks its loop."""


@DBOS.step(name="before")
async def before(number: int = 1) -> int:
    bodies[f"{DBOS.workflow_id} before"] += 1
    return number


@DBOS.step(name="after")
async def after() -> int:
    bodies[f"{DBOS.workflow_id} after"] += 1
    return 2


@DBOS.step(name="after-blocking")
def after_blocking() -> int:
    bodies[f"{DBOS.workflow_id} after"] += 1
    return 2


@DBOS.step(name="after-retried", retries_allowed=True, max_attempts=2)
async def after_retried() -> int:
    bodies[f"{DBOS.workflow_id} after"] += 1
    return 2


@agent(name="ahead-child")
async def ahead_child() -> int:
    """Returns at once."""
    bodies[f"{DBOS.workflow_id} after"] += 1
    return 2


async def _send() -> object:
    return await DBOS.send_async(DBOS.workflow_id or "", "hello", "ahead")


async def _set_event() -> object:
    return await DBOS.set_event_async("ahead", 1)


async def _write_stream() -> object:
    return await DBOS.write_stream_async("ahead", 1)


async def _start_child() -> object:
    return await (await DBOS.start_workflow_async(ahead_child)).get_result()


async def _receive() -> object:
    return await DBOS.recv_async("ahead", timeout_seconds=0.01)


async def _sleep() -> object:
    return await DBOS.sleep_async(0.01)


async def _keep() -> object:
    return await run.artifact_async("ahead", "text")


async def _ask() -> object:
    return await run.approval("ahead", timeout=timedelta(seconds=0.05))


async def _blocking_step() -> object:
    return after_blocking()


NEXT: dict[str, Callable[[], Awaitable[object]]] = {
    "a step": after,
    "a step that is tried again": after_retried,
    "a blocking step": _blocking_step,
    "a message": _send,
    "an event": _set_event,
    "an entry of a stream": _write_stream,
    "a child": _start_child,
    "a signal": _receive,
    "a sleep": _sleep,
    "an artifact": _keep,
    "an approval": _ask,
}
"""What code may do next that is durable, or has an effect."""


@agent(name="ahead-then")
async def ahead_then(what: str) -> int:
    """Makes a step, and does something else."""
    number = await before()
    went_on[str(DBOS.workflow_id)] += 1
    await NEXT[what]()
    return number


NEXT_BLOCKING: dict[str, Callable[[], object]] = {
    "a step": lambda: after_blocking(),
    "a message": lambda: DBOS.send(DBOS.workflow_id or "", "hello", "ahead"),
    "an event": lambda: DBOS.set_event("ahead", 1),
    "an entry of a stream": lambda: DBOS.write_stream("ahead", 1),
    "a child": lambda: DBOS.start_workflow(ahead_child_blocking).get_result(),
    "a signal": lambda: DBOS.recv("ahead", timeout_seconds=0.01),
    "a sleep": lambda: DBOS.sleep(0.01),
    "an artifact": lambda: run.artifact("ahead", "text"),
}
"""The same for a blocking agent."""


@DBOS.step(name="before")
def before_blocking(number: int = 1) -> int:
    bodies[f"{DBOS.workflow_id} before"] += 1
    return number


@agent(name="ahead-child-blocking")
def ahead_child_blocking() -> int:
    """Returns at once."""
    bodies[f"{DBOS.workflow_id} after"] += 1
    return 2


@agent(name="ahead-then-blocking")
def ahead_then_blocking(what: str) -> int:
    """Does what `ahead-then` does, in a thread."""
    number = before_blocking()
    went_on[str(DBOS.workflow_id)] += 1
    NEXT_BLOCKING[what]()
    return number


def _end(number: int, *, fails: bool, says: str) -> int:
    """Ends a run's code."""
    went_on[str(DBOS.workflow_id)] += 1
    if says:
        run.progress(says)
    if fails:
        raise ValueError("it ends badly")
    return number


@agent(name="ahead-ends-blocking")
def ahead_ends_blocking(steps: int = 1, fails: bool = False, says: str = "") -> int:
    """Does what `ahead-ends` does, in a thread."""
    number = 0
    for _ in range(steps):
        number = before_blocking(number + 1)
    return _end(number, fails=fails, says=says)


@agent(name="ahead-ends")
async def ahead_ends(steps: int = 1, fails: bool = False, says: str = "") -> int:
    """Makes steps, and ends with what the last one returned, or fails."""
    number = 0
    for _ in range(steps):
        number = await before(number + 1)
    return _end(number, fails=fails, says=says)


@agent(name="ahead-blocks")
async def ahead_blocks() -> int:
    """Makes a step, and then blocks its loop."""
    number = await before()
    go_on.wait(30)
    return number


@agent(name="ahead-waits")
async def ahead_waits() -> int:
    """Makes a step, and waits a moment, in which its loop runs, for nothing that is durable."""
    number = await before()
    await asyncio.sleep(0.02)
    return number


@agent(name="ahead-twice")
async def ahead_twice() -> int:
    """Makes two steps."""
    return await before(await before())


cancelled: list[asyncio.Task[int]] = []
"""Steps that somebody cancels."""


@agent(name="ahead-cancelled")
async def ahead_cancelled() -> int:
    """Makes a step in a task that is cancelled, and goes on."""
    task = asyncio.ensure_future(before())
    cancelled.append(task)
    await asyncio.wait([task])
    return await after()


@agent(name="ahead-beside")
async def ahead_beside() -> int:
    """Makes a step in another task, whose code goes on by itself."""

    async def beside() -> int:
        number = await before()
        went_on[str(DBOS.workflow_id)] += 1
        return number

    return (await asyncio.gather(beside()))[0]


@DBOS.step(name="fails")
async def fails() -> int:
    raise ValueError("it fails")


@DBOS.step(name="fails")
def fails_blocking() -> int:
    raise ValueError("it fails")


@agent(name="ahead-after-a-failure")
async def ahead_after_a_failure() -> str:
    """Makes a step that fails, and ends with why."""
    try:
        await fails()
    except ValueError as error:
        return str(error)
    return ""


@agent(name="ahead-after-a-failure-blocking")
def ahead_after_a_failure_blocking() -> str:
    """Does the same in a thread."""
    try:
        fails_blocking()
    except ValueError as error:
        return str(error)
    return ""


@agent(name="ahead-ends-large")
async def ahead_ends_large(chars: int) -> str:
    """Makes a step, and ends with so many characters."""
    await before()
    return "x" * chars


@agent(name="ahead-asks")
async def ahead_asks() -> int:
    """Ends with a step while an approval that it has asked for is open."""
    asked = asyncio.create_task(run.approval("leave it open", timeout=timedelta(seconds=60)))
    while not bodies[f"{DBOS.workflow_id} asked"]:  # noqa: ASYNC110 - the test has seen it
        await asyncio.sleep(0.01)
    number = await before()
    asked.cancel()
    return number
