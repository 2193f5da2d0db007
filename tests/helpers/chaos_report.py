"""Counts what the chaos tests break and what they find afterwards, in all processes, for the summary at the end.

Each process appends lines of JSON to a file of its own in the folder that `FOLDER` names, so that a server which dies
at once, and a worker of pytest-xdist, are counted like the process that prints. Outside of `tests/chaos` nothing is.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER = "PERDURE_CHAOS_REPORT"
"""The environment variable with the folder, while a chaos test runs."""

Fault = Literal[
    "killed at a point of the seam",
    "killed from outside",
    "stopped by SIGTERM",
    "servers frozen",
    "clocks an hour wrong",
    "replies to COMMIT lost",
    "step bodies whose process died before their checkpoint",
    "database away",
    "database silent",
]


def fault(kind: Fault, count: int = 1) -> None:
    """Counts something that was broken."""
    _append({"fault": kind, "count": count})


def refused(sqlstate: str) -> None:
    """Counts a transaction that the database was made to refuse."""
    _append({"fault": f"transactions refused with {sqlstate}", "count": 1})


def judged(workflow_id: str, **found: int) -> None:
    """Counts what was found about a run (`Summary.COUNTED`). What is told of it again replaces a smaller number."""
    unknown = set(found) - set(Summary.COUNTED)
    if unknown:
        raise ValueError(f"nothing counts {sorted(unknown)}")
    _append({"run": f"{os.environ.get('PYTEST_CURRENT_TEST', '').partition(' ')[0]} {workflow_id}", "found": found})


def _append(line: Mapping[str, Any]) -> None:
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    # One write to a file opened for appending: threads of one process do not mix their lines.
    with (Path(folder) / f"{os.getpid()}.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


@dataclass
class Summary:
    """What was counted, all processes together.

    Attributes:
        faults: How often each kind of fault was injected.
        runs: What the judge found about each run: the largest number that was told of it.
    """

    COUNTED = ("finished", "repeated", "checkpoints", "events", "effects", "lost", "doubled")

    faults: Counter[str] = field(default_factory=Counter)
    runs: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line that a process has written."""
        if "fault" in line:
            self.faults[line["fault"]] += line["count"]
        else:
            self.runs[line["run"]] = self.runs.get(line["run"], Counter()) | Counter(line["found"])

    def total(self, name: str) -> int:
        """Returns the sum over all runs of one of `COUNTED`."""
        return sum(found[name] for found in self.runs.values())

    @property
    def sound(self) -> bool:
        """Whether nothing was lost and nothing done twice."""
        return self.total("lost") == self.total("doubled") == 0

    def lines(self, seed: int) -> list[str]:
        """Returns the lines to print; none when no chaos test has broken or judged anything."""
        if not self.faults and not self.runs:
            return []
        faults = [f"  {count:>7}  {kind}" for kind, count in sorted(self.faults.items())]
        wrong = [
            f"  {name} {found[name]}: {run}"
            for run, found in sorted(self.runs.items())
            for name in ("lost", "doubled")
            if found[name]
        ]
        return [
            f"seed {seed} (PERDURE_TEST_SEED={seed} repeats it)",
            f"faults injected {self.faults.total()}",
            *faults,
            f"runs finished {self.total('finished')}, steps repeated {self.total('repeated')}",
            f"rows checked: checkpoints {self.total('checkpoints')}, events {self.total('events')}, "
            f"effects {self.total('effects')}",
            f"lost {self.total('lost')}",
            f"doubled {self.total('doubled')}",
            *wrong,
        ]


def read(folder: Path) -> Summary:
    """Returns what all processes have counted. A line that a kill has cut off counts for nothing."""
    summary = Summary()
    for path in sorted(folder.glob("*.jsonl")):
        for line in _whole(path.read_text().splitlines()):
            summary.add(line)
    return summary


def _whole(lines: Iterable[str]) -> Iterable[Mapping[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
