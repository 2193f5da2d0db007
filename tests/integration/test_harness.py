"""The harness that authors test agents with: it runs them on the server's own engine, and its crashes are crashes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from perdure_service.errors import AgentNotFound, InputSchemaViolation
from perdure_service.testing import (
    AgentHarness,
    BlockingHarness,
    CrashNeverHappened,
    ReplayDiffers,
    RunFailed,
    approval,
)

from tests.helpers.databases import DatabaseServer
from tests.helpers.harness_agents import DONE
from tests.helpers.waiting import eventually, scaled


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    with BlockingHarness(
        ["tests.helpers.harness_agents"],
        database_url=database_server.url,
        decide={"Go on?": approval("by the script")},
        timeout_s=scaled(15),
    ) as harness:
        yield harness


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    DONE.clear()


def test_a_run_is_run_to_its_end_and_looked_at(harness: BlockingHarness) -> None:
    run = harness.start("adder", {"steps": 2, "fails": 1}, run_id="looked-at")
    assert run.result() == 2
    assert [(step.step_name, step.attempts) for step in run.steps()] == [("harness.add", 2), ("harness.add", 2)]
    assert run.events()[0].sequence == 1
    assert [event.data["to"] for event in run.events("state_changed")] == ["RUNNING", "SUCCEEDED"]
    assert run.output("text") == "0 1 ", "what a failed attempt wrote is void"
    assert DONE == ["add 0", "add 0", "add 1", "add 1", "left"]


def test_everything_a_run_waits_for_can_come_from_the_test(harness: BlockingHarness) -> None:
    run = harness.start("everything")
    harness.signal(run, "word", "hello")
    assert run.result() == [1, True, "by the script", "hello", 1]


def test_a_run_that_does_not_end_well_says_why(harness: BlockingHarness) -> None:
    with pytest.raises(RunFailed, match="FAILED: ValueError: no way") as info:
        harness.run("raiser", {"text": "no way"})
    assert info.value.failure is not None
    assert info.value.failure.type == "ValueError"
    run = harness.start("everything")
    run.until("AWAITING_INPUT")
    harness.cancel(run)
    with pytest.raises(RunFailed, match="CANCELLED"):
        run.result()
    with pytest.raises(RunFailed, match="CANCELLED"):
        harness.approve(run)


def test_a_run_that_waits_too_long_says_what_for(harness: BlockingHarness) -> None:
    run = harness.start("everything")

    def told() -> str:
        with pytest.raises(TimeoutError) as info:
            run.result(timeout_s=scaled(0.5))
        return str(info.value)

    eventually(lambda: "AWAITING_INPUT (waits for signal word) after" in told(), what="it comes to the signal")
    harness.cancel(run)


@pytest.mark.parametrize("how", ["start", "enqueue"])
def test_a_model_that_dbos_cannot_store_is_refused_with_what_to_do(harness: BlockingHarness, how: str) -> None:
    hint = r"type Limits is not portable JSON serializable\. .*call the agent itself.*model_dump\(mode='json'\)"
    with pytest.raises(RunFailed, match=hint):
        harness.run("starter", {"how": how})


@pytest.mark.parametrize("how", ["call", "json"])
def test_what_the_hint_says_works(harness: BlockingHarness, how: str) -> None:
    assert harness.start("starter", {"how": how}).result() == 1


def test_what_a_server_refuses_is_refused(harness: BlockingHarness) -> None:
    with pytest.raises(AgentNotFound):
        harness.start("nobody")
    with pytest.raises(InputSchemaViolation):
        harness.start("adder", {"steps": "many"})


@pytest.mark.parametrize("agent", ["adder", "blocking-adder"])
def test_after_a_crash_nothing_of_the_old_execution_runs_and_no_finished_step_again(
    harness: BlockingHarness, agent: str
) -> None:
    harness.crash_after_step(agent, 2)
    run = harness.start(agent)
    assert run.result() == 3
    assert DONE == ["add 0", "add 1", "add 2", "left"], "the code of the old execution went on"
    recovered = run.events("recovered")
    assert len(recovered) == 1
    assert run.get().execution == 2


@pytest.mark.parametrize("agent", ["adder", "blocking-adder"])
def test_a_crash_before_the_commit_runs_the_step_again(harness: BlockingHarness, agent: str) -> None:
    harness.crash_after_step(agent, 2, before=True)
    run = harness.start(agent)
    assert run.result() == 3
    assert DONE == ["add 0", "add 1", "add 1", "add 2", "left"]


def test_a_crash_takes_everything_with_it_and_a_wait_goes_on(harness: BlockingHarness) -> None:
    waiting = [harness.start("everything") for _ in range(2)]
    for run in waiting:
        eventually(lambda run=run: run.get().state_reason == "waits for signal word")
    crashes = harness.crashes
    harness.crash()
    assert harness.crashes == crashes + 1
    for run in waiting:
        harness.signal(run, "word", "after")
        assert run.result()[3] == "after"
    assert DONE.count("add 0") == 4, "two runs and a child of each"


def test_a_crash_that_never_happens_fails_the_test(database_server: DatabaseServer, harness: BlockingHarness) -> None:
    run = harness.start("everything")
    run.until("AWAITING_INPUT")
    with pytest.raises(ValueError, match="has recorded step 1 already"):
        harness.crash_after_step(run, 1)
    harness.crash_after_step(run, 99)
    with pytest.raises(ValueError, match="another crash is still to come"):
        harness.crash_after_step(run, 98)
    with pytest.raises(ValueError, match="another crash is still to come"):
        harness.crash()
    harness.signal(run, "word", "x")
    with pytest.raises(CrashNeverHappened, match="was to crash after step 99, and never came to it"):
        run.result()
    harness.disarm()


@pytest.mark.parametrize("agent", ["adder", "blocking-adder", "mixed-adder", "raiser"])
def test_an_agent_that_keeps_the_rules_survives_a_crash_after_each_step(harness: BlockingHarness, agent: str) -> None:
    steps = harness.check_replay(agent)
    assert [number for number, _ in steps] == list(range(1, len(steps) + 1))
    assert {name for _, name in steps} <= {"harness.add", "harness.blocking-add"}


@pytest.mark.timeout(300)
def test_waits_children_and_events_survive_a_crash_after_each_of_them(harness: BlockingHarness) -> None:
    steps = harness.check_replay("everything", signals=[("word", "hello")])
    assert [name for _, name in steps] == [
        "harness.add",
        "perdure.approval",
        "DBOS.recv",
        "DBOS.sleep",
        "adder@1",
        "DBOS.getResult",
        "DBOS.setEvent",
        "DBOS.sleep",
    ]


def test_an_agent_that_takes_another_way_each_time_is_told_at_which_step(harness: BlockingHarness) -> None:
    with pytest.raises(ReplayDiffers, match=r"step 2|Step 2"):
        harness.check_replay("moody")


def test_an_agent_whose_result_is_not_made_of_its_steps_alone_is_told_so(harness: BlockingHarness) -> None:
    with pytest.raises(ReplayDiffers, match="crashed right before its end has another result"):
        harness.check_replay("clock", same=lambda _a, _b: True)


def test_steps_that_differ_from_run_to_run_are_told_apart_from_code_that_does(harness: BlockingHarness) -> None:
    with pytest.raises(ReplayDiffers, match="has another result"):
        harness.check_replay("dice")
    assert harness.check_replay("dice", same=lambda a, b: a[1] == b[1] == "RUN") == [(1, "harness.rolled")]


async def test_the_harness_works_from_an_event_loop_and_tells_when_there_is_another(
    harness: BlockingHarness,
) -> None:
    with pytest.raises(RuntimeError, match="there is a harness in this process already"):
        async with AgentHarness():
            pass
    run = await harness.harness.start("adder", {"steps": 1})
    assert await run.result() == 1
