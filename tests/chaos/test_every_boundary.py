"""One run that does everything, and a server that dies at each boundary of its checkpoints: nothing is lost or doubled.

Its client is the real one: it starts, signals, decides and watches across the kill, and knows nothing of it. The run
has steps with streamed text, a child, an approval, a signal and a sleep; its steps write a ledger under their
idempotency keys. It is tried with waits that stay in memory, and with waits that are parked at once.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from perdure_client import Client, EventKind, Run

from tests.helpers import judge
from tests.helpers.ledger import Task, assert_ledger, create_ledger
from tests.helpers.server import KILLED, ServerProcess
from tests.helpers.waiting import eventually, scaled

AGENTS = ("tests.helpers.chaos", "tests.helpers.ledger")
PLAN: list[Task] = ["enter", "hear", "ask", "sleep", "child", "enter"]
OUTPUT: list[Any] = ["entry 0", "louder", True, "slept", "child 4", "entry 5"]
PARK_AFTER = {"in memory": "600", "parked": "0"}
POINTS = {"in memory": 40, "parked": 70}
"""As many as the run has, or some more."""
SAMPLED = 4
ALL_POINTS = bool(os.environ.get("PERDURE_TEST_ALL_POINTS"))
"""Whether to die at all of them (`make chaos`), not at some that the seed chooses."""


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_ledger(database_url)
    return database_url


@pytest.fixture
def server(url: str) -> Iterator[ServerProcess]:
    server = ServerProcess(url, *AGENTS)
    try:
        yield server
    finally:
        server.__exit__()


@dataclass
class Caller:
    """Somebody who calls a server that may die: what the run's watchers have seen, alone and with its children."""

    address: str
    run_id: str
    seen: list[int] = field(default_factory=list)
    family: list[tuple[str, int]] = field(default_factory=list)

    def call(self) -> Run:
        """Brings a run to its end and returns it."""
        with Client(self.address, timeout=scaled(60), connect_timeout=scaled(60)) as client:
            run = client.start("planned", {"plan": list(PLAN), "sleep_s": 0.2}, run_id=self.run_id)
            client.signal(run, "more", "louder")
            with ThreadPoolExecutor(1) as pool:
                family = pool.submit(self._watch_family, client)
                for event in client.watch(run).events():
                    self.seen.append(event.sequence)
                    if event.kind is EventKind.APPROVAL_REQUESTED:
                        client.approve(next(iter(client.approvals(run=run))))
                family.result(scaled(60))
            return client.get(run)

    def _watch_family(self, client: Client) -> None:
        for event in client.watch(self.run_id, include_children=True).events():
            self.family.append((event.run_id, event.sequence))


def _judge(url: str, caller: Caller, run: Run) -> int:
    """Fails unless the run is as if nothing had happened; returns how many bodies were repeated."""
    workflow_id = f"default.{caller.run_id}.r"
    assert (run.state, run.output) == ("SUCCEEDED", OUTPUT), run
    log = judge.assert_consistent(url, workflow_id)
    assert caller.seen == list(range(1, len(log) + 1)), "a watcher saw every event, and each once"
    (child,) = {run_id for run_id, _ in caller.family} - {caller.run_id}
    child_id = f"{workflow_id}{child.removeprefix(caller.run_id).replace('.', '-')}"
    child_log = judge.assert_consistent(url, child_id)
    for run_id, length in ((caller.run_id, len(log)), (child, len(child_log))):
        assert [n for one, n in caller.family if one == run_id] == list(range(1, length + 1))
    assert judge.text_of(log) == "entry 0\nentry 5\n"
    repeated = assert_ledger(url, workflow_id, log, ["entry 0", "entry 5"])
    return repeated + assert_ledger(url, child_id, child_log, ["child 4"])


def _dies_at(server: ServerProcess, url: str, point: int, run_id: str, park_after: str) -> tuple[bool, int]:
    """Runs it on a server that dies at a point, and is started again; returns whether it died, and repeated bodies."""
    server.start(PERDURE_CHAOS_KILL_AT=str(point), PERDURE_PARK_AFTER=park_after)
    caller = Caller(server.address, run_id)
    with ThreadPoolExecutor(1) as pool:
        call: Future[Run] = pool.submit(caller.call)
        process = server._process
        assert process is not None
        eventually(lambda: call.done() or process.poll() is not None, 60, what="the server dies, or the run ends")
        died = process.poll() is not None
        if died:
            assert server.wait_for_end() == KILLED, server.log[-3000:]
            server.start(PERDURE_PARK_AFTER=park_after)
        run = call.result(scaled(90))
    server.kill()
    return died, _judge(url, caller, run)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("waits", PARK_AFTER)
def test_a_run_that_does_everything_survives_a_kill_at_every_boundary(
    server: ServerProcess, url: str, rng: random.Random, waits: str
) -> None:
    points = range(1, POINTS[waits] + 1)
    deaths = repeated = 0
    for point in points if ALL_POINTS else sorted(rng.sample(points[: POINTS[waits] // 2], SAMPLED)):
        run_id = f"{waits.replace(' ', '-')}-{point}"
        died, bodies = _dies_at(server, url, point, run_id, PARK_AFTER[waits])
        deaths, repeated = deaths + died, repeated + bodies
        if not died:
            break  # the points are used up by the run itself
    assert deaths > 0
    assert repeated <= deaths
    if ALL_POINTS:
        assert deaths < len(points), "there are more points than these"
        assert repeated >= 3, "each of the three steps was repeated, once"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("waits", PARK_AFTER)
def test_every_commit_of_it_may_be_repeated(server: ServerProcess, url: str, waits: str) -> None:
    server.start(PERDURE_CHAOS_AMBIGUOUS="1", PERDURE_PARK_AFTER=PARK_AFTER[waits])
    caller = Caller(server.address, f"repeated-{waits.replace(' ', '-')}")
    run = caller.call()
    server.kill()
    assert _judge(url, caller, run) == 0
