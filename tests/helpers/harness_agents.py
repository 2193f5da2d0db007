"""Agents for the tests of the harness: what they do is counted in this module, which survives the engine's crashes."""

from __future__ import annotations

import asyncio
import itertools
import os
from datetime import timedelta
from typing import Any, Literal

from dbos import DBOS
from openai import AsyncOpenAI
from perdure_service.agents import agent, run
from pydantic import BaseModel

DONE: list[str] = []
"""What has been done, in order, by whichever execution."""

NUMBERS = itertools.count()
"""Something that is different each time."""


@DBOS.step(name="harness.add", retries_allowed=True, max_attempts=3, interval_seconds=0.01)
async def add(number: int, fails: int = 0) -> int:
    status = DBOS.step_status
    attempt = (status.current_attempt or 0) if status else 0
    DONE.append(f"add {number}")
    run.output("text").write(f"{number} ")
    if attempt < fails:
        raise ValueError("not yet")
    return number + 1


@DBOS.step(name="harness.blocking-add")
def blocking_add(number: int) -> int:
    DONE.append(f"add {number}")
    return number + 1


@agent(name="adder")
async def adder(steps: int = 3, fails: int = 0) -> int:
    """Adds, and says when it is left by whatever way."""
    try:
        total = 0
        for _ in range(steps):
            total = await add(total, fails)
        return total
    finally:
        DONE.append("left")


@agent(name="blocking-adder")
def blocking_adder(steps: int = 3) -> int:
    """Adds in blocking code."""
    try:
        total = 0
        for _ in range(steps):
            total = blocking_add(total)
        return total
    finally:
        DONE.append("left")


@agent(name="mixed-adder")
async def mixed_adder() -> int:
    """Has blocking steps, which run on the loop's own thread, and others at the same time."""
    first = blocking_add(0)
    others = await asyncio.gather(add(first), add(first))
    return blocking_add(sum(others))


@agent(name="everything")
async def everything() -> list[Any]:
    """Uses what a run can wait for, a child, and an event."""
    first = await add(0)
    asked = await run.approval("Go on?", payload={"number": first})
    word = await run.signal("word")
    child = await adder(1)
    await DBOS.set_event_async("progress", first)
    await DBOS.sleep_async(0.05)
    return [first, asked.approved, asked.comment, word, child]


@agent(name="murmurer")
async def murmurer() -> str:
    """Says something in a step that goes on for a while, so that it is written before the step's checkpoint."""
    return await talk()


@DBOS.step(name="harness.talk")
async def talk() -> str:
    run.output("text").write("hello ")
    await asyncio.sleep(0.4)
    run.output("text").write("world")
    return "good bye"


@agent(name="sender")
async def sender() -> str:
    """Says something, which rides on the checkpoint of a message to itself."""
    run.output("text").write("once ")
    await DBOS.send_async(str(DBOS.workflow_id), "hello", topic="word")
    return str(await run.signal("word"))


@agent(name="harness-listener")
async def listener() -> str | None:
    """Waits for a word."""
    return await run.signal("word", timeout=timedelta(seconds=60))


class Limits(BaseModel):
    """What `limited` takes."""

    steps: int = 1


@agent(name="limited")
async def limited(limits: Limits) -> int:
    return await adder(limits.steps)


@agent(name="starter")
async def starter(how: Literal["start", "enqueue", "call", "json"]) -> int:
    """Has a child that takes a model, by one of the ways there are."""
    limits: Any = Limits()
    if how == "call":
        return await limited(limits)
    if how == "enqueue":
        await DBOS.enqueue_workflow_async("perdure", limited, limits)
    handle: Any = await DBOS.start_workflow_async(limited, limits if how == "start" else limits.model_dump(mode="json"))
    return int(await handle.get_result())


@agent(name="moody")
async def moody() -> int:
    """Takes another way each time: a step too much after a crash."""
    first = await add(0)
    if next(NUMBERS) % 2:
        return await add(first)
    return await renamed(first)


@DBOS.step(name="harness.renamed")
async def renamed(number: int) -> int:
    return number


@agent(name="clock")
async def clock() -> int:
    """Looks at something that changes outside of its steps: the steps are the same, the result is not."""
    await add(0)
    return next(NUMBERS)


@agent(name="dice")
async def dice() -> list[Any]:
    """Has a step whose result is different each time, which is as it should be."""
    return [await rolled(), run.id]


@DBOS.step(name="harness.rolled")
async def rolled() -> int:
    return next(NUMBERS)


@agent(name="raiser")
async def raiser(text: str = "no") -> None:
    """Fails."""
    await add(0)
    raise ValueError(text)


@DBOS.step(name="harness.model", retries_allowed=True, max_attempts=4, interval_seconds=0.01)
async def ask_model(question: str) -> str:
    """Asks whatever endpoint the settings name, and streams its answer."""
    out = run.output("answer")
    async with AsyncOpenAI(
        base_url=os.environ["PERDURE_MODEL__BASE_URL"], api_key=os.environ["PERDURE_MODEL__API_KEY"], max_retries=0
    ) as client:
        stream = await client.chat.completions.create(
            model=os.environ["PERDURE_MODEL__NAME"], messages=[{"role": "user", "content": question}], stream=True
        )
        text, finished = "", False
        async for chunk in stream:
            if not chunk.choices:
                continue
            text += (piece := chunk.choices[0].delta.content or "")
            out.write(piece)
            finished = finished or chunk.choices[0].finish_reason is not None
        if not finished:
            raise ConnectionError("the answer broke off")
        return text


@agent(name="asks-model")
async def asks_model(question: str) -> str:
    """Asks a model twice."""
    first = await ask_model(question)
    return await ask_model(first)


@DBOS.workflow()
async def echoing_child(number: int) -> int:
    return number


@agent(name="gatherer")
async def gatherer(children: int = 2) -> list[int]:
    """Takes the results of its children at once."""
    handles = [await DBOS.start_workflow_async(echoing_child, number) for number in range(children)]
    return list(await asyncio.gather(*(handle.get_result() for handle in handles)))
