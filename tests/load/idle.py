"""Idle: what a server and its database do, and the memory that is taken, while nothing happens.

With nothing; with open watches; with runs that are in a step, that wait in memory, and that are parked. Plain DBOS with
workflows that wait in `recv` stands beside. Transactions are all that the database counted, so a query outside of an
explicit transaction is one. Memory is the process's own (USS); "each" is what there is more of it than with nothing.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from time import monotonic
from typing import Any

import psutil

from tests.helpers.databases import DatabaseServer
from tests.helpers.rpc import Rpc, new_id
from tests.helpers.server import ServerProcess, sql
from tests.helpers.waiting import eventually
from tests.load.frame import Benchmark, load
from tests.load.grid import Grid, Measure
from tests.load.latency import SETTINGS, waiting_runs
from tests.load.loop import quantile
from tests.load.usage import COUNTERS_SETTLE_S, Meter, database_processes, memory_mib, spent, transactions
from tests.load.variants import DBOS_ASYNC, Fleet, Say

NOTHING, WATCHES, PARKED, RUNNING, WAITING = (
    "a server with nothing",
    "open watches",
    "parked runs",
    "running runs",
    "runs waiting in memory",
)
DBOS_WAITING = f"{DBOS_ASYNC}, waiting in recv"
LEVELS = (1_000, 10_000)
WOKEN = 50
START_S = 300.0
MEASURES = (
    Measure("transactions/s"),
    Measure("server CPU, % of a core"),
    Measure("database CPU, % of a core"),
    Measure("memory MiB", 0),
    Measure("KiB each"),
    Measure("threads", 0),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options; `--watchers` is that of `latency`."""
    group = parser.add_argument_group("idle")
    group.add_argument("--rest", type=float, default=10.0, metavar="SECONDS", help="of each look (10)")
    group.add_argument("--parked", type=int, default=10_000, metavar="N", help="parked runs (10,000)")
    group.add_argument("--in-memory", type=int, default=1_000, metavar="N", help="running and waiting runs (1,000)")


def run(options: argparse.Namespace, server: DatabaseServer, say: Callable[[str], None]) -> Grid:
    """Measures; see the module."""
    grid = Grid("what idles", "how many", MEASURES, settings={"seconds of each look": options.rest})
    before = load()
    nothing_mib = 0.0
    for part in (_watches, _in_memory, _parked, _dbos):
        with ExitStack() as stack:
            look = _Look(Fleet(server, stack, options), grid, options, say, nothing_mib)
            part(look)
            nothing_mib = look.nothing_mib
    grid.load = (before, load())
    return grid


BENCHMARK = Benchmark("idle", add_options, run)


@dataclass
class _Look:
    """Looks at a process at rest, and fills the grid."""

    fleet: Fleet
    grid: Grid
    options: argparse.Namespace
    say: Say
    nothing_mib: float = 0.0

    def service(self, **settings: str) -> tuple[str, ServerProcess, psutil.Process]:
        """Starts a server; returns its database, itself and its process."""
        url = self.fleet.migrated()
        server = self.fleet.stack.enter_context(ServerProcess(url, "tests.load.agents", **{**SETTINGS, **settings}))
        assert server._process is not None
        return url, server, psutil.Process(server._process.pid)

    def at(self, name: str, count: int, url: str, process: psutil.Process) -> float:
        """Measures a level, and returns its memory in MiB; that of none is what the others' is compared with."""
        rest = threading.Event()
        rest.wait(min(COUNTERS_SETTLE_S, self.options.rest))
        meter = Meter(url, {"server": [process], "database": database_processes(url)})
        before, done_before = meter.read(), transactions(url)
        rest.wait(self.options.rest)
        after, done = meter.read(), transactions(url)
        seconds, cost, mib = after.at_s - before.at_s, spent(before, after), memory_mib(process)
        if not count:
            self.nothing_mib = mib
        values: dict[str, float | None] = {
            "transactions/s": (done["transactions"] - done_before["transactions"]) / seconds if done else None,
            "server CPU, % of a core": 100 * cost["server"] / seconds,
            "database CPU, % of a core": 100 * cost["database"] / seconds,
            "memory MiB": mib,
            "KiB each": 1024 * (mib - self.nothing_mib) / count if count else None,
            "threads": process.num_threads(),
        }
        self.grid.row(name, f"{count:,}").add(values)
        self.say(
            f"{name}, {count}: {', '.join(f'{one} {value:.1f}' for one, value in values.items() if value is not None)}"
        )
        return mib


def _watches(look: _Look) -> None:
    url, server, process = look.service()
    generator = look.fleet.generator("watch_load", server.address)
    with Rpc(server.address) as rpc:
        run_ids = waiting_runs(rpc)
    look.at(NOTHING, 0, url, process)
    for level in (one for one in LEVELS if one <= look.options.watchers):
        generator.ask(idle=level, run_ids=run_ids)
        look.at(WATCHES, level, url, process)


def _in_memory(look: _Look) -> None:
    count = look.options.in_memory
    for name, agent in ((RUNNING, "still"), (WAITING, "listener")):
        url, server, process = look.service(PERDURE_MAX_RUNNING=str(count + 10))
        with Rpc(server.address) as rpc:
            start_many(rpc, agent, {}, count)
        look.at(name, count, url, process)


def _parked(look: _Look) -> None:
    count = look.options.parked
    url, server, process = look.service(PERDURE_PARK_AFTER="0", PERDURE_MAX_RUNNING="100")
    first = max(count // 2, 1)
    run_ids: list[str] = []
    taken_mib: list[float] = []
    with Rpc(server.address) as rpc:
        for level in dict.fromkeys((first, count)):
            run_ids += start_many(rpc, "listener", {}, level - len(run_ids))
            eventually(lambda level=level: _parked_count(url) == level, START_S, what="all runs are parked")
            taken_mib.append(look.at(PARKED, level, url, process))
        woken_ms = []
        for run_id in run_ids[:WOKEN]:
            began = monotonic()
            rpc.signal(run_id, name="go")
            rpc.end_of(run_id)
            woken_ms.append(1000 * (monotonic() - began))
    woken_ms.sort()
    each_kib = 1024 * (taken_mib[-1] - taken_mib[0]) / max(count - first, 1)
    look.grid.notes.append(
        f"From {first:,} to {count:,} parked runs the process grew by {each_kib:.2f} KiB each: what is there with the "
        "first ones is what starting them took, not they."
    )
    look.grid.notes.append(
        f"From a signal to the end of its parked run, one of {count:,}: p50 {quantile(woken_ms, 0.5):.0f} ms, "
        f"at most {woken_ms[-1]:.0f} ms."
    )


def _dbos(look: _Look) -> None:
    variant = look.fleet.add_dbos(DBOS_ASYNC, [])
    assert variant.database_url is not None
    look.at(DBOS_WAITING, 0, variant.database_url, variant.generator.process)
    variant.generator.ask(waiting=look.options.in_memory)
    look.at(DBOS_WAITING, look.options.in_memory, variant.database_url, variant.generator.process)


def start_many(rpc: Rpc, agent: str, given: Any, count: int) -> list[str]:
    """Starts runs, some at a time; returns their ids."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda _: rpc.start(agent, given, run_id=new_id()), range(count)))


def _parked_count(url: str) -> int:
    with sql(url) as connection:
        row = connection.execute("SELECT count(*) FROM perdure.run WHERE parked_for IS NOT NULL").fetchone()
    assert row is not None
    return int(row[0])
