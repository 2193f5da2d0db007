"""What the chaos tests have broken, checked and found, added up over all of them and printed after the last one.

Nothing here is a constant: faults are counted where they are injected or where their traces are found, lost and doubled
rows by `tests.helpers.judge`, before it fails the test. A report travels from a worker of pytest-xdist to the process
that prints as a property of its test.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

PROPERTY = "chaos"
FAULT = "fault: "
RUNS = "runs finished"
REPEATED = "steps repeated"
CHECKED = "rows checked"
LOST = "lost"
DOUBLED = "doubled"
TOTALS = (RUNS, REPEATED, CHECKED, LOST, DOUBLED)

_counts: Counter[str] = Counter()
_lock = threading.Lock()


def fault(kind: str, number: int = 1) -> None:
    """Counts faults of a kind, which is named in the plural: "kills"."""
    count(FAULT + kind, number)


def count(what: str, number: int) -> None:
    """Adds to one of `TOTALS`, or to a kind of fault."""
    if number:
        with _lock:
            _counts[what] += number


def take() -> dict[str, int]:
    """Returns what was counted since the last call."""
    with _lock:
        taken = dict(_counts)
        _counts.clear()
    return taken


def lines(reports: Iterable[Mapping[str, int]], seed: int) -> list[str]:
    """Returns the summary of reports; nothing when nothing was broken or checked."""
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report)
    if not total:
        return []
    faults = {name.removeprefix(FAULT): number for name, number in sorted(total.items()) if name.startswith(FAULT)}
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(faults.items(), key=lambda item: -item[1]))
    told = [("faults injected", f"{sum(faults.values())} ({kinds})" if kinds else "0")]
    told += [(name, str(total[name])) for name in TOTALS]
    told += [("seed", f"PERDURE_TEST_SEED={seed}")]
    return [f"{name:<16} {value}" for name, value in told]


def is_bad(reports: Iterable[Mapping[str, int]]) -> bool:
    """Returns whether anything was lost or doubled."""
    return any(report.get(LOST) or report.get(DOUBLED) for report in reports)
