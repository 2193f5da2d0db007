"""What an agent is to the catalogue: its name, version and the JSON Schemas of its input and output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry

from perdure_service.domain.budgets import UNLIMITED, Budget
from perdure_service.errors import InputSchemaViolation

AGENT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
AGENT_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
MAX_VIOLATIONS = 20
"""How many violations of a schema one error reports."""


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """A catalogue entry. `output_schema` is None when it does not say what it returns; `budget` is of each run.

    `queue` is that of its runs unless a start names another, empty for the default one; `max_running` is how many of
    its runs one executor runs at once, 0 for no limit.
    """

    name: str
    version: str
    description: str
    input_schema: Mapping[str, Any]
    output_schema: Mapping[str, Any] | None = None
    current: bool = True
    budget: Budget = UNLIMITED
    queue: str = ""
    max_running: int = 0

    @property
    def workflow_name(self) -> str:
        """The name of the agent's workflow in DBOS."""
        return f"{self.name}@{self.version}"


def validator(schema: Mapping[str, Any]) -> Draft202012Validator:
    """Returns what checks values by a JSON Schema. It knows the schema alone.

    By itself the library reads a `$ref` to a URL from the web, in whatever thread asks, and an agent may take a schema
    from its caller.
    """
    return Draft202012Validator(dict(schema), registry=Registry())


_KEPT = 1_000
_kept: dict[int, tuple[Mapping[str, Any], Draft202012Validator]] = {}
"""What checks by the schemas of agents, which are the same objects at every start; each is held: its id is its own."""


def _validator_of(spec: AgentSpec) -> Draft202012Validator:
    schema = spec.input_schema
    known = _kept.get(id(schema))
    if known is None:
        if len(_kept) >= _KEPT:
            _kept.clear()
        known = _kept[id(schema)] = schema, validator(schema)
    return known[1]


def check_input(spec: AgentSpec, run_input: Any) -> None:
    """Refuses an input that breaks the agent's schema.

    Raises:
        InputSchemaViolation: With the path of every violation, e.g. `input.limits[0].max`, at most 20.
    """
    if _plainly_fits(spec.input_schema, run_input):
        return
    found: list[tuple[str, str]] = []
    for error in _validator_of(spec).iter_errors(run_input):
        found.append((_path(error.absolute_path), error.message[:300]))
        if len(found) == MAX_VIOLATIONS:
            break
    if found:
        found.sort()
        raise InputSchemaViolation(*found[0], *found[1:])


_PLAIN = {"type", "properties", "required", "additionalProperties", "items", "title", "description", "default"}
_PLAIN_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def _plainly_fits(schema: Any, value: Any) -> bool:
    """Returns whether a value fits a schema of nothing but types and properties; False when the library must be asked.

    The library takes as long for such a schema as a start takes for everything else that it checks.
    """
    if type(schema) is not dict or not schema.keys() <= _PLAIN:
        return False
    kind = schema.get("type")
    if type(kind) is not str or type(value) not in _PLAIN_TYPES.get(kind, ()):
        return False
    if kind == "array":
        items = schema.get("items", True)
        return items is True or all(_plainly_fits(items, item) for item in value)
    if kind != "object":
        return True
    properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    if type(more) is not bool or not all(name in value for name in schema.get("required", ())):
        return False
    return all(_plainly_fits(properties[name], item) if name in properties else more for name, item in value.items())


def _path(parts: Any) -> str:
    path = "input"
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path
