"""What every client can do, once: each operation as a coroutine over a transport that may or may not block."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Generic, TypeVar

import grpc
from google.protobuf.message import Message
from perdure.v1 import agent_catalog_service_pb2 as catalog
from perdure.v1 import agent_run_pb2, agent_run_service_pb2, approval_service_pb2, operator_service_pb2

from perdure_client import _convert, _requests, _transport
from perdure_client._artifacts import ArtifactReader, read_all
from perdure_client._bulk import AgentStart, BulkStarter
from perdure_client._bulk_waits import BulkWaiter
from perdure_client._config import Config
from perdure_client._errors import DeadlineExceeded, RunFailed, WaitTimeout
from perdure_client._events import EventKind, RunEvent
from perdure_client._listing import OnUnreachable, told_once
from perdure_client._retry import Patience
from perdure_client._rpc_errors import had_held
from perdure_client._transport import Method, Transport
from perdure_client._types import (
    AgentInfo,
    Approval,
    CellInfo,
    Deletion,
    ExecutorInfo,
    JsonValue,
    QueueInfo,
    Run,
    RunTrace,
    StartedRun,
    Step,
    StrandedRun,
)
from perdure_client._watch import ApprovalWatcher, OnReconnect, RunWatcher, call_metadata, failure_from

_LONGEST_WAIT_S = 60.0
"""The server's own bound of one WaitRun."""
_SHORTEST_WAIT_S = 0.05
_WAIT_IN_START_S = 5.0
"""How long `run` asks a start to wait for the end: a call less is nothing to a run that takes longer."""
_PAGE_SIZE = 200
_SAMPLE = 100
"""Ids of deleted runs that are told."""

_T = TypeVar("_T")
_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT", bound=Message)


class Pages(Generic[_T]):
    """Everything a listing has, page by page.

    Args:
        fetch: Returns the items of the page that a token names, and the next token; empty at the end.
        limit: At most so many items; None for all.
    """

    def __init__(
        self, fetch: Callable[[str], Awaitable[tuple[Sequence[_T], str]]], *, limit: int | None = None
    ) -> None:
        self._fetch = fetch
        self._left = limit
        self._items: list[_T] = []  # reversed: the next one is last
        self._token: str | None = ""

    async def read(self) -> _T | None:
        """Returns the next item; None after the last."""
        if self._left == 0:
            return None
        while not self._items and self._token is not None:
            items, next_token = await self._fetch(self._token)
            self._items = list(reversed(items))
            self._token = next_token or None
        if not self._items:
            return None
        if self._left is not None:
            self._left -= 1
        return self._items.pop()


