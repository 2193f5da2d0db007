"""An agent that does what its input plans, and keeps a ledger as a bank does that knows idempotency keys."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Literal

import sqlalchemy as sa
from dbos import DBOS
from perdure_service.agents import agent, run
from perdure_service.agents.resources import resources
from perdure_service.domain.events import Event, EventKind

from tests.helpers import chaos_report
from tests.helpers.server import sql

Task = Literal["enter", "hear", "ask", "sleep", "child"]
"""An entry in the ledger, a signal `more`, an approval, a sleep, a child run that makes an entry and sleeps."""


def create_ledger(database_url: str) -> None:
    """Makes the table: one row for each key, and how often that was presented."""
    with sql(database_url) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS public.test_ledger "
            "(key TEXT PRIMARY KEY, workflow_id TEXT, what TEXT, times BIGINT)"
        )


def _write(what: str) -> None:
    statement = sa.text(
        "INSERT INTO public.test_ledger (key, workflow_id, what, times) VALUES (:key, :workflow_id, :what, 1) "
        "ON CONFLICT (key) DO UPDATE SET times = test_ledger.times + 1"
    )
    with resources().engine.begin() as conn:
        parameters = {"key": run.idempotency_key(), "workflow_id": DBOS.workflow_id, "what": what}
        conn.execute(statement, parameters)


@DBOS.step(name="ledger.enter")
async def enter(what: str, delay_s: float) -> str:
    await asyncio.to_thread(_write, what)
    run.output("text").write(f"{what}\n")
    await asyncio.sleep(delay_s)
    return what


@DBOS.workflow(name="ledger.child")
async def child(number: int, delay_s: float, sleep_s: float) -> str:
    await enter(f"child {number}", delay_s)
    await DBOS.sleep_async(sleep_s)
    return f"child {number}"


@agent(name="planned")
async def planned(plan: list[Task], delay_s: float = 0.0, sleep_s: float = 0.5) -> list[Any]:
    """Does one task after another; returns what came of each."""
    told: list[Any] = []
    for number, task in enumerate(plan):
        match task:
            case "enter":
                told.append(await enter(f"entry {number}", delay_s))
            case "hear":
                told.append(await run.signal("more"))
            case "ask":
                told.append((await run.approval(f"Is {number} right?")).approved)
            case "sleep":
                await DBOS.sleep_async(sleep_s)
                told.append("slept")
            case "child":
                handle: Any = await DBOS.start_workflow_async(child, number, delay_s, sleep_s)
                told.append(await handle.get_result())
    return told


def assert_ledger(database_url: str, workflow_id: str, log: list[Event], expected: list[str]) -> None:
    """Fails unless a run has made each entry under one key, and repeated at most what was in progress at a death."""
    with sql(database_url) as connection:
        rows = connection.execute(
            "SELECT what, times FROM public.test_ledger WHERE workflow_id = %s", (workflow_id,)
        ).fetchall()
    made = Counter(what for what, _ in rows)
    repeated = sum(times - 1 for _, times in rows)
    deaths = [event.kind for event in log].count(EventKind.RECOVERED)
    chaos_report.judged(
        workflow_id,
        effects=len(rows),
        repeated=repeated,
        lost=(Counter(expected) - made).total(),
        doubled=(made - Counter(expected)).total() + max(0, repeated - deaths),
    )
    assert made == Counter(expected), "an entry was lost, or made under two keys"
    assert repeated <= deaths, f"{repeated} bodies repeated by {deaths} deaths: {rows}"
