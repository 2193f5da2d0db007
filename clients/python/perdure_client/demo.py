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
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

try:
    from rich.console import Console
    from rich.text import Text
except ImportError:
    sys.exit("The demonstration needs more packages. Install them with: pip install 'perdure[cli,service,embedded]'")

from perdure_client._client import Client
from perdure_client._demo_parts import (
    DemoFailed,
    Show,
    begin,
    heading,
    object_of,
    play,
    repository,
    show_on,
    stop,
    wait_until_ready,
)
from perdure_client._events import ApprovalRequested
from perdure_client._types import Approval, Decision, Run
from perdure_client.cli import _trace
from perdure_client.cli._output import write_line
from perdure_client.cli._text import RUN_STYLES, clean, one_line

AGENT = "research"
QUESTION = "What happens to a run when its executor dies?"


def main() -> int:
    """Runs the demonstration; returns the exit code: 0 if the run SUCCEEDED, else 1; 130 after Ctrl-C."""
    return play(lambda screen, folder: _demonstrate(screen, folder).succeeded)


def _demonstrate(screen: Console, folder: Path) -> Run:
    question = os.environ.get("QUESTION") or QUESTION
    documents = _documents(folder)
    heading(screen, "A server")
    given = os.environ.get("PERDURE_DATA_DIR")
    with (
        dev_server(documents, Path(given) if given else folder / "data", folder / "server.log") as address,
        Client(address, token="", namespace="default", tls=False) as client,
    ):
        heading(screen, f"A run of the agent `{AGENT}`: {question}")
        started = client.start(AGENT, {"question": question})
        run = _follow(client, started, show_on(screen, started.run_id), screen)
        heading(screen, "The answer")
        _print_answer(run, screen)
        heading(screen, "The trace")
        _trace.show(client, run.run_id, client.trace(run), screen)
    return run


def _documents(folder: Path) -> Path:
    """Returns the folder of documents; without DOCS the repository's README and documentation, put together."""
    if given := os.environ.get("DOCS"):
        path = Path(given).expanduser()
        if not path.is_dir():
            raise DemoFailed(f"DOCS={given} is no folder")
        return path
    root = repository()
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
    data.mkdir(parents=True, exist_ok=True)
    arguments = ["dev", "--address", "127.0.0.1:0", "--documents", str(documents.resolve())]
    process = begin([*arguments, "--data-dir", str(data.resolve())], log)
    try:
        yield wait_until_ready(process, log)
    finally:
        stop(process)


# ---- the run ---------------------------------------------------------------------------------------------------------


def _follow(client: Client, started: Run, show: Show, screen: Console) -> Run:
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
    heading(screen, f"The run waits for a decision: {approval.title}")
    payload = object_of(approval.payload)
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
    output = object_of(run.output)
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


if __name__ == "__main__":
    sys.exit(main())
