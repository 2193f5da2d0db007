"""A perdure server that does what a test's script says: real gRPC on loopback, nothing behind it."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from perdure.v1 import agent_run_pb2, agent_run_service_pb2, run_event_pb2
from perdure_client import _transport
from perdure_client._transport import Method

METHODS: tuple[Method[Any, Any], ...] = tuple(v for v in vars(_transport).values() if isinstance(v, Method))
EXCHANGES = {_transport.START_AGENTS.path, _transport.WAIT_RUNS.path}
STREAMS = {_transport.WATCH_RUN.path, _transport.WATCH_APPROVALS.path, _transport.READ_ARTIFACT.path}


@dataclass(frozen=True)
class Fail:
    """A status as perdure's interceptor sends it; without a reason, as a bare transport would."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "scripted"
    metadata: dict[str, str] = field(default_factory=dict)
    retry_delay_s: float | None = None
    violations: tuple[tuple[str, str], ...] = ()

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        trailing = (("grpc-status-details-bin", self.status()),) if self.reason else ()
        await context.abort(self.code, self.message, trailing)

    def status(self) -> bytes:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain="perdure.dev", metadata=self.metadata)
        status.details.add().Pack(info)
        if self.retry_delay_s is not None:
            delay = Duration()
            delay.FromMilliseconds(round(self.retry_delay_s * 1000))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for name, description in self.violations:
                bad.field_violations.add(field=name, description=description)
            status.details.add().Pack(bad)
        return status.SerializeToString()


@dataclass
class Hang:
    """Never answers; `reached` tells that the call is there, `left` that its caller has gone."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> None:
        self.reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


class ScriptedServer:
    """Answers each call of a method with the next entry of that method's script.

    An entry of a unary method is a response, `Fail`, `Hang`, or a function of the request that returns one. An entry of
    a stream is a list of those, or a function that returns one; the stream ends with OK after the last. An entry of a
    stream in both directions is a function of each request that returns what is played for it, or None for no answer.
    """

    def __init__(self) -> None:
        self.scripts: dict[str, deque[Any]] = defaultdict(deque)
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.metadata: list[dict[str, str | bytes]] = []
        self.deadlines_s: list[float | None] = []
        self.ended_streams: list[bool] = []
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def script(self, method: Method[Any, Any], *entries: Any) -> None:
        self.scripts[method.path].extend(entries)

    def asked(self, method: Method[Any, Any]) -> list[Any]:
        return self.requests[method.path]

    async def start(self) -> None:
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((_Handlers(self),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(0)

    async def unary(self, path: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await self._play(self._next(path, request, context), request, context)

    async def stream(self, path: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        completed = False
        try:
            entries = self._next(path, request, context)
            if callable(entries):
                entries = entries(request)
            for entry in entries if isinstance(entries, list) else [entries]:
                await context.write(await self._play(entry, request, context))
            completed = True
        finally:
            self.ended_streams.append(completed)

    async def exchange(self, path: str, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        completed = False
        try:
            answer = None
            async for request in requests:
                if answer is None:
                    answer = self._next(path, request, context)
                else:
                    self.requests[path].append(request)
                played = await self._play(answer, request, context)
                if played is not None:
                    await context.write(played)
            completed = True
        finally:
            self.ended_streams.append(completed)

    def _next(self, path: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self.requests[path].append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.deadlines_s.append(context.time_remaining())
        if not self.scripts[path]:
            return Fail(grpc.StatusCode.FAILED_PRECONDITION, "SCRIPT_AT_ITS_END", f"no script left for {path}")
        return self.scripts[path].popleft()

    async def _play(self, entry: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if callable(entry):
            entry = entry(request)
        if isinstance(entry, Fail):
            await entry.abort(context)
        if isinstance(entry, Hang):
            await entry.wait()
        return entry


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self._methods = {method.path: method for method in METHODS}

    def service(self, details: Any) -> Any:
        method = self._methods.get(details.method)
        if method is None:
            return None
        request, response = _messages(method)
        path = method.path
        if path in EXCHANGES:

            async def exchange(messages: Any, context: Any) -> None:
                await self._server.exchange(path, messages, context)

            return grpc.stream_stream_rpc_method_handler(exchange, request.FromString, response.SerializeToString)

        if path in STREAMS:

            async def stream(message: Any, context: Any) -> None:
                await self._server.stream(path, message, context)

            return grpc.unary_stream_rpc_method_handler(stream, request.FromString, response.SerializeToString)

        async def unary(message: Any, context: Any) -> Any:
            return await self._server.unary(path, message, context)

        return grpc.unary_unary_rpc_method_handler(unary, request.FromString, response.SerializeToString)


def _messages(method: Method[Any, Any]) -> tuple[Any, Any]:
    response = method.decode(b"")
    request_name = type(response).DESCRIPTOR.name.removesuffix("Response") + "Request"
    from perdure.v1 import agent_catalog_service_pb2, approval_service_pb2, operator_service_pb2

    for module in (agent_run_service_pb2, approval_service_pb2, agent_catalog_service_pb2, operator_service_pb2):
        if hasattr(module, request_name):
            return getattr(module, request_name), type(response)
    raise AssertionError(request_name)


class CuttableProxy:
    """Stands between client and server, and cuts every connection when told: no GOAWAY, no goodbye."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.connections = 0
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        self._writers |= {writer, up_writer}
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()


