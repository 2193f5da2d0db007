"""The end of a run is recorded as its code ended, also when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from perdure_service.durable import hops, plain_runs
from perdure_service.durable.promises import Promise

from tests.helpers.waiting import eventually_async

CONTEXT: Any = SimpleNamespace(used_datasources=[])


async def _fails() -> None:
    raise ValueError("as the code says")


async def _returns() -> str:
    return "output"


@pytest.mark.parametrize(
    ("call", "told"), [(_fails, "ValueError: as the code says"), (_returns, "output")], ids=["failed", "returned"]
)
async def test_an_end_that_was_not_written_is_decided_although_its_task_was_cancelled(
    call: Callable[[], Any], told: str
) -> None:
    written: Promise[bool] = Promise()
    handed_over = threading.Event()
    decided: list[str] = []

    def persist(function: Callable[[], Any]) -> Any:
        try:
            outcome = function()
        except ValueError as error:
            outcome = f"ValueError: {error}"
        except Exception as error:
            outcome = f"another error: {error!r}"
        left = hops.deferral()
        if left is not None:
            left.wait_for(written)
            handed_over.set()
        else:
            decided.append(outcome)
        return outcome

    task = asyncio.create_task(plain_runs._ended(None, CONTEXT, persist, call))
    await eventually_async(handed_over.is_set)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    written.set_result(False)
    await eventually_async(lambda: decided)
    assert decided == [told]


@pytest.mark.parametrize("joins", [True, False])
async def test_an_end_waits_for_the_step_that_its_code_is_ahead_of_unless_it_goes_with_it(joins: bool) -> None:
    told: list[str] = []

    async def settled() -> None:
        told.append("settled")

    execution: Any = SimpleNamespace(ahead=object(), settled=settled)
    may_join = SimpleNamespace(may_join=lambda one: joins and one is execution)
    dbos = SimpleNamespace(_sys_db=SimpleNamespace(checkpoints=may_join))
    for call, outcome in ((_returns, "output"), (_fails, "ValueError: as the code says")):
        told.clear()

        def persist(function: Callable[[], Any]) -> None:
            try:
                told.append(function())
            except ValueError as error:
                told.append(f"ValueError: {error}")

        await plain_runs._ended(dbos, CONTEXT, persist, call, execution)
        assert told == ([outcome] if joins else ["settled", outcome])


async def test_what_recording_raises_is_recorded_as_the_failure() -> None:
    seen: list[str] = []

    def persist(function: Callable[[], Any]) -> Any:
        try:
            function()
        except TypeError as error:
            seen.append(f"failed with {error}")
            raise
        seen.append("returned")
        raise TypeError("it cannot be stored")

    with pytest.raises(TypeError, match="cannot be stored"):
        await plain_runs._ended(None, CONTEXT, persist, _returns)
    assert seen == ["returned", "failed with it cannot be stored"]
