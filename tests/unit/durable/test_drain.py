"""Handing over while the process goes on: what could not be given back at once is given back later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from perdure_service.domain.runs import RunKey
from perdure_service.durable import drain
from perdure_service.durable.drain import Drain
from perdure_service.durable.executions import Execution, Executions


def an_execution() -> Execution:
    return Execution(RunKey("n", "r", "n.r.r"), "token", "agent", "1", number=1, trace_id="")


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What giving back comes to, in order: the ids that somebody still holds, or an error."""
    answers: list[Any] = []

    def answer(_engine: Any, _name: str, _fn: Callable[..., Any], **_: Any) -> Any:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return [], found

    monkeypatch.setattr(drain, "retrying", answer)
    return answers


@pytest.mark.parametrize("first", [{"n.r.r"}, RuntimeError("the database is away")])
def test_what_is_held_or_could_not_be_given_back_is_tried_again(database: list[Any], first: Any) -> None:
    executions = Executions()
    execution = executions.add(an_execution())
    handing_over = Drain(None, executions, None, lambda _ids: None)  # type: ignore[arg-type]
    handing_over.begin()
    database += [first, set()]
    assert handing_over.step()
    assert execution.dead
    assert not len(executions)
    assert not handing_over.step(), "it is given back, though nothing is executed any more"
    assert database == []
    assert not handing_over.step()


def test_what_comes_after_the_end_is_executed_here_and_what_was_to_go_still_goes(database: list[Any]) -> None:
    executions = Executions()
    handing_over = Drain(None, executions, None, lambda _ids: None)  # type: ignore[arg-type]
    handing_over.begin()
    busy = executions.add(an_execution())
    busy.work()
    assert handing_over.step(), "it waits for the body"
    handing_over.end()
    stays = executions.add(Execution(RunKey("n", "s", "n.s.r"), "other", "agent", "1", number=1, trace_id=""))
    busy.rest()
    database.append(set())
    assert not handing_over.step()
    assert busy.dead
    assert stays.may_go_on
