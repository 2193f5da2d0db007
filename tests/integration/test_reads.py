"""What can be read of runs, steps, events, agents and the server itself."""

from __future__ import annotations

import json
import time
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from perdure.v1 import agent_catalog_service_pb2 as catalog_pb
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_pb2 as approval_state_pb
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure.v1 import run_event_pb2 as event_pb
from perdure_client import Client

from tests.helpers.rpc import Rpc, approval_state, duration, new_id, refused, state_of
from tests.helpers.server import ServerProcess, effects
from tests.helpers.waiting import eventually, free_port, scaled

SERVICES = ("perdure.v1.AgentRunService", "perdure.v1.ApprovalService", "perdure.v1.AgentCatalogService")


# ---- GetRun ----------------------------------------------------------------------------------------------------------


def test_input_and_output_are_in_the_full_view_only(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 2, "text": "ü"}, run_id=new_id())
    rpc.end_of(run_id)
    for view in (run_pb.AGENT_RUN_VIEW_UNSPECIFIED, run_pb.AGENT_RUN_VIEW_BASIC):
        run = rpc.runs.GetRun(pb.GetRunRequest(run_id=run_id, view=view)).run
        assert (run.input_json, run.output_json) == ("", "")
    run = rpc.runs.GetRun(pb.GetRunRequest(run_id=run_id, view=run_pb.AGENT_RUN_VIEW_FULL)).run
    assert json.loads(run.input_json) == {"steps": 2, "text": "ü"}
    assert json.loads(run.output_json) == {"total": 1}


def test_a_finished_run_says_when_how_often_and_by_whom(rpc: Rpc) -> None:
    run = rpc.end_of(rpc.start("counter", {"steps": 1}))
    assert run.execution == 1
    assert run.executor_id
    assert len(run.input_sha256) == 64
    assert len(run.trace_id) == 32
    assert run.create_time.ToDatetime() <= run.start_time.ToDatetime() <= run.end_time.ToDatetime()
    assert not run.HasField("failure")
    assert not run.HasField("deadline_time")
    assert (run.progress.message, run.pending_approvals, run.parent_run_id) == ("counting", 0, "")


def test_an_integer_above_two_to_the_53rd_keeps_its_digits_as_json_text(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {})
    rpc.runs.SignalRun(
        pb.SignalRunRequest(run_id=run_id, name="more", request_id=new_id(), payload_json=str(2**63 + 1))
    )
    assert rpc.output_of(run_id) == [2**63 + 1]


def test_a_run_that_was_just_started_can_be_read_at_once(rpc: Rpc) -> None:
    for _ in range(20):
        response = rpc.start_call("counter", {"steps": 0}, run_id=new_id())
        assert rpc.get(response.run.run_id).create_time == response.run.create_time


# ---- ListRuns --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed(rpc: Rpc) -> list[str]:
    """Seven runs of one context, oldest first, one of them failed and one cancelled."""
    runs = [
        rpc.start("counter", {"steps": 0}, context_id="listed", labels={"number": str(number), "odd": str(number % 2)})
        for number in range(5)
    ]
    runs.append(rpc.start("failing", {}, context_id="listed"))
    runs.append(rpc.start("sleeper", {"seconds": 600}, context_id="listed"))
    for run_id in runs[:6]:
        rpc.end_of(run_id)
    rpc.cancel(runs[6])
    return runs


def list_all(rpc: Rpc, page_size: int = 0, **fields: Any) -> list[list[str]]:
    found: list[list[str]] = []
    token = ""
    while True:
        response = rpc.runs.ListRuns(pb.ListRunsRequest(page_size=page_size, page_token=token, **fields))
        found.append([run.run_id for run in response.runs])
        token = response.next_page_token
        if not token:
            return found


