"""Follows a run on the terminal: a live view, plain lines, or JSON lines."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum

from rich.console import Console
from rich.live import Live

from perdure_client._client import Client
from perdure_client._errors import CursorOutOfRange, PerdureError, ViewTooLarge
from perdure_client._events import RunEvent, StateChanged, WatchUpdate
from perdure_client._family_view import FamilyView
from perdure_client._run_view import RunView
from perdure_client._types import Run, RunState
from perdure_client.cli._lines import EventLines, FamilyLines
from perdure_client.cli._output import say, write_json_line, write_line
from perdure_client.cli._render import RunDisplay, result
from perdure_client.cli._text import jsonable, one_line, short_duration

REFRESHES_PER_SECOND = 8


class Style(StrEnum):
    """How to show what happens."""

    LIVE = "live"
    LINES = "lines"
    JSON = "json"


class Detached(Exception):
    """The user pressed Ctrl-C; the run goes on.

    Attributes:
        last_sequence: The last event that was shown.
    """

    def __init__(self, last_sequence: int) -> None:
        super().__init__()
        self.last_sequence = last_sequence


@dataclass(slots=True)
class _Seen:
    """How far the user has come in the watched run, and whether the connection holds."""

    run_id: str
    last_sequence: int
    state: RunState = RunState.UNKNOWN
    connected: bool = False
    ended: bool = False

    def take(self, update: WatchUpdate) -> Iterator[RunEvent]:
        """Yields the events of an update, and remembers."""
        self.connected = True
        if update.snapshot is not None:
            self.state = update.snapshot.state
        for event in update.events:
            yield event
            if event.run_id != self.run_id:
                continue
            self.last_sequence = event.sequence
            if isinstance(event.data, StateChanged) and event.ends_run:
                self.state = event.data.to_state
                self.ended = True

    def say_broken(self, error: PerdureError, _delay_s: float) -> None:
        """Says once that a connection broke. One that was never there ends the command, which says why."""
        if self.connected:
            say(f"connection lost, reconnecting: {_cause(error)}")
        self.connected = False


def follow(
    client: Client,
    run_id: str,
    *,
    after: int,
    style: Style,
    console: Console,
    command_prefix: str = "",
    children: bool | None = None,
) -> RunState:
    """Shows a run from after an event until its end; returns how it ended.

    Args:
        client: Where the run is.
        run_id: The run.
        after: Show what came after this event; 0 for everything. Of the run alone.
        style: How to show it.
        console: Where.
        command_prefix: What goes between `perdure` and a subcommand that is proposed.
        children: Whether to show its children until the last one has ended. None: the live view shows them while the
            run itself goes on, if there are not too many for one watch.

    A log of which the beginning is no longer kept is shown from the earliest event that is.

    Raises:
        Detached: The user has seen enough.
        PerdureError: The watch failed for good.
    """
    try:
        return _follow(client, run_id, after, style, console, command_prefix, children)
    except CursorOutOfRange as error:
        if after or children or not error.earliest_sequence:
            raise  # what was asked for by name is not replaced by something else
        if error.metadata.get("run_id", run_id) == run_id:
            say(f"the events before {error.earliest_sequence} are no longer kept; here is what there is")
            after = error.earliest_sequence - 1
        else:
            say(f"{one_line(error.message)}; here it goes on without children")
    return _follow(client, run_id, after, style, console, command_prefix, children=False)


def _follow(
    client: Client,
    run_id: str,
    after: int,
    style: Style,
    console: Console,
    command_prefix: str,
    children: bool | None,
) -> RunState:
    match style:
        case Style.LIVE:
            return _follow_live(client, run_id, after, console, command_prefix, children)
        case Style.LINES:
            return _follow_lines(client, run_id, after, console, command_prefix, bool(children))
        case Style.JSON:
            return _follow_json(client, run_id, after, bool(children))


def show_run(run: Run, console: Console) -> None:
    """Prints a run and what it came to."""
    console.print(RunDisplay(RunView(run_id=run.run_id).with_run(run), final=True))


def _follow_live(
    client: Client, run_id: str, after: int, console: Console, command_prefix: str, children: bool | None
) -> RunState:
    seen = _Seen(run_id, after)
    display = RunDisplay(RunView(run_id=run_id, last_sequence=after), command_prefix=command_prefix)
    live = Live(display, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True)
    with _detaching(seen), live:
        try:
            _draw(
                client, display, seen, after, children=not after if children is None else children, alone=not children
            )
        except ViewTooLarge as error:
            if children:
                raise
            say(f"{one_line(error.message)}; here it goes on without them")
            display.children = {}
            _draw(client, display, seen, seen.last_sequence, children=False, alone=True)
        display.view = display.view.with_run(client.get(run_id))
    display.final = True
    console.print(display)
    return display.view.state


def _draw(client: Client, display: RunDisplay, seen: _Seen, after: int, *, children: bool, alone: bool) -> None:
    """Keeps the display up to date until the watch ends, or, when it is of the run alone, until the run has ended."""

    def on_reconnect(error: PerdureError, delay_s: float) -> None:
        wait = short_duration(timedelta(seconds=delay_s))
        display.notice = f"no connection, trying again in {wait}: {_cause(error)}"

    family = FamilyView(root=display.view)
    with client.watch(
        seen.run_id, after_sequence=after, include_children=children, on_reconnect=on_reconnect
    ) as updates:
        for update in updates:
            if update.snapshot is not None:
                family = replace(family, root=family.root.with_run(update.snapshot))
                if after and update.snapshot.pending_approvals:  # asked before the first event that is shown
                    asked = client.approvals(run=seen.run_id)
                    family = replace(family, root=family.root.with_approvals(asked))
            for event in seen.take(update):
                family = family.apply(event)
            display.view, display.children, display.notice = family.root, family.children, ""
            if alone and seen.ended:
                break


def _follow_lines(
    client: Client, run_id: str, after: int, console: Console, command_prefix: str, children: bool
) -> RunState:
    seen = _Seen(run_id, after)
    formatted = FamilyLines(command_prefix) if children else EventLines(command_prefix)
    with _detaching(seen):
        watch = client.watch(run_id, after_sequence=after, include_children=children, on_reconnect=seen.say_broken)
        for update in watch:
            for event in seen.take(update):
                for line in formatted.lines(event):
                    write_line(line)
        run = client.get(run_id)
    console.print(result(RunView(run_id=run_id).with_run(run)))
    return run.state


def _follow_json(client: Client, run_id: str, after: int, children: bool) -> RunState:
    seen = _Seen(run_id, after)
    with _detaching(seen):
        watch = client.watch(run_id, after_sequence=after, include_children=children, on_reconnect=seen.say_broken)
        for update in watch:
            for event in seen.take(update):
                write_json_line(jsonable(event))
    return seen.state


@contextmanager
def _detaching(seen: _Seen) -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Detached(seen.last_sequence) from None


def _cause(error: PerdureError) -> str:
    """Returns why a connection broke; the way out is ours, and we are on it."""
    return one_line(error.metadata.get("cause") or error.message)
