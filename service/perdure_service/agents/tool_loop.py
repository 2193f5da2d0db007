"""Decides how a model and tools work on a task in turn, each request and call a step of its own, to a typed result.

**What a crash costs.** The loop is the agent's own code: after a crash it runs again over the recorded replies and
results, and comes to the step that was in progress. So a call that had finished is never made again, neither of the
model nor of a tool. What the model is offered is looked up inside the step that asks it, and a tool that was called is
called whatever is offered now: a setting that changed between a crash and its recovery does not change the steps.

**How it ends.** The model gives its result by calling the tool `final_answer`, whose arguments are the result's type.
Arguments that do not fit go back to it with what is wrong, once; the second time the run fails. Nothing else bounds the
rounds but the agent's budget: give it one.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dbos import DBOS, error
from pydantic import BaseModel, ValidationError

from perdure_service.agents import chat
from perdure_service.agents.chat import Call, MemberStream, Message, Offer, Reply, Streams
from perdure_service.agents.context import run
from perdure_service.agents.resources import resources
from perdure_service.agents.signatures import Signature, read_signature
from perdure_service.errors import InputSchemaViolation

R = TypeVar("R", bound=BaseModel)

FINAL_ANSWER = "final_answer"
TEXT_STREAM = "text"
"""The output stream of what the model says beside calling tools."""
MAX_RESULT_CHARS = 20_000
"""How much of a tool's result the model gets."""
MAX_PROBLEMS = 5
"""How many problems of its arguments the model is told at once."""


class ToolError(Exception):
    """What a tool raises when the model should know, and may do better: its message goes to the model."""


class OutputInvalid(Exception):
    """The model gave a final answer of the wrong shape, and again after it was told what is wrong."""


@dataclass(frozen=True, slots=True, init=False)
class Tool:
    """A step that the model may have called. Name, description and arguments are the function's own.

    An agent can be one, too; then each call is a child run. The model is told its bad arguments, a `ToolError`, and
    that the step's retries are used up. Everything else that is raised fails the run.
    """

    call: Callable[..., Awaitable[Any]]
    signature: Signature
    offered: Callable[[], bool]

    def __init__(self, step: Callable[..., Awaitable[Any]], offered: Callable[[], bool] = lambda: True) -> None:
        """Makes a tool of a step.

        Args:
            step: An asynchronous `@DBOS.step()` or `@agent` with a docstring and annotated parameters.
            offered: Whether the model is told of it. Asked in a step, so it may look at settings.

        Raises:
            TypeError: The function cannot be a tool; the message says what to change.
        """
        name = getattr(step, "__qualname__", repr(step))
        if not inspect.iscoroutinefunction(step) or not hasattr(step, "dbos_function_name"):
            raise TypeError(f"{name} cannot be a tool; it must be an `async def` with @DBOS.step() or @agent")
        if not inspect.getdoc(step):
            raise TypeError(f"{name} has no docstring; the model reads it to know what the tool is for")
        object.__setattr__(self, "call", step)
        # The author's own function: what `@agent` makes of one has no annotations.
        object.__setattr__(self, "signature", read_signature(inspect.unwrap(step), annotations_required=True))
        object.__setattr__(self, "offered", offered)

    @property
    def name(self) -> str:
        """The function's name: what the model calls."""
        return str(getattr(self.call, "__name__", ""))

    def offer(self) -> Offer:
        """Returns what the model is told of it."""
        return Offer(self.name, inspect.getdoc(self.call) or "", self.signature.input_schema())


