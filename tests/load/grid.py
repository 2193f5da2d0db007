"""A result with rows of variants and levels, and columns of measures: medians with ranges, ratios, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.load import plot
from tests.load.frame import machine, now


@dataclass(frozen=True)
class Measure:
    """A column.

    Attributes:
        digits: After the point, in the table.
    """

    name: str
    digits: int = 1


@dataclass(frozen=True)
class Ratio:
    """A column of a variant's median of `measure` by that of a baseline, at the same level."""

    title: str
    measure: str
    baseline: Mapping[str, str]


@dataclass
class Row:
    """What was measured of a variant at a level: for each measure one value of each repetition."""

    variant: str
    level: str
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, values: Mapping[str, float | None]) -> None:
        """Adds what one repetition has measured; None is not known."""
        for name, value in values.items():
            if value is not None:
                self.values.setdefault(name, []).append(value)

    def median(self, measure: str) -> float | None:
        """Returns the median of a measure, None if it was not measured."""
        return statistics.median(self.values[measure]) if self.values.get(measure) else None


@dataclass
class Grid:
    """What a benchmark came to.

    Attributes:
        measured: What the numbers are, in a sentence.
        level_name: What the levels are.
        plotted: The measure of the plot; empty for none.
        notes: What a reader has to know, such as what is not installed; a sentence each.
        given: Rows that were not measured here but are printed beside (of an article), with their column's title.
    """

    measured: str
    level_name: str
    measures: Sequence[Measure]
    ratios: Sequence[Ratio] = ()
    plotted: str = ""
    rows: list[Row] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    given: Mapping[str, Mapping[tuple[str, str], str]] = field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)

    def row(self, variant: str, level: object) -> Row:
        """Returns the row of a variant at a level, a new one at the end when there is none."""
        for one in self.rows:
            if (one.variant, one.level) == (variant, str(level)):
                return one
        self.rows.append(Row(variant, str(level)))
        return self.rows[-1]

    def ratio(self, ratio: Ratio, row: Row) -> float | None:
        """Returns a row's ratio, None where one of the two was not measured."""
        baseline = next(
            (one for one in self.rows if (one.variant, one.level) == (ratio.baseline.get(row.variant), row.level)), None
        )
        mine, other = row.median(ratio.measure), baseline.median(ratio.measure) if baseline else None
        return mine / other if mine is not None and other else None

    def markdown(self) -> str:
        """Returns the table, and beneath it what it was measured on and with."""
        shown = [one for one in self.measures if any(one.name in row.values for row in self.rows)]
        titles = [self.measured, self.level_name, *(one.name for one in shown), *(one.title for one in self.ratios)]
        titles += self.given
        lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in self.rows:
            cells = [row.variant, row.level, *(_cell(row.values.get(one.name, ()), one.digits) for one in shown)]
            ratios = (self.ratio(one, row) for one in self.ratios)
            cells += ["" if one is None else f"{one:.2f}" for one in ratios]
            cells += [of.get((row.variant, row.level), "") for of in self.given.values()]
            lines.append(f"| {' | '.join(cells)} |")
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines += ["", f"{machine()}; load {self.load[0]:.1f} to {self.load[1]:.1f}. {told}."]
        return "\n".join([*lines, *self.notes])

    def as_json(self) -> dict[str, Any]:
        """Returns the result with every value."""
        return {
            "measured": self.measured,
            "at": now(),
            "machine": machine(),
            "load": self.load,
            "settings": dict(self.settings),
            "notes": self.notes,
            "rows": [
                {
                    "variant": row.variant,
                    self.level_name: row.level,
                    **{
                        name: {"median": row.median(name), "values": [round(one, 4) for one in values]}
                        for name, values in row.values.items()
                    },
                    **{one.title: self.ratio(one, row) for one in self.ratios},
                }
                for row in self.rows
            ],
        }

    def svg(self) -> str:
        """Returns the plot, empty if there is none."""
        if not self.plotted:
            return ""
        lines: dict[str, dict[str, float]] = {}
        for row in self.rows:
            if (median := row.median(self.plotted)) is not None:
                lines.setdefault(row.variant, {})[row.level] = median
        return plot.lines(self.plotted, self.level_name, lines)


def _cell(values: Sequence[float], digits: int) -> str:
    """Returns the median with the range; one value stands alone."""
    if not values:
        return ""
    middle, least, most = (f"{one:,.{digits}f}" for one in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"
