"""Fleets that lose their servers, one after another and all at once, and one with a server whose clock is wrong."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from perdure_client import Client, EventKind

from tests.helpers import judge
from tests.helpers.ledger import Task, assert_ledger, create_ledger
from tests.helpers.rpc import Rpc, duration, in_seconds, state_of
from tests.helpers.server import ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually, scaled

AGENTS = ("tests.helpers.chaos", "tests.helpers.ledger")
TTL_S = scaled(1)
SETTINGS = {"PERDURE_LEASE_TTL": str(TTL_S), "PERDURE_PARK_AFTER": "0.2"}
"""So short that runs are found parked and not parked by every fault."""
PLANS: tuple[list[Task], ...] = (
    ["enter", "enter", "enter", "enter", "enter"],
    ["enter", "hear", "enter", "hear", "enter"],
    ["enter", "ask", "enter"],
    ["enter", "sleep", "child", "enter"],
)
SKEW_S = 3600
SHORT_S = 1.0
"""Of sleeps, delays and deadlines."""
LATE_S = 12
"""How much later a busy machine may be: far from an hour."""
WORKS = 20
"""Steps of a run that works through two deaths."""


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_ledger(database_url)
    create_effects_table(database_url)
    return database_url


@contextmanager
def fleet(url: str, count: int) -> Iterator[list[ServerProcess]]:
    """Serves a database with some servers until the end of the `with`."""
    servers = [ServerProcess(url, *AGENTS, command="serve", **SETTINGS) for _ in range(count)]
    try:
        start_together(servers)
        yield servers
    finally:
        for server in servers:
            server.__exit__()


def start_together(servers: list[ServerProcess]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(ServerProcess.start, servers))


def expected_of(plan: list[Task]) -> tuple[list[object], list[str]]:
    """Returns the output and the entries of a plan whose signals are numbers from 0 and whose approvals are given."""
    signals = itertools.count()
    told: list[object] = []
    for number, task in enumerate(plan):
        answers: dict[Task, object] = {
            "enter": f"entry {number}", "ask": True, "sleep": "slept", "child": f"child {number}",
        }  # fmt: skip
        told.append(next(signals) if task == "hear" else answers[task])
    return told, [f"entry {number}" for number, task in enumerate(plan) if task == "enter"]


class Callers:
    """Callers that start a run, watch it, answer what it asks and check its output, until they are told to stop.

    Attributes:
        finished: The plans of the runs that have come to their end, by run id.
    """

    def __init__(self, client: Client) -> None:
        self.finished: dict[str, list[Task]] = {}
        self._client = client
        self._over = threading.Event()

    def call(self, plan: list[Task]) -> None:
        """Brings runs with a plan to their end, one after another."""
        while not self._over.is_set():
            run = self._client.start("planned", {"plan": plan, "delay_s": 0.05, "sleep_s": 0.3})
            signals = itertools.count()
            for _ in range(plan.count("hear")):
                self._client.signal(run, "more", next(signals))
            seen: list[int] = []
            for event in self._client.watch(run).events():
                seen.append(event.sequence)
                if event.kind is EventKind.APPROVAL_REQUESTED:
                    self._client.approve(next(iter(self._client.approvals(run=run))))
            assert seen == list(range(1, len(seen) + 1)), "all of it, and once"
            assert self._client.get(run).output == expected_of(plan)[0]
            self.finished[run.run_id] = plan

    def stop(self) -> None:
        """Lets every caller finish what it is at."""
        self._over.set()


@contextmanager
def under_load(client: Client) -> Iterator[tuple[Callers, Callable[[int], None]]]:
    """Makes callers call until the end of the `with`; yields them, and what waits until some more runs have ended."""
    callers = Callers(client)
    with ThreadPoolExecutor(len(PLANS)) as pool:
        calls: list[Future[None]] = [pool.submit(callers.call, plan) for plan in PLANS]

        def go_on(runs: int) -> None:
            known = len(callers.finished)

            def more() -> bool:
                for call in calls:
                    if call.done():
                        call.result()
                return len(callers.finished) >= known + runs

            eventually(more, 60, what=f"{runs} more runs come to their end")

        try:
            yield callers, go_on
        finally:
            callers.stop()
    for call in calls:
        call.result()


def judge_all(url: str, finished: dict[str, list[Task]]) -> None:
    """Fails unless these runs, and every child, are whole, and no run of the database is left."""
    for run_id, plan in finished.items():
        workflow_id = f"default.{run_id}.r"
        log = judge.assert_consistent(url, workflow_id)
        entries = expected_of(plan)[1]
        assert_ledger(url, workflow_id, log, entries)
        assert judge.text_of(log) == "".join(f"{entry}\n" for entry in entries)
    with sql(url) as connection:
        rows = connection.execute(
            "SELECT s.workflow_uuid, s.status FROM dbos.workflow_status s JOIN perdure.run r "
            "ON r.workflow_id = s.workflow_uuid WHERE s.name = 'ledger.child'"
        ).fetchall()
    for workflow_id, status in rows:
        assert status == "SUCCESS"
        log = judge.assert_consistent(url, workflow_id)
        assert_ledger(url, workflow_id, log, [judge.output_of(url, workflow_id)])
    with sql(url) as connection:
        left = connection.execute("SELECT workflow_id FROM perdure.run WHERE ended_at IS NULL").fetchall()
    assert left == [], "every start that was acknowledged has come to its end"


def client_of(servers: list[ServerProcess]) -> Client:
    addresses = ",".join(server.address for server in servers)
    return Client(f"ipv4:{addresses}", timeout=scaled(30), reconnect_timeout=scaled(60))


def test_servers_that_are_killed_in_turn_and_all_at_once_under_load_lose_nothing(url: str) -> None:
    with fleet(url, 3) as servers, client_of(servers) as client:
        with under_load(client) as (callers, go_on):
            for server in servers:
                go_on(3)
                server.kill()
                go_on(1)
                server.start()
            go_on(3)
            for server in servers:
                server.kill()
            start_together(servers)
            go_on(3)
        judge_all(url, callers.finished)
        assert len(callers.finished) >= 16


# ---- a server whose clock is wrong -----------------------------------------------------------------------------------


@contextmanager
def skewed_pair(url: str, skew_s: int) -> Iterator[tuple[ServerProcess, ServerProcess, Rpc, Rpc]]:
    """Serves with a server whose clock is wrong, and one of which it is right, which is yet to be started."""
    wrong = ServerProcess(url, *AGENTS, command="serve", PERDURE_CHAOS_CLOCK_SKEW_S=str(skew_s), **SETTINGS)
    right = ServerProcess(url, *AGENTS, command="serve", **SETTINGS)
    try:
        wrong.start()
        with Rpc(wrong.address) as at_wrong, Rpc(right.address) as at_right:
            yield wrong, right, at_wrong, at_right
    finally:
        wrong.__exit__()
        right.__exit__()


def executors_of(url: str) -> set[str]:
    """Returns the executors that nobody has declared gone."""
    with sql(url) as connection:
        rows = connection.execute("SELECT executor_id FROM perdure.executor WHERE tombstoned_at IS NULL").fetchall()
    return {row[0] for row in rows}


def parked_s(url: str, run_id: str) -> float:
    """Returns for how long a run is parked yet, by the database's clock; 0 when it is not."""
    query = (
        "SELECT delay_until_epoch_ms / 1000.0 - extract(epoch FROM now()) FROM dbos.workflow_status "
        "WHERE workflow_uuid = %s AND status = 'DELAYED'"
    )
    with sql(url) as connection:
        row = connection.execute(query, (f"default.{run_id}.r",)).fetchone()
    return 0.0 if row is None else float(row[0])


