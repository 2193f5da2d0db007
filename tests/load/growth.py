"""Growth: what the most frequent calls take, and a recovery, when a thousand to a million finished runs lie there.

A missing index shows three times: in the times, in the rows that PostgreSQL has read by scanning whole tables meanwhile
(pg_stat_user_tables), and in the plans of all statements at the largest number of runs (see `explained`).
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic

from tests.helpers.databases import DatabaseServer
from tests.helpers.rpc import Rpc, new_id
from tests.helpers.server import ServerProcess, sql
from tests.load import explained
from tests.load.finished import KINDS, TABLES, calls_of, fill, recover
from tests.load.frame import Benchmark, load
from tests.load.grid import Grid, Measure
from tests.load.loop import quantile
from tests.load.usage import COUNTERS_SETTLE_S, is_cockroach
from tests.load.variants import SERVER_SETTINGS, Fleet

LEVELS = (1_000, 10_000, 100_000, 1_000_000)
FILLED_AT_ONCE = 10_000
MEASURES = (
    *(Measure(f"{kind} p50 ms") for kind in KINDS),
    Measure("recovery s", 2),
    Measure("rows scanned/call", 0),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options."""
    group = parser.add_argument_group("growth")
    group.add_argument(
        "--grown", type=int, default=100_000, metavar="N", help="finished runs at most (10^5; 10^6 works)"
    )
    group.add_argument("--calls", type=int, default=50, metavar="N", help="of each kind at each level (50)")


def run(options: argparse.Namespace, server: DatabaseServer, say: Callable[[str], None]) -> Grid:
    """Measures; see the module."""
    grid = Grid("calls and recovery", "finished runs", MEASURES, settings={"calls of each kind": options.calls})
    before = load()
    with ExitStack() as stack:
        url = Fleet(server, stack, options).migrated()
        service = stack.enter_context(ServerProcess(url, "tests.load.agents", **SERVER_SETTINGS))
        with Rpc(service.address) as rpc:
            model = rpc.start("two-steps", {"number": 1}, run_id=new_id("grown"), labels={"bench": "growth"})
            rpc.end_of(model)
        there = 0
        for level in (one for one in LEVELS if one <= options.grown):
            began = monotonic()
            with sql(url) as connection:
                for first in range(there, level, FILLED_AT_ONCE):
                    fill(connection, model, first, min(level, first + FILLED_AT_ONCE))
                    connection.commit()
                connection.autocommit = True
                connection.execute("ANALYZE")
            there = level
            say(f"{level} finished runs, after {monotonic() - began:.0f} s")
            _measure(grid, f"{level:,}", url, service, options.calls, model)
            say(grid.markdown().splitlines()[1 + len(grid.rows)])
        grid.notes += explained.notes(url, service, model, f"{there:,}")
    grid.load = (before, load())
    return grid


BENCHMARK = Benchmark("growth", add_options, run)


def _measure(grid: Grid, level: str, url: str, service: ServerProcess, calls: int, model: str) -> None:
    scanned = _scanned(url)
    row = grid.row("calls", level)
    with Rpc(service.address) as rpc:
        for kind, call in calls_of(rpc, model).items():
            took_ms = []
            for _ in range(calls):
                began = monotonic()
                call()
                took_ms.append(1000 * (monotonic() - began))
            row.add({f"{kind} p50 ms": quantile(sorted(took_ms), 0.5)})
    row.add({"recovery s": recover(service)})
    if scanned is not None:
        now = _scanned(url)
        assert now is not None
        row.add({"rows scanned/call": (now - scanned) / (calls * len(KINDS))})


def _scanned(url: str) -> int | None:
    """Returns the rows that scans of whole tables have read, of those that grow; None where it is not counted."""
    with sql(url) as connection:
        if is_cockroach(connection):
            return None
    threading.Event().wait(COUNTERS_SETTLE_S)
    with sql(url) as connection:
        row = connection.execute(
            "SELECT coalesce(sum(seq_tup_read), 0) FROM pg_stat_user_tables "
            "WHERE schemaname || '.' || relname = ANY(%s)",
            (list(TABLES),),
        ).fetchone()
    assert row is not None
    return int(row[0])
