"""A herd: how long it takes until all of very many runs of one killed server have gone on.

A cell of `recovery`, but the server that is killed has a thousand runs, each in the second of its two steps. That step
ends when a file is there, which is made as soon as the server is dead: so each run ends as soon as another server has
taken it and made that step. The times are those of the runs' ends, by the database's clock.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from perdure_service.durable.migrate import migrate_all

from tests.helpers.databases import DatabaseServer
from tests.helpers.rpc import Rpc, new_id
from tests.helpers.server import sql
from tests.helpers.waiting import eventually
from tests.load.frame import Benchmark, Result, Series, load
from tests.load.recovery import START_S, VARIANTS, Cell, lease_ttl_s, wait_until

CALLERS = 16
"""Starts at a time."""
PATIENCE_S = 300.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options; the lease is that of `recovery`."""
    group = parser.add_argument_group("herd")
    group.add_argument("--herd", type=int, default=1_000, metavar="N", help="runs on the server that is killed (1,000)")
    group.add_argument("--herds", type=int, default=1, metavar="N", help="kills of each variant (1)")


def run(options: argparse.Namespace, server: DatabaseServer, say: Callable[[str], None]) -> Result:
    """Measures; see the module. The variants take turns."""
    ttl_s = lease_ttl_s(options)
    before = load()
    ends: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(options.herds):
        for name in VARIANTS:
            cell = Cell(f"{name} {number}", name, ttl_s, options.herd, random.Random(options.seed + number))
            cell.url = server.migrated("bench", lambda url: migrate_all(url, lambda _line: None))
            try:
                cell.start()
                found = _kill(cell)
            finally:
                cell.close()
                server.drop_of(cell.url)
            ends[name] += found
            say(f"{cell.name}: the first after {found[0]:.2f} s, the last after {found[-1]:.2f} s")
    return Result(
        f"from `kill -9` of a server with {options.herd} runs to the next committed step of each",
        [Series(name, "s", values) for name, values in ends.items()],
        {"PERDURE_LEASE_TTL": f"{ttl_s:g} s", "kills": options.herds},
        (before, load()),
    )


BENCHMARK = Benchmark("herd", add_options, run)


def _kill(cell: Cell) -> list[float]:
    """Returns how long after the kill each run ended, in seconds, the first first."""
    victim, survivor = cell.servers
    with tempfile.TemporaryDirectory() as folder, Rpc(victim.address) as rpc, ThreadPoolExecutor(CALLERS) as pool:
        gate = Path(folder) / "gate"
        list(pool.map(lambda _: rpc.start("gated", {"gate": str(gate)}, run_id=new_id()), range(cell.runs)))
        eventually(lambda: _begun(cell) == cell.runs, START_S, what="all runs are in their second step")
        wait_until(cell.ready_s[survivor.port] + cell.ttl_s * 1.5)
        cell.wait_for_any_moment()
        victim.kill()
        killed_at = _now(cell)
        gate.touch()
        eventually(lambda: len(_ends(cell)) == cell.runs, PATIENCE_S, what="all runs have ended")
        return sorted((ended_at - killed_at).total_seconds() for ended_at in _ends(cell))


def _begun(cell: Cell) -> int:
    with sql(cell.url) as connection:
        row = connection.execute(
            "SELECT count(DISTINCT workflow_id) FROM perdure.run_event WHERE events LIKE '%second%'"
        ).fetchone()
    assert row is not None
    return int(row[0])


def _now(cell: Cell) -> datetime:
    with sql(cell.url) as connection:
        row = connection.execute("SELECT now()").fetchone()
    assert row is not None
    found: datetime = row[0]
    return found


def _ends(cell: Cell) -> list[datetime]:
    with sql(cell.url) as connection:
        rows = connection.execute("SELECT ended_at FROM perdure.run WHERE ended_at IS NOT NULL").fetchall()
    return [row[0] for row in rows]
