"""Throughput: runs of two steps that do nothing, in a closed loop, through gRPC and against plain DBOS and Restate.

All variants are up, and take turns: one repetition measures each at one number of clients before the next one begins,
and each begins with another variant. A client starts a run, waits for its end, and starts the next. Each repetition is
a row's value.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tests.helpers.databases import DatabaseServer
from tests.load import variants
from tests.load.frame import Benchmark, load
from tests.load.grid import Grid, Measure, Ratio
from tests.load.usage import COUNTERS_SETTLE_S, transactions
from tests.load.variants import ASYNC, BASELINE, BULK, DBOS_ASYNC, NAMES, ONE_CALL, RESTATE, Fleet, Variant

CLIENTS = (1, 8, 32, 128)
COMMIT_DELAY_US = 3_000
MEASURES = (
    Measure("runs/s"),
    Measure("p50 ms"),
    Measure("p99 ms"),
    Measure("client CPU ms/run", 2),
    Measure("server CPU ms/run", 2),
    Measure("database CPU ms/run", 2),
    Measure("write commits/run", 2),
    Measure("repeated calls/run", 2),
)
RATIOS = (
    Ratio("runs/s, x plain DBOS", "runs/s", BASELINE),
    Ratio("p50, x plain DBOS", "p50 ms", BASELINE),
    Ratio("runs/s, x Restate", "runs/s", dict.fromkeys((ASYNC, ONE_CALL, BULK, DBOS_ASYNC), RESTATE)),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options, which `slow-commits` and `article` share."""
    group = parser.add_argument_group("throughput, slow-commits, article")
    group.add_argument("--secs", type=float, default=2.0, metavar="SECONDS", help="of each measurement (2)")
    group.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="of each measurement (3; slow-commits, article: 1)"
    )
    group.add_argument("--clients", type=_numbers, default=CLIENTS, metavar="N,…", help="at a time (1,8,32,128)")
    group.add_argument("--variants", metavar="TEXT,…", help="only those with one of these in their names")
    variants.add_restate_options(parser)


def run(options: argparse.Namespace, server: DatabaseServer, say: Callable[[str], None]) -> Grid:
    """Measures; see the module."""
    return measure(options, server, say, options.clients, options.repeats)


def run_slow(options: argparse.Namespace, server: DatabaseServer, say: Callable[[str], None]) -> Grid:
    """As `run`, once, with a commit that takes 3 ms longer: what a replicated database feels like."""
    if server.cockroach:
        return Grid("runs of two steps, each commit 3 ms longer", "clients", MEASURES, notes=["Not on CockroachDB."])
    with slow_commits(server):
        grid = measure(options, server, say, options.clients, 1, without=(RESTATE,))
    grid.measured = "runs of two steps, each commit 3 ms longer"
    grid.settings = {**grid.settings, "commit_delay": f"{COMMIT_DELAY_US} us"}
    return grid


def measure(
    options: argparse.Namespace,
    server: DatabaseServer,
    say: Callable[[str], None],
    levels: Sequence[int],
    repeats: int,
    without: Sequence[str] = (),
) -> Grid:
    """Returns the grid of the variants that are asked for."""
    grid = Grid(
        "runs of two steps",
        "clients",
        MEASURES,
        RATIOS,
        plotted="runs/s",
        settings={
            "seconds": options.secs,
            "repeats": repeats,
            "database": "CockroachDB" if server.cockroach else "PostgreSQL",
        },
    )
    before = load()
    asked = [one.strip() for one in options.variants.split(",")] if options.variants else [""]
    names = [name for name in NAMES if name not in without and any(one.lower() in name.lower() for one in asked)]
    with ExitStack() as stack:
        fleet = Fleet(server, stack, options)
        fleet.start(names)
        for name in names:
            for clients in levels if any(one.name == name for one in fleet.variants) else ():
                grid.row(name, clients)
        counted = Counted(fleet.variants)
        for number in range(repeats):
            # Another one begins each time: else one would always have what the last one left to do (a compaction, say).
            begins = number % len(fleet.variants)
            for clients in levels:
                for one in (*fleet.variants[begins:], *fleet.variants[:begins]):
                    answer, values = one.measure(server.url, clients, options.secs)
                    grid.row(one.name, clients).add(values)
                    say(f"{number + 1}: {one.name}, {clients} clients: {answer.per_second:.1f} runs/s")
        grid.notes += [*fleet.missing, *counted.notes()]
    grid.load = (before, load())
    return grid


class Counted:
    """Counts what the databases of some variants have done between its creation and `notes`, in all."""

    def __init__(self, variants: Sequence[Variant]) -> None:
        self._variants = [one for one in variants if one.database_url is not None]
        threading.Event().wait(COUNTERS_SETTLE_S)
        self._before = self._read()

    def notes(self) -> list[str]:
        """Returns a sentence for each database: transactions, also those that read, and inserted rows a run."""
        threading.Event().wait(COUNTERS_SETTLE_S)
        after, found = self._read(), []
        for url, before in self._before.items():
            users = [one for one in self._variants if one.database_url == url]
            count = sum(one.operations for one in users)
            if before and count:
                each = {name: (after[url][name] - before[name]) / count for name in before}
                names = ", ".join(one.name for one in users)
                found.append(
                    f"{names}: {each['transactions']:.2f} transactions of any kind (with polls) and {each['rows']:.2f} "
                    f"inserted rows a run, over {count} runs."
                )
        return found

    def _read(self) -> dict[str, dict[str, int]]:
        urls = dict.fromkeys(one.database_url for one in self._variants if one.database_url is not None)
        return {url: transactions(url) for url in urls}


@contextmanager
def slow_commits(server: DatabaseServer, delay_us: int = COMMIT_DELAY_US) -> Iterator[None]:
    """Has each commit that writes take so much longer. Needs a superuser, as the embedded server's is."""
    settings = {"commit_delay": delay_us, "commit_siblings": 0}
    try:
        for name, value in settings.items():
            server.execute(f"ALTER SYSTEM SET {name} = {value}")
        server.execute("SELECT pg_reload_conf()")
        yield
    finally:
        for name in settings:
            server.execute(f"ALTER SYSTEM RESET {name}")
        server.execute("SELECT pg_reload_conf()")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(","))


BENCHMARK = Benchmark("throughput", add_options, run)
SLOW_COMMITS = Benchmark("slow-commits", lambda _parser: None, run_slow)