# ---- messages --------------------------------------------------------------------------------------------------------


class Clock:
    """The time, some seconds ahead."""

    ahead_s = 0.0

    @classmethod
    def of(cls, *modules: str, patch: pytest.MonkeyPatch) -> Clock:
        """Returns the clock of some modules of the client."""
        clock = cls()
        for module in modules:
            patch.setattr(f"perdure_client.{module}.time", clock)
        return clock

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


def run_message(run_id: str = "r", state: str = "RUNNING", **fields: Any) -> agent_run_pb2.AgentRun:
    """A run as the server sends it."""
    return agent_run_pb2.AgentRun(
        namespace="default", run_id=run_id, agent="research", state=f"AGENT_RUN_STATE_{state}", **fields
    )


def log_event(sequence: int, run_id: str = "r") -> run_event_pb2.RunEvent:
    """An event whose content is its number."""
    return run_event_pb2.RunEvent(sequence=sequence, run_id=run_id, log=run_event_pb2.RunLog(message=str(sequence)))


def end_event(sequence: int, state: str = "SUCCEEDED", run_id: str = "r") -> run_event_pb2.RunEvent:
    """The last event of a run."""
    change = run_event_pb2.StateChanged(to_state=f"AGENT_RUN_STATE_{state}")
    return run_event_pb2.RunEvent(sequence=sequence, run_id=run_id, state_changed=change)


def batch(
    sequences: Iterable[int],
    *,
    run_id: str = "r",
    end: bool = False,
    snapshot: bool = False,
    cursor: str | None = None,
    **fields: Any,
) -> agent_run_service_pb2.WatchRunResponse:
    """A response with events of these sequences; the last one ends the run if `end`."""
    numbers = list(sequences)
    events = [end_event(n, run_id=run_id) if end and n == numbers[-1] else log_event(n, run_id) for n in numbers]
    return agent_run_service_pb2.WatchRunResponse(
        events=events,
        cursor=cursor if cursor is not None else (f"after-{numbers[-1]}" if numbers else ""),
        snapshot=run_message() if snapshot else None,
        end_of_run=end,
        **fields,
    )


def finished_run(last: int, size: int = 3) -> Callable[[Any], list[Any]]:
    """A script entry: how a faithful server serves the watch of a finished run, from where the request says."""

    def serve(request: Any) -> list[Any]:
        by_cursor = request.WhichOneof("position") == "cursor"
        after = int(request.cursor.removeprefix("after-")) if by_cursor else request.after_sequence
        batches = [
            batch(range(first, min(first + size, last + 1)), end=first + size > last)
            for first in range(after + 1, last + 1, size)
        ]
        return batches or [batch([], end=True)]

    return serve
