"""Draws the lines of a benchmark as SVG, by hand: equal values make equal bytes.

The tables are the source of every number; what a few lines and words need is no reason for one more dependency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 40, 50
COLOURS = ("#0b6e4f", "#2f7fd8", "#c2410c", "#7c3aed", "#b45309", "#475569", "#be185d", "#0891b2")
"""Dark enough on white; the words beside the lines say the same for whoever sees no colours."""


def lines(measure: str, level_name: str, values: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a drawing of values by variant and level, on a logarithmic axis; levels are at equal distances."""
    levels = list(dict.fromkeys(level for of in values.values() for level in of))
    found = [value for of in values.values() for value in of.values() if value > 0]
    low, high = (
        (10 ** math.floor(math.log10(min(found))), 10 ** math.ceil(math.log10(max(found)))) if found else (1, 10)
    )
    high = max(high, low * 10)

    def x(level: str) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (levels.index(level) + 0.5) / len(levels)

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 20, measure),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, level_name, "middle"),
    ]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = y(10**power)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, at + 4, f"{10**power:,g}", "end"))
    parts += [_text(x(level), HEIGHT - BOTTOM + 18, level, "middle") for level in levels]
    for number, (name, of) in enumerate(values.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(level):.1f},{y(of[level]):.1f}" for level in levels if of.get(level, 0) > 0)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{one.split(",")[0]}" cy="{one.split(",")[1]}" r="3" fill="{colour}"/>'
            for one in points.split()
        ]
        at = TOP + 8 + 20 * number
        parts.append(f'<path d="M{WIDTH - RIGHT + 14} {at}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(WIDTH - RIGHT + 38, at + 4, name))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'
