"""DBOS's own code on our engine, on a database that keeps failing (in a child process: DBOS is a singleton)."""

import json
import subprocess
import sys

import pytest

from tests.conftest import SEED
from tests.helpers import scaled
from tests.helpers.databases import FORMS, DatabaseServer, url_in_form
from tests.helpers.flaky_dbos import WORKFLOWS


@pytest.mark.parametrize("form", FORMS)
def test_workflows_succeed_although_a_tenth_of_statements_and_commits_fail(
    database_server: DatabaseServer, empty_database_url: str, form: str
) -> None:
    if form not in database_server.forms:
        pytest.skip(f"CockroachDB is not reached by {form}")
    child = subprocess.run(
        [sys.executable, "-m", "tests.helpers.flaky_dbos", url_in_form(empty_database_url, form), str(SEED)],
        capture_output=True,
        text=True,
        timeout=scaled(90),
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["results"] == [3] * WORKFLOWS
    assert report["events"] == [3] * WORKFLOWS
    assert report["statuses"] == {"SUCCESS": WORKFLOWS}
    assert report["steps"] == [4] * WORKFLOWS
    assert report["most_effects"] == 1  # what is repeated is the transaction, not the step
    assert min(report["faults"].values()) >= 1, report["faults"]
