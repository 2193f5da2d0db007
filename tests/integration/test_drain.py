"""A server that is told to stop hands over what it runs, one by one, and its end waits for nobody."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import grpc
import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import operator_service_pb2 as operator_pb
from perdure.v1.operator_service_pb2_grpc import OperatorServiceStub

from tests.helpers import judge
from tests.helpers.rpc import Reading, Rpc, only, states_in
from tests.helpers.server import KILLED, ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, free_port, scaled

LONG_TTL_S = scaled(60)
"""So long that a hand-over which waits for it would be seen."""
AGENTS = ("tests.helpers.agents", "tests.helpers.stubborn_agents")


@pytest.fixture
def url(own_database_url: str) -> str:
    create_effects_table(own_database_url)
    return own_database_url


@pytest.fixture
def servers(url: str) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers that are not started."""
    environment = {"PERDURE_LEASE_TTL": str(LONG_TTL_S), "PERDURE_PARK_AFTER": "600"}
    pair = [ServerProcess(url, *AGENTS, command="serve", **environment) for _ in range(2)]
    try:
        yield pair[0], pair[1]
    finally:
        for server in pair:
            server.__exit__()


def workflow_of(run_id: str) -> str:
    return f"default.{run_id}.r"


def attempts_of(url: str, run_id: str) -> int:
    """Returns how many crashes and executions under way the engine counts."""
    with sql(url) as connection:
        query = "SELECT recovery_attempts FROM dbos.workflow_status WHERE workflow_uuid = %s"
        row = connection.execute(query, (workflow_of(run_id),)).fetchone()
    assert row is not None
    return int(row[0])


