"""Serves OperatorService, on the admin port: request in, one call of the run service, response out."""

# ruff: noqa: ARG002 - gRPC gives every method a context, whether it needs one or not

from __future__ import annotations

from perdure.v1 import operator_service_pb2 as pb
from perdure.v1.operator_service_pb2_grpc import OperatorServiceServicer

from perdure_service.domain.executors import Executor, ExecutorState
from perdure_service.domain.queues import Queue
from perdure_service.domain.regions import Cell, Place, SurvivalGoal
from perdure_service.domain.stranded import StrandedReason, StrandedRun
from perdure_service.durable.service import RunService
from perdure_service.errors import InvalidArgument
from perdure_service.rpc import fields
from perdure_service.rpc.enums import RUN_STATES
from perdure_service.rpc.forwarding import Router
from perdure_service.rpc.handlers import RpcContext
from perdure_service.rpc.validation import Violations
from perdure_service.store.cells import CellStatus

STATES = {state: getattr(pb, f"EXECUTOR_STATE_{state}") for state in ExecutorState}

GOALS = {goal: getattr(pb, f"SURVIVAL_GOAL_{goal.upper()}") for goal in SurvivalGoal}

REASONS = {reason: getattr(pb, f"STRANDED_REASON_{reason}") for reason in StrandedReason}


class Operators(OperatorServiceServicer):
    """What operators look at."""

    def __init__(self, service: RunService, router: Router | None = None) -> None:
        self._service = service
        self._router = router

    async def ListExecutors(self, request: pb.ListExecutorsRequest, context: RpcContext) -> pb.ListExecutorsResponse:
        """Returns a page of executors."""
        found = Violations()
        page_size = found.page_size(request.page_size)
        page_token = found.token("page_token", request.page_token)
        found.raise_any()
        page = await self._service.list_executors(
            include_gone=request.include_gone, page_size=page_size, page_token=page_token
        )
        return pb.ListExecutorsResponse(executors=map(_executor, page.items), next_page_token=page.next_token)

    async def ListQueues(self, request: pb.ListQueuesRequest, context: RpcContext) -> pb.ListQueuesResponse:
        """Returns a page of queues."""
        found = Violations()
        page_size = found.page_size(request.page_size)
        page_token = found.token("page_token", request.page_token)
        found.raise_any()
        page = await self._service.list_queues(page_size=page_size, page_token=page_token)
        return pb.ListQueuesResponse(queues=map(_queue, page.items), next_page_token=page.next_token)

    async def ListStrandedRuns(
        self, request: pb.ListStrandedRunsRequest, context: RpcContext
    ) -> pb.ListStrandedRunsResponse:
        """Returns a page of the runs that nobody continues."""
        found = Violations()
        page_size = found.page_size(request.page_size)
        page_token = found.token("page_token", request.page_token)
        found.raise_any()
        page = await self._service.list_stranded(page_size=page_size, page_token=page_token)
        return pb.ListStrandedRunsResponse(runs=map(_stranded, page.items), next_page_token=page.next_token)

    async def ListCells(self, request: pb.ListCellsRequest, context: RpcContext) -> pb.ListCellsResponse:
        """Returns the cells, all in one page: there are as many as regions, more or less."""
        found = Violations()
        found.page_size(request.page_size)
        if request.page_token:
            found.add("page_token", "is not a token of this service")
        found.raise_any()
        if self._router is None:
            return pb.ListCellsResponse()
        place, reachable, status = self._router.place, await self._router.reachable(), await self._service.cell_status()
        return pb.ListCellsResponse(
            cells=[_cell(one, place, reachable[one.name], status) for one in place.regions.cells.values()]
        )

    async def EvacuateCell(self, request: pb.EvacuateCellRequest, context: RpcContext) -> pb.EvacuateCellResponse:
        """Gives the runs of this server's cell to those that stand by in its secondary region."""
        place = self._place_of(request.cell)
        if not place.cell.secondary:
            raise InvalidArgument("cell", f"has no secondary region; give {place.cell.region} a neighbour")
        return pb.EvacuateCellResponse(cell=await self._move(place, place.cell.secondary))

    async def ReturnCell(self, request: pb.ReturnCellRequest, context: RpcContext) -> pb.ReturnCellResponse:
        """Gives the runs of this server's cell to those that stand by at its home."""
        place = self._place_of(request.cell)
        return pb.ReturnCellResponse(cell=await self._move(place, place.cell.region))

    async def _move(self, place: Place, region: str) -> pb.Cell:
        await self._service.move_cell(region)
        return _cell(place.cell, place, True, await self._service.cell_status())

    def _place_of(self, name: str) -> Place:
        """Returns where this server is.

        Raises:
            InvalidArgument: It does not serve the cell of this name.
        """
        if self._router is None:
            raise InvalidArgument("cell", "is no cell: this service has no regions")
        place = self._router.place
        if name not in place.regions.cells:
            raise InvalidArgument("cell", f"must be one of {', '.join(place.regions.cells)}")
        if name != place.cell.name:
            other = place.regions.cells[name]
            raise InvalidArgument(
                "cell",
                f"is served by others: call the admin address of one of its servers, in {other.region}"
                + (f" or {other.secondary}" if other.secondary else "")
                + f"; this one serves {place.cell.name}",
            )
        return place


