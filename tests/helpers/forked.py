"""Servers as processes that are forked from one which has imported everything: a start takes a part of a second.

The process that is forked from has imported the product and has no threads; the agents, and all that reads the
environment, are imported by the server itself. What a server does after that is what `perdure-server` does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.waiting import scaled

PRELOADED = (
    "perdure_service.__main__",
    "perdure_service.app",
    "perdure_service.agents.research",
    "perdure_service.agents.notes",
    "perdure_service.agents.assistant",
    "perdure_service.agents.briefing",
    "tests.helpers.settled",  # the last: it settles what the others have loaded
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))
_running: set[ForkedServer] = set()


class ForkedServer:
    """A running `perdure-server`, with the part of `subprocess.Popen` that tests use.

    It prints to `log`; what it says on standard error goes there too, or to `errors`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
        errors: Path | None = None,
    ) -> None:
        self._process = _context.Process(
            target=_serve, args=(list(arguments), dict(environment), folder, log, errors or log)
        )
        self._process.start()
        pid = self._process.pid
        assert pid is not None
        self.pid = pid
        _running.add(self)

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """Returns its exit status, None while it runs."""
        status = self._process.exitcode
        if status is not None:
            _running.discard(self)
        return status

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("perdure-server", timeout)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, also to one that is stopped."""
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs `perdure-server` to its end, as `subprocess.run` does with a process that imports everything first.

    Raises:
        subprocess.TimeoutExpired: It ran for longer than `timeout` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory(prefix="perdure-command-") as made:
        out, errors = Path(made, "out"), Path(made, "err")
        process = ForkedServer(arguments, environment, folder, out, errors)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(arguments), status, out.read_text(), errors.read_text())


@atexit.register
def _end_all() -> None:
    # multiprocessing would wait for them at the end of this process.
    for server in list(_running):
        server.kill()
        server.wait(scaled(10))


def _serve(arguments: list[str], environment: dict[str, str], folder: Path, log: Path, errors: Path) -> None:
    """Becomes `perdure-server` with these arguments; does not return."""
    for stream, path in ((sys.stdout, log), (sys.stderr, errors)):
        with path.open("ab", buffering=0) as file:
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from perdure_service.__main__ import main

    from tests.helpers import sql_record

    sql_record.start()

    main(arguments)
