"""An agent that refunds a customer: it writes a letter with a model, asks a person, pays once, and waits for a word."""

import os
from datetime import timedelta

import bank
from dbos import DBOS
from openai import AsyncOpenAI
from perdure_service.agents import SignalTimeout, agent, run
from pydantic import BaseModel

ASK_ABOVE = 50.0
"""Refunds above this are decided by a person."""


class RefundRequest(BaseModel):
    """What the run is started with."""

    customer: str
    account: str
    amount: float
    reason: str


class Refund(BaseModel):
    """What the run returns."""

    letter: str
    reference: str | None = None
    refused: str = ""
    confirmed: bool = False


@DBOS.step(name="refunds.write_letter", retries_allowed=True, max_attempts=4, interval_seconds=0.2)
async def write_letter(customer: str, amount: float, reason: str) -> str:
    """Asks the model, and lets watchers see the letter as it is written. A failed attempt's text is void."""
    prompt = f"Write two friendly sentences to {customer}: we refund {amount:.2f}, because: {reason}"
    stream, pieces, finished = run.output("letter"), [], False
    async with AsyncOpenAI(
        base_url=os.environ["PERDURE_MODEL__BASE_URL"],
        api_key=os.environ.get("PERDURE_MODEL__API_KEY", "none"),
        max_retries=0,  # the step's retries are enough, and watchers see them
    ) as client:
        chunks = await client.chat.completions.create(
            model=os.environ.get("PERDURE_MODEL__NAME", "default"),
            messages=[{"role": "user", "content": prompt}],
            stream=True,
        )
        async for chunk in chunks:
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                stream.write(pieces[-1])
                finished = finished or choice.finish_reason is not None
    if not finished:
        raise ConnectionError("the answer broke off")  # half a letter is not a letter: try again
    return "".join(pieces)


@DBOS.step(
    name="refunds.pay",
    retries_allowed=True,
    max_attempts=6,
    interval_seconds=0.2,
    should_retry=lambda error: isinstance(error, bank.Busy),
)
def pay(account: str, amount: float) -> str:
    """Pays. After a crash in here it is called again, so it gives the bank the same key: the bank pays once."""
    return bank.pay(run.idempotency_key(), account, amount)


@agent(name="refund", version="1")
async def refund(request: RefundRequest) -> Refund:
    """Refunds a customer, once."""
    run.progress("writing the letter", completed=0, total=3)
    letter = await write_letter(request.customer, request.amount, request.reason)
    if request.amount > ASK_ABOVE:
        run.progress("waiting for a decision", completed=1, total=3)
        decision = await run.approval(
            f"Refund {request.amount:.2f} to {request.customer}?",
            payload={"letter": letter, "reason": request.reason},
            timeout=timedelta(days=3),
        )
        if not decision.approved:
            return Refund(letter=letter, refused=decision.comment or decision.state)
    run.progress("paying", completed=2, total=3)
    reference = pay(request.account, request.amount)
    try:
        await run.signal("confirmed", timeout=timedelta(days=14))
    except SignalTimeout:
        return Refund(letter=letter, reference=reference)
    return Refund(letter=letter, reference=reference, confirmed=True)