async def run_tools(
    instructions: str, task: str, *, tools: Sequence[Tool], output: type[R], stream: str = ""
) -> tuple[R, list[Message]]:
    """Has the model that is set work on a task with tools; returns its result and the conversation.

    Args:
        instructions: What the model should know and do. How to end is added.
        task: The task.
        tools: What it may have called, besides.
        output: The type of the result.
        stream: A text member of the result that watchers see as it is written, in the output stream of this name.

    Raises:
        OutputInvalid: The model's result did not fit, twice.
        BudgetExceeded: The agent's budget is used up.
        DBOSMaxStepRetriesExceeded: The model could not be asked.
        ConfigurationError: No model is set, or its client is not installed.
    """
    conversation: list[Message] = [{"role": "user", "content": task}]
    final = Offer(FINAL_ANSWER, "Gives the result and ends the task.", output.model_json_schema())
    by_name = {tool.name: tool for tool in tools}
    problem = ""
    while True:
        message = await ask_model(instructions, conversation, tools, final, stream)
        reply = Reply.from_json(message)
        conversation.append(message)
        result, found = _result(reply, output)
        if result is not None:
            return result, conversation
        if found and problem:
            raise OutputInvalid(f"the model's final answer does not fit {output.__name__}: {found}")
        problem = found
        if not reply.calls:
            conversation.append({"role": "user", "content": found})
        conversation += await _call_all(reply.calls, by_name, found)


@DBOS.step(
    name="tools.ask_model", retries_allowed=True, max_attempts=4, interval_seconds=1.0, should_retry=chat.is_transient
)
async def ask_model(
    instructions: str, conversation: list[Message], tools: Sequence[Tool], final: Offer, stream: str
) -> Message:
    """Asks the model for its next move; watchers see its text as it is written."""
    streams = Streams(run.output(TEXT_STREAM).write)
    if stream:
        streams.calls[FINAL_ANSWER] = MemberStream(stream, run.output(stream).write)
    offers = [final, *(tool.offer() for tool in tools if tool.offered())]
    ending = f"{instructions}\n\nWhen you are done, call the tool {FINAL_ANSWER}; nothing else ends the task."
    reply = await chat.ask(ending, conversation, resources().settings.model, streams, run.usage, offers)
    return reply.to_json()


def _result(reply: Reply, output: type[R]) -> tuple[R | None, str]:
    """Returns the result that a reply gives; else None, and what is wrong with it (nothing when tools are called)."""
    for call in reply.calls:
        if call.name == FINAL_ANSWER:
            try:
                return output.model_validate_json(call.arguments), ""
            except ValidationError as violation:
                problems = violation.errors(include_url=False, include_input=False)[:MAX_PROBLEMS]
                return None, "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in problems)
    return None, "" if reply.calls else f"no tool was called; call {FINAL_ANSWER} to give the result"


async def _call_all(calls: Sequence[Call], tools: dict[str, Tool], problem: str) -> list[Message]:
    """Returns what the calls of a reply came to, in their order. They run side by side; all end before one fails."""
    results = await asyncio.gather(*(_call(call, tools, problem) for call in calls), return_exceptions=True)
    messages: list[Message] = []
    for call, result in zip(calls, results, strict=True):
        if isinstance(result, BaseException):
            raise result
        messages.append({"role": "tool", "id": call.id, "name": call.name, "content": result[:MAX_RESULT_CHARS]})
    return messages


async def _call(call: Call, tools: dict[str, Tool], problem: str) -> str:
    """Returns what the model gets for a call."""
    if call.name == FINAL_ANSWER:
        return f"error: {problem}"
    tool = tools.get(call.name)
    if tool is None:
        return f"error: there is no tool {call.name!r}; there are {', '.join(sorted(tools))}"
    try:
        named = tool.signature.arguments(json.loads(call.arguments))
    except json.JSONDecodeError as broken:
        return f"error: the arguments are not JSON: {broken}"
    except InputSchemaViolation as violation:
        return "error: " + "; ".join(f"{path} {text}" for path, text in violation.violations[:MAX_PROBLEMS])
    try:
        result = await tool.call(**tool.signature.to_values((), named))
    except ToolError as refused:
        return f"error: {refused}"
    except error.DBOSMaxStepRetriesExceeded as failed:
        return f"error: the tool failed, also when it was tried again: {failed}"
    return result if isinstance(result, str) else json.dumps(tool.signature.result_to_json(result), ensure_ascii=False)