def test_what_waits_moves_at_once_and_a_step_in_progress_may_finish(
    servers: tuple[ServerProcess, ServerProcess], url: str
) -> None:
    a, b = servers
    admin = f"127.0.0.1:{free_port()}"
    a.start(PERDURE_DRAIN_TIMEOUT=str(scaled(30)), PERDURE_ADMIN_ADDRESS=admin)
    with Rpc(a.address) as at_a:
        working = at_a.start("slow-one", {"seconds": scaled(4)})
        listening = at_a.start("listener", {})
        blocked = at_a.start("blocked-listener", {})
        for run_id in (listening, blocked):
            at_a.until(run_id, "AWAITING_INPUT")
        eventually(lambda: effects(url, working) == ["slow began"])
        b.start()
        watch = Reading(at_a.watch(working, timeout=60))
        eventually(lambda: watch.responses)
        process = a._process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        with Rpc(b.address) as at_b:
            for run_id in (listening, blocked):
                eventually(lambda run_id=run_id: at_b.get(run_id).execution == 2, what="what only waits moves first")
            assert effects(url, working) == ["slow began"], "while the step goes on"
            watch.join()
            assert watch.refusal is not None
            assert watch.refusal.code is grpc.StatusCode.UNAVAILABLE
            with grpc.insecure_channel(admin) as channel:
                page = OperatorServiceStub(channel).ListExecutors(operator_pb.ListExecutorsRequest())
            states = [operator_pb.ExecutorState.Name(one.state) for one in page.executors]
            assert states == ["EXECUTOR_STATE_ALIVE", "EXECUTOR_STATE_DRAINING"]
            late = at_a.start("counter", {"steps": 1})
            assert at_b.output_of(late) == {"total": 0}, "a start is still committed, and runs elsewhere"
            assert a.wait_for_end() == 0
            assert at_b.output_of(working) == "done"
            at_b.signal(listening, "x")
            assert at_b.output_of(listening) == ["x"]
            events = at_b.events(working)
        assert states_in(events) == ["RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]
        assert not only(events, "recovered")
        assert effects(url, working) == ["slow began", "slow done", "after"], "nothing was done twice"
        judge.assert_consistent(url, workflow_of(working))
        assert attempts_of(url, working) == 1, "a hand-over is no crash"


def test_a_call_that_hangs_does_not_hold_up_the_end_and_is_made_again_elsewhere(
    servers: tuple[ServerProcess, ServerProcess], url: str
) -> None:
    a, b = servers
    a.start(PERDURE_DRAIN_TIMEOUT="2", PERDURE_TEST_HANGS="1")
    with Rpc(a.address) as at_a:
        run_id = at_a.start("caller", {})
        eventually(lambda: effects(url, run_id) == ["called"])
    began = time.monotonic()
    assert a.stop() == 0
    assert time.monotonic() - began < scaled(10)
    b.start()
    with Rpc(b.address) as at_b:
        assert at_b.output_of(run_id) == "answered"
        assert at_b.get(run_id).execution == 2
    assert effects(url, run_id) == ["called", "called"]
    judge.assert_consistent(url, workflow_of(run_id))


def test_a_second_signal_ends_it_now(servers: tuple[ServerProcess, ServerProcess], url: str) -> None:
    a, _ = servers
    a.start(PERDURE_DRAIN_TIMEOUT="60", PERDURE_TEST_HANGS="1")
    with Rpc(a.address) as at_a:
        run_id = at_a.start("caller", {})
        eventually(lambda: effects(url, run_id) == ["called"])
    process = a._process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    eventually(lambda: "server.stopping" in a.log)
    process.send_signal(signal.SIGTERM)
    assert a.wait_for_end() == 130


def test_a_run_that_kills_its_servers_ends_when_it_has_done_so_often_enough(url: str) -> None:
    server = ServerProcess(url, *AGENTS, PERDURE_MAX_RECOVERIES="2")
    try:
        server.start()
        with Rpc(server.address) as rpc:
            run_id = rpc.start("killer", {})
        for _ in range(3):
            assert server.wait_for_end() == KILLED
            server.start()
        with Rpc(server.address) as rpc:
            run = rpc.until(run_id, "FAILED")
            assert run.failure.type == "MaxRecoveryAttemptsExceeded"
            assert "3" in run.failure.message
            assert "fork" in run.failure.message
        assert effects(url, run_id) == ["killed it"] * 3
        judge.assert_consistent(url, workflow_of(run_id), "FAILED")
    finally:
        server.__exit__()


def test_handing_over_again_and_again_counts_no_crash(url: str) -> None:
    server = ServerProcess(
        url, *AGENTS, PERDURE_MAX_RECOVERIES="1", PERDURE_DRAIN_TIMEOUT="1", PERDURE_PARK_AFTER="600"
    )
    try:
        server.start()
        with Rpc(server.address) as rpc:
            run_id = rpc.start("listener", {})
            rpc.until(run_id, "AWAITING_INPUT")
        for execution in range(2, 6):
            assert server.stop() == 0
            server.start()
            with Rpc(server.address) as rpc:
                eventually(lambda rpc=rpc, n=execution: rpc.get(run_id).execution == n)
                rpc.until(run_id, "AWAITING_INPUT")
        assert attempts_of(url, run_id) == 1
        with Rpc(server.address) as rpc:
            rpc.signal(run_id, "x")
            assert rpc.output_of(run_id) == ["x"]
    finally:
        server.__exit__()


def test_the_request_ids_of_starts_while_it_drains_are_kept(
    servers: tuple[ServerProcess, ServerProcess], url: str
) -> None:
    a, b = servers
    a.start(PERDURE_DRAIN_TIMEOUT=str(scaled(20)))
    with Rpc(a.address) as at_a:
        slow = at_a.start("slow-one", {"seconds": scaled(3)})
        eventually(lambda: effects(url, slow))
        process = a._process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        request = pb.StartAgentRequest(agent="counter", request_id="while-draining", input_json='{"steps": 1}')
        eventually(lambda: "server.stopping" in a.log)
        first = at_a.runs.StartAgent(request)
        assert first.created
        assert a.wait_for_end() == 0
    b.start()
    with Rpc(b.address) as at_b:
        again = at_b.runs.StartAgent(request)
        assert again.run.run_id == first.run.run_id
        assert at_b.output_of(first.run.run_id) == {"total": 0}
