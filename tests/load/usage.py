"""What a measurement costs: CPU time of the processes in it, and what the database has written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import psutil
import psycopg

from tests.helpers.server import sql

COUNTERS_SETTLE_S = 11.0
"""A backend of PostgreSQL that has become idle publishes its counters within 10 s (PGSTAT_IDLE_INTERVAL, pgstat.c)."""
MIB = 2**20


@dataclass(frozen=True)
class Usage:
    """What was used up to a moment.

    Attributes:
        at_s: The moment, of the monotonic clock.
        cpu_s: By group of processes; CPU time with that of the children that have ended.
        transaction_ids: Taken so far on the whole database server: one for each transaction that wrote something, and
            for each savepoint in which it did. Unlike the other counters of PostgreSQL it is exact at any moment.
            None on CockroachDB.
    """

    at_s: float
    cpu_s: Mapping[str, float]
    transaction_ids: int | None


@dataclass(frozen=True)
class Meter:
    """Reads `Usage`.

    Attributes:
        database_url: Of any database on the server.
        groups: Processes by the name of their group, with their descendants that are in no group of their own.
    """

    database_url: str
    groups: Mapping[str, Sequence[psutil.Process]]

    def read(self) -> Usage:
        """Returns what has been used so far."""
        others = {one.pid for roots in self.groups.values() for one in roots}
        cpu_s = {
            name: sum(_cpu_s(one) for root in roots for one in _family(root, others))
            for name, roots in self.groups.items()
        }
        with sql(self.database_url) as connection:
            ids = _transaction_ids(connection)
        return Usage(time.monotonic(), cpu_s, ids)


def spent(before: Usage, after: Usage) -> dict[str, float]:
    """Returns the CPU seconds of each group between two moments, and `transaction_ids` where they are known."""
    found = {name: after.cpu_s[name] - before.cpu_s[name] for name in after.cpu_s}
    if before.transaction_ids is not None and after.transaction_ids is not None:
        found["transaction_ids"] = after.transaction_ids - before.transaction_ids
    return found


def database_processes(url: str) -> list[psutil.Process]:
    """Returns the database server's main process if it is on this machine; else its CPU is not known."""
    with sql(url) as connection:
        if is_cockroach(connection):
            return [one for one in psutil.process_iter() if one.name().startswith("cockroach")]
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        try:
            parent = psutil.Process(row[0]).parent()
        except psutil.Error:
            return []
        return [parent] if parent is not None and parent.name().startswith("postgres") else []


def is_cockroach(connection: psycopg.Connection[Any]) -> bool:
    """Returns which of the two databases it is."""
    row = connection.execute("SELECT version()").fetchone()
    return row is not None and "CockroachDB" in row[0]


def memory_mib(process: psutil.Process) -> float:
    """Returns the memory that is a process's own (USS), in MiB: what ends with it."""
    return float(process.memory_full_info().uss) / MIB


def transactions(url: str) -> dict[str, int]:
    """Returns all transactions and inserted rows of a database so far; true `COUNTERS_SETTLE_S` after the last one.

    Nothing is known of CockroachDB.
    """
    with sql(url) as connection:
        if is_cockroach(connection):
            return {}
        row = connection.execute(
            "SELECT xact_commit + xact_rollback, tup_inserted FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    assert row is not None
    return {"transactions": int(row[0]), "rows": int(row[1])}


def _transaction_ids(connection: psycopg.Connection[Any]) -> int | None:
    if is_cockroach(connection):
        return None
    row = connection.execute("SELECT CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS TEXT) AS BIGINT)").fetchone()
    assert row is not None
    return int(row[0])


def _family(root: psutil.Process, others: Set[int]) -> Iterator[psutil.Process]:
    """Yields a process and its descendants but those of `others`."""
    yield root
    try:
        children = root.children()
    except psutil.Error:
        return
    for child in children:
        if child.pid not in others:
            yield from _family(child, others)


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)
