"""What it means to declare an agent, without a database."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import inspect
import socket
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

import pytest
from dbos import DBOS, pydantic_args_validator
from jsonschema import Draft202012Validator
from perdure_service.agents import agent, catalogue, expose
from perdure_service.domain.agents import check_input, validator
from perdure_service.domain.budgets import Budget
from perdure_service.errors import InputSchemaViolation
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator
from referencing.exceptions import Unresolvable
from typing_extensions import TypedDict


class Colour(enum.Enum):
    RED = "red"


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question: str = Field(min_length=1)
    due: datetime.datetime | None = None
    limit: int = 3

    @field_validator("question")
    @classmethod
    def _not_why(cls, value: str) -> str:
        if value == "why":
            raise ValueError("asks too much")
        return value


class Report(BaseModel):
    answer: str
    at: datetime.datetime | None = None


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    due: datetime.datetime
    tags: tuple[str, ...] = ()


class Aliased(BaseModel):
    user_name: str = Field(alias="userName")


@dataclasses.dataclass
class Order:
    item: str
    count: int = 1


class Options(TypedDict):
    colour: str


T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]


@pytest.fixture(autouse=True)
def only_these_agents() -> Iterator[None]:
    with catalogue.isolated():
        yield


def the_agent(name: str = "it") -> catalogue.RegisteredAgent:
    found = catalogue.find(name)
    assert found is not None
    return found


def stored_body(name: str = "it") -> Any:
    """What DBOS runs with the stored arguments."""
    return the_agent(name).workflow.__orig_func  # type: ignore[attr-defined]


def test_a_single_model_is_the_input() -> None:
    @agent(name="it")
    async def ask(request: Request) -> Report:
        """Asks it.

        More.
        """
        raise NotImplementedError

    it = the_agent()
    assert it.spec.description == "Asks it."
    assert (it.spec.version, it.spec.workflow_name, it.workflow_name) == ("1", "it@1", "it@1")
    assert it.input_argument == "request"
    assert set(it.spec.input_schema["properties"]) == {"question", "due", "limit"}
    assert it.spec.input_schema["additionalProperties"] is False
    assert it.spec.output_schema is not None
    assert it.spec.output_schema["required"] == ["answer"]
    assert it.arguments({"question": "what"}) == {"request": {"question": "what"}}


@pytest.mark.parametrize(
    ("annotation", "value"), [(Order, {"item": "x"}), (Options, {"colour": "red"}), (Page[int], {"items": [1]})]
)
def test_so_is_a_single_dataclass_typed_dict_or_generic_model(annotation: Any, value: Any) -> None:
    async def ask(request: Any) -> None: ...

    ask.__annotations__["request"] = Annotated[annotation, "a note"]
    agent(name="it")(ask)
    check_input(the_agent().spec, value)
    assert the_agent().arguments(value) == {"request": value}


def test_otherwise_the_members_of_the_input_are_the_parameters() -> None:
    @agent(name="it", version="2.1", description="Said.")
    def ask(
        question: str, *, order: Order, limit: Annotated[int, Field(ge=1)] = 5, since: datetime.date | None = None
    ) -> list[Report]:
        raise NotImplementedError

    it = the_agent()
    schema = it.spec.input_schema
    Draft202012Validator.check_schema(dict(schema))
    assert it.spec.description == "Said."
    assert it.input_argument == ""
    assert schema["required"] == ["question", "order"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["limit"] == {"type": "integer", "minimum": 1, "default": 5}
    check_input(it.spec, {"question": "q", "order": {"item": "x"}})
    with pytest.raises(InputSchemaViolation):
        check_input(it.spec, {"question": "q", "order": {"count": 1}})
    given = {"question": "q", "order": {"item": "x"}, "since": "2026-01-02"}
    assert it.arguments(given) == given


@pytest.mark.parametrize("annotation", [int, Request | None, RootModel[list[int]], dict[str, int], Any])
def test_a_single_parameter_of_another_type_is_a_member(annotation: Any) -> None:
    async def ask(request: Any) -> None: ...

    ask.__annotations__["request"] = annotation
    agent(name="it")(ask)
    assert set(the_agent().spec.input_schema["properties"]) == {"request"}


def test_an_agent_without_parameters_takes_an_empty_object() -> None:
    @agent(name="it")
    async def ask() -> None: ...

    it = the_agent()
    assert it.arguments({}) == {}
    assert it.spec.output_schema == {"type": "null"}
    for wrong in ({"a": 1}, [], None, "x"):
        with pytest.raises(InputSchemaViolation):
            it.arguments(wrong)


def test_arguments_refuse_what_a_json_schema_lets_pass() -> None:
    @agent(name="it")
    async def ask(request: Request) -> Report: ...

    @agent(name="members")
    async def members(a: int, when: datetime.date, b: uuid.UUID | None = None) -> None: ...

    with pytest.raises(InputSchemaViolation) as caught:
        the_agent().arguments({"question": "why", "due": "yesterday"})
    assert [field for field, _ in caught.value.violations] == ["input.question", "input.due"]
    with pytest.raises(InputSchemaViolation) as caught:
        the_agent("members").arguments({"when": "soon", "b": "no", "c": 1})
    assert [field for field, _ in caught.value.violations] == ["input.a", "input.when", "input.b", "input.c"]


async def test_the_stored_json_becomes_typed_values_and_the_result_json_again() -> None:
    seen: list[Any] = []

    @agent(name="it")
    async def ask(request: Request, colour: Colour, at: tuple[int, int], key: uuid.UUID) -> Report:
        seen.append((request, colour, at, key))
        return Report(answer=request.question, at=request.due)

    key = uuid.uuid4()
    stored = {
        "request": {"question": "q", "due": "2026-01-02T03:04:05Z"},
        "colour": "red",
        "at": [1, 2],
        "key": str(key),
    }
    assert the_agent().arguments(stored) == stored
    result = await stored_body()(**stored)
    due = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    assert seen == [(Request(question="q", due=due), Colour.RED, (1, 2), key)]
    assert result == {"answer": "q", "at": "2026-01-02T03:04:05Z"}


async def test_strict_models_and_aliases_survive_the_way_through_json() -> None:
    @agent(name="it")
    async def ask(strict: Strict, aliased: Aliased) -> Aliased:
        assert strict.tags == ("a",)
        return aliased

    stored = {"strict": {"due": "2026-01-02T03:04:05Z", "tags": ["a"]}, "aliased": {"userName": "ann"}}
    assert the_agent().arguments(stored) == stored
    assert await stored_body()(**stored) == {"userName": "ann"}


def test_nan_in_a_result_is_null_and_a_result_of_another_type_is_an_error() -> None:
    @agent(name="it")
    def ask(what: str) -> dict[str, float]:
        return {"x": float("nan"), "y": 1.5} if what == "nan" else what  # type: ignore[return-value]

    @agent(name="untyped")
    def untyped() -> Any:
        return {"r": Report(answer="a"), "c": Colour.RED, "t": (1,)}

    assert stored_body()(what="nan") == {"x": None, "y": 1.5}
    with pytest.raises(ValueError, match="dict"):
        stored_body()(what="other")
    assert stored_body("untyped")() == {"r": {"answer": "a", "at": None}, "c": "red", "t": [1]}


def test_the_function_keeps_its_name_its_docstring_and_its_signature() -> None:
    async def ask(request: Request) -> Report:
        """Asks it."""
        raise NotImplementedError

    declared = agent(name="it")(ask)
    assert inspect.iscoroutinefunction(declared)
    assert inspect.unwrap(declared) is ask
    assert (declared.__qualname__, declared.__doc__) == (ask.__qualname__, ask.__doc__)
    assert list(inspect.signature(declared).parameters) == ["request"]
    assert declared.dbos_function_name == "it@1"  # type: ignore[attr-defined]
    assert not inspect.iscoroutinefunction(agent(name="other")(lambda_free))


def lambda_free() -> int:
    return 1


@pytest.mark.parametrize("name", ["", "Research", "a b", "1a", "a@1", "x" * 64, "ä"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="name"):
        agent(name=name)(lambda_free)


@pytest.mark.parametrize("version", ["", "v 1", "-1", "1@2", "x" * 33])
def test_so_is_a_version(version: str) -> None:
    with pytest.raises(TypeError, match="version"):
        agent(name="it", version=version)(lambda_free)


def _positional(a: int, /) -> None: ...
def _many(*a: int) -> None: ...
def _options(**a: int) -> None: ...
def _bare(a) -> None: ...  # type: ignore[no-untyped-def]
def _of_class(a: threading_lock) -> None: ...  # type: ignore[name-defined] # noqa: F821
def _of_function(a: Iterator[DBOS]) -> None: ...
def _returns(a: int) -> DBOS: ...
def _field(a: int = Field(3, ge=1)) -> None: ...
def _method(self: Any, a: int) -> None: ...
def _generator(a: int) -> Iterator[int]:
    yield a


async def _async_generator(a: int) -> AsyncIterator[int]:
    yield a  # fmt: skip


@pytest.mark.parametrize(
    ("function", "advice"),
    [
        (_positional, "remove the `/`"),
        (_many, r"takes \*a"),
        (_options, r"takes \*\*a"),
        (_bare, "annotate it"),
        (_of_class, "importable"),
        (_of_function, "JSON cannot express"),
        (_returns, "the result of _returns"),
        (_field, "Annotated"),
        (_method, "method"),
        (_generator, "generator"),
        (_async_generator, "generator"),
    ],
)
def test_a_signature_that_cannot_be_an_agents_is_refused_with_advice(function: Any, advice: str) -> None:
    with pytest.raises(TypeError, match=advice):
        agent(name="it")(function)
    assert catalogue.registered() == []


class _Callable:
    def __call__(self, a: int) -> int:
        return a


def test_what_is_no_function_or_dbos_s_already_is_refused() -> None:
    for function, advice in [(_Callable(), "not a function"), (undeclared_workflow, "expose"), (plain_step, "expose")]:
        with pytest.raises(TypeError, match=advice):
            agent(name="it")(function)  # type: ignore[arg-type]
    assert catalogue.registered() == []


def test_one_function_may_be_two_versions() -> None:
    agent(name="it", version="1")(lambda_free)
    agent(name="it", version="2")(lambda_free)
    workflows = [it.workflow.dbos_function_name for it in catalogue.registered()]  # type: ignore[attr-defined]
    assert workflows == ["it@1", "it@2"]


# ---- expose ----------------------------------------------------------------------------------------------------------


@DBOS.workflow()
def undeclared_workflow(question: str, limit: int = 3, due: datetime.datetime | None = None) -> dict[str, Any]:
    """Does it."""
    raise NotImplementedError


@DBOS.workflow(name="Named Elsewhere")
async def named_workflow(question: str, untyped=None):  # type: ignore[no-untyped-def]
    raise NotImplementedError


@DBOS.workflow()
def dated_workflow(due: datetime.datetime, options: Options, when: Literal["a", "b"] | None = None) -> tuple[str, int]:
    raise NotImplementedError


@DBOS.workflow(validate_args=pydantic_args_validator)
def validated_workflow(request: Request) -> str:
    raise NotImplementedError


@DBOS.workflow()
def model_workflow(request: Request) -> str:
    raise NotImplementedError


@DBOS.workflow()
def model_list_workflow(requests: Sequence[Request]) -> str:
    raise NotImplementedError


@DBOS.workflow()
def model_result_workflow(question: str) -> Report:
    raise NotImplementedError


@DBOS.step()
def plain_step(question: str) -> str:
    raise NotImplementedError


def test_an_exposed_workflow_is_returned_unchanged_under_its_own_name_in_dbos() -> None:
    assert expose(dated_workflow, name="it", version="3") is dated_workflow
    it = the_agent()
    assert it.workflow is dated_workflow
    assert it.workflow_name == "dated_workflow"
    assert it.spec.workflow_name == "it@3"
    assert catalogue.by_workflow("dated_workflow") == it
    assert it.arguments({"due": "2026-01-02T03:04:05Z", "options": {"colour": "red"}})
    expose(named_workflow, name="named")
    assert the_agent("named").workflow_name == "Named Elsewhere"
    assert the_agent("named").spec.output_schema is None


def test_an_exposed_workflow_may_convert_its_arguments_itself() -> None:
    expose(validated_workflow, name="it")
    assert the_agent().input_argument == "request"


def test_the_name_in_dbos_is_the_default_name_and_must_do_as_one() -> None:
    expose(dated_workflow)
    assert the_agent("dated_workflow").spec.version == "1"
    with pytest.raises(TypeError, match="cannot be an agent's name"):
        expose(named_workflow)


@pytest.mark.parametrize(
    ("workflow", "advice"),
    [
        (undeclared_workflow, "due: datetime"),
        (model_workflow, "validate_args=pydantic_args_validator"),
        (model_list_workflow, "validate_args=pydantic_args_validator"),
        (model_result_workflow, "model_dump"),
        (plain_step, "is a DBOS step"),
        (lambda_free, "not a DBOS workflow"),
    ],
)
def test_what_plain_json_would_break_is_not_exposed(workflow: Any, advice: str) -> None:
    with pytest.raises(TypeError, match=advice):
        expose(workflow, name="it")
    assert catalogue.registered() == []


def test_a_budget_is_part_of_the_declaration() -> None:
    @agent(name="frugal", max_steps=3, max_tokens=100)
    async def frugal() -> None: ...

    found = catalogue.find("frugal")
    assert found is not None
    assert found.spec.budget == Budget(3, 100) == catalogue.budget_of("frugal", "1")
    assert catalogue.budget_of("frugal", "2") == Budget()


@pytest.mark.parametrize(("limits", "name"), [({"max_steps": -1}, "max_steps"), ({"max_tokens": 1.5}, "max_tokens")])
def test_a_budget_that_is_none_is_refused(limits: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is .* a whole number"):
        agent(name="frugal", **limits)(_nothing)


async def _nothing() -> None: ...


def test_a_schema_that_refers_to_the_web_is_not_followed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as web:
        web.setblocking(False)
        schema = {"$ref": f"http://127.0.0.1:{web.getsockname()[1]}/schema"}
        with pytest.raises(Unresolvable):
            list(validator(schema).iter_errors(1))
        with pytest.raises(BlockingIOError):
            web.accept()
