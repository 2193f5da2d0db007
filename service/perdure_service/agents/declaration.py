"""Decides what it means to declare an agent: how a function becomes a DBOS workflow with a catalogue entry.

`@agent` makes one with typed arguments that DBOS stores as plain JSON; `expose` takes one that exists as it is.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin

import typing_extensions
from dbos import DBOS, WorkflowSerializationFormat

from perdure_service.agents import catalogue
from perdure_service.agents.signatures import Signature, read_signature
from perdure_service.domain.agents import AGENT_NAME, AGENT_VERSION, AgentSpec
from perdure_service.domain.budgets import UNLIMITED, Budget
from perdure_service.settings import QUEUE_NAME

P = ParamSpec("P")
R = TypeVar("R")


def agent(
    *,
    name: str,
    version: str = "1",
    description: str | None = None,
    current: bool = True,
    max_steps: int = 0,
    max_tokens: int = 0,
    max_running: int = 0,
    queue: str = "",
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares the decorated function, `async def` or `def`, to be an agent: a DBOS workflow with a catalogue entry.

    A single parameter that is a BaseModel, a dataclass or a TypedDict is the run's input; otherwise the members of the
    input are the parameters by name. Input and output are stored as plain JSON, so the first execution and every replay
    get equal values. Called from another agent it is a child run, with typed arguments and a typed result;
    `DBOS.start_workflow` knows nothing of the types, and wants and returns plain JSON.

    Args:
        name: What callers name it by: `[a-z][a-z0-9_-]*`, at most 63 characters.
        version: Which program it is. Change it when runs of the old one could not continue in the new one.
        description: For the catalogue; the first line of the docstring by default.
        current: Whether callers that name no version get this one.
        max_steps: How many steps with a body a run may begin; 0 for no limit. One that would begin another fails with
            `BudgetExceeded`.
        max_tokens: How many tokens its model calls may use, as `run.usage` says, sent and received; 0 for no limit.
            A run that has used them up fails at its next step.
        max_running: How many runs of it one executor runs at once, children included; 0 for no limit but the
            executor's own. The others are queued.
        queue: The queue of its runs when a start names none; empty means the default queue. The deployment must
            declare it (`PERDURE_QUEUES`).

    Raises:
        TypeError: The name, the version, a limit, the queue or the signature cannot be an agent's; the message says
            what to change.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if hasattr(function, "dbos_function_name"):
            raise TypeError(f"{function.__qualname__} is DBOS's already; expose() a workflow, or remove its decorator")
        signature = read_signature(function, annotations_required=True)
        spec = _spec(name, version, description, current, function, signature, _budget(max_steps, max_tokens))
        spec = dataclasses.replace(spec, max_running=_limit("max_running", max_running), queue=_queue(queue))
        entry = catalogue.RegisteredAgent(
            spec, _body(function, signature), spec.workflow_name, signature.arguments, signature.input_argument
        )
        # Before DBOS hears of it: in one module, DBOS replaces a workflow of the same name without a word.
        catalogue.check(entry)
        workflow = DBOS.workflow(
            name=spec.workflow_name,
            max_recovery_attempts=None,  # the server's own limit, PERDURE_MAX_RECOVERIES
            serialization_type=WorkflowSerializationFormat.PORTABLE,
        )(entry.workflow)
        catalogue.register(dataclasses.replace(entry, workflow=workflow))
        return cast(Callable[P, R], _typed(workflow, signature))

    return decorate


def expose(
    workflow: Callable[P, R],
    name: str | None = None,
    version: str = "1",
    description: str | None = None,
    *,
    current: bool = True,
) -> Callable[P, R]:
    """Puts an existing `@DBOS.workflow()` function into the catalogue, and returns it unchanged.

    It keeps its name in DBOS, and gets the values of the input as they are in JSON. With types that need more (a model,
    a UUID) either let DBOS convert them, by `@DBOS.workflow(validate_args=pydantic_args_validator)`, or use `@agent`.

    Args:
        workflow: The function as DBOS's decorator returned it.
        name: What callers name it by; the workflow's own name by default.
        version: Which program it is.
        description: For the catalogue; the first line of the docstring by default.
        current: Whether callers that name no version get this one.

    Raises:
        TypeError: It is not a DBOS workflow, or cannot be called with JSON; the message says what to change.
    """
    workflow_name = _dbos_name(workflow)
    signature = read_signature(workflow, annotations_required=False)
    _check_json_only(workflow, signature)
    spec = _spec(name or workflow_name, version, description, current, workflow, signature)
    catalogue.register(
        catalogue.RegisteredAgent(spec, workflow, workflow_name, signature.arguments, signature.input_argument)
    )
    return workflow


def _spec(
    name: str,
    version: str,
    description: str | None,
    current: bool,
    function: Callable[..., Any],
    signature: Signature,
    budget: Budget = UNLIMITED,
) -> AgentSpec:
    if not AGENT_NAME.fullmatch(name):
        raise TypeError(f"{name!r} cannot be an agent's name; it must match {AGENT_NAME.pattern}")
    if not AGENT_VERSION.fullmatch(version):
        raise TypeError(f"{version!r} cannot be an agent's version; it must match {AGENT_VERSION.pattern}")
    if description is None:
        description = (inspect.getdoc(function) or "").partition("\n")[0]
    return AgentSpec(name, version, description, signature.input_schema(), signature.output_schema(), current, budget)


def _budget(max_steps: int, max_tokens: int) -> Budget:
    return Budget(_limit("max_steps", max_steps), _limit("max_tokens", max_tokens))


def _limit(name: str, limit: int) -> int:
    if type(limit) is not int or limit < 0:
        raise TypeError(f"{name} is {limit!r}; it must be a whole number, 0 for no limit")
    return limit


def _queue(name: str) -> str:
    if name and not QUEUE_NAME.fullmatch(name):
        raise TypeError(f"{name!r} cannot be a queue's name; it must match {QUEUE_NAME.pattern}")
    return name


def _body(function: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """Returns what DBOS runs: plain JSON in, the author's function on typed values, plain JSON out."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            return signature.result_to_json(await function(**signature.to_values(args, kwargs)))

        body: Callable[..., Any] = run_async
    else:

        @functools.wraps(function)
        def run_sync(*args: Any, **kwargs: Any) -> Any:
            return signature.result_to_json(function(**signature.to_values(args, kwargs)))

        body = run_sync
    # DBOS reads annotations to turn text into dates before it calls; here that is pydantic's work.
    body.__annotations__ = {}
    return body


