"""Agents whose code changes under a run. Which program a run is stands in a global, which survives a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from dbos import DBOS
from perdure_service.agents import agent, run

PROGRAM_OF: dict[str, str] = {}
"""What a run does from now on; `recorded` until it is here."""

BODIES: list[tuple[str, str]] = []
"""Run and name of every body of a step that ran, in order."""

AFTERWARDS: list[tuple[str, str]] = []
"""Run and error that the agents' own code still caught although its run had left the recording."""


def program() -> str:
    """Returns what the run that asks does now."""
    return PROGRAM_OF.get(run.id, "recorded")


def ran(name: str) -> str:
    """Counts a body."""
    BODIES.append((run.id, name))
    return name


@DBOS.step(name="changed.first")
async def first() -> str:
    return ran("first")


@DBOS.step(name="changed.second")
async def second() -> str:
    return ran("second")


@DBOS.step(name="changed.renamed")
async def renamed() -> str:
    return ran("renamed")


@DBOS.workflow(name="changed.child")
async def child() -> str:
    return "child"


async def wait() -> str:
    return str(await run.signal("go"))


PROGRAMS: dict[str, tuple[Callable[[], Awaitable[Any]], ...]] = {
    "recorded": (first, second, wait),
    "swapped": (second, first, wait),
    "renamed": (first, renamed, wait),
    "removed": (second, wait),
    "added": (first, renamed, second, wait),
    "ends early": (first,),
    "does nothing": (),
    "child": (first, child, wait),
    "sleep": (first, lambda: DBOS.sleep_async(0.01), wait),
    "signal": (first, wait, wait),
    "approval": (first, lambda: run.approval("Go on?"), wait),
    "event": (first, lambda: DBOS.set_event_async("key", 1), wait),
    "longer": (first, second, wait, renamed),
}
"""The steps of each program."""


@agent(name="changed")
async def changed(catches: bool = False) -> list[Any]:
    """Does what `PROGRAM_OF` says now; `catches` is code that goes on after any error."""
    done: list[Any] = []
    for step in PROGRAMS[program()]:
        if not catches:
            done.append(await step())
            continue
        try:
            done.append(await step())
        except Exception as error:
            AFTERWARDS.append((run.id, type(error).__name__))
            done.append("caught")
    return done


@agent(name="changed-child-first")
async def changed_child_first() -> list[Any]:
    """Has a child; later a step in its place, or takes its result where another operation was."""
    if program() == "recorded":
        return [await child(), await wait()]
    if program() == "no result":
        await DBOS.start_workflow_async(child)
        return [await first(), await wait()]
    return [await first(), await wait()]


@agent(name="changed-step-first")
async def changed_step_first() -> list[Any]:
    """Starts a child and runs a step; later takes the child's result where the step was."""
    handle = await DBOS.start_workflow_async(child)
    result = await first() if program() == "recorded" else await handle.get_result()
    return [result, await wait()]


@agent(name="changed-gather")
async def changed_gather() -> list[Any]:
    """Runs steps at once and collects whatever they raise."""
    steps = (first, second) if program() == "recorded" else (first, renamed)
    results: list[Any] = await asyncio.gather(*(step() for step in steps), return_exceptions=True)
    return [str(one) for one in results] + [await wait()]


@agent(name="changed-broken")
async def changed_broken() -> list[Any]:
    """Has a mistake in its new code, before a step that is recorded."""
    await first()
    if program() != "recorded":
        raise TypeError("a mistake")
    return [await second(), await wait()]


@DBOS.step(name="changed.blocking")
def blocking(text: str) -> str:
    return ran(text)


@agent(name="changed-blocking")
def changed_blocking() -> list[str]:
    """The same in blocking code, which catches everything."""
    done = [blocking("one")]
    with suppress(Exception):
        if program() == "recorded":
            done.append(blocking("two"))
        else:
            DBOS.sleep(0.01)
    return [*done, str(DBOS.recv("go", timeout_seconds=60))]


@agent(name="patched")
async def patched() -> list[Any]:
    """Changed under its runs, with a patch: old runs keep the old path."""
    done: list[Any] = [await first()]
    if program() == "patched" and await DBOS.patch_async("check-before-second"):
        done.append(await renamed())
    done.append(await second())
    done.append(await wait())
    return done


@agent(name="patched-blocking")
def patched_blocking() -> list[str]:
    """The same in blocking code."""
    done = [blocking("one")]
    if program() == "patched" and DBOS.patch("more"):
        done.append(blocking("more"))
    return [*done, blocking("two"), str(DBOS.recv("go", timeout_seconds=60))]
