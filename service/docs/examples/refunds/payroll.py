"""An agent that pays many people, a step each. `make demo-crash` kills its server in the middle of one."""

import asyncio

import bank
from dbos import DBOS
from perdure_service.agents import agent, run
from pydantic import BaseModel, Field

SALARY = 1000.0


class Payroll(BaseModel):
    """What the run is started with."""

    people: int = Field(8, ge=1, le=200)
    seconds: float = Field(1.0, ge=0, le=60, description="How long the bank takes to confirm a payment.")


class Paid(BaseModel):
    """What the run returns."""

    people: int
    total: float


@DBOS.step(name="payroll.pay")
async def pay(account: str, amount: float, seconds: float) -> float:
    """Pays, then waits for the bank's word. After a crash in between it runs again, and the same key pays nothing."""
    await asyncio.to_thread(bank.pay, run.idempotency_key(), account, amount)
    await asyncio.sleep(seconds)
    return amount


@agent(name="payroll", version="1")
async def payroll(request: Payroll) -> Paid:
    """Pays everyone, once."""
    total = 0.0
    for number in range(1, request.people + 1):
        run.progress(f"paying person {number}", completed=number - 1, total=request.people)
        total += await pay(f"DE{number}", SALARY, request.seconds)
    return Paid(people=request.people, total=total)
