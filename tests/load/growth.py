"""Growth: what the most frequent calls take, and a recovery, when a thousand to a million finished runs lie there.

The finished runs are copies of one that the server has made, all its rows, by SQL. A missing index shows twice: in the
times, and in the rows that PostgreSQL has read by scanning whole tables meanwhile (pg_stat_user_tables).
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import psycopg
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb
from psycopg import sql as statements

from tests.helpers.databases import DatabaseServer
from tests.helpers.rpc import TIMEOUT_S, Rpc, new_id
from tests.helpers.server import ServerProcess, sql
from tests.helpers.waiting import eventually, scaled
from tests.load.frame import Benchmark, load
from tests.load.grid import Grid, Measure
from tests.load.loop import quantile
from tests.load.usage import COUNTERS_SETTLE_S, is_cockroach
from tests.load.variants import SERVER_SETTINGS, Fleet

LEVELS = (1_000, 10_000, 100_000, 1_000_000)
FILLED_AT_ONCE = 10_000
RECOVERED = 20
"""Runs on the server that is killed."""
PATIENCE_S = 120.0
TABLES = {
    "dbos.workflow_status": "workflow_uuid",
    "dbos.workflow_input": "workflow_uuid",
    "dbos.workflow_output": "workflow_uuid",
    "dbos.operation_outputs": "workflow_uuid",
    "perdure.run": "workflow_id",
    "perdure.run_event": "workflow_id",
}
"""What a finished run has rows in, and the column of its workflow id."""
MEASURES = (
    Measure("start and wait p50 ms"),
    Measure("get p50 ms"),
    Measure("list p50 ms"),
    Measure("list running p50 ms"),
    Measure("list by label p50 ms"),
    Measure("watch to the end p50 ms"),
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
    grid.load = (before, load())
    return grid


BENCHMARK = Benchmark("growth", add_options, run)


def fill(connection: psycopg.Connection[Any], model: str, first: int, end: int) -> None:
    """Copies a finished run, all its rows, under other ids: those of the numbers from `first` to before `end`."""
    row = connection.execute("SELECT workflow_id FROM perdure.run WHERE run_id = %s", (model,)).fetchone()
    assert row is not None
    names = {"model": row[0], "run_id": model, "first": first, "last": end - 1}
    for table, key in TABLES.items():
        schema, _, name = table.partition(".")
        found = connection.execute(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = %s "
            "AND is_generated = 'NEVER' ORDER BY ordinal_position",
            (schema, name),
        ).fetchall()
        columns = [one for (one,) in found]
        replaced = {key: "replace(t.{key}, %(run_id)s, %(run_id)s || '-' || n)", "run_id": "t.run_id || '-' || n"}
        replaced |= {"unique_request_id": "NULL", "created_at": _EARLIER.get(name, "t.created_at")}
        values = [
            statements.SQL(replaced.get(one, "t.{column}")).format(  # type: ignore[arg-type]
                key=statements.Identifier(key), column=statements.Identifier(one)
            )
            for one in columns
        ]
        connection.execute(
            statements.SQL(
                "INSERT INTO {table} ({columns}) SELECT {values} FROM {table} AS t, "
                "generate_series(CAST(%(first)s AS INT), CAST(%(last)s AS INT)) AS n WHERE t.{key} = %(model)s"
            ).format(
                table=statements.Identifier(schema, name),
                columns=statements.SQL(", ").join(map(statements.Identifier, columns)),
                values=statements.SQL(", ").join(values),
                key=statements.Identifier(key),
            ),
            names,
        )


_EARLIER = {"run": "t.created_at - n * INTERVAL '1 second'", "workflow_status": "t.created_at - n * 1000"}
"""The copies are older than what is measured, each by another second."""


def _measure(grid: Grid, level: str, url: str, service: ServerProcess, calls: int, model: str) -> None:
    listing = pb.ListRunsRequest(page_size=50)
    running = pb.ListRunsRequest(page_size=50, states=[run_pb.AGENT_RUN_STATE_RUNNING])
    labelled = pb.ListRunsRequest(page_size=50, labels={"bench": "growth"})
    scanned = _scanned(url)
    with Rpc(service.address) as rpc:
        timeout = scaled(TIMEOUT_S)
        kinds: dict[str, Callable[[], Any]] = {
            "start and wait p50 ms": lambda: rpc.end_of(rpc.start("two-steps", {"number": 1}, run_id=new_id())),
            "get p50 ms": lambda: rpc.get(f"{model}-7"),
            "list p50 ms": lambda: rpc.runs.ListRuns(listing, timeout=timeout),
            "list running p50 ms": lambda: rpc.runs.ListRuns(running, timeout=timeout),
            "list by label p50 ms": lambda: rpc.runs.ListRuns(labelled, timeout=timeout),
            "watch to the end p50 ms": lambda: rpc.events(f"{model}-7"),
        }
        for name, call in kinds.items():
            took_ms = []
            for _ in range(calls):
                began = monotonic()
                call()
                took_ms.append(1000 * (monotonic() - began))
            grid.row("calls", level).add({name: quantile(sorted(took_ms), 0.5)})
    row = grid.row("calls", level)
    row.add({"recovery s": _recover(service)})
    if scanned is not None:
        now = _scanned(url)
        assert now is not None
        row.add({"rows scanned/call": (now - scanned) / (calls * len(kinds))})


def _recover(service: ServerProcess) -> float:
    """Kills the server under its runs; returns how long after the next one's start all have ended."""
    with TemporaryDirectory() as folder, Rpc(service.address) as rpc:
        gate = Path(folder) / "gate"
        run_ids = [rpc.start("gated", {"gate": str(gate)}, run_id=new_id()) for _ in range(RECOVERED)]
        service.kill()
        gate.touch()
        began = monotonic()
        service.start()
        with Rpc(service.address) as again:
            for run_id in run_ids:
                eventually(lambda run_id=run_id: again.get(run_id).end_time.seconds, PATIENCE_S, what=f"{run_id} ended")
        return monotonic() - began


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
