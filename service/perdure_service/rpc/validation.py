"""Checks single fields of requests and collects what is wrong with all of them, each under its path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from perdure_service.domain import tokens
from perdure_service.errors import InvalidArgument
from perdure_service.rpc.json_values import path_of

T = TypeVar("T")

MAX_VIOLATIONS = 20
"""How many one error reports."""
MAX_NAME = 128
"""Characters of a namespace, an agent's name or version, a context."""
MAX_RUN_ID = 512
"""Characters of an id in a lookup: children's and foreign workflows' ids are longer than those a client may give."""
MAX_APPROVAL_ID = MAX_RUN_ID + 32
MAX_REQUEST_ID = 128
MAX_TOKEN = tokens.MAX_CHARS
"""Characters of a cursor or page token; ours are never longer."""
MAX_LABELS = 32
MAX_LABEL_KEY = 63
MAX_LABEL_VALUE = 256
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1_000
DEFAULT_HEARTBEAT_S = 15.0
MIN_HEARTBEAT_S = 5.0
MAX_HEARTBEAT_S = 60.0
MAX_AHEAD = timedelta(days=36_525)
"""How far ahead a start or a deadline may lie: far from where times stop to fit."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LABEL_KEY = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_./-]*")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The bounds of google.protobuf.Timestamp and Duration, from their comments.
_MIN_TIMESTAMP_S, _MAX_TIMESTAMP_S = -62_135_596_800, 253_402_300_799
_MAX_DURATION_S = 315_576_000_000
_NANOS = 1_000_000_000


class Violations:
    """What is wrong with a request, so far. Each check notes what it finds and returns something usable."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def add(self, field: str, text: str) -> None:
        """Notes that a field is wrong."""
        self._found.append((field, text))

    def raise_any(self) -> None:
        """Ends the checks.

        Raises:
            InvalidArgument: Something was noted; it has everything, up to 20.
        """
        if self._found:
            raise InvalidArgument(*self._found[0], *self._found[1:MAX_VIOLATIONS])

    def name(self, field: str, value: str, *, required: bool = False, max_length: int = MAX_NAME) -> str:
        """Checks an identifier: present if required, not too long, no control characters."""
        if not value:
            if required:
                self.add(field, "is required")
            return value
        if len(value) > max_length:
            self.add(field, f"has {len(value)} characters; at most {max_length}")
        if _CONTROL.search(value):
            self.add(field, "has control characters")
        return value

    def prose(self, field: str, value: str, max_length: int) -> str:
        """Checks text for people: not too long, no NUL."""
        if len(value) > max_length:
            self.add(field, f"has {len(value)} characters; at most {max_length}")
        if "\0" in value:
            self.add(field, "has a NUL character")
        return value

    def run_id(self, value: str, *, required: bool = True) -> str:
        """Checks the id of a run that is looked up: any that may exist."""
        return self.name("run_id", value, required=required, max_length=MAX_RUN_ID)

    def request_id(self, value: str, *, required: bool = False) -> str:
        """Checks the caller's id of the call."""
        if required and not value:
            self.add("request_id", "is required")
        if len(value) > MAX_REQUEST_ID or not value.isprintable():
            self.add("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")
        return value

    def labels(self, value: Mapping[str, str]) -> dict[str, str]:
        """Checks labels."""
        if len(value) > MAX_LABELS:
            self.add("labels", f"has {len(value)} entries; at most {MAX_LABELS}")
        for key, text in sorted(value.items()):
            path = path_of("labels", [key])
            if len(key) > MAX_LABEL_KEY or not _LABEL_KEY.fullmatch(key):
                self.add(path, f"keys must match {_LABEL_KEY.pattern} and have at most {MAX_LABEL_KEY} characters")
            self.prose(path, text, MAX_LABEL_VALUE)
        return dict(value)

    def page_size(self, value: int) -> int:
        """Returns the size of a page: 0 means 50, above 1,000 means 1,000 (AIP-158)."""
        if value < 0:
            self.add("page_size", "must not be negative")
        return min(max(value, 0) or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)

    def token(self, field: str, value: str) -> str:
        """Checks an opaque token; whoever made it knows the rest."""
        return self.name(field, value, max_length=MAX_TOKEN)

    def enum(self, field: str, number: int, known: Mapping[int, T], default: T) -> T:
        """Returns what an enum number means."""
        if number not in known:
            self.add(field, f"has the unknown or unspecified value {number}")
        return known.get(number, default)

    def enums(self, field: str, numbers: Iterable[int], known: Mapping[int, T]) -> frozenset[T]:
        """Returns what enum numbers mean; the unspecified one is refused."""
        result = set()
        for index, number in enumerate(numbers):
            if number in known:
                result.add(known[number])
            else:
                self.add(f"{field}[{index}]", f"has the unknown or unspecified value {number}")
        return frozenset(result)

    def timestamp(self, field: str, value: Timestamp, now: datetime) -> datetime | None:
        """Returns a time; None when it is not one or lies more than a century ahead."""
        if not (_MIN_TIMESTAMP_S <= value.seconds <= _MAX_TIMESTAMP_S and 0 <= value.nanos < _NANOS):
            self.add(field, "is not a valid Timestamp")
            return None
        time = _EPOCH + timedelta(seconds=value.seconds, microseconds=value.nanos // 1_000)
        if time > now + MAX_AHEAD:
            self.add(field, "lies more than a century ahead")
            return None
        return time

    def duration_s(self, field: str, value: Duration) -> float | None:
        """Returns a duration in seconds; None when it is not one."""
        contradicts = value.seconds * value.nanos < 0
        if abs(value.seconds) > _MAX_DURATION_S or abs(value.nanos) >= _NANOS or contradicts:
            self.add(field, "is not a valid Duration")
            return None
        return value.seconds + value.nanos / _NANOS

    def heartbeat_s(self, value: Duration | None) -> float:
        """Returns the interval of heartbeats in seconds; None means 15."""
        if value is None:
            return DEFAULT_HEARTBEAT_S
        seconds = self.duration_s("heartbeat_interval", value)
        if seconds is not None and not MIN_HEARTBEAT_S <= seconds <= MAX_HEARTBEAT_S:
            self.add("heartbeat_interval", f"must be {MIN_HEARTBEAT_S:g} to {MAX_HEARTBEAT_S:g} seconds")
        return seconds or DEFAULT_HEARTBEAT_S
