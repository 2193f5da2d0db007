"""Recovery: how long runs stand still when the server that executes them is killed.

Several *cells* at once, each a database with two servers. In each, again and again: some runs begin on one server; at a
moment that has nothing to do with its renewals it is killed with SIGKILL; a watcher at the other one takes the time
until each run's next committed step. Then the killed one starts again, and the two change places. A server takes
nothing back before one time to live has passed since its own start, so the next kill waits for that.

The variants are cells that differ in one setting. They work at the same time, kill by kill, on the same machine.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.durable.migrate import migrate_all
from perdure_service.settings import Settings

from tests.helpers.databases import DatabaseServer
from tests.helpers.rpc import Reading, Rpc, new_id, only
from tests.helpers.server import ServerProcess
from tests.helpers.waiting import eventually
from tests.load.frame import Benchmark, Result, Series, load

VARIANTS: dict[str, dict[str, str]] = {
    "leases alone": {"PERDURE_SUSPICION": "0"},
    "leases and suspicion": {"PERDURE_SUSPICION": "1"},
}
"""The settings in which the cells differ, by the name of the variant."""
TICK_S = 0.2
"""How long a step takes: it is a part of what is measured. Longer would hide, shorter would load the machine."""
POLLS = {
    f"PERDURE_{name.upper()}": f"{Settings.model_fields[name].default.total_seconds():g}"
    for name in ("queue_poll_interval", "watch_poll_interval")
}
"""The servers' own defaults, which the servers of tests do not have."""
PATIENCE_TTLS = 6
"""After so many times to live, and `START_S`, a run that has not gone on is a failure of the product."""
START_S = 30.0
RPC_S = 30.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options."""
    group = parser.add_argument_group("recovery")
    group.add_argument("--kills", type=int, default=50, metavar="N", help="of each variant (50)")
    group.add_argument("--pairs", type=int, default=2, metavar="N", help="cells of each variant at a time (2)")
    group.add_argument("--runs", type=int, default=3, metavar="N", help="runs on the server that is killed (3)")
    group.add_argument("--ttl", type=float, metavar="SECONDS", help="PERDURE_LEASE_TTL (the server's default)")
    group.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments of the kills (1)")


def run(options: argparse.Namespace, server: DatabaseServer, say: Callable[[str], None]) -> Result:
    """Measures; see the module."""
    ttl_s = lease_ttl_s(options)
    before = load()
    gaps: dict[str, list[float]] = {name: [] for name in VARIANTS}
    cells = [
        Cell(
            f"{name} {number}",
            variant=name,
            ttl_s=ttl_s,
            runs=options.runs,
            chance=random.Random(options.seed + number),
        )
        for number in range(options.pairs)
        for name in VARIANTS
    ]
    kills = {name: _Count(options.kills) for name in VARIANTS}
    with ExitStack() as stack, ThreadPoolExecutor(len(cells)) as pool:
        for cell in cells:
            cell.url = server.migrated("bench", lambda url: migrate_all(url, lambda _line: None))
            stack.callback(cell.close)

        def work(cell: Cell) -> None:
            cell.start()
            fresh = True
            while kills[cell.variant].take():
                if not fresh:
                    cell.change_places()
                fresh = False
                found = cell.kill_once()
                gaps[cell.variant] += found
                say(f"{cell.name}: {', '.join(f'{gap:.2f}' for gap in found)} s")

        for future in [pool.submit(work, cell) for cell in cells]:
            future.result()
    return Result(
        "from `kill -9` of a server to the next committed step of each of its runs",
        [Series(name, "s", values) for name, values in gaps.items()],
        {
            "PERDURE_LEASE_TTL": f"{ttl_s:g} s",
            "kills": options.kills,
            "runs on each killed server": options.runs,
            "pairs of servers at a time": len(cells),
            "a step takes": f"{TICK_S:g} s",
        },
        (before, load()),
    )


BENCHMARK = Benchmark("recovery", add_options, run)


def lease_ttl_s(options: argparse.Namespace) -> float:
    """Returns the time to live of the servers' leases: the one that is asked for, or else the servers' own default."""
    return float(options.ttl or Settings.model_fields["lease_ttl"].default.total_seconds())


class _Count:
    """How many kills are left, for the cells of a variant."""

    def __init__(self, left: int) -> None:
        self._left = left
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0


@dataclass
class Cell:
    """A database with two servers, `victim` and `survivor`, which change places after each kill."""

    name: str
    variant: str
    ttl_s: float
    runs: int
    chance: random.Random
    url: str = ""
    servers: list[ServerProcess] = field(default_factory=list)
    ready_s: dict[int, float] = field(default_factory=dict)

    def start(self) -> None:
        """Starts both servers."""
        settings = {"PERDURE_LEASE_TTL": f"{self.ttl_s:g}", **POLLS, **VARIANTS[self.variant]}
        self.servers = [ServerProcess(self.url, "tests.load.agents", command="serve", **settings) for _ in range(2)]
        for one in self.servers:
            self._serve(one)

    def close(self) -> None:
        """Ends both servers."""
        for one in self.servers:
            one.__exit__()

    def wait_for_any_moment(self) -> None:
        """Waits for a moment that has nothing to do with when the servers renew their leases."""
        wait_until(time.monotonic() + self.chance.uniform(0, self.ttl_s / 2))

    def change_places(self) -> None:
        """Starts the killed server again, as the next survivor."""
        self._serve(self.servers[0])
        self.servers.reverse()

    def kill_once(self) -> list[float]:
        """Kills the first server under its runs; returns how long each stood still, in seconds."""
        victim, survivor = self.servers
        wait_until(self.ready_s[survivor.port] + self.ttl_s * 1.5)
        with Rpc(victim.address) as at_victim, Rpc(survivor.address) as at_survivor:
            run_ids = [at_victim.start("ticker", {"seconds": TICK_S}, run_id=new_id()) for _ in range(self.runs)]
            watches = [Arrivals(at_survivor, run_id) for run_id in run_ids]
            executors = {one.executor() for one in watches}
            self.wait_for_any_moment()
            killed_s = time.monotonic()
            victim.kill()
            gaps = [one.next_step(self.ttl_s * PATIENCE_TTLS + START_S) - killed_s for one in watches]
            for run_id, watch in zip(run_ids, watches, strict=True):
                at_survivor.runs.CancelRun(pb.CancelRunRequest(run_id=run_id), timeout=RPC_S)
                watch.close()
        assert len(executors) == 1, f"{self.name}: the runs were on {len(executors)} servers, and one was killed"
        return gaps

    def _serve(self, one: ServerProcess) -> None:
        one.start()
        self.ready_s[one.port] = time.monotonic()


class Arrivals:
    """Watches a run, and notes when the steps of its second execution arrive."""

    def __init__(self, rpc: Rpc, run_id: str) -> None:
        self._run_id = run_id
        self._recovered = threading.Event()
        self._arrived_s = 0.0
        self._reading = Reading(self._noting(rpc.watch(run_id, timeout=3_600)))

    def executor(self) -> str:
        """Waits until the run has committed a step; returns who executes it."""
        eventually(lambda: only(self._reading.events, "step_succeeded"), START_S, what=f"{self._run_id} works")
        return str(only(self._reading.events, "state_changed")[-1].state_changed.executor_id)

    def next_step(self, timeout_s: float) -> float:
        """Waits for the first step that the second execution commits; returns when it arrived (monotonic)."""
        assert self._recovered.wait(timeout_s), f"{self._run_id} did not go on within {timeout_s:g} s"
        return self._arrived_s

    def close(self) -> None:
        """Ends the watch."""
        self._reading.join()

    def _noting(self, responses: Any) -> Iterator[Any]:
        for response in responses:
            now = time.monotonic()
            if not self._recovered.is_set() and any(e.execution > 1 for e in only(response.events, "step_succeeded")):
                self._arrived_s = now
                self._recovered.set()
            yield response


def wait_until(moment_s: float) -> None:
    """Waits for a moment of the monotonic clock."""
    threading.Event().wait(max(0.0, moment_s - time.monotonic()))
