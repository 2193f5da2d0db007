"""How a `RunView` looks on a terminal, wide or narrow, live or final."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from perdure_client._family_view import ChildView
from perdure_client._run_view import ApprovalView, Note, RunView, StepView
from perdure_client._types import RunState, StepState
from perdure_client.cli._text import (
    RUN_STYLES,
    STEP_STYLES,
    clean,
    glyph,
    local_time,
    one_line,
    short_duration,
    tokens,
    value_text,
)

NARROW = 72
"""Columns below which a step takes two lines instead of one."""
STREAM_LINES = 6
NOTE_LINES = 3
PUBLISHED_LINES = 4
CHILD_LINES = 8
FEWEST_STEPS = 3
_NOTE_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "red"}


def result(view: RunView) -> RenderableType:
    """Returns what the run came to: its output or why it has none, and its trace."""
    return Group(*_result(view))


def utc_now() -> datetime:
    """Returns now; its own function for tests."""
    return datetime.now(UTC)


@dataclass(slots=True)
class RunDisplay:
    """Draws the view it holds, as often as it is asked to; the view may be replaced at any time.

    Attributes:
        view: What to draw.
        children: The run's descendants: a line for each that has not ended, or failed; the others are counted.
        notice: What the connection does, while it does not work; empty otherwise.
        final: Whether to draw everything, and the result, however many lines that takes.
        clock: Returns now.
        command_prefix: What goes between `perdure` and a subcommand that is proposed, such as ` --namespace x`.
    """

    view: RunView
    notice: str = ""
    final: bool = False
    clock: Callable[[], datetime] = utc_now
    command_prefix: str = ""
    children: Mapping[str, ChildView] = field(default_factory=dict[str, ChildView])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws."""
        view, width = self.view, options.max_width
        ascii_only = options.ascii_only
        now = view.end_time or self.clock()
        parts: list[RenderableType] = [_header(view, now, width)]
        room = 10**6 if self.final else max(8, (options.height or console.height) - 2)
        below = list(self._below(console, width, now, ascii_only=ascii_only))
        room -= 2 + sum(len(console.render_lines(part, options)) for part in below)
        if view.steps:
            steps = _steps(view, now, console, width, max(FEWEST_STEPS, room), ascii_only=ascii_only)
            parts.append(steps)
        parts += below
        yield Group(*parts)

    def _below(self, console: Console, width: int, now: datetime, *, ascii_only: bool) -> Iterator[RenderableType]:
        """Yields what stands below the steps."""
        view = self.view
        if view.progress is not None and not (self.final and view.state is RunState.SUCCEEDED):
            yield _progress(view, width, ascii_only=ascii_only)
        if self.children:
            yield _children(list(self.children.values()), now, console, everything=self.final, ascii_only=ascii_only)
        if not self.final:
            yield from _streams(view, console, width)
        yield from _published(view, width, everything=self.final)
        yield from _notes(view, everything=self.final)
        questions = [*view.pending_approvals]
        for child in self.children.values():
            questions += child.view.pending_approvals
        for approval in questions:
            yield _question(approval, self.command_prefix, self.clock())
        if self.notice:
            yield Text(one_line(self.notice), style="yellow", overflow="ellipsis", no_wrap=True)
        if self.final:
            yield from _result(view)


def _header(view: RunView, now: datetime, width: int) -> RenderableType:
    style = RUN_STYLES.get(view.state, "")
    title = Text()
    title.append(clean(view.agent or "run"), style="bold")
    if view.agent_version:
        title.append(f"@{clean(view.agent_version)}", style="dim")
    title.append(f"  {clean(view.run_id)}", style="dim")
    state = Text(str(view.state) if view.agent else "waiting for the server", style=f"bold {style}")
    begin = view.start_time or view.create_time
    if begin is not None:
        state.append(f"  {short_duration(now - begin)}", style="not bold")
    if view.state is RunState.SLEEPING and view.until_time is not None:
        state.append(f"  until {local_time(view.until_time)}", style="not bold")
    if view.execution > 1:
        state.append(f"  execution {view.execution}", style="not bold yellow")
    if view.recoveries:
        state.append(
            f"  recovered {view.recoveries}x, stood still {short_duration(view.standstill)}", style="not bold yellow"
        )
    if view.usage.total_tokens:
        state.append(f"  {tokens(view.usage)}", style="not bold dim")
    if view.state_reason and not view.state.terminal:
        state.append(f"  {one_line(view.state_reason)}", style="not bold dim")
    if title.cell_len + 2 + state.cell_len <= width:
        return title.append("  ").append_text(state)
    title.overflow = "fold"  # an id is there to be copied
    state.no_wrap, state.overflow = True, "ellipsis"
    return Group(title, state)


