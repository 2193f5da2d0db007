"""Decides which cell answers a call, and sends it there: any server answers for any run, whoever holds its rows.

A call is sent on once. Who receives it marked (`FORWARDED_KEY`) answers from its own cell or refuses, so two servers
whose regions files differ cannot play ball with it. The first server fixes what is decided (the cell, the request's
id) before it sends anything.

**Why one id starts one run**, although it may be sent to two regions at once: an id of a client's own is started in
the home of its namespace only, whoever takes the call, and there the primary key lets one in. Where the namespace had
other homes, its id is looked up in them first. They take no new ids: the receiver of a start checks by its own regions
file that it is the home, or has the run already. So what two files of the same namespace could disagree about is the
home alone, and between the two `paused` lets none of them start (regions.md, "Moving a namespace").

**What if the answer is lost?** The caller is told UNAVAILABLE and repeats; every call that changes something bears
that, by its ids. A call that a dying home may have done is for the same reason safe to send to its standby.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from perdure.v1 import agent_run_service_pb2 as pb

from perdure_service.domain.regions import Cell, Place
from perdure_service.domain.runs import DEFAULT_NAMESPACE, new_run_id
from perdure_service.errors import (
    ApprovalNotFound,
    CellNotServed,
    InvalidArgument,
    NamespacePaused,
    PerdureError,
    RegionUnavailable,
    RunNotFound,
)
from perdure_service.rpc.gathering import Gathering
from perdure_service.rpc.handlers import RpcContext
from perdure_service.rpc.peers import Forward, Peers, forwarded_to
from perdure_service.rpc.routes import ROUTES, Route
from perdure_service.rpc.streams import Streams, closing

Start = Callable[[pb.StartAgentRequest, str], Awaitable[pb.StartAgentResponse]]
"""Starts one run here, in the trace of a `traceparent`."""
_START = "/perdure.v1.AgentRunService/StartAgent"
_WAIT = "/perdure.v1.AgentRunService/WaitRun"
_WAITS: Mapping[str, Callable[[Any], bool]] = {
    _WAIT: lambda _request: True,
    _START: lambda request: bool(request.HasField("wait")),
}
"""When a unary call waits for long."""
_HEALTH = "/grpc.health.v1.Health/Check"
_HEALTH_S = 3.0
_MISSING = frozenset({RunNotFound.reason, ApprovalNotFound.reason})


def _never(_request: Any) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Method:
    """A method that may be answered here or elsewhere.

    Attributes:
        path: `/package.Service/Method`.
        answer: The type of its answers.
        serve: Answers here: a coroutine function, or an asynchronous generator function.
        waits: Whether a request of it is unary and waits for long, so that it ends when this server drains.
    """

    path: str
    answer: type[Any]
    serve: Callable[[Any, RpcContext], Any]
    waits: Callable[[Any], bool] = _never


class Routed:
    """A servicer each of whose methods is answered by the right cell."""

    def __init__(self, servicer: Any, service: ServiceDescriptor, router: Router) -> None:
        """Wraps a servicer.

        Args:
            servicer: Answers from this server's own cell.
            service: What it serves.
            router: Knows the cells.
        """
        for method in service.methods:
            setattr(self, method.name, router.routed(method, getattr(servicer, method.name)))


class Router:
    """Sends calls to the cells of their runs. Used on the server's event loop only."""

    def __init__(self, place: Place, peers: Peers, streams: Streams) -> None:
        """Makes a router.

        Args:
            place: Where this server is.
            peers: Calls the other cells.
            streams: Ends what waits when this server drains.
        """
        self.place = place
        self._regions = place.regions
        self._own = place.cell
        self._peers = peers
        self._streams = streams
        self._get_run: Method | None = None
        self._gathering = Gathering(place, self._answer, self._answers)

    def routed(self, descriptor: MethodDescriptor, serve: Callable[[Any, RpcContext], Any]) -> Any:
        """Returns what serves a method: `serve` itself where every server may answer."""
        path = f"/{descriptor.containing_service.full_name}/{descriptor.name}"
        method = Method(path, GetMessageClass(descriptor.output_type), serve, _WAITS.get(path, _never))
        if descriptor.name == "GetRun":
            self._get_run = method
        route = ROUTES.get(descriptor.full_name, Route.HERE)
        if route is Route.HERE:
            return serve
        if descriptor.server_streaming:
            return self._streaming(method, route)

        async def call(request: Any, context: RpcContext) -> Any:
            if self._is_forwarded(context):
                await self._check_forwarded(route, request, context)
                return await self._answer(method, self._own, request, context)
            return await self._unary(method, route, request, context)

        return call

    def _streaming(self, method: Method, route: Route) -> Any:
        async def stream(request: Any, context: RpcContext) -> AsyncIterator[Any]:
            if self._is_forwarded(context):
                source = self._answers(method, self._own, request, context)
            elif route is Route.INBOX:
                source = self._gathering.inbox(method, request, context)
            else:
                source = self._first_stream(method, self._cells_of(route, request), request, context)
            async with closing(source) as answers:
                async for answer in answers:
                    yield answer

        return stream

    async def _unary(self, method: Method, route: Route, request: Any, context: RpcContext) -> Any:
        match route:
            case Route.START:
                cell = await self._cell_for_start(request, context)
                return await self._answer(method, cell, _with_request_id(request), context)
            case Route.RUNS:
                return await self._gathering.runs(method, request, context)
            case Route.APPROVALS:
                return await self._gathering.approvals(method, request, context)
            case Route.DELETION:
                return await self._gathering.delete(method, request, context)
            case Route.FORK if request.new_run_id:
                return await self._fork_with_id(method, request, context)
            case _:
                return await self._first(method, self._cells_of(route, request), request, context)

    async def start(self, serve: Start, context: RpcContext, request: pb.StartAgentRequest, trace_parent: str) -> Any:
        """Returns the answer to one of many starts of a stream, which is sent on alone.

        Args:
            serve: Starts it here.
            context: The stream's.
            request: The start.
            trace_parent: The `traceparent` of the start, or empty.
        """
        cell = await self._cell_for_start(request, context)
        request = _with_request_id(request)
        if cell.name == self._own.name:
            return self._stamped(await serve(request, trace_parent))
        forward = Forward.of(context).in_trace(trace_parent)
        return await self._peers.unary(cell, _START, request, pb.StartAgentResponse, forward)

    async def wait(
        self, serve: Callable[[Any, RpcContext], Any], context: RpcContext, request: pb.WaitRunRequest
    ) -> Any:
        """Returns the answer to one of many waits of a stream, which is sent on alone.

        Args:
            serve: Waits for a run of this server's cell.
            context: The stream's.
            request: The wait.
        """
        method = Method(_WAIT, pb.WaitRunResponse, serve)
        return await self._first(method, self._cells_of(Route.RUN, request), request, context)

    async def reachable(self) -> Mapping[str, bool]:
        """Returns, by cell, whether one of its servers answers this one."""

        async def answers(cell: Cell) -> bool:
            forward = Forward((), _HEALTH_S)  # health asks nobody who he is
            try:
                await self._peers.unary(cell, _HEALTH, HealthCheckRequest(), HealthCheckResponse, forward)
            except PerdureError:
                return False
            return True

        others = [cell for cell in self._regions.cells.values() if cell.name != self._own.name]
        found = await asyncio.gather(*map(answers, others))
        return {self._own.name: True, **{cell.name: one for cell, one in zip(others, found, strict=True)}}

    # ---- which cell --------------------------------------------------------------------------------------------------

    def _cells_of(self, route: Route, request: Any) -> Sequence[Cell]:
        """Returns the cells in which a run, or the run of an approval, may live."""
        run_id = request.approval_id.rpartition("/")[0] if route is Route.APPROVAL else request.run_id
        return self._regions.homes_of(_namespace(request), run_id)

    async def _cell_for_start(self, request: pb.StartAgentRequest, context: RpcContext) -> Cell:
        if request.home_region:
            # Together with an id it is refused, by whoever is asked.
            return self._own if request.run_id else self._regions.cell_for_start(request.home_region)
        namespace = _namespace(request)
        self._check_not_paused(namespace)
        home = self._regions.namespaces[namespace]
        if request.run_id:
            for name in home.former:
                former = self._regions.cells[name]
                if await self._is_in(former, namespace, request.run_id, context):
                    return former
        return self._regions.cells[home.cell]

    async def _fork_with_id(self, method: Method, request: pb.ForkRunRequest, context: RpcContext) -> Any:
        """Answers a fork whose id its caller gives: it lives where its run does, and is looked up at home."""
        namespace = _namespace(request)
        self._check_not_paused(namespace)
        home = self._regions.cells[self._regions.namespaces[namespace].cell]
        cells = self._regions.homes_of(namespace, request.run_id)
        elsewhere = InvalidArgument(
            "new_run_id",
            f"is taken only for a fork of a run in {home.region}, the home of the namespace, as a fork lives where its "
            "run does; leave it empty, and the server makes it",
        )
        if home not in cells:
            raise elsewhere
        for name in self._regions.namespaces[namespace].former:
            if await self._is_in(self._regions.cells[name], namespace, request.new_run_id, context):
                raise InvalidArgument("new_run_id", "is taken, in a former home of the namespace; choose another")
        try:
            return await self._answer(method, home, request, context)
        except PerdureError as error:
            if error.reason in _MISSING and len(cells) > 1:
                raise elsewhere from error
            raise

    def _check_not_paused(self, namespace: str) -> None:
        if self._regions.namespaces[namespace].paused:
            raise NamespacePaused(f"the namespace {namespace!r} is being moved to another home; wait and repeat")

    async def _is_in(self, cell: Cell, namespace: str, run_id: str, context: RpcContext) -> bool:
        assert self._get_run is not None
        try:
            request = pb.GetRunRequest(namespace=namespace, run_id=run_id)
            await self._answer(self._get_run, cell, request, context)
        except PerdureError as error:
            if error.reason == RunNotFound.reason:
                return False
            raise
        return True

    # ---- what others have sent here ----------------------------------------------------------------------------------

    def _is_forwarded(self, context: RpcContext) -> bool:
        """Returns whether another server has sent a call here.

        Raises:
            CellNotServed: It meant a cell that this server does not serve.
        """
        sent_to = forwarded_to(context)
        if sent_to is None:
            return False
        if sent_to != self._own.name:
            raise self._not_served(sent_to)
        return True

    async def _check_forwarded(self, route: Route, request: Any, context: RpcContext) -> None:
        """Refuses to start a run that by this server's own file lives elsewhere.

        Raises:
            CellNotServed: Sender and receiver have different regions files; what they agree about later, a repeat does.
            NamespacePaused: Nothing is started in the namespace now.
        """
        new_id = {Route.START: "run_id", Route.FORK: "new_run_id"}.get(route)
        if new_id is None or (route is Route.FORK and not request.new_run_id):
            return
        if route is Route.START and request.home_region:
            if self._regions.cell_for_start(request.home_region) != self._own:
                raise self._not_served(self._own.name)
            return
        namespace = _namespace(request)
        self._check_not_paused(namespace)
        home = self._regions.namespaces[namespace]
        if home.cell == self._own.name:
            return
        run_id = getattr(request, new_id)
        was_home = self._own.name in home.former
        if not (was_home and run_id and await self._is_in(self._own, namespace, run_id, context)):
            raise self._not_served(self._own.name)

    def _not_served(self, cell: str) -> CellNotServed:
        return CellNotServed(
            f"this server, of the cell {self._own.name}, does not serve the call for {cell}; wait and repeat it",
            cell=cell,
        )

    # ---- asking cells ------------------------------------------------------------------------------------------------

    async def _answer(
        self, method: Method, cell: Cell, request: Any, context: RpcContext, within_s: float | None = None
    ) -> Any:
        """Returns a cell's answer to a unary call."""
        if cell.name == self._own.name:
            return self._stamped(await method.serve(request, context))
        forward = Forward.of(context)
        with self._streams.wait() if method.waits(request) else nullcontext():
            return await self._peers.unary(
                cell, method.path, request, method.answer, forward if within_s is None else forward.within(within_s)
            )

    async def _answers(self, method: Method, cell: Cell, request: Any, context: RpcContext) -> AsyncIterator[Any]:
        """Yields a cell's answers to a streaming call."""
        if cell.name == self._own.name:
            source = method.serve(request, context)
        else:
            source = self._peers.stream(cell, method.path, request, method.answer, Forward.of(context))
        async with closing(source) as answers:
            async for answer in answers:
                yield self._stamped(answer) if cell.name == self._own.name else answer

    async def _first(self, method: Method, cells: Sequence[Cell], request: Any, context: RpcContext) -> Any:
        """Returns the answer of the first cell that has the run."""
        nowhere = _Nowhere(len(cells))
        for cell in cells:
            try:
                return await self._answer(method, cell, request, context)
            except PerdureError as error:
                nowhere.note(error)
        raise nowhere.error

    async def _first_stream(
        self, method: Method, cells: Sequence[Cell], request: Any, context: RpcContext
    ) -> AsyncIterator[Any]:
        """Yields the answers of the first cell that has the run."""
        nowhere = _Nowhere(len(cells))
        for cell in cells:
            begun = False
            try:
                async with closing(self._answers(method, cell, request, context)) as answers:
                    async for answer in answers:
                        begun = True
                        yield answer
                return
            except PerdureError as error:
                if begun:
                    raise
                nowhere.note(error)
        raise nowhere.error

    def _stamped(self, answer: Any) -> Any:
        """Returns an answer of this server's cell that says where its runs live."""
        names = answer.DESCRIPTOR.fields_by_name
        for name in ("run", "snapshot"):
            if name in names and answer.HasField(name):
                getattr(answer, name).home_region = self._own.region
        for run in answer.runs if "runs" in names else ():
            run.home_region = self._own.region
        return answer


class _Nowhere:
    """Why no cell has answered, while they are asked one after another."""

    def __init__(self, cells: int) -> None:
        self._several = cells > 1
        self._missing: PerdureError | None = None
        self._unreachable: PerdureError | None = None

    def note(self, error: PerdureError) -> None:
        """Notes why one has not; raises what the next could not make good."""
        if error.reason in _MISSING:
            self._missing = self._missing or error
        elif self._several and error.reason == RegionUnavailable.reason:
            self._unreachable = self._unreachable or error
        else:
            raise error

    @property
    def error(self) -> PerdureError:
        """What the caller is told: that it is missing only when all have said so."""
        told = self._unreachable or self._missing
        assert told is not None
        return told


def _namespace(request: Any) -> str:
    return request.namespace or DEFAULT_NAMESPACE


def _with_request_id(request: pb.StartAgentRequest) -> pb.StartAgentRequest:
    """Returns a start that may be sent twice, as to a home and then to its standby."""
    if request.request_id:
        return request
    sent = pb.StartAgentRequest()
    sent.CopyFrom(request)
    sent.request_id = f"server-{new_run_id()}"
    return sent
