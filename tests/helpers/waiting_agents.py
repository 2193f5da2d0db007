"""Agents that wait, for the tests of parking: what they do is counted in this module, which survives every park."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from dbos import DBOS
from perdure_service.agents import agent, expose, run

DONE: list[str] = []
"""What has been done, in order, by whichever execution."""

MAX_RECOVERIES = 4
"""How often the run that parks often may crash."""


@DBOS.step(name="parking.note")
async def note(what: str) -> str:
    DONE.append(f"{run.id} {what}")
    return what


@DBOS.step(name="parking.blocking-note")
def blocking_note(what: str) -> str:
    DONE.append(f"{run.id} {what}")
    return what


@agent(name="waits-for-signals")
async def waits_for_signals(signals: int = 1, timeout_s: float | None = None) -> list[Any]:
    """Works, waits for signals `go`, works between them."""
    run.progress("begins")
    got: list[Any] = []
    for number in range(signals):
        await note(f"before {number}")
        got.append(await run.signal("go", timeout=None if timeout_s is None else timedelta(seconds=timeout_s)))
    await note("after")
    return got


@agent(name="waits-for-approval")
async def waits_for_approval(timeout_s: float | None = None) -> list[Any]:
    """Asks."""
    await note("before")
    answer = await run.approval("Go on?", timeout=None if timeout_s is None else timedelta(seconds=timeout_s))
    await note("after")
    return [answer.state, answer.decided_by]


@agent(name="publishes-when-told")
async def publishes_when_told() -> None:
    """Sets one of DBOS's events after a signal."""
    await run.signal("go")
    await DBOS.set_event_async("status", "half")


@agent(name="waits-for-time")
async def waits_for_time(seconds: float = 0.3) -> str:
    """Sleeps."""
    await note("before")
    await DBOS.sleep_async(seconds)
    return await note("after")


@DBOS.workflow()
def blocking_waiter(seconds: float = 0.0, timeout_s: float = 600.0) -> Any:
    """Sleeps, and waits for a message, in blocking code."""
    blocking_note("before")
    if seconds:
        DBOS.sleep(seconds)
    got = DBOS.recv("go", timeout_seconds=timeout_s)
    blocking_note("after")
    return got


expose(blocking_waiter, name="blocking-waiter")


@DBOS.workflow()
async def waiting_child(number: int) -> str:
    await note(f"child {number}")
    got = await DBOS.recv_async("go", timeout_seconds=600)
    return f"{number}: {got}"


@DBOS.workflow()
def blocking_child(number: int) -> str:
    got = DBOS.recv("go", timeout_seconds=600)
    return f"{number}: {got}"


@agent(name="waits-for-children")
async def waits_for_children(how: str = "handle", children: int = 1) -> list[Any]:
    """Has children that wait, and waits for them in one way or another."""
    match how:
        case "handle":
            handles: list[Any] = [await DBOS.start_workflow_async(waiting_child, n) for n in range(children)]
            return [await handle.get_result() for handle in handles]
        case "call":
            return [await waiting_child(number) for number in range(children)]
        case "gather":
            handles = [await DBOS.start_workflow_async(waiting_child, n) for n in range(children)]
            return list(await asyncio.gather(*(handle.get_result() for handle in handles)))
        case "gather-calls":
            return list(await asyncio.gather(*(waiting_child(number) for number in range(children))))
        case "queue":
            handles = [await DBOS.enqueue_workflow_async("perdure", waiting_child, n) for n in range(children)]
            return [await handle.get_result() for handle in handles]
        case "id":
            handle: Any = await DBOS.start_workflow_async(waiting_child, 0)
            return [await DBOS.get_result_async(handle.workflow_id)]
        case _:
            first: Any = await DBOS.start_workflow_async(waiting_child, 0)
            done = await DBOS.wait_first_async([first])
            return [await done.get_result()]


@DBOS.workflow()
def blocking_parent(how: str = "handle") -> Any:
    """Waits for a child in blocking code."""
    if how == "handle":
        return DBOS.start_workflow(blocking_child, 0).get_result()
    if how == "queue":
        return DBOS.enqueue_workflow("perdure", blocking_child, 0).get_result()
    return blocking_child(0)


expose(blocking_parent, name="blocking-parent")


@agent(name="waits-for-either")
async def waits_for_either(seconds: float = 600.0) -> list[Any]:
    """Waits for a signal and the time at once, and does something after each."""

    async def slept() -> str:
        await DBOS.sleep_async(seconds)
        return await note("slept")

    async def told() -> Any:
        got = await run.signal("go")
        await note("told")
        return got

    return list(await asyncio.gather(told(), slept()))


@agent(name="waits-with-a-limit-in-memory")
async def waits_with_a_limit_in_memory(how: str = "wait") -> int:
    """Waits for what never comes, with a limit that no database knows."""
    if how == "event":
        return int(await DBOS.get_event_async("default.nobody.r", "never", timeout_seconds=2) is None)
    waiting = asyncio.ensure_future(DBOS.recv_async("never", timeout_seconds=600))
    done, _ = await DBOS.asyncio_wait([waiting], timeout=2)
    waiting.cancel()
    return len(done) + 1


@DBOS.workflow(max_recovery_attempts=MAX_RECOVERIES)
async def parks_often(times: int) -> int:
    """Waits for a signal again and again."""
    for _ in range(times):
        await run.signal("go")
    return times


expose(parks_often, name="parks-often")


@agent(name="catches-all")
async def catches_all() -> str:
    """Catches everything, as code should not, and goes on."""
    while True:
        try:
            return str(await run.signal("go"))
        except BaseException:
            DONE.append("caught")
            await note("never")
        finally:
            DONE.append("finally")


@agent(name="sends")
async def sends(workflow_id: str, how: str = "workflow") -> str:
    """Sends a message to another run."""
    if how == "step":
        await asyncio.to_thread(send_in_a_step, workflow_id)
    else:
        await DBOS.send_async(workflow_id, "from a run", topic="go")
    return "sent"


@DBOS.step(name="parking.send")
def send_in_a_step(workflow_id: str) -> None:
    DBOS.send(workflow_id, "from a step", topic="go")