def _steps(
    view: RunView, now: datetime, console: Console, width: int, room: int, *, ascii_only: bool
) -> RenderableType:
    narrow = width < NARROW
    steps = list(view.steps.values())
    shown = _shown(steps, room // 2 if narrow else room)
    rows = [(_mark(step, ascii_only=ascii_only), step, _detail(step, now, ended=view.state.terminal)) for step in shown]
    hidden = len(steps) - len(shown)
    more: list[RenderableType] = [Text(f"    {hidden} earlier steps", style="dim")] if hidden else []
    if narrow:
        lines = (line for mark, step, detail in rows for line in _two_lines(mark, step, detail, now))
        return Group(*more, *lines)
    grid = Table.grid(padding=(0, 1), expand=console.is_terminal)
    grid.add_column(width=1, no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=width // 3)
    grid.add_column(no_wrap=True, style="yellow")
    grid.add_column(no_wrap=True, justify="right", style="dim")
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for mark, step, detail in rows:
        grid.add_row(mark, Text(one_line(step.name)), _attempt(step), _time(step, now), detail)
    return Group(*more, Padding(grid, (0, 0, 0, 2), expand=console.is_terminal))


def _two_lines(mark: Text, step: StepView, detail: Text, now: datetime) -> Iterator[Text]:
    """Yields a step for a narrow terminal."""
    line = Text.assemble(mark, " ", one_line(step.name), no_wrap=True, overflow="ellipsis")
    for text, style in ((_attempt(step), "yellow"), (_time(step, now), "dim")):
        if text:
            line.append(f"  {text}", style=style)
    yield line
    if detail.plain:
        yield Text.assemble("  ", detail, no_wrap=True, overflow="ellipsis")


def _mark(step: StepView, *, ascii_only: bool) -> Text:
    retrying = step.next_attempt_time is not None
    style = "yellow" if retrying else STEP_STYLES.get(step.state, "")
    return Text(glyph(step.state, retrying=retrying, ascii_only=ascii_only), style=style)


def _shown(steps: list[StepView], room: int) -> list[StepView]:
    """Returns as many steps as fit: those that run, and the latest."""
    if len(steps) <= room:
        return steps
    running = {step.step_id for step in steps if step.state is StepState.RUNNING}
    latest = {step.step_id for step in steps[-max(1, room - 1 - len(running)) :]}
    return [step for step in steps if step.step_id in running | latest]


def _attempt(step: StepView) -> str:
    if step.attempt <= 1:
        return ""
    return f"attempt {step.attempt}" + (f"/{step.max_attempts}" if step.max_attempts else "")


def _time(step: StepView, now: datetime) -> str:
    if step.duration is not None:
        return short_duration(step.duration)
    if step.state is StepState.RUNNING and step.start_time is not None:
        return short_duration(now - step.start_time)
    if step.start_time is not None and step.end_time is not None:
        return short_duration(step.end_time - step.start_time)
    return ""


def _detail(step: StepView, now: datetime, *, ended: bool) -> Text:
    detail = Text(no_wrap=True, overflow="ellipsis")
    if step.next_attempt_time is not None and step.next_attempt_time > now:
        detail.append(f"again in {short_duration(step.next_attempt_time - now)}  ", style="yellow")
    if step.error is not None:
        detail.append(one_line(str(step.error)), style="red")
    elif step.state is StepState.INTERRUPTED:
        detail.append("did not end" if ended else "its execution was lost; it runs again", style="yellow")
    elif step.child_run_id:
        detail.append(f"child run {clean(step.child_run_id)}", style="dim")
    elif step.preview:
        detail.append(one_line(step.preview), style="dim")
    return detail


def _children(
    children: list[ChildView], now: datetime, console: Console, *, everything: bool, ascii_only: bool
) -> RenderableType:
    """Returns a line for each child that has not ended, or failed, and how many others there are."""
    own = [child for child in children if not child.view.state.terminal or child.view.state is RunState.FAILED]
    shown = own if everything else own[:CHILD_LINES]
    done = Counter(child.view.state for child in children if child.view.state.terminal)
    counts = [f"{number} {state}" for state, number in sorted(done.items())]
    if len(own) > len(shown):
        counts.append(f"{len(own) - len(shown)} more go on or failed")
    title = Text(f"{len(children)} child run{'s' * (len(children) > 1)}", style="dim")
    title.append(": " + ", ".join(counts) if counts else "", style="dim")
    grid = Table.grid(padding=(0, 1), expand=console.is_terminal)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right", style="dim")
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for child in shown:
        grid.add_row(*_child_row(child, now, ascii_only=ascii_only))
    return Group(title, Padding(grid, (0, 0, 0, 2), expand=console.is_terminal)) if shown else title


def _child_row(child: ChildView, now: datetime, *, ascii_only: bool) -> tuple[Text, Text, Text, Text]:
    view = child.view
    style = RUN_STYLES.get(view.state, "")
    mark = glyph(StepState.FAILED if view.state is RunState.FAILED else StepState.RUNNING, ascii_only=ascii_only)
    name = Text("  " * (child.depth - 1)).append(f"{mark} ", style=style).append(clean(view.run_id))
    begin = view.start_time or view.create_time
    took = Text(short_duration((view.end_time or now) - begin) if begin else "")
    known = view.state is not RunState.UNKNOWN
    detail = Text(one_line(child.doing or child.name), style="dim")
    if view.failure is not None:
        detail = Text(one_line(str(view.failure)), style="red")
    return name, Text(str(view.state) if known else "", style=style), took, detail


def _progress(view: RunView, width: int, *, ascii_only: bool) -> RenderableType:
    progress = view.progress
    assert progress is not None
    grid = Table.grid(padding=(0, 1))
    message = Text(one_line(progress.message), no_wrap=True, overflow="ellipsis")
    if not progress.total:
        count = f"{progress.completed} " if progress.completed else ""
        return Text(f"{'>' if ascii_only else '▸'} {count}") + message
    bar = ProgressBar(
        total=progress.total, completed=min(progress.completed, progress.total), width=min(30, width // 3)
    )
    grid.add_row(bar, Text(f"{progress.completed}/{progress.total}", style="dim"), message)
    return grid


def _streams(view: RunView, console: Console, width: int) -> Iterator[RenderableType]:
    """Yields the end of the stream that was written to last."""
    if not view.streams or view.state.terminal:
        return
    (_, name), text = list(view.streams.items())[-1]
    lines = Text(clean(text)).wrap(console, max(8, width - 4))[-STREAM_LINES:]
    yield Text(f"{one_line(name)}:", style="dim")
    yield Padding(Text("\n").join(lines), (0, 2), expand=False)


def _published(view: RunView, width: int, *, everything: bool) -> Iterator[RenderableType]:
    items = list(view.published.items())
    for key, value in items if everything else items[-PUBLISHED_LINES:]:
        text = one_line(value_text(value))
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(one_line(key), style="bold")
        line.append(f" = {text if everything else text[: width * 2]}")
        yield line


def _notes(view: RunView, *, everything: bool) -> Iterator[RenderableType]:
    for note in view.notes if everything else view.notes[-NOTE_LINES:]:
        yield note_line(note)


def note_line(note: Note) -> Text:
    """Returns a note as a line."""
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{local_time(note.time)} ", style="dim")
    line.append(one_line(note.text), style=_NOTE_STYLES.get(note.level, ""))
    return line


def _question(approval: ApprovalView, command_prefix: str, now: datetime) -> RenderableType:
    title = Text(f"? {one_line(approval.title) or 'A decision is asked for'}", style="bold yellow")
    if approval.deadline_time is not None:
        left = approval.deadline_time - now
        when = f"{short_duration(left)} left" if left > timedelta() else "its deadline has passed"
        title.append(f"  ({when})", style="not bold dim")
    approval_id = clean(approval.approval_id)
    return Group(
        title,
        Text(f"    perdure{command_prefix} approve {approval_id}", overflow="fold"),
        Text(f"    perdure{command_prefix} reject {approval_id}", overflow="fold"),
    )


def _result(view: RunView) -> Iterator[RenderableType]:
    """Yields what the run came to."""
    if view.failure is not None:
        yield Text(clean(str(view.failure)), style="red", overflow="fold")
        facts = [
            f"in step {clean(view.failure.step_name)}" if view.failure.step_name else "",
            f"caused by {clean(view.failure.cause)}" if view.failure.cause else "",
            "running it again may succeed" if view.failure.retryable else "",
        ]
        if any(facts):
            yield Text(", ".join(fact for fact in facts if fact), style="dim", overflow="fold")
    elif view.state.terminal and view.state_reason:
        yield Text(clean(view.state_reason), style=RUN_STYLES.get(view.state, ""), overflow="fold")
    if view.output is not None:
        yield Text(value_text(view.output, indent=2), overflow="fold")
    if view.trace_id:
        yield Text(f"trace {clean(view.trace_id)}", style="dim")
