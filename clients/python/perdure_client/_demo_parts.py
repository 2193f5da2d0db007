"""What demonstrations are made of: servers in processes of their own, and a run shown as it goes."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from perdure_client._errors import PerdureError
from perdure_client._events import WatchUpdate
from perdure_client._run_view import RunView
from perdure_client._types import JsonValue, Run
from perdure_client.cli._lines import EventLines
from perdure_client.cli._output import console, write_line
from perdure_client.cli._render import RunDisplay
from perdure_client.cli._text import clean

READY = "perdure serves on "
_NOISE = re.compile(r"\{|\d+/\d+ ")
"""Lines of a server's log, and the single migrations of a new database."""
START_TIMEOUT_S = 180.0
"""For the first start, which makes a database."""
STOP_TIMEOUT_S = 60.0
LOG_LINES = 20
DATABASE_READY = "the database is at "
REFRESHES_PER_SECOND = 8


Finding: TypeAlias = tuple[bool, str]
"""Whether something is as it is promised to be, and what it is."""


class DemoFailed(Exception):
    """The demonstration cannot go on; the message says why."""


def repository() -> Path | None:
    """Returns the folder of the repository that this runs in, or was installed from; None when there is none."""
    candidates = (Path.cwd(), *Path(__file__).resolve().parents)
    return next((path for path in candidates if (path / "service" / "docs").is_dir()), None)


def play(demonstrate: Callable[[Console, Path], bool]) -> int:
    """Runs a demonstration in a folder of its own.

    Args:
        demonstrate: Returns whether everything is as it is promised to be.

    Returns:
        The exit status: 0 if it is, else 1; 130 after Ctrl-C.
    """
    screen = console()
    try:
        with tempfile.TemporaryDirectory(prefix="perdure-demo-") as folder:
            whole = demonstrate(screen, Path(folder))
    except (DemoFailed, PerdureError) as error:
        screen.print(Text(f"The demonstration failed: {clean(str(error))}", style="red"))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if whole else 1


def judge(screen: Console, findings: Sequence[Finding], figures: str) -> bool:
    """Says what was promised and whether it is so, then the figures; returns whether all of it is so."""
    for good, text in findings:
        screen.print(Text("  yes  " if good else "  NO   ", style="green" if good else "red").append(clean(text)))
    write_line(figures)
    whole = all(good for good, _ in findings)
    verdict = "Nothing is lost, and nothing was done twice." if whole else "This is not as it is promised to be."
    screen.print(Text(verdict, style="bold green" if whole else "bold red"))
    return whole


def heading(screen: Console, text: str) -> None:
    """Begins a chapter."""
    screen.print(Text(f"\n== {clean(text)}", style="bold"))


# ---- servers ---------------------------------------------------------------------------------------------------------


def server_program() -> str:
    """Returns the path of `perdure-server`.

    Raises:
        DemoFailed: There is none.
    """
    program = shutil.which("perdure-server", path=str(Path(sys.executable).parent)) or shutil.which("perdure-server")
    if program is None:
        raise DemoFailed("there is no perdure-server; install it with: pip install 'perdure[service,embedded]'")
    return program