def _cell(value: Cell, place: Place, reachable: bool, status: CellStatus | None) -> pb.Cell:
    cell = _described(value, place, reachable)
    if status is not None and value.name == place.cell.name:
        cell.serving_region = fields.text(status.row.region)
        cell.epoch = fields.int64(status.row.epoch)
        if (claimed_at := fields.timestamp(status.row.claimed_at)) is not None:
            cell.claim_time.CopyFrom(claimed_at)
        cell.executors = fields.int32(status.executors)
        cell.standing_by = fields.int32(status.standing_by)
    return cell


def _described(value: Cell, place: Place, reachable: bool) -> pb.Cell:
    return pb.Cell(
        cell=value.name,
        home_region=value.region,
        secondary_region=value.secondary,
        survival_goal=GOALS[value.survive],
        database=value.database,
        address=value.address,
        standby_address=value.standby_address,
        namespaces=[name for name, home in place.regions.namespaces.items() if home.cell == value.name],
        served_here=value.name == place.cell.name,
        reachable=reachable,
    )


def _stranded(value: StrandedRun) -> pb.StrandedRun:
    return pb.StrandedRun(
        namespace=fields.text(value.key.namespace),
        run_id=fields.text(value.key.run_id),
        agent=fields.text(value.agent),
        agent_version=fields.text(value.agent_version),
        application_version=fields.text(value.application_version),
        state=RUN_STATES[value.state],
        reason=REASONS[value.reason],
        advice=fields.text(value.advice),
        create_time=fields.timestamp(value.create_time),
    )


def _executor(value: Executor) -> pb.Executor:
    return pb.Executor(
        executor_id=fields.text(value.executor_id),
        address=fields.text(value.address),
        application_version=fields.text(value.application_version),
        region=fields.text(value.region),
        state=STATES[value.state],
        running=fields.int32(value.running),
        max_running=fields.int32(value.max_running),
        start_time=fields.timestamp(value.start_time),
        expire_time=fields.timestamp(value.expire_time),
    )


def _queue(value: Queue) -> pb.Queue:
    limits = value.limits
    return pb.Queue(
        queue=fields.text(limits.name),
        worker_concurrency=fields.int32(limits.worker_concurrency),
        global_concurrency=fields.int32(limits.global_concurrency),
        rate_limit=fields.int32(limits.rate_limit),
        rate_period=fields.duration_of_ms(limits.rate_period_s * 1000) if limits.rate_limit else None,
        queued=fields.int64(value.queued),
        running=fields.int64(value.running),
        oldest_queued_time=fields.timestamp(value.oldest_queued_time),
    )
