"""Turns the error that a server of another cell answered with into the same error here, so that callers see no hop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import get_args

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from perdure_service.errors import DOMAIN, InvalidArgument, PayloadTooLarge, PerdureError, Status
from perdure_service.rpc.status import DETAILS_KEY


def _classes(base: type[PerdureError]) -> Iterator[type[PerdureError]]:
    for child in base.__subclasses__():
        yield child
        yield from _classes(child)


_BY_REASON: Mapping[str, type[PerdureError]] = MappingProxyType({kind.reason: kind for kind in _classes(PerdureError)})
_BY_STATUS: Mapping[str, type[PerdureError]] = MappingProxyType(
    {status: type(f"Remote_{status}", (PerdureError,), {"status": status}) for status in get_args(Status)}
)
"""For a reason that this version does not know: an error has its status by its class."""


def remote_error(error: grpc.aio.AioRpcError) -> PerdureError | None:
    """Returns the error that a server of ours answered with; None when no server answered, or not one of ours."""
    code, text = error.code(), error.details() or ""
    status = _status_of(error)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    delay_s = None
    for packed in () if status is None else status.details:
        if packed.Unpack(retry):
            delay_s = retry.retry_delay.ToTimedelta().total_seconds()
        elif not packed.Unpack(info):
            packed.Unpack(bad)
    if info.domain == DOMAIN and code.name in _BY_STATUS:
        told = _made(code.name, info.reason, text)
        if isinstance(told, InvalidArgument):
            told.violations = tuple((one.field, one.description) for one in bad.field_violations) or (("", text),)
        told.metadata, told.retry_delay_s = dict(info.metadata), delay_s
        return told
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own limit of a message
        return PayloadTooLarge(text or "the message is too large")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return _made(code.name, code.name, "the servers of the run's cell do not have this method yet")
    return None


def _made(status: str, reason: str, message: str) -> PerdureError:
    """Returns an error of the class that its reason has, or else its status."""
    kind = _BY_REASON.get(reason)
    if kind is None or kind.status != status:
        kind = InvalidArgument if status == InvalidArgument.status else _BY_STATUS[status]
    made = kind.__new__(kind)
    PerdureError.__init__(made, message)  # their own constructors take what is set here from the wire
    made.reason = reason
    return made


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None
