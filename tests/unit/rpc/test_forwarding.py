"""Which cell answers a call, and what its caller sees of it: nothing, but for a region that cannot be reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure.v1 import operator_service_pb2 as operator_pb
from perdure.v1.operator_service_pb2_grpc import OperatorServiceStub
from perdure_service.domain.regions import Place, parse_regions
from perdure_service.domain.runs import RunKey, RunState, new_run_id
from perdure_service.durable.requests import Deleted, Page
from perdure_service.errors import (
    AgentNotFound,
    ApprovalNotFound,
    ConfigurationError,
    InvalidArgument,
    QuotaExceeded,
    RunConflict,
    RunNotFound,
    StoreUnavailable,
)
from perdure_service.rpc import gathering, peers
from perdure_service.rpc.gathering import merged
from perdure_service.rpc.peers import FORWARDED_KEY, Forward, Peers
from perdure_service.rpc.routes import ROUTES
from perdure_service.store.cells import CellRow, CellStatus

from tests.helpers.regions import regions_yaml
from tests.helpers.security import IdentityProvider, SigningKey, certified
from tests.helpers.waiting import eventually_async, free_port, scaled
from tests.unit.rpc.doubles import (
    NOON,
    ScriptedService,
    Served,
    a_batch,
    a_run,
    an_approval,
    channel_to,
    failing,
    fails_with,
    serving,
    settings_of,
    streams,
)

HOMES: dict[str, dict[str, object]] = {
    "default": {"home": "nn1"},
    "moved": {"home": "ss1", "former_homes": ["nn1"]},
    "lost": {"home": "ww1"},
    "half": {"home": "nn1", "former_homes": ["ww1"]},
    "paused": {"home": "nn1", "paused": True},
}
DATABASES = {"nn1": "nn1", "ss1": "ss1", "ww1": "ww1"}
TOKEN_KEY = SigningKey.make("one")


@dataclass
class Two:
    """Servers of two cells, north and south, of three: nobody serves the one in the west."""

    north: ScriptedService
    south: ScriptedService
    at_north: Served
    at_south: Served


@asynccontextmanager
async def two(
    *,
    host: str = "127.0.0.1",
    south: dict[str, Any] | None = None,
    standby: bool = False,
    mistaken: bool = False,
    **settings: Any,
) -> AsyncIterator[Two]:
    """Serves both cells.

    Args:
        host: Where they reach each other.
        south: Settings of that server only.
        standby: The server in the south serves the cell in the west, as its standby.
        mistaken: The address of the cell in the west is that of the server in the north.
        settings: Of both.
    """
    ports = {"nn1": free_port(), "ss1": free_port()}
    west = f"127.0.0.1:{ports['nn1'] if mistaken else free_port()}"
    addresses = {"nn1": f"{host}:{ports['nn1']}", "ss1": f"{host}:{ports['ss1']}", "ww1": west}
    standbys = {"ww1": addresses["ss1"]} if standby else {}
    regions = parse_regions(
        regions_yaml(DATABASES, addresses=addresses, standbys=standbys, homes=HOMES), "regions.yaml"
    )
    shared: dict[str, Any] = {"namespaces": tuple(HOMES), "regions_file": "regions.yaml", **settings}
    north, there = ScriptedService(), ScriptedService()
    async with (
        serving(
            north,
            place=Place(regions, regions.cells["nn1"], "north"),
            **shared | {"address": f"127.0.0.1:{ports['nn1']}"},
        ) as at_north,
        serving(
            there,
            place=Place(regions, regions.cells["ww1" if standby else "ss1"], "south"),
            **shared | {"address": f"127.0.0.1:{ports['ss1']}"} | (south or {}),
        ) as at_south,
    ):
        yield Two(north, there, at_north, at_south)


def a_run_of(namespace: str, run_id: str, **changes: Any) -> Any:
    return a_run(key=RunKey.of_api(namespace, run_id), **changes)


def names(service: ScriptedService) -> list[str]:
    """Returns what a service was asked for."""
    return [name for name, _, _ in service.calls]


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_every_method_has_a_route_or_is_answered_by_whoever_is_asked() -> None:
    methods = {
        method.full_name
        for file, service in ((pb, "AgentRunService"), (approval_pb, "ApprovalService"))
        for method in file.DESCRIPTOR.services_by_name[service].methods
    }
    assert methods == set(ROUTES)


async def test_a_run_is_read_in_its_cell_whoever_is_asked_and_says_where_it_lives() -> None:
    run_id = new_run_id("ss1")
    async with two() as cells:
        cells.south.script["get"] = lambda *_, **__: a_run_of("default", run_id)
        for served in (cells.at_north, cells.at_south):
            run = (await served.runs.GetRun(pb.GetRunRequest(run_id=run_id))).run
            assert (run.run_id, run.home_region) == (run_id, "south")
        assert names(cells.south) == ["get", "get"]
        assert names(cells.north) == []


async def test_a_child_lives_where_its_parent_does() -> None:
    run_id = new_run_id("ss1") + ".3"
    async with two() as cells:
        cells.south.script["get"] = lambda *_, **__: a_run_of("default", run_id)
        assert (await cells.at_north.runs.GetRun(pb.GetRunRequest(run_id=run_id))).run.home_region == "south"


async def test_the_callers_deadline_trace_and_request_id_go_along() -> None:
    seen: dict[str, Any] = {}

    def start(command: Any) -> Any:
        seen["command"] = command
        return a_run_of("default", command.run_id), True

    async with two() as cells:
        cells.north.script["start"] = start
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        request = pb.StartAgentRequest(agent="research", run_id="mine", request_id="r-7")
        answer = await cells.at_south.runs.StartAgent(request, metadata=(("traceparent", parent),))
        assert (answer.run.home_region, answer.created) == ("north", True)
        assert (seen["command"].trace_parent, seen["command"].request_id) == (parent, "r-7")

        async def wait(*_: Any, timeout_s: float, **__: Any) -> Any:
            seen["timeout_s"] = timeout_s
            return a_run_of("default", "mine"), True

        cells.north.script["wait"] = wait
        answered = await cells.at_south.runs.WaitRun(pb.WaitRunRequest(run_id="mine"), timeout=30)
        assert answered.timed_out
        assert 20 < seen["timeout_s"] < 28, "nine tenths of what is left, which gRPC rounds"


ERRORS = [
    AgentNotFound("there is no agent 'x'"),
    RunConflict("run 'mine' exists", existing="1"),
    InvalidArgument("input.n", "is no number", ("input.m", "is missing")),
    QuotaExceeded("wait 0.25 s", 0.25, limit_per_second="4"),
    StoreUnavailable("the database is away"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_the_home_is_the_same_to_the_caller(error: Any) -> None:
    request = pb.StartAgentRequest(agent="research", run_id="mine")
    async with two() as cells:
        cells.north.script["start"] = fails_with(error)
        at_home = await failing(cells.at_north.runs.StartAgent(request))
        elsewhere = await failing(cells.at_south.runs.StartAgent(request))
        assert elsewhere.status == at_home.status
        assert elsewhere.text == at_home.text


async def test_a_failure_of_the_home_tells_no_more_than_its_own_callers_learn() -> None:
    async with two() as cells:
        cells.north.script["start"] = fails_with(ValueError("secret"))
        failure = await failing(cells.at_south.runs.StartAgent(pb.StartAgentRequest(agent="research", run_id="mine")))
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "secret" not in failure.raw


async def test_a_stream_of_the_home_passes_through_and_ends_there_when_its_caller_leaves() -> None:
    async with two() as cells:
        cells.north.script["watch"] = streams(a_batch(1, 2, snapshot=a_run()), a_batch(3), then_stay=True)
        call = cells.at_south.runs.WatchRun(pb.WatchRunRequest(run_id="foo"))
        first, second = await call.read(), await call.read()
        assert first.snapshot.home_region == "north"
        assert [event.sequence for one in (first, second) for event in one.events] == [1, 2, 3]
        call.cancel()
        await eventually_async(lambda: cells.north.closed == ["watch"])


async def test_a_stream_that_the_home_refuses_is_refused_with_its_reason() -> None:
    async with two() as cells:
        cells.north.script["watch"] = fails_with(RunNotFound("there is no run"))
        failure = await failing(cells.at_south.runs.WatchRun(pb.WatchRunRequest(run_id="foo")))
        assert failure.info.reason == "RUN_NOT_FOUND"


async def test_a_stream_whose_region_is_lost_ends_with_its_name_and_the_advice_to_come_again() -> None:
    async with two() as cells:
        cells.north.script["watch"] = streams(a_batch(1), then_stay=True)
        call = cells.at_south.runs.WatchRun(pb.WatchRunRequest(run_id="foo"))
        await call.read()
        stopping = asyncio.create_task(cells.at_north.server.stop(0))
        failure = await failing(call)
        await stopping
        # Draining comes first when the home has the time to say so.
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.info.reason in ("DRAINING", "REGION_UNAVAILABLE")
        assert failure.retry_delay_s


async def test_a_region_that_is_down_is_named_soon() -> None:
    async with two() as cells:
        began = time.monotonic()
        failure = await failing(cells.at_north.runs.GetRun(pb.GetRunRequest(namespace="lost", run_id="foo")))
        assert time.monotonic() - began < scaled(5)
        assert (failure.info.reason, failure.info.metadata["region"]) == ("REGION_UNAVAILABLE", "west")
        assert failure.retry_delay_s == 2


async def test_the_standby_of_a_lost_region_is_asked_next() -> None:
    async with two(standby=True) as cells:
        cells.south.script["get"] = lambda *_, **__: a_run_of("lost", "foo")
        run = (await cells.at_north.runs.GetRun(pb.GetRunRequest(namespace="lost", run_id="foo"))).run
        assert run.home_region == "west"


async def test_the_standby_is_asked_where_the_home_is_served_by_somebody_else() -> None:
    async with two(standby=True, mistaken=True) as cells:
        cells.south.script["get"] = lambda *_, **__: a_run_of("lost", "foo")
        run = (await cells.at_north.runs.GetRun(pb.GetRunRequest(namespace="lost", run_id="foo"))).run
        assert run.home_region == "west"
    async with two(mistaken=True) as cells:
        failure = await failing(cells.at_south.runs.GetRun(pb.GetRunRequest(namespace="lost", run_id="foo")))
        assert (failure.info.reason, failure.info.metadata["region"]) == ("REGION_UNAVAILABLE", "west")


async def test_a_stream_that_broke_is_not_begun_anew_at_the_standby() -> None:
    """Its caller has a part of it, and continues by its cursor."""

    async def breaks(_: Any, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        yield pb.WatchRunResponse(cursor="one")
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no details: as gRPC says it of a lost connection")

    async def goes_on(*_: Any) -> AsyncIterator[pb.WatchRunResponse]:
        yield pb.WatchRunResponse(cursor="two")

    servers, ports = [], []
    for serve in (breaks, goes_on):
        server = grpc.aio.server()
        handler = grpc.unary_stream_rpc_method_handler(
            serve, pb.WatchRunRequest.FromString, pb.WatchRunResponse.SerializeToString
        )
        generic = grpc.method_handlers_generic_handler("perdure.v1.AgentRunService", {"WatchRun": handler})
        server.add_generic_rpc_handlers((generic,))
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        servers.append(server)
    home, standby = (f"127.0.0.1:{port}" for port in ports)
    regions = parse_regions(
        regions_yaml(DATABASES, addresses={"ss1": home}, standbys={"ss1": standby}, homes=HOMES), "regions.yaml"
    )
    calling = Peers(settings_of(), Place(regions, regions.cells["nn1"], "north"))
    path = "/perdure.v1.AgentRunService/WatchRun"
    request = pb.WatchRunRequest(run_id="foo")
    answers = calling.stream(regions.cells["ss1"], path, request, pb.WatchRunResponse, Forward((), 10))
    try:
        assert (await anext(answers)).cursor == "one"
        with pytest.raises(peers.RegionUnavailable):
            await anext(answers)
    finally:
        await calling.close()
        for server in servers:
            await server.stop(0)


async def test_a_server_that_drains_ends_the_waits_it_has_sent_on() -> None:
    async with two() as cells:
        begun = 0

        async def wait(*_: Any, **__: Any) -> Any:
            nonlocal begun
            begun += 1
            await asyncio.Event().wait()

        cells.north.script |= {"wait": wait, "start": lambda *_: (a_run(), True), "outcome": wait}
        calls = [
            cells.at_south.runs.WaitRun(pb.WaitRunRequest(run_id="mine")),
            # The repeat, at another server, finds the run by its ids.
            cells.at_south.runs.StartAgent(pb.StartAgentRequest(agent="research", wait=Duration(seconds=50))),
        ]
        waiting = [asyncio.ensure_future(failing(call)) for call in calls]
        await eventually_async(lambda: begun == 2)
        await cells.at_south.server.drain()
        assert [(await one).info.reason for one in waiting] == ["DRAINING", "DRAINING"]


# ---- no second hop ---------------------------------------------------------------------------------------------------


def sent_to(cell: str) -> tuple[tuple[str, str], ...]:
    return ((FORWARDED_KEY, cell),)


async def test_a_call_that_was_sent_on_is_answered_here_or_refused_and_never_sent_again() -> None:
    async with two() as cells:
        cells.south.script["get"] = fails_with(RunNotFound("there is no run"))
        request = pb.GetRunRequest(run_id="foo")
        failure = await failing(cells.at_south.runs.GetRun(request, metadata=sent_to("ss1")))
        assert failure.info.reason == "RUN_NOT_FOUND", "although its home is in the north"
        failure = await failing(cells.at_south.runs.GetRun(request, metadata=sent_to("nn1")))
        assert (failure.info.reason, failure.info.metadata["cell"]) == ("CELL_NOT_SERVED", "nn1")
        assert names(cells.north) == []


async def test_a_start_that_was_sent_to_another_cell_than_the_home_is_refused() -> None:
    """As by a server whose regions file is older, or by a caller who marks the call himself."""
    async with two() as cells:
        request = pb.StartAgentRequest(agent="research", run_id="mine")
        failure = await failing(cells.at_south.runs.StartAgent(request, metadata=sent_to("ss1")))
        assert failure.info.reason == "CELL_NOT_SERVED"
        request = pb.StartAgentRequest(agent="research", home_region="north")
        failure = await failing(cells.at_south.runs.StartAgent(request, metadata=sent_to("ss1")))
        assert failure.info.reason == "CELL_NOT_SERVED"
        cells.north.script["get"] = fails_with(RunNotFound("there is no run"))
        request = pb.StartAgentRequest(namespace="moved", agent="research", run_id="mine")
        failure = await failing(cells.at_north.runs.StartAgent(request, metadata=sent_to("nn1")))
        assert failure.info.reason == "CELL_NOT_SERVED", "a former home takes no new ids"
        assert "start" not in [*names(cells.north), *names(cells.south)]


# ---- where runs start ------------------------------------------------------------------------------------------------


async def started_in(cells: Two, **fields: Any) -> tuple[str, Any]:
    """Starts a run in the north; returns where it was, and by which command."""
    commands: dict[str, Any] = {}

    def starts(name: str) -> Any:
        def start(command: Any) -> Any:
            commands[name] = command
            return a_run_of(command.namespace, command.run_id or "made"), True

        return start

    for name, service in (("north", cells.north), ("south", cells.south)):
        service.script["start"] = starts(name)
    answer = await cells.at_north.runs.StartAgent(pb.StartAgentRequest(agent="research", **fields))
    ((name, command),) = commands.items()
    assert answer.run.home_region == name
    return name, command


async def test_a_start_goes_to_its_home_region_and_has_a_request_id_before_it_does() -> None:
    async with two() as cells:
        name, command = await started_in(cells, home_region="south")
        assert name == "south"
        assert command.request_id, "a repeat on the way must not start a second run"


async def test_a_start_without_a_home_region_goes_to_the_home_of_its_namespace() -> None:
    async with two() as cells:
        assert (await started_in(cells))[0] == "north"
    async with two() as cells:
        cells.north.script["get"] = fails_with(RunNotFound("there is no run"))
        assert (await started_in(cells, namespace="moved", run_id="mine"))[0] == "south"


async def test_an_id_that_a_former_home_has_is_answered_there() -> None:
    async with two() as cells:
        cells.north.script["get"] = lambda *_, **__: a_run_of("moved", "mine")
        assert (await started_in(cells, namespace="moved", run_id="mine"))[0] == "north"


async def test_nothing_is_started_while_a_former_home_cannot_be_asked() -> None:
    async with two() as cells:
        request = pb.StartAgentRequest(namespace="half", agent="research", run_id="mine")
        failure = await failing(cells.at_north.runs.StartAgent(request))
        assert (failure.info.reason, failure.info.metadata["region"]) == ("REGION_UNAVAILABLE", "west")
        assert names(cells.north) == []


@pytest.mark.parametrize("at", ["north", "south"])
async def test_nothing_is_started_in_a_namespace_that_is_paused_by_whoever_is_asked(at: str) -> None:
    async with two() as cells:
        served = cells.at_north if at == "north" else cells.at_south
        request = pb.StartAgentRequest(namespace="paused", agent="research", run_id="mine")
        for metadata in ((), sent_to("nn1" if at == "north" else "ss1")):
            failure = await failing(served.runs.StartAgent(request, metadata=metadata))
            assert failure.info.reason == "NAMESPACE_PAUSED"
        cells.north.script["get"] = lambda *_, **__: a_run_of("paused", "foo")
        assert (await served.runs.GetRun(pb.GetRunRequest(namespace="paused", run_id="foo"))).run.run_id == "foo"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"home_region": "south", "run_id": "mine"}, "excludes run_id"),
        ({"home_region": "east"}, "is not a region where runs can live; they can in north, south, west"),
    ],
)
async def test_a_home_region_is_refused_with_an_id_and_when_it_is_none(fields: Any, complaint: str) -> None:
    async with two() as cells:
        failure = await failing(cells.at_south.runs.StartAgent(pb.StartAgentRequest(agent="research", **fields)))
        assert complaint in failure.violations["home_region"]


async def test_the_starts_of_a_stream_go_their_ways_one_by_one_each_in_its_own_trace() -> None:
    commands: list[Any] = []

    def start(command: Any) -> Any:
        commands.append(command)
        if command.run_id == "late" and len(commands) < 4:
            raise QuotaExceeded("wait", 0.01, limit_per_second="1")
        return a_run_of("default", command.run_id or "made"), True

    def item(**fields: Any) -> pb.StartAgentsRequest:
        return pb.StartAgentsRequest(start=pb.StartAgentRequest(agent="research", **fields), trace_parent=parent)

    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with two() as cells:
        cells.north.script["start"] = cells.south.script["start"] = start
        items = [
            item(run_id="mine", request_id="r-1"),
            item(home_region="south", request_id="r-2"),
            item(home_region="west", request_id="r-3"),
            item(run_id="late", request_id="r-4"),
        ]
        stream = cells.at_south.runs.StartAgents(iter(items), metadata=(("traceparent", "00-" + "1" * 32 + "-x"),))
        answers = [answer async for answer in stream]
        assert [answer.request_id for answer in answers] == ["r-1", "r-2", "r-3", "r-4"]
        assert [answer.started.run.home_region for answer in answers] == ["north", "south", "", "north"]
        assert "the region west" in answers[2].error.message
        assert {command.trace_parent for command in commands} == {parent}
        assert {command.request_id for _, (command,), _ in cells.north.calls} == {"r-1", "r-4"}


async def test_the_waits_of_a_stream_go_their_ways_one_by_one() -> None:
    here, there = new_run_id("nn1"), new_run_id("ss1")

    def wait(namespace: str, run_id: str, **_: Any) -> Any:
        return a_run_of(namespace, run_id), False

    async with two() as cells:
        cells.north.script["wait"] = cells.south.script["wait"] = wait
        stream = cells.at_south.runs.WaitRuns(iter([pb.WaitRunsRequest(run_ids=[here, there])]))
        found = {one.run_id: one.run.home_region async for answer in stream for one in answer.runs}
        assert found == {here: "north", there: "south"}
        assert [name for name, _, _ in cells.north.calls] == ["wait"]


async def test_a_service_without_regions_has_no_home_region(service: ScriptedService) -> None:
    async with serving(service) as served:
        request = pb.StartAgentRequest(agent="research", home_region="south")
        failure = await failing(served.runs.StartAgent(request))
        assert failure.violations["home_region"] == "this service has no regions"


async def test_a_fork_lives_where_its_run_does() -> None:
    run_id = new_run_id("ss1")
    async with two() as cells:
        cells.south.script["fork"] = lambda command: (a_run_of("default", new_run_id("ss1")), True)
        request = pb.ForkRunRequest(run_id=run_id, request_id="r")
        assert (await cells.at_north.runs.ForkRun(request)).run.home_region == "south"
        request = pb.ForkRunRequest(run_id=run_id, request_id="r", new_run_id="mine")
        failure = await failing(cells.at_north.runs.ForkRun(request))
        assert "only for a fork of a run in north" in failure.violations["new_run_id"]
        assert names(cells.south) == ["fork"]


async def test_the_id_of_a_fork_must_not_be_taken_in_a_former_home() -> None:
    async with two() as cells:
        cells.north.script["get"] = lambda *_, **__: a_run_of("moved", "mine")
        request = pb.ForkRunRequest(namespace="moved", run_id="foo", request_id="r", new_run_id="mine")
        failure = await failing(cells.at_south.runs.ForkRun(request))
        assert "is taken, in a former home" in failure.violations["new_run_id"]
        cells.north.script["get"] = fails_with(RunNotFound("there is no run"))
        cells.south.script["fork"] = fails_with(RunNotFound("there is no run"))
        failure = await failing(cells.at_south.runs.ForkRun(request))
        assert "only for a fork of a run in south" in failure.violations["new_run_id"]


# ---- runs that may be in several cells -------------------------------------------------------------------------------


async def test_an_old_run_is_found_in_a_former_home() -> None:
    async with two() as cells:
        cells.south.script |= {"get": fails_with(RunNotFound("no")), "watch": fails_with(RunNotFound("no"))}
        cells.north.script |= {"get": lambda *_, **__: a_run_of("moved", "old"), "watch": streams(a_batch(1))}
        for served in (cells.at_north, cells.at_south):
            answer = await served.runs.GetRun(pb.GetRunRequest(namespace="moved", run_id="old"))
            assert answer.run.home_region == "north"
            call = served.runs.WatchRun(pb.WatchRunRequest(namespace="moved", run_id="old"))
            assert [event.sequence async for one in call for event in one.events] == [1]


async def test_a_run_is_missing_only_when_every_home_says_so() -> None:
    async with two() as cells:
        missing = fails_with(RunNotFound("there is no run"))
        cells.south.script["get"] = cells.north.script["get"] = missing
        failure = await failing(cells.at_south.runs.GetRun(pb.GetRunRequest(namespace="moved", run_id="foo")))
        assert failure.info.reason == "RUN_NOT_FOUND"
        failure = await failing(cells.at_south.runs.GetRun(pb.GetRunRequest(namespace="half", run_id="foo")))
        assert failure.info.reason == "REGION_UNAVAILABLE", "perhaps it is there"


async def test_an_approval_is_decided_where_its_run_lives() -> None:
    run_id = new_run_id("ss1")
    async with two() as cells:
        cells.south.script["get_approval"] = lambda *_: an_approval()
        cells.south.script["decide_approval"] = lambda *_: an_approval(revision=2)
        one = approval_pb.GetApprovalRequest(approval_id=f"{run_id}.2/3")
        assert (await cells.at_north.approvals.GetApproval(one)).approval.revision == 1
        decision = approval_pb.DecideApprovalRequest(approval_id=f"{run_id}/3", decision=approval_pb.DECISION_APPROVE)
        assert (await cells.at_north.approvals.DecideApproval(decision)).approval.revision == 2
        cells.north.script["get_approval"] = fails_with(ApprovalNotFound("no"))
        failure = await failing(cells.at_south.approvals.GetApproval(approval_pb.GetApprovalRequest(approval_id="x")))
        assert failure.info.reason == "APPROVAL_NOT_FOUND"


# ---- lists -----------------------------------------------------------------------------------------------------------


def listed(*minutes: int, cell: str, more: bool = False) -> Page[Any]:
    """Returns a page of runs that were created so many minutes ago."""
    runs = [
        a_run_of("default", f"{cell}-{minute}", create_time=NOON - timedelta(minutes=minute), state=RunState.QUEUED)
        for minute in minutes
    ]
    return Page(runs, "more" if more else "")


async def test_a_list_is_of_all_cells_newest_first_and_says_which_region_is_missing() -> None:
    async with two() as cells:
        cells.north.script["list"] = lambda *_, **__: listed(1, 4, cell="north")
        cells.south.script["list"] = lambda *_, **__: listed(2, 3, cell="south")
        for served in (cells.at_north, cells.at_south):
            answer = await served.runs.ListRuns(pb.ListRunsRequest())
            assert [run.run_id for run in answer.runs] == ["north-1", "south-2", "south-3", "north-4"]
            assert [run.home_region for run in answer.runs] == ["north", "south", "south", "north"]
            assert (list(answer.unreachable), answer.next_page_token) == (["west"], "")


async def test_a_page_ends_where_a_cell_has_more_between() -> None:
    async with two() as cells:
        cells.north.script["list"] = lambda *_, **__: listed(1, 2, cell="north", more=True)
        cells.south.script["list"] = lambda *_, **__: listed(1, 3, cell="south")
        answer = await cells.at_north.runs.ListRuns(pb.ListRunsRequest(page_size=10))
        assert [run.run_id for run in answer.runs] == ["south-1", "north-1", "north-2"]
        assert answer.next_page_token
        tokens: list[str] = []

        def next_page(*_: Any, page_token: str, **__: Any) -> Page[Any]:
            tokens.append(page_token)
            return Page([], "")

        cells.north.script["list"] = cells.south.script["list"] = next_page
        await cells.at_north.runs.ListRuns(pb.ListRunsRequest(page_size=10, page_token=answer.next_page_token))
        assert tokens == [answer.next_page_token] * 2


async def test_the_children_of_a_run_are_listed_where_they_live() -> None:
    async with two() as cells:
        cells.south.script["list"] = lambda *_, **__: listed(2, cell="south")
        answer = await cells.at_north.runs.ListRuns(pb.ListRunsRequest(parent_run_id=new_run_id("ss1")))
        assert len(answer.runs) == 1
        assert not answer.unreachable
        assert names(cells.north) == []


async def test_a_list_that_no_cell_answers_fails_and_so_does_one_that_is_refused() -> None:
    async with two() as cells:
        failure = await failing(cells.at_north.runs.ListRuns(pb.ListRunsRequest(parent_run_id=new_run_id("ww1"))))
        assert failure.info.reason == "REGION_UNAVAILABLE"
        cells.north.script["list"] = lambda *_, **__: listed(1, cell="north")
        cells.south.script["list"] = fails_with(InvalidArgument("page_token", "is not a token of this service"))
        failure = await failing(cells.at_north.runs.ListRuns(pb.ListRunsRequest(page_token="x")))
        assert "page_token" in failure.violations
        cells.south.script["list"] = fails_with(StoreUnavailable("away"))
        assert list((await cells.at_north.runs.ListRuns(pb.ListRunsRequest())).unreachable) == ["south", "west"]


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_of_merged_lists_have_every_item_once_and_in_order(newest_first: bool) -> None:
    class Item(int):
        def ByteSize(self) -> int:
            return 1

    lists = [[Item(n) for n in range(100) if n % 7 == rest] for rest in (0, 3)] + [[Item(n) for n in range(40, 52)]]
    lists = [sorted(set(one), reverse=newest_first) for one in lists]
    expected = sorted((item for one in lists for item in one), reverse=newest_first)
    position: int | None = None
    found: list[Item] = []
    for _ in range(100):
        rest = [
            [item for item in one if position is None or (item < position if newest_first else item > position)]
            for one in lists
        ]
        pages = [(one[:3], len(one) > 3) for one in rest]
        taken, more = merged(pages, lambda item: (item,), 3, newest_first=newest_first)
        found += taken
        if not more:
            break
        position = taken[-1]
    # 42 and 45 are in two lists: one place in the order, which is one run.
    assert sorted(set(found), reverse=newest_first) == sorted(set(expected), reverse=newest_first)
    assert found == sorted(found, reverse=newest_first)


async def test_approvals_are_listed_oldest_first_over_all_cells() -> None:
    def asked(run_id: str, minute: int) -> Any:
        key = RunKey.of_api("default", run_id)
        return an_approval(key=key, approval_id=f"{run_id}/3", create_time=NOON + timedelta(minutes=minute))

    async with two() as cells:
        cells.north.script["list_approvals"] = lambda *_, **__: Page([asked("one", 1), asked("four", 4)], "")
        cells.south.script["list_approvals"] = lambda *_, **__: Page([asked("two", 2)], "more")
        answer = await cells.at_south.approvals.ListApprovals(approval_pb.ListApprovalsRequest())
        assert [one.run_id for one in answer.approvals] == ["one", "two"]
        assert answer.next_page_token
        assert list(answer.unreachable) == ["west"]


async def test_the_inbox_is_of_all_cells_and_a_region_that_is_lost_is_named_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gathering, "REOPEN_S", 0.05)
    async with two() as cells:
        lose = asyncio.Event()

        async def inbox(*_: Any, **__: Any) -> Any:
            yield [an_approval(approval_id="south/1")], True
            await lose.wait()
            lose.clear()
            raise StoreUnavailable("away")

        cells.south.script["watch_approvals"] = inbox
        cells.north.script["watch_approvals"] = streams(([an_approval(approval_id="north/1")], True), then_stay=True)
        call = cells.at_north.approvals.WatchApprovals(approval_pb.WatchApprovalsRequest())
        seen: list[str] = []
        while True:
            answer = await call.read()
            seen += [one.approval_id for one in answer.approvals]
            if answer.caught_up:
                break
        assert sorted(seen) == ["north/1", "south/1"]
        assert list(answer.unreachable) == ["west"]
        lose.set()
        while list((await call.read()).unreachable) != ["south", "west"]:
            pass
        while list((answer := await call.read()).unreachable) != ["west"]:
            pass
        assert [one.approval_id for one in answer.approvals] == ["south/1"], "what is pending is sent again"
        call.cancel()
        await eventually_async(lambda: cells.north.closed == ["watch_approvals"])
        await eventually_async(lambda: len(cells.south.closed) >= 2)


async def test_operators_see_which_cells_answer() -> None:
    async with two(admin_address="127.0.0.1:0") as cells, channel_to(cells.at_south.admin_port or 0) as channel:
        stub = OperatorServiceStub(channel)
        claimed_at = datetime(2026, 1, 2, tzinfo=UTC)
        row = CellRow("ss1", "south", "west", 2, claimed_at)
        cells.south.script["cell_status"] = lambda: CellStatus(row, 3, 1)
        found = (await stub.ListCells(operator_pb.ListCellsRequest())).cells
        assert [(one.serving_region, one.epoch, one.executors, one.standing_by) for one in found] == [
            ("", 0, 0, 0),
            ("west", 2, 3, 1),
            ("", 0, 0, 0),
        ]
        assert found[1].claim_time.ToDatetime(UTC) == claimed_at
        assert [(one.cell, one.served_here, one.reachable) for one in found] == [
            ("nn1", False, True),
            ("ss1", True, True),
            ("ww1", False, False),
        ]
        assert list(found[0].namespaces) == ["default", "half", "paused"]
        assert found[0].survival_goal == operator_pb.SURVIVAL_GOAL_REGION
        failure = await failing(stub.ListCells(operator_pb.ListCellsRequest(page_token="x")))
        assert "page_token" in failure.violations


async def test_without_regions_there_are_no_cells(service: ScriptedService) -> None:
    async with (
        serving(service, admin_address="127.0.0.1:0") as served,
        channel_to(served.admin_port or 0) as channel,
    ):
        assert not (await OperatorServiceStub(channel).ListCells(operator_pb.ListCellsRequest())).cells


# ---- deletions -------------------------------------------------------------------------------------------------------


async def test_runs_are_deleted_where_they_live_and_missing_only_when_no_cell_has_them() -> None:
    south, north = new_run_id("ss1"), new_run_id("nn1")
    async with two() as cells:
        cells.south.script["delete"] = lambda command: Deleted(
            1, [south], missing_run_ids=[one for one in command.run_ids if one != south]
        )
        cells.north.script["delete"] = lambda command: Deleted(
            2, [north, "old"], missing_run_ids=[one for one in command.run_ids if one not in (north, "old")]
        )
        request = pb.DeleteRunsRequest(namespace="moved", run_ids=[south, north, "old", "nowhere"])
        answer = await cells.at_north.runs.DeleteRuns(request)
        assert (answer.deleted_count, list(answer.missing_run_ids)) == (3, ["nowhere"])
        assert sorted(answer.sample_run_ids) == sorted([south, north, "old"])
        (command,) = [arguments[0] for name, arguments, _ in cells.south.calls if name == "delete"]
        assert command.run_ids == (south, "old", "nowhere")
        assert command.caller == "anonymous"


async def test_a_deletion_by_a_filter_fails_while_a_region_is_missing_and_does_what_it_can() -> None:
    async with two() as cells:
        cells.north.script["delete"] = cells.south.script["delete"] = lambda command: Deleted(0, [])
        failure = await failing(cells.at_north.runs.DeleteRuns(pb.DeleteRunsRequest(agent="research")))
        assert (failure.info.reason, failure.info.metadata["region"]) == ("REGION_UNAVAILABLE", "west")
        assert names(cells.north) == names(cells.south) == ["delete"]


# ---- who calls, over which wire --------------------------------------------------------------------------------------


async def test_the_home_knows_the_caller_by_its_own_token_and_by_nothing_else() -> None:
    with IdentityProvider([TOKEN_KEY]) as provider:
        async with two(auth=provider.settings()) as cells:
            seen: list[str] = []

            def start(command: Any) -> Any:
                seen.append(command.caller)
                return a_run_of("default", "mine"), True

            cells.north.script["start"] = start
            request = pb.StartAgentRequest(agent="research", run_id="mine")
            token = f"Bearer {TOKEN_KEY.token(sub='bea')}"
            await cells.at_south.runs.StartAgent(request, metadata=(("authorization", token),))
            assert seen == ["bea"]
            # The mark of a forwarded call gives no right.
            failure = await failing(cells.at_north.runs.StartAgent(request, metadata=sent_to("nn1")))
            assert failure.info.reason == "TOKEN_MISSING"


async def test_the_home_decides_for_itself_what_the_caller_may() -> None:
    """The south believes another provider than the north: what one lets in, the other refuses."""
    stranger = SigningKey.make("two")
    with IdentityProvider([TOKEN_KEY]) as provider, IdentityProvider([stranger]) as other:
        async with two(auth=provider.settings(), south={"auth": other.settings()}) as cells:
            token = (("authorization", f"Bearer {stranger.token()}"),)
            failure = await failing(cells.at_south.runs.GetRun(pb.GetRunRequest(run_id="mine"), metadata=token))
            assert (failure.code, failure.info.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
            assert names(cells.north) == []


async def test_servers_speak_tls_with_each_other_and_show_their_own_certificates(tmp_path: Any) -> None:
    authority = certified("authority")
    certificate, key = certified("localhost", authority).write(tmp_path)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.pem)
    tls = {"certificate_file": certificate, "key_file": key, "client_ca_file": ca, "peer_ca_file": ca}
    client = certified("client", authority)
    credentials = grpc.ssl_channel_credentials(authority.pem, client.key_pem, client.pem)
    async with two(host="localhost", tls=tls, credentials=credentials) as cells:
        cells.north.script["get"] = lambda *_, **__: a_run_of("default", "mine")
        assert (await cells.at_south.runs.GetRun(pb.GetRunRequest(run_id="mine"))).run.home_region == "north"
        # A new authority is taken without a restart, and whom it has not certified is nobody.
        certified("stranger").write(tmp_path, "stranger")
        ca.write_bytes(certified("another").pem)
        failure = await failing(cells.at_south.runs.GetRun(pb.GetRunRequest(run_id="mine")))
        assert failure.info.reason == "REGION_UNAVAILABLE"


def test_tokens_are_not_sent_to_other_machines_in_plaintext() -> None:
    def peers_of(address: str, **settings: Any) -> Peers:
        regions = parse_regions(regions_yaml(DATABASES, addresses={"ss1": address}, homes=HOMES), "regions.yaml")
        return Peers(settings_of(**settings), Place(regions, regions.cells["nn1"], "north"))

    auth = {"tokens_file": "tokens.yaml"}
    with pytest.raises(ConfigurationError, match=r"cell ss1 would be sent to south\.example:1 .* in plaintext"):
        peers_of("south.example:1", auth=auth)
    peers_of("127.0.0.1:1", auth=auth)
    peers_of("south.example:1", auth=auth, insecure=True)
    peers_of("south.example:1")


async def test_certificates_that_cannot_be_read_are_no_reason_to_fail_for_good(tmp_path: Any) -> None:
    settings = settings_of(tls={"certificate_file": tmp_path / "missing.pem", "key_file": tmp_path / "missing-key.pem"})
    with pytest.raises(peers.RegionUnavailable, match="cannot read its certificates"):
        peers.peer_credentials(settings.tls)
