"""How single things read: durations, times, values; and text of others, which must not steer the terminal."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

from perdure_client._events import RunEvent
from perdure_client._types import ApprovalState, JsonValue, RunState, StepState, Usage

# Control characters but for newline and tab: C0, DEL, C1, and those that reorder text (Trojan Source, CVE-2021-42574).
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

RUN_STYLES: dict[RunState, str] = {
    RunState.SCHEDULED: "blue",
    RunState.QUEUED: "blue",
    RunState.RUNNING: "cyan",
    RunState.AWAITING_INPUT: "yellow",
    RunState.SLEEPING: "blue",
    RunState.SUCCEEDED: "green",
    RunState.FAILED: "red",
    RunState.CANCELLED: "magenta",
    RunState.EXPIRED: "magenta",
}
APPROVAL_STYLES: dict[ApprovalState, str] = {
    ApprovalState.PENDING: "yellow",
    ApprovalState.APPROVED: "green",
    ApprovalState.REJECTED: "red",
}
STEP_STYLES: dict[StepState, str] = {
    StepState.RUNNING: "cyan",
    StepState.SUCCEEDED: "green",
    StepState.FAILED: "red",
    StepState.INTERRUPTED: "yellow",
}
_GLYPHS: dict[StepState, tuple[str, str]] = {
    StepState.RUNNING: ("●", "*"),
    StepState.SUCCEEDED: ("✔", "+"),
    StepState.FAILED: ("✘", "x"),
    StepState.INTERRUPTED: ("◌", "o"),
    StepState.UNKNOWN: ("?", "?"),
}
RETRYING = ("↻", "~")


def glyph(state: StepState, *, retrying: bool = False, ascii_only: bool = False) -> str:
    """Returns the one character for a step's state."""
    return (RETRYING if retrying else _GLYPHS[state])[ascii_only]


def clean(text: str) -> str:
    """Returns text of others as it may be written to a terminal: what would steer it is replaced."""
    return _STEERING.sub("�", text)


def one_line(text: str) -> str:
    """Returns text as one line."""
    return re.sub(r"\s+", " ", clean(text)).strip()


def short_duration(delta: timedelta) -> str:
    """Returns a duration in at most two units, such as `320 ms`, `12.4 s`, `3 min 04 s`, `2 h 05 min`, `1 d 3 h`."""
    seconds = max(0.0, delta.total_seconds())
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def local_time(time: datetime | None, *, now: datetime | None = None) -> str:
    """Returns a time in the user's zone: today's without its date; empty for none."""
    if time is None:
        return ""
    local = time.astimezone()
    today = (now or datetime.now(UTC)).astimezone().date()
    return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M:%S")


def age(time: datetime | None, *, now: datetime | None = None) -> str:
    """Returns how long ago it was, for a table; empty for no time."""
    return "" if time is None else short_duration((now or datetime.now(UTC)) - time)


def tokens(usage: Usage) -> str:
    """Returns what model calls used, for people."""
    return f"{usage.input_tokens:,} + {usage.output_tokens:,} tokens"


def value_text(value: JsonValue, *, indent: int | None = None) -> str:
    """Returns a JSON value for people: a string as it is, all else as JSON."""
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=indent))


def jsonable(value: Any) -> Any:
    """Returns a value of this library as plain JSON: times in ISO 8601, durations in seconds under `<name>_s`."""
    if isinstance(value, RunEvent):
        plain: dict[str, Any] = {"sequence": value.sequence, "kind": value.kind.value, **_plain(value)}
        return {**plain, "data": plain.pop("data")}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, tuple):
        return [jsonable(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _plain(value: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, timedelta):
            plain[f"{field.name}_s"] = item.total_seconds()
        else:
            plain[field.name] = jsonable(item)
    return plain
