"""Tests of the summary of the chaos tests: what all processes counted, and that a loss is never hidden."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import chaos_report
from tests.helpers.server import ROOT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(chaos_report.FOLDER, str(tmp_path))
    return tmp_path


def test_what_all_processes_counted_is_summed_up(folder: Path) -> None:
    chaos_report.fault("killed from outside")
    subprocess.run(
        [sys.executable, "-c", "from tests.helpers import chaos_report as r; r.fault('killed from outside')"],
        cwd=ROOT,
        check=True,
    )
    chaos_report.refused("40001")
    chaos_report.judged("default.a.r", finished=1, checkpoints=3, events=20)
    chaos_report.judged("default.a.r", repeated=1, effects=2)
    chaos_report.judged("default.a.r", finished=1, checkpoints=3, events=20)
    chaos_report.judged("default.b.r", finished=1, checkpoints=2, events=10)
    summary = chaos_report.read(folder)
    assert summary.sound
    assert summary.lines(7) == [
        "seed 7 (PERDURE_TEST_SEED=7 repeats it)",
        "faults injected 3",
        "        2  killed from outside",
        "        1  transactions refused with 40001",
        "runs finished 2, steps repeated 1",
        "rows checked: checkpoints 5, events 30, effects 2",
        "lost 0",
        "doubled 0",
    ]


def test_what_is_lost_or_doubled_is_named_and_stays(folder: Path) -> None:
    chaos_report.judged("default.a.r", lost=2)
    chaos_report.judged("default.a.r", lost=0, doubled=1)
    summary = chaos_report.read(folder)
    assert not summary.sound
    lines = summary.lines(7)
    assert lines[4:6] == ["lost 2", "doubled 1"]
    assert [line.partition(":")[0] for line in lines[6:]] == ["  lost 2", "  doubled 1"]
    assert all(line.endswith(" default.a.r") for line in lines[6:])


def test_a_line_that_a_kill_cut_off_hides_no_other(folder: Path) -> None:
    chaos_report.fault("stopped by SIGTERM")
    (folder / "1.jsonl").write_text('{"fault": "killed from outside", "count": 1}\n{"fault": "kil')
    assert chaos_report.read(folder).faults == {"stopped by SIGTERM": 1, "killed from outside": 1}


def test_outside_of_the_chaos_tests_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(chaos_report.FOLDER, raising=False)
    chaos_report.fault("killed from outside")
    chaos_report.judged("default.a.r", lost=1)
    assert chaos_report.read(tmp_path).lines(7) == []
