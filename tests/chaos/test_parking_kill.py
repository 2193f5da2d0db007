"""kill -9 at the points of parking and waking: a run that sleeps, asks, waits for a signal and a child ends well.

Every wait of it is parked at once, so the points of the seam are those of parks, wakes and replays, too.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress

import grpc
import pytest

from tests.helpers import judge
from tests.helpers.rpc import Rpc, state_of
from tests.helpers.server import KILLED, ServerProcess, create_effects_table, effects
from tests.helpers.waiting import eventually

POINTS = 66
"""Points of the run, its child's included; some more lie behind its end."""

SAMPLED = 3

ALL_POINTS = bool(os.environ.get("PERDURE_TEST_ALL_POINTS"))
"""Whether to die at all of them (`make chaos`), not at some that the seed chooses."""


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_effects_table(database_url)
    return database_url


@pytest.fixture
def server(url: str) -> Iterator[ServerProcess]:
    server = ServerProcess(url, "tests.helpers.chaos", PERDURE_PARK_AFTER="0")
    try:
        yield server
    finally:
        server.__exit__()


def drive(rpc: Rpc, run_id: str, seconds: float) -> bool:
    """Starts the run, or finds it, gives it what it waits for when it waits, and returns whether it ended well."""
    rpc.start("storied", {}, run_id=run_id, request_id=run_id)

    def over() -> bool:
        run = rpc.get(run_id)
        if run.pending_approvals:
            rpc.decide(rpc.approval_of(run_id).approval_id)
        elif state_of(run) == "AWAITING_INPUT":
            rpc.signal(run_id, "told", request_id=f"{run_id}-signal")
        return state_of(run) == "SUCCEEDED"

    return eventually(over, seconds)


def survives(server: ServerProcess, point: int, run_id: str) -> bool:
    """Runs it on a server that dies at a point; returns whether it ended before that."""
    server.start(PERDURE_CHAOS_KILL_AT=str(point))
    with Rpc(server.address) as rpc, suppress(grpc.RpcError):
        return drive(rpc, run_id, 30)
    assert server.wait_for_end() == KILLED, server.log[-3000:]
    return False


@pytest.mark.timeout(900)
def test_a_run_that_parks_survives_a_kill_at_every_point(server: ServerProcess, url: str, rng: random.Random) -> None:
    points = range(1, POINTS + 1)
    deaths = 0
    for point in points if ALL_POINTS else sorted(rng.sample(points, SAMPLED)):
        run_id = f"parks-{point}"
        died = not survives(server, point, run_id)
        deaths += died
        if died:
            server.start()
            with Rpc(server.address) as rpc:
                assert drive(rpc, run_id, 30)
        server.kill()
        log = judge.assert_consistent(url, f"default.{run_id}.r")
        judge.assert_consistent(url, f"default.{run_id}.r-3")
        done = effects(url, run_id)
        assert list(dict.fromkeys(done)) == ["flaky 1", "flaky 2", "count 0"]
        assert len(done) - 3 <= 2 * died, f"a death repeats the step that it met, and no other: {done}"
        assert judge.output_of(url, f"default.{run_id}.r") == ["after 2", True, 0, "child 1", "told"]
        kinds = [event.kind for event in log]
        assert kinds.count("approval_requested") == kinds.count("approval_decided") == 1
        assert sum(bool(event.data.get("parked")) for event in log) >= 2, "it was parked"
    assert deaths > 0
