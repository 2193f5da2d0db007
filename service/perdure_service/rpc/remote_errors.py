"""Turns the error that a server of another cell answered with into the same error here, so that callers see no hop."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import get_args

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from perdure_service.errors import DOMAIN, InvalidArgument, PayloadTooLarge, PerdureError, Status
from perdure_service.rpc.status import DETAILS_KEY

_KINDS: Mapping[str, type[PerdureError]] = MappingProxyType(
    {status: type(f"Remote_{status}", (PerdureError,), {"status": status}) for status in get_args(Status)}
)
"""An error has its status by its class; another cell's may have a reason that this version does not know."""


def remote_error(error: grpc.aio.AioRpcError) -> PerdureError | None:
    """Returns the error that a server of ours answered with; None when no server answered, or not one of ours."""
    code = error.code()
    status = _status_of(error)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    delay_s = None
    if status is not None:
        for packed in status.details:
            if packed.Unpack(retry):
                delay_s = retry.retry_delay.ToTimedelta().total_seconds()
            elif not packed.Unpack(info):
                packed.Unpack(bad)
    if info.domain == DOMAIN and code.name in _KINDS:
        told = _made(code.name, error.details() or "", bad)
        told.reason, told.metadata, told.retry_delay_s = info.reason, dict(info.metadata), delay_s
        return told
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own limit of a message
        return PayloadTooLarge(error.details() or "the message is too large")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        told = _KINDS[code.name]("the servers of the run's cell do not have this method yet")
        told.reason = code.name
        return told
    return None


def _made(status: str, message: str, bad: error_details_pb2.BadRequest) -> PerdureError:
    if status != "INVALID_ARGUMENT":
        return _KINDS[status](message)
    violations = [(one.field, one.description) for one in bad.field_violations] or [("", message)]
    made = InvalidArgument(*violations[0], *violations[1:])
    made.message = message
    return made


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None
