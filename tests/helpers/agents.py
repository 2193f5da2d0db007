"""Agents for tests: what their steps do is counted in the table `public.test_effect`, so that nothing can be hidden."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import timedelta
from typing import Any, Literal

import sqlalchemy as sa
from dbos import DBOS
from dbos._dbos import _get_dbos_instance
from perdure_service.agents import agent, expose, run
from perdure_service.agents.resources import resources
from pydantic import BaseModel

from tests.helpers import marks

EFFECTS_URL = os.environ.get("PERDURE_TEST_EFFECTS_URL", "")
"""The database of the effects, where the server's own may be away: another system is not."""


def effect(what: str) -> None:
    """Leaves a trace, in a transaction of its own, as a side effect in another system would."""
    engine = sa.create_engine(EFFECTS_URL, poolclass=sa.NullPool) if EFFECTS_URL else resources().engine
    with engine.begin() as conn:
        conn.execute(
            sa.text("INSERT INTO public.test_effect (run_id, what) VALUES (:run_id, :what)"),
            {"run_id": run.id, "what": what},
        )


class Count(BaseModel):
    """How far to count."""

    steps: int = 3
    delay_s: float = 0.0
    text: str = ""
    note: str = ""
    """Anything, for the search of the logs."""


@DBOS.step()
async def count_one(number: int, delay_s: float, text: str) -> int:
    await asyncio.to_thread(effect, f"count {number}")
    if text:
        run.output("text").write(text)
    if delay_s:
        await asyncio.sleep(delay_s)
    return number


@agent(name="counter")
async def counter(request: Count) -> dict[str, int]:
    """Counts, a step a number."""
    total = 0
    for number in range(request.steps):
        run.progress("counting", number, request.steps)
        total += await count_one(number, request.delay_s, request.text)
    return {"total": total}


@DBOS.step()
def sync_step(number: int) -> int:
    effect(f"sync {number}")
    return number * 2


@agent(name="sync-counter")
def sync_counter(steps: int = 3) -> int:
    """Counts in blocking code."""
    return sum(sync_step(number) for number in range(steps))


class FlakyError(Exception):
    """What a flaky step raises."""


@DBOS.step(retries_allowed=True, max_attempts=4, interval_seconds=0.01, backoff_rate=1.0)
async def flaky_step(failures: int) -> str:
    status = DBOS.step_status
    attempt = (status.current_attempt if status and status.current_attempt is not None else 0) + 1
    run.output("text").write(f"attempt {attempt}")
    await asyncio.to_thread(effect, f"flaky {attempt}")
    if attempt <= failures:
        raise FlakyError(f"attempt {attempt} of the flaky step failed on {marks.PAYLOAD}")
    return f"after {attempt}"


@agent(name="flaky")
async def flaky(failures: int = 1) -> str:
    """Has a step that fails some times."""
    return await flaky_step(failures)


