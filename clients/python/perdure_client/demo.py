"""The demonstration: a server of its own, a question to the research agent, a decision, the answer, and the trace.

`python -m perdure_client.demo`, told by the environment:

    DOCS      A folder of Markdown, text, HTML and PDF files. Without it: this repository's own documentation.
    QUESTION  What to ask.
    YES=1     Approve without asking.

PERDURE_DATA_DIR keeps the server's data between demonstrations, PERDURE_DATABASE_URL uses that database instead, and
PERDURE_MODEL__BASE_URL (with __NAME and __API_KEY) has a model write the answer.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol, cast

try:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text
except ImportError:
    sys.exit("The demonstration needs more packages. Install them with: pip install 'perdure[cli,service,embedded]'")

from perdure_client._client import Client
from perdure_client._errors import PerdureError
from perdure_client._events import ApprovalRequested, WatchUpdate
from perdure_client._run_view import RunView
from perdure_client._types import Approval, Decision, JsonValue, Run
from perdure_client.cli import _trace
from perdure_client.cli._lines import EventLines
from perdure_client.cli._output import console, write_line
from perdure_client.cli._render import RunDisplay
from perdure_client.cli._text import RUN_STYLES, clean, one_line

AGENT = "research"
QUESTION = "What happens to a run when its executor dies?"
READY = "perdure serves on "
_NOISE = re.compile(r"\{|\d+/\d+ ")
"""Lines of a server's log, and the single migrations of a new database."""
START_TIMEOUT_S = 180.0
"""For the first start, which makes a database."""
STOP_TIMEOUT_S = 60.0
LOG_LINES = 20
REFRESHES_PER_SECOND = 8


class DemoFailed(Exception):
    """The demonstration cannot go on; the message says why."""


def main() -> int:
    """Runs the demonstration; returns the exit code: 0 if the run SUCCEEDED, else 1; 130 after Ctrl-C."""
    screen = console()
    try:
        with tempfile.TemporaryDirectory(prefix="perdure-demo-") as folder:
            run = _demonstrate(screen, Path(folder))
    except (DemoFailed, PerdureError) as error:
        screen.print(Text(f"The demonstration failed: {clean(str(error))}", style="red"))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if run.succeeded else 1


def _demonstrate(screen: Console, folder: Path) -> Run:
    question = os.environ.get("QUESTION") or QUESTION
    documents = _documents(folder)
    _heading(screen, "A server")
    given = os.environ.get("PERDURE_DATA_DIR")
    with (
        dev_server(documents, Path(given) if given else folder / "data", folder / "server.log") as address,
        Client(address, token="", namespace="default", tls=False) as client,
    ):
        _heading(screen, f"A run of the agent `{AGENT}`: {question}")
        started = client.start(AGENT, {"question": question})
        show = _Live(screen, started.run_id) if _redraws(screen) else _Lines()
        run = _follow(client, started, show, screen)
        _heading(screen, "The answer")
        _print_answer(run, screen)
        _heading(screen, "The trace")
        _trace.show(client, run.run_id, client.trace(run), screen)
    return run


def _documents(folder: Path) -> Path:
    """Returns the folder of documents; without DOCS the repository's README and documentation, put together."""
    if given := os.environ.get("DOCS"):
        path = Path(given).expanduser()
        if not path.is_dir():
            raise DemoFailed(f"DOCS={given} is no folder")
        return path
    root = next((r for r in (Path.cwd(), *Path(__file__).resolve().parents) if (r / "service" / "docs").is_dir()), None)
    if root is None:
        raise DemoFailed("there are no documents here; name a folder of documents with DOCS=…")
    documents = folder / "documents"
    shutil.copytree(root / "service" / "docs", documents / "docs")
    if (root / "README.md").is_file():
        shutil.copy(root / "README.md", documents)
    return documents


# ---- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def dev_server(documents: Path, data: Path, log: Path) -> Generator[str]:
    """Runs `perdure-server dev` on a free port; yields its address, and stops it politely at the end.

    Args:
        documents: The folder to load.
        data: Where it keeps its database.
        log: Where its log goes.

    Raises:
        DemoFailed: It does not start.
    """
    program = shutil.which("perdure-server", path=str(Path(sys.executable).parent)) or shutil.which("perdure-server")
    if program is None:
        raise DemoFailed("there is no perdure-server; install it with: pip install 'perdure[service,embedded]'")
    data.mkdir(parents=True, exist_ok=True)
    command = [program, "dev", "--address", "127.0.0.1:0", "--documents", str(documents.resolve())]
    with log.open("w", encoding="utf-8") as log_file:
        process = subprocess.Popen(  # noqa: S603 - our own program
            [*command, "--data-dir", str(data.resolve())],
            env=_server_environment(),
            cwd=log.parent,  # no dbos-config.yaml of the caller's
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            start_new_session=True,  # Ctrl-C is for the demonstration, which stops the server itself
        )
        try:
            yield _wait_until_ready(process, log)
        finally:
            _stop(process)


