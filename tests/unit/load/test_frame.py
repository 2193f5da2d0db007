"""The frame of the benchmarks: what it makes of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.load.__main__ import BENCHMARKS
from tests.load.frame import DOCUMENT, Result, Series, put, write_results


def result() -> Result:
    return Result(
        "from a to b",
        [Series("plain", "s", [4.0, 1.0, 2.0, 3.0]), Series("other", "s", [1.0, 1.0, 1.0, 2.0])],
        {"kills": 4},
        (0.5, 1.5),
    )


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 10.0), (0.95, 19.0), (0.96, 20.0), (1.0, 20.0), (0.01, 1.0), (0.0, 1.0)]
)
def test_a_quantile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    assert Series("x", "s", [float(number) for number in range(20, 0, -1)]).quantile(share) == expected


def test_a_table_has_every_variant_and_its_ratio_to_the_first() -> None:
    lines = result().markdown().splitlines()
    assert lines[2:4] == [
        "| plain | 4 | 2.50 s | 4.00 s | 4.00 s | 1.00 |",
        "| other | 4 | 1.00 s | 2.00 s | 2.00 s | 0.40 |",
    ]
    assert lines[-1].endswith("load 0.5 to 1.5. kills 4.")


def test_results_go_between_the_marks_of_their_name_and_again(tmp_path: Path) -> None:
    document, values = tmp_path / "page.md", tmp_path / "values.json"
    document.write_text("# A\n<!-- begin x -->\nold\n<!-- end x -->\nrest\n", encoding="utf-8")
    for _ in range(2):
        write_results({"x": result()}, values, document)
        text = document.read_text(encoding="utf-8")
        assert text.startswith("# A\n<!-- begin x -->\n\n| from a to b |")
        assert text.endswith("\n<!-- end x -->\nrest\n")
        assert "old" not in text
    (plain, _) = json.loads(values.read_text(encoding="utf-8"))["x"]["series"]
    assert (plain["values"], plain["median"]) == ([4.0, 1.0, 2.0, 3.0], 2.5)


def test_the_document_has_a_place_for_every_benchmark() -> None:
    for name in BENCHMARKS:
        put(DOCUMENT.read_text(encoding="utf-8"), name, "")
    with pytest.raises(ValueError, match="no place for nothing"):
        put("", "nothing", "")
