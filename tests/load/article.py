"""The article's two tables, measured again: raw inserts of single rows, and runs of two steps, from 1 to 512 clients.

"DBOS + CockroachDB" (2026, DBOS 2.15) measured them with the client in the same region on PostgreSQL (RDS 17, 96 vCPU)
and on CockroachDB (three nodes of 32 vCPU). Its figures stand beside ours: the machines have nothing in common, so what
can be compared is how each column grows, and the ratio of raw inserts to runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from tests.helpers.databases import DatabaseServer
from tests.helpers.server import sql
from tests.load.frame import Benchmark, load
from tests.load.grid import Grid, Measure
from tests.load.usage import database_processes
from tests.load.variants import ASYNC, DBOS_SYNC, Fleet

LEVELS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
DRIVERS = ("psycopg", "psycopg2")
OTHERS_CONNECTIONS = 60
"""What else is connected while the raw inserts are measured, and more."""

RAW: Mapping[int, tuple[str, str]] = {
    1: ("728 (1.4)", "277 (3.6)"),
    8: ("4,125 (1.9)", "1,659 (4.7)"),
    32: ("6,584 (4.1)", "6,344 (4.9)"),
    64: ("12,016 (4.3)", "8,448 (6.8)"),
    128: ("19,380 (5.1)", "16,039 (7.1)"),
    256: ("37,478 (5.1)", "31,820 (7.1)"),
    512: ("62,990 (5.8)", "54,740 (8.3)"),
}
RUNS: Mapping[int, tuple[str, str]] = {
    1: ("48.0 (19)", "14.6 (65)"),
    4: ("122.0 (29)", "61.5 (62)"),
    8: ("104.5 (69)", "110.2 (69)"),
    16: ("114.0 (122)", "107.0 (138)"),
    32: ("117.8 (248)", "117.5 (250)"),
    64: ("118.0 (519)", "116.6 (525)"),
    256: ("115.9 (2,166)", "114.5 (2,202)"),
    512: ("113.5 (4,428)", "112.3 (4,474)"),
}
"""The article's figures by clients: per second, and the median in ms; on PostgreSQL and on CockroachDB."""
MEASURES = (Measure("per second"), Measure("p50 ms"), Measure("p99 ms"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options; the others are those of `throughput`."""
    group = parser.add_argument_group("article")
    group.add_argument("--article-clients", type=int, default=LEVELS[-1], metavar="N", help="at most (512)")
    group.add_argument("--article-secs", type=float, default=2.0, metavar="SECONDS", help="of each measurement (2)")


def run(options: argparse.Namespace, server: DatabaseServer, say: Callable[[str], None]) -> Grid:
    """Measures; see the module. Variants take turns at each number of clients."""
    levels = [one for one in LEVELS if one <= options.article_clients]
    grid = Grid(
        "the article's programs",
        "clients",
        MEASURES,
        plotted="per second",
        settings={"seconds": options.article_secs, "database": "CockroachDB" if server.cockroach else "PostgreSQL"},
    )
    before = load()
    with ExitStack() as stack:
        fleet = Fleet(server, stack, options)
        raw_url = fleet.migrated()
        raw = {f"raw inserts, {one}": fleet.generator("raw_inserts_load", raw_url, one) for one in DRIVERS}
        room = _connections(server) - OTHERS_CONNECTIONS
        if left_out := [str(one) for one in levels if one > room]:
            grid.notes.append(
                f"Raw inserts of {', '.join(left_out)} clients: the database takes no so many connections."
            )
        for clients in (one for one in levels if one <= room):
            for name, generator in raw.items():
                answer = generator.load(clients, options.article_secs)
                _add(grid, name, clients, answer.per_second, answer.latency_ms(0.5), answer.latency_ms(0.99))
                say(f"{name}, {clients} clients: {answer.per_second:.0f}/s")
        fleet.start([ASYNC])
        database = database_processes(server.url)
        for driver in DRIVERS:
            fleet.add_dbos(f"{DBOS_SYNC}, {driver}", database, driver)
        for clients in levels:
            for one in fleet.variants:
                answer, _ = one.measure(server.url, clients, options.article_secs)
                _add(grid, one.name, clients, answer.per_second, answer.latency_ms(0.5), answer.latency_ms(0.99))
                say(f"{one.name}, {clients} clients: {answer.per_second:.1f}/s")
    variants = list(dict.fromkeys(one.variant for one in grid.rows))
    grid.rows.sort(key=lambda row: variants.index(row.variant))
    grid.given = {
        f"the article, {name}: per second (p50 ms)": {
            (row.variant, row.level): figures[int(row.level)][column]
            for row in grid.rows
            if int(row.level) in (figures := RAW if row.variant.startswith("raw") else RUNS)
        }
        for column, name in enumerate(("PostgreSQL", "CockroachDB"))
    }
    grid.load = (before, load())
    return grid


BENCHMARK = Benchmark("article", add_options, run)


def _add(grid: Grid, name: str, clients: int, per_second: float, p50_ms: float, p99_ms: float) -> None:
    grid.row(name, clients).add({"per second": per_second, "p50 ms": p50_ms, "p99 ms": p99_ms})


def _connections(server: DatabaseServer) -> int:
    """Returns how many connections the database takes; CockroachDB has no limit of its own."""
    if server.cockroach:
        return LEVELS[-1] + OTHERS_CONNECTIONS
    with sql(server.url) as connection:
        row = connection.execute("SELECT CAST(current_setting('max_connections') AS INT)").fetchone()
    assert row is not None
    return int(row[0])
