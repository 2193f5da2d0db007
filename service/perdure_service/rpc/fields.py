"""Makes values fit the fields of messages, whatever an agent wrote: text, integers, times, durations, failures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from perdure.v1 import agent_run_pb2

from perdure_service.domain.runs import Failure

# The bounds of google.protobuf.Timestamp and Duration, from their comments, in milliseconds.
_MIN_TIMESTAMP_MS, _MAX_TIMESTAMP_MS = -62_135_596_800_000, 253_402_300_799_999
_MAX_DURATION_MS = 315_576_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REPLACEMENT = "\ufffd"


def text(value: object) -> str:
    """Returns text that a message can carry: NUL and halves of surrogate pairs replaced; "" for what is not text."""
    if not isinstance(value, str):
        return ""
    if not value.isascii():
        # UTF-16 joins the pairs that belong together and replaces the others.
        value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value.replace("\0", _REPLACEMENT)


def int32(value: object) -> int:
    """Returns an integer that fits an int32 field; the nearest that does, and 0 for what is not a number."""
    return _bounded(value, -(2**31), 2**31 - 1)


def int64(value: object) -> int:
    """Returns an integer that fits an int64 field; as `int32`."""
    return _bounded(value, -(2**63), 2**63 - 1)


def timestamp(value: datetime | None) -> Timestamp | None:
    """Returns a time with a zone as a message; None, which leaves a field unset, for None."""
    if value is None:
        return None
    since = value - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1_000)


def timestamp_of_ms(value: object) -> Timestamp | None:
    """Returns milliseconds since 1970 as a message; None for what is not a number."""
    if not _is_number(value):
        return None
    seconds, rest_ms = divmod(_bounded(value, _MIN_TIMESTAMP_MS, _MAX_TIMESTAMP_MS), 1_000)
    return Timestamp(seconds=seconds, nanos=rest_ms * 1_000_000)


def duration_of_ms(value: object) -> Duration | None:
    """Returns milliseconds as a message; nothing lasts less than 0; None for what is not a number."""
    if not _is_number(value):
        return None
    seconds, rest_ms = divmod(_bounded(value, 0, _MAX_DURATION_MS), 1_000)
    return Duration(seconds=seconds, nanos=rest_ms * 1_000_000)


def failure(value: Failure | None) -> agent_run_pb2.AgentRunFailure | None:
    """Returns a failure as a message; None for None."""
    return None if value is None else failure_of_json(value.to_json())


def failure_of_json(value: object) -> agent_run_pb2.AgentRunFailure | None:
    """Returns what `Failure.to_json` wrote as a message; None for what is not an object."""
    if not isinstance(value, Mapping):
        return None
    return agent_run_pb2.AgentRunFailure(
        type=text(value.get("type")),
        message=text(value.get("message")),
        step_name=text(value.get("step_name")),
        retryable=value.get("retryable") is True,
        cause=text(value.get("cause")),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bounded(value: Any, least: int, most: int) -> int:
    if type(value) is int:
        return min(max(value, least), most)
    if not _is_number(value) or (isinstance(value, float) and math.isnan(value)):
        return min(max(0, least), most)
    return int(min(max(value, least), most))
