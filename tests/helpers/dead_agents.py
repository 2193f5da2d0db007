"""Agents that lose their run in the middle, and try to go on all the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from dbos import DBOS
from dbos._context import get_local_dbos_context
from dbos._dbos import _get_dbos_instance
from perdure_service.agents import agent, run

DONE: list[str] = []
"""What step bodies have done after the death of their execution."""

REFUSED: dict[str, list[str]] = {}
"""What each call of a dead execution has raised, by run: the exception's class, or `nothing`."""


def die() -> None:
    """Kills the execution that runs this, as whoever finds that its run was taken away does."""
    context = get_local_dbos_context()
    assert context is not None
    executions = _get_dbos_instance()._sys_db.executions
    executions.kill(executions.find(context.workflow_id, context.owner_xid), "its run was taken away")


@DBOS.step(name="dead.step", retries_allowed=True, max_attempts=3, interval_seconds=0.01)
async def a_step() -> None:
    DONE.append("step")


@DBOS.step(name="dead.blocking-step")
def a_blocking_step() -> None:
    DONE.append("blocking step")


@DBOS.workflow()
async def a_quiet_child() -> str:
    return "child"


@DBOS.workflow()
async def a_child() -> str:
    DONE.append("child")
    return "child"


async def _gather() -> list[Any]:
    """Takes failures for results, as code that does not look at them does, and goes on."""
    results = await asyncio.gather(a_step(), asyncio.to_thread(a_blocking_step), return_exceptions=True)
    if not all(isinstance(result, BaseException) for result in results):
        DONE.append("gathered")
    await a_step()
    return results


async def _finally() -> None:
    try:
        await a_step()
    finally:
        await a_step()


async def _get_result(handle: Any) -> None:
    await handle.get_result()


CALLS: dict[str, Callable[[], Awaitable[Any]]] = {
    "step": a_step,
    "blocking step": lambda: asyncio.to_thread(a_blocking_step),
    "sleep": lambda: DBOS.sleep_async(0.01),
    "recv": lambda: DBOS.recv_async("topic", timeout_seconds=0.01),
    "send": lambda: DBOS.send_async(str(DBOS.workflow_id), "x", topic="topic"),
    "set_event": lambda: DBOS.set_event_async("key", 1),
    "stream": lambda: DBOS.write_stream_async("lines", "x"),
    "child": lambda: DBOS.start_workflow_async(a_child),
    "approval": lambda: run.approval("Go on?"),
    "signal": lambda: run.signal("more"),
    "patch": lambda: DBOS.patch_async("better"),
    "gather": _gather,
    "finally": _finally,
}


@agent(name="dead-man")
async def dead_man(what: str) -> str:
    """Loses its run, and makes the same call twice, whatever it raises."""
    handle: Any = await DBOS.start_workflow_async(a_quiet_child) if what == "get_result" else None
    refused = REFUSED[run.id] = []
    die()
    for _ in range(3):
        try:
            await (_get_result(handle) if handle is not None else CALLS[what]())
            refused.append("nothing")
        except BaseException as error:
            refused.append(type(error).__name__)
    return "went on"


LEFT_BEHIND: list[str] = []
"""What steps have raised that their run had left behind, or `nothing`."""

MAY_END = threading.Event()
"""Set when the run that has left a step behind has ended."""

_tasks: set[asyncio.Task[None]] = set()


@DBOS.step(name="dead.long-step")
async def a_long_step() -> None:
    await asyncio.to_thread(MAY_END.wait, 60)


async def _left_behind() -> None:
    try:
        await a_long_step()
    except BaseException as error:
        LEFT_BEHIND.append(type(error).__name__)
    else:
        LEFT_BEHIND.append("nothing")


@agent(name="leaves-behind")
async def leaves_behind() -> str:
    """Loses its run, and ends while a step of it goes on."""
    task = asyncio.create_task(_left_behind())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    await a_step()
    die()
    return "done"
