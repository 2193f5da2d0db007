"""What is known about the call being served: who calls, under which id, and in which trace."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from perdure_service import telemetry
from perdure_service.domain.callers import Caller
from perdure_service.domain.ids import random_hex
from perdure_service.logs import tell_call
from perdure_service.telemetry import TraceParent, parse_traceparent

ANONYMOUS = "anonymous"
"""Every caller's name while there is no authentication."""
REQUEST_ID_KEY = "x-request-id"
TRACE_PARENT_KEY = "traceparent"
MAX_REQUEST_ID = 128
"""Characters of a caller's `x-request-id`; another one replaces what is longer."""


@dataclass(slots=True)
class Call:
    """A call. Only `identify` changes it, and who writes its line of audit.

    Attributes:
        method: E.g. `perdure.v1.AgentRunService/StartAgent`.
        call_id: The caller's `x-request-id`, or one made here; in the log of this call.
        caller: Who calls; empty until that is known.
        trace_parent: The caller's W3C `traceparent` as it came, or empty.
        parent: What it says; None for none.
        rights: What the caller may do; None until that is known.
        audited: Whether its line of audit is written.
    """

    method: str
    call_id: str
    caller: str
    trace_parent: str = ""
    parent: TraceParent | None = None
    rights: Caller | None = None
    audited: bool = False


_current: ContextVar[Call] = ContextVar("perdure_call")


def current_call() -> Call:
    """Returns the call being served.

    Raises:
        LookupError: None is.
    """
    return _current.get()


def enter_call(method: str, metadata: Iterable[tuple[str, Any]]) -> Call:
    """Makes a call the one being served in this context; gRPC gives every call a context of its own.

    Args:
        method: As in `Call`.
        metadata: The request's, as pairs.
    """
    call_id = trace_parent = ""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str):
            call_id = value
        elif key == TRACE_PARENT_KEY and isinstance(value, str):
            trace_parent = value
    if not call_id or len(call_id) > MAX_REQUEST_ID or not call_id.isprintable():
        call_id = random_hex()[:16]
    parent = parse_traceparent(trace_parent) if trace_parent else None
    call = Call(method, call_id, "", trace_parent if parent else "", parent)
    _current.set(call)
    tell_call(call_id, method)
    return call


def identify(call: Call, caller: Caller) -> None:
    """Says who makes a call."""
    call.caller, call.rights = caller.name, caller


def rights_of(call: Call) -> Caller:
    """Returns who makes a call, once that is known."""
    if call.rights is None:
        raise RuntimeError("the stream has no caller")
    return call.rights


def record_duration(call: Call, status: str, began: float) -> None:
    """Records how a call, or an item of a stream, went; `began` is on the monotonic clock."""
    attributes = {telemetry.RPC_SYSTEM: "grpc", telemetry.RPC_METHOD: call.method, telemetry.RPC_STATUS: status}
    telemetry.METERS.record(telemetry.RPC_DURATION, time.monotonic() - began, attributes)
