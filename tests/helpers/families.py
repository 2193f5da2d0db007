"""Agents that have children, by every way there is: called, started, queued, and under ids of their own."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from dbos import DBOS, SetWorkflowID
from perdure_service.agents import agent, run
from pydantic import BaseModel


class Member(BaseModel):
    """What one run of a family does."""

    steps: int = 1
    delay_s: float = 0.0
    text: str = ""
    wait: bool = False
    children: int = 0
    depth: int = 0
    how: Literal["call", "start", "queue"] = "start"
    child_waits: bool = False
    leave: bool = False
    """Whether it ends without waiting for its children."""

    def of_child(self) -> Member:
        return self.model_copy(update={"depth": self.depth - 1, "wait": self.child_waits, "leave": False})


@DBOS.step()
async def work(number: int, delay_s: float, text: str) -> int:
    if text:
        run.output("text").write(text)
    if delay_s:
        await asyncio.sleep(delay_s)
    return number


@agent(name="family")
async def family(request: Member) -> int:
    """Works, has children that do the same, and returns how many runs there were."""
    for number in range(request.steps):
        await work(number, request.delay_s, request.text)
    if request.wait:
        await run.signal("more")
    if not request.depth:
        return 1
    child = request.of_child()
    if request.how == "call":
        return 1 + sum([await family(child) for _ in range(request.children)])
    handles: list[Any] = []
    arguments: Any = child.model_dump(mode="json")  # what DBOS stores of a start is JSON
    for _ in range(request.children):
        if request.how == "queue":
            handles.append(await DBOS.enqueue_workflow_async("perdure", family, arguments))
        else:
            handles.append(await DBOS.start_workflow_async(family, arguments))
    return 1 if request.leave else 1 + sum([await handle.get_result() for handle in handles])


@agent(name="adopter")
async def adopter(child_id: str, others: str = "", wait: bool = False) -> list[Any]:
    """Starts one child twice under an id of its own, and "starts" a run that another one has started."""
    results: list[Any] = []
    arguments: Any = Member().model_dump(mode="json")
    for _ in range(2):
        with SetWorkflowID(child_id):
            results.append(await (await DBOS.start_workflow_async(family, arguments)).get_result())
        if wait:
            await run.signal("more")
    if others:
        with SetWorkflowID(others):
            results.append(await (await DBOS.start_workflow_async(family, arguments)).get_result())
    return results