def test_runs_are_listed_newest_first_without_input(rpc: Rpc, listed: list[str]) -> None:
    response = rpc.runs.ListRuns(pb.ListRunsRequest(context_id="listed"))
    assert [run.run_id for run in response.runs] == listed[::-1]
    assert all(run.input_json == "" and run.output_json == "" for run in response.runs)
    basic = rpc.runs.GetRun(pb.GetRunRequest(run_id=listed[5])).run
    assert response.runs[1] == basic


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_pages_are_whole_and_only_the_last_has_no_token(rpc: Rpc, listed: list[str], size: int) -> None:
    found = list_all(rpc, size, context_id="listed")
    assert [run_id for page in found for run_id in page] == listed[::-1]
    assert all(len(page) == size for page in found[:-1])
    assert found[-1]


def test_runs_are_listed_by_state(rpc: Rpc, listed: list[str]) -> None:
    failed, cancelled = run_pb.AGENT_RUN_STATE_FAILED, run_pb.AGENT_RUN_STATE_CANCELLED
    assert list_all(rpc, context_id="listed", states=[failed]) == [[listed[5]]]
    assert list_all(rpc, context_id="listed", states=[cancelled]) == [[listed[6]]]
    assert list_all(rpc, context_id="listed", states=[failed, cancelled]) == [[listed[6], listed[5]]]
    succeeded = list_all(rpc, 2, context_id="listed", states=[run_pb.AGENT_RUN_STATE_SUCCEEDED])
    assert [run_id for page in succeeded for run_id in page] == listed[4::-1]
    assert list_all(rpc, context_id="listed", states=[run_pb.AGENT_RUN_STATE_RUNNING]) == [[]]


def test_runs_are_listed_by_agent_and_labels(rpc: Rpc, listed: list[str]) -> None:
    assert list_all(rpc, context_id="listed", agent="failing") == [[listed[5]]]
    assert list_all(rpc, context_id="listed", labels={"odd": "1"}) == [[listed[3], listed[1]]]
    assert list_all(rpc, context_id="listed", labels={"odd": "1", "number": "3"}) == [[listed[3]]]
    assert list_all(rpc, context_id="listed", labels={"odd": "7"}) == [[]]
    assert list_all(rpc, agent="nobody") == [[]]
    assert list_all(rpc, context_id="'; --%_") == [[]]


def test_live_runs_are_listed_by_what_they_do(rpc: Rpc) -> None:
    context = new_id("live")
    runs = {
        "AWAITING_INPUT": [rpc.start("asker", {}, context_id=context), rpc.start("listener", {}, context_id=context)],
        "SLEEPING": [rpc.start("sleeper", {"seconds": 600}, context_id=context)],
        "SCHEDULED": [rpc.start("counter", {}, context_id=context, delay=duration(600))],
        "RUNNING": [rpc.start("counter", {"steps": 1, "delay_s": 600}, context_id=context)],
    }
    for state, run_ids in runs.items():
        for run_id in run_ids:
            rpc.until(run_id, state)
        number = run_pb.AgentRunState.Value(f"AGENT_RUN_STATE_{state}")
        assert list_all(rpc, context_id=context, states=[number]) == [run_ids[::-1]]
    for run_id in [run_id for run_ids in runs.values() for run_id in run_ids]:
        rpc.cancel(run_id)


def test_runs_that_come_while_pages_are_read_change_nothing_of_the_rest(rpc: Rpc) -> None:
    context = new_id("pages")
    old = [rpc.start("counter", {"steps": 0}, context_id=context) for _ in range(4)]
    first = rpc.runs.ListRuns(pb.ListRunsRequest(context_id=context, page_size=2))
    for _ in range(3):
        rpc.start("counter", {"steps": 0}, context_id=context)
    second = rpc.runs.ListRuns(pb.ListRunsRequest(context_id=context, page_size=2, page_token=first.next_page_token))
    assert [run.run_id for run in (*first.runs, *second.runs)] == old[::-1]
    assert second.next_page_token == ""


