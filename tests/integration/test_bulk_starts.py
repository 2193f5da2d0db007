"""StartAgents on real servers: one answer per start, and through a kill in mid-stream no run twice and none missing."""

from __future__ import annotations

import asyncio
import threading

import pytest
from perdure_client import (
    AgentNotFound,
    AgentStart,
    AsyncClient,
    Client,
    InputSchemaViolation,
    InvalidArgument,
    RunInputMismatch,
    RunNotFound,
    StartResult,
    WaitResult,
)

from tests.helpers.rpc import Rpc, new_id
from tests.helpers.server import ServerProcess, effects, sql

BULK = 400
"""Several times what a client has on its way and a server has at work."""
KILLED_AFTER = 100


def counters(prefix: str, count: int) -> list[AgentStart]:
    return [AgentStart("counter", {"steps": 1}, run_id=f"{prefix}-{n}") for n in range(count)]


def test_many_starts_are_answered_in_order_each_with_its_run_or_its_error(server: ServerProcess, rpc: Rpc) -> None:
    existing, mismatch = new_id(), new_id()
    rpc.start("counter", {"steps": 1}, run_id=existing)
    rpc.start("counter", {"steps": 2}, run_id=mismatch)
    starts = [
        AgentStart("counter", {"steps": 1}, labels={"team": "blue"}, context_id="case 7"),
        AgentStart("nobody"),
        AgentStart("counter", {"steps": "many"}),
        AgentStart("counter", {"steps": 1}, run_id=existing),
        AgentStart("counter", {"steps": 1}, run_id=mismatch),
        AgentStart("counter", {"steps": 1}, priority=-1),
        AgentStart("counter", {"steps": 1}, run_id="Not An Id"),
        AgentStart("counter", {"steps": 1}, validate_only=True),
        AgentStart("counter", {"steps": 0}, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ]
    with Client(server.address) as client:
        results = list(client.start_many(iter(starts)))
        assert [result.start for result in results] == starts
        assert [type(result.error) for result in results] == [
            type(None),
            AgentNotFound,
            InputSchemaViolation,
            type(None),
            RunInputMismatch,
            InvalidArgument,
            InvalidArgument,
            type(None),
            type(None),
        ]
        runs = [result.run for result in results if result.run is not None]
        assert [run.created for run in runs] == [True, False, False, True]
        assert runs[0].labels == {"team": "blue"}
        assert client.wait(runs[0]).output == {"total": 0}
        assert runs[-1].trace_id == "0af7651916cd43dd8448eb211c80319c"
        assert len({run.trace_id for run in runs}) == len(runs)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_server_that_is_killed_in_mid_stream_costs_no_start_and_makes_none_twice(
    own_server: ServerProcess, own_database_url: str, blocking: bool
) -> None:
    own_server.start()
    starts = counters("bulk", BULK)
    restarted = threading.Thread(target=lambda: (own_server.kill(), own_server.start()))
    results: list[StartResult] = []

    def take(result: StartResult) -> None:
        results.append(result)
        if len(results) == KILLED_AFTER:
            restarted.start()

    async def take_all() -> None:
        async with AsyncClient(own_server.address) as client:
            async for result in client.start_many(starts):
                take(result)

    if blocking:
        with Client(own_server.address) as client:
            for result in client.start_many(starts):
                take(result)
    else:
        asyncio.run(take_all())
    restarted.join()
    assert [result.start for result in results] == starts
    assert [result.run.run_id for result in results if result.run] == [start.run_id for start in starts]
    assert all(result.run.created for result in results if result.run)
    with sql(own_database_url) as connection:
        [(count,)] = connection.execute("SELECT count(*) FROM perdure.run").fetchall()
    assert count == BULK
    with Rpc(own_server.address) as rpc:
        rpc.end_of(f"bulk-{BULK - 1}")
    assert effects(own_database_url, f"bulk-{BULK - 1}") == ["count 0"]


@pytest.mark.parametrize("blocking", [False, True])
def test_the_ends_of_many_runs_are_told_once_each_through_a_kill(own_server: ServerProcess, blocking: bool) -> None:
    own_server.start()
    runs = {f"end-{n}": 0.2 if n < KILLED_AFTER else 1.5 for n in range(2 * KILLED_AFTER)}
    starts = [AgentStart("sleeper", {"seconds": seconds}, run_id=run_id) for run_id, seconds in runs.items()]
    restarted = threading.Thread(target=lambda: (own_server.kill(), own_server.start()))
    results: list[WaitResult] = []

    def take(result: WaitResult) -> None:
        results.append(result)
        if len(results) == KILLED_AFTER // 2:
            restarted.start()

    async def take_all() -> None:
        async with AsyncClient(own_server.address) as client:
            async for result in client.wait_many([*runs, "nowhere"]):
                take(result)

    with Client(own_server.address) as client:
        assert all(result.run for result in client.start_many(starts))
        if blocking:
            for result in client.wait_many([*runs, "nowhere"]):
                take(result)
    if not blocking:
        asyncio.run(take_all())
    restarted.join()
    told = {result.run_id: result for result in results}
    assert sorted(told) == sorted(result.run_id for result in results) == sorted([*runs, "nowhere"])
    assert isinstance(told.pop("nowhere").error, RunNotFound)
    assert all(result.run and result.run.succeeded for result in told.values())
