"""Stands around every call: who makes it and whether they may, its trace, how long it stays, what is told if it fails.

gRPC would send any exception's text to the client, so nothing may pass here but what errors.py says a caller may see.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
import structlog

from perdure_service import telemetry
from perdure_service.errors import ConfigurationError, Draining, InvalidArgument, PerdureError, TokenExpired
from perdure_service.logs import censor_text
from perdure_service.rpc import access
from perdure_service.rpc.audit import audit
from perdure_service.rpc.authentication import Authentication
from perdure_service.rpc.calls import Call, current_call, enter_call, identify
from perdure_service.rpc.jwt_tokens import EXPIRED_TEXT
from perdure_service.rpc.status import DETAILS_KEY, WireError, internal_error, wire_error
from perdure_service.rpc.streams import Streams

T = TypeVar("T")
RpcContext = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]

OUR_METHODS = "/perdure."
"""Methods that need a caller, have spans and count as streams; the others are health and reflection."""
SERVER_FAULTS = frozenset({"INTERNAL", "UNAVAILABLE"})
"""Status codes that make a server's span one that failed (OpenTelemetry's conventions for gRPC)."""
MAX_CAUSE = 300
"""Characters of a cause in the log."""

_log = structlog.get_logger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every unary and server-streaming handler; methods that nobody serves stay UNIMPLEMENTED."""

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
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Returns the method's handler, wrapped; None when there is none."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        if handler.request_streaming:
            # Reflection. One of ours would need a wrapper of its own, as nobody would ask it for a token.
            return None if method.startswith(OUR_METHODS) else handler
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(handler, method))
        return known[1]

    def _wrap(self, handler: Handler, method: str) -> Handler:
        """Returns a handler that takes bytes: gRPC would send the text of a decoding error to the client."""
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
            return await self._guarded(handler, method, data, context, lambda request: serve(request, context))

        return call

    def _streaming(self, handler: Handler, method: str) -> Callable[[bytes, RpcContext], Any]:
        serve: Any = handler.unary_stream
        streams = self._streams if method.startswith(OUR_METHODS) else self._infrastructure

        # A coroutine that writes, not a generator: so a cancellation while a slow reader is written to passes
        # through here, and what serves the stream is closed at once instead of when the garbage is collected.
        async def write_all(request: Any, context: RpcContext) -> None:
            call = current_call()
            # While there is no authentication, everybody is one caller, and nobody's share is counted.
            stay = streams.stream(call.caller if self._authentication.enabled else "")
            if call.expires_at_s is not None:
                stay.expire(call.expires_at_s - time.time(), TokenExpired(EXPIRED_TEXT))
            with stay:
                if not inspect.isasyncgenfunction(serve):
                    await serve(request, context)
                    return
                begun = False
                async with aclosing(serve(request, context)) as responses:
                    async for response in responses:
                        if not begun:
                            # Else the first write would bring them, and grpc.aio takes them for not sent when that is
                            # cancelled under a slow reader: it sends them again with the status, which gRPC refuses.
                            await context.send_initial_metadata(())
                            begun = True
                        await context.write(response)

        async def call(data: bytes, context: RpcContext) -> None:
            await self._guarded(handler, method, data, context, lambda request: write_all(request, context))

        return call

    async def _guarded(
        self, handler: Handler, path: str, data: bytes, context: RpcContext, serve: Callable[[Any], Awaitable[T]]
    ) -> T:
        """Lets a call in, serves it and maps what it raises."""
        began = time.monotonic()
        metadata = context.invocation_metadata() or ()
        call = enter_call(path.removeprefix("/"), metadata)
        structlog.contextvars.bind_contextvars(call_id=call.call_id, rpc=call.method)
        span = self._open_span(path, call)
        request: Any = None
        try:
            if not path.startswith(OUR_METHODS):
                result = await serve(_decoded(handler, data))
            else:
                caller = await self._authentication.caller_of(metadata)
                call = identify(caller)
                request = _decoded(handler, data)  # only now: who may not call shall not make work
                access.check(call.method, caller, request, self._namespaces)
                result = await serve(request)
                audit(call, request, result, "OK")
        except BaseException as error:
            if isinstance(error, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
                # The generated servicer's own answer: the schema has the method, this server does not.
                span.end()
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not have the method")
            gone = isinstance(error, grpc.aio.InternalError)
            if gone or _passes(error):
                _ended(span, path, call, "CANCELLED", began)
                span.end()
                # Whether it was done is not known; it may have been.
                audit(call, request, None, "CANCELLED")
                if gone:
                    # A write failed, as the client went away and gRPC has not cancelled this task yet: nobody listens.
                    raise asyncio.CancelledError from None
                raise
            try:
                failure, reason = _described(error, call, time.monotonic() - began)
                audit(call, request, None, failure.code.name, reason)
            except Exception:  # noqa: BLE001 - an error that cannot even be described or logged is still answered
                failure, reason = internal_error(call.call_id), "INTERNAL"
            _ended(span, path, call, failure.code.name, began)
            faulty = failure.code.name in SERVER_FAULTS and reason != Draining.reason
            span.end("error" if faulty else "unset", reason)
            await context.abort(failure.code, failure.text, ((DETAILS_KEY, failure.details),))
        _ended(span, path, call, "OK", began)
        span.end()
        return result

    def _open_span(self, path: str, call: Call) -> telemetry.RunSpan:
        if not self._tracer.enabled or not path.startswith(OUR_METHODS):
            return telemetry.RunSpan(None)
        attributes = {telemetry.RPC_SYSTEM: "grpc", telemetry.RPC_METHOD: call.method, telemetry.CALL_ID: call.call_id}
        return self._tracer.server_span(call.method, caller=call.parent, attributes=attributes)


def _ended(span: telemetry.RunSpan, path: str, call: Call, status: str, began: float) -> None:
    """Records how a call went. Paths that nobody serves do not come here, so nobody can make up attributes."""
    span.set_attribute(telemetry.RPC_STATUS, status)
    if path.startswith(OUR_METHODS):
        attributes = {telemetry.RPC_SYSTEM: "grpc", telemetry.RPC_METHOD: call.method, telemetry.RPC_STATUS: status}
        telemetry.METERS.record(telemetry.RPC_DURATION, time.monotonic() - began, attributes)


def _passes(error: BaseException) -> bool:
    """Returns whether an exception is gRPC's or Python's own business."""
    if isinstance(error, asyncio.CancelledError):
        # The client went away, which is how most streams end, or the server stops. When nobody cancelled this task,
        # something that the call waited for was cancelled, and gRPC would leave the client without an answer.
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    # AbortError: a servicer of gRPC's own (health) has answered.
    return isinstance(error, (grpc.aio.AbortError, GeneratorExit, KeyboardInterrupt, SystemExit))


def _decoded(handler: Handler, data: bytes) -> Any:
    if handler.request_deserializer is None:
        return data
    try:
        return handler.request_deserializer(data)
    except Exception as error:
        text = "the request is not a message of this method's type, or nested deeper than Protobuf reads"
        raise InvalidArgument("", text) from error


def _described(error: BaseException, call: Call, duration_s: float) -> tuple[WireError, str]:
    """Returns what the caller learns and the reason, and writes the one line of log that a failed call gets."""
    public = _public(error)
    facts: dict[str, Any] = {"caller": call.caller, "duration_ms": round(duration_s * 1_000)}
    if public is None:
        error_id = secrets.token_hex(8)
        _hide_parameters(error)
        # As text, not as exc_info: a renderer may print local variables, and with them what users wrote.
        facts["exception"] = "".join(traceback.format_exception(error))
        _log.error("rpc.failed", code="INTERNAL", reason="INTERNAL", error_id=error_id, **facts)
        return internal_error(error_id), "INTERNAL"
    cause = public.__cause__ or (None if public is error else error)
    if cause is not None:
        # Censored before it is cut: of half a URL nobody could tell where its password is.
        facts["cause"] = censor_text(f"{type(cause).__qualname__}: {getattr(cause, 'orig', None) or cause}")[:MAX_CAUSE]
    if isinstance(public, InvalidArgument):  # what a violation says may quote the input; its path does not
        facts["fields"] = [path for path, _ in public.violations]
    else:
        facts["error"] = public.message[:MAX_CAUSE]
    getattr(_log, _level(public))("rpc.failed", code=public.status, reason=public.reason, **facts)
    return wire_error(public), public.reason


def _level(error: PerdureError) -> str:
    if isinstance(error, Draining):  # by design, and of every open stream at once
        return "debug"
    return "warning" if error.status in SERVER_FAULTS else "info"


def _public(error: BaseException) -> PerdureError | None:
    """Returns the error that the caller may see; None when the caller may see none."""
    if not isinstance(error, PerdureError):
        translated = _translated(error)
        if translated is None:
            return None
        error = translated
    if isinstance(error, ConfigurationError) or error.status == "INTERNAL":
        return None
    return error


def _translated(error: BaseException) -> PerdureError | None:
    """Returns what an error of the database that nobody translated means, if it is one."""
    if not isinstance(error, Exception):
        return None
    from perdure_service.store.sqlstates import translate  # only now: it brings the whole of SQLAlchemy

    try:
        return translate(error)
    except Exception:  # noqa: BLE001 - whatever is wrong with the translation, the call still gets an answer
        _log.exception("rpc.untranslatable", error_type=type(error).__qualname__)
        return None


def _hide_parameters(error: BaseException) -> None:
    """Keeps what users wrote out of the log: SQLAlchemy's errors print the statement's parameters unless told."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if hasattr(current, "hide_parameters"):
            current.hide_parameters = True
        todo += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]