def _server_environment() -> dict[str, str]:
    ours = ("PERDURE_NAMESPACE", "PERDURE_ADDRESS", "PERDURE_TOKEN")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> str:
    """Shows what the server says until it serves; returns its address."""
    assert process.stdout is not None
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(process.stdout, said), daemon=True).start()
    try:
        while (line := said.get(timeout=START_TIMEOUT_S)) is not None:
            if _NOISE.match(line):
                continue
            write_line(f"  {clean(line)}")
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
    except queue.Empty:
        raise DemoFailed(f"the server was not ready after {START_TIMEOUT_S:g} s\n{_last_lines(log)}") from None
    raise DemoFailed(f"the server stopped with status {process.wait()}\n{_last_lines(log)}")


def _read_lines(source: IO[str], said: queue.SimpleQueue[str | None]) -> None:
    for line in source:  # to its end, or the server would block on a full pipe
        said.put(line.rstrip("\n"))
    said.put(None)


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


def _stop(process: subprocess.Popen[str]) -> None:
    """Lets the server drain."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


# ---- the run ---------------------------------------------------------------------------------------------------------


class _Show(Protocol):
    """Shows what happens."""

    def update(self, update: WatchUpdate) -> None: ...
    def paused(self) -> AbstractContextManager[None]: ...
    def close(self) -> None: ...
    def end(self, run: Run) -> None: ...


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


def _redraws(screen: Console) -> bool:
    return screen.is_terminal and not screen.is_dumb_terminal


def _follow(client: Client, started: Run, show: _Show, screen: Console) -> Run:
    """Follows the run to its end, and decides what it asks."""
    try:
        for update in client.watch(started):
            show.update(update)
            for event in update.events:
                if isinstance(event.data, ApprovalRequested):
                    with show.paused():
                        _decide(client, client.get_approval(event.data.approval_id), screen)
    finally:
        show.close()
    run = client.get(started)
    show.end(run)
    return run


def _decide(client: Client, approval: Approval, screen: Console) -> None:
    _heading(screen, f"The run waits for a decision: {approval.title}")
    payload = _object(approval.payload)
    for line in clean(str(payload.get("answer", ""))).splitlines():
        write_line(f"  {line}")
    if os.environ.get("YES") == "1":
        write_line("  Approved, as YES=1 says.")
        decision, comment = Decision.APPROVE, "YES=1"
    elif not sys.stdin.isatty():
        write_line("  Nobody can be asked, as standard input is no terminal: rejected. YES=1 approves.")
        decision, comment = Decision.REJECT, "nobody could be asked"
    else:
        decision, comment = _ask(), "decided in the demonstration"
    client.decide(approval, decision, comment=comment)


def _ask() -> Decision:
    try:
        answer = input("  Approve? [y/N] ")
    except EOFError:
        answer = ""
    return Decision.APPROVE if answer.strip().lower() in ("y", "yes") else Decision.REJECT


def _print_answer(run: Run, screen: Console) -> None:
    output = _object(run.output)
    if output:
        write_line(clean(str(output.get("answer", ""))))
        for number, source in enumerate(output.get("sources", ()), start=1):
            write_line(f"  [{number}] {one_line(source['document'])}, {one_line(source['heading'])}")
            write_line(f"      “{one_line(source['quote'])}”")
        write_line(f"  Written by: {one_line(str(output.get('model', '')))}")
    elif run.failure is not None:
        write_line(clean(str(run.failure)))
    published = "" if output.get("approved", True) else ", and not published"
    state = Text(f"The run {clean(run.run_id)} ended as ").append(str(run.state), style=RUN_STYLES.get(run.state, ""))
    screen.print(state.append(f"{published}."))


def _object(value: JsonValue) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _heading(screen: Console, text: str) -> None:
    screen.print(Text(f"\n== {clean(text)}", style="bold"))


if __name__ == "__main__":
    sys.exit(main())
