"""A run's events as plain lines, for terminals that cannot redraw, for logs, and for people who like to scroll."""

from __future__ import annotations

from collections.abc import Iterator

from perdure_client._events import (
    ApprovalDecided,
    ApprovalRequested,
    ArtifactWritten,
    AttemptReset,
    ChildStarted,
    LogLine,
    ModelUsage,
    OutputDelta,
    Published,
    Recovered,
    RunEvent,
    RunForked,
    SignalReceived,
    StateChanged,
    StepFailed,
    StepRetrying,
    StepStarted,
    StepSucceeded,
    UnknownData,
)
from perdure_client._types import Progress
from perdure_client.cli._text import clean, local_time, one_line, short_duration, value_text

PREVIEW_CHARACTERS = 100
_MARGIN = "          | "


class EventLines:
    """Turns events into lines. Streamed text is held back until its line is complete.

    Args:
        command_prefix: What goes between `perdure` and a subcommand that is proposed.
        label: Stands in every line; empty for none.
    """

    def __init__(self, command_prefix: str = "", *, label: str = "") -> None:
        self._command_prefix = command_prefix
        self._label = f"{label}  " if label else ""
        self._margin = f"{' ' * 8}  {self._label}| " if label else _MARGIN
        self._partial: dict[tuple[int, str], str] = {}

    def lines(self, event: RunEvent) -> Iterator[str]:
        """Yields the lines of an event; none for some."""
        if isinstance(event.data, OutputDelta):
            yield from self._stream(event, event.data)
            return
        yield from self._flush(event.step_id)
        text = self._text(event)
        if text:
            yield f"{local_time(event.event_time) or '--:--:--'}  {self._label}{text}"
        if isinstance(event.data, ApprovalRequested):
            for verb in ("approve", "reject"):
                yield f"{self._margin}perdure{self._command_prefix} {verb} {clean(event.data.approval_id)}"

    def _text(self, event: RunEvent) -> str:
        step = one_line(event.step_name) or f"step {event.step_id}"
        match event.data:
            case StateChanged(from_state=before, to_state=state) if before is state:
                return f"parked, still {state}"  # what it waits for was told when the wait began
            case StateChanged(to_state=state, reason=reason, failure=failure):
                why = one_line(str(failure)) if failure else one_line(reason)
                again = f", execution {event.execution}" if event.execution > 1 else ""
                return f"{state}{again}" + (f": {why}" if why else "")
            case StepStarted():
                return f"{step} began"
            case StepRetrying(error=error, delay=delay):
                attempt, wait = max(1, event.attempt), short_duration(delay)
                return f"{step} failed in attempt {attempt}, again in {wait}: {one_line(str(error))}"
            case StepSucceeded(duration=duration, output_preview=preview):
                shown = f": {one_line(preview)[:PREVIEW_CHARACTERS]}" if preview else ""
                return f"{step} succeeded in {short_duration(duration)}{shown}"
            case StepFailed(duration=duration, error=error):
                return f"{step} FAILED after {short_duration(duration)}: {one_line(str(error))}"
            case AttemptReset():
                return f"{step}: the text above is void, its attempt was lost"
            case Progress(message=message, completed=completed, total=total):
                count = f"{completed}/{total}  " if total else ""
                return f"progress {count}{one_line(message)}"
            case Published(key=key, value=value):
                return f"{one_line(key)} = {one_line(value_text(value))[:PREVIEW_CHARACTERS]}"
            case ApprovalRequested(title=title, deadline_time=deadline):
                until = f" (until {local_time(deadline)})" if deadline else ""
                return f"? {one_line(title)}{until}"
            case ApprovalDecided(state=state, decided_by=decided_by, comment=comment):
                by = f" by {one_line(decided_by)}" if decided_by else ""
                return f"{state}{by}" + (f": {one_line(comment)}" if comment else "")
            case SignalReceived(name=name, sender=sender):
                return f"signal {one_line(name)}" + (f" from {one_line(sender)}" if sender else "")
            case ChildStarted(child_run_id=child):
                return f"{step} started the run {clean(child)}"
            case Recovered(gap=gap):
                return f"recovered after its executor was gone; stood still for {short_duration(gap)}"
            case LogLine(message=message, level=level):
                return (f"{one_line(level)}: " if level else "") + one_line(message)
            case ModelUsage(model=model, input_tokens=sent, output_tokens=received):
                asked = f"{step} asked {one_line(model)}" if model else f"{step} asked a model"
                return f"{asked}: {sent} tokens sent, {received} received"
            case ArtifactWritten(name=name, media_type=media_type, size_bytes=size_bytes):
                return f"artifact {clean(name)} ({clean(media_type)}, {size_bytes} bytes)"
            case RunForked(from_run_id=origin, from_step_id=step_id):
                return f"forked from {clean(origin)}, goes on at step {step_id}; what is told of earlier steps is its"
            case OutputDelta() | UnknownData():
                return ""

    def _stream(self, event: RunEvent, delta: OutputDelta) -> Iterator[str]:
        key = (event.step_id, delta.stream)
        *complete, rest = (self._partial.get(key, "") + clean(delta.text)).split("\n")
        self._partial[key] = rest
        for line in complete:
            yield self._margin + line

    def _flush(self, step_id: int) -> Iterator[str]:
        """Yields what is held back of a step, before anything else is said of it."""
        for key in [key for key in self._partial if key[0] == step_id]:
            if text := self._partial.pop(key):
                yield self._margin + text


class FamilyLines:
    """Turns the events of a run and its children into lines that say of which run they are; see `EventLines`."""

    def __init__(self, command_prefix: str = "") -> None:
        self._command_prefix = command_prefix
        self._runs: dict[str, EventLines] = {}

    def lines(self, event: RunEvent) -> Iterator[str]:
        """Yields the lines of an event; none for some."""
        if event.run_id not in self._runs:
            self._runs[event.run_id] = EventLines(self._command_prefix, label=clean(event.run_id))
        yield from self._runs[event.run_id].lines(event)
        if event.ends_run:
            del self._runs[event.run_id]
