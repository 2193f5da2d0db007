"""Agents for tests of stopping: a step that hangs for as long as its server lives, the first time it runs."""

from __future__ import annotations

import asyncio
import time

import sqlalchemy as sa
from dbos import DBOS
from perdure_service.agents import agent, run
from perdure_service.agents.resources import resources

from tests.helpers.agents import counter, effect

HANGS_S = 600.0

BETWEEN_S = 3.0
"""Longer than it takes to hand a run over, and shorter than the server goes on to live."""

__all__ = ["between_steps", "counter", "hanging", "hanging_sync", "waiting_sync"]


def has_hung() -> bool:
    """Leaves an effect; returns whether the step had run before, anywhere."""
    query = sa.text("SELECT count(*) FROM public.test_effect WHERE run_id = :run_id AND what = 'hangs'")
    with resources().engine.begin() as conn:
        before: int = conn.execute(query, {"run_id": run.id}).scalar_one()
    effect("hangs")
    return before > 0


@DBOS.step()
async def hang_step() -> str:
    if not await asyncio.to_thread(has_hung):
        await asyncio.sleep(HANGS_S)
    return "went on"


@DBOS.step()
def hang_sync_step() -> str:
    if not has_hung():
        time.sleep(HANGS_S)
    return "went on"


@agent(name="hanging")
async def hanging() -> str:
    """Has a step that hangs."""
    return await hang_step()


@agent(name="hanging-sync")
def hanging_sync() -> str:
    """Has a step that hangs and holds its thread."""
    return hang_sync_step()


@DBOS.step()
def quick_step() -> str:
    effect("quick")
    return "quick"


@agent(name="waiting-sync")
def waiting_sync() -> list[str]:
    """Holds its thread while it waits for a signal."""
    return [quick_step(), str(DBOS.recv("more", timeout_seconds=HANGS_S))]


@DBOS.step()
def plain_step(what: str) -> str:
    """Leaves an effect without the product's help, which a dead execution would not get."""
    run_id = str(DBOS.workflow_id).split(".")[1]
    with resources().engine.begin() as conn:
        conn.execute(
            sa.text("INSERT INTO public.test_effect (run_id, what) VALUES (:id, :what)"), {"id": run_id, "what": what}
        )
    return what


@agent(name="between-steps")
def between_steps() -> str:
    """Works in its own code between two steps."""
    plain_step("before")
    time.sleep(BETWEEN_S)
    return plain_step("after")
