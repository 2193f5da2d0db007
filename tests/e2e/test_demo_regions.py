"""The demonstration of `make demo-regions`: a region is lost under its watchers, another one goes on, all is whole."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.commands import demonstration
from tests.e2e.test_demo import chapters

DEMO_S = 110


def test_a_region_is_lost_and_its_runs_go_on_and_return(folder: Path) -> None:
    result = demonstration(folder / "home", "perdure_client.demo_regions", DEMO_S)
    assert result.returncode == 0, (result.stdout[-4000:], result.stderr)
    assert result.stderr == ""
    told = chapters(result.stdout)
    assert list(told) == [
        "Three regions",
        "3 runs that live in us-east1, started and watched through europe-west1",
        "us-east1 is back, and gets its runs back",
        "Is everything whole?",
    ]
    regions, lost, back, verdict = told.values()
    killed = re.search(r"Killing all servers of us-east1 \(process (\d+)\) with SIGKILL during step \d+ of use1-", lost)
    assert killed
    assert f"serves the cell use1 (process {killed[1]})" in regions
    assert "us-west1 goes on with the run" in lost
    assert "us-east1's server answers again, and is STANDING_BY" in back
    assert "perdure return use1: us-east1 has the claim, epoch 3" in back
    assert "handed over: another region has its cell" in back
    assert "  NO " not in verdict
    assert re.search(r"From the loss to the next committed step: \d+\.\d s", verdict)
    assert "Nothing is lost, and nothing was done twice." in verdict
    assert list((folder / "home").rglob("PG_VERSION")) == [], "its data was its own, and is gone"
