"""Code that changes under a run: what a replay meets must be what is recorded, or the run says so and ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from perdure_service.testing import BlockingHarness, RunFailed

from tests.helpers import changed_agents
from tests.helpers.databases import DatabaseServer
from tests.helpers.waiting import scaled


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    with BlockingHarness(database_url=database_server.url, timeout_s=scaled(15)) as harness:
        yield harness


@pytest.fixture(autouse=True)
def recorded_program() -> Iterator[None]:
    changed_agents.PROGRAM = "recorded"
    changed_agents.BODIES.clear()
    changed_agents.AFTERWARDS.clear()
    yield
    changed_agents.PROGRAM = "recorded"


def replayed_in(harness: BlockingHarness, program: str, agent: str = "changed", **run_input: object):
    """Starts a run of the recorded program, lets it come to its wait, and continues it in another program."""
    run = harness.start(agent, run_input)
    run.until("AWAITING_INPUT")
    changed_agents.PROGRAM = program
    changed_agents.BODIES.clear()
    harness.crash()
    return run


@pytest.mark.parametrize(
    ("program", "step_id", "recorded", "met"),
    [
        ("swapped", 1, "changed.first", "changed.second"),
        ("renamed", 2, "changed.second", "changed.renamed"),
        ("removed", 1, "changed.first", "changed.second"),
        ("added", 2, "changed.second", "changed.renamed"),
        ("child", 2, "changed.second", "changed.child"),
        ("sleep", 2, "changed.second", "DBOS.sleep"),
        ("signal", 2, "changed.second", "DBOS.recv"),
        ("approval", 2, "changed.second", "perdure.approval"),
        ("event", 2, "changed.second", "DBOS.setEvent"),
    ],
)
@pytest.mark.parametrize("catches", [False, True], ids=["", "and the code catches everything"])
def test_a_replay_that_meets_another_step_fails_the_run_and_names_both(
    harness: BlockingHarness, program: str, step_id: int, recorded: str, met: str, catches: bool
) -> None:
    run = replayed_in(harness, program, catches=catches)
    ended = run.ended()
    assert ended.state.value == "FAILED"
    assert ended.failure is not None
    assert (ended.failure.type, ended.failure.step_name) == ("NON_DETERMINISTIC", recorded)
    assert f"Step {step_id} is recorded as '{recorded}', but the replay met '{met}'" in ended.failure.message
    assert "DBOS.patch" in ended.failure.message
    assert not ended.failure.retryable
    assert changed_agents.BODIES == [], "a body ran in a run that had left its recording"
    assert changed_agents.AFTERWARDS == [], "the agent's code took it for an error of a step"
    last = run.events()[-1]
    assert last.data["failure"]["type"] == "NON_DETERMINISTIC"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("ends early", r"Step 2 is recorded as 'changed\.second', but the agent's code ended"),
        ("does nothing", r"Step 1 is recorded as 'changed\.first', but the agent's code ended"),
    ],
)
def test_a_replay_that_ends_before_a_recorded_step_fails_the_run(
    harness: BlockingHarness, program: str, words: str
) -> None:
    run = replayed_in(harness, program)
    with pytest.raises(RunFailed, match=words) as info:
        run.result()
    assert info.value.failure is not None
    assert info.value.failure.type == "NON_DETERMINISTIC"


def test_a_mistake_in_new_code_before_a_recorded_step_is_named_as_the_cause(harness: BlockingHarness) -> None:
    run = replayed_in(harness, "broken", "changed-broken")
    failure = run.ended().failure
    assert failure is not None
    assert failure.type == "NON_DETERMINISTIC"
    assert "ended before it, with TypeError" in failure.message
    assert failure.cause == "TypeError: a mistake"


@pytest.mark.parametrize(
    ("agent", "program", "words"),
    [
        ("changed-child-first", "step", "recorded as 'changed.child', but the replay met 'changed.first'"),
        ("changed-child-first", "no result", "recorded as 'DBOS.getResult', but the replay met 'changed.first'"),
        ("changed-step-first", "result", "recorded as 'changed.first', but the replay met 'DBOS.getResult'"),
        ("changed-gather", "other", "recorded as 'changed.second', but the replay met 'changed.renamed'"),
        ("changed-blocking", "other", "recorded as 'changed.blocking', but the replay met 'DBOS.sleep'"),
    ],
)
def test_children_their_results_concurrent_and_blocking_steps_are_compared_too(
    harness: BlockingHarness, agent: str, program: str, words: str
) -> None:
    failure = replayed_in(harness, program, agent).ended().failure
    assert failure is not None
    assert failure.type == "NON_DETERMINISTIC"
    assert words in failure.message


@pytest.mark.parametrize("agent", ["changed", "changed-child-first", "changed-step-first", "changed-gather"])
def test_unchanged_code_goes_on(harness: BlockingHarness, agent: str) -> None:
    run = replayed_in(harness, "recorded", agent)
    harness.signal(run, "go", "went")
    assert run.result()[-1] == "went"
    assert changed_agents.BODIES == []


def test_code_that_only_grew_at_its_end_goes_on(harness: BlockingHarness) -> None:
    run = replayed_in(harness, "longer")
    harness.signal(run, "go", "went")
    assert run.result() == ["first", "second", "went", "renamed"]


@pytest.mark.parametrize(
    ("agent", "old", "new"),
    [
        ("patched", ["first", "second", "went"], ["first", "renamed", "second", "went"]),
        ("patched-blocking", ["one", "two", "went"], ["one", "more", "two", "went"]),
    ],
)
def test_a_patch_keeps_old_runs_on_the_old_path_and_takes_new_ones_to_the_new(
    harness: BlockingHarness, agent: str, old: list[str], new: list[str]
) -> None:
    before = replayed_in(harness, "patched", agent)
    after = harness.start(agent)
    after.until("AWAITING_INPUT")
    harness.crash()  # and the new one is replayed over its marker
    for run in (before, after):
        harness.signal(run, "go", "went")
    assert (before.result(), after.result()) == (old, new)
