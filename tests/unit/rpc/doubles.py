"""What the tests of the RPC layer share: a scripted run service, example values, a served loopback server, decoding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from perdure.v1.agent_catalog_service_pb2_grpc import AgentCatalogServiceStub
from perdure.v1.agent_run_service_pb2_grpc import AgentRunServiceStub
from perdure.v1.approval_service_pb2_grpc import ApprovalServiceStub
from perdure_service.domain.approvals import Approval, ApprovalState, TimeoutOutcome
from perdure_service.domain.cursors import Cursor
from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.regions import Place
from perdure_service.domain.runs import Run, RunKey, RunState
from perdure_service.durable.service import RunService, WatchBatch
from perdure_service.rpc.server import RpcServer
from perdure_service.settings import Settings
from perdure_service.telemetry import RunTracer

NOON = datetime(2030, 5, 6, 12, 0, 0, 250_000, tzinfo=UTC)
KEY = RunKey.of_api("default", "foo")


def a_run(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "key": KEY,
        "agent": "research",
        "agent_version": "1",
        "input_sha256": "ab" * 32,
        "request_id": "r-1",
        "state": RunState.RUNNING,
        "state_reason": "",
        "create_time": NOON,
        "start_time": None,
        "end_time": None,
        "deadline_time": None,
        "execution": 1,
        "executor_id": "host-1",
        "progress": None,
        "pending_approvals": 0,
        "labels": {},
        "context_id": "",
        "parent_run_id": "",
        "trace_id": "0" * 31 + "1",
        "last_sequence": 3,
    }
    return Run(**values | changes)


def an_approval(**changes: Any) -> Approval:
    values: dict[str, Any] = {
        "approval_id": "foo/3",
        "key": KEY,
        "agent": "research",
        "step_id": 3,
        "title": "Publish?",
        "payload_json": '{"draft":"x"}',
        "answer_schema_json": "",
        "assignees": ("ann",),
        "create_time": NOON,
        "deadline_time": None,
        "on_timeout": TimeoutOutcome.REJECT,
        "state": ApprovalState.PENDING,
        "decided_by": "",
        "decide_time": None,
        "comment": "",
        "answer_json": "",
        "revision": 1,
    }
    return Approval(**values | changes)


def an_event(sequence: int, kind: EventKind = EventKind.LOG, **data: Any) -> Event:
    return Event(kind, 1_000 + sequence, data, sequence=sequence)


def a_batch(*sequences: int, **changes: Any) -> WatchBatch:
    last = changes.pop("last_sequence", sequences[-1] if sequences else 0)
    values: dict[str, Any] = {
        "key": KEY,
        "events": [an_event(n, message=f"event {n}") for n in sequences],
        "cursor": Cursor(KEY.workflow_id, last),
    }
    return WatchBatch(**values | changes)


@dataclass
class ScriptedService(RunService):
    """A run service that does what a test says: `script[method](*args, **kwargs)`, and remembers how it was called."""

    script: dict[str, Callable[..., Any]] = field(default_factory=dict)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    async def _answer(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, args, kwargs))
        answer = self.script[name](*args, **kwargs)
        return await answer if asyncio.iscoroutine(answer) else answer

    async def _stream(self, name: str, /, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        self.calls.append((name, args, kwargs))
        try:
            async for item in self.script[name](*args, **kwargs):
                yield item
        finally:
            self.closed.append(name)

    def __post_init__(self) -> None:
        # Every method of the interface, by its name; `watch…` are streams.
        for name in [name for name in vars(RunService) if not name.startswith("_")]:
            make = self._stream if name.startswith("watch") else self._answer
            setattr(self, name, lambda *args, _make=make, _name=name, **kwargs: _make(_name, *args, **kwargs))


def fails_with(error: BaseException) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        raise error

    return answer


def streams(*batches: Any, then_stay: bool = False) -> Callable[..., AsyncIterator[Any]]:
    async def answer(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        for batch in batches:
            yield batch
        if then_stay:
            await asyncio.Event().wait()

    return answer


def settings_of(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "address": "127.0.0.1:0",
        "max_connection_age": 60.0,
        "namespaces": ("default", "lab"),
    }
    return Settings(**values | changes)


@dataclass
class Served:
    """A server on loopback and a channel to it."""

    server: RpcServer
    port: int
    health_port: int | None
    channel: grpc.aio.Channel
    admin_port: int | None
    runs: AgentRunServiceStub
    approvals: ApprovalServiceStub
    catalog: AgentCatalogServiceStub


@asynccontextmanager
async def serving(
    service: RunService,
    *,
    tracer: RunTracer | None = None,
    caller: str = "anonymous",
    channel_options: Sequence[tuple[str, Any]] = (),
    credentials: grpc.ChannelCredentials | None = None,
    place: Place | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    server = RpcServer(service, settings_of(**settings), tracer=tracer, caller=caller, place=place)
    ports = await server.start()
    try:
        async with channel_to(ports.rpc, credentials, channel_options) as channel:
            yield Served(
                server,
                ports.rpc,
                ports.health,
                channel,
                ports.admin,
                AgentRunServiceStub(channel),
                ApprovalServiceStub(channel),
                AgentCatalogServiceStub(channel),
            )
    finally:
        await server.stop(0)


def channel_to(
    port: int, credentials: grpc.ChannelCredentials | None = None, options: Sequence[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    """Returns a channel of its own to a port of this machine."""
    options = [("grpc.use_local_subchannel_pool", 1), *options]
    if credentials is None:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
    return grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options)


@dataclass
class Failure:
    """What a client learns of a failed call."""

    code: grpc.StatusCode
    text: str
    status: status_pb2.Status
    info: error_details_pb2.ErrorInfo
    violations: dict[str, str]
    retry_delay_s: float | None
    raw: str


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_delay_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_delay_s = retry.retry_delay.ToMilliseconds() / 1_000
    return Failure(
        error.code(),
        error.details() or "",
        status,
        info,
        {violation.field: violation.description for violation in bad.field_violations},
        retry_delay_s,
        repr((error.details(), metadata, error.debug_error_string())),
    )


async def failing(call: Any) -> Failure:
    """Returns what a client learns of a call, unary or stream, that must fail."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError("the call did not fail")
