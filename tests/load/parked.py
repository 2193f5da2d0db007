"""Measures what parked runs cost at rest: memory, threads, queries and CPU of a server, with none and with many.

    python -m tests.load.parked [--runs 10000] [--at-once 1000] [--seconds 30]

Starts a database and a server of its own, starts runs of an agent that waits for a signal, waits until all are parked,
looks at the server for a while, and wakes a hundred of them. Prints, and asserts nothing about times.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg
from perdure_client import AsyncClient
from perdure_service.durable.migrate import migrate_all
from perdure_service.store import embedded

from tests.helpers.server import ServerProcess, create_effects_table, sql

WOKEN = 100
POLL_S = 0.5


@dataclass(frozen=True)
class Usage:
    """What a process has used so far, and its database with it."""

    memory_mib: float
    threads: int
    cpu_s: float
    transactions: int
    at: float


def usage(process_id: int, url: str) -> Usage:
    """Returns what a server has used so far."""
    status = Path(f"/proc/{process_id}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    times = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    with sql(url) as connection:
        row = connection.execute(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    assert row is not None
    return Usage(
        memory_mib=int(fields["VmRSS"].split()[0]) / 1024,
        threads=int(fields["Threads"]),
        cpu_s=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        transactions=row[0],
        at=time.monotonic(),
    )


async def at_rest(process_id: int, url: str, seconds: float, what: str) -> None:
    """Looks at a server that has nothing to do, and prints what it uses."""
    await asyncio.sleep(3)
    before = usage(process_id, url)
    await asyncio.sleep(seconds)
    after = usage(process_id, url)
    took_s = after.at - before.at
    print(
        f"{what}: {after.memory_mib:.0f} MiB, {after.threads} threads, "
        f"{(after.transactions - before.transactions) / took_s:.1f} transactions/s, "
        f"{100 * (after.cpu_s - before.cpu_s) / took_s:.1f} % of a core",
        flush=True,
    )


def parked_count(connection: psycopg.Connection) -> int:
    """Returns how many runs are parked."""
    row = connection.execute("SELECT count(*) FROM perdure.run WHERE parked_for IS NOT NULL").fetchone()
    assert row is not None
    return int(row[0])


async def measure(server: ServerProcess, runs: int, at_once: int, seconds: float) -> None:
    """Starts the runs and prints the figures."""
    assert server._process is not None
    process_id, url = server._process.pid, server.database_url
    await at_rest(process_id, url, seconds, "no run")
    began = time.monotonic()
    async with AsyncClient(server.address, timeout=120) as client:
        gate = asyncio.Semaphore(50)

        async def start(number: int) -> None:
            async with gate:
                await client.start("listener", {}, run_id=f"parked-{number}")

        for first in range(0, runs, at_once):
            await asyncio.gather(*(start(number) for number in range(first, min(first + at_once, runs))))
        with sql(url) as connection:
            connection.autocommit = True
            while parked_count(connection) < runs:  # noqa: ASYNC110 - another process parks them
                await asyncio.sleep(POLL_S)
        print(f"{runs} runs started and parked in {time.monotonic() - began:.0f} s", flush=True)
        await at_rest(process_id, url, seconds, f"{runs} parked runs")
        waits_ms = []
        for number in range(WOKEN):
            begun = time.monotonic()
            await client.signal(f"parked-{number}", "more", number)
            await client.wait(f"parked-{number}", timeout=60)
            waits_ms.append(1000 * (time.monotonic() - begun))
        waits_ms.sort()
        print(f"from a signal to the end of its run: median {waits_ms[WOKEN // 2]:.0f} ms, most {waits_ms[-1]:.0f} ms")


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    data_dir = Path(tempfile.mkdtemp(prefix="perdure-load-"))
    try:
        with embedded.start(data_dir) as postgres:
            url = postgres.url()
            migrate_all(url, lambda _line: None)
            create_effects_table(url)
            settings = {"PERDURE_PARK_AFTER": "0", "PERDURE_MAX_RUNNING": "100", "PERDURE_LOG_LEVEL": "warning"}
            with ServerProcess(url, **settings) as server:
                asyncio.run(measure(server, options.runs, options.at_once, options.seconds))
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
