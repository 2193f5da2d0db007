"""The demonstration of `make demo-crash`: a server is killed under a watcher, another one finishes, all is whole."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.commands import demonstration
from tests.e2e.test_demo import chapters

DEMO_S = 120


def test_a_kill_under_a_watcher_loses_nothing_and_doubles_nothing(folder: Path) -> None:
    result = demonstration(folder / "home", "perdure_client.demo_crash", DEMO_S)
    assert result.returncode == 0, (result.stdout[-4000:], result.stderr)
    assert result.stderr == ""
    told = chapters(result.stdout)
    assert list(told) == [
        "A database, and server A",
        "A run of the agent `payroll` on server A",
        "Is everything whole?",
    ]
    run, verdict = told["A run of the agent `payroll` on server A"], told["Is everything whole?"]
    killed = re.search(r"Killing server A \(process (\d+)\) with SIGKILL during step (\d+)", run)
    assert killed
    assert f"server A (process {killed[1]}) serves on" in told["A database, and server A"]
    assert "The watcher's connection broke" in run
    assert re.search(r"The run was taken back from \S+, \d+\.\d s after", run)
    assert f"Begun again, as it was cut off: step {killed[2]}\n" in verdict
    assert "  NO " not in verdict
    assert "Nothing is lost, and nothing was done twice." in verdict
    assert list((folder / "home").rglob("PG_VERSION")) == [], "its data was its own, and is gone"