def test_a_page_size_above_the_limit_means_the_limit(rpc: Rpc, listed: list[str]) -> None:
    assert list_all(rpc, 2**31 - 1, context_id="listed") == [listed[::-1]]


# ---- ListRunEvents, ListSteps ----------------------------------------------------------------------------------------


def test_events_are_listed_by_kind_in_whole_pages(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 5})
    events = rpc.events(run_id)
    kinds = [event_pb.RUN_EVENT_KIND_STEP_SUCCEEDED, event_pb.RUN_EVENT_KIND_PROGRESS]
    wanted = [event for event in events if event.WhichOneof("kind") in ("step_succeeded", "progress")]
    found: list[event_pb.RunEvent] = []
    token = ""
    while True:
        page = rpc.runs.ListRunEvents(
            pb.ListRunEventsRequest(run_id=run_id, kinds=kinds, page_size=3, page_token=token)
        )
        found += page.events
        token = page.next_page_token
        if not token:
            break
        assert len(page.events) == 3
    assert found == wanted


def test_a_live_log_is_listed_as_it_is_now(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {})
    rpc.until(run_id, "AWAITING_INPUT")
    page = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id))
    assert len(page.events) == rpc.get(run_id).last_sequence
    assert page.next_page_token == ""
    rpc.cancel(run_id)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_steps_come_in_whole_pages(rpc: Rpc, size: int) -> None:
    run_id = rpc.start("counter", {"steps": 5})
    rpc.end_of(run_id)
    found: list[int] = []
    token = ""
    while True:
        page = rpc.runs.ListSteps(pb.ListStepsRequest(run_id=run_id, page_size=size, page_token=token))
        found += [step.step_id for step in page.steps]
        token = page.next_page_token
        if not token:
            break
        assert len(page.steps) == size
    assert found == [1, 2, 3, 4, 5]


def test_a_run_without_steps_has_none(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 0})
    rpc.end_of(run_id)
    assert rpc.runs.ListSteps(pb.ListStepsRequest(run_id=run_id)) == pb.ListStepsResponse()


def test_a_run_of_many_steps_is_read_whole(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("counter", {"steps": 300})
    rpc.end_of(run_id)
    with Client(_address(rpc)) as client:
        assert [step.step_id for step in client.steps(run_id)] == list(range(1, 301))
        events = list(client.events(run_id))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert len(effects(database_url, run_id)) == 300


def _address(rpc: Rpc) -> str:
    return str(rpc.channel._channel.target().decode()).removeprefix("ipv4:").removeprefix("dns:///")  # type: ignore[attr-defined]


# ---- WaitRun ---------------------------------------------------------------------------------------------------------


def test_a_wait_answers_as_soon_as_the_run_ends(rpc: Rpc) -> None:
    run_id = rpc.start("sleeper", {"seconds": 0.3})
    began = time.monotonic()
    response = rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run_id), timeout=scaled(20))
    assert not response.timed_out
    assert state_of(response.run) == "SUCCEEDED"
    assert response.run.output_json == ""
    assert time.monotonic() - began < scaled(1.5)


def test_a_wait_answers_before_the_callers_deadline(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {})
    began = time.monotonic()
    response = rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run_id), timeout=1.0)
    assert response.timed_out
    assert state_of(response.run) == "AWAITING_INPUT"
    assert 0.7 < time.monotonic() - began < 1.0
    rpc.cancel(run_id)


def test_a_wait_for_what_has_ended_answers_at_once(rpc: Rpc) -> None:
    run_id = rpc.start("failing", {})
    rpc.end_of(run_id)
    response = rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run_id, view=run_pb.AGENT_RUN_VIEW_FULL), timeout=1.0)
    assert (state_of(response.run), response.timed_out) == ("FAILED", False)
    assert response.run.failure.type == "FlakyError"


