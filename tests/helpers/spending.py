"""Agents for tests that spend: steps that say what a model call used, under budgets."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
from dbos import DBOS
from perdure_service.agents import BudgetExceeded, agent, run
from perdure_service.agents.resources import resources
from perdure_service.agents.tool_loop import Tool, run_tools
from pydantic import BaseModel

from tests.helpers.agents import FlakyError, effect

INPUT_TOKENS, OUTPUT_TOKENS = 10, 1
"""What each call of `spend` uses."""


@DBOS.step(retries_allowed=True, max_attempts=5, interval_seconds=0.01, backoff_rate=1.0)
async def spend(number: int, failures: int, hold: bool) -> int:
    status = DBOS.step_status
    attempt = (status.current_attempt if status and status.current_attempt is not None else 0) + 1
    await asyncio.to_thread(effect, f"spend {number}")
    run.usage(input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS, model="small")
    if hold and await asyncio.to_thread(times, f"spend {number}") == 1:
        await asyncio.Event().wait()
    if attempt <= failures:
        raise FlakyError(f"attempt {attempt}")
    return number


def times(what: str) -> int:
    """Returns how often the run has had an effect, in all its executions."""
    with resources().engine.connect() as conn:
        query = sa.text("SELECT count(*) FROM public.test_effect WHERE run_id = :run_id AND what = :what")
        return int(conn.execute(query, {"run_id": run.id, "what": what}).scalar_one())


async def spend_all(steps: int, failures: int, hold_at: int) -> int:
    for number in range(steps):
        await spend(number, failures, number == hold_at)
    return steps


@agent(name="spender")
async def spender(steps: int = 1, failures: int = 0, hold_at: int = -1) -> int:
    """Spends without a limit."""
    return await spend_all(steps, failures, hold_at)


@agent(name="three-steps", max_steps=3)
async def three_steps(steps: int = 1, failures: int = 0, hold_at: int = -1) -> int:
    """May begin three steps."""
    await DBOS.sleep_async(0.01)
    return await spend_all(steps, failures, hold_at)


@agent(name="thirty-tokens", max_tokens=30)
async def thirty_tokens(steps: int = 1, failures: int = 0, hold_at: int = -1) -> int:
    """May use thirty tokens."""
    return await spend_all(steps, failures, hold_at)


@agent(name="deaf", max_steps=1)
async def deaf() -> str:
    """Does not want to hear of its budget."""
    await spend(0, 0, False)
    for number in (1, 2):
        try:
            await spend(number, 0, False)
        except BudgetExceeded:
            run.log(f"refused {number}")
    await spend(3, 0, False)
    return "never"


class Total(BaseModel):
    """What was spent."""

    calls: int


@agent(name="delegator")
async def delegator(task: str) -> Total:
    """Has a model spend by a child run."""
    total, _ = await run_tools("Spend.", task, tools=[Tool(spender)], output=Total)
    return total


@agent(name="usage-outside")
async def usage_outside() -> None:
    """Says what was used where no replay could tell it from new use."""
    run.usage(input_tokens=1, output_tokens=1)
