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

__all__ = ["counter", "hanging", "hanging_sync", "waiting_sync"]


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