def test_a_cancelled_run_ends_its_waits(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {})
    future = rpc.runs.WaitRun.future(pb.WaitRunRequest(run_id=run_id), timeout=scaled(20))
    rpc.until(run_id, "AWAITING_INPUT")
    rpc.cancel(run_id)
    began = time.monotonic()
    assert state_of(future.result().run) == "CANCELLED"
    assert time.monotonic() - began < scaled(1.5)


def test_waiting_for_what_does_not_exist_is_not_found(rpc: Rpc) -> None:
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        rpc.runs.WaitRun(pb.WaitRunRequest(run_id=new_id()))


# ---- approvals -------------------------------------------------------------------------------------------------------


def test_approvals_are_listed_oldest_first_by_run_and_state(rpc: Rpc) -> None:
    runs = [rpc.start("asker", {}) for _ in range(3)]
    asked = [rpc.approval_of(run_id) for run_id in runs]
    listed = rpc.approvals.ListApprovals(approval_pb.ListApprovalsRequest()).approvals
    ours = [one.approval_id for one in listed if one.run_id in runs]
    assert ours == [one.approval_id for one in sorted(asked, key=lambda one: one.create_time.ToNanoseconds())]
    rpc.decide(asked[0].approval_id)
    rpc.decide(asked[1].approval_id, approve=False)
    pending = rpc.approvals.ListApprovals(approval_pb.ListApprovalsRequest()).approvals
    assert [one.run_id for one in pending if one.run_id in runs] == [runs[2]]
    for run_id, state in zip(runs, ("APPROVED", "REJECTED", "PENDING"), strict=True):
        number = approval_state_pb.ApprovalState.Value(f"APPROVAL_STATE_{state}")
        (one,) = rpc.approvals.ListApprovals(approval_pb.ListApprovalsRequest(run_id=run_id, states=[number])).approvals
        assert approval_state(one) == state
    rpc.cancel(runs[2])
    assert not rpc.approvals.ListApprovals(approval_pb.ListApprovalsRequest(run_id=runs[2])).approvals


def test_approvals_come_in_whole_pages(rpc: Rpc) -> None:
    runs = [rpc.start("asker", {}) for _ in range(4)]
    for run_id in runs:
        rpc.approval_of(run_id)
    found: list[str] = []
    token = ""
    while True:
        page = rpc.approvals.ListApprovals(approval_pb.ListApprovalsRequest(page_size=3, page_token=token))
        found += [one.run_id for one in page.approvals]
        token = page.next_page_token
        if not token:
            break
        assert len(page.approvals) == 3
    assert sorted(run_id for run_id in found if run_id in runs) == sorted(runs)
    assert len(found) == len(set(found))
    for run_id in runs:
        rpc.cancel(run_id)


# ---- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_agent_is_in_the_catalogue_with_its_schemas(rpc: Rpc) -> None:
    agents = {agent.agent: agent for agent in rpc.agents.ListAgents(catalog_pb.ListAgentsRequest()).agents}
    assert {"counter", "sync-counter", "flaky", "asker", "listener", "sleeper", "parent", "talker", "plain"} <= set(
        agents
    )
    assert {"research", "notes"} & set(agents)
    counter = agents["counter"]
    assert (counter.agent_version, counter.current) == ("1", True)
    assert counter.description == "Counts, a step a number."
    schema = json.loads(counter.input_schema_json)
    assert schema["type"] == "object"
    assert {"steps", "delay_s", "text"} <= set(schema["properties"])
    assert json.loads(counter.output_schema_json)["type"] == "object"
    plain = json.loads(agents["plain"].input_schema_json)
    assert plain["required"] == ["name"]


def test_agents_are_listed_by_name_in_whole_pages(rpc: Rpc) -> None:
    everything = [agent.agent for agent in rpc.agents.ListAgents(catalog_pb.ListAgentsRequest()).agents]
    assert everything == sorted(everything)
    found: list[str] = []
    token = ""
    while True:
        page = rpc.agents.ListAgents(catalog_pb.ListAgentsRequest(page_size=2, page_token=token))
        found += [agent.agent for agent in page.agents]
        token = page.next_page_token
        if not token:
            break
    assert found == everything


