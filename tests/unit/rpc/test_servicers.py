"""Each method asks the run service what the request says, and answers with what it says."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Value
from perdure.v1 import agent_catalog_service_pb2 as catalog_pb
from perdure.v1 import agent_run_pb2, approval_pb2, run_event_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approvals_pb
from perdure_service.domain.agents import AgentSpec
from perdure_service.domain.approvals import ApprovalState, Decision
from perdure_service.domain.events import EventKind, Step, StepState
from perdure_service.domain.runs import RunState
from perdure_service.durable.service import DeleteCommand, Deleted, ForkCommand, Page, RunFilter
from perdure_service.errors import StoreUnavailable
from perdure_service.rpc import agent_runs
from perdure_service.rpc.calls import current_call

from tests.unit.rpc.doubles import a_run, an_approval, an_event, failing, fails_with, serving

TRACE_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_start(service):
    service.script["start"] = lambda command: (a_run(input_json="{}", state=RunState.QUEUED), True)
    async with serving(service, caller="dev") as served:
        request = pb.StartAgentRequest(agent="research", run_id="foo", input_json='{"q":"why?"}')
        response = await served.runs.StartAgent(request, metadata=(("traceparent", TRACE_PARENT),))
        await served.runs.StartAgent(request, metadata=(("traceparent", "00-bad"),))
        await served.runs.StartAgent(request)
    assert response.created
    assert response.run.state == agent_run_pb2.AGENT_RUN_STATE_QUEUED
    assert response.run.input_json == ""
    commands = [args[0] for _, args, _ in service.calls]
    assert [command.trace_parent for command in commands] == [TRACE_PARENT, "", ""]
    assert {command.caller for command in commands} == {"dev"}
    assert commands[0].run_input == {"q": "why?"}


async def test_start_of_a_large_input_is_checked_beside_other_calls(service, monkeypatch):
    service.script["start"] = lambda command: (a_run(), False)
    seen: list[str] = []
    to_thread = asyncio.to_thread

    async def noted(function: Any, *args: Any) -> Any:
        seen.append(function.__name__)
        return await to_thread(function, *args)

    monkeypatch.setattr(agent_runs.asyncio, "to_thread", noted)
    async with serving(service, caller="dev") as served:
        request = pb.StartAgentRequest(agent="research", input_json=json.dumps({"q": "x" * 100_000}))
        assert not (await served.runs.StartAgent(request)).created
        bad = pb.StartAgentRequest(agent="research", input_json=json.dumps({"q": "x" * 100_000 + "\0"}))
        assert list((await failing(served.runs.StartAgent(bad))).violations) == ["input.q"]
        too_large = pb.StartAgentRequest(agent="research", input_json=json.dumps({"q": "x" * 2**20}))
        assert (await failing(served.runs.StartAgent(too_large))).info.reason == "PAYLOAD_TOO_LARGE"
    assert len(seen) == 3
    assert service.calls[0][1][0].caller == "dev"


async def test_get(service):
    service.script["get"] = lambda namespace, run_id, full: a_run(input_json="{}", output_json="1")
    async with serving(service) as served:
        full = await served.runs.GetRun(
            pb.GetRunRequest(namespace="lab", run_id="foo.5", view=agent_run_pb2.AGENT_RUN_VIEW_FULL)
        )
        basic = await served.runs.GetRun(pb.GetRunRequest(run_id="foo"))
    assert (full.run.input_json, full.run.output_json) == ("{}", "1")
    assert basic.run.output_json == ""
    assert service.calls == [
        ("get", ("lab", "foo.5"), {"full": True}),
        ("get", ("default", "foo"), {"full": False}),
    ]


async def test_list(service):
    service.script["list"] = lambda *args, **kwargs: Page([a_run(), a_run()], "next")
    async with serving(service) as served:
        response = await served.runs.ListRuns(pb.ListRunsRequest(page_size=2, page_token="t", agent="research"))
    assert len(response.runs) == 2
    assert response.next_page_token == "next"
    wanted = RunFilter(agent="research", labels={})
    assert service.calls == [("list", ("default", wanted), {"page_size": 2, "page_token": "t"})]


async def test_fork(service):
    forked = a_run(forked_from_run_id="foo", forked_from_step_id=3)
    service.script["fork"] = lambda command: (forked, True)
    async with serving(service) as served:
        response = await served.runs.ForkRun(pb.ForkRunRequest(run_id="foo", request_id="r"))
    assert (response.created, response.from_step_id, response.run.forked_from_run_id) == (True, 3, "foo")
    assert service.calls == [("fork", (ForkCommand("default", "foo", "r", "anonymous", labels={}),), {})]


async def test_delete(service):
    service.script["delete"] = lambda command: Deleted(2, ["a", "a.1"], True, ["b"], ["c"])
    async with serving(service) as served:
        response = await served.runs.DeleteRuns(pb.DeleteRunsRequest(run_ids=["a", "b", "c"]))
    assert response == pb.DeleteRunsResponse(
        deleted_count=2, sample_run_ids=["a", "a.1"], more=True, unfinished_run_ids=["b"], missing_run_ids=["c"]
    )
    assert service.calls == [("delete", (DeleteCommand("default", "anonymous", ("a", "b", "c")),), {})]


async def test_list_events_and_steps(service):
    service.script["list_events"] = lambda *args, **kwargs: Page([an_event(4, message="hm")], "n")
    service.script["list_steps"] = lambda *args, **kwargs: Page([Step(1, "s", StepState.RUNNING, 1, 1, 5)], "")
    async with serving(service) as served:
        events = await served.runs.ListRunEvents(
            pb.ListRunEventsRequest(run_id="foo", kinds=[run_event_pb2.RUN_EVENT_KIND_LOG])
        )
        steps = await served.runs.ListSteps(pb.ListStepsRequest(run_id="foo", page_size=7))
    assert [(event.sequence, event.run_id, event.log.message) for event in events.events] == [(4, "foo", "hm")]
    assert events.next_page_token == "n"
    assert [step.step_name for step in steps.steps] == ["s"]
    assert service.calls == [
        ("list_events", ("default", "foo", frozenset({EventKind.LOG})), {"page_size": 50, "page_token": ""}),
        ("list_steps", ("default", "foo"), {"page_size": 7, "page_token": ""}),
    ]


@pytest.mark.parametrize(
    ("deadline_s", "least_s", "most_s"), [(None, 60, 60), (10, 8, 9.1), (66, 58.5, 59.6), (1_000, 60, 60)]
)
async def test_wait_leaves_a_tenth_of_the_deadline_and_takes_a_minute_at_most(service, deadline_s, least_s, most_s):
    service.script["wait"] = lambda *args, **kwargs: (a_run(output_json="1"), True)
    async with serving(service) as served:
        response = await served.runs.WaitRun(
            pb.WaitRunRequest(run_id="foo", view=agent_run_pb2.AGENT_RUN_VIEW_FULL), timeout=deadline_s
        )
    assert response.timed_out
    assert response.run.output_json == "1"
    [(name, args, kwargs)] = service.calls
    assert (name, args, kwargs["full"]) == ("wait", ("default", "foo"), True)
    assert least_s <= kwargs["timeout_s"] <= most_s


@pytest.mark.parametrize(
    ("wait_s", "deadline_s", "most_s"), [(5, None, 5), (600, None, 60), (30, 10, 9), (2, 10, 2), (0, 10, None)]
)
async def test_a_start_waits_no_longer_than_a_wait_does(service, wait_s, deadline_s, most_s):
    service.script["start"] = lambda *_: (a_run(), True)
    service.script["outcome"] = lambda run, timeout_s: a_run(state=RunState.SUCCEEDED, output_json="1")
    async with serving(service) as served:
        request = pb.StartAgentRequest(agent="research", input_json='{"a":1}', wait=Duration(seconds=wait_s))
        answer = await served.runs.StartAgent(request, timeout=deadline_s)
    assert (answer.created, answer.run.output_json, answer.run.input_json) == (True, "1" if most_s else "", "")
    waits = [kwargs["timeout_s"] for name, _, kwargs in service.calls if name == "outcome"]
    assert [most_s - 1 < one <= most_s for one in waits] == ([True] if most_s else [])


async def test_a_start_whose_wait_fails_is_answered_all_the_same(service):
    service.script["start"] = lambda *_: (a_run(), True)
    service.script["outcome"] = fails_with(StoreUnavailable("the database is away"))
    async with serving(service) as served:
        answer = await served.runs.StartAgent(pb.StartAgentRequest(agent="research", wait=Duration(seconds=9)))
        await served.server.drain()
        service.script["outcome"] = fails_with(AssertionError("nothing is waited for any more"))
        again = await served.runs.StartAgent(pb.StartAgentRequest(agent="research", wait=Duration(seconds=9)))
    assert answer == again
    assert (answer.created, answer.run.run_id) == (True, "foo")


async def test_signal_and_cancel_say_who_did_it(service):
    service.script["signal"] = lambda *args, **kwargs: True
    service.script["cancel"] = lambda *args, **kwargs: a_run(state=RunState.CANCELLED)
    async with serving(service, caller="dev") as served:
        request = pb.SignalRunRequest(run_id="foo", name="go", request_id="r", payload=Value(number_value=2))
        assert (await served.runs.SignalRun(request)).created
        response = await served.runs.CancelRun(pb.CancelRunRequest(run_id="foo", reason="enough"))
    assert response.run.state == agent_run_pb2.AGENT_RUN_STATE_CANCELLED
    assert service.calls == [
        ("signal", ("default", "foo"), {"name": "go", "payload": 2, "request_id": "r", "sender": "dev"}),
        ("cancel", ("default", "foo"), {"reason": "enough", "caller": "dev"}),
    ]


async def test_approvals(service):
    service.script["list_approvals"] = lambda *args, **kwargs: Page([an_approval()], "n")
    service.script["get_approval"] = lambda *args: an_approval()
    service.script["decide_approval"] = lambda *args: an_approval(state=ApprovalState.REJECTED, revision=2)
    async with serving(service, caller="dev") as served:
        page = await served.approvals.ListApprovals(
            approvals_pb.ListApprovalsRequest(states=[approval_pb2.APPROVAL_STATE_PENDING], run_id="foo", page_size=3)
        )
        one = await served.approvals.GetApproval(approvals_pb.GetApprovalRequest(approval_id="foo/3"))
        decided = await served.approvals.DecideApproval(
            approvals_pb.DecideApprovalRequest(
                approval_id="foo/3", decision=approvals_pb.DECISION_REJECT, comment="no", expected_revision=1
            )
        )
    assert [approval.approval_id for approval in page.approvals] == ["foo/3"]
    assert page.next_page_token == "n"
    assert one.approval.title == "Publish?"
    assert decided.approval.state == approval_pb2.APPROVAL_STATE_REJECTED
    assert service.calls == [
        ("list_approvals", ("default", {ApprovalState.PENDING}, "foo"), {"page_size": 3, "page_token": ""}),
        ("get_approval", ("default", "foo/3"), {}),
        ("decide_approval", ("default", "foo/3", Decision(False, "dev", "no", "", 1)), {}),
    ]


async def test_the_catalogue(service):
    spec = AgentSpec("research", "1", "Reads.", {"type": "object"})
    service.script["list_agents"] = lambda **kwargs: Page([spec], "")
    service.script["get_agent"] = lambda *args: spec
    async with serving(service) as served:
        page = await served.catalog.ListAgents(catalog_pb.ListAgentsRequest(page_size=5_000, page_token="t"))
        one = await served.catalog.GetAgent(catalog_pb.GetAgentRequest(agent="research", agent_version="1"))
        bad = await failing(served.catalog.GetAgent(catalog_pb.GetAgentRequest(agent_version="\0")))
        negative = await failing(served.catalog.ListAgents(catalog_pb.ListAgentsRequest(page_size=-1)))
    assert [agent.agent for agent in page.agents] == ["research"]
    assert one.agent.input_schema_json == '{"type": "object"}'
    assert list(bad.violations) == ["agent", "agent_version"]
    assert list(negative.violations) == ["page_size"]
    assert service.calls == [
        ("list_agents", (), {"page_size": 1_000, "page_token": "t"}),
        ("get_agent", ("research", "1"), {}),
    ]


async def test_a_deadline_that_has_passed_is_refused_by_the_servers_clock(service):
    request = pb.StartAgentRequest(agent="research")
    request.deadline_time.GetCurrentTime()
    request.deadline_time.FromDatetime(request.deadline_time.ToDatetime() - timedelta(seconds=1))
    async with serving(service) as served:
        assert list((await failing(served.runs.StartAgent(request))).violations) == ["deadline_time"]


async def test_what_is_served_knows_its_call_and_no_other(service):
    seen: list[str] = []

    async def note(*args: Any, **kwargs: Any) -> Any:
        seen.append(current_call().call_id)
        return a_run()

    service.script["get"] = note
    async with serving(service) as served:
        calls = [
            served.runs.GetRun(pb.GetRunRequest(run_id="foo"), metadata=(("x-request-id", f"call-{n}"),))
            for n in range(20)
        ]
        await asyncio.gather(*calls)
    assert sorted(seen) == sorted(f"call-{n}" for n in range(20))
    with pytest.raises(LookupError):
        current_call()