def begin(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen[str]:
    """Begins a `perdure-server` that Ctrl-C does not reach: the demonstration stops it itself.

    Args:
        arguments: Of the command.
        log: Where its log goes. It works in the file's folder: no dbos-config.yaml of the caller's counts.
        environment: More of it.
    """
    with log.open("w", encoding="utf-8") as log_file:
        return subprocess.Popen(  # noqa: S603 - our own program
            [server_program(), *arguments],
            env={**server_environment(), **environment},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            start_new_session=True,
        )


@contextmanager
def database(folder: Path) -> Generator[str]:
    """Runs a PostgreSQL with its data in a folder; yields its URL."""
    data = folder / "data"
    data.mkdir()
    process = begin(["database", "--data-dir", str(data)], folder / "database.log")
    try:
        url = wait_until_ready(process, folder / "database.log", DATABASE_READY, show=False)
        write_line("  PostgreSQL runs, with a database of its own that outlives the servers")
        yield url
    finally:
        stop(process)


def migrate(folder: Path, environment: dict[str, str]) -> None:
    """Makes what servers need in the database of an environment.

    Raises:
        DemoFailed: It cannot.
    """
    process = begin(["migrate"], folder / "migrate.log", **environment)
    process.communicate()
    if process.returncode:
        raise DemoFailed(f"the database could not be migrated\n{last_lines(folder / 'migrate.log')}")


def free_port() -> int:
    """Returns a port on which nobody listens yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_environment() -> dict[str, str]:
    """Returns the environment of a server: this one, without what is for its clients."""
    ours = ("PERDURE_NAMESPACE", "PERDURE_ADDRESS", "PERDURE_TOKEN")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def wait_until_ready(process: subprocess.Popen[str], log: Path, ready: str = READY, *, show: bool = True) -> str:
    """Shows what a server says until it says that it is ready; returns what follows that: its address.

    Raises:
        DemoFailed: It does not become ready.
    """
    assert process.stdout is not None
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(process.stdout, said), daemon=True).start()
    try:
        while (line := said.get(timeout=START_TIMEOUT_S)) is not None:
            if _NOISE.match(line):
                continue
            if show:
                write_line(f"  {clean(line)}")
            if line.startswith(ready):
                return line.removeprefix(ready).strip()
    except queue.Empty:
        raise DemoFailed(f"the server was not ready after {START_TIMEOUT_S:g} s\n{last_lines(log)}") from None
    raise DemoFailed(f"the server stopped with status {process.wait()}\n{last_lines(log)}")


def _read_lines(source: IO[str], said: queue.SimpleQueue[str | None]) -> None:
    for line in source:  # to its end, or the server would block on a full pipe
        said.put(line.rstrip("\n"))
    said.put(None)


def last_lines(log: Path) -> str:
    """Returns the end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


def stop(process: subprocess.Popen[str]) -> None:
    """Lets a server drain; one that has been killed is only cleaned up after."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


# ---- the bank of the example `payroll` -------------------------------------------------------------------------------


class Bank:
    """What the bank knows: whom it was asked to pay, and whom it has paid, by the keys that it was given."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def payments(self, run_id: str = "") -> list[str]:
        """Returns the keys that it has paid for, of one run or of all."""
        keys = [str(row[0]) for row in self._read("SELECT key FROM payment")]
        return [key for key in keys if f".{run_id}." in key] if run_id else keys

    def requests(self) -> int:
        """Returns how often it was asked."""
        return int((self._read("SELECT count(*) FROM request") or [(0,)])[0][0])

    def _read(self, statement: str) -> list[tuple[Any, ...]]:
        if not self.file.exists():
            return []
        try:
            with closing(sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)) as connection:
                return connection.execute(statement).fetchall()
        except sqlite3.OperationalError:  # it is being made, or written
            return []


# ---- a run -----------------------------------------------------------------------------------------------------------


def show_on(screen: Console, run_id: str) -> Show:
    """Returns what shows a run on a screen: a view that redraws itself, or lines where that cannot be."""
    redraws = screen.is_terminal and not screen.is_dumb_terminal
    return _Live(screen, run_id) if redraws else _Lines()


class Show(Protocol):
    """Shows what happens."""

    def update(self, update: WatchUpdate) -> None:
        """Shows what a watch has said."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Leaves the screen to others meanwhile."""
        ...

    def close(self) -> None:
        """Leaves the screen to others for good."""
        ...

    def end(self, run: Run) -> None:
        """Shows what the run came to."""
        ...


class _Live:
    """A view that redraws itself."""

    def __init__(self, screen: Console, run_id: str) -> None:
        self._screen = screen
        self._display = RunDisplay(RunView(run_id=run_id))
        self._live = Live(self._display, console=screen, refresh_per_second=REFRESHES_PER_SECOND, transient=True)
        self._live.start()

    def update(self, update: WatchUpdate) -> None:
        view = self._display.view if update.snapshot is None else self._display.view.with_run(update.snapshot)
        for event in update.events:
            view = view.apply(event)
        self._display.view = view

    @contextmanager
    def paused(self) -> Generator[None]:
        self._live.stop()
        yield
        self._live.start()

    def close(self) -> None:
        self._live.stop()

    def end(self, run: Run) -> None:
        shown = replace(run, output=None, failure=None, trace_id="")  # these have headings of their own
        self._display.view, self._display.final = self._display.view.with_run(shown), True
        self._screen.print(self._display)


class _Lines:
    """A line for everything that happens."""

    def __init__(self) -> None:
        self._lines = EventLines()

    def update(self, update: WatchUpdate) -> None:
        for event in update.events:
            for line in self._lines.lines(event):
                write_line(f"  {line}")

    @contextmanager
    def paused(self) -> Generator[None]:
        yield

    def close(self) -> None:
        pass

    def end(self, run: Run) -> None:
        pass


def object_of(value: JsonValue) -> dict[str, Any]:
    """Returns a value that should be an object; an empty one when it is something else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