def _typed(workflow: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """Returns what an author calls: typed values in and out, plain JSON in between, for DBOS to store."""
    if inspect.iscoroutinefunction(workflow):

        @functools.wraps(workflow)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return signature.result_to_value(await workflow(**signature.to_json(args, kwargs)))

        return call_async

    @functools.wraps(workflow)
    def call_sync(*args: Any, **kwargs: Any) -> Any:
        return signature.result_to_value(workflow(**signature.to_json(args, kwargs)))

    return call_sync


# ---- what DBOS left on a function ------------------------------------------------------------------------------------


def _dbos_name(workflow: Callable[..., Any]) -> str:
    """Returns a workflow's name in DBOS, from the attribute that its decorator sets (checked by a test)."""
    described = getattr(workflow, "__qualname__", repr(workflow))
    name = getattr(workflow, "dbos_function_name", None)
    if not isinstance(name, str):
        raise TypeError(f"{described} is not a DBOS workflow; decorate it with @DBOS.workflow(), or use @agent instead")
    # Of a step, this is the workflow that DBOS makes to run it alone.
    original = getattr(workflow, "__orig_func", None)
    if getattr(original, "dbos_function_name", None) != name:
        raise TypeError(f"{described} is a DBOS step; an agent is a workflow, which may have this as its only step")
    return name


def _check_json_only(workflow: Callable[..., Any], signature: Signature) -> None:
    """Refuses a plain workflow whose types JSON values would not be.

    Raises:
        TypeError: It would get or return something else than its annotations say.
    """
    name = getattr(workflow, "__qualname__", repr(workflow))
    info = getattr(inspect.unwrap(workflow), "dbos_func_decorator_info", None)
    if getattr(info, "validate_args", None) is None:
        for parameter in signature.parameters:
            # DBOS itself makes dates of a parameter's text.
            dates = parameter.annotation in (datetime.datetime, datetime.date)
            if not dates and not _is_json(parameter.annotation, _JSON):
                raise TypeError(
                    f"{name} would get plain JSON for `{parameter.name}: {_type_name(parameter.annotation)}`; add "
                    f"validate_args=pydantic_args_validator to its @DBOS.workflow(), or use @agent instead"
                )
    if not _is_json(signature.returned, _PORTABLE):
        raise TypeError(
            f"{name} returns {_type_name(signature.returned)}, which DBOS's portable JSON cannot hold; "
            f"return plain values (model_dump(mode='json')), or use @agent instead"
        )


_JSON: frozenset[Any] = frozenset({Any, None, type(None), object, bool, int, float, str, list, dict})
_PORTABLE: frozenset[Any] = _JSON | {tuple, set, datetime.datetime, datetime.date}
"""What DBOS's portable serializer writes (dbos/_serialization.py: _portableify)."""


def _is_json(annotation: Any, plain: frozenset[Any]) -> bool:
    """Returns whether all values of a type are plain JSON, as far as the type says."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _is_json(get_args(annotation)[0], plain)
    if origin is Literal:
        return all(type(value) in plain for value in get_args(annotation))
    if origin in (Union, UnionType):
        return all(_is_json(part, plain) for part in get_args(annotation))
    if typing_extensions.is_typeddict(annotation):
        return True
    if isinstance(origin, type):
        parts = [part for part in get_args(annotation) if part is not Ellipsis]
        return (origin in plain or origin.__module__ == "collections.abc") and all(_is_json(p, plain) for p in parts)
    # What is no class (a NewType, a type variable) says nothing.
    return annotation in plain or not isinstance(annotation, type)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
