"""The command `list`: runs once, or a table that stays up to date."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from perdure_client._errors import PerdureError, RunNotFound
from perdure_client._types import Run, RunState
from perdure_client.cli import _parse
from perdure_client.cli._context import OutputOption, Session, complete_agent, complete_run, session_of
from perdure_client.cli._output import (
    Output,
    chosen,
    console,
    say,
    say_unreachable,
    table_of,
    write_item,
    write_line,
    write_rows,
)
from perdure_client.cli._text import RUN_STYLES, age, clean, local_time, one_line, short_duration

LOOK_INTERVAL_S = 2.0
"""Seconds between two looks of `--watch`."""
HEADERS = ("RUN", "AGENT", "STATE", "AGE", "TOOK", "PROGRESS")
_FRAME_LINES = 3
"""Of the terminal, that are not runs: the header, the line below, and the cursor's."""

SinceOption = Annotated[
    datetime | None,
    typer.Option("--since", parser=_parse.past, metavar="DURATION|TIME", help="Created in the last 2h …, or since."),
]
UntilOption = Annotated[
    datetime | None,
    typer.Option("--until", parser=_parse.past, metavar="DURATION|TIME", help="Created more than 2h … ago, or before."),
]


@dataclass(frozen=True)
class Wanted:
    """Which runs are listed, and at most how many (None: all)."""

    states: tuple[RunState, ...] = ()
    agent: str = ""
    labels: dict[str, str] = field(default_factory=dict[str, str])
    context_id: str = ""
    parent: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    limit: int | None = None
    told: set[str] = field(default_factory=set[str], compare=False)

    def read(self, session: Session, limit: int | None) -> Iterator[Run]:
        """Iterates over them, newest first."""
        return session.client.list(
            states=self.states,
            agent=self.agent,
            labels=self.labels,
            context_id=self.context_id,
            parent=self.parent,
            from_create_time=self.since,
            until_create_time=self.until,
            limit=limit,
            on_unreachable=self._tell,
        )

    def _tell(self, regions: Sequence[str]) -> None:
        """Says which regions are missing, each once, however often the list is read again."""
        news = [region for region in regions if region not in self.told]
        self.told.update(news)
        if news:
            say_unreachable(news)


def list_runs(
    context: typer.Context,
    state: Annotated[
        list[RunState] | None,
        typer.Option(
            "--state",
            "-s",
            metavar="STATE",
            case_sensitive=False,
            help="In this state: QUEUED, RUNNING, AWAITING_INPUT, SUCCEEDED, FAILED …; repeatable.",
        ),
    ] = None,
    agent: Annotated[str, typer.Option("--agent", "-a", help="Of this agent.", autocompletion=complete_agent)] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="With this label; repeatable.")
    ] = None,
    context_id: Annotated[str, typer.Option("--context", help="Of this context.")] = "",
    parent: Annotated[
        str | None, typer.Option("--parent", metavar="RUN", help="Children of this run.", autocompletion=complete_run)
    ] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="At most so many; 0 for all.")] = 50,
    everything: Annotated[bool, typer.Option("--all", help="All of them, however many; as --limit 0.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and show what changes, until Ctrl-C.")] = False,
    output: OutputOption = None,
) -> None:
    """Lists runs, newest first.

    With --watch the table stays up to date; into a pipe, each run that is new or has changed is an object.

    Examples:
      perdure list
      perdure list --state RUNNING --state AWAITING_INPUT --agent research --watch
      perdure list --state FAILED --since 1d
      perdure list --label team=blue --all | jq -r .run_id
    """
    session, form = session_of(context), chosen(output)
    labels = _parse.labels(label or [])
    most = None if everything else limit or None
    wanted = Wanted(tuple(state or ()), agent, labels, context_id, parent, since, until, most)
    if watch:
        _watch(session, wanted, form, console())
    elif form is not Output.TABLE:
        for found in wanted.read(session, most):
            write_item(found, form)
    else:
        _print(session, wanted)


