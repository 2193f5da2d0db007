"""Decides how a run's input becomes the arguments of a function and its result the run's output, by its types.

The rule: a single parameter that is a BaseModel, a dataclass or a TypedDict is the input; otherwise the members of the
input are the parameters by name. What DBOS stores is always plain JSON, so that a replay gets what the first execution
got, and nothing has to be unpickled.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typing_extensions
from pydantic import BaseModel, PydanticUserError, RootModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError

from perdure_service.errors import InputSchemaViolation

MAX_VIOLATIONS = 20
_DEFINITIONS = "#/$defs/{model}"


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of an agent. `default` is `inspect.Parameter.empty` when it has none."""

    name: str
    annotation: Any
    adapter: TypeAdapter[Any]
    default: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Signature:
    """What an agent takes and returns.

    Attributes:
        parameters: In order.
        input_argument: The parameter that is the whole input; empty when the input's members are the parameters.
        result: The type it returns; None when it does not say.
        returned: The annotation of that; Any when there is none.
        python: The function's signature, to bind calls with.
    """

    parameters: tuple[Parameter, ...]
    input_argument: str
    result: TypeAdapter[Any] | None
    returned: Any
    python: inspect.Signature

    def input_schema(self) -> dict[str, Any]:
        """Returns the JSON Schema of the input."""
        if self.input_argument:
            return self.parameters[0].adapter.json_schema(by_alias=True, ref_template=_DEFINITIONS)
        keys = [(parameter.name, "validation", parameter.adapter) for parameter in self.parameters]
        schemas, common = TypeAdapter.json_schemas(keys, by_alias=True, ref_template=_DEFINITIONS)  # type: ignore[arg-type]
        properties: dict[str, Any] = {}
        for parameter in self.parameters:
            properties[parameter.name] = dict(schemas[parameter.name, "validation"])
            properties[parameter.name].update(_default(parameter))
        return {
            "type": "object",
            "properties": properties,
            "required": [p.name for p in self.parameters if p.default is inspect.Parameter.empty],
            "additionalProperties": False,
            **common,
        }

    def output_schema(self) -> dict[str, Any] | None:
        """Returns the JSON Schema of the output, None when the function does not say what it returns."""
        if self.result is None:
            return None
        return self.result.json_schema(by_alias=True, mode="serialization", ref_template=_DEFINITIONS)

    def arguments(self, run_input: Any) -> dict[str, Any]:
        """Returns the named arguments of a run's input, as plain JSON values.

        Checks what a JSON Schema cannot say too, such as the formats of dates and an author's own validators.

        Raises:
            InputSchemaViolation: The function does not take this input.
        """
        if self.input_argument:
            named = {self.input_argument: run_input}
        elif isinstance(run_input, Mapping):
            named = dict(run_input)
        else:
            raise InputSchemaViolation("input", "must be an object")
        problems: list[tuple[str, str]] = []
        for parameter in self.parameters:
            path = "input" if self.input_argument else f"input.{parameter.name}"
            if parameter.name not in named:
                if parameter.default is inspect.Parameter.empty:
                    problems.append((path, "is required"))
                continue
            try:
                parameter.adapter.validate_json(json.dumps(named[parameter.name]))
            except ValidationError as error:
                problems += [(path + _path(e["loc"]), e["msg"]) for e in error.errors(include_url=False)]
        known = {parameter.name for parameter in self.parameters}
        problems += [(f"input.{name}", "is not a parameter of the agent") for name in named if name not in known]
        if problems:
            raise InputSchemaViolation(*problems[0], *problems[1:MAX_VIOLATIONS])
        return named

    def to_json(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call, typed or JSON, by name and as plain JSON.

        Raises:
            TypeError: The function does not take such arguments.
            pydantic.ValidationError: A value is not of its parameter's type.
        """
        bound = self.python.bind(*args, **kwargs).arguments
        return {p.name: _plain(p.adapter, bound[p.name]) for p in self.parameters if p.name in bound}

    def to_values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the typed arguments for stored plain JSON, by name.

        Raises:
            TypeError: The function does not take such arguments.
            pydantic.ValidationError: A value is not of its parameter's type.
        """
        bound = self.python.bind(*args, **kwargs).arguments
        return {p.name: p.adapter.validate_json(json.dumps(bound[p.name])) for p in self.parameters if p.name in bound}

    def result_to_json(self, result: Any) -> Any:
        """Returns the result as plain JSON.

        Raises:
            pydantic.ValidationError: It is not of the type that the function says.
            pydantic_core.PydanticSerializationError: It cannot be JSON.
        """
        if self.result is None:
            return json.loads(_ANYTHING.dump_json(result, by_alias=True))
        return _plain(self.result, result)

    def result_to_value(self, stored: Any) -> Any:
        """Returns the typed result for its plain JSON."""
        return stored if self.result is None else self.result.validate_json(json.dumps(stored))


def read_signature(function: Callable[..., Any], *, annotations_required: bool) -> Signature:
    """Returns what `function` takes and returns.

    Raises:
        TypeError: It cannot be an agent; the message says what to change.
    """
    name = getattr(function, "__qualname__", repr(function))
    if not inspect.isfunction(inspect.unwrap(function)):
        raise TypeError(f"{name} is not a function")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{name} is a generator; return the result, and write to run.output() on the way")
    python = inspect.signature(function)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise TypeError(
            f"the annotations of {name} cannot be read ({error}); their types must be importable from its module"
        ) from error
    parameters = tuple(
        _read_parameter(name, parameter, hints, annotations_required) for parameter in python.parameters.values()
    )
    whole = len(parameters) == 1 and _is_object(parameters[0].annotation)
    returned = hints.get("return", Any)
    result = None if returned is Any else _adapter(f"the result of {name}", returned, "serialization")
    return Signature(parameters, parameters[0].name if whole else "", result, returned, python)


def _read_parameter(
    function: str, parameter: inspect.Parameter, hints: Mapping[str, Any], annotations_required: bool
) -> Parameter:
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise TypeError(f"{function} takes {parameter}; name each parameter, as the input's members are its names")
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        raise TypeError(f"{function} takes `{parameter.name}` by position only; remove the `/` from its parameters")
    if parameter.name in ("self", "cls"):
        raise TypeError(f"{function} is a method; an agent is a function of a module")
    if parameter.name not in hints and annotations_required:
        raise TypeError(f"parameter `{parameter.name}` of {function} has no type; annotate it (Any takes any JSON)")
    if isinstance(parameter.default, FieldInfo):
        raise TypeError(
            f"parameter `{parameter.name}` of {function} has a Field(…) for a default; write Annotated[…, Field(…)]"
        )
    annotation = hints.get(parameter.name, Any)
    adapter = _adapter(f"parameter `{parameter.name}` of {function}", annotation)
    return Parameter(parameter.name, annotation, adapter, parameter.default)


def _adapter(
    what: str, annotation: Any, mode: Literal["validation", "serialization"] = "validation"
) -> TypeAdapter[Any]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        adapter.json_schema(mode=mode)
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"{what} has a type that JSON cannot express: {reason}") from error
    return adapter