@agent(name="asker")
async def asker(
    timeout_s: float | None = None,
    on_timeout: Literal["REJECT", "APPROVE", "FAIL_RUN"] = "REJECT",
    answer_schema: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Works, asks, works."""
    await count_one(0, 0, "")
    result = await run.approval(
        "Go on?",
        payload={"why": "test", "note": marks.PAYLOAD},
        timeout=None if timeout_s is None else timedelta(seconds=timeout_s),
        on_timeout=on_timeout,
        assignees=["ann"],
        answer_schema=answer_schema,
    )
    await count_one(1, 0, "")
    return {
        "approved": result.approved,
        "state": result.state,
        "by": result.decided_by,
        "comment": result.comment,
        "answer": result.answer,
    }


@agent(name="listener")
async def listener(timeout_s: float | None = None, signals: int = 1) -> list[Any]:
    """Waits for signals `more`."""
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    return [await run.signal("more", timeout=timeout) for _ in range(signals)]


@agent(name="falsely-woken")
async def falsely_woken() -> Any:
    """Waits for a signal `more`, and is woken again and again for nothing."""
    database, workflow_id = _get_dbos_instance()._sys_db, DBOS.workflow_id

    async def wake() -> None:
        pause_s = 0.02
        while True:
            await asyncio.sleep(pause_s)
            database._wake_waits(workflow_id)
            pause_s = min(1.2 * pause_s, 0.5)  # a busy machine must have the time to look, and find nothing

    waking = asyncio.create_task(wake())
    try:
        return await run.signal("more", timeout=timedelta(seconds=60))
    finally:
        waking.cancel()


@agent(name="sleeper")
async def sleeper(seconds: float = 0.2) -> str:
    """Sleeps durably."""
    await count_one(0, 0, "")
    await DBOS.sleep_async(seconds)
    await count_one(1, 0, "")
    return "slept"


@agent(name="parent")
async def parent(children: int = 2, seconds: float = 0.0, apart: float = 0.0) -> list[str]:
    """Has child runs, of which each takes so many seconds more than the one before."""
    times = [seconds + number * apart for number in range(children)]
    handles = [await DBOS.start_workflow_async(plain_child, number, lasting) for number, lasting in enumerate(times)]
    return [await handle.get_result() for handle in handles]


@DBOS.workflow()
async def plain_child(number: int, seconds: float) -> str:
    if seconds:
        await DBOS.sleep_async(seconds)
    return f"child {number}"


@agent(name="silent")
async def silent() -> None:
    """Returns nothing."""


@agent(name="failing")
async def failing(message: str = "no way") -> None:
    """Fails."""
    raise FlakyError(message)


@agent(name="talker")
async def talker(pieces: int = 50, size: int = 100, pause_s: float = 0.0) -> int:
    """Streams text from a step."""
    return await talk(pieces, size, pause_s)


@DBOS.step()
async def talk(pieces: int, size: int, pause_s: float) -> int:
    out = run.output("text")
    for number in range(pieces):
        out.write(f"{number:08d}".ljust(size, "."))
        if pause_s:
            await asyncio.sleep(pause_s)
    return pieces


@DBOS.step(retries_allowed=True, max_attempts=3, interval_seconds=0.01)
def publish_in_a_step() -> str:
    DBOS.set_event("status", "half")
    DBOS.write_stream("log", "from a step")
    status = DBOS.step_status
    if status is not None and status.current_attempt == 0:
        raise FlakyError("the first attempt")
    return "published"


@agent(name="publisher")
async def publisher() -> Any:
    """Publishes from its own code and from a step, then waits."""
    await DBOS.write_stream_async("log", "from the workflow")
    await asyncio.to_thread(publish_in_a_step)
    return await run.signal("more")


# ---- ordinary DBOS code that knows nothing of the product ------------------------------------------------------------


@DBOS.step()
def plain_step(number: int) -> int:
    return number + 1


@DBOS.workflow()
def plain_sync_child(number: int) -> int:
    return plain_step(number)


@DBOS.workflow()
def plain_workflow(name: str, count: int = 2, wait: bool = False) -> dict[str, Any]:
    """Uses all of DBOS."""
    DBOS.set_event("status", {"name": name})
    value = plain_step(count)
    value = plain_sync_child(value)
    DBOS.sleep(0.05)
    DBOS.write_stream("log", "a line")
    handle = DBOS.start_workflow(plain_sync_child, 10)
    message = DBOS.recv("topic", timeout_seconds=30) if wait else None
    return {"value": value, "child": handle.get_result(), "message": message}


expose(plain_workflow, name="plain")


@DBOS.workflow()
def blocking_workflow(seconds: float = 1.0) -> str:
    """Blocks its thread, as real code does."""
    time.sleep(seconds)
    return "done"


expose(blocking_workflow, name="blocking")


@agent(name="storied")
async def storied(delay_s: float = 0.0) -> list[Any]:
    """Has everything that a trace tells of."""
    told: list[Any] = [await flaky_step(1)]
    told.append((await run.approval("Go on?")).approved)
    child = await DBOS.start_workflow_async(plain_child, 1, 0.1)
    told.append(await count_one(0, delay_s, ""))
    told.append(await child.get_result())
    await DBOS.sleep_async(0.2)
    told.append(await run.signal("more"))
    return told


@agent(name="catcher")
async def catcher() -> None:
    """Catches the failure of a step, and fails of something else."""
    try:
        await flaky_step(9)
    except Exception:
        raise ValueError("of its own") from None


# ---- what fails until something outside is mended --------------------------------------------------------------------


@DBOS.step()
def needs(key: str) -> str:
    """Fails unless the test has left the effect `key` of a run called `mended`."""
    effect(f"needs {key}")
    query = sa.text("SELECT 1 FROM public.test_effect WHERE run_id = 'mended' AND what = :key")
    with resources().engine.begin() as conn:
        if conn.execute(query, {"key": key}).first() is None:
            raise FlakyError(f"{key} is broken")
    return f"{key} works"


@agent(name="mendable")
async def mendable(key: str, text: str = "") -> str:
    """Works, needs something that may be broken, works."""
    await count_one(0, 0, text)
    result = await asyncio.to_thread(needs, key)
    await count_one(1, 0, "")
    return f"{result} {text}".strip()


@agent(name="mendable", version="2", current=False)
async def mendable_2(key: str, text: str = "", loud: bool = True) -> str:
    """Does the same steps, and says it louder."""
    await count_one(0, 0, text)
    result = await asyncio.to_thread(needs, key)
    return result.upper() if loud else result


@DBOS.workflow()
async def mendable_child(key: str) -> str:
    return await asyncio.to_thread(needs, key)


@agent(name="mendable-parent")
async def mendable_parent(key: str) -> str:
    """Has a child run that needs something, and one that does not."""
    sound = await DBOS.start_workflow_async(plain_child, 7, 0.0)
    shaky = await DBOS.start_workflow_async(mendable_child, key)
    await count_one(0, 0, "")
    return f"{await sound.get_result()}, {await shaky.get_result()}"


@agent(name="late-reader")
async def late_reader() -> str:
    """Starts a child, and reads its result when it is told to."""
    handle: Any = await DBOS.start_workflow_async(plain_child, 0, 0.0)
    await run.signal("more")
    return str(await handle.get_result())


@agent(name="leaver")
async def leaver() -> str:
    """Ends while its child still sleeps."""
    await DBOS.start_workflow_async(plain_child, 1, 600.0)
    return "left"
