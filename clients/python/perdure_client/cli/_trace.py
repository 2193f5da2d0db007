"""The command `trace`: a run as a waterfall, a tree of spans beside bars on one axis of time, from the database."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from perdure_client._client import Client
from perdure_client._events import EventKind, StepFailed, StepRetrying
from perdure_client._types import RunTrace, SpanKind, SpanStatus, TraceSpan
from perdure_client.cli._context import RunArgument, session_of
from perdure_client.cli._output import Output, console, say, write_value
from perdure_client.cli._text import clean, local_time, one_line, short_duration

PIPE_WIDTH = 100
"""Columns of a drawing that goes into a pipe."""
NARROW = 72
"""Columns below which a remark has a line of its own."""
FEWEST_BAR = 8
FEWEST_LABEL = 6
DURATION_WIDTH = 11
GOES_ON = "…"

_WAITS = frozenset({SpanKind.WAIT, SpanKind.APPROVAL})
_STYLES = {
    SpanKind.RUN: "bold",
    SpanKind.EXECUTION: "blue",
    SpanKind.STEP: "green",
    SpanKind.ATTEMPT: "green",
    SpanKind.WAIT: "dim",
    SpanKind.APPROVAL: "yellow",
}


@dataclass(frozen=True, slots=True)
class Signs:
    """The characters of a drawing."""

    work: str
    wait: str
    approval: str
    goes_on: str
    guides: tuple[str, str, str, str]
    arrow: str


FINE = Signs("━", "┄", "╌", "▸", ("├─ ", "└─ ", "│  ", "   "), "→")
ASCII = Signs("=", ".", "?", ">", ("|- ", "`- ", "|  ", "   "), "->")

TraceOutputOption = Annotated[
    Output | None, typer.Option("--output", "-o", help="table (the drawing) or json. Without it: table.")
]


def trace(
    context: typer.Context,
    run: RunArgument,
    children: Annotated[
        bool, typer.Option("--children/--no-children", help="Whether with the runs that it has started.")
    ] = True,
    output: TraceOutputOption = None,
) -> None:
    """Draws where the time of a run went: executions, steps, attempts, waits, approvals, and the runs it has started.

    The server reads it from the database, so no collector is needed; the ids are those of the exported spans. A step
    that took one attempt is one line. Into a pipe it draws plain text; `-o json` has all attributes. What the errors of
    the run's own attempts say is read from its events: it is not in spans.

    Examples:
      perdure trace run-0c1f
      perdure trace run-0c1f --no-children
      perdure trace run-0c1f -o json | jq '.spans[] | select(.status == "ERROR") | .name'
    """
    found = session_of(context).client.trace(run, children=children)
    if output is Output.JSON:
        write_value(found)
        return
    show(session_of(context).client, run, found, console())


def show(client: Client, run: str, found: RunTrace, screen: Console) -> None:
    """Draws a trace on a screen, or for a pipe.

    Args:
        client: Reads what the errors of the run's own attempts say.
        run: The run's id.
        found: Its trace.
        screen: Where to.
    """
    width = screen.width if sys.stdout.isatty() else PIPE_WIDTH
    signs = ASCII if screen.options.ascii_only else FINE
    for line in drawn(found, width, now=datetime.now(UTC), signs=signs, messages=_messages(client, run, found)):
        _print(screen, line)
    if found.truncated:
        say("Spans are missing: there are more than are shown, or the run's events are no longer all kept.")


def _print(screen: Console, line: Text) -> None:
    line.rstrip()
    screen.print(line, no_wrap=True, overflow="ellipsis", crop=False, soft_wrap=True)


def _messages(client: Client, run: str, found: RunTrace) -> dict[str, str]:
    """Returns what the errors of the run's own attempts say, by the ids of their spans."""
    failed = {
        tuple(span.attributes.get(f"perdure.{name}", "") for name in ("execution", "step_id", "attempt")): span.span_id
        for span in found.spans
        if span.kind is SpanKind.ATTEMPT and span.status is SpanStatus.ERROR and span.run_id == run
    }
    if not failed:
        return {}
    told: dict[str, str] = {}
    for event in client.events(run, kinds=(EventKind.STEP_RETRYING, EventKind.STEP_FAILED)):
        span_id = failed.get((str(event.execution), str(event.step_id), str(event.attempt)))
        if span_id is not None and isinstance(event.data, StepRetrying | StepFailed):
            error = event.data.error
            told[span_id] = error.cause.partition(": ")[2] or error.message
    return told


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of the drawing."""

    guides: str
    label: str
    span: TraceSpan
    remark: str


def drawn(
    found: RunTrace, width: int, *, now: datetime, signs: Signs = FINE, messages: Mapping[str, str] | None = None
) -> Iterator[Text]:
    """Yields the lines of a waterfall.

    Args:
        found: The trace.
        width: Columns at most.
        now: What has not ended goes on until then.
        signs: The characters to draw with.
        messages: What errors say, by the ids of spans.
    """
    if not found.spans:
        return
    begin = min(span.start_time or now for span in found.spans)
    last = max(span.end_time or span.start_time or now for span in found.spans)
    goes_on = any(span.end_time is None for span in found.spans)
    end = max(now, last) if goes_on else last
    rows = list(_rows(found.spans, signs, 3 if width >= NARROW else 2, messages or {}))
    yield from _head(found, begin)
    remarks = max((len(row.remark) for row in rows), default=0)
    beside = min(remarks, width // 3) if width >= NARROW else 0
    longest = max(len(row.guides) + len(row.label) for row in rows)
    room = width - DURATION_WIDTH - 2 - (beside + 2 if beside else 0)
    label_width = min(longest, max(room // 2, room - 60))
    bar_width = max(FEWEST_BAR, room - label_width - 1)
    yield _axis(label_width, bar_width, end - begin)
    for row in rows:
        yield _line(row, label_width, bar_width, beside, begin, end, signs)
        if row.remark and not beside:
            line = Text.assemble(" " * len(row.guides), "  ", (row.remark, _remark_style(row.span)))
            line.truncate(width, overflow="ellipsis")
            yield line
    yield from _sum(found, end - begin, end, signs)


def _rows(spans: Sequence[TraceSpan], signs: Signs, indent: int, messages: Mapping[str, str]) -> Iterator[_Row]:
    """Yields a row for each span as the tree has them; the only attempt of a step is told with the step."""
    guides = [guide[: indent - 1] + " " for guide in signs.guides]
    known = {span.span_id for span in spans}
    below: dict[str, list[TraceSpan]] = {}
    for span in spans:
        below.setdefault(span.parent_span_id if span.parent_span_id in known else "", []).append(span)

    def walk(span: TraceSpan, own: str, inner: str) -> Iterator[_Row]:
        children = below.get(span.span_id, [])
        attempts = [child for child in children if child.kind is SpanKind.ATTEMPT]
        only = attempts[0] if len(attempts) == 1 and not below.get(attempts[0].span_id) else None
        shown = [child for child in children if child is not only]
        yield _Row(own, _label(span), span, _remark(span, only, signs, messages))
        for child in shown:
            final = child is shown[-1]
            guide, deeper = guides[1 if final else 0], guides[3 if final else 2]
            yield from walk(child, inner + guide, inner + deeper)

    for root in below.get("", []):
        yield from walk(root, "", "")


def _label(span: TraceSpan) -> str:
    match span.kind:
        case SpanKind.RUN:
            return f"{one_line(span.attributes.get('perdure.agent', span.name))}  {clean(span.run_id)}"
        case SpanKind.EXECUTION:
            return f"execution {clean(span.attributes.get('perdure.execution', ''))}"
        case SpanKind.STEP:
            return one_line(span.attributes.get("perdure.step_name", span.name))
        case SpanKind.ATTEMPT:
            return f"attempt {clean(span.attributes.get('perdure.attempt', ''))}"
        case _:
            return one_line(span.name)


def _remark(span: TraceSpan, attempt: TraceSpan | None, signs: Signs, messages: Mapping[str, str]) -> str:
    """Returns what else is to be said: the error, the decision, the tokens, where the run comes from."""
    facts: list[str] = []
    failed = attempt if attempt is not None and attempt.error_type else span
    if failed.error_type:
        message = messages.get(failed.span_id, "")
        facts.append(one_line(failed.error_type + (f": {message}" if message else "")))
    if span.kind is SpanKind.APPROVAL and "perdure.approval_state" in span.attributes:
        by = span.attributes.get("perdure.decided_by")
        facts.append(one_line(span.attributes["perdure.approval_state"] + (f" by {by}" if by else "")))
    received, sent = _tokens([span, *([attempt] if attempt else [])])
    if received or sent:
        facts.append(f"{received} {signs.arrow} {sent} tokens")
    if span.kind is SpanKind.RUN:
        facts += [f"forked from {clean(link.run_id)}" for link in span.links]
    return ", ".join(facts)


def _tokens(spans: Iterable[TraceSpan]) -> tuple[int, int]:
    """Returns the tokens that model calls have sent and received, as far as they are told."""
    sums = [0, 0]
    for span in spans:
        for index, name in enumerate(("perdure.input_tokens", "perdure.output_tokens")):
            value = span.attributes.get(name, "")
            sums[index] += int(value) if value.isdecimal() else 0
    return sums[0], sums[1]


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _head(found: RunTrace, begin: datetime) -> Iterator[Text]:
    yield Text.assemble(("trace ", "dim"), clean(found.trace_id), (f"  from {local_time(begin)}", "dim"))


def _axis(label_width: int, bar_width: int, total: timedelta) -> Text:
    half, whole = short_duration(total / 2), short_duration(total)
    axis = "0".ljust(bar_width)
    if bar_width >= len(half) + len(whole) + 6:
        middle = bar_width // 2
        axis = axis[:middle] + half + axis[middle + len(half) :]
    axis = axis[: max(1, bar_width - len(whole))] + whole
    return Text(" " * (label_width + 1) + axis[:bar_width], style="dim")


def _line(
    row: _Row, label_width: int, bar_width: int, beside: int, begin: datetime, end: datetime, signs: Signs
) -> Text:
    span = row.span
    style = "red" if span.status is SpanStatus.ERROR else _STYLES.get(span.kind, "")
    start = span.start_time or begin
    stop = span.end_time or end
    line = Text(no_wrap=True)
    guides = row.guides[: max(0, label_width - FEWEST_LABEL)]  # very deep, and very narrow: the name comes first
    line.append(guides, style="dim")
    label = Text(row.label, style=style)
    label.truncate(label_width - len(guides), overflow="ellipsis", pad=True)
    line.append_text(label)
    line.append(" ")
    before, length = _place(start - begin, stop - begin, end - begin, bar_width)
    sign = signs.work if span.kind not in _WAITS else signs.wait if span.kind is SpanKind.WAIT else signs.approval
    bar = sign * length
    if span.end_time is None:
        bar = bar[:-1] + signs.goes_on
    line.append(" " * before)
    line.append(bar, style=style)
    line.append(" " * (bar_width - before - length))
    took = short_duration(stop - start)
    if span.end_time is None:
        line.append(f"  {took} {GOES_ON if signs is FINE else '..'}".rjust(DURATION_WIDTH + 2), style="cyan")
    else:
        line.append(f"  {took}".rjust(DURATION_WIDTH + 2), style="dim")
    if row.remark and beside:
        remark = Text(row.remark, style=_remark_style(span))
        remark.truncate(beside, overflow="ellipsis")
        line.append("  ").append_text(remark)
    return line


def _remark_style(span: TraceSpan) -> str:
    return "red" if span.error_type else "yellow" if span.kind is SpanKind.APPROVAL else "dim"


def _place(start: timedelta, stop: timedelta, total: timedelta, width: int) -> tuple[int, int]:
    """Returns the columns before a bar, and its own: one at least."""
    if total <= timedelta():
        return 0, width
    first = min(width - 1, max(0, int(start / total * width)))
    after = min(width, max(first + 1, round(stop / total * width)))
    return first, after - first


def _sum(found: RunTrace, total: timedelta, end: datetime, signs: Signs) -> Iterator[Text]:
    """Yields what it comes to."""
    spans = found.spans
    waited = _covered([(s.start_time, s.end_time or end) for s in spans if s.kind in _WAITS and s.start_time])
    executions = sum(span.kind is SpanKind.EXECUTION and span.run_id == spans[0].run_id for span in spans)
    failed = sum(span.kind is SpanKind.ATTEMPT and span.status is SpanStatus.ERROR for span in spans)
    runs = len({span.run_id for span in spans}) - 1
    received, sent = _tokens(spans)
    facts = [
        short_duration(total),
        f"{short_duration(waited)} of it with something waiting" if waited else "",
        f"{executions} executions" if executions > 1 else "",
        f"{failed} failed {'attempt' if failed == 1 else 'attempts'}" if failed else "",
        f"{runs} child {'run' if runs == 1 else 'runs'}" if runs else "",
        f"{received} {signs.arrow} {sent} tokens" if received or sent else "",
    ]
    yield Text(", ".join(fact for fact in facts if fact), style="dim")


def _covered(intervals: Iterable[tuple[datetime, datetime]]) -> timedelta:
    """Returns the time that intervals cover together."""
    covered, until = timedelta(), datetime.min.replace(tzinfo=UTC)
    for start, stop in sorted(intervals):
        covered += max(timedelta(), stop - max(start, until))
        until = max(until, stop)
    return covered
