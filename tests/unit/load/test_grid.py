"""The grid of the benchmarks: medians, ranges, ratios and the plot."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.load.frame import write_results
from tests.load.grid import Grid, Measure, Ratio

SVG = "{http://www.w3.org/2000/svg}"


def grid() -> Grid:
    made = Grid(
        "runs",
        "clients",
        [Measure("runs/s"), Measure("p50 ms", 2), Measure("never measured")],
        [Ratio("x plain", "runs/s", {"ours": "plain"})],
        plotted="runs/s",
        notes=["A note."],
        given={"the article": {("plain", "1"): "48.0 (19)"}},
    )
    for level, factor in ((1, 1.0), (128, 10.0)):
        for value in (100.0, 300.0, 200.0):
            made.row("ours", level).add({"runs/s": factor * value, "p50 ms": 1.0, "never measured": None})
            made.row("plain", level).add({"runs/s": value / 4})
    made.row("alone", 1).add({"runs/s": 5.0})
    return made


def test_a_cell_is_the_median_with_the_range_and_one_value_stands_alone() -> None:
    lines = grid().markdown().splitlines()
    assert lines[0] == "| runs | clients | runs/s | p50 ms | x plain | the article |"
    assert lines[2] == "| ours | 1 | 200.0 (100.0-300.0) | 1.00 | 4.00 |  |"
    assert lines[3] == "| plain | 1 | 50.0 (25.0-75.0) |  |  | 48.0 (19) |"
    assert "| ours | 128 | 2,000.0 (1,000.0-3,000.0) | 1.00 | 40.00 |  |" in lines
    assert lines[-1] == "A note."


def test_a_ratio_is_of_the_same_level_and_empty_without_its_baseline() -> None:
    made = grid()
    (ratio,) = made.ratios
    assert made.ratio(ratio, made.row("ours", 128)) == 40.0
    assert made.ratio(ratio, made.row("ours", 7)) is None
    assert made.ratio(ratio, made.row("alone", 1)) is None


def test_the_values_are_kept_in_their_order() -> None:
    row = grid().as_json()["rows"][0]
    assert row["runs/s"] == {"median": 200.0, "values": [100.0, 300.0, 200.0]}
    assert (row["variant"], row["clients"], row["x plain"]) == ("ours", "1", 4.0)


def test_the_plot_has_a_line_for_each_variant_and_a_point_for_each_level() -> None:
    drawn = ElementTree.fromstring(grid().svg())
    lines = [one.attrib["points"].split() for one in drawn.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [2, 2, 1]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights[1] < heights[0], "more is higher"
    assert {"ours", "plain", "alone", "128"} <= {one.text for one in drawn.iter(f"{SVG}text")}


def test_a_plot_is_written_beside_the_document(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("<!-- begin x -->\n<!-- end x -->\n", encoding="utf-8")
    write_results({"x": grid()}, None, document)
    assert "![x, as lines](page-x.svg)" in document.read_text(encoding="utf-8")
    assert (tmp_path / "page-x.svg").read_text(encoding="utf-8") == grid().svg()
