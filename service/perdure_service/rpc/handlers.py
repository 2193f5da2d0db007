"""Stands around every call: who makes it and whether they may, its trace, how long it stays, what is told if it fails.

gRPC would send any exception's text to the client, so nothing may pass here but what errors.py says a caller may see.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from perdure_service import telemetry
from perdure_service.errors import Draining, InvalidArgument, TokenExpired
from perdure_service.rpc import access
from perdure_service.rpc.audit import audit, audit_once
from perdure_service.rpc.authentication import Authentication
from perdure_service.rpc.calls import Call, current_call, enter_call, identify, record_duration
from perdure_service.rpc.failures import SERVER_FAULTS, described, passes
from perdure_service.rpc.jwt_tokens import EXPIRED_TEXT
from perdure_service.rpc.request_streams import Requests
from perdure_service.rpc.status import DETAILS_KEY, internal_error
from perdure_service.rpc.streams import Stay, Streams

T = TypeVar("T")
RpcContext = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

OUR_METHODS = "/perdure."
"""Methods that need a caller, have spans and count as streams; the others are health and reflection."""


class Handlers(grpc.GenericRpcHandler):
    """What serves each method of a server, wrapped; methods that nobody serves stay UNIMPLEMENTED.

    The generated `add_…_to_server` functions add to it as to a server. They would register each method as well, and
    find it through an interceptor: a server waits, at every call, for the next one of each method that is registered.
    """

    def __init__(
        self,
        *,
        streams: Streams,
        infrastructure: Streams,
        authentication: Authentication,
        namespaces: Collection[str],
        tracer: telemetry.RunTracer | None = None,
    ) -> None:
        """Makes an interceptor.

        Args:
            streams: Where our streams are counted and ended.
            infrastructure: The same for the streams of health.
            authentication: Finds the caller of a call.
            namespaces: Those that are declared.
            tracer: Makes the server spans; None makes none.
        """
        self._streams = streams
        self._infrastructure = infrastructure
        self._tracer = tracer or telemetry.RunTracer()
        self._authentication = authentication
        self._namespaces = frozenset(namespaces)
        self._handlers: dict[str, Handler] = {}

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Handler]) -> None:
        """Adds the methods of a service; called by generated code."""
        for name, handler in method_handlers.items():
            path = f"/{service_name}/{name}"
            self._handlers[path] = self._wrap(handler, path)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Does nothing: they are the methods that are added by name."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Returns the method's handler; None when there is none."""
        return self._handlers.get(handler_call_details.method)

    def _wrap(self, handler: Handler, method: str) -> Handler:
        """Returns a handler that takes bytes: gRPC would send the text of a decoding error to the client."""
        if handler.request_streaming and not method.startswith(OUR_METHODS):
            return handler  # reflection
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._both_ways(handler, method),
                request_deserializer=None,
                response_serializer=handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(handler, method),
                request_deserializer=None,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler, method), request_deserializer=None, response_serializer=handler.response_serializer
        )

    def _unary(self, handler: Handler, method: str) -> Callable[[bytes, RpcContext], Any]:
        serve: Any = handler.unary_unary

        async def call(data: bytes, context: RpcContext) -> Any:
            return await self._guarded(handler, method, data, context, serve)

        return call

    def _streaming(self, handler: Handler, method: str) -> Callable[[bytes, RpcContext], Any]:
        serve: Any = handler.unary_stream
        streams = self._streams if method.startswith(OUR_METHODS) else self._infrastructure

        # A coroutine that writes, not a generator: so a cancellation while a slow reader is written to passes
        # through here, and what serves the stream is closed at once instead of when the garbage is collected.
        async def write_all(request: Any, context: RpcContext) -> None:
            with self._stay(streams):
                if inspect.isasyncgenfunction(serve):
                    await _write(serve(request, context), context)
                else:
                    await serve(request, context)

        async def call(data: bytes, context: RpcContext) -> None:
            await self._guarded(handler, method, data, context, write_all)

        return call

    def _both_ways(self, handler: Handler, method: str) -> Callable[[Any, RpcContext], Any]:
        """Returns what serves a stream of requests, each of which is a call of its own: the servicer answers for it."""
        serve: Any = handler.stream_stream

        async def write_all(_request: None, context: RpcContext) -> None:
            requests = Requests(context.read, partial(_decoded, handler))
            with self._stay(self._streams, stop=requests.stop):
                await _write(serve(requests, context), context)

        async def call(_items: Any, context: RpcContext) -> None:
            await self._guarded(handler, method, None, context, write_all)

        return call

    def _stay(self, streams: Streams, stop: Callable[[], None] | None = None) -> Stay:
        """Returns the context of the stream that is being served."""
        call = current_call()
        # While there is no authentication, everybody is one caller, and nobody's share is counted.
        stay = streams.stream(call.caller if self._authentication.enabled else "", stop=stop)
        if call.rights is not None and call.rights.expires_at_s is not None:
            stay.expire(call.rights.expires_at_s - time.time(), TokenExpired(EXPIRED_TEXT))
        return stay

    async def _guarded(
        self,
        handler: Handler,
        path: str,
        data: bytes | None,
        context: RpcContext,
        serve: Callable[[Any, RpcContext], Awaitable[T]],
    ) -> T:
        """Lets a call in, serves it and maps what it raises.

        Without `data` it is a stream of requests: each is audited and measured where it is answered, and what is left
        to tell here is how the stream as a whole failed.
        """
        began = time.monotonic()
        metadata = context.invocation_metadata() or ()
        call = enter_call(path.removeprefix("/"), metadata)
        span = self._open_span(path, call)
        request: Any = None
        try:
            if not path.startswith(OUR_METHODS):
                result = await serve(_decoded(handler, data or b""), context)
            else:
                self._streams.arrive(began)
                caller = await self._authentication.caller_of(metadata)
                identify(call, caller)
                if data is not None:
                    request = _decoded(handler, data)  # only now: who may not call shall not make work
                access.check(call.method, caller, request, self._namespaces)
                result = await serve(request, context)
                if data is not None:
                    await audit_once(call, request, result, "OK")
        except BaseException as error:
            if isinstance(error, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
                # The generated servicer's own answer: the schema has the method, this server does not.
                span.end()
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not have the method")
            gone = isinstance(error, grpc.aio.InternalError)
            if gone or passes(error):
                _ended(span, path, call, "CANCELLED", began)
                span.end()
                # Whether it was done is not known; it may have been.
                if not call.audited:
                    audit(call, request, None, "CANCELLED")
                if gone:
                    # A write failed, as the client went away and gRPC has not cancelled this task yet: nobody listens.
                    raise asyncio.CancelledError from None
                raise
            try:
                failure, reason = described(error, call, time.monotonic() - began)
                await audit_once(call, request, None, failure.code.name, reason)
            except Exception:  # noqa: BLE001 - an error that cannot even be described or logged is still answered
                failure, reason = internal_error(call.call_id), "INTERNAL"
            _ended(span, path, call, failure.code.name, began)
            faulty = failure.code.name in SERVER_FAULTS and reason != Draining.reason
            span.end("error" if faulty else "unset", reason)
            await context.abort(failure.code, failure.text, ((DETAILS_KEY, failure.details),))
        if data is not None:
            _ended(span, path, call, "OK", began)
        span.end()
        return result

    def _open_span(self, path: str, call: Call) -> telemetry.RunSpan:
        if not self._tracer.enabled or not path.startswith(OUR_METHODS):
            return telemetry.RunSpan(None)
        attributes = {telemetry.RPC_SYSTEM: "grpc", telemetry.RPC_METHOD: call.method, telemetry.CALL_ID: call.call_id}
        return self._tracer.server_span(call.method, caller=call.parent, attributes=attributes)


async def _write(responses: AsyncGenerator[Any, None], context: RpcContext) -> None:
    """Sends what a servicer yields, and closes it at the end, however that comes."""
    begun = False
    async with aclosing(responses):
        async for response in responses:
            if not begun:
                # Else the first write would bring them, and grpc.aio takes them for not sent when that is cancelled
                # under a slow reader: it sends them again with the status, which gRPC refuses.
                await context.send_initial_metadata(())
                begun = True
            await context.write(response)


def _ended(span: telemetry.RunSpan, path: str, call: Call, status: str, began: float) -> None:
    """Records how a call went. Paths that nobody serves do not come here, so nobody can make up attributes."""
    span.set_attribute(telemetry.RPC_STATUS, status)
    if path.startswith(OUR_METHODS):
        record_duration(call, status, began)


def _decoded(handler: Handler, data: bytes) -> Any:
    if handler.request_deserializer is None:
        return data
    try:
        return handler.request_deserializer(data)
    except Exception as error:
        text = "the request is not a message of this method's type, or nested deeper than Protobuf reads"
        raise InvalidArgument("", text) from error
