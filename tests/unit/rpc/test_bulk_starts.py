"""StartAgents answers every item in order, as StartAgent would, reads no faster than it is read, and ends in peace."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from google.rpc import error_details_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.errors import AgentNotFound, Overloaded

from tests.unit.rpc.doubles import a_run, serving

TRACE_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def item(n: int, **changes: Any) -> pb.StartAgentsRequest:
    start: dict[str, Any] = {"agent": "research", "request_id": f"r-{n}", "input_json": "{}"} | changes
    return pb.StartAgentsRequest(start=pb.StartAgentRequest(**start))


def reasons(answer: pb.StartAgentsResponse) -> list[str]:
    """Returns the reason of an answer's error, and RETRY if it says when to repeat."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    found = []
    for detail in answer.error.details:
        if detail.Unpack(info):
            found.append(info.reason)
        if detail.Unpack(retry):
            found.append("RETRY")
    return found


async def answers_to(served: Any, items: Sequence[Any], **call: Any) -> list[pb.StartAgentsResponse]:
    return [answer async for answer in served.runs.StartAgents(iter(items), **call)]


async def test_every_item_is_answered_in_order_although_the_first_takes_longest(service):
    second = asyncio.Event()

    async def start(command: Any) -> Any:
        if command.request_id == "r-1":
            await second.wait()
        second.set()
        return a_run(), command.request_id != "r-3"

    service.script["start"] = start
    async with serving(service, caller="dev") as served:
        answers = await answers_to(served, [item(1), item(2), item(3)])
    assert [answer.request_id for answer in answers] == ["r-1", "r-2", "r-3"]
    assert [answer.started.created for answer in answers] == [True, True, False]
    assert {args[0].caller for _, args, _ in service.calls} == {"dev"}


async def test_a_bad_item_is_answered_with_its_error_and_the_others_are_started(service, rpc_log):
    def start(command: Any) -> Any:
        if command.agent == "nobody":
            raise AgentNotFound("there is no agent 'nobody'")
        if command.agent == "busy":
            raise Overloaded("wait")
        if command.agent == "broken":
            raise ValueError("secret")
        return a_run(), True

    service.script["start"] = start
    items = [
        item(1),
        item(2, agent="nobody"),
        item(3, agent=""),
        item(4, agent="busy"),
        item(5, namespace="elsewhere"),
        item(6, agent="broken"),
        item(7, input_json="["),
        pb.StartAgentsRequest(),
        item(9),
    ]
    async with serving(service) as served:
        answers = await answers_to(served, items)
    assert [answer.request_id for answer in answers] == ["r-1", "r-2", "r-3", "r-4", "r-5", "r-6", "r-7", "", "r-9"]
    assert [reasons(answer) for answer in answers] == [
        [],
        ["AGENT_NOT_FOUND"],
        ["INVALID_FIELD"],
        ["OVERLOADED", "RETRY"],
        ["NAMESPACE_NOT_FOUND"],
        ["INTERNAL"],
        ["INVALID_FIELD"],
        ["INVALID_FIELD"],
        [],
    ]
    assert "secret" not in str(answers)
    assert len(rpc_log) == 7
