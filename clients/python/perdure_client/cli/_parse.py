"""How arguments of the command become values; what cannot be understood is a usage error that says what would be."""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import typer

from perdure_client._types import JsonValue

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|w)"


def duration(text: str) -> timedelta:
    """Returns `90`, `10s`, `1h30m` … as a duration; a number alone is seconds.

    Raises:
        typer.BadParameter: It is none.
    """
    compact = text.strip().lower()
    if re.fullmatch(r"\d+(?:\.\d+)?", compact):
        compact += "s"
    if not re.fullmatch(rf"(?:{_PART}\s*)+", compact):
        raise typer.BadParameter(f"{text!r} is no duration; write 500ms, 10s, 5m, 2h, 1d, or 1h30m")
    try:
        return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, compact)))
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is longer than there are times") from None


def moment(text: str) -> datetime:
    """Returns an ISO 8601 time; without a zone it is the user's own.

    Raises:
        typer.BadParameter: It is none.
    """
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is no time; write 2030-01-31T09:00, with +00:00 for UTC") from None


def duration_or_moment(text: str) -> timedelta | datetime:
    """Returns a duration, or a time.

    Raises:
        typer.BadParameter: It is neither.
    """
    try:
        return duration(text)
    except typer.BadParameter:
        pass
    try:
        return moment(text)
    except typer.BadParameter:
        raise typer.BadParameter(f"{text!r} is neither a duration (2h) nor a time (2030-01-31T09:00)") from None


def past(text: str) -> datetime:
    """Returns a time in the past, given as itself or as how long ago it is.

    Raises:
        typer.BadParameter: It is neither a duration nor a time.
    """
    value = duration_or_moment(text)
    if isinstance(value, datetime):
        return value
    try:
        return datetime.now().astimezone() - value
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is longer ago than there are times") from None


def json_value(text: str) -> JsonValue:
    """Returns JSON that is given as itself, as `@file`, or as `-` for standard input.

    Raises:
        typer.BadParameter: There is no such file, or no JSON in it.
    """
    source = "standard input" if text == "-" else text[1:] if text.startswith("@") else "the argument"
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {source}: {error}") from None
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{source} is not JSON: {error}") from None
    except RecursionError:
        raise typer.BadParameter(f"{source} is nested too deeply") from None


def payload(text: str) -> JsonValue:
    """Returns the payload of a signal, given as for `json_value`.

    Raises:
        typer.BadParameter: It is `null`.
    """
    value = json_value(text)
    if value is None:
        raise typer.BadParameter("must not be null: an agent takes that for a signal that did not come")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Returns a JSON object, given as for `json_value`.

    Raises:
        typer.BadParameter: It is no object.
    """
    value = json_value(text)
    if not isinstance(value, dict):
        raise typer.BadParameter('must be a JSON object, such as {"question": "…"}')
    return value  # pyright: ignore[reportUnknownVariableType]


def labels(pairs: list[str]) -> dict[str, str]:
    """Returns `key=value` pairs as labels.

    Raises:
        typer.BadParameter: One has no `=`.
    """
    split = [pair.partition("=") for pair in pairs]
    for (key, equals, _), pair in zip(split, pairs, strict=True):
        if not (key and equals):
            raise typer.BadParameter(f"{pair!r} is no label; write key=value")
    return {key: value for key, _, value in split}
