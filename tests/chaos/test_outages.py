"""A database that is away, silent, or has no connection left: calls are told so soon, and runs wait and go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.helpers import judge
from tests.helpers.proxy import DatabaseProxy
from tests.helpers.rpc import Refusal, Rpc, new_id, refusal_of
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, scaled

POOL = 4
STEPS = 20
STARTS = 16
"""At once, several times the connections there are."""
SERVERS = 3
OUTAGE_S = 4.0
BURST_S = 0.25
"""What counts as at once."""


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_effects_table(database_url)
    return database_url


@pytest.fixture
def proxy(url: str) -> Iterator[DatabaseProxy]:
    proxy = DatabaseProxy(url)
    yield proxy
    proxy.close()


def _judge_counters(url: str, rpc: Rpc, run_ids: list[str], steps: int) -> None:
    for run_id in run_ids:
        assert rpc.output_of(run_id) == {"total": sum(range(steps))}
        assert rpc.get(run_id).execution == 1, "it never lost its executor"
        log = judge.assert_consistent(url, f"default.{run_id}.r")
        judge.assert_effects(url, run_id, log, *[f"count {number}" for number in range(steps)], deaths=0)


def test_when_all_connections_are_in_use_callers_are_told_soon_and_runs_wait(url: str) -> None:
    with (
        ServerProcess(url, PERDURE_DATABASE_POOL_SIZE=str(POOL), PERDURE_LEASE_TTL=str(scaled(2))) as server,
        Rpc(server.address) as rpc,
        ThreadPoolExecutor(STARTS) as pool,
    ):
        runs = [rpc.start("counter", {"steps": STEPS, "delay_s": 0.05}) for _ in range(6)]
        eventually(lambda: len(effects(url, runs[-1])) >= 2)
        new = [new_id("late") for _ in range(STARTS)]

        def start(run_id: str) -> tuple[float, Refusal | None]:
            began = time.monotonic()
            refusal = refusal_of(lambda: rpc.start("counter", {"steps": 1}, run_id=run_id, request_id=run_id))
            return time.monotonic() - began, refusal

        with sql(url) as holder:
            # Whoever writes an event waits for this, and keeps its connection.
            holder.execute("LOCK TABLE perdure.run_event IN ACCESS EXCLUSIVE MODE")
            answers = [pool.submit(start, run_id) for run_id in new]

            def shed() -> list[tuple[float, Refusal | None]]:
                return [one.result() for one in answers if one.done()]

            # At most the pool's connections are held by calls that wait for the lock; the others are shed.
            eventually(lambda: len(shed()) >= STARTS - POOL, 15)
            for took_s, refusal in shed():
                assert refusal is not None, "nothing can be committed"
                assert (refusal.code.name, refusal.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
                assert refusal.retry_delay_s
                assert took_s < scaled(6)
            # Longer than the leases: what keeps this executor alive does not stand in line.
            with sql(url) as connection:
                expiry = "SELECT count(*) FROM perdure.executor WHERE tombstoned_at IS NULL AND expires_at > now()"
                began = time.monotonic()
                eventually(lambda: time.monotonic() - began > scaled(2.5), 5)
                assert connection.execute(expiry).fetchone() == (1,)
        _judge_counters(url, rpc, runs, STEPS)
        for answer in answers:
            answer.result()
        for run_id in new:
            rpc.start("counter", {"steps": 1}, run_id=run_id, request_id=run_id)
        _judge_counters(url, rpc, new, 1)


def test_a_database_that_says_nothing_is_left_and_found_again(url: str, proxy: DatabaseProxy) -> None:
    environment = {"PERDURE_STATEMENT_TIMEOUT": "1", "PERDURE_LEASE_TTL": "1.5"}
    separator = "&" if "?" in proxy.url else "?"
    with (
        ServerProcess(
            f"{proxy.url}{separator}connect_timeout=2",
            PERDURE_TEST_EFFECTS_URL=url,
            PERDURE_PARK_AFTER="5",
            **environment,
        ) as server,
        Rpc(server.address) as rpc,
    ):
        run_id = rpc.start("counter", {"steps": 40, "delay_s": 0.05})
        waiting = rpc.start("asker")
        approval = rpc.approval_of(waiting)
        eventually(lambda: len(effects(url, run_id)) >= 4)
        proxy.freeze()
        began = time.monotonic()
        refusal = refusal_of(lambda: rpc.get(run_id))
        assert refusal is not None
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
        assert time.monotonic() - began < scaled(15), "statement timeout, grace, and an attempt to connect"
        done = len(effects(url, run_id))
        proxy.mend()
        eventually(lambda: len(effects(url, run_id)) > done, 20, what="the run goes on")
        eventually(lambda: refusal_of(lambda: rpc.decide(approval.approval_id)) is None, 20)
        assert rpc.output_of(waiting)["approved"]
        _judge_counters(url, rpc, [run_id], 40)


def test_after_an_outage_nobody_has_lost_anything_and_not_all_come_back_at_once(url: str, proxy: DatabaseProxy) -> None:
    with ExitStack() as stack:
        servers = [ServerProcess(proxy.url, command="serve", PERDURE_TEST_EFFECTS_URL=url) for _ in range(SERVERS)]
        for server in servers:
            stack.callback(server.__exit__)
        with ThreadPoolExecutor(SERVERS) as pool:
            list(pool.map(ServerProcess.start, servers))
        stubs = [stack.enter_context(Rpc(server.address)) for server in servers]
        runs = [rpc.start("counter", {"steps": 30, "delay_s": 0.1}) for rpc in stubs for _ in range(4)]
        for run_id in runs:
            eventually(lambda run_id=run_id: effects(url, run_id))
        proxy.cut()
        began = time.monotonic()
        eventually(lambda: time.monotonic() - began > OUTAGE_S, OUTAGE_S + 2)
        mended = time.monotonic()
        proxy.mend()
        _judge_counters(url, stubs[0], runs, 30)
    away = [at for at in proxy.accepted if began + BURST_S < at < mended]
    assert away, "they kept looking for it"
    busiest = max(Counter(int((at - began) / BURST_S) for at in away).values())
    assert busiest < len(away) / 2, f"{busiest} of {len(away)} attempts came at once"
    assert len(away) < SERVERS * 60 * (mended - began), "and they did not hammer at it"
