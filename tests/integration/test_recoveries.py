"""Which ends of an executor count against a run: its death does, a hand-over does not."""

from __future__ import annotations

import pytest

from tests.helpers import judge
from tests.helpers.rpc import Rpc
from tests.helpers.server import KILLED, ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually

AGENTS = ("tests.helpers.agents", "tests.helpers.stubborn_agents")


@pytest.fixture
def url(own_database_url: str) -> str:
    create_effects_table(own_database_url)
    return own_database_url


def workflow_of(run_id: str) -> str:
    return f"default.{run_id}.r"


def attempts_of(url: str, run_id: str) -> int:
    """Returns how many crashes and executions under way the engine counts."""
    with sql(url) as connection:
        query = "SELECT recovery_attempts FROM dbos.workflow_status WHERE workflow_uuid = %s"
        row = connection.execute(query, (workflow_of(run_id),)).fetchone()
    assert row is not None
    return int(row[0])


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
