"""A real server in a process of its own, which tests start, kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from perdure_service.store.engine import parse_url

from tests.helpers import chaos_report, marks
from tests.helpers.forked import ForkedServer
from tests.helpers.waiting import eventually, free_port, scaled

ROOT = Path(__file__).parents[2]
READY = "perdure serves on"
KILLED = 137
"""The exit status of a server that `tests.helpers.chaos` has killed."""


class ServerProcess:
    """`perdure-server dev` (or `serve`) on a database, with the agents of some modules.

    `dev` owns its database, so a start takes back at once what a killed one left. What it has logged is searched for
    payloads and secrets when it ends, see `tests.helpers.marks`.
    """

    def __init__(self, database_url: str, *agents: str, command: str = "dev", **environment: str) -> None:
        self.database_url = database_url
        self.agents = agents or ("tests.helpers.agents",)
        self.command = command
        self.environment = environment
        self.port = free_port()
        self.log_path = Path(tempfile.mkstemp(prefix="perdure-server-", suffix=".log")[1])
        self._process: ForkedServer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What all of its processes have printed."""
        return self.log_path.read_text(errors="replace")

    def start(self, **environment: str) -> ServerProcess:
        """Starts it and waits until it serves; `environment` is for this start only."""
        assert self._process is None or self._process.poll() is not None, "it runs"
        seen = len(self.log)
        arguments = [self.command, "--address", self.address]
        for module in self.agents:
            arguments += ["--agents", module]
        settings = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
            "PERDURE_DATABASE_URL": with_password(self.database_url),
            "PERDURE_MODEL__API_KEY": marks.SECRET,
            "PERDURE_EMBEDDER__API_KEY": marks.SECRET,
            "PERDURE_QUEUE_POLL_INTERVAL": "0.1",
            "PERDURE_WATCH_POLL_INTERVAL": "0.3",
            # Tests of other things must not depend on how long this machine lets a run wait.
            "PERDURE_PARK_AFTER": "600",
            "GRPC_VERBOSITY": "ERROR",
            **self.environment,
            **environment,
        }
        self._process = ForkedServer(arguments, settings, ROOT, self.log_path)

        def ready() -> bool:
            process = self._process
            assert process is not None
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}:\n{self.log[-4000:]}")
            return READY in self.log[seen:]

        eventually(ready, 30, what="the server serves")
        return self

    def kill(self) -> None:
        """kill -9."""
        process = self._process
        assert process is not None
        if process.poll() is None:
            chaos_report.fault("killed from outside")
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.check_log()

    @property
    def has_ended(self) -> bool:
        """Whether it was started, and has ended since."""
        return self._process is not None and self._process.poll() is not None

    def wait_for_end(self, timeout: float = 30) -> int:
        """Waits until it has ended by itself; returns its exit status."""
        assert self._process is not None
        status = self._process.wait(scaled(timeout))
        if status == KILLED:
            chaos_report.fault("killed at a point of the seam")
        return status

    def stop(self) -> int:
        """SIGTERM; returns its exit status."""
        process = self._process
        if process is None or process.poll() is not None:
            return 0 if process is None else process.returncode
        chaos_report.fault("stopped by SIGTERM")
        process.terminate()
        try:
            return process.wait(scaled(30))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        try:
            self.check_log()
        finally:
            self.log_path.unlink(missing_ok=True)

    def check_log(self) -> None:
        """Fails when it has logged a payload or a secret."""
        if self.log_path.exists():
            marks.check_log(self.log, f"the log of the server at {self.address}")


def with_password(database_url: str) -> str:
    """Returns a database's URL with a password, which a database that asks for none ignores."""
    url = parse_url(database_url)
    return (url if url.password else url.set(password=marks.SECRET)).render_as_string(hide_password=False)


@contextmanager
def sql(database_url: str) -> Iterator[psycopg.Connection]:
    """A connection for looking behind the scenes, committed at the end."""
    url = parse_url(database_url).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
        yield connection


def effects(database_url: str, run_id: str) -> list[str]:
    """Returns what the test agents' steps have done for a run, in order: one line for every time a body ran."""
    with sql(database_url) as connection:
        rows = connection.execute(
            "SELECT what FROM public.test_effect WHERE run_id = %s ORDER BY number", (run_id,)
        ).fetchall()
    return [row[0] for row in rows]


def create_effects_table(database_url: str) -> None:
    """Makes the table in which the test agents' steps leave their traces."""
    with sql(database_url) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS public.test_effect (number BIGSERIAL PRIMARY KEY, run_id TEXT, what TEXT)"
        )
