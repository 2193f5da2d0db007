"""Follows a run on the terminal: a live view, plain lines, or JSON lines."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from rich.console import Console
from rich.live import Live

from perdure_client._client import Client
from perdure_client._errors import PerdureError
from perdure_client._events import RunEvent, StateChanged, WatchUpdate
from perdure_client._run_view import RunView
from perdure_client._types import Run, RunState
from perdure_client.cli._lines import EventLines
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
    """How far the user has come, and whether the connection holds."""

    last_sequence: int
    state: RunState = RunState.UNKNOWN
    connected: bool = False

    def take(self, update: WatchUpdate) -> Iterator[RunEvent]:
        """Yields the events of an update, and remembers."""
        self.connected = True
        if update.snapshot is not None:
            self.state = update.snapshot.state
        for event in update.events:
            yield event
            self.last_sequence = event.sequence
            if isinstance(event.data, StateChanged) and event.ends_run:
                self.state = event.data.to_state

    def say_broken(self, error: PerdureError, _delay_s: float) -> None:
        """Says once that a connection broke. One that was never there ends the command, which says why."""
        if self.connected:
            say(f"connection lost, reconnecting: {_cause(error)}")
        self.connected = False


def follow(
    client: Client, run_id: str, *, after: int, style: Style, console: Console, command_prefix: str = ""
) -> RunState:
    """Shows a run from after an event until its end; returns how it ended.

    Raises:
        Detached: The user has seen enough.
        PerdureError: The watch failed for good.
    """
    match style:
        case Style.LIVE:
            return _follow_live(client, run_id, after, console, command_prefix)
        case Style.LINES:
            return _follow_lines(client, run_id, after, console, command_prefix)
        case Style.JSON:
            return _follow_json(client, run_id, after)


def show_run(run: Run, console: Console) -> None:
    """Prints a run and what it came to."""
    console.print(RunDisplay(RunView(run_id=run.run_id).with_run(run), final=True))


def _follow_live(client: Client, run_id: str, after: int, console: Console, command_prefix: str) -> RunState:
    seen = _Seen(after)
    display = RunDisplay(RunView(run_id=run_id, last_sequence=after), command_prefix=command_prefix)

    def on_reconnect(error: PerdureError, delay_s: float) -> None:
        wait = short_duration(timedelta(seconds=delay_s))
        display.notice = f"no connection, trying again in {wait}: {_cause(error)}"

    live = Live(display, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True)
    with _detaching(seen), live:
        for update in client.watch(run_id, after_sequence=after, on_reconnect=on_reconnect):
            view = display.view
            if update.snapshot is not None:
                view = view.with_run(update.snapshot)
                if after and update.snapshot.pending_approvals:  # asked before the first event that is shown
                    view = view.with_approvals(client.approvals(run=run_id))
            for event in seen.take(update):
                view = view.apply(event)
            display.view, display.notice = view, ""
        display.view = display.view.with_run(client.get(run_id))
    display.final = True
    console.print(display)
    return display.view.state


def _follow_lines(client: Client, run_id: str, after: int, console: Console, command_prefix: str) -> RunState:
    seen = _Seen(after)
    formatted = EventLines(command_prefix)
    with _detaching(seen):
        for update in client.watch(run_id, after_sequence=after, on_reconnect=seen.say_broken):
            for event in seen.take(update):
                for line in formatted.lines(event):
                    write_line(line)
        run = client.get(run_id)
    console.print(result(RunView(run_id=run_id).with_run(run)))
    return run.state


def _follow_json(client: Client, run_id: str, after: int) -> RunState:
    seen = _Seen(after)
    with _detaching(seen):
        for update in client.watch(run_id, after_sequence=after, on_reconnect=seen.say_broken):
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
