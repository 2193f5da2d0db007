"""A server that is told to stop: what it finishes, what it hands over and when, and what it tells its callers.

One server stops once, with runs of all kinds on it; the tests look at what came of that.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from perdure_client import EventKind

from tests.helpers import judge
from tests.helpers.rpc import Reading, Refusal, Rpc, refusal_of
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, free_port, scaled

AGENTS = ("tests.helpers.agents", "tests.helpers.hanging_agents")
LONG_TTL_S = scaled(120)
"""So long that whoever waits for the reapers is seen."""
DRAIN_S = scaled(8)
GRACE_S = scaled(8)
"""Beyond the drain timeout: what a busy machine needs for the end of a process."""
SLOW_STEP_S = 1.5
HANDED_OVER_AT_ONCE = ("listening", "waiting-sync")
CUT_OFF = ("hanging", "hanging-sync")


@dataclass
class Stop:
    """What was seen while a server stopped.

    Attributes:
        runs: The ids of its runs, by what they do.
        early: Which of them another server had taken while it still lived.
        took_s: From SIGTERM to its end.
        status: Its exit status.
        watch: How a watch at it ended.
        start: How a start at it was refused; None when it was accepted.
        started: The run of that start.
        not_serving: Whether health said so.
        draining: Whether its lease said so.
    """

    url: str
    at_b: Rpc
    runs: dict[str, str]
    early: set[str] = field(default_factory=set)
    took_s: float = 0.0
    status: int = -1
    watch: Refusal | None = None
    start: Refusal | None = None
    started: str = "started-at-a-stopping-server"
    not_serving: bool = False
    draining: bool = False


@pytest.fixture(scope="module")
def stop(database_url: str) -> Iterator[Stop]:
    create_effects_table(database_url)
    environment = {
        "PERDURE_LEASE_TTL": str(LONG_TTL_S),
        "PERDURE_DRAIN_TIMEOUT": str(DRAIN_S),
        # What waits stays in memory: parked runs are on no server, and need no hand-over.
        "PERDURE_PARK_AFTER": "3600",
    }
    health_address = f"127.0.0.1:{free_port()}"
    a = ServerProcess(database_url, *AGENTS, command="serve", PERDURE_HEALTH_ADDRESS=health_address, **environment)
    b = ServerProcess(database_url, *AGENTS, command="serve", **environment)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ServerProcess.start, (a, b)))
        with Rpc(a.address) as at_a, Rpc(b.address) as at_b, grpc.insecure_channel(health_address) as channel:
            seen = Stop(database_url, at_b, _start_all(at_a, database_url))
            watch = Reading(at_a.watch(seen.runs["listening"], timeout=60))
            eventually(lambda: watch.responses)
            _stop(a, at_a, seen, health_pb2_grpc.HealthStub(channel))
            watch.join()
            seen.watch = watch.refusal
            yield seen
    finally:
        a.__exit__()
        b.__exit__()


def _start_all(at_a: Rpc, url: str) -> dict[str, str]:
    """Starts runs of all kinds; returns when each is where it is to be found by SIGTERM."""
    runs = {
        "listening": at_a.start("listener"),
        "waiting-sync": at_a.start("waiting-sync"),
        "hanging": at_a.start("hanging"),
        "hanging-sync": at_a.start("hanging-sync"),
        "short": at_a.start("counter", {"steps": 60, "delay_s": 0.1}),
    }
    for name in HANDED_OVER_AT_ONCE:
        at_a.until(runs[name], "AWAITING_INPUT")
    for name in CUT_OFF:
        eventually(lambda name=name: effects(url, runs[name]) == ["hangs"])
    runs["slow"] = at_a.start("counter", {"steps": 2, "delay_s": SLOW_STEP_S})
    eventually(lambda: effects(url, runs["slow"]) == ["count 0"])
    eventually(lambda: len(effects(url, runs["short"])) >= 3)
    runs["between"] = at_a.start("between-steps")
    eventually(lambda: effects(url, runs["between"]) == ["before"])
    return runs


def _stop(a: ServerProcess, at_a: Rpc, seen: Stop, health: health_pb2_grpc.HealthStub) -> None:
    process = a._process
    assert process is not None
    began = time.monotonic()
    process.terminate()

    def not_serving() -> bool:
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=scaled(5))
        return bool(answer.status == health_pb2.HealthCheckResponse.NOT_SERVING)

    seen.not_serving = eventually(not_serving, what="health says that it stops")
    seen.start = refusal_of(lambda: at_a.start("counter", {"steps": 1}, run_id=seen.started))
    while process.poll() is None and time.monotonic() - began < DRAIN_S + GRACE_S:
        seen.draining = seen.draining or _says_draining(seen.url)
        taken = {name for name in seen.runs if seen.at_b.get(seen.runs[name]).execution == 2}
        if process.poll() is None:
            seen.early |= taken
        _pause()
    seen.took_s = time.monotonic() - began
    seen.status = a.wait_for_end()


def _pause() -> None:
    until = time.monotonic() + 0.1
    eventually(lambda: time.monotonic() >= until)


def _says_draining(url: str) -> bool:
    with sql(url) as connection:
        rows = connection.execute(
            "SELECT count(*) FROM perdure.executor WHERE draining AND tombstoned_at IS NULL"
        ).fetchall()
    return bool(rows[0][0])


def wake(stop: Stop) -> None:
    """Sends what two of the runs wait for, once."""
    for name in HANDED_OVER_AT_ONCE:
        stop.at_b.signal(stop.runs[name], "hello", request_id=f"wakes {name}")


def test_it_ends_well_and_in_time_although_a_step_hangs_in_its_thread(stop: Stop) -> None:
    assert stop.status == 0
    assert stop.took_s < DRAIN_S + GRACE_S


def test_health_and_its_lease_say_that_it_stops(stop: Stop) -> None:
    assert stop.not_serving
    assert stop.draining


def test_a_watcher_is_told_to_move_and_when(stop: Stop) -> None:
    assert stop.watch is not None
    assert (stop.watch.code.name, stop.watch.reason) == ("UNAVAILABLE", "DRAINING")
    assert stop.watch.retry_delay_s is not None


def test_a_start_at_it_is_kept_or_refused_for_a_moment(stop: Stop) -> None:
    if stop.start is None:
        assert stop.at_b.output_of(stop.started) == {"total": 0}
    else:
        assert stop.start.code.name == "UNAVAILABLE"
        assert stop.start.retry_delay_s is not None
        assert stop.at_b.start("counter", {"steps": 1}, run_id=stop.started)
    assert stop.at_b.get(stop.started).execution == 1


def test_what_waits_or_is_between_two_steps_goes_on_elsewhere_while_it_still_stops(stop: Stop) -> None:
    assert {*HANDED_OVER_AT_ONCE, "short", "slow", "between"} <= stop.early


def test_steps_in_progress_finish_and_are_not_repeated(stop: Stop) -> None:
    for name, steps in (("short", 60), ("slow", 2)):
        run_id = stop.runs[name]
        eventually(lambda run_id=run_id: stop.at_b.get(run_id).output_json, 30)
        assert effects(stop.url, run_id) == [f"count {number}" for number in range(steps)]


def test_steps_that_hang_are_repeated_elsewhere(stop: Stop) -> None:
    for name in CUT_OFF:
        assert stop.at_b.output_of(stop.runs[name]) == "went on"
        assert effects(stop.url, stop.runs[name]) == ["hangs", "hangs"]


def test_code_between_two_steps_that_goes_on_after_the_hand_over_begins_no_step(stop: Stop) -> None:
    assert stop.at_b.output_of(stop.runs["between"]) == "after"
    assert effects(stop.url, stop.runs["between"]) == ["before", "after"]


def test_what_waits_is_woken_by_its_signal_elsewhere(stop: Stop) -> None:
    wake(stop)
    assert stop.at_b.output_of(stop.runs["listening"]) == ["hello"]
    assert stop.at_b.output_of(stop.runs["waiting-sync"]) == ["quick", "hello"]
    assert effects(stop.url, stop.runs["waiting-sync"]) == ["quick"]


def test_a_hand_over_says_so_and_counts_no_attempt(stop: Stop) -> None:
    wake(stop)
    for name, run_id in stop.runs.items():
        stop.at_b.end_of(run_id)
        log = judge.assert_consistent(stop.url, f"default.{run_id}.r")
        reasons = [event.data["reason"] for event in log if event.data.get("to") == "QUEUED"]
        assert len(reasons) == 1, name
        assert "handed over" in reasons[0], name
        assert [event.execution for event in log][-1] == 2
        with sql(stop.url) as connection:
            (counted,) = connection.execute(
                "SELECT recovery_attempts FROM dbos.workflow_status WHERE workflow_uuid = %s", (f"default.{run_id}.r",)
            ).fetchall()
        assert counted == (1,), name
        if EventKind.RECOVERED in {event.kind for event in log}:
            (recovered,) = (event for event in log if event.kind is EventKind.RECOVERED)
            assert recovered.data["gap_ms"] <= GRACE_S * 1000


def test_a_second_signal_ends_it_at_once(own_database_url: str) -> None:
    server = ServerProcess(own_database_url, *AGENTS, command="serve", PERDURE_DRAIN_TIMEOUT=str(scaled(60)))
    try:
        server.start()
        with Rpc(server.address) as rpc:
            run_id = rpc.start("hanging-sync")
            eventually(lambda: effects(own_database_url, run_id) == ["hangs"])
        process = server._process
        assert process is not None
        process.terminate()
        eventually(lambda: "server.stopping" in server.log)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert server.wait_for_end() == 130
        assert time.monotonic() - began < scaled(30)
    finally:
        server.__exit__()
