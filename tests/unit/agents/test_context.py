"""What `run` is inside a run and outside."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from perdure_service.agents import context, run
from perdure_service.domain.authoring import RunContext


@pytest.fixture
def bound() -> Iterator[MagicMock]:
    double = MagicMock(spec=RunContext)
    double.approval = AsyncMock(return_value="decided")
    double.signal = AsyncMock(return_value="signalled")
    double.id, double.namespace = "run-1", "default"
    previous = context.bind(lambda: double)
    yield double
    context.bind(previous)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("id", lambda: run.id),
        ("namespace", lambda: run.namespace),
        ("progress()", lambda: run.progress("x")),
        ("output()", lambda: run.output()),
        ("log()", lambda: run.log("x")),
        ("usage()", lambda: run.usage(input_tokens=1, output_tokens=1)),
        ("idempotency_key()", lambda: run.idempotency_key()),
        ("approval()", lambda: run.approval("x")),
        ("signal()", lambda: run.signal("x")),
    ],
)
async def test_outside_a_run_everything_says_so(name: str, use: Callable[[], Any]) -> None:
    async def asked() -> None:
        result = use()
        if isinstance(result, Awaitable):
            await result

    with pytest.raises(RuntimeError) as caught:
        await asked()
    assert f"run.{name} is only available inside an agent's run" in str(caught.value)
    assert "agents.context.bind" in str(caught.value)


async def test_inside_a_run_everything_reaches_it(bound: MagicMock) -> None:
    assert (run.id, run.namespace) == ("run-1", "default")
    run.progress("half", 1, 2)
    bound.progress.assert_called_once_with("half", 1, 2)
    run.log("odd", "warning")
    bound.log.assert_called_once_with("odd", "warning")
    assert run.output("answer") is bound.output.return_value
    bound.output.assert_called_once_with("answer")
    assert run.idempotency_key() is bound.idempotency_key.return_value
    assert await run.signal("go", timeout=timedelta(seconds=1)) == "signalled"
    bound.signal.assert_awaited_once_with("go", timeout=timedelta(seconds=1))
    assert await run.approval("Well?", payload={"a": 1}, assignees=["ann"]) == "decided"
    bound.approval.assert_awaited_once_with(
        "Well?", payload={"a": 1}, timeout=None, on_timeout="REJECT", assignees=["ann"], answer_schema=None
    )


def test_bind_returns_what_was_bound_before(bound: MagicMock) -> None:
    previous = context.bind(lambda: None)
    assert previous() is bound
    with pytest.raises(RuntimeError):
        run.progress("x")
    context.bind(previous)