@pytest.mark.parametrize("skew_s", [SKEW_S, -SKEW_S], ids=["an hour ahead", "an hour behind"])
def test_a_server_whose_clock_is_wrong_is_early_and_late_for_nothing(url: str, skew_s: int) -> None:
    with skewed_pair(url, skew_s) as (_, right, at_wrong, at_right):
        # Alone: a parked sleep ends by the database's clock, and what is left of it is told by the one it began by.
        plans: dict[str, list[Task]] = {}
        slept = at_wrong.start("planned", {"plan": ["sleep", "enter"], "sleep_s": SHORT_S})
        plans[slept] = ["sleep", "enter"]
        assert at_wrong.output_of(slept) == ["slept", "entry 1"]
        right.start()
        living = eventually(lambda: len(found := executors_of(url)) == 2 and found, 20, what="only these two are alive")
        delayed = at_wrong.start("planned", {"plan": ["enter"]}, delay=duration(SHORT_S))
        plans[delayed] = ["enter"]
        asking = at_wrong.start("asker", {"timeout_s": SHORT_S})
        limited = at_right.start("planned", {"plan": ["hear"]}, deadline_time=in_seconds(SHORT_S))
        for run_id, state in (
            (slept, "SUCCEEDED"),
            (delayed, "SUCCEEDED"),
            (asking, "SUCCEEDED"),
            (limited, "EXPIRED"),
        ):
            run = at_right.end_of(run_id)
            assert state_of(run) == state
            took_s = (run.end_time.ToMilliseconds() - run.create_time.ToMilliseconds()) / 1000
            # A deadline is the caller's time, from a moment before the run was created.
            assert SHORT_S - 0.5 <= took_s < SHORT_S + scaled(LATE_S), run_id
        assert at_right.output_of(asking)["state"] == "EXPIRED"

        # Leases are the database's: neither takes the other one for dead, nor loses what it executes.
        working = at_wrong.start("planned", {"plan": ["enter"] * 6, "delay_s": TTL_S / 2})
        plans[working] = ["enter"] * 6
        assert len(at_right.output_of(working)) == 6
        assert at_right.get(working).execution == 1
        assert executors_of(url) == living, "nobody was declared gone"
        judge_all(url, plans)
        for run_id in plans:
            assert EventKind.RECOVERED not in {event.kind for event in judge.log_of(url, f"default.{run_id}.r")}


