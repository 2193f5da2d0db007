"""A StartAgent that waits: a run's end and output in the call that starts it, and what becomes of that in between."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_client import Client

from tests.helpers.payload_agents import noise
from tests.helpers.rpc import Rpc, duration, in_seconds, new_id, refused, state_of
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, scaled

AGENTS = ("tests.helpers.agents", "tests.helpers.payload_agents", "tests.helpers.bulky_agents")
LARGE, HUGE = 1_500_000, 5_000_000
"""More than a row holds, and more than a message."""


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[ServerProcess]:
    """A server with the agents of this module."""
    create_effects_table(database_url)
    with ServerProcess(database_url, *AGENTS) as process:
        yield process


def started(rpc: Rpc, agent: str, run_input: Any = None, wait_s: float = 20, **fields: Any) -> pb.StartAgentResponse:
    return rpc.start_call(agent, run_input, wait=duration(scaled(wait_s)), **fields)


def waiting(rpc: Rpc) -> list[str]:
    """Returns the runs that wait for a signal."""
    request = pb.ListRunsRequest(states=[run_pb.AGENT_RUN_STATE_AWAITING_INPUT])
    return [run.run_id for run in rpc.runs.ListRuns(request, timeout=scaled(20)).runs]


@pytest.mark.parametrize(
    ("agent", "run_input", "output"),
    [
        ("counter", {"steps": 2}, {"total": 1}),
        ("counter", {"steps": 0}, {"total": 0}),
        ("sync-counter", {"steps": 2}, 2),
        ("sleeper", {"seconds": 0.1}, "slept"),
        ("blocking", {"seconds": 0.1}, "done"),
    ],
)
def test_a_start_that_waits_answers_with_the_end_and_the_output(
    rpc: Rpc, agent: str, run_input: Any, output: Any
) -> None:
    answer = started(rpc, agent, run_input, run_id=(run_id := new_id()))
    assert (answer.created, state_of(answer.run)) == (True, "SUCCEEDED")
    full = rpc.get(run_id)
    assert json.loads(answer.run.output_json) == output
    assert full.input_json
    full.ClearField("input_json")
    full.ClearField("input_bytes")
    assert answer.run == full, "all that is known of it, but the input, which its caller has"


def test_an_output_of_none_is_an_output(rpc: Rpc) -> None:
    answer = started(rpc, "silent")
    assert (state_of(answer.run), answer.run.output_json, answer.run.output_bytes) == ("SUCCEEDED", "null", 4)


@pytest.mark.parametrize("size", [20_000, LARGE, HUGE])
def test_a_large_output_comes_with_the_answer_or_is_read(rpc: Rpc, server: ServerProcess, size: int) -> None:
    answer = started(rpc, "keeper", {"size": size}, run_id=(run_id := new_id()))
    assert answer.run.output_bytes == size + 2
    assert answer.run.output_json == ("" if size == HUGE else json.dumps(noise(size)))
    with Client(server.address) as client:
        assert client.run("keeper", {"size": size}, run_id=run_id) == noise(size)


def test_a_run_that_was_there_is_waited_for_as_well(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("counter", {"steps": 2, "delay_s": 0.2}, run_id=new_id())
    for wait_s in (20, 0.1):  # while it runs, and when it has ended
        answer = started(rpc, "counter", {"steps": 2, "delay_s": 0.2}, wait_s, run_id=run_id, request_id=new_id())
        assert (answer.created, state_of(answer.run)) == (False, "SUCCEEDED")
        assert json.loads(answer.run.output_json) == {"total": 1}
    assert effects(database_url, run_id) == ["count 0", "count 1"]


def test_one_that_ended_long_ago_is_read(own_server: ServerProcess) -> None:
    """No server knows its end by itself: another process answers."""
    run_id = new_id()
    with own_server, Rpc(own_server.address) as own:
        started(own, "counter", {"steps": 1}, run_id=run_id)
        own_server.kill()
        own_server.start()
        answer = started(own, "counter", {"steps": 1}, run_id=run_id)
        assert (answer.created, answer.run.output_json) == (False, '{"total":0}')


@pytest.mark.parametrize("wait_s", [0.0, 0.3])
def test_the_answer_comes_when_the_time_is_up_and_the_run_goes_on(rpc: Rpc, wait_s: float) -> None:
    began = time.monotonic()
    answer = rpc.start_call("listener", {}, wait=duration(wait_s))
    assert wait_s <= time.monotonic() - began < wait_s + scaled(2)
    assert answer.created
    assert not answer.run.HasField("end_time")
    rpc.signal(answer.run.run_id)
    assert rpc.output_of(answer.run.run_id) == [1]


def test_the_answer_comes_before_the_callers_deadline(rpc: Rpc) -> None:
    request = pb.StartAgentRequest(agent="listener", run_id=new_id(), wait=duration(60))
    answer = rpc.runs.StartAgent(request, timeout=scaled(1.0))
    assert state_of(answer.run) == "AWAITING_INPUT"
    rpc.cancel(answer.run.run_id)


def test_a_run_that_fails_or_is_cancelled_has_ended(rpc: Rpc) -> None:
    answer = started(rpc, "failing")
    assert (state_of(answer.run), answer.run.failure.type) == ("FAILED", "FlakyError")
    assert (answer.run.output_json, answer.run.output_bytes) == ("", 0)
    run_id = new_id()
    request = pb.StartAgentRequest(agent="listener", run_id=run_id, wait=duration(scaled(20)))
    call = rpc.runs.StartAgent.future(request, timeout=scaled(30))
    eventually(lambda: run_id in waiting(rpc))
    rpc.cancel(run_id)
    assert state_of(call.result().run) == "CANCELLED"


def test_a_start_for_later_is_waited_for(rpc: Rpc) -> None:
    answer = started(rpc, "counter", {"steps": 1}, start_time=in_seconds(0.5))
    assert state_of(answer.run) == "SUCCEEDED"
    answer = rpc.start_call("counter", {"steps": 1}, delay=duration(60), wait=duration(0.1))
    assert state_of(answer.run) == "SCHEDULED"
    rpc.cancel(answer.run.run_id)


def test_what_is_only_checked_is_not_waited_for(rpc: Rpc) -> None:
    began = time.monotonic()
    answer = started(rpc, "counter", {"steps": 1}, validate_only=True)
    assert time.monotonic() - began < scaled(5)
    assert not answer.created


def test_a_wait_that_is_none_is_refused_and_starts_nothing(rpc: Rpc, database_url: str) -> None:
    run_id = new_id()
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "wait"):
        rpc.start_call("counter", {}, wait=duration(-1), run_id=run_id)
    [item] = rpc.runs.StartAgents(
        iter([pb.StartAgentsRequest(start=pb.StartAgentRequest(agent="counter", run_id=run_id, wait=duration(1)))])
    )
    assert (item.error.code, "WaitRuns" in item.error.message) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], True)
    with sql(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM perdure.run WHERE run_id = %s", [run_id]).fetchone() == (0,)


def test_run_of_the_client_survives_a_kill_while_its_start_waits(
    own_server: ServerProcess, own_database_url: str
) -> None:
    run_input = {"steps": 3, "delay_s": 0.4}
    with own_server, Client(own_server.address) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.run, "counter", run_input, run_id="through-a-kill")
        eventually(lambda: effects(own_database_url, "through-a-kill"), what="the first step")
        own_server.kill()
        own_server.start()
        assert running.result(scaled(30)) == {"total": 3}
    seen = effects(own_database_url, "through-a-kill")
    assert sorted(set(seen)) == ["count 0", "count 1", "count 2"]
    assert len(seen) <= 4, "at most the body under way ran twice"


def test_a_server_that_stops_answers_a_start_that_waits_with_the_run(
    own_server: ServerProcess, own_database_url: str
) -> None:
    with own_server, Rpc(own_server.address) as own, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(started, own, "listener", {}, run_id="waited-for")
        eventually(lambda: waiting(own) == ["waited-for"])
        assert own_server.stop() == 0
        run = answer.result(scaled(5)).run
        assert (run.run_id, run.HasField("end_time")) == ("waited-for", False)
