"""Agents whose errors quote their input, in every way in which an agent fails; and one that logs it itself."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from dbos import DBOS
from perdure_service.agents import agent, expose, run


class QuotingError(Exception):
    """What they raise."""


class Unpicklable:
    """A value that pickle cannot store, and whose text is what it holds."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.callback = lambda: text

    def __repr__(self) -> str:
        return self.text


@DBOS.step(retries_allowed=True, max_attempts=2, interval_seconds=0.01)
async def quoting_step(text: str) -> None:
    run.output("text").write(text)
    raise QuotingError(f"cannot use {text}") from KeyError(text)


@DBOS.step(retries_allowed=True, max_attempts=2, interval_seconds=0.01)
def blocking_quoting_step(text: str) -> None:
    raise QuotingError(f"cannot use {text}")


@DBOS.step()
async def unpicklable_step(text: str) -> Any:
    return Unpicklable(text)


@DBOS.workflow()
async def quoting_child(text: str) -> None:
    raise QuotingError(f"cannot use {text}")


async def forgotten(text: str) -> None:
    raise QuotingError(f"cannot use {text}")


@agent(name="quoting")
async def quoting(how: str, text: str) -> Any:
    """Fails in some way."""
    run.progress(text)
    run.log(text)
    match how:
        case "in a step":
            await quoting_step(text)
        case "unpicklable result":
            return await unpicklable_step(text)
        case "unpicklable value":
            await DBOS.set_event_async("key", Unpicklable(text))
        case "in a child":
            await (await DBOS.start_workflow_async(quoting_child, text)).get_result()
        case "in a child nobody waits for":
            await DBOS.start_workflow_async(quoting_child, text)
        case "in a task nobody waits for":
            task = asyncio.create_task(forgotten(text))
            await asyncio.wait([task])
            del task
        case "in a group":
            raise ExceptionGroup(text, [QuotingError(text), KeyError(text)])
        case "in its publication":
            await DBOS.set_event_async("key", text)
            await DBOS.write_stream_async("stream", text)
            raise QuotingError(text)
        case _:
            raise QuotingError(f"cannot use {text}")
    return text


@DBOS.workflow()
def blocking_quoting(text: str) -> None:
    """Fails in blocking code."""
    blocking_quoting_step(text)


expose(blocking_quoting, name="blocking-quoting")


@agent(name="leaking")
async def leaking(text: str) -> None:
    """Logs its input, which no server can keep an agent from."""
    logging.getLogger("an.agent").warning("got %s", text)
