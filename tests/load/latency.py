"""Latency: how long after a step's commit its event is at a client, with few and with very many open watches.

A run makes a short step after a pause, again and again, and notes when each one was committed (code in a task of its
own goes on then).
A watcher on the same machine, by the same clock, notes when the step's event arrives: from the server that executes the
run, or from another one. The other open watches are of runs that wait. DBOS's `read_stream` is given the same task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tests.helpers.databases import DatabaseServer
from tests.helpers.rpc import Rpc, new_id
from tests.helpers.server import ServerProcess
from tests.load.frame import Benchmark, load
from tests.load.generators import Generator
from tests.load.grid import Grid, Measure, Ratio
from tests.load.loop import quantile
from tests.load.variants import SERVER_SETTINGS, Fleet, Say

SAME, OTHER = "WatchRun, same process", "WatchRun, other process"
FAN_OUT = "WatchRun, same process, all of one run"
STREAM_SAME, STREAM_OTHER = "DBOS read_stream, same process", "DBOS read_stream, other process"
LEVELS = (1, 100, 1_000, 10_000)
MOST_OF_ONE_RUN = 100
PAUSE_S = 0.05
WRITTEN_BEFORE = 3
"""Values of a stream of DBOS that may have been written before its reader had begun; at least."""
WAITING_RUNS = 10
"""The runs that idle watchers watch."""
SETTINGS = {
    **SERVER_SETTINGS,
    "PERDURE_MAX_WATCHES": "20000",
    "PERDURE_MAX_STREAMS_PER_CALLER": "20000",
    "PERDURE_WATCH_POLL_INTERVAL": "1",
    "PERDURE_QUEUE_POLL_INTERVAL": "0.5",
    "PERDURE_MAX_WAITING_CALLS": "5000",
}
"""The polls are the service's own defaults, which the servers of tests do not have."""
MEASURES = (Measure("p50 ms", 2), Measure("p99 ms", 2), Measure("maximum ms", 1))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options."""
    group = parser.add_argument_group("latency, idle")
    group.add_argument("--steps", type=int, default=100, metavar="N", help="whose events are waited for (100)")
    group.add_argument("--watchers", type=int, default=LEVELS[-1], metavar="N", help="at most (10,000)")


def run(options: argparse.Namespace, server: DatabaseServer, say: Callable[[str], None]) -> Grid:
    """Measures; see the module."""
    grid = Grid(
        "from a step's commit to its event at the client",
        "open watches",
        MEASURES,
        [Ratio("p50, x read_stream", "p50 ms", {SAME: STREAM_SAME, OTHER: STREAM_OTHER})],
        settings={"steps": options.steps, "a step every": f"{PAUSE_S:g} s"},
    )
    before = load()
    with ExitStack() as stack:
        fleet = Fleet(server, stack, options)
        servers = pair(fleet)
        watchers = {
            name: fleet.generator("watch_load", one.address) for name, one in zip((SAME, OTHER), servers, strict=True)
        }
        rpc = stack.enter_context(Rpc(servers[0].address))
        run_ids = waiting_runs(rpc)
        for level in (one for one in LEVELS if one <= options.watchers):
            for name, generator in watchers.items():
                opened = generator.ask(idle=level - 1, run_ids=run_ids)
                say(f"{name}: {opened['streams'] + 1} watches, the last ones opened in {opened['seconds']:.1f} s")
                _add(grid, name, level, _steps(rpc, generator, 1, options.steps), say)
                if name == SAME and 1 < level <= MOST_OF_ONE_RUN:
                    _add(grid, FAN_OUT, level, _steps(rpc, generator, level, options.steps), say)
        _streams(fleet, grid, options.steps, say)
    grid.rows.sort(key=lambda row: (SAME, FAN_OUT, OTHER, STREAM_SAME, STREAM_OTHER).index(row.variant))
    grid.load = (before, load())
    return grid


BENCHMARK = Benchmark("latency", add_options, run)


def pair(fleet: Fleet) -> tuple[ServerProcess, ServerProcess]:
    """Returns two servers on one database: the first one begins what is started through it."""
    url = fleet.migrated()
    first, second = (ServerProcess(url, "tests.load.agents", command="serve", **SETTINGS) for _ in range(2))
    for one in (first, second):
        fleet.stack.enter_context(one)
    return first, second


def waiting_runs(rpc: Rpc) -> list[str]:
    """Starts the runs that idle watchers watch."""
    return [rpc.start("listener", {}, run_id=new_id("waiting")) for _ in range(WAITING_RUNS)]


def _steps(rpc: Rpc, generator: Generator, watchers: int, steps: int) -> list[float]:
    """Returns the latency of each step's event at each watcher, in ms."""
    run_id = rpc.start("pulse", {"steps": steps, "pause_s": PAUSE_S}, run_id=new_id("pulse"))
    generator.ask(watch=run_id, count=watchers)
    arrivals = generator.ask()["arrivals"]
    committed_ns = rpc.output_of(run_id)
    found = [(at_ns - committed_ns[int(step) - 1]) / 1e6 for arrived in arrivals for step, at_ns in arrived.items()]
    assert found, "the run had ended before it was watched"
    return found


def _streams(fleet: Fleet, grid: Grid, steps: int, say: Say) -> None:
    url = fleet.migrated()
    writer, reader = fleet.generator("stream_load", url), fleet.generator("stream_load", url)
    for name, one in ((STREAM_SAME, writer), (STREAM_OTHER, reader)):
        workflow_id = writer.ask(write=steps, pause_s=PAUSE_S)["workflow_id"]
        arrived = one.ask(read=workflow_id)["arrived"]
        committed = writer.ask(committed=workflow_id)["committed"]
        found = [(there - here) / 1e6 for here, there in zip(committed, arrived, strict=True)]
        _add(grid, name, 1, found[WRITTEN_BEFORE:], say)


def _add(grid: Grid, name: str, level: int, found: Sequence[float], say: Say) -> None:
    ordered = sorted(found)
    values: Mapping[str, Any] = {
        "p50 ms": quantile(ordered, 0.5),
        "p99 ms": quantile(ordered, 0.99),
        "maximum ms": ordered[-1],
    }
    grid.row(name, level).add(values)
    say(f"{name}, {level}: {json.dumps({one: round(value, 2) for one, value in values.items()})}")
