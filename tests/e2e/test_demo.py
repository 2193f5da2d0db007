"""The demonstration of `make demo`, from its first line to the tree of its trace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.commands import demonstration
from tests.helpers.databases import DatabaseServer

NOTES = "# Releases\n\nThe next release is on the second Tuesday of May. It will be called Periwinkle.\n"
QUESTION = "When is the next release?"
DEMO = "perdure_client.demo"
DEMO_S = 90


def chapters(output: str) -> dict[str, str]:
    """Returns the text under each heading."""
    parts = re.split(r"^== (.*)$", output, flags=re.MULTILINE)
    return {heading.partition(":")[0]: text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def labels(trace: str) -> dict[str, int]:
    """Returns the labels of a drawn tree, each with its depth in it; of equal labels the first."""
    found: dict[str, int] = {}
    for line in trace.splitlines():
        if match := re.match(r"([│├└─ ]*)(\S.*?) +[━┄╌▸]", line):
            found.setdefault(match[2], len(match[1]) // 3)
    return found


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "releases.md").write_text(NOTES, encoding="utf-8")
    return folder


def test_it_answers_from_the_documentation_with_sources_and_shows_the_trace(folder: Path) -> None:
    result = demonstration(folder / "home", DEMO, DEMO_S, YES="1")
    assert result.returncode == 0, (result.stdout[-3000:], result.stderr)
    assert result.stderr == ""
    told = chapters(result.stdout)
    assert list(told) == [
        "A server", "A run of the agent `research`", "The run waits for a decision", "The answer", "The trace",
    ]  # fmt: skip
    assert "starting the embedded PostgreSQL" in told["A server"]
    assert "Approved, as YES=1 says." in told["The run waits for a decision"]
    answer = told["The answer"]
    assert "its lease expires" in answer
    assert re.search(r"^  \[1\] \S+\.md, .+\n      “.+”$", answer, re.MULTILINE), answer
    assert "Written by: extractive" in answer
    assert re.search(r"^The run \S+ ended as SUCCEEDED\.$", answer, re.MULTILINE)
    found = labels(told["The trace"])
    assert [found.get(name) for name in ("execution 1", "research.write", "research.publish")] == [1, 2, 2], told
    assert found.get(next(name for name in found if name.startswith("research  "))) == 0
    assert "APPROVED by dev" in told["The trace"]
    assert list((folder / "home").rglob("PG_VERSION")) == [], "its data was its own, and is gone"


def test_it_answers_from_a_folder_of_ones_own(
    tmp_path: Path, documents: Path, database_server: DatabaseServer, empty_database_url: str
) -> None:
    result = demonstration(
        tmp_path, DEMO, DEMO_S, YES="1", DOCS=str(documents), QUESTION=QUESTION, PERDURE_DATABASE_URL=empty_database_url
    )
    assert result.returncode == 0, (result.stdout[-3000:], result.stderr)
    told = chapters(result.stdout)
    assert "embedded" not in told["A server"]
    assert "1 loaded" in told["A server"]
    assert "“The next release is on the second Tuesday of May.” [1] Releases (releases.md)" in told["The answer"]
    assert "  [1] releases.md, Releases" in told["The answer"]
    assert "ended as SUCCEEDED." in told["The answer"]


def test_where_nobody_can_be_asked_it_says_so_and_publishes_nothing(
    tmp_path: Path, documents: Path, database_url: str
) -> None:
    result = demonstration(
        tmp_path, DEMO, DEMO_S, DOCS=str(documents), QUESTION=QUESTION, PERDURE_DATABASE_URL=database_url
    )
    # A refused answer is an outcome: the run succeeds, and with it the demonstration.
    assert result.returncode == 0, (result.stdout[-3000:], result.stderr)
    told = chapters(result.stdout)
    assert "standard input is no terminal: rejected. YES=1 approves." in told["The run waits for a decision"]
    assert "ended as SUCCEEDED, and not published." in told["The answer"]
    assert "research.publish" not in told["The trace"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DOCS": "nowhere"}, "DOCS=nowhere is no folder"),
        ({"PERDURE_DATABASE_URL": "postgresql://user:hidden@127.0.0.1:1/nothing"}, "the server stopped with status 1"),
    ],
    ids=["no documents", "no database"],
)
def test_what_keeps_it_from_beginning_is_said_and_ends_it_with_1(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    result = demonstration(tmp_path, DEMO, DEMO_S, YES="1", **variables)
    assert result.returncode == 1
    assert f"The demonstration failed: {said}" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert "hidden" not in result.stdout + result.stderr