def test_an_agent_is_found_by_name_and_by_version(rpc: Rpc) -> None:
    by_name = rpc.agents.GetAgent(catalog_pb.GetAgentRequest(agent="counter")).agent
    assert by_name.agent == "counter"
    assert rpc.agents.GetAgent(catalog_pb.GetAgentRequest(agent="counter", agent_version="1")).agent == by_name
    with refused("NOT_FOUND", "AGENT_NOT_FOUND"):
        rpc.agents.GetAgent(catalog_pb.GetAgentRequest(agent="counter", agent_version="2"))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "agent"):
        rpc.agents.GetAgent(catalog_pb.GetAgentRequest())


def test_an_agent_of_an_earlier_deployment_can_be_read_but_not_started(own_server: ServerProcess) -> None:
    own_server.start()
    own_server.stop()
    own_server.agents = ("perdure_service.agents.notes",)
    own_server.command = "serve"  # `dev` is alone, and forgets agents that it does not have
    own_server.start()
    with Rpc(own_server.address) as rpc:
        assert rpc.agents.GetAgent(catalog_pb.GetAgentRequest(agent="counter")).agent.agent == "counter"
        with refused("FAILED_PRECONDITION", "VERSION_UNAVAILABLE"):
            rpc.start("counter", {})


# ---- health and reflection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_says_that_every_service_serves(rpc: Rpc, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(rpc.channel)
    response = stub.Check(health_pb2.HealthCheckRequest(service=service))
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service_is_not_found(rpc: Rpc) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        health_pb2_grpc.HealthStub(rpc.channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_can_be_served_on_a_port_of_its_own_and_is_watched_to_the_end(own_server: ServerProcess) -> None:
    address = f"127.0.0.1:{free_port()}"
    own_server.start(PERDURE_HEALTH_ADDRESS=address)
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=scaled(20))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/perdure.v1.AgentRunService/GetRun")(b"")
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert own_server.stop() == 0
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


def test_reflection_describes_every_service_in_dev(rpc: Rpc) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(rpc.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES),
    ]
    listing, *files = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in listing.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names
    for name, answer in zip(SERVICES, files, strict=True):
        described = [
            f"{file.package}.{service.name}"
            for data in answer.file_descriptor_response.file_descriptor_proto
            for file in [FileDescriptorProto.FromString(data)]
            for service in file.service
        ]
        assert name in described


def test_reflection_is_off_unless_asked_for(own_server: ServerProcess) -> None:
    own_server.command = "serve"
    own_server.start()
    with Rpc(own_server.address) as rpc:
        stub = reflection_pb2_grpc.ServerReflectionStub(rpc.channel)
        with pytest.raises(grpc.RpcError) as raised:
            list(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        run_id = rpc.start("listener", {})
        rpc.signal(run_id)
        assert rpc.output_of(run_id) == [1]
        (received,) = [e for e in rpc.events(run_id) if e.WhichOneof("kind") == "signal_received"]
        assert received.signal_received.sender == "anonymous"


def test_a_server_with_a_limit_of_streams_refuses_more(own_server: ServerProcess) -> None:
    own_server.start(PERDURE_MAX_WATCHES="2")
    with Rpc(own_server.address) as rpc:
        run_id = rpc.start("listener", {})
        open_ones = [rpc.watch(run_id), rpc.watch(run_id)]
        for one in open_ones:
            next(one)
        with refused("RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS") as error:
            rpc.stream(run_id)
        assert error.retry_delay_s
        open_ones[0].cancel()

        def again() -> bool:
            call = rpc.watch(run_id)
            try:
                return next(call) is not None
            except grpc.RpcError:
                return False
            finally:
                call.cancel()

        eventually(again)
        open_ones[1].cancel()
