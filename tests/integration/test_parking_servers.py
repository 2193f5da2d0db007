"""Parked runs belong to no server: they outlive all, and whichever there is then goes on with them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil
import pytest
import sqlalchemy as sa
from dbos import DBOSClient
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.durable import hops

from tests.helpers import judge
from tests.helpers.rpc import Rpc, in_seconds, kinds_of, new_id, states_in
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, scaled

AGENTS = ("tests.helpers.agents", "tests.helpers.waiting_agents")


@dataclass
class Pair:
    """Two servers that run one run at a time each, and park at once."""

    url: str
    a: ServerProcess
    b: ServerProcess
    at_a: Rpc
    at_b: Rpc


@pytest.fixture(scope="module")
def both(database_url: str) -> Iterator[Pair]:
    create_effects_table(database_url)
    environment = {
        "PERDURE_PARK_AFTER": "0",
        "PERDURE_MAX_RUNNING": "1",
        "PERDURE_LEASE_TTL": str(scaled(2)),
    }
    with ExitStack() as stack:
        servers = [ServerProcess(database_url, *AGENTS, command="serve", **environment) for _ in range(2)]
        for server in servers:
            stack.callback(server.__exit__)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ServerProcess.start, servers))
        stubs = [stack.enter_context(Rpc(server.address)) for server in servers]
        yield Pair(database_url, *servers, *stubs)


def parked_for(url: str, run_id: str) -> str | None:
    with sql(url) as connection:
        row = connection.execute("SELECT parked_for FROM perdure.run WHERE run_id = %s", (run_id,)).fetchone()
    return None if row is None else row[0]


def until_parked(url: str, run_id: str) -> str:
    return eventually(lambda: parked_for(url, run_id), what="parked") or ""


@contextmanager
def foreign_client(url: str) -> Iterator[DBOSClient]:
    engine = sa.create_engine(url)
    client = DBOSClient(system_database_url=url, system_database_engine=engine, application_name="perdure")
    try:
        yield client
    finally:
        client.destroy()
        engine.dispose()


def test_a_parent_and_its_children_need_no_more_than_one_slot(both: Pair) -> None:
    run_id = both.at_a.start("parent", {"children": 3, "seconds": 0.5})
    assert both.at_b.output_of(run_id) == ["child 0", "child 1", "child 2"]
    judge.assert_consistent(both.url, f"default.{run_id}.r")


def test_parents_that_wait_for_queued_children_hold_no_slot_that_these_need(both: Pair) -> None:
    parents = [both.at_a.start("waits-for-children", {"how": "queue"}) for _ in range(3)]  # and there are two slots
    for parent in parents:
        assert until_parked(both.url, f"{parent}.1") == "signal:go"
        assert both.at_b.signal(f"{parent}.1", "x", name="go")
    for parent in parents:
        assert both.at_a.output_of(parent) == ["0: x"]


def test_a_foreign_message_wakes_within_a_few_seconds(both: Pair) -> None:
    run_id = both.at_a.start("listener")
    until_parked(both.url, run_id)
    with foreign_client(both.url) as client:
        client.send(f"default.{run_id}.r", "from afar", topic="more")
    assert both.at_a.output_of(run_id) == ["from afar"]


def test_a_deadline_ends_a_parked_run(both: Pair) -> None:
    run_id = both.at_a.start("listener", deadline_time=in_seconds(scaled(1)))
    until_parked(both.url, run_id)
    end = both.at_a.end_of(run_id)
    assert end.state == both.at_a.until(run_id, "EXPIRED").state
    assert parked_for(both.url, run_id) is None


def test_a_parked_run_can_be_forked_and_is_not_deleted(both: Pair) -> None:
    run_id = both.at_a.start("sleeper", {"seconds": 600.0})
    assert until_parked(both.url, run_id) == "sleep"
    assert list(both.at_a.runs.DeleteRuns(pb.DeleteRunsRequest(run_ids=[run_id])).unfinished_run_ids) == [run_id]
    fork = both.at_a.runs.ForkRun(pb.ForkRunRequest(run_id=run_id, request_id=new_id(), from_step_id=1)).run.run_id
    assert until_parked(both.url, fork) == "sleep"
    for one in (run_id, fork):
        both.at_a.cancel(one)
        both.at_a.until(one, "CANCELLED")


def test_what_is_parked_at_one_server_goes_on_at_the_other_when_that_is_gone(both: Pair) -> None:
    asks, waits = both.at_a.start("asker"), both.at_a.start("listener")
    for run_id in (asks, waits):
        until_parked(both.url, run_id)
    before = both.at_b.get(waits)
    both.a.kill()
    assert both.at_b.signal(waits, "x")
    both.at_b.decide(both.at_b.approval_of(asks).approval_id)
    assert both.at_b.output_of(waits) == ["x"]
    assert both.at_b.output_of(asks)["approved"]
    assert before.execution == 1
    for run_id in (asks, waits):
        events = both.at_b.events(run_id)
        assert "recovered" not in kinds_of(events), "nobody had lost it"
        assert states_in(events)[-3:] == ["QUEUED", "RUNNING", "SUCCEEDED"]
        judge.assert_consistent(both.url, f"default.{run_id}.r")
    assert effects(both.url, asks) == ["count 0", "count 1"]


def test_many_runs_that_come_to_a_wait_at_once_take_few_threads(own_database_url: str) -> None:
    """Threads stay once they are made, some megabytes for each hundred; plain to see in the process itself."""
    many = 400
    with (
        ServerProcess(own_database_url, *AGENTS, PERDURE_PARK_AFTER="1", PERDURE_MAX_RUNNING="500") as server,
        Rpc(server.address) as rpc,
    ):
        assert server._process is not None
        process = psutil.Process(server._process.pid)
        rpc.until(rpc.start("listener"), "AWAITING_INPUT")
        before = process.num_threads()
        starts = (
            pb.StartAgentsRequest(start=pb.StartAgentRequest(agent="listener", run_id=f"many-{number}"))
            for number in range(many)
        )
        answers = list(rpc.runs.StartAgents(starts, timeout=scaled(60)))
        assert len(answers) == many
        assert all(answer.WhichOneof("result") == "started" for answer in answers)

        def parked() -> bool:
            with sql(own_database_url) as connection:
                row = connection.execute(
                    "SELECT count(*) FROM perdure.run WHERE parked_for IS NOT NULL AND run_id LIKE 'many-%'"
                ).fetchone()
            return row == (many,)

        eventually(parked, 60, what="all are parked")
        threads = process.num_threads() - before
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: rpc.signal(f"many-{number}", number), range(0, many, 40)))
        assert [rpc.output_of(f"many-{number}") for number in range(0, many, 40)] == [[n] for n in range(0, many, 40)]

    # Those that look, and some for what else goes on: starts, claims, signals.
    assert threads < hops.LOOKS + 40
