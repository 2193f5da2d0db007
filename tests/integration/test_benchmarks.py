"""The benchmarks can be run: each once, as small as it gets. What they measure is not looked at."""

from __future__ import annotations

import argparse

import pytest

from tests.helpers.databases import DatabaseServer
from tests.load import recovery
from tests.load.__main__ import BENCHMARKS
from tests.load.frame import table

SMALL = ["--kills", "1", "--pairs", "1", "--runs", "2", "--ttl", "1", "--herd", "5", "--herds", "1"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_measures_every_run(
    database_server: DatabaseServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(recovery, "VARIANTS", {"leases and suspicion": {}})
    monkeypatch.setattr("tests.load.herd.VARIANTS", recovery.VARIANTS)
    parser = argparse.ArgumentParser()
    for benchmark in BENCHMARKS.values():
        benchmark.add_options(parser)
    said: list[str] = []
    result = BENCHMARKS[name].run(parser.parse_args(SMALL), database_server, said.append)
    (series,) = result.series
    assert len(series.values) == {"recovery": 2, "herd": 5}[name]
    assert all(value > 0 for value in series.values)
    assert said
    assert "leases and suspicion" in table(result)