def _print(session: Session, wanted: Wanted) -> None:
    limit = wanted.limit
    rows = [_row(found) for found in wanted.read(session, limit and limit + 1)]
    if not write_rows(HEADERS, rows[:limit]):
        say("No runs. Start one: perdure start AGENT")
    elif limit and len(rows) > limit:
        say(f"There are more; the {limit} newest are shown (--limit, --all).")


def _row(run: Run) -> tuple[str | Text, ...]:
    took = short_duration(run.end_time - run.start_time) if run.end_time and run.start_time else ""
    progress = ""
    if run.failure:
        progress = one_line(str(run.failure))
    elif run.progress and not run.done:
        count = f"{run.progress.completed}/{run.progress.total} " if run.progress.total else ""
        progress = count + one_line(run.progress.message)
    state = Text(str(run.state), style=RUN_STYLES.get(run.state, ""))
    return run.run_id, f"{run.agent}@{run.agent_version}", state, age(run.create_time), took, progress


# ---- watching --------------------------------------------------------------------------------------------------------


def _watch(session: Session, wanted: Wanted, form: Output, screen: Console) -> None:
    """Shows the runs until Ctrl-C: as a table that is drawn again, or each change by itself."""
    if form is not Output.TABLE:
        for run in changes(session, wanted):
            write_item(run, form)
    elif screen.is_terminal and not screen.is_dumb_terminal:
        _watch_table(session, wanted, screen)
    else:
        for run in changes(session, wanted):
            reason = one_line(str(run.failure) if run.failure else run.state_reason)
            line = f"{local_time(datetime.now().astimezone())}  {run.state}  {clean(run.agent)}  {clean(run.run_id)}"
            write_line(f"{line}  {reason}" if reason else line)


def _watch_table(session: Session, wanted: Wanted, screen: Console) -> None:
    with Live(console=screen, auto_refresh=False, transient=False) as live:
        for runs, trouble in _looks(session, wanted):
            room = max(1, screen.height - _FRAME_LINES)
            table = table_of(HEADERS, (_row(run) for run in runs[:room]), screen)
            hidden = f", {len(runs) - room} older ones do not fit" if len(runs) > room else ""
            below = (
                f"{len(runs)} runs at {local_time(datetime.now().astimezone())}{hidden}. Ctrl-C ends this, not them."
            )
            live.update(
                Group(table, Text(trouble or below, style="yellow" if trouble else "dim", no_wrap=True)), refresh=True
            )


def changes(session: Session, wanted: Wanted) -> Iterator[Run]:
    """Yields the runs there are, oldest first, then each that is new or has changed, as it is then.

    A run that satisfies the conditions no more is told of once more: its change is why.
    """
    known: dict[str, Run] = {}
    reported = False
    for runs, trouble in _looks(session, wanted):
        if trouble:
            if not reported:
                say(trouble)
            reported = True
            continue
        reported = False
        listed = {run.run_id: run for run in runs}
        full = wanted.limit is not None and len(runs) >= wanted.limit
        oldest = runs[-1].create_time if full else None
        for run_id, before in known.items():
            pushed_out = oldest is not None and before.create_time is not None and before.create_time <= oldest
            if run_id not in listed and not pushed_out and not before.done:
                try:
                    yield session.client.get(run_id, full=False)
                except RunNotFound:
                    continue  # it was deleted
        for run_id, run in reversed(listed.items()):
            if known.get(run_id) != run:
                yield run
        known = listed


def _looks(session: Session, wanted: Wanted) -> Iterator[tuple[Sequence[Run], str]]:
    """Yields what there is, every `LOOK_INTERVAL_S`, and why it could not be read: then it is what was there before.

    Raises:
        PerdureError: The first look failed, or one failed for good.
    """
    runs = list(wanted.read(session, wanted.limit))
    yield runs, ""
    while True:
        time.sleep(LOOK_INTERVAL_S)
        trouble = ""
        try:
            runs = list(wanted.read(session, wanted.limit))
        except PerdureError as error:
            if not error.retryable:
                raise
            trouble = f"no connection, trying again: {one_line(error.message)}"
        yield runs, trouble
