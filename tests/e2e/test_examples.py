"""The example projects, copied to a folder of their own and tested there as their README says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT, block_of_readme, environment
from tests.helpers.databases import DatabaseServer
from tests.helpers.waiting import scaled

EXAMPLES = ROOT / "service" / "docs" / "examples"
PROJECTS = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))


@pytest.mark.parametrize("project", PROJECTS)
def test_an_example_passes_its_own_tests(project: str, folder: Path, database_server: DatabaseServer) -> None:
    shutil.copytree(EXAMPLES / project, folder / project, ignore=shutil.ignore_patterns("__pycache__"))
    passes(folder / project, folder, database_server, "-p", "no:asyncio")


def test_the_tests_in_the_documents_pass_with_the_agent_of_the_readme(
    folder: Path, database_server: DatabaseServer
) -> None:
    project = folder / "documents"
    project.mkdir()
    (project / "my_agents.py").write_text(block_of_readme("from datetime import timedelta"))
    text = (ROOT / "service" / "docs" / "writing-agents.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(from perdure_service\.testing import AgentHarness\n.*?)^```$", text, re.M | re.S)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (project / f"test_{number}.py").write_text(block)
    passes(
        project, folder, database_server, "-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"
    )


def passes(project: Path, folder: Path, database_server: DatabaseServer, *options: str) -> None:
    """Runs the tests of a folder as a user would."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *options],
        cwd=project,
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
