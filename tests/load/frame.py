"""What every benchmark is made of: measured series, the machine they were measured on, and where results go."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from tests.helpers.databases import DatabaseServer

DOCUMENT = Path(__file__).parents[2] / "service" / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Series:
    """What was measured of one variant.

    Attributes:
        values: In `unit`, in the order in which they were measured.
    """

    name: str
    unit: str
    values: Sequence[float]

    def quantile(self, share: float) -> float:
        """Returns the smallest value that at least this share of all is not above."""
        ordered = sorted(self.values)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Result:
    """What a benchmark came to.

    Attributes:
        measured: What the numbers are, in a sentence.
        series: One for each variant; variants are measured at the same time, so their ratios mean more than they do.
        settings: What the benchmark was told, and what it decided.
        load: The load average of the machine at the beginning and at the end.
    """

    measured: str
    series: Sequence[Series]
    settings: Mapping[str, Any] = field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)

    def markdown(self) -> str:
        """Returns the table, and beneath it what it was measured on and with."""
        first = self.series[0].median
        lines = [
            f"| {self.measured} | n | median | p95 | maximum | median, of the first |",
            "|---|---|---|---|---|---|",
        ]
        for one in self.series:
            cells = [f"{value:.2f} {one.unit}" for value in (one.median, one.quantile(0.95), max(one.values))]
            share = f"{one.median / first:.2f}" if first else ""
            lines.append(f"| {one.name} | {len(one.values)} | {' | '.join(cells)} | {share} |")
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines += ["", f"{machine()}; load {self.load[0]:.1f} to {self.load[1]:.1f}. {told}."]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Returns the result with every value."""
        return {
            "measured": self.measured,
            "at": now(),
            "machine": machine(),
            "load": self.load,
            "settings": dict(self.settings),
            "series": [
                {
                    "name": one.name,
                    "unit": one.unit,
                    "median": one.median,
                    "p95": one.quantile(0.95),
                    "maximum": max(one.values),
                    "values": [round(value, 4) for value in one.values],
                }
                for one in self.series
            ],
        }

    def svg(self) -> str:
        """Returns no plot."""
        return ""


class Outcome(Protocol):
    """What a benchmark returns: `Result` or `grid.Grid`."""

    def markdown(self) -> str:
        """Returns the table."""

    def as_json(self) -> dict[str, Any]:
        """Returns every value."""

    def svg(self) -> str:
        """Returns the plot, empty if there is none."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        add_options: Adds its options to the command's.
        run: Measures. Bounded in count and in time by its options; never asserts a time.
    """

    name: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, DatabaseServer, Callable[[str], None]], Outcome]


def machine() -> str:
    """Returns what the numbers depend on most."""
    return f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def load() -> float:
    """Returns the load average of the last minute."""
    return os.getloadavg()[0]


def now() -> str:
    """Returns the time of a result."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_results(results: Mapping[str, Outcome], json_path: Path | None, document: Path | None) -> None:
    """Writes results as JSON, and their tables between the marks of their names in a document, plots beside it."""
    if json_path is not None:
        text = json.dumps({name: result.as_json() for name, result in results.items()}, indent=2)
        json_path.write_text(text + "\n", encoding="utf-8")
    if document is not None:
        text = document.read_text(encoding="utf-8")
        for name, result in results.items():
            content = result.markdown()
            if svg := result.svg():
                plot = document.with_name(f"{document.stem}-{name}.svg")
                plot.write_text(svg, encoding="utf-8")
                content += f"\n\n![{name}, as lines]({plot.name})"
            text = put(text, name, content)
        document.write_text(text, encoding="utf-8")


def put(text: str, name: str, content: str) -> str:
    """Returns a document with what stands between the marks of a name replaced.

    Raises:
        ValueError: It has no such marks.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    found = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if not found.search(text):
        raise ValueError(f"the document has no place for {name}: {begin}")
    return found.sub(lambda _: f"{begin}\n\n{content}\n\n{end}", text, count=1)
