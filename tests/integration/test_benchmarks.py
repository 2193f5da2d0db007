"""The benchmarks can be run: each once, as small as it gets. What they measure is not looked at, only that they do."""

from __future__ import annotations

import argparse

import pytest

from tests.helpers.databases import DatabaseServer
from tests.load import explained, growth, idle, latency, recovery, regions, throughput, usage, variants
from tests.load.__main__ import BENCHMARKS
from tests.load.frame import Result
from tests.load.grid import Grid

SMALL = {
    "recovery": "--kills 1 --pairs 1 --runs 2 --ttl 1",
    "herd": "--ttl 1 --herd 5 --herds 1",
    "throughput": "--clients 2 --secs 0.2 --repeats 1 --variants async,bulk,alone",
    "slow-commits": "--clients 2 --secs 0.2 --variants plain",
    "article": "--article-clients 1 --article-secs 0.2",
    "latency": "--steps 10 --watchers 1",
    "idle": "--rest 0.2 --watchers 20 --parked 20 --in-memory 20",
    "growth": "--grown 20 --calls 2",
    "regions": "--trials 1 --distance 10",
}
"""The options of each, in its quick form."""
MEASURED = {
    "throughput": {variants.ASYNC, variants.DBOS_ASYNC},
    "slow-commits": {variants.DBOS_ASYNC, variants.DBOS_SYNC},
    "latency": {latency.SAME, latency.OTHER, latency.STREAM_SAME, latency.STREAM_OTHER},
    "idle": {idle.NOTHING, idle.WATCHES, idle.RUNNING, idle.WAITING, idle.PARKED, idle.DBOS_WAITING},
    "growth": {"calls"},
    "article": {"raw inserts, psycopg", "raw inserts, psycopg2", variants.ASYNC, "plain DBOS, sync, psycopg2"},
    "regions": set(regions.KINDS),
}
"""What each must have measured, at least."""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_measures_every_run(
    database_server: DatabaseServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(recovery, "VARIANTS", {"leases and suspicion": {}})
    monkeypatch.setattr("tests.load.herd.VARIANTS", recovery.VARIANTS)
    for module in (throughput, idle, growth, usage):
        monkeypatch.setattr(module, "COUNTERS_SETTLE_S", 0.0)
    monkeypatch.setattr(idle, "LEVELS", (20,))
    monkeypatch.setattr(growth, "LEVELS", (20,))
    for count in ("EXECUTIONS", "SWEEPS"):
        monkeypatch.setattr(explained, count, 1)
    monkeypatch.setattr(regions, "STEPS", 8)
    parser = argparse.ArgumentParser()
    for benchmark in BENCHMARKS.values():
        benchmark.add_options(parser)
    said: list[str] = []
    result = BENCHMARKS[name].run(parser.parse_args(SMALL[name].split()), database_server, said.append)
    assert said
    if isinstance(result, Result):
        (series,) = result.series
        assert len(series.values) == {"recovery": 2, "herd": 5}[name]
        assert all(value > 0 for value in series.values)
        assert "leases and suspicion" in result.markdown()
        return
    assert isinstance(result, Grid)
    assert MEASURED[name] <= {row.variant for row in result.rows}
    assert all(values for row in result.rows for values in row.values.values())
    assert all(row.variant in result.markdown() for row in result.rows)
