"""A fleet that is restarted under load, that loses its database for a while, and that looks after the dead together."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from perdure_client import Client, EventKind, RunEvent
from perdure_service.domain.events import decode_events
from perdure_service.store import executors
from perdure_service.store.dbos_tables import APPLICATION

from tests.helpers import judge
from tests.helpers.proxy import DatabaseProxy
from tests.helpers.rpc import Rpc, new_id
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, scaled

LONG_TTL_S = scaled(60)
"""So long that a run which is not handed over, but left to the reapers, would be seen."""
SHORT_TTL_S = scaled(1)
NOT_PARKED_S = "3600"
PAUSE_TTLS = 4
"""For how many times to live the database is away."""
STEPS = 6
DELAYED_S = 10
"""The longest that a run may stand still in a restart: a few seconds, and what a busy machine adds."""
ORPHANS = 2 * executors.BATCH + 50


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_effects_table(database_url)
    return database_url


def start_together(servers: list[ServerProcess]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(ServerProcess.start, servers))


def end(servers: list[ServerProcess]) -> None:
    for server in servers:
        server.__exit__()


def workflow_of(run_id: str) -> str:
    return f"default.{run_id}.r"


def counted(steps: int) -> list[str]:
    return [f"count {number}" for number in range(steps)]


# ---- a rolling restart -----------------------------------------------------------------------------------------------


class Load:
    """Callers that start runs, watch or wait for them, and answer what they ask, until they are told to stop.

    Attributes:
        runs: The runs that have succeeded, with what their watchers saw (nothing where it was a wait).
    """

    def __init__(self, client: Client) -> None:
        self.runs: dict[str, list[RunEvent]] = {}
        self._client = client
        self._over = threading.Event()

    def watch(self) -> None:
        """Starts counters, and watches each."""
        while not self._over.is_set():
            run = self._client.start("counter", {"steps": STEPS, "delay_s": 0.05, "text": "word "})
            self.runs[run.run_id] = [event for update in self._client.watch(run) for event in update.events]
            assert self._client.get(run).output == {"total": sum(range(STEPS))}

    def wait(self) -> None:
        """Starts counters, and waits for each."""
        while not self._over.is_set():
            run = self._client.start("counter", {"steps": STEPS, "delay_s": 0.05, "text": "word "})
            assert self._client.wait(run).output == {"total": sum(range(STEPS))}
            self.runs[run.run_id] = []

    def run(self) -> None:
        """Runs counters, each in one call."""
        while not self._over.is_set():
            run_id = new_id("in-one-call")
            run_input = {"steps": STEPS, "delay_s": 0.05, "text": "word "}
            assert self._client.run("counter", run_input, run_id=run_id) == {"total": sum(range(STEPS))}
            self.runs[run_id] = []

    def steer(self) -> None:
        """Starts runs that wait for signals, and sends those."""
        while not self._over.is_set():
            run = self._client.start("listener", {"signals": 3})
            for number in range(3):
                self._client.signal(run, "more", number)
            assert self._client.wait(run).output == [0, 1, 2]

    def stop(self) -> None:
        """Lets every caller finish what it is at."""
        self._over.set()


@contextmanager
def under_load(client: Client) -> Iterator[tuple[Load, Callable[[], None]]]:
    """Makes callers call until the end of the `with`; yields them, and what fails when one of them has failed."""
    load = Load(client)
    with ThreadPoolExecutor(5) as pool:
        callers: list[Future[None]] = [pool.submit(one) for one in (load.watch, load.wait, load.run, load.steer)]

        def check() -> None:
            for caller in callers:
                if caller.done():
                    caller.result()

        try:
            yield load, check
        finally:
            load.stop()
    for caller in callers:
        caller.result()


def test_servers_that_are_restarted_in_turn_under_load_fail_no_call_and_repeat_no_step(url: str) -> None:
    environment = {"PERDURE_LEASE_TTL": str(LONG_TTL_S), "PERDURE_DRAIN_TIMEOUT": "5"}
    servers = [ServerProcess(url, command="serve", **environment) for _ in range(2)]
    addresses = ",".join(server.address for server in servers)
    try:
        start_together(servers)
        with Client(f"ipv4:{addresses}", timeout=scaled(30)) as client, under_load(client) as (load, check):
            for server in servers:
                known = len(load.runs)
                eventually(lambda known=known: check() or len(load.runs) > known + 3, 30, what="runs come to their end")
                assert server.stop() == 0
                known = len(load.runs)
                eventually(lambda known=known: check() or len(load.runs) > known + 1, 30, what="the other one serves")
                server.start()
        for run_id, seen in load.runs.items():
            log = judge.assert_consistent(url, workflow_of(run_id))
            assert effects(url, run_id) == counted(STEPS), "no body ran twice"
            assert judge.text_of(log) == "word " * STEPS
            gaps = [later.time_ms - earlier.time_ms for earlier, later in itertools.pairwise(log)]
            assert max(gaps) < scaled(DELAYED_S) * 1000
            if seen:
                assert [event.sequence for event in seen] == list(range(1, len(log) + 1)), "all of it, and once"
        with sql(url) as connection:
            left = connection.execute("SELECT count(*) FROM perdure.run WHERE ended_at IS NULL").fetchall()
        assert left == [(0,)], "every start that was acknowledged has come to its end"
    finally:
        end(servers)


# ---- a database that is away -----------------------------------------------------------------------------------------


def test_a_database_that_is_away_for_several_leases_ends_no_executor_and_repeats_no_step(url: str) -> None:
    proxy = DatabaseProxy(url)
    # What waits stays in memory, so that a second execution can only come of a give-back.
    environment = {"PERDURE_LEASE_TTL": str(SHORT_TTL_S), "PERDURE_PARK_AFTER": NOT_PARKED_S}
    environment["PERDURE_TEST_EFFECTS_URL"] = url
    servers = [ServerProcess(proxy.url, command="serve", **environment) for _ in range(2)]
    try:
        start_together(servers)
        with Rpc(servers[0].address) as at_a, Rpc(servers[1].address) as at_b:
            runs = [rpc.start("counter", {"steps": 40, "delay_s": 0.1, "text": "word "}) for rpc in (at_a, at_b)]
            waiting = at_a.start("listener", {})
            at_a.until(waiting, "AWAITING_INPUT")
            for run_id in runs:
                eventually(lambda run_id=run_id: len(effects(url, run_id)) >= 5)
            proxy.cut()
            away_until = time.monotonic() + PAUSE_TTLS * SHORT_TTL_S
            eventually(lambda: time.monotonic() > away_until)
            proxy.mend()
            for run_id, rpc in zip(runs, (at_a, at_b), strict=True):
                eventually(lambda run_id=run_id: len(effects(url, run_id)) >= 40, 60, what="it goes on")
                assert rpc.output_of(run_id) == {"total": sum(range(40))}
            eventually(lambda: at_a.signal(waiting, "hello", request_id="after the pause") or True)
            assert at_a.output_of(waiting) == ["hello"]
        for run_id in (*runs, waiting):
            log = judge.assert_consistent(url, workflow_of(run_id))
            assert EventKind.RECOVERED not in {event.kind for event in log}
            assert {event.execution for event in log if event.execution} == {1}
        for run_id in runs:
            # A body of this agent writes to the database itself: one that was cut off there may be repeated by nobody.
            assert effects(url, run_id) == counted(40)
        for server in servers:
            assert "lease.lost" not in server.log
            assert server.stop() == 0, "it has never ended"
    finally:
        end(servers)
        proxy.close()


# ---- two reapers -----------------------------------------------------------------------------------------------------


def test_servers_that_look_after_the_dead_at_once_give_each_run_back_once(own_database_url: str) -> None:
    url = own_database_url
    names = [new_id("orphan") for _ in range(ORPHANS)]
    with sql(url) as connection:
        connection.execute(
            "INSERT INTO perdure.executor (executor_id, application_version, address, max_running, expires_at) "
            "VALUES ('dead', '1', '', 1, now() - INTERVAL '1 second')"
        )
        for name in names:
            connection.execute(
                "INSERT INTO dbos.workflow_status (workflow_uuid, status, name, executor_id, application_name, "
                "application_version, owner_xid, created_at, updated_at, recovery_attempts, priority) "
                "VALUES (%s, 'PENDING', 'no-code-of-it', 'dead', %s, '1', 'a token', 1, 1, 1, 0)",
                (name, APPLICATION),
            )
    servers = [ServerProcess(url, command="serve") for _ in range(2)]
    try:
        start_together(servers)
        with sql(url) as connection:
            rows = connection.execute(
                "SELECT status, owner_xid, queue_name, recovery_attempts FROM dbos.workflow_status WHERE name = %s",
                ("no-code-of-it",),
            ).fetchall()
            gone = connection.execute(
                "SELECT tombstoned_at IS NOT NULL FROM perdure.executor WHERE executor_id = 'dead'"
            ).fetchall()
            packs = connection.execute("SELECT workflow_id, events FROM perdure.run_event").fetchall()
        assert Counter(rows) == {("ENQUEUED", None, "perdure", 1): ORPHANS}
        assert gone == [(True,)]
        recovered = Counter(dict.fromkeys(names, 0))
        for name, text in packs:
            recovered[name] += [event.kind for event in decode_events(text, 1)].count(EventKind.RECOVERED)
        assert Counter(recovered.values()) == {1: ORPHANS}
    finally:
        end(servers)
