"""`dev --reload`: a supervisor that starts the server again, in a new process, whenever the agents' code changes.

A new process, because Python cannot forget a module, nor DBOS a workflow. The old one is stopped like any server: it
lets step bodies finish and hands its runs over, so they continue in the new code (or end with NON_DETERMINISTIC, which
tells what was changed under them). The supervisor holds the embedded PostgreSQL, which runs on meanwhile, and the
address stays; clients reconnect by themselves. Code that cannot be loaded is shown, and the next change waited for.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from perdure_service.errors import ConfigurationError, PerdureError
from perdure_service.settings import Settings, configured_database_url

CHILD_OPTION = "--reload-child"
"""Tells a server that a supervisor has started it; not for people."""

LOOK_MS = 100
"""How often a server that has ended by itself is noticed. Changes of files are told at once."""

STOP_PATIENCE_S = 15.0
"""How long beyond the drain timeout a stopping server may take before it is killed."""

IGNORED = ("site-packages", "venv")
"""Folders that are not the user's code, beside those that watchfiles ignores (`.venv`, `.git`, `__pycache__` …)."""

CAUSE_FRAMES = 3
"""Of a traceback, when the agents' code cannot be loaded: its end is what the author has just written."""


def run(settings: Settings, documents_folder: Path | None, report: Callable[[str], None]) -> int:
    """Serves until SIGINT or SIGTERM, in one server process after the other; returns the exit status.

    Raises:
        ConfigurationError: Files cannot be watched, or the embedded PostgreSQL cannot be used; in one sentence.
    """
    stopping = threading.Event()
    with ExitStack() as stack:
        if configured_database_url(settings) is None:
            from perdure_service.store import embedded

            stack.enter_context(embedded.start(settings.data_dir))
        server = _Server(_command(settings, documents_folder), settings.drain_timeout.total_seconds())

        def stop(*_: object) -> None:
            if stopping.is_set():
                server.kill()
                os._exit(130)
            stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        stack.callback(server.stop)
        server.start()
        for changed in _changes(_watched(settings.agents), stopping):
            if changed:
                names = ", ".join(sorted({os.path.relpath(path) for path in changed})[:3])
                report(f"{names} changed; starting again …")
                server.stop()
                if not stopping.is_set():
                    server.start()
            elif server.ended:
                report("the server has ended; it is started again at the next change of a file")
                server.forget()
        return 0


def end_with_parent() -> None:
    """Makes this process stop when its supervisor is gone: the pipe that is its standard input ends then."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="supervisor", daemon=True).start()


def show_cause(error: PerdureError) -> None:
    """Prints the end of the traceback of what an error was raised from, if anything."""
    if error.__cause__ is not None:
        traceback.print_exception(error.__cause__, limit=-CAUSE_FRAMES, chain=False)


class _Server:
    """The server process of the moment."""

    def __init__(self, command: list[str], drain_timeout_s: float) -> None:
        self._command = command
        self._patience_s = drain_timeout_s + STOP_PATIENCE_S
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it says by itself where it listens."""
        # A process group of its own: Ctrl-C is for the supervisor, which stops it.
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, process_group=0)  # noqa: S603 - ourselves

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """Lets it hand over its runs and waits for its end."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.forget()

    def kill(self) -> None:
        """Ends it at once."""
        if self._process is not None:
            self._process.kill()

    def forget(self) -> None:
        """Forgets a process that has ended."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None


def _command(settings: Settings, documents_folder: Path | None) -> list[str]:
    """Returns the command that serves with the same settings, at an address that stays."""
    host, _, port = settings.address.rpartition(":")
    if port == "0":
        with socket.create_server((host.strip("[]"), 0)) as probe:
            port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "perdure_service", "dev", CHILD_OPTION, "--address", f"{host}:{port}"]
    for name in settings.agents:
        command += ["--agents", name]
    if settings.data_dir is not None:
        command += ["--data-dir", str(settings.data_dir)]
    if documents_folder is not None:
        command += ["--documents", str(documents_folder)]
    return command


def _watched(modules: Iterable[str]) -> list[Path]:
    """Returns the working directory and where the agents' modules lie outside of it; imports nothing."""
    here = Path.cwd()
    found = [here]
    sys.path.insert(0, str(here))
    for name in {name.partition(".")[0] for name in modules}:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue  # the server says so, and the module may yet come
        places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
        found += [path for place in places if (path := Path(place)).exists() and here not in path.resolve().parents]
    return found


def _changes(paths: list[Path], stopping: threading.Event) -> Iterator[list[str]]:
    """Yields the Python files that have changed, none now and then, until it is to stop."""
    try:
        from watchfiles import PythonFilter, watch
    except ImportError:
        raise ConfigurationError("`dev --reload` needs watchfiles: pip install 'perdure[embedded]'") from None

    class Ours(PythonFilter):
        ignore_dirs = (*PythonFilter.ignore_dirs, *IGNORED)

    for changed in watch(
        *paths,
        watch_filter=Ours(),
        stop_event=stopping,
        rust_timeout=LOOK_MS,
        yield_on_timeout=True,
        raise_interrupt=False,
    ):
        yield [path for _, path in changed]
