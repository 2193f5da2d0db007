"""`perdure-server database`: a PostgreSQL alone, for servers that come and go."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
import pytest

from tests.helpers.server import ROOT
from tests.helpers.waiting import scaled

READY = "the database is at "


def test_it_prints_its_url_serves_until_it_is_told_to_stop_and_then_is_gone() -> None:
    folder = Path(tempfile.mkdtemp(prefix="perdure-database-"))  # root's PostgreSQL is another user, and must get in
    command = [sys.executable, "-m", "perdure_service", "database", "--data-dir", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(line for line in process.stdout if line.startswith(READY)).removeprefix(READY).strip()
            with psycopg.connect(url) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
            process.send_signal(signal.SIGTERM)
            assert process.wait(scaled(30)) == 0
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(url)
        finally:
            process.kill()
            shutil.rmtree(folder, ignore_errors=True)
