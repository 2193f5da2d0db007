"""Which error a failed call becomes: by the `google.rpc.Status` of the server, else by what gRPC itself says."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from perdure_client import _errors
from perdure_client._config import is_loopback
from perdure_client._errors import PerdureError, Violation

DOMAIN = "perdure.dev"
STATUS_KEY = "grpc-status-details-bin"
HELD_S = 1.0
"""A connection on which a call waited so long was one to a server; what is none hangs up at once."""

_Details: TypeAlias = tuple[
    error_details_pb2.ErrorInfo | None, error_details_pb2.RetryInfo | None, error_details_pb2.BadRequest | None
]

_BY_REASON: dict[str, type[PerdureError]] = {
    error.reason: error
    for error in (
        _errors.InvalidArgument,
        _errors.InputSchemaViolation,
        _errors.TokenMissing,
        _errors.TokenExpired,
        _errors.KeysUnavailable,
        _errors.NamespaceNotFound,
        _errors.RunNotFound,
        _errors.AgentNotFound,
        _errors.ApprovalNotFound,
        _errors.ArtifactNotFound,
        _errors.RunConflict,
        _errors.RunInputMismatch,
        _errors.RunFinished,
        _errors.ApprovalClosed,
        _errors.VersionUnavailable,
        _errors.RevisionConflict,
        _errors.Contention,
        _errors.CursorOutOfRange,
        _errors.OffsetOutOfRange,
        _errors.ViewTooLarge,
        _errors.NobodyStandsBy,
        _errors.StoreUnavailable,
        _errors.RegionUnavailable,
        _errors.CellNotServed,
        _errors.NamespacePaused,
        _errors.Draining,
        _errors.Overloaded,
        _errors.QuotaExceeded,
        _errors.TooManyStreams,
        _errors.PayloadTooLarge,
    )
}

# What a reason that this version does not know becomes. The reason itself is kept.
_BY_CODE: dict[str, type[PerdureError]] = {
    "INVALID_ARGUMENT": _errors.InvalidArgument,
    "UNAUTHENTICATED": _errors.Unauthenticated,
    "PERMISSION_DENIED": _errors.PermissionDenied,
    "NOT_FOUND": _errors.NotFound,
    "ALREADY_EXISTS": _errors.RunConflict,
    "FAILED_PRECONDITION": _errors.FailedPrecondition,
    "OUT_OF_RANGE": _errors.CursorOutOfRange,
    "UNAVAILABLE": _errors.Unavailable,
    "RESOURCE_EXHAUSTED": _errors.ResourceExhausted,
    "DEADLINE_EXCEEDED": _errors.DeadlineExceeded,
    "UNIMPLEMENTED": _errors.Unimplemented,
    "INTERNAL": _errors.InternalError,
}

_CODES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}

# How gRPC's transport names a connection that broke under a call (src/core/ext/transport/chttp2; grpc/_channel.py).
_CONNECTION_BROKE = re.compile(
    r"RST_STREAM|GOAWAY|Stream removed|Socket closed|[Cc]onnection (?:reset|closed|aborted)|Broken pipe|"
    r"Endpoint closing|Transport closed|HTTP/?2|"
    # What grpc.aio says of a stream that ended under a write, whatever it ended with.
    r"Internal error from Core",
)
# What it says of one that never stood.
_NOT_CONNECTED = re.compile(r"[Ff]ailed to connect|[Rr]esol(?:ution|ver)|[Hh]andshake")
# How gRPC names a message that is over a limit (src/core/ext/filters/message_size); whose limit, it says before that.
_TOO_LARGE = re.compile(
    r"(?P<what>Received|Sent|Decompressed) message larger than max(?: \((?P<size>\d+) vs\.? (?P<limit>\d+)\))?"
)
_BROKEN_CODES = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL})
# What gRPC says of a call that this side ended (grpc/_channel.py, grpc/aio/_call.py). Any other CANCELLED is the other
# side's doing: a server that stops refuses so what reached it too late (gRPC's own, src/core/server), as proxies do.
_CANCELLED_HERE = "Locally cancelled by application!"


def from_rpc_error(error: grpc.RpcError, address: str) -> PerdureError:
    """Returns what the library raises for a failed call; raise it `from` the error.

    Args:
        error: Of either flavour of gRPC, asyncio's or the blocking one.
        address: The server's, for the message.
    """
    status = status_pb2.Status()
    try:
        status.ParseFromString(_status_bytes(error))
    except DecodeError:
        status.Clear()
    text = error.details() or ""
    return _from_details(status, error.code().name, text) or _from_transport(error.code(), text, address)


def had_held(error: grpc.RpcError, since_s: float) -> bool:
    """Returns whether a call that failed had been at a server: its connection stood, and did not break at once.

    Args:
        error: What gRPC says of it.
        since_s: When it began, on the monotonic clock.
    """
    return time.monotonic() - since_s >= HELD_S and not _NOT_CONNECTED.search(error.details() or "")


def from_status(status: status_pb2.Status) -> PerdureError:
    """Returns the error of one item of a call that has others, as the server sent it."""
    code = _CODES.get(status.code, "UNKNOWN")
    found = _from_details(status, code, status.message)
    return found or _BY_CODE.get(code, PerdureError)(status.message or code, code=code, reason=code)


def _from_details(status: status_pb2.Status, code: str, text: str) -> PerdureError | None:
    """Returns what perdure's details of a status say; None when it has none."""
    info, retry, bad_request = _details(status)
    if info is None:
        return None
    return _error_class(info.reason, code, retry is not None)(
        text or f"the server answered {code}",
        code=code,
        reason=info.reason or code,
        metadata=info.metadata,
        violations=[Violation(v.field, v.description) for v in bad_request.field_violations] if bad_request else (),
        error_id=info.metadata.get("error_id", ""),
        retry_delay_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
    )