def _default(parameter: Parameter) -> dict[str, Any]:
    if parameter.default is inspect.Parameter.empty:
        return {}
    try:
        return {"default": _plain(parameter.adapter, parameter.default)}
    except (ValidationError, PydanticSerializationError):
        # `limit: int = None`, and other defaults that a caller could not send.
        return {}


def _is_object(annotation: Any) -> bool:
    """Returns whether the values of a type are objects with members of their own."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if typing_extensions.is_typeddict(annotation):
        return True
    # Of a generic class, `Page[int]`, the class.
    annotation = get_origin(annotation) or annotation
    if not isinstance(annotation, type):
        return False
    if issubclass(annotation, BaseModel):
        return not issubclass(annotation, RootModel)
    return dataclasses.is_dataclass(annotation)


_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def _plain(adapter: TypeAdapter[Any], value: Any) -> Any:
    """Returns plain JSON for a value of the adapter's type, or for JSON of it.

    Through JSON text, so that NaN, for which JSON has nothing, becomes null here and not in the middle of a commit.
    """
    return json.loads(adapter.dump_json(_typed(adapter, value), by_alias=True))


def _typed(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        try:
            # Strict types take some things from JSON only: a time from text, say.
            return adapter.validate_json(json.dumps(value))
        except (TypeError, ValueError):
            raise error from None


def _path(parts: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
