"""An agent that does everything once, and a ledger that tells how often its side effect was asked for and done.

A server that loads this module may also be made to die after the body of a step and before its checkpoint:
`PERDURE_CHAOS_DIE_AFTER=name` (once for each run, as the effect that it leaves is seen by the next server).
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import sqlalchemy as sa
from dbos import DBOS
from perdure_service.agents import agent, run
from perdure_service.agents.resources import resources

from tests.helpers import chaos_report
from tests.helpers.agents import FlakyError, effect
from tests.helpers.server import KILLED, sql

DIE_AFTER = os.environ.get("PERDURE_CHAOS_DIE_AFTER", "")
BODIES = ("gather", "shaky", "child", "pay", "finish")
"""The bodies of its steps, its child's included, in order."""
WORDS = ("Gathered. ", "Shaken 1. ", "Shaken 2. ", "Finished.")
"""What its steps write; the second is void."""
RESULT: dict[str, Any] = {
    "gathered": 3,
    "shaken": "after 2",
    "child": "child: 4",
    "approved": True,
    "signal": {"amount": 5},
    "finished": 8,
}
"""What it returns, without the key of its payment."""


def create_ledger(database_url: str) -> None:
    """Makes the other system's table: one row for each key, however often it was asked for."""
    with sql(database_url) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS public.test_ledger "
            "(key TEXT PRIMARY KEY, run_id TEXT, attempts INT, amount INT)"
        )


def ledger_of(database_url: str, run_id: str) -> list[tuple[str, int, int]]:
    """Returns the rows of a run: key, attempts, and what was booked."""
    with sql(database_url) as connection:
        rows = connection.execute(
            "SELECT key, attempts, amount FROM public.test_ledger WHERE run_id = %s", (run_id,)
        ).fetchall()
    return [(key, attempts, amount) for key, attempts, amount in rows]


def _book(key: str, amount: int) -> None:
    """Books an amount once a key, as a bank does that knows idempotency keys."""
    statement = sa.text(
        "INSERT INTO public.test_ledger (key, run_id, attempts, amount) VALUES (:key, :run_id, 1, :amount) "
        "ON CONFLICT (key) DO UPDATE SET attempts = test_ledger.attempts + 1"
    )
    with resources().engine.begin() as conn:
        conn.execute(statement, {"key": key, "run_id": run.id, "amount": amount})


def _body_is_over(name: str) -> None:
    """Dies here when it is to, unless this body has run before: its checkpoint is not written yet."""
    if name != DIE_AFTER:
        return
    statement = sa.text("SELECT count(*) FROM public.test_effect WHERE run_id = :run_id AND what = :what")
    with resources().engine.connect() as conn:
        ran = conn.execute(statement, {"run_id": run.id, "what": name}).scalar_one()
    if ran == 1:
        print(f"chaos: dies after the body of {name}", file=sys.stderr, flush=True)
        chaos_report.fault("step bodies whose process died before their checkpoint")
        os._exit(KILLED)


@DBOS.step(name="everything.gather")
async def gather(number: int) -> int:
    await asyncio.to_thread(effect, "gather")
    run.output("text").write(WORDS[0])
    run.usage(input_tokens=7, output_tokens=2, model="small")
    await asyncio.to_thread(_body_is_over, "gather")
    return number


@DBOS.step(name="everything.shaky", retries_allowed=True, max_attempts=3, interval_seconds=0.01, backoff_rate=1.0)
async def shaky() -> str:
    """Fails the first time."""
    status = DBOS.step_status
    attempt = (status.current_attempt if status and status.current_attempt is not None else 0) + 1
    run.output("text").write(WORDS[attempt])
    if attempt == 1:
        raise FlakyError("the first attempt")
    await asyncio.to_thread(effect, "shaky")
    await asyncio.to_thread(_body_is_over, "shaky")
    return f"after {attempt}"


@DBOS.step(name="everything.child-step")
async def child_step(number: int) -> int:
    await asyncio.to_thread(effect, "child")
    await asyncio.to_thread(_body_is_over, "child")
    return number + 1


@DBOS.workflow()
async def everything_child(number: int) -> str:
    return f"child: {await child_step(number)}"


@DBOS.step(name="everything.pay")
def pay(amount: int) -> str:
    key = run.idempotency_key()
    _book(key, amount)
    effect("pay")
    _body_is_over("pay")
    return key


@DBOS.step(name="everything.finish")
async def finish(number: int) -> int:
    await asyncio.to_thread(effect, "finish")
    run.output("text").write(WORDS[3])
    await asyncio.to_thread(_body_is_over, "finish")
    return number


@agent(name="everything-at-once")
async def everything() -> dict[str, Any]:
    """Works, tries again, publishes, has a child, asks, pays, sleeps, is told something, finishes."""
    told: dict[str, Any] = {}
    run.progress("gathering", 0, 2)
    told["gathered"] = await gather(3)
    told["shaken"] = await shaky()
    await DBOS.set_event_async("stage", "gathered")
    child: Any = await DBOS.start_workflow_async(everything_child, told["gathered"])
    told["child"] = await child.get_result()
    told["approved"] = (await run.approval("Pay 5?", payload={"amount": 5})).approved
    told["paid"] = await asyncio.to_thread(pay, 5)
    await DBOS.sleep_async(0.1)
    told["signal"] = await run.signal("more")
    told["finished"] = await finish(told["gathered"] + told["signal"]["amount"])
    return told
