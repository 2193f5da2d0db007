"""The example projects, copied to a folder of their own and tested there as their README says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT, environment
from tests.helpers.databases import DatabaseServer
from tests.helpers.waiting import scaled

EXAMPLES = ROOT / "service" / "docs" / "examples"
PROJECTS = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))


@pytest.mark.parametrize("project", PROJECTS)
def test_an_example_passes_its_own_tests(project: str, folder: Path, database_server: DatabaseServer) -> None:
    shutil.copytree(EXAMPLES / project, folder / project, ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:asyncio"],
        cwd=folder / project,
        env=environment(folder / "home", PERDURE_TEST_DATABASE_URL=database_server.url),
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert PROJECTS
    for project in PROJECTS:
        assert f"]({project}/README.md)" in listed
