"""Code that changes under a run: what a replay meets must be what is recorded, or the run says so and ends."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from perdure_service.domain.runs import Failure
from perdure_service.testing import BlockingHarness, BlockingRun

from tests.helpers.changed_agents import AFTERWARDS, BODIES, PROGRAM_OF
from tests.helpers.databases import DatabaseServer
from tests.helpers.server import ROOT
from tests.helpers.waiting import scaled

OTHER_STEPS = {
    "swapped": "Step 1 is recorded as 'changed.first', but the replay met 'changed.second'",
    "renamed": "Step 2 is recorded as 'changed.second', but the replay met 'changed.renamed'",
    "removed": "Step 1 is recorded as 'changed.first', but the replay met 'changed.second'",
    "added": "Step 2 is recorded as 'changed.second', but the replay met 'changed.renamed'",
    "child": "Step 2 is recorded as 'changed.second', but the replay met 'changed.child'",
    "sleep": "Step 2 is recorded as 'changed.second', but the replay met 'DBOS.sleep'",
    "signal": "Step 2 is recorded as 'changed.second', but the replay met 'DBOS.recv'",
    "approval": "Step 2 is recorded as 'changed.second', but the replay met 'perdure.approval'",
    "event": "Step 2 is recorded as 'changed.second', but the replay met 'DBOS.setEvent'",
    "ends early": "Step 2 is recorded as 'changed.second', but the agent's code ended before it",
    "does nothing": "Step 1 is recorded as 'changed.first', but the agent's code ended before it",
}
"""What happens to a run of the agent `changed` that goes on as another program."""

OTHER_AGENTS = {
    ("changed-child-first", "step"): "Step 1 is recorded as 'changed.child', but the replay met 'changed.first'",
    ("changed-child-first", "no result"): "is recorded as 'DBOS.getResult', but the replay met 'changed.first'",
    ("changed-step-first", "result"): "is recorded as 'changed.first', but the replay met 'DBOS.getResult'",
    ("changed-gather", "other"): "is recorded as 'changed.second', but the replay met 'changed.renamed'",
    ("changed-blocking", "other"): "is recorded as 'changed.blocking', but the replay met 'DBOS.sleep'",
    ("changed-broken", "broken"): "Step 2 is recorded as 'changed.second', but the agent's code ended before it, with "
    "TypeError",
}
"""The same of other agents."""

GO_ON = {
    ("changed", "recorded"): ["first", "second", "went"],
    ("changed", "longer"): ["first", "second", "went", "renamed"],
    ("changed-child-first", "recorded"): ["child", "went"],
    ("changed-step-first", "recorded"): ["first", "went"],
    ("changed-gather", "recorded"): ["first", "second", "went"],
    ("patched", "patched"): ["first", "second", "went"],
    ("patched-blocking", "patched"): ["one", "two", "went"],
}
"""What runs return that go on, in the same code or in code that agrees with the recording."""

CASES = [
    *(("changed", program, False) for program in OTHER_STEPS),
    *(("changed", program, True) for program in OTHER_STEPS),
    *((agent, program, False) for agent, program in OTHER_AGENTS),
    *((agent, program, False) for agent, program in GO_ON),
]


def run_id(agent: str, program: str, catches: bool = False) -> str:
    return f"{agent}-{program.replace(' ', '-')}{'-catches' if catches else ''}"


def load_documented() -> None:
    """Declares the agent of the documents that has a patch."""
    text = (ROOT / "service" / "docs" / "writing-agents.md").read_text(encoding="utf-8")
    (block,) = (one for one in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "DBOS.patch_async(" in one)
    module = ModuleType("documented_patch")
    sys.modules[module.__name__] = module
    exec(compile(block, module.__name__, "exec"), vars(module))


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    load_documented()
    with BlockingHarness(database_url=database_server.url, timeout_s=scaled(15)) as harness:
        yield harness


@pytest.fixture(scope="module")
def replayed(harness: BlockingHarness) -> dict[str, BlockingRun]:
    """A run for each case, come to its wait in the recorded code, and then continued in another by one crash."""
    runs = {}
    for agent, program, catches in CASES:
        run_input = {"catches": catches} if agent == "changed" else None
        name = run_id(agent, program, catches)
        runs[name] = harness.start(agent, run_input, run_id=name)
    for run in runs.values():
        run.until("AWAITING_INPUT")
    PROGRAM_OF.update({run_id(agent, program, catches): program for agent, program, catches in CASES})
    BODIES.clear()
    harness.crash()
    return runs


def failure_of(run: BlockingRun) -> Failure:
    ended = run.ended()
    assert ended.state.value == "FAILED"
    assert ended.failure is not None
    assert ended.failure.type == "NON_DETERMINISTIC"
    return ended.failure


@pytest.mark.parametrize("catches", [False, True], ids=["", "and the code catches everything"])
@pytest.mark.parametrize("program", OTHER_STEPS)
def test_a_replay_that_meets_another_step_fails_the_run_and_names_both(
    replayed: dict[str, BlockingRun], program: str, catches: bool
) -> None:
    run = replayed[run_id("changed", program, catches)]
    failure = failure_of(run)
    assert OTHER_STEPS[program] in failure.message
    assert f"is recorded as '{failure.step_name}'" in failure.message
    assert "DBOS.patch" in failure.message
    assert not failure.retryable
    assert run.id not in dict(BODIES), "a body ran in a run that had left its recording"
    assert run.id not in dict(AFTERWARDS), "the agent's code took it for an error of a step"
    assert run.events()[-1].data["failure"]["type"] == "NON_DETERMINISTIC"


@pytest.mark.parametrize(("agent", "program"), OTHER_AGENTS)
def test_children_their_results_concurrent_and_blocking_steps_are_compared_too(
    replayed: dict[str, BlockingRun], agent: str, program: str
) -> None:
    assert OTHER_AGENTS[agent, program] in failure_of(replayed[run_id(agent, program)]).message


def test_a_mistake_in_new_code_before_a_recorded_step_is_named_as_the_cause(replayed: dict[str, BlockingRun]) -> None:
    assert failure_of(replayed[run_id("changed-broken", "broken")]).cause == "TypeError: a mistake"


@pytest.mark.parametrize(("agent", "program"), GO_ON)
def test_code_that_agrees_with_the_recording_goes_on(
    harness: BlockingHarness, replayed: dict[str, BlockingRun], agent: str, program: str
) -> None:
    run = replayed[run_id(agent, program)]
    harness.signal(run, "go", "went")
    assert run.result() == GO_ON[agent, program]
    assert [name for who, name in BODIES if who == run.id] == (["renamed"] if program == "longer" else [])


def test_a_patch_takes_new_runs_to_the_new_path_and_keeps_them_there(harness: BlockingHarness) -> None:
    PROGRAM_OF.update({"new-1": "patched", "new-2": "patched"})
    new = [harness.start("patched", run_id="new-1"), harness.start("patched-blocking", run_id="new-2")]
    for run in new:
        run.until("AWAITING_INPUT")
    harness.crash()  # they are replayed over the marks
    for run in new:
        harness.signal(run, "go", "went")
    assert [run.result() for run in new] == [["first", "renamed", "second", "went"], ["one", "more", "two", "went"]]
    assert [name for who, name in BODIES if who == "new-1"] == ["first", "renamed", "second"]


def test_the_patch_of_the_documents_is_a_step_of_its_own_in_new_runs(harness: BlockingHarness) -> None:
    run = harness.start("parcel", {"item": "tea"}, run_id="documented")
    assert run.result() == "sent packed tea"
    done = [event.step_name for event in run.events() if event.kind == "step_succeeded"]
    assert done == ["parcel.pack", "DBOS.patch-weigh-first", "parcel.weigh", "parcel.send"]