@pytest.mark.parametrize("skew_s", [SKEW_S, -SKEW_S], ids=["an hour ahead", "an hour behind"])
def test_a_server_whose_clock_is_wrong_is_taken_from_and_takes_over_in_time(url: str, skew_s: int) -> None:
    """A sleep ends by the clock it began by, as DBOS records it: for another host it is shifted, not lost."""
    plan: list[Task] = ["enter"] * WORKS
    with skewed_pair(url, skew_s) as (wrong, right, at_wrong, at_right):
        working = at_wrong.start("planned", {"plan": plan, "delay_s": 0.3})
        sleeping = at_wrong.start("planned", {"plan": ["sleep", "enter"], "sleep_s": SHORT_S})
        at_wrong.until(sleeping, "SLEEPING")
        wrong.kill()
        right.start()
        eventually(lambda: at_right.get(working).execution == 2, LATE_S, what="the right one takes over")
        if skew_s < 0:
            assert at_right.output_of(sleeping) == ["slept", "entry 1"], "to the right one it is over"
        else:
            eventually(lambda: parked_s(url, sleeping) > SKEW_S / 2, LATE_S, what="it sleeps on")
            assert parked_s(url, sleeping) <= SKEW_S + SHORT_S
            assert state_of(at_right.cancel(sleeping)) == "CANCELLED", "whoever does not want to wait need not"
        wrong.start()
        right.kill()
        eventually(lambda: at_wrong.get(working).execution == 3, LATE_S, what="the wrong one takes over")
        assert len(at_wrong.output_of(working)) == WORKS
        judge_all(url, {working: plan} | ({sleeping: ["sleep", "enter"]} if skew_s < 0 else {}))
