"""kill -9 at every point of the seam, and commits whose reply is lost: nothing is lost, nothing done is done twice."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta

import grpc
import pytest
from perdure.v1.agent_run_pb2 import AGENT_RUN_STATE_SUCCEEDED
from perdure.v1.agent_run_service_pb2 import (
    DeleteRunsRequest,
    DeleteRunsResponse,
    ForkRunRequest,
    ForkRunResponse,
    StartAgentRequest,
    WaitRunRequest,
)
from perdure.v1.agent_run_service_pb2_grpc import AgentRunServiceStub
from perdure.v1.approval_service_pb2 import DECISION_APPROVE, DecideApprovalRequest, ListApprovalsRequest
from perdure.v1.approval_service_pb2_grpc import ApprovalServiceStub
from perdure_client import Client

from tests.helpers import judge
from tests.helpers.server import KILLED, ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually

MAX_POINTS = 40
"""More points than any of the runs here has."""

PLAIN_POINTS = 20
"""Points that every run has of the workflow that uses all of DBOS.

Some more lie before its end, or behind it: whether its children's last steps are commits of their own is a matter of
timing."""

ALL_POINTS = bool(os.environ.get("PERDURE_TEST_ALL_POINTS"))
"""Whether to die at all of them (`make chaos`), not at some that the seed chooses."""


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_effects_table(database_url)
    return database_url


@pytest.fixture
def server(url: str) -> Iterator[ServerProcess]:
    server = ServerProcess(url, "tests.helpers.chaos")
    try:
        yield server
    finally:
        server.__exit__()


class Victim:
    """Calls a server that may die in any of them, without the patience of the client library."""

    def __init__(self, server: ServerProcess) -> None:
        self._channel = grpc.insecure_channel(server.address)
        self._runs = AgentRunServiceStub(self._channel)
        self._approvals = ApprovalServiceStub(self._channel)

    def start(self, agent: str, run_input: dict[str, object], run_id: str) -> None:
        text = json.dumps(run_input)
        self._runs.StartAgent(StartAgentRequest(agent=agent, run_id=run_id, request_id=run_id, input_json=text))

    def wait(self, run_id: str) -> bool:
        """Returns whether the run has ended well; raises when the server has died."""
        return self._runs.WaitRun(WaitRunRequest(run_id=run_id), timeout=15).run.state == AGENT_RUN_STATE_SUCCEEDED

    def fork(self, request: ForkRunRequest) -> ForkRunResponse:
        return self._runs.ForkRun(request, timeout=15)

    def delete(self, request: DeleteRunsRequest) -> DeleteRunsResponse:
        return self._runs.DeleteRuns(request, timeout=15)

    def decide(self, run_id: str) -> None:
        request = ListApprovalsRequest(run_id=run_id)
        asked = eventually(lambda: self._approvals.ListApprovals(request).approvals)
        decision = DecideApprovalRequest(approval_id=asked[0].approval_id, decision=DECISION_APPROVE, comment="yes")
        self._approvals.DecideApproval(decision)

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def _survives(server: ServerProcess, point: int, agent: str, run_input: dict[str, object], run_id: str) -> bool:
    """Runs an agent on a server that dies at a point; returns whether the run ended before that."""
    server.start(PERDURE_CHAOS_KILL_AT=str(point))
    with Victim(server) as victim, suppress(grpc.RpcError):
        victim.start(agent, run_input, run_id)
        if agent == "asker":
            victim.decide(run_id)
        return victim.wait(run_id)
    return False


def _finish(server: ServerProcess, agent: str, run_input: dict[str, object], run_id: str) -> None:
    """Repeats the start on a server that lives, decides what is asked, and waits for the end."""
    with Client(server.address) as client:
        client.start(agent, run_input, run_id=run_id)
        if agent == "asker":

            def open_or_over() -> object:
                return list(client.approvals(run=run_id)) or client.get(run_id).state == "SUCCEEDED"

            pending = eventually(open_or_over)
            if isinstance(pending, list):
                client.approve(pending[0], comment="yes")
        run = client.wait(run_id, timeout=30)
        assert run.state == "SUCCEEDED", run


@pytest.mark.timeout(300)
def test_a_run_survives_a_kill_at_every_point(server: ServerProcess, url: str) -> None:
    run_input: dict[str, object] = {"steps": 2, "text": "words "}
    for point in range(1, MAX_POINTS):
        run_id = f"kill-counter-{point}"
        if _survives(server, point, "counter", run_input, run_id):
            # The points are used up by the run itself: the next ones lie behind its end.
            break
        assert server.wait_for_end() == KILLED, server.log[-3000:]
        server.start()
        _finish(server, "counter", run_input, run_id)
        server.kill()
        log = judge.assert_consistent(url, f"default.{run_id}.r")
        judge.assert_effects(url, run_id, log, "count 0", "count 1", deaths=1)
        assert judge.output_of(url, f"default.{run_id}.r") == {"total": 1}
        assert judge.text_of(log) == "words words "
    else:
        raise AssertionError(f"the run has more than {MAX_POINTS} points")
    assert point > 4


@pytest.mark.timeout(300)
def test_a_plain_workflow_that_uses_all_of_dbos_survives_a_kill(
    server: ServerProcess, url: str, rng: random.Random
) -> None:
    run_input: dict[str, object] = {"name": "x"}
    points = range(1, MAX_POINTS) if ALL_POINTS else sorted(rng.sample(range(1, PLAIN_POINTS + 1), 5))
    for point in points:
        run_id = f"kill-plain-{point}"
        if _survives(server, point, "plain", run_input, run_id):
            assert point > PLAIN_POINTS
            break
        assert server.wait_for_end() == KILLED, server.log[-3000:]
        server.start()
        _finish(server, "plain", run_input, run_id)
        server.kill()
        judge.assert_consistent(url, f"default.{run_id}.r")
        assert judge.output_of(url, f"default.{run_id}.r") == {"value": 4, "child": 11, "message": None}


@pytest.mark.timeout(300)
def test_an_approval_survives_a_kill_at_every_point_of_asking_and_deciding(server: ServerProcess, url: str) -> None:
    for point in range(1, MAX_POINTS):
        run_id = f"kill-asker-{point}"
        ended = _survives(server, point, "asker", {}, run_id)
        if not ended:
            assert server.wait_for_end() == KILLED, server.log[-3000:]
            server.start()
            _finish(server, "asker", {}, run_id)
        server.kill()
        log = judge.assert_consistent(url, f"default.{run_id}.r")
        judge.assert_effects(url, run_id, log, "count 0", "count 1", deaths=0 if ended else 1)
        kinds = [event.kind for event in log]
        assert kinds.count("approval_requested") == 1
        assert kinds.count("approval_decided") == 1
        assert judge.output_of(url, f"default.{run_id}.r")["comment"] == "yes"
        if ended:
            break
    else:
        raise AssertionError(f"the run has more than {MAX_POINTS} points")
    assert point > 6


def test_a_commit_whose_reply_is_lost_is_written_once(server: ServerProcess, url: str) -> None:
    server.start(PERDURE_CHAOS_AMBIGUOUS="1")
    with Client(server.address, timeout=30) as client:
        client.start("counter", {"steps": 2, "text": "words "}, run_id="ambiguous")
        assert client.wait("ambiguous", timeout=60).state == "SUCCEEDED"
        client.start("listener", {}, run_id="ambiguous-signal")
        assert client.signal("ambiguous-signal", "more", {"x": 1})
        assert client.wait("ambiguous-signal", timeout=60).output == [{"x": 1}]
    log = judge.assert_consistent(url, "default.ambiguous.r")
    judge.assert_effects(url, "ambiguous", log, "count 0", "count 1", deaths=0)
    assert judge.text_of(log) == "words words "
    log = judge.assert_consistent(url, "default.ambiguous-signal.r")
    assert [event.kind for event in log].count("signal_received") == 1


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "57014", "57P01"])
def test_transactions_that_the_database_refuses_are_repeated(server: ServerProcess, url: str, sqlstate: str) -> None:
    with sql(url) as connection:
        connection.execute(
            "CREATE OR REPLACE FUNCTION public.test_raise(code TEXT) RETURNS VOID LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'injected' USING ERRCODE = code; END $$"
        )
    server.start(PERDURE_CHAOS_SQLSTATE=sqlstate)
    with Client(server.address, timeout=30) as client:
        for number in range(3):
            run_id = f"refused-{sqlstate.lower()}-{number}"
            client.start("counter", {"steps": 2, "text": "words "}, run_id=run_id)
            assert client.wait(run_id, timeout=60).state == "SUCCEEDED"
            log = judge.assert_consistent(url, f"default.{run_id}.r")
            judge.assert_effects(url, run_id, log, "count 0", "count 1", deaths=0)
            assert judge.text_of(log) == "words words "


def test_a_run_whose_claim_was_committed_without_a_reply_is_not_lost(server: ServerProcess, url: str) -> None:
    server.start(PERDURE_CHAOS_LOSE_CLAIMS="1")
    with Client(server.address, timeout=30) as client:
        client.start("counter", {"steps": 2, "text": "words "}, run_id="lost-claim", delay=timedelta(seconds=0.5))
        assert client.wait("lost-claim", timeout=60).state == "SUCCEEDED"
    log = judge.assert_consistent(url, "default.lost-claim.r")
    judge.assert_effects(url, "lost-claim", log, "count 0", "count 1", deaths=0)
    assert "its executor never began it" in [event.data.get("reason") for event in log], "it was given back"


def test_what_was_written_to_a_stream_for_good_is_not_void_after_a_recovery(server: ServerProcess, url: str) -> None:
    server.start()
    with Client(server.address) as client:
        client.start("publisher", {}, run_id="publisher")
        eventually(lambda: client.get("publisher").state == "AWAITING_INPUT")
    server.kill()
    server.start()
    with Client(server.address) as client:
        client.signal("publisher", "more", "enough")
        assert client.wait("publisher").output == "enough"
        steps = {step.step_name: step for step in client.steps("publisher")}
    log = judge.assert_consistent(url, "default.publisher.r")
    assert judge.text_of(log, "log") == "from the workflowfrom a step"
    assert [event.attempt for event in log if event.kind == "attempt_reset"] == [2], "of the retry, not of the recovery"
    assert [event.attempt for event in log if event.kind == "published"] == [1, 2]
    assert (steps["publish_in_a_step"].attempts, steps["publish_in_a_step"].state) == (2, "SUCCEEDED")
    assert steps["DBOS.writeStream"].state == "SUCCEEDED"


# ---- forks and deletions ---------------------------------------------------------------------------------------------


def _ended(server: ServerProcess, *run_ids: str) -> None:
    """Runs that have ended, of a server that was killed since."""
    server.start()
    with Client(server.address) as client:
        for run_id in run_ids:
            client.start("counter", {"steps": 3}, run_id=run_id)
            assert client.wait(run_id).succeeded
    server.kill()


def _dies_at(server: ServerProcess, point: int, call: Callable[[Victim], object]) -> None:
    """Makes a call to a server that dies in it: at 1 before its commit, at 2 after it."""
    server.start(PERDURE_CHAOS_KILL_AT=str(point))
    with Victim(server) as victim, suppress(grpc.RpcError):
        call(victim)
    assert server.wait_for_end() == KILLED, server.log[-3000:]


@pytest.mark.timeout(300)
def test_a_deletion_or_a_fork_that_is_killed_leaves_whole_runs(server: ServerProcess, url: str) -> None:
    doomed = [f"delete-{number}" for number in range(3)]
    _ended(server, "to-fork", *doomed)
    deletion = DeleteRunsRequest(run_ids=doomed)
    _dies_at(server, 1, lambda victim: victim.delete(deletion))
    for run_id in doomed:
        judge.assert_consistent(url, f"default.{run_id}.r")
    _dies_at(server, 2, lambda victim: victim.delete(deletion))
    for run_id in doomed:
        assert judge.log_of(url, f"default.{run_id}.r") == []
        assert judge.checkpoints_of(url, f"default.{run_id}.r") == {}

    forks = [
        ForkRunRequest(run_id="to-fork", request_id=f"fork-{point}", new_run_id=f"fork-{point}", from_step_id=3)
        for point in (1, 2)
    ]
    for point, request in enumerate(forks, 1):
        _dies_at(server, point, lambda victim, request=request: victim.fork(request))  # type: ignore[misc]
        written = judge.log_of(url, f"default.{request.new_run_id}.r")
        assert [event.kind for event in written[:2]] == ([] if point == 1 else ["state_changed", "forked"])
    server.start()
    with Victim(server) as patient:
        assert list(patient.delete(deletion).missing_run_ids) == doomed
        for request in forks:
            assert patient.fork(request).created, "the repeat is told the same as the first call"
            assert patient.wait(request.new_run_id)
    for request in forks:
        log = judge.assert_consistent(url, f"default.{request.new_run_id}.r")
        judge.assert_effects(url, request.new_run_id, log, "count 2", deaths=0)
        assert [event.kind for event in log].count("forked") == 1


@pytest.mark.timeout(300)
def test_a_fork_or_a_deletion_whose_reply_is_lost_is_done_once_and_told(server: ServerProcess, url: str) -> None:
    _ended(server, "lost-origin")
    server.start(PERDURE_CHAOS_AMBIGUOUS="1")
    with Client(server.address, timeout=30) as client:
        run = client.fork("lost-origin", from_step=3, run_id="lost-fork")
        assert run.created
        assert client.wait(run, timeout=60).output == {"total": 3}
        assert client.delete_runs("lost-origin").deleted_count == 1
    log = judge.assert_consistent(url, "default.lost-fork.r")
    assert [event.kind for event in log].count("forked") == 1
    assert judge.log_of(url, "default.lost-origin.r") == []
