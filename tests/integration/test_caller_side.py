"""What a caller costs: a start answers, without reading it, what a read would find; a wait reads the run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb

from tests.helpers.rpc import Rpc, duration, in_seconds, new_id, state_of
from tests.helpers.server import ServerProcess, create_effects_table
from tests.helpers.still_agents import SLOTS
from tests.helpers.waiting import eventually, scaled

READ = "SELECT r.workflow_id, r.namespace, r.run_id, r.agent"
"""How the statement begins that reads runs."""


@pytest.fixture(scope="module")
def statements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caller-side") / "statements"
    path.touch()
    return path


@pytest.fixture(scope="module")
def server(database_url: str, statements: Path) -> Iterator[ServerProcess]:
    """A server that writes down what its calls ask the database."""
    create_effects_table(database_url)
    agents = ("tests.helpers.statements", "tests.helpers.still_agents")
    with ServerProcess(database_url, *agents, PERDURE_TEST_STATEMENTS=str(statements)) as process:
        yield process


@pytest.fixture
def asked(statements: Path) -> Callable[[], list[str]]:
    """Returns what has been asked since the test began."""
    before = len(statements.read_text())
    return lambda: statements.read_text()[before:].splitlines()


def basic(rpc: Rpc, run_id: str) -> run_pb.AgentRun:
    return rpc.runs.GetRun(pb.GetRunRequest(run_id=run_id)).run


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "its own id and all else that can be said": (
        "RUNNING",
        {
            "run_id": "said",
            "request_id": "request-1",
            "labels": {"team": "blue", "number": "ü"},
            "context_id": "case 7",
            "priority": 3,
            "deadline_time": in_seconds(3600.123456),
            "metadata": (("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"),),
        },
    ),
    "an id that the server makes": ("RUNNING", {"request_id": "request-2"}),
    "no request id": ("RUNNING", {"run_id": "unasked"}),
    "no free slot": ("QUEUED", {"run_id": "queued", "priority": 2}),
    "a delay": ("SCHEDULED", {"run_id": "delayed", "delay": duration(600)}),
    "a time": ("SCHEDULED", {"run_id": "timed", "start_time": in_seconds(600), "deadline_time": in_seconds(1200)}),
}
assert [state for state, _ in KINDS.values()].count("RUNNING") == SLOTS, "the next one waits"


def test_a_start_and_a_wait_for_its_end_read_nothing_and_answer_what_a_read_would_find(
    rpc: Rpc, asked: Callable[[], list[str]]
) -> None:
    run = rpc.start_call("counter", {"steps": 3, "delay_s": 0.1}, run_id=new_id()).run
    assert state_of(run) == "RUNNING", "it executes here"
    response = rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run.run_id), timeout=scaled(20))
    assert state_of(response.run) == "SUCCEEDED"
    assert not [one for one in asked() if READ in one]
    assert rpc.runs.GetRun(pb.GetRunRequest(run_id=run.run_id)).run == response.run


def test_a_start_answers_what_a_read_finds_and_reads_nothing(rpc: Rpc, asked: Callable[[], list[str]]) -> None:
    started = []
    for kind, (state, fields) in KINDS.items():
        response = rpc.start_call("still", {}, **fields)
        assert not [one for one in asked() if READ in one], f"a start with {kind} reads"
        started.append((kind, response))
        assert (state_of(response.run), response.created) == (state, True), kind
    for kind, response in started:
        assert response.run == basic(rpc, response.run.run_id), kind
    # A repeat is told the same; it has to read.
    fields = KINDS["an id that the server makes"][1]
    again = rpc.start_call("still", {}, **fields)
    assert again == started[1][1]
    assert [one for one in asked() if READ in one]
    for _kind, response in started:
        rpc.cancel(response.run.run_id)


def test_an_agent_whose_whole_input_is_one_parameter_is_answered_so_too(rpc: Rpc) -> None:
    response = rpc.start_call("counter", {"steps": 1}, run_id=new_id(), delay=duration(600))
    assert response.run == basic(rpc, response.run.run_id)
    rpc.cancel(response.run.run_id)


def test_a_run_in_a_queue_is_waited_for_through_its_whole_way(rpc: Rpc, asked: Callable[[], list[str]]) -> None:
    holders = [rpc.start("still", {}) for _ in range(SLOTS)]
    queued = rpc.start_call("still", {"seconds": 0}, run_id=new_id())
    assert state_of(queued.run) == "QUEUED"
    wait = rpc.runs.WaitRun.future(pb.WaitRunRequest(run_id=queued.run.run_id), timeout=scaled(20))
    eventually(lambda: [one for one in asked() if READ in one], what="the wait has looked")
    for holder in holders:
        rpc.cancel(holder)
    assert state_of(wait.result().run) == "SUCCEEDED"
    assert len([one for one in asked() if READ in one]) == 2 + len(holders) * 2, (
        "the wait's two, and the cancellations'"
    )
