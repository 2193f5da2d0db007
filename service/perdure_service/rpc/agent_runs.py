"""Serves AgentRunService: request in, one call of the run service, response out."""

# ruff: noqa: ARG002 - gRPC gives every method a context, whether it needs one or not

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1.agent_run_pb2 import AgentRun
from perdure.v1.agent_run_service_pb2_grpc import AgentRunServiceServicer

from perdure_service.domain.runs import Run
from perdure_service.durable.service import ForkCommand, RunService, StartCommand
from perdure_service.errors import InvalidArgument, PerdureError
from perdure_service.rpc import convert, convert_events, convert_trace, fields, requests
from perdure_service.rpc.audit import audit_once
from perdure_service.rpc.bulk_starts import BulkStarts, Item
from perdure_service.rpc.bulk_waits import BulkWaits
from perdure_service.rpc.calls import current_call
from perdure_service.rpc.forwarding import Router
from perdure_service.rpc.handlers import RpcContext
from perdure_service.rpc.request_streams import Requests
from perdure_service.rpc.streams import RESPONSE_BYTES, Streams, closing
from perdure_service.settings import Settings

MAX_WAIT_S = 60.0
"""The longest that a call waits for a run's end."""
WAIT_SHARE = 0.9
"""The share of the caller's deadline that such a call uses, so that its answer still arrives."""
LARGE_REQUEST_BYTES = 2**16
TRACE_BYTES = 3 * 2**20
"""About the most that a trace takes: clients take 4 MiB unless they say otherwise."""


