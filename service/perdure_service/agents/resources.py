"""What the shipped agents work with: bound once when the server is put together, read inside steps."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from perdure_service.settings import Settings


@dataclass(frozen=True, slots=True)
class Resources:
    """The database of the process, and its settings."""

    engine: sa.Engine
    settings: Settings


_bound: Resources | None = None


def bind(resources: Resources | None) -> None:
    """Gives the agents what they work with; None takes it away again."""
    # A global, as agents are functions that DBOS calls by name: nothing can be passed to them.
    global _bound
    _bound = resources


def resources() -> Resources:
    """Returns what was bound.

    Raises:
        RuntimeError: Nothing was: the agent runs outside a server.
    """
    if _bound is None:
        raise RuntimeError("this agent needs a server's database; in tests call perdure_service.agents.resources.bind")
    return _bound
