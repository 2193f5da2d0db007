"""Streams end when the client leaves, the server drains or they are old; there are never more than allowed."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2, run_event_pb2
from perdure.v1.agent_run_service_pb2_grpc import AgentRunServiceStub
from perdure_service.domain.callers import Caller, everything
from perdure_service.domain.cursors import Cursor
from perdure_service.domain.events import EventKind
from perdure_service.errors import Draining, TooManyStreams
from perdure_service.rpc import streams as open_calls
from perdure_service.rpc.authentication import Authentication
from perdure_service.rpc.streams import DRAIN_TEXT, Streams, closing

from tests.helpers.waiting import eventually_async
from tests.unit.rpc.doubles import (
    KEY,
    Served,
    a_batch,
    a_run,
    an_approval,
    an_event,
    channel_to,
    failing,
    serving,
    streams,
)

WATCH = pb.WatchRunRequest(run_id="foo")


async def test_a_watch_passes_everything_on_in_order_and_ends_with_the_run(service):
    service.script["watch"] = streams(
        a_batch(1, 2, snapshot=a_run(), caught_up=False),
        a_batch(last_sequence=2, caught_up=True),
        a_batch(3, end_of_run=True),
    )
    request = pb.WatchRunRequest(
        namespace="lab",
        run_id="foo",
        after_sequence=0,
        kinds=[run_event_pb2.RUN_EVENT_KIND_LOG],
        heartbeat_interval=Duration(seconds=7),
    )
    async with serving(service) as served:
        responses = [response async for response in served.runs.WatchRun(request)]
    assert [[event.sequence for event in r.events] for r in responses] == [[1, 2], [], [3]]
    assert [r.HasField("snapshot") for r in responses] == [True, False, False]
    assert [r.caught_up for r in responses] == [False, True, False]
    assert responses[-1].end_of_run
    assert {event.run_id for r in responses for event in r.events} == {"foo"}
    assert service.calls == [
        (
            "watch",
            ("lab", "foo"),
            {
                "cursor": None,
                "after_sequence": 0,
                "from_now": False,
                "kinds": frozenset({EventKind.LOG}),
                "include_children": False,
                "heartbeat_s": 7.0,
            },
        )
    ]


async def test_the_inbox_passes_everything_on(service):
    service.script["watch_approvals"] = streams(([an_approval()], False), ([], True), then_stay=True)
    async with serving(service) as served:
        call = served.approvals.WatchApprovals(approval_service_pb2.WatchApprovalsRequest(namespace="lab"))
        first, second = await call.read(), await call.read()
        assert [approval.approval_id for approval in first.approvals] == ["foo/3"]
        assert (first.caught_up, second.caught_up, len(second.approvals)) == (False, True, 0)
        assert service.calls == [("watch_approvals", ("lab",), {"heartbeat_s": 15.0})]
        call.cancel()
        await eventually_async(lambda: service.closed == ["watch_approvals"])


async def test_an_inbox_too_large_for_one_message_arrives_in_pieces(service):
    asked = [an_approval(approval_id=f"foo/{n}", payload_json=f'"{"x" * 900_000}"') for n in range(12)]
    service.script["watch_approvals"] = streams((asked, True), (asked, True), then_stay=True)
    async with serving(service) as served:  # a client that takes gRPC's default of 4 MiB, of 10 MiB
        call = served.approvals.WatchApprovals(approval_service_pb2.WatchApprovalsRequest())
        responses = [await call.read() for _ in range(24)]
        call.cancel()
    assert [one.approval_id for r in responses for one in r.approvals] == [one.approval_id for one in asked] * 2
    assert [response.caught_up for response in responses] == [False] * 11 + [True] * 13


async def test_a_batch_too_large_for_one_message_arrives_in_pieces(service):
    events = [an_event(n, message="x" * 300_000) for n in range(1, 41)]
    service.script["watch"] = streams(a_batch(events=events, last_sequence=40, end_of_run=True))
    async with serving(service) as served:  # a client that takes gRPC's default of 4 MiB, of 12 MiB
        responses = [response async for response in served.runs.WatchRun(WATCH)]
    assert [event.sequence for r in responses for event in r.events] == list(range(1, 41))
    assert len(responses) > 3
    assert responses[-1].cursor == Cursor(KEY.workflow_id, 40).encode()


async def test_a_client_that_leaves_ends_its_watch_at_once(service):
    service.script["watch"] = streams(a_batch(1), then_stay=True)
    async with serving(service) as served:
        call = served.runs.WatchRun(WATCH)
        await call.read()
        assert served.server.streams.count == 1
        call.cancel()
        await eventually_async(lambda: service.closed == ["watch"], timeout=2)
        assert served.server.streams.count == 0


async def test_a_client_whose_connection_breaks_ends_its_watch(service):
    service.script["watch"] = streams(a_batch(1), then_stay=True)
    async with serving(service) as served:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
            call = channel.unary_stream("/perdure.v1.AgentRunService/WatchRun")(WATCH.SerializeToString())
            await call.read()
        await eventually_async(lambda: service.closed == ["watch"], timeout=2)


async def test_a_reader_that_does_not_read_holds_up_its_own_source_and_is_closed_when_it_leaves(service):
    produced = 0

    async def endless(*args: Any, **kwargs: Any) -> Any:
        nonlocal produced
        while True:
            produced += 1
            yield a_batch(events=[an_event(produced, message="x" * 100_000)], last_sequence=produced)

    service.script["watch"] = endless
    async with serving(service) as served:
        call = served.runs.WatchRun(WATCH)
        await call.read()

        seen = (0, 0.0)

        def stands_still() -> bool:
            nonlocal seen
            if produced != seen[0]:
                seen = (produced, time.monotonic())
            return time.monotonic() - seen[1] > 0.2

        await eventually_async(stands_still)
        assert produced < 200  # what fits the buffers of the connection
        call.cancel()
        await eventually_async(lambda: service.closed == ["watch"], timeout=2)


async def test_a_draining_server_ends_every_stream_and_wait_and_tells_when_to_come_back(service):
    service.script["watch"] = streams(a_batch(1), then_stay=True)
    service.script["watch_approvals"] = streams(([], True), then_stay=True)

    async def wait(*args: Any, **kwargs: Any) -> Any:
        await asyncio.Event().wait()

    service.script["wait"] = wait
    service.script["get"] = lambda *args, **kwargs: a_run()
    async with serving(service) as served:
        watches = [served.runs.WatchRun(WATCH) for _ in range(5)]
        inbox = served.approvals.WatchApprovals(approval_service_pb2.WatchApprovalsRequest())
        waiting = asyncio.create_task(failing(served.runs.WaitRun(pb.WaitRunRequest(run_id="foo"))))
        for call in [*watches, inbox]:
            await call.read()
        await eventually_async(lambda: served.server.streams.count == 7)
        began = time.monotonic()
        await served.server.drain()
        failures = await asyncio.gather(*[failing(call) for call in [*watches, inbox]], waiting)
        assert time.monotonic() - began < 2
        assert {failure.code for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
        assert {failure.info.reason for failure in failures} == {"DRAINING"}
        assert {failure.retry_delay_s for failure in failures} == {0.5}
        assert served.server.streams.count == 0
        # New ones are refused the same way; short calls are answered until the end.
        assert (await failing(served.runs.WatchRun(WATCH))).info.reason == "DRAINING"
        assert (await failing(served.runs.WaitRun(pb.WaitRunRequest(run_id="foo")))).info.reason == "DRAINING"
        assert (await served.runs.GetRun(pb.GetRunRequest(run_id="foo"))).run.run_id == "foo"


async def test_a_reader_that_does_not_read_learns_of_the_drain_when_it_reads_on(service):
    async def endless(*args: Any, **kwargs: Any) -> Any:
        sequence = 0
        while True:
            sequence += 1
            yield a_batch(events=[an_event(sequence, message="x" * 100_000)], last_sequence=sequence)

    service.script["watch"] = endless
    async with serving(service) as served:
        call = served.runs.WatchRun(WATCH)
        await call.read()
        await served.server.drain()
        await eventually_async(lambda: service.closed == ["watch"], timeout=2)
        failure = await asyncio.wait_for(failing(call), 10)
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_there_are_never_more_streams_than_allowed(service):
    service.script["watch"] = streams(a_batch(1), then_stay=True)
    service.script["watch_approvals"] = streams(([], True), then_stay=True)
    async with serving(service, max_watches=3) as served:
        calls = [served.runs.WatchRun(WATCH) for _ in range(2)]
        calls.append(served.approvals.WatchApprovals(approval_service_pb2.WatchApprovalsRequest()))
        for call in calls:
            await call.read()
        failure = await failing(served.runs.WatchRun(WATCH))
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert failure.retry_delay_s == 5
        assert failure.info.metadata["limit"] == "3"
        calls[0].cancel()
        await eventually_async(lambda: served.server.streams.count == 2)
        assert (await served.runs.WatchRun(WATCH).read()).last_sequence == 1


async def test_an_old_stream_ends_with_advice_before_its_connection_does(service):
    service.script["watch"] = streams(a_batch(1), then_stay=True)
    async with serving(service, max_connection_age=0.5) as served:
        began = time.monotonic()
        failure = await failing(served.runs.WatchRun(WATCH))
        assert time.monotonic() - began < 0.5 + 0.3
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert failure.retry_delay_s == 0.5
        assert not served.server.streams.draining


async def test_a_bad_request_does_not_count_as_a_stream(service):
    async with serving(service, max_watches=1) as served:
        for _ in range(3):
            failure = await failing(served.runs.WatchRun(pb.WatchRunRequest()))
            assert failure.violations == {"run_id": "is required"}
        assert served.server.streams.count == 0


# ---- the registry itself ---------------------------------------------------------------------------------------------


async def test_a_cancellation_from_elsewhere_stays_a_cancellation():
    open_streams = Streams(10)

    async def stay() -> None:
        with open_streams.stream():
            await asyncio.Event().wait()

    task = asyncio.create_task(stay())
    await eventually_async(lambda: open_streams.count == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert open_streams.count == 0


async def test_a_cancellation_together_with_a_drain_stays_a_cancellation():
    open_streams = Streams(10)

    async def stay() -> None:
        with open_streams.stream():
            await asyncio.Event().wait()

    task = asyncio.create_task(stay())
    await eventually_async(lambda: open_streams.count == 1)
    open_streams.drain()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_after_a_drain_the_task_can_go_on():
    open_streams = Streams(10)

    async def stay() -> str:
        try:
            with open_streams.stream():
                await asyncio.Event().wait()
        except Draining:
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            return "answered"
        raise AssertionError

    task = asyncio.create_task(stay())
    await eventually_async(lambda: open_streams.count == 1)
    open_streams.drain()
    assert await task == "answered"


async def test_an_error_raised_while_a_stream_is_ended_is_not_hidden():
    open_streams = Streams(10)

    async def stay() -> None:
        with open_streams.stream():
            try:
                await asyncio.Event().wait()
            finally:
                raise KeyError("x")

    task = asyncio.create_task(stay())
    await eventually_async(lambda: open_streams.count == 1)
    open_streams.drain()
    with pytest.raises(KeyError):
        await task


async def test_waits_are_not_counted_as_streams():
    open_streams = Streams(1)
    with open_streams.wait(), open_streams.wait(), open_streams.stream():
        assert open_streams.count == 3
        with open_streams.wait():
            assert open_streams.count == 4
        with pytest.raises(TooManyStreams):
            open_streams.stream().__enter__()
    with open_streams.stream():
        assert open_streams.count == 1


async def test_a_caller_has_a_share_of_the_streams_and_gets_it_back():
    open_streams = Streams(10, per_caller=2)
    with open_streams.stream("ann"):
        with open_streams.stream("ann"), open_streams.stream("bob"), open_streams.stream(), open_streams.stream():
            for _ in range(2):
                with pytest.raises(TooManyStreams) as raised:
                    open_streams.stream("ann").__enter__()
                assert raised.value.metadata == {"limit": "2"}
            with open_streams.stream("bob"):
                assert open_streams.count == 6
        with open_streams.stream("ann"):
            assert open_streams.count == 2
    assert open_streams.count == 0


async def test_a_caller_with_too_many_streams_is_refused_over_the_wire_and_others_are_not(service, monkeypatch):
    async def caller_of(_self: Authentication, metadata: Any) -> Caller:
        return everything(dict(metadata).get("test-caller", ""))

    monkeypatch.setattr(Authentication, "caller_of", caller_of)
    monkeypatch.setattr(Authentication, "enabled", True)
    service.script["watch"] = streams(a_batch(1, snapshot=a_run()), then_stay=True)

    def watch(caller: str | None) -> Any:
        return served.runs.WatchRun(WATCH, metadata=(("test-caller", caller),) if caller else ())

    async with serving(service, max_streams_per_caller=2) as served:
        mine = [watch("ann") for _ in range(2)]
        for call in mine:
            await call.read()
        failure = await failing(watch("ann"))
        assert (failure.code.name, failure.info.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS")
        assert (dict(failure.info.metadata), failure.retry_delay_s) == ({"limit": "2"}, 5.0)
        for other in ("bob", "bob", None, None, None):
            await watch(other).read()
        mine[0].cancel()
        await eventually_async(lambda: served.server.streams.count == 6)
        await watch("ann").read()


async def test_a_write_that_fails_as_the_client_has_just_gone_is_no_error_of_the_server(service, rpc_log, caplog):
    async def lost(*args: Any, **kwargs: Any) -> Any:
        yield a_batch(1, snapshot=a_run())
        raise grpc.aio.InternalError("Failed execute_batch")  # what context.write raises then

    service.script["watch"] = lost
    async with serving(service) as served:
        call = served.runs.WatchRun(WATCH)
        await call.read()
        call.cancel()
        await eventually_async(lambda: served.server.streams.count == 0)
    assert rpc_log == []
    # gRPC's would be there; asyncio's are of the loops of earlier tests, which gRPC still calls.
    loud = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert not [record for record in loud if record.name != "asyncio"]


async def test_a_server_that_stops_tells_every_caller_to_come_back(service):
    """Whoever would reach it in just that moment gRPC cancels, and a client cannot know that a repeat is safe."""
    service.script["get"] = lambda *_, **__: a_run()
    told: set[tuple[grpc.StatusCode, bool]] = set()
    answered = 0

    async def caller(served: Served, over: asyncio.Event) -> None:
        nonlocal answered
        async with channel_to(served.port) as channel:
            runs = AgentRunServiceStub(channel)
            while not over.is_set():
                try:
                    await runs.GetRun(pb.GetRunRequest(run_id="foo"))
                    answered += 1
                except grpc.aio.AioRpcError as error:
                    told.add((error.code(), error.details() == DRAIN_TEXT))
                    with suppress(TimeoutError):
                        await asyncio.wait_for(over.wait(), Draining.retry_delay_s)

    async with serving(service) as served:
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(caller(served, over))
            await eventually_async(lambda: answered > 50)
            await served.server.stop(5)
            over.set()
    assert (grpc.StatusCode.UNAVAILABLE, True) in told
    assert {code for code, _ in told} == {grpc.StatusCode.UNAVAILABLE}


async def test_refusing_ends_when_nobody_calls_and_after_a_while_whoever_does(monkeypatch):
    monkeypatch.setattr(open_calls, "QUIET_S", 600.0)
    quiet, busy = Streams(1), Streams(1)
    await quiet.refuse()  # at once: nobody has called
    with pytest.raises(Draining):
        quiet.arrive(time.monotonic())
    monkeypatch.setattr(open_calls, "REFUSING_S", 0.01)
    busy.arrive(time.monotonic())
    await busy.refuse()


async def test_closing_closes_what_can_be_closed():
    class Plain:
        def __aiter__(self) -> Plain:
            return self

        async def __anext__(self) -> int:
            raise StopAsyncIteration

    async with closing(Plain()) as items:
        assert [item async for item in items] == []
    generator = streams(1, 2, then_stay=True)()
    async with closing(generator) as items:
        assert await anext(items) == 1
    with pytest.raises(StopAsyncIteration):
        await anext(generator)