class AgentRuns(AgentRunServiceServicer):
    """The runs of one server."""

    def __init__(self, service: RunService, settings: Settings, streams: Streams, router: Router | None = None) -> None:
        self._service = service
        self._router = router
        self._settings = settings
        self._streams = streams
        self._response_bytes = min(RESPONSE_BYTES, settings.max_message_bytes // 2)
        self._trace_bytes = min(TRACE_BYTES, settings.max_message_bytes * 3 // 4)

    async def StartAgent(self, request: pb.StartAgentRequest, context: RpcContext) -> pb.StartAgentResponse:
        """Starts an agent, and waits for its end if it is asked to."""
        command, run, created = await self._started(request, current_call().trace_parent)
        waits = bool(command.wait_s) and not command.validate_only
        if waits:
            # Now, not when the call is over: that may be long after, and on no server at all.
            told = pb.StartAgentResponse(run=AgentRun(run_id=run.key.run_id))
            await audit_once(current_call(), request, told, "OK")
            # It is started: what keeps us from waiting (this server stops, say) is told to who asks for the end.
            with suppress(PerdureError), self._streams.wait():
                run = await self._service.outcome(run, timeout_s=min(command.wait_s, _longest_wait_s(context)))
        return pb.StartAgentResponse(run=convert.agent_run(run, full=False, output=waits), created=created)

    async def StartAgents(
        self, request_iterator: AsyncIterator[Item], context: RpcContext
    ) -> AsyncIterator[pb.StartAgentsResponse]:
        """Starts many agents; answers one by one, in order."""
        start = self._start if self._router is None else partial(self._router.start, self._start, context)
        async with closing(BulkStarts(start, self._settings.namespaces).answers(request_iterator)) as answers:
            async for answer in answers:
                yield answer

    async def _start(self, request: pb.StartAgentRequest, trace_parent: str) -> pb.StartAgentResponse:
        _, run, created = await self._started(request, trace_parent)
        return pb.StartAgentResponse(run=convert.agent_run(run, full=False), created=created)

    async def _started(self, request: pb.StartAgentRequest, trace_parent: str) -> tuple[StartCommand, Run, bool]:
        # A large input takes up to half a second to check, in which other calls shall be served.
        large = request.ByteSize() > LARGE_REQUEST_BYTES
        if large:
            command = await asyncio.to_thread(self._command, request, trace_parent)
        else:
            command = self._command(request, trace_parent)
        run, created = await self._service.start(command)
        return command, run, created

    def _command(self, request: pb.StartAgentRequest, trace_parent: str) -> StartCommand:
        if request.home_region and self._router is None:
            raise InvalidArgument("home_region", "this service has no regions")
        return requests.start_command(
            request,
            caller=current_call().caller,
            trace_parent=trace_parent,
            now=datetime.now(UTC),
            max_input_bytes=self._settings.max_input_bytes,
        )

    async def ForkRun(self, request: pb.ForkRunRequest, context: RpcContext) -> pb.ForkRunResponse:
        """Starts a run from the recorded steps of another one."""
        large = request.ByteSize() > LARGE_REQUEST_BYTES
        command = await asyncio.to_thread(self._fork_command, request) if large else self._fork_command(request)
        run, created = await self._service.fork(command)
        return pb.ForkRunResponse(
            run=convert.agent_run(run, full=False), created=created, from_step_id=run.forked_from_step_id
        )

    def _fork_command(self, request: pb.ForkRunRequest) -> ForkCommand:
        call = current_call()
        return requests.fork_run(
            request,
            caller=call.caller,
            trace_parent=call.trace_parent,
            now=datetime.now(UTC),
            max_input_bytes=self._settings.max_input_bytes,
        )

    async def GetRun(self, request: pb.GetRunRequest, context: RpcContext) -> pb.GetRunResponse:
        """Returns a run."""
        which = requests.get_run(request)
        run = await self._service.get(which.namespace, which.run_id, full=which.full)
        return pb.GetRunResponse(run=convert.agent_run(run, full=which.full))

    async def ListRuns(self, request: pb.ListRunsRequest, context: RpcContext) -> pb.ListRunsResponse:
        """Returns a page of runs."""
        which = requests.list_runs(request)
        page = await self._service.list(
            which.namespace, which.run_filter, page_size=which.page_size, page_token=which.page_token
        )
        runs = [convert.agent_run(run, full=False) for run in page.items]
        return pb.ListRunsResponse(runs=runs, next_page_token=page.next_token)

    async def WatchRun(self, request: pb.WatchRunRequest, context: RpcContext) -> AsyncIterator[pb.WatchRunResponse]:
        """Streams a run; the interceptor ends it when the client goes away or the server drains."""
        which = requests.watch_run(request)
        watch = self._service.watch(
            which.namespace,
            which.run_id,
            cursor=which.cursor,
            after_sequence=which.after_sequence,
            from_now=which.from_now,
            kinds=which.kinds,
            include_children=which.include_children,
            heartbeat_s=which.heartbeat_s,
        )
        async with closing(watch) as batches:
            async for batch in batches:
                for response in convert_events.watch_responses(batch, self._response_bytes):
                    yield response

    async def WaitRun(self, request: pb.WaitRunRequest, context: RpcContext) -> pb.WaitRunResponse:
        """Waits for a run's end, for as long as the caller's deadline lets it answer."""
        which = requests.get_run(request)
        timeout_s = _longest_wait_s(context)
        with self._streams.wait():
            run, timed_out = await self._service.wait(
                which.namespace, which.run_id, full=which.full, timeout_s=timeout_s
            )
        return pb.WaitRunResponse(run=convert.agent_run(run, full=which.full), timed_out=timed_out)

    async def WaitRuns(
        self, request_iterator: AsyncIterator[pb.WaitRunsRequest], context: RpcContext
    ) -> AsyncIterator[pb.WaitRunsResponse]:
        """Waits for the ends of many runs, and answers in their order."""
        assert isinstance(request_iterator, Requests), "the interceptor reads the stream"
        wait = self._wait if self._router is None else partial(self._router.wait, self._wait, context)
        waits = BulkWaits(wait, self._settings.namespaces, self._response_bytes)
        async with closing(waits.answers(request_iterator)) as answers:
            async for answer in answers:
                yield answer

    async def _wait(self, request: pb.WaitRunRequest, context: RpcContext | None = None) -> pb.WaitRunResponse:
        which = requests.get_run(request)
        run, timed_out = await self._service.wait(which.namespace, which.run_id, full=False, timeout_s=MAX_WAIT_S)
        return pb.WaitRunResponse(run=convert.agent_run(run, full=False), timed_out=timed_out)

    async def ListRunEvents(self, request: pb.ListRunEventsRequest, context: RpcContext) -> pb.ListRunEventsResponse:
        """Returns a page of a run's log."""
        which = requests.list_log(request)
        page = await self._service.list_events(
            which.namespace, which.run_id, which.kinds, page_size=which.page_size, page_token=which.page_token
        )
        events = [convert_events.run_event(event, which.run_id) for event in page.items]
        return pb.ListRunEventsResponse(events=events, next_page_token=page.next_token)

    async def ListSteps(self, request: pb.ListStepsRequest, context: RpcContext) -> pb.ListStepsResponse:
        """Returns a page of a run's steps."""
        which = requests.list_log(request)
        page = await self._service.list_steps(
            which.namespace, which.run_id, page_size=which.page_size, page_token=which.page_token
        )
        return pb.ListStepsResponse(steps=map(convert.step, page.items), next_page_token=page.next_token)

    async def GetRunTrace(self, request: pb.GetRunTraceRequest, context: RpcContext) -> pb.GetRunTraceResponse:
        """Returns the spans of a run's trace."""
        which = requests.get_run_trace(request)
        trace = await self._service.trace(which.namespace, which.run_id, include_children=which.include_children)
        return convert_trace.run_trace(trace, self._trace_bytes)

    async def ReadArtifact(
        self, request: pb.ReadArtifactRequest, context: RpcContext
    ) -> AsyncIterator[pb.ReadArtifactResponse]:
        """Streams the bytes of an artifact, or of an input or output."""
        which = requests.read_artifact(request)
        reading = self._service.read_artifact(which.namespace, which.run_id, which.choice, which.offset)
        async with closing(reading) as parts:
            async for part in parts:
                yield convert.artifact_part(part)

    async def SignalRun(self, request: pb.SignalRunRequest, context: RpcContext) -> pb.SignalRunResponse:
        """Sends a named input to a run."""
        signal = requests.signal_run(request, max_bytes=self._settings.max_signal_bytes)
        created = await self._service.signal(
            signal.namespace,
            signal.run_id,
            name=signal.name,
            payload=signal.payload,
            request_id=signal.request_id,
            sender=current_call().caller,
        )
        return pb.SignalRunResponse(created=created)

    async def CancelRun(self, request: pb.CancelRunRequest, context: RpcContext) -> pb.CancelRunResponse:
        """Cancels a run and its children."""
        which = requests.cancel_run(request)
        run = await self._service.cancel(
            which.namespace, which.run_id, reason=which.reason, caller=current_call().caller
        )
        return pb.CancelRunResponse(run=convert.agent_run(run, full=False))

    async def DeleteRuns(self, request: pb.DeleteRunsRequest, context: RpcContext) -> pb.DeleteRunsResponse:
        """Deletes runs that have ended."""
        deleted = await self._service.delete(requests.delete_runs(request, caller=current_call().caller))
        return pb.DeleteRunsResponse(
            deleted_count=deleted.count,
            sample_run_ids=[fields.text(run_id) for run_id in deleted.sample_run_ids],
            more=deleted.more,
            unfinished_run_ids=deleted.unfinished_run_ids,
            missing_run_ids=deleted.missing_run_ids,
        )


def _longest_wait_s(context: RpcContext) -> float:
    """Returns how long a call may wait for a run's end."""
    remaining_s: float | None = context.time_remaining()
    return MAX_WAIT_S if remaining_s is None else min(MAX_WAIT_S, WAIT_SHARE * remaining_s)
