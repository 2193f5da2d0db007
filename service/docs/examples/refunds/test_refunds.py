"""How the agent is tested: on the real engine and a real database, with a scripted model, and with crashes."""

from collections.abc import Iterator
from pathlib import Path

import bank
import pytest
from perdure_service.testing import BlockingHarness, Breaks, Fails, RunFailed, ScriptedModel

SMALL = {"customer": "Ann", "account": "DE1", "amount": 20.0, "reason": "it arrived late"}
LARGE = {**SMALL, "amount": 80.0}
QUESTION = "Refund 80.00 to Ann?"


@pytest.fixture(autouse=True)
def own_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_FILE", str(tmp_path / "bank.sqlite"))


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel(lambda _call: "Dear Ann, here is your money.")


@pytest.fixture(scope="module")
def harness(model: ScriptedModel) -> Iterator[BlockingHarness]:
    # One engine and one database for the whole module: a test is then a few hundredths of a second.
    with BlockingHarness(["refunds", "payroll"], model=model) as harness:
        yield harness


def test_a_small_refund_is_paid_without_asking(harness: BlockingHarness) -> None:
    run = harness.start("refund", SMALL)
    harness.signal(run, "confirmed", True)
    result = run.result()
    assert result["confirmed"]
    assert run.output("letter") == result["letter"] == "Dear Ann, here is your money."
    assert [step.step_name for step in run.steps()] == ["refunds.write_letter", "refunds.pay", "DBOS.recv"]
    assert bank.payments() == 1


def test_a_large_refund_waits_for_a_person(harness: BlockingHarness) -> None:
    run = harness.start("refund", LARGE)
    harness.reject(run, "no receipt", title=QUESTION)
    assert run.result()["refused"] == "no receipt"
    assert bank.payments() == 0


def test_a_busy_bank_is_asked_again(harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_BUSY", "once")
    run = harness.start("refund", SMALL)
    harness.signal(run, "confirmed", True)
    run.result()
    assert len(run.events("step_retrying")) == 1
    assert (bank.requests(), bank.payments()) == (2, 1)


def test_a_crash_while_paying_pays_once(harness: BlockingHarness) -> None:
    # The bank has paid, and the engine dies before it has recorded that: the step runs again.
    harness.crash_after_step("refund", 2, before=True)
    run = harness.start("refund", SMALL)
    harness.signal(run, "confirmed", True)
    run.result()
    assert (bank.requests(), bank.payments()) == (2, 1)


def test_a_crash_while_a_person_thinks_asks_once(harness: BlockingHarness) -> None:
    run = harness.start("refund", LARGE)
    run.until("AWAITING_INPUT")
    harness.crash()
    harness.approve(run, title=QUESTION)
    harness.signal(run, "confirmed", True)
    assert run.result()["reference"]
    assert len(run.events("approval_requested")) == 1


def test_the_agent_survives_a_crash_after_each_of_its_steps(harness: BlockingHarness) -> None:
    steps = harness.check_replay("refund", SMALL, signals=[("confirmed", True)])
    assert [name for _, name in steps][:2] == ["refunds.write_letter", "refunds.pay"]


def test_a_model_that_fails_is_asked_again_and_then_given_up(harness: BlockingHarness, model: ScriptedModel) -> None:
    with model.scripted([Fails(503), Breaks("Dear An"), "Dear Ann, at last."]):
        run = harness.start("refund", SMALL)
        harness.signal(run, "confirmed", True)
        assert run.result()["letter"] == run.output("letter") == "Dear Ann, at last."
    with model.scripted(lambda _call: Fails(500)), pytest.raises(RunFailed) as failed:
        harness.run("refund", SMALL)
    assert failed.value.failure is not None
    assert failed.value.failure.retryable
    assert failed.value.failure.step_name == "refunds.write_letter"
    assert failed.value.failure.cause.startswith("InternalServerError")


def test_a_crash_between_payment_and_checkpoint_pays_everyone_once(harness: BlockingHarness) -> None:
    harness.crash_after_step("payroll", 2, before=True)
    run = harness.start("payroll", {"people": 3, "seconds": 0})
    assert run.result() == {"people": 3, "total": 3000.0}
    assert (bank.requests(), bank.payments()) == (4, 3)