class Core:
    """The operations. Everything they raise is a `PerdureError`."""

    def __init__(self, config: Config, transport: Transport) -> None:
        self.config = config
        self.transport = transport

    async def call(
        self,
        method: Method[_RequestT, _ResponseT],
        request: _RequestT,
        *,
        patience: Patience | None = None,
        attempt_s: float | None = None,
    ) -> _ResponseT:
        """Returns the answer to a call that is safe to repeat; all of this API are.

        Args:
            method: What to call.
            request: The same in every repeat, and so its request_id.
            patience: How long to go on; None for the client's timeouts.
            attempt_s: The longest a single attempt may take; None for as long as there is.

        Raises:
            PerdureError: It failed, not worth repeating or for too long.
        """
        patience = patience or Patience(self.config.timeout_s, self.config.connect_timeout_s)
        while True:
            timeout_s = min(patience.remaining_s, attempt_s or patience.remaining_s)
            began_s = time.monotonic()
            try:
                metadata = call_metadata(self.config)
                return await self.transport.unary(method, request, timeout_s=timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                failure = failure_from(error, self.config)
                if had_held(error, began_s):
                    patience.reached()
                delay_s = patience.delay_before_repeat_s(failure)
                if delay_s is None:
                    raise failure from error
            await self.transport.sleep(delay_s)

    async def start(self, request: agent_run_service_pb2.StartAgentRequest) -> StartedRun:
        """Starts an agent."""
        response = await self.call(_transport.START_AGENT, request)
        return _convert.started_run_from(response.run, created=response.created)

    def start_many(self, starts: AsyncIterable[AgentStart] | Iterable[AgentStart]) -> BulkStarter:
        """Starts many agents; nothing is sent before the first read."""
        return BulkStarter(self.transport, self.config, starts)

    def wait_many(self, runs: Iterable[Run | str]) -> BulkWaiter:
        """Waits for the ends of many runs; nothing is sent before the first read."""
        return BulkWaiter(self.transport, self.config, runs)

    async def get(self, run: Run | str, *, full: bool) -> Run:
        """Returns a run."""
        request = _requests.message(
            agent_run_service_pb2.GetRunRequest,
            namespace=self.config.namespace,
            run_id=_requests.run_id_of(run),
            view=_view(full),
        )
        return await self._whole((await self.call(_transport.GET_RUN, request)).run)

    async def wait(self, run: Run | str, *, timeout_s: float | None) -> Run:
        """Returns a run once it has ended.

        Raises:
            WaitTimeout: It has not ended in time.
        """
        run_id = _requests.run_id_of(run)
        request = _requests.message(
            agent_run_service_pb2.WaitRunRequest,
            namespace=self.config.namespace,
            run_id=run_id,
            view=agent_run_pb2.AGENT_RUN_VIEW_FULL,
        )
        began_s = time.monotonic()
        seen: Run | None = None
        while True:
            outage_s = self.config.connect_timeout_s if seen is None else self.config.reconnect_timeout_s
            total_s = _LONGEST_WAIT_S + self.config.reconnect_timeout_s
            if timeout_s is not None:
                total_s = min(total_s, max(_SHORTEST_WAIT_S, timeout_s - (time.monotonic() - began_s)))
            try:
                response = await self.call(
                    _transport.WAIT_RUN, request, patience=Patience(total_s, outage_s), attempt_s=_LONGEST_WAIT_S
                )
            except DeadlineExceeded as error:
                if timeout_s is None or time.monotonic() - began_s < timeout_s - _SHORTEST_WAIT_S:
                    raise
                raise _wait_timeout(run_id, timeout_s, seen) from error
            seen = await self._whole(response.run) if not response.timed_out else _convert.run_from(response.run)
            if not response.timed_out:
                return seen
            if timeout_s is not None and time.monotonic() - began_s >= timeout_s - _SHORTEST_WAIT_S:
                raise _wait_timeout(run_id, timeout_s, seen)

    async def _whole(self, message: agent_run_pb2.AgentRun) -> Run:
        """Returns a run with the input and output that its message had no room for."""
        if message.input_bytes and not message.input_json:
            message.input_json = (await self._text(message, input=True)).decode()
        if message.output_bytes and not message.output_json:
            message.output_json = (await self._text(message, output=True)).decode()
        return _convert.run_from(message)

    async def _text(self, message: agent_run_pb2.AgentRun, *, input: bool = False, output: bool = False) -> bytes:
        request = agent_run_service_pb2.ReadArtifactRequest(namespace=message.namespace, run_id=message.run_id)
        if input:
            request.input = True
        if output:
            request.output = True
        return await read_all(ArtifactReader(self.transport, self.config, request))

    def artifact(self, run: Run | str, name: str) -> ArtifactReader:
        """Reads an artifact of a run."""
        request = _requests.message(
            agent_run_service_pb2.ReadArtifactRequest,
            namespace=self.config.namespace,
            run_id=_requests.run_id_of(run),
            name=name,
        )
        return ArtifactReader(self.transport, self.config, request)

    async def run(self, request: agent_run_service_pb2.StartAgentRequest, *, timeout_s: float | None) -> JsonValue:
        """Starts an agent and returns its output: a short run's in one call.

        Raises:
            RunFailed: The run ended otherwise.
        """
        began_s = time.monotonic()
        wait_s = _WAIT_IN_START_S if timeout_s is None else min(_WAIT_IN_START_S, max(0.0, timeout_s))
        request.wait.FromTimedelta(timedelta(seconds=wait_s))
        started = (await self.call(_transport.START_AGENT, request)).run
        # A server that does not know `wait` may know the run, and say of it no more than a start says.
        if started.state == agent_run_pb2.AGENT_RUN_STATE_SUCCEEDED and (started.output_json or started.output_bytes):
            return (await self._whole(started)).output
        left_s = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - began_s))
        run = await self.wait(started.run_id, timeout_s=left_s)
        if not run.succeeded:
            raise RunFailed(run)
        return run.output

    async def signal(self, request: agent_run_service_pb2.SignalRunRequest) -> bool:
        """Sends a signal; returns whether this call delivered it."""
        return (await self.call(_transport.SIGNAL_RUN, request)).created

    async def cancel(self, run: Run | str, *, reason: str) -> Run:
        """Cancels a run."""
        request = _requests.message(
            agent_run_service_pb2.CancelRunRequest,
            namespace=self.config.namespace,
            run_id=_requests.run_id_of(run),
            reason=reason,
        )
        return _convert.run_from((await self.call(_transport.CANCEL_RUN, request)).run)

    async def fork(self, request: agent_run_service_pb2.ForkRunRequest) -> StartedRun:
        """Forks a run."""
        response = await self.call(_transport.FORK_RUN, request)
        return _convert.started_run_from(response.run, created=response.created)

    async def delete_runs(self, requests: Sequence[agent_run_service_pb2.DeleteRunsRequest]) -> Deletion:
        """Deletes runs, call after call, until nothing is left to delete; asked only to count, each call once."""
        total = Deletion()
        for request in requests:
            total = _add(total, await self._delete(request))
        return total

    async def _delete(self, request: agent_run_service_pb2.DeleteRunsRequest) -> Deletion:
        found = _convert.deletion_from(await self.call(_transport.DELETE_RUNS, request))
        while found.more and not request.validate_only:
            # What an earlier call has deleted is missing for the next one; the first knows what never was there.
            rest = _convert.deletion_from(await self.call(_transport.DELETE_RUNS, request))
            unfinished = tuple(dict.fromkeys((*found.unfinished_run_ids, *rest.unfinished_run_ids)))
            found = replace(_add(found, rest), missing_run_ids=found.missing_run_ids, unfinished_run_ids=unfinished)
        return found

    async def decide(self, request: approval_service_pb2.DecideApprovalRequest) -> Approval:
        """Decides an approval."""
        return _convert.approval_from((await self.call(_transport.DECIDE_APPROVAL, request)).approval)

    async def get_approval(self, approval: Approval | str) -> Approval:
        """Returns an approval."""
        request = _requests.message(
            approval_service_pb2.GetApprovalRequest,
            namespace=self.config.namespace,
            approval_id=_requests.approval_id_of(approval),
        )
        return _convert.approval_from((await self.call(_transport.GET_APPROVAL, request)).approval)

    async def get_agent(self, agent: str, *, agent_version: str) -> AgentInfo:
        """Returns an agent."""
        request = _requests.message(catalog.GetAgentRequest, agent=agent, agent_version=agent_version)
        return _convert.agent_from((await self.call(_transport.GET_AGENT, request)).agent)

    def list_runs(
        self,
        request: agent_run_service_pb2.ListRunsRequest,
        *,
        limit: int | None,
        on_unreachable: OnUnreachable | None = None,
    ) -> Pages[Run]:
        """Lists runs, newest first."""
        tell = told_once(on_unreachable)

        async def fetch(token: str) -> tuple[Sequence[Run], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_RUNS, request)
            tell(page.unreachable)
            return [_convert.run_from(run) for run in page.runs], page.next_page_token

        request.page_size = _PAGE_SIZE if limit is None else min(_PAGE_SIZE, max(1, limit))
        return Pages(fetch, limit=limit)

    def list_events(self, run: Run | str, *, kinds: Iterable[EventKind]) -> Pages[RunEvent]:
        """Lists the log of a run as it is now."""
        request = _requests.message(
            agent_run_service_pb2.ListRunEventsRequest,
            namespace=self.config.namespace,
            run_id=_requests.run_id_of(run),
            page_size=_PAGE_SIZE,
            kinds=_requests.event_kinds(kinds),
        )

        async def fetch(token: str) -> tuple[Sequence[RunEvent], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_RUN_EVENTS, request)
            return [_convert.event_from(event) for event in page.events], page.next_page_token

        return Pages(fetch)

    def list_steps(self, run: Run | str) -> Pages[Step]:
        """Lists the steps of a run in the order in which they began."""
        request = _requests.message(
            agent_run_service_pb2.ListStepsRequest,
            namespace=self.config.namespace,
            run_id=_requests.run_id_of(run),
            page_size=_PAGE_SIZE,
        )

        async def fetch(token: str) -> tuple[Sequence[Step], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_STEPS, request)
            return [_convert.step_from(step) for step in page.steps], page.next_page_token

        return Pages(fetch)

    async def trace(self, run: Run | str, *, children: bool) -> RunTrace:
        """Returns the trace of a run."""
        request = _requests.message(
            agent_run_service_pb2.GetRunTraceRequest,
            namespace=self.config.namespace,
            run_id=_requests.run_id_of(run),
            exclude_children=not children,
        )
        return _convert.trace_from(await self.call(_transport.GET_RUN_TRACE, request))

    def list_approvals(
        self, request: approval_service_pb2.ListApprovalsRequest, *, on_unreachable: OnUnreachable | None = None
    ) -> Pages[Approval]:
        """Lists approvals, oldest first."""
        tell = told_once(on_unreachable)

        async def fetch(token: str) -> tuple[Sequence[Approval], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_APPROVALS, request)
            tell(page.unreachable)
            return [_convert.approval_from(approval) for approval in page.approvals], page.next_page_token

        request.page_size = _PAGE_SIZE
        return Pages(fetch)

    def list_agents(self) -> Pages[AgentInfo]:
        """Lists agents by name and version."""
        request = catalog.ListAgentsRequest(page_size=_PAGE_SIZE)

        async def fetch(token: str) -> tuple[Sequence[AgentInfo], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_AGENTS, request)
            return [_convert.agent_from(agent) for agent in page.agents], page.next_page_token

        return Pages(fetch)

    def list_executors(self, *, include_gone: bool) -> Pages[ExecutorInfo]:
        """Lists executors, the living first."""
        request = _requests.message(
            operator_service_pb2.ListExecutorsRequest, page_size=_PAGE_SIZE, include_gone=include_gone
        )

        async def fetch(token: str) -> tuple[Sequence[ExecutorInfo], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_EXECUTORS, request)
            return [_convert.executor_from(executor) for executor in page.executors], page.next_page_token

        return Pages(fetch)

    def list_queues(self) -> Pages[QueueInfo]:
        """Lists queues by name."""
        request = operator_service_pb2.ListQueuesRequest(page_size=_PAGE_SIZE)

        async def fetch(token: str) -> tuple[Sequence[QueueInfo], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_QUEUES, request)
            return [_convert.queue_from(queue) for queue in page.queues], page.next_page_token

        return Pages(fetch)

    def list_cells(self) -> Pages[CellInfo]:
        """Lists the cells in the order of the regions file."""
        request = operator_service_pb2.ListCellsRequest(page_size=_PAGE_SIZE)

        async def fetch(token: str) -> tuple[Sequence[CellInfo], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_CELLS, request)
            return [_convert.cell_from(cell) for cell in page.cells], page.next_page_token

        return Pages(fetch)

    async def evacuate_cell(self, cell: str) -> CellInfo:
        """Gives the runs of a cell to its secondary region."""
        request = _requests.message(operator_service_pb2.EvacuateCellRequest, cell=cell)
        return _convert.cell_from((await self.call(_transport.EVACUATE_CELL, request)).cell)

    async def return_cell(self, cell: str) -> CellInfo:
        """Gives the runs of a cell back to its home region."""
        request = _requests.message(operator_service_pb2.ReturnCellRequest, cell=cell)
        return _convert.cell_from((await self.call(_transport.RETURN_CELL, request)).cell)

    def list_stranded(self) -> Pages[StrandedRun]:
        """Lists runs that no living executor can continue, the oldest first."""
        request = operator_service_pb2.ListStrandedRunsRequest(page_size=_PAGE_SIZE)

        async def fetch(token: str) -> tuple[Sequence[StrandedRun], str]:
            request.page_token = token
            page = await self.call(_transport.LIST_STRANDED_RUNS, request)
            return [_convert.stranded_from(run) for run in page.runs], page.next_page_token

        return Pages(fetch)

    def watch(
        self,
        run: Run | str,
        *,
        after_sequence: int,
        cursor: str,
        from_now: bool,
        kinds: Iterable[EventKind],
        include_children: bool,
        heartbeat_s: float | None,
        on_reconnect: OnReconnect | None,
    ) -> RunWatcher:
        """Returns the watch of a run; nothing is sent before its first read."""
        request = _requests.watch_run(
            self.config.namespace,
            run,
            after_sequence=after_sequence,
            cursor=cursor,
            from_now=from_now,
            kinds=kinds,
            include_children=include_children,
            heartbeat_s=heartbeat_s,
        )
        return RunWatcher(self.transport, self.config, request, heartbeat_s=heartbeat_s, on_reconnect=on_reconnect)

    def watch_approvals(self, *, heartbeat_s: float | None, on_reconnect: OnReconnect | None) -> ApprovalWatcher:
        """Returns the live inbox; nothing is sent before its first read."""
        return ApprovalWatcher(
            self.transport,
            self.config,
            _requests.watch_approvals(self.config.namespace, heartbeat_s=heartbeat_s),
            get_approval=self.get_approval,
            heartbeat_s=heartbeat_s,
            on_reconnect=on_reconnect,
        )


def _view(full: bool) -> agent_run_pb2.AgentRunView.ValueType:
    return agent_run_pb2.AGENT_RUN_VIEW_FULL if full else agent_run_pb2.AGENT_RUN_VIEW_BASIC


def _wait_timeout(run_id: str, timeout_s: float, seen: Run | None) -> WaitTimeout:
    state = f"; it is {seen.state}" if seen else ""
    return WaitTimeout(f"run {run_id} did not end within {timeout_s:g} s{state}. It goes on.", seen)


def _add(total: Deletion, more: Deletion) -> Deletion:
    return Deletion(
        deleted_count=total.deleted_count + more.deleted_count,
        sample_run_ids=(*total.sample_run_ids, *more.sample_run_ids)[:_SAMPLE],
        more=more.more,
        unfinished_run_ids=(*total.unfinished_run_ids, *more.unfinished_run_ids),
        missing_run_ids=(*total.missing_run_ids, *more.missing_run_ids),
    )
