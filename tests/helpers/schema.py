"""The schema by reflection: every method there is, and calls of it with nothing but its descriptor."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import perdure.v1
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor


def methods() -> dict[str, MethodDescriptor]:
    """Returns every method of every file of the schema, by `package.Service/Method`."""
    found = {}
    for module in pkgutil.iter_modules(perdure.v1.__path__, "perdure.v1."):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(module.name).DESCRIPTOR
            for service in file.services_by_name.values():
                found |= {f"{service.full_name}/{method.name}": method for method in service.methods}
    return found


METHODS = methods()


def request_of(method: str, **fields: Any) -> Any:
    """Returns a request of a method; fields that it does not have are left out."""
    request_class = message_factory.GetMessageClass(METHODS[method].input_type)
    known = METHODS[method].input_type.fields_by_name
    return request_class(**{name: value for name, value in fields.items() if name in known})


def has_field(method: str, name: str) -> bool:
    """Returns whether the request of a method has a field."""
    return name in METHODS[method].input_type.fields_by_name


def call(channel: Any, method: str, request: Any, metadata: Any = (), timeout: float = 20.0) -> Any:
    """Makes a call over a blocking channel; returns the answer, or the first one of a stream, which is then closed.

    Raises:
        grpc.RpcError: It failed, or the stream ended without an answer.
    """
    decode = message_factory.GetMessageClass(METHODS[method].output_type).FromString
    encode = type(request).SerializeToString
    if METHODS[method].client_streaming:
        both_ways = channel.stream_stream(f"/{method}", encode, decode)
        return next(both_ways(iter([request]), timeout=timeout, metadata=metadata))
    if not METHODS[method].server_streaming:
        return channel.unary_unary(f"/{method}", encode, decode)(request, timeout=timeout, metadata=metadata)
    stream = channel.unary_stream(f"/{method}", encode, decode)(request, timeout=timeout, metadata=metadata)
    try:
        return next(stream)
    finally:
        stream.cancel()


def without_times(message: Any) -> Any:
    """Returns a copy of a message without what differs between two equal calls: times, and the ids of traces."""
    copy = type(message)()
    copy.CopyFrom(message)
    _clear(copy)
    return copy


def _clear(message: Any) -> None:
    for field, value in message.ListFields():
        is_time = field.message_type is not None and field.message_type.full_name == "google.protobuf.Timestamp"
        if is_time or field.name in ("trace_id", "input_sha256", "cursor"):
            message.ClearField(field.name)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                _clear(part)
