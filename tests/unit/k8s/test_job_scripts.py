"""The scripts in the Jobs, run by bash with a program in the place of `cockroach` that answers as it is told."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.manifests import render

LICENCE = "crl-0-secret"
STAND_IN = """\
#!/usr/bin/env python3
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
calls = folder / "calls"
answers = json.loads((folder / "answers").read_text())
number = len(calls.read_text().splitlines()) if calls.exists() else 0
given = "" if sys.stdin.isatty() or "-e" in sys.argv or "-f" in sys.argv or "init" in sys.argv else sys.stdin.read()
with calls.open("a") as log:
    print(json.dumps([sys.argv[1:], given]), file=log)
status, said = answers[number] if number < len(answers) else [0, ""]
print(said)
sys.exit(status)
"""


def run(job: str, folder: Path, *answers: tuple[int, str], **environment: str) -> list[tuple[list[str], str]]:
    """Runs the script of a Job to its end; returns the calls of `cockroach`: its arguments, and what it was given.

    Args:
        job: The Job, as in the overlay of one cluster.
        folder: Stands for the pod's root.
        answers: Exit status and output of the first calls; those after them succeed.
        environment: What the container has in it.
    """
    (container,) = render("single-cluster").pod(job).spec["containers"]
    script = container["args"][0]
    for path in ("/cockroach", "/licence", "/backups"):
        script = script.replace(f"{path}/", f"{folder}{path}/")
    programs = folder / "programs"
    for path, text in ((folder / "cockroach" / "cockroach", STAND_IN), (programs / "sleep", "#!/bin/sh\n")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (folder / "cockroach" / "answers").write_text(json.dumps(answers))
    done = subprocess.run(
        ["/bin/bash", *container["command"][1:], script],
        env={**environment, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert LICENCE not in done.stdout + done.stderr
    return [tuple(json.loads(line)) for line in (folder / "cockroach" / "calls").read_text().splitlines()]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("answers", "calls"),
    [
        (((0, "Cluster successfully initialized"),), 1),
        (((1, "ERROR: cannot dial server"), (1, "ERROR: no such host"), (0, "initialized")), 3),
        (((1, "ERROR: cannot dial server"), (1, "ERROR: cluster has already been initialized")), 2),
    ],
)
def test_the_cluster_is_initialized_once_and_waited_for(
    tmp_path: Path, answers: tuple[tuple[int, str], ...], calls: int
) -> None:
    made = run("crdb-init", tmp_path, *answers, CRDB_HOST="crdb:26258")
    assert len(made) == calls
    assert made[0][0] == ["init", "--certs-dir=/certs", "--host=crdb:26258", "--cluster-name=perdure"]


def test_the_cluster_is_set_up_when_it_answers_and_gets_the_licence_that_nobody_else_sees(tmp_path: Path) -> None:
    (tmp_path / "licence").mkdir()
    (tmp_path / "licence" / "licence").write_text(f"{LICENCE}\n")
    (tmp_path / "licence" / "organization").write_text("Tide's Ltd\n")
    made = run("crdb-bootstrap", tmp_path, (1, ""), (1, ""), (0, "1"), CRDB_HOST="crdb-sql:26257")
    arguments = [call[3:] for call, _ in made]
    assert arguments == [["-e", "SELECT 1"]] * 3 + [["-f", "/sql/bootstrap.sql"], []]
    organization, licence = made[-1][1].splitlines()
    assert organization == "SET CLUSTER SETTING cluster.organization = 'Tide''s Ltd';"
    assert licence == f"SET CLUSTER SETTING enterprise.license = '{LICENCE}';"
    assert LICENCE not in json.dumps([call for call, _ in made])


def test_without_a_licence_the_cluster_is_set_up_all_the_same(tmp_path: Path) -> None:
    made = run("crdb-bootstrap", tmp_path, CRDB_HOST="crdb-sql:26257")
    assert [call[3:] for call, _ in made] == [["-e", "SELECT 1"], ["-f", "/sql/bootstrap.sql"]]


def test_every_database_has_its_schedule_once_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()
    (tmp_path / "backups" / "url").write_text("s3://bucket/path?AUTH=implicit\n")
    answers = ((1, ""), (0, ""), (1, "no such database"), (0, "1"))
    made = run("crdb-backups", tmp_path, *answers, CRDB_HOST="crdb-sql:26257", DATABASES="perdure_use1 perdure_usw1")
    connection = "CREATE EXTERNAL CONNECTION IF NOT EXISTS perdure_backups AS 's3://bucket/path?AUTH=implicit';"
    assert [given for _, given in made if given] == [connection, connection]
    statements = [" ".join(call[-1].split()) for call, given in made if not given]
    schedule = (
        "CREATE SCHEDULE IF NOT EXISTS {0} FOR BACKUP DATABASE {0} INTO 'external://perdure_backups/{0}' "
        "RECURRING '@hourly' FULL BACKUP '@daily' WITH SCHEDULE OPTIONS first_run = 'now'"
    )
    one, other = (schedule.format(name) for name in ("perdure_use1", "perdure_usw1"))
    assert statements == ["SELECT 1", "SELECT 1", one, "SELECT 1", other]
