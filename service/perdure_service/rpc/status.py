"""Turns errors into `google.rpc.Status`, small enough to fit the trailing metadata that carries it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from perdure_service.errors import DOMAIN, InvalidArgument, PerdureError
from perdure_service.rpc import fields

DETAILS_KEY = "grpc-status-details-bin"
"""The metadata key that all gRPC implementations know for a serialized google.rpc.Status."""
INTERNAL_TEXT = "internal error; report this error id"
MAX_DETAILS_BYTES = 3_500
"""A peer takes 8 KiB of metadata by default (grpc.max_metadata_size) and fails the call with an error of its own above
that. Details travel as base64, four bytes for three; the message goes once more, percent-encoded, three for one."""
MAX_MESSAGE_BYTES = 500
MAX_DESCRIPTION_BYTES = 300
MAX_METADATA_BYTES = 1_000
MAX_METADATA_VALUE_BYTES = 200


class WireError(NamedTuple):
    """An error as gRPC sends it: code, text, and the serialized google.rpc.Status for `DETAILS_KEY`."""

    code: grpc.StatusCode
    text: str
    details: bytes


def wire_error(error: PerdureError) -> WireError:
    """Returns an error as gRPC sends it.

    Details are ErrorInfo always, BadRequest for InvalidArgument, RetryInfo when repeating the call helps. Violations
    that do not fit are left out, the first never.
    """
    code = grpc.StatusCode[error.status]
    message = _cut(error.message, MAX_MESSAGE_BYTES)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_metadata(error.metadata))
    ]
    if error.retry_delay_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_delay_s * 1_000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=message, details=map(_packed, details))
    if isinstance(error, InvalidArgument):
        status.details.append(_packed(_bad_request(error, MAX_DETAILS_BYTES - status.ByteSize())))
    return WireError(code, message, status.SerializeToString())


def internal_error(error_id: str) -> WireError:
    """Returns what a caller learns of an error that is not for callers: an id to report, and nothing else."""
    return wire_error(PerdureError(INTERNAL_TEXT, error_id=error_id))


def _bad_request(error: InvalidArgument, room_bytes: int) -> error_details_pb2.BadRequest:
    """Returns as many violations as fit into `room_bytes`, at least one."""
    request = error_details_pb2.BadRequest()
    for field, text in error.violations:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(field, MAX_DESCRIPTION_BYTES), description=_cut(text, MAX_DESCRIPTION_BYTES)
        )
        if request.field_violations and request.ByteSize() + violation.ByteSize() + 8 > room_bytes:
            break
        request.field_violations.append(violation)
    return request


def _metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata that fits."""
    result: dict[str, str] = {}
    room_bytes = MAX_METADATA_BYTES
    for key, value in metadata.items():
        text = _cut(str(value), MAX_METADATA_VALUE_BYTES)
        room_bytes -= len(key) + len(text.encode())
        if room_bytes < 0:
            break
        result[key] = text
    return result


def _cut(text: str, max_bytes: int) -> str:
    """Returns the beginning of a text that takes at most `max_bytes`, made valid for a message."""
    valid = fields.text(text)
    data = valid[: max_bytes + 1].encode()
    return valid if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore")


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
