"""StartAgents answers every item in order, as StartAgent would, reads no faster than it is read, and ends in peace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.rpc import error_details_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service import telemetry
from perdure_service.errors import AgentNotFound, Overloaded, QuotaExceeded
from perdure_service.rpc import audit, bulk_starts, request_streams

from tests.helpers.waiting import eventually_async
from tests.unit.rpc.doubles import a_run, failing, serving

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


async def packed(service: Any, packs: Sequence[bool]) -> list[list[str]]:
    """Returns the request ids of the messages that answer items, of which the first is started last."""
    others = 0
    last = asyncio.Event()

    async def start(command: Any) -> Any:
        nonlocal others
        if command.request_id == "r-0":
            await last.wait()
        elif command.request_id == "r-2":
            raise AgentNotFound("there is none")
        others += 1
        return a_run(), True

    service.script["start"] = start
    items = [item(n) for n in range(len(packs))]
    for one, pack in zip(items, packs, strict=True):
        one.pack_answers = pack
    async with serving(service) as served:
        call = served.runs.StartAgents(iter(items))
        await eventually_async(lambda: others == len(packs) - 2)
        last.set()
        messages = [message async for message in call]
    assert not any(one.more for message in messages for one in message.more)
    return [[message.request_id, *(one.request_id for one in message.more)] for message in messages]


async def test_answers_that_are_there_together_are_one_message_for_who_understands_that(service, monkeypatch):
    ids = [f"r-{n}" for n in range(6)]
    assert await packed(service, [True] + [False] * 5) == [ids]
    assert await packed(service, [False] + [True] * 5) == [[one] for one in ids]
    monkeypatch.setattr(bulk_starts, "PACKED_BYTES", 1)
    assert await packed(service, [True] * 6) == [[one] for one in ids]


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


async def test_who_does_not_take_the_answers_is_not_read_from(service, monkeypatch):
    monkeypatch.setattr(request_streams, "MAX_AT_WORK", 4)
    read = 0

    async def requests() -> AsyncIterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    async def serve(request: int) -> int:
        return request

    answers = request_streams.InOrder(requests(), serve, lambda _: 1).answers()
    assert await anext(answers) == 1
    await eventually_async(lambda: read == 4)
    for number in range(2, 100):
        assert await anext(answers) == number
        assert read <= number + 3  # an answer counts until the next one is asked for
    await eventually_async(lambda: read == 99 + 3)
    await answers.aclose()  # type: ignore[attr-defined]


async def test_no_more_starts_are_at_work_than_may_be_and_large_ones_count_by_their_size(service, monkeypatch):
    monkeypatch.setattr(request_streams, "MAX_AT_WORK", 3)
    monkeypatch.setattr(request_streams, "MAX_AT_WORK_BYTES", 100_000)
    at_work = most = 0
    go_on = asyncio.Event()

    async def start(command: Any) -> Any:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await go_on.wait()
        at_work -= 1
        return a_run(), True

    service.script["start"] = start
    async with serving(service) as served:
        small = asyncio.create_task(answers_to(served, [item(n) for n in range(12)]))
        await eventually_async(lambda: at_work == 3)
        go_on.set()
        assert len(await small) == 12
        assert most == 3
        most = 0
        go_on.clear()
        text = f'{{"text": "{"x" * 60_000}"}}'
        large = asyncio.create_task(answers_to(served, [item(n, input_json=text) for n in range(6)]))
        await eventually_async(lambda: at_work == 2)
        go_on.set()
        assert len(await large) == 6
    assert most == 2


async def test_a_drain_answers_what_was_read_and_then_says_unavailable(service):
    go_on = asyncio.Event()

    async def start(command: Any) -> Any:
        await go_on.wait()
        return a_run(), True

    service.script["start"] = start
    async with serving(service) as served:
        call = served.runs.StartAgents()
        await call.write(item(1))
        await call.write(item(2))
        await eventually_async(lambda: len(service.calls) == 2)
        await served.server.drain()
        go_on.set()
        assert [(await call.read()).request_id for _ in range(2)] == ["r-1", "r-2"]
        failure = await failing(call)
        assert (failure.info.reason, failure.retry_delay_s) == ("DRAINING", 0.5)
        assert served.server.streams.count == 0
        # Without an item: to write to a call that has ended meanwhile is an error of gRPC's own.
        assert (await failing(served.runs.StartAgents())).info.reason == "DRAINING"
    assert len(service.calls) == 2


async def test_a_client_that_leaves_ends_what_is_at_work(service):
    left: list[str] = []

    async def start(command: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            left.append(command.request_id)

    service.script["start"] = start
    async with serving(service) as served:
        call = served.runs.StartAgents()
        await call.write(item(1))
        await call.write(item(2))
        await eventually_async(lambda: len(service.calls) == 2)
        call.cancel()
        await eventually_async(lambda: len(left) == 2)
        await eventually_async(lambda: served.server.streams.count == 0)


async def test_a_start_over_the_quota_waits_in_its_place(service):
    refusals = {"r-2": 2, "r-3": 1}

    def start(command: Any) -> Any:
        if refusals.get(command.request_id):
            refusals[command.request_id] -= 1
            raise QuotaExceeded("wait", 0.01)
        return a_run(), True

    service.script["start"] = start
    async with serving(service) as served:
        answers = await answers_to(served, [item(n) for n in range(1, 5)])
    assert [answer.request_id for answer in answers if answer.HasField("started")] == ["r-1", "r-2", "r-3", "r-4"]
    assert len(service.calls) == 4 + 3


async def test_each_item_is_audited_and_measured_and_has_the_trace_it_asks_for(service, monkeypatch):
    lines: list[dict[str, Any]] = []
    measured: list[str] = []

    class Log:
        def info(self, event: str, **facts: Any) -> None:
            lines.append(facts)

    monkeypatch.setattr(audit, "audit_log", Log)
    monkeypatch.setattr(
        telemetry.METERS, "record", lambda metric, value, attributes: measured.append(attributes[telemetry.RPC_STATUS])
    )
    service.script["start"] = lambda command: (a_run(), True)
    traced, malformed = item(2), item(3)
    traced.trace_parent, malformed.trace_parent = TRACE_PARENT, "00-bad"
    async with serving(service, caller="dev") as served:
        items = [item(1), traced, malformed, item(4, agent="")]
        await answers_to(served, items, metadata=(("traceparent", TRACE_PARENT),))
    assert [line["outcome"] for line in lines] == ["OK", "OK", "OK", "INVALID_ARGUMENT"]
    assert {(line["caller"], line["method"]) for line in lines} == {("dev", "perdure.v1.AgentRunService/StartAgents")}
    assert [line.get("run_id", "") for line in lines] == ["foo", "foo", "foo", ""]
    assert measured == ["OK", "OK", "OK", "INVALID_ARGUMENT"]
    assert [args[0].trace_parent for _, args, _ in service.calls] == ["", TRACE_PARENT, ""]


async def test_bytes_that_are_no_request_are_an_answer_and_not_the_end(service):
    service.script["start"] = lambda command: (a_run(), True)
    async with serving(service) as served:
        stream = served.channel.stream_stream(
            "/perdure.v1.AgentRunService/StartAgents", None, pb.StartAgentsResponse.FromString
        )
        call = stream(iter([b"\xff\xff", item(2).SerializeToString()]))
        answers = [answer async for answer in call]
    assert [reasons(answer) for answer in answers] == [["INVALID_FIELD"], []]