def silence(address: str, seconds: float) -> PerdureError:
    """Returns the error for a stream on which not even a heartbeat came for so many seconds."""
    return _errors.ServerUnavailable(f"nothing has come from {address} for {seconds:g} s")


def _error_class(reason: str, code: str, retry_advised: bool) -> type[PerdureError]:
    if (error_class := _BY_REASON.get(reason)) is not None:
        return error_class
    if code == "RESOURCE_EXHAUSTED" and retry_advised:
        return _errors.Overloaded
    return _BY_CODE.get(code, PerdureError)


def _details(status: status_pb2.Status) -> _Details:
    """Returns the parts of the server's `google.rpc.Status`; None for each that it did not send."""
    info = retry = bad_request = None
    for detail in status.details:
        match detail.TypeName():
            case "google.rpc.ErrorInfo":
                candidate = error_details_pb2.ErrorInfo()
                if detail.Unpack(candidate) and candidate.domain == DOMAIN:
                    info = candidate
            case "google.rpc.RetryInfo":
                detail.Unpack(retry := error_details_pb2.RetryInfo())
            case "google.rpc.BadRequest":
                detail.Unpack(bad_request := error_details_pb2.BadRequest())
            case _:
                pass
    return info, retry, bad_request


def _status_bytes(error: grpc.RpcError) -> bytes:
    metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    for key, value in metadata:
        if key == STATUS_KEY and isinstance(value, bytes):
            return value
    return b""


def _from_transport(code: grpc.StatusCode, text: str, address: str) -> PerdureError:
    """Returns the error for a status without a reason of ours: gRPC's own, or a proxy's."""
    broke = code in _BROKEN_CODES and _CONNECTION_BROKE.search(text)
    if code is grpc.StatusCode.UNAVAILABLE or broke or (code is grpc.StatusCode.CANCELLED and text != _CANCELLED_HERE):
        return _unreachable(text, address)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (found := _TOO_LARGE.search(text)):
        return _too_large(text, found)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return _errors.DeadlineExceeded(f"no answer from {address} within the timeout")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return _errors.Unimplemented(f"the server at {address} does not know this call; is it a perdure server? {text}")
    error_class = _BY_CODE.get(code.name, PerdureError)
    return error_class(f"{address} answered {code.name}: {text}", code=code.name, reason=code.name)


def _too_large(text: str, found: re.Match[str]) -> PerdureError:
    """Returns the error for a message that gRPC itself refused: the limit is the server's, or this client's own."""
    is_request = (found["what"] == "Sent") == text.startswith("CLIENT")
    which, way_out = (
        ("request", "send a reference to what is large instead")
        if is_request
        else ("answer", "ask for less: a smaller page, or a run without its input and output")
    )
    sizes = f"{found['size']} bytes, more than the {found['limit']}" if found["size"] else "more than the most"
    return _errors.PayloadTooLarge(
        f"the {which} takes {sizes} of one message; {way_out}",
        metadata={"field": which, **({"limit_bytes": found["limit"]} if found["limit"] else {})},
    )


def _unreachable(text: str, address: str) -> PerdureError:
    """Returns the error for a server that is not there, or no more, with the way out."""
    cause = re.sub(r"^.*(?:last error: (?:[A-Z]+: )?|Failed to connect to remote host: )", "", text)
    cause = re.sub(r"^ipv[46]:\S+: ", "", cause) or "no connection"
    if re.search(r"[Hh]andshake|[Vv]erification|CERTIFICATE|SSL|TLS", cause):
        way_out = "Check the TLS settings of both sides."
    elif cause.endswith("Socket closed"):
        # Something listens there, and hangs up: a server does when it is killed, and one with TLS on plaintext.
        way_out = "If the server speaks TLS, use an https:// address or PERDURE_TLS=1."
    elif is_loopback(address):
        way_out = "Start one with `perdure-server dev`, or set PERDURE_ADDRESS."
    else:
        way_out = "Check the address (PERDURE_ADDRESS) and the network."
    return _errors.ServerUnavailable(
        f"no perdure server answers at {address} ({cause}). {way_out}", metadata={"address": address, "cause": cause}
    )
