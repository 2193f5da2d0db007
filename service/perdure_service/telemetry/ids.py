"""Decides the ids of a run's spans, and reads and writes the W3C header that joins traces.

A run's trace is put together by several processes, some of which die, so nothing about it may depend on memory: every
span's id is derived from what the span is about, and a span can be written after the fact by whoever reads the log.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import NamedTuple

from opentelemetry.trace import TraceFlags

# https://www.w3.org/TR/trace-context/#traceparent-header: version 00 ends after the flags, later ones may go on.
_TRACE_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceParent(NamedTuple):
    """A place in a trace: what a `traceparent` header says."""

    trace_id: int
    span_id: int
    sampled: bool


def derive_trace_id(workflow_id: str) -> int:
    """Returns the trace id (128 bits, not zero) of a run that no caller's trace contains."""
    return _digest(("trace", workflow_id), 16)


def derive_span_id(*parts: str | int) -> int:
    """Returns the span id (64 bits, not zero) of what the parts name; other parts have another id."""
    return _digest(("span", *parts), 8)


def _digest(parts: tuple[str | int, ...], size_bytes: int) -> int:
    text = json.dumps([str(part) for part in parts])  # quoted, so that ("a", "b c") and ("a b", "c") differ
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size_bytes]) or 1


def parse_traceparent(text: str) -> TraceParent | None:
    """Returns what a W3C `traceparent` header says, or None when it is not one."""
    match = _TRACE_PARENT.fullmatch(text)
    if match is None or (match[1] == "00" and match[5] is not None):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    if trace_id == 0 or span_id == 0:
        return None
    return TraceParent(trace_id, span_id, bool(int(match[4], 16) & TraceFlags.SAMPLED))


def format_traceparent(trace_id: int, span_id: int, sampled: bool = True) -> str:
    """Returns the W3C `traceparent` header of a span."""
    return f"00-{trace_id:032x}-{span_id:016x}-{int(sampled):02x}"
