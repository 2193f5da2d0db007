"""Watches against a real server: what breaks, and what the iteration shows of it (nothing)."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from perdure.v1 import approval_service_pb2
from perdure_client import (
    ApprovalState,
    AsyncClient,
    AsyncWatch,
    Client,
    ClientClosed,
    CursorOutOfRange,
    EventKind,
    InternalError,
    PerdureError,
    ProtocolViolation,
    RunNotFound,
    ServerUnavailable,
    TokenExpired,
    TokenMissing,
    TooManyStreams,
    Unauthenticated,
    Watch,
    WatchUpdate,
)
from perdure_client._transport import GET_APPROVAL, WATCH_APPROVALS, WATCH_RUN

from tests.unit.client.scripted import CuttableProxy, Fail, Hang, ScriptedServer, batch, finished_run

LAST = 7
UNAVAILABLE = Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_delay_s=0.5)

BREAKS: dict[str, list[Any]] = {
    "a drain": [UNAVAILABLE],
    "a bare UNAVAILABLE": [Fail(grpc.StatusCode.UNAVAILABLE, message="Socket closed")],
    "a reset stream": [Fail(grpc.StatusCode.INTERNAL, message="Received RST_STREAM with error code 2")],
    "a cancelling proxy": [Fail(grpc.StatusCode.CANCELLED, message="RST_STREAM with error code 8")],
    "a removed stream": [Fail(grpc.StatusCode.UNKNOWN, message="Stream removed")],
    "a proxy's deadline": [Fail(grpc.StatusCode.DEADLINE_EXCEEDED, message="stream timeout")],
    "too many streams": [Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", retry_delay_s=0.1)],
    "an early OK": [],
}


async def watched(client: AsyncClient, **options: Any) -> list[int]:
    return [event.sequence async for event in client.watch("r", **options).events()]


def watched_blocking(client: Client, **options: Any) -> list[int]:
    return [event.sequence for event in client.watch("r", **options).events()]


@pytest.mark.parametrize("broken_after", range(LAST + 1))
@pytest.mark.parametrize("kind", BREAKS)
async def test_a_break_after_any_event_shows_nothing_to_the_iteration(
    server: ScriptedServer, client: AsyncClient, broken_after: int, kind: str
) -> None:
    begin = [batch([n]) for n in range(1, broken_after + 1)]
    server.script(WATCH_RUN, begin + BREAKS[kind], finished_run(LAST))
    assert await watched(client) == list(range(1, LAST + 1))
    assert server.asked(WATCH_RUN)[1].cursor == (f"after-{broken_after}" if broken_after else "")


@pytest.mark.parametrize("broken_after", range(LAST + 1))
async def test_the_blocking_client_survives_the_same(
    server: ScriptedServer, blocking_client: Client, broken_after: int
) -> None:
    begin: list[Any] = [batch([n]) for n in range(1, broken_after + 1)]
    server.script(WATCH_RUN, [*begin, UNAVAILABLE], finished_run(LAST))
    assert await asyncio.to_thread(watched_blocking, blocking_client) == list(range(1, LAST + 1))


@pytest.mark.parametrize("repeated_from", range(1, 5))
async def test_a_batch_that_is_sent_again_in_part_is_not_seen_again(
    server: ScriptedServer, client: AsyncClient, repeated_from: int
) -> None:
    server.script(WATCH_RUN, [batch([1, 2, 3, 4]), UNAVAILABLE], [batch(range(repeated_from, 8), end=True)])
    assert await watched(client) == [1, 2, 3, 4, 5, 6, 7]


async def test_a_lost_connection_is_made_again(server: ScriptedServer, slept: list[float]) -> None:
    proxy = CuttableProxy(server.port)
    await proxy.start()
    hang = Hang()
    server.script(WATCH_RUN, [batch([1, 2]), hang], [batch([3], end=True)])
    try:
        async with AsyncClient(f"127.0.0.1:{proxy.port}") as client:
            seen: list[int] = []
            async for update in client.watch("r"):
                seen += [event.sequence for event in update.events]
                if seen == [1, 2]:
                    await hang.reached.wait()
                    proxy.cut()
            assert seen == [1, 2, 3]
            assert proxy.connections == 2
            assert server.asked(WATCH_RUN)[1].cursor == "after-2"
    finally:
        await proxy.stop()


async def test_a_restarted_server_is_found_again(server: ScriptedServer, client: AsyncClient) -> None:
    hang = Hang()
    server.script(WATCH_RUN, [batch([1]), hang], [batch([2], end=True)])
    watch = client.watch("r")
    assert [event.sequence for event in (await anext(watch)).events] == [1]
    await hang.reached.wait()
    await server.stop()
    await server.start()
    assert [event.sequence for event in (await anext(watch)).events] == [2]


async def test_the_wait_is_at_least_what_the_server_asks_for(
    server: ScriptedServer, client: AsyncClient, slept: list[float]
) -> None:
    asks = Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_delay_s=3.0)
    server.script(WATCH_RUN, [asks], [asks], [batch([1], end=True)])
    assert await watched(client) == [1]
    assert len(slept) == 2
    assert all(3.0 <= delay <= 4.5 for delay in slept)


async def test_waits_grow_with_failures_and_have_jitter(
    server: ScriptedServer, client: AsyncClient, slept: list[float]
) -> None:
    server.script(WATCH_RUN, *[[Fail(grpc.StatusCode.UNAVAILABLE)]] * 6, [batch([1], end=True)])
    assert await watched(client) == [1]
    for failures, delay in enumerate(slept):
        assert 0.05 * 2**failures <= delay <= 0.1 * 2**failures
    assert len(slept) == 6


async def test_the_caller_is_told_of_breaks(server: ScriptedServer, client: AsyncClient) -> None:
    told: list[tuple[PerdureError, float]] = []
    server.script(WATCH_RUN, [UNAVAILABLE], [batch([1], end=True)])
    await watched(client, on_reconnect=lambda error, delay: told.append((error, delay)))
    assert [(error.reason, delay >= 0.5) for error, delay in told] == [("DRAINING", True)]


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (Fail(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"), RunNotFound),
        (Fail(grpc.StatusCode.INTERNAL, "INTERNAL", "sorry", {"error_id": "e1"}), InternalError),
        (Fail(grpc.StatusCode.OUT_OF_RANGE, "EVENTS_TRUNCATED", metadata={"earliest_sequence": "8"}), CursorOutOfRange),
    ],
)
async def test_what_repeating_does_not_help_is_raised(
    server: ScriptedServer, client: AsyncClient, slept: list[float], fail: Fail, error: type[PerdureError]
) -> None:
    server.script(WATCH_RUN, [fail])
    with pytest.raises(error) as raised:
        await watched(client)
    assert slept == []
    assert isinstance(raised.value.__cause__, grpc.RpcError)


async def test_a_watch_gives_up_after_so_long_without_an_answer(server: ScriptedServer, slept: list[float]) -> None:
    fail = Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", retry_delay_s=0.5)
    server.script(WATCH_RUN, [fail])
    async with AsyncClient(server.address, reconnect_timeout=0.4) as client:
        with pytest.raises(TooManyStreams):
            await watched(client)


async def test_a_watch_whose_server_was_never_there_gives_up_soon(slept: list[float]) -> None:
    async with AsyncClient("127.0.0.1:1", connect_timeout=0.05) as client:
        with pytest.raises(ServerUnavailable, match="perdure-server dev"):
            await watched(client)


async def test_a_slow_reader_does_not_use_up_the_time_of_an_outage(
    server: ScriptedServer, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script(WATCH_RUN, [batch([1]), UNAVAILABLE], [batch([2], end=True)])
    now_s = 0.0
    monkeypatch.setattr("perdure_client._retry.time.monotonic", lambda: now_s)
    async with AsyncClient(server.address, reconnect_timeout=60) as client:
        watch = client.watch("r")
        await anext(watch)
        now_s = 3600.0
        assert [event.sequence for event in (await anext(watch)).events] == [2]


@pytest.mark.parametrize("blocking", [False, True])
async def test_silence_without_heartbeats_is_a_break(
    server: ScriptedServer, slept: list[float], monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    monkeypatch.setattr("perdure_client._watch._MISSED_HEARTBEATS", 0.01)
    server.script(WATCH_RUN, [batch([1]), Hang()], [batch([2], end=True)])
    told: list[PerdureError] = []
    options: dict[str, Any] = {
        "heartbeat_interval": 5.0,
        "on_reconnect": lambda error, _: told.append(error),
    }
    if blocking:
        with Client(server.address) as blocking_client:
            seen = await asyncio.to_thread(watched_blocking, blocking_client, **options)
    else:
        async with AsyncClient(server.address) as client:
            seen = await watched(client, **options)
    assert seen == [1, 2]
    assert [str(error) for error in told] == [f"nothing has come from {server.address} for 0.05 s"]


async def test_a_hole_in_the_log_is_asked_for_again(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(WATCH_RUN, [batch([1, 2]), batch([4])], [batch([3, 4], end=True)])
    assert await watched(client) == [1, 2, 3, 4]
    assert server.asked(WATCH_RUN)[1].after_sequence == 2


async def test_a_hole_that_stays_is_an_error_and_not_a_silent_loss(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(WATCH_RUN, [batch([1]), batch([3])], [batch([3])])
    with pytest.raises(ProtocolViolation):
        await watched(client)


async def test_positions_and_kinds_are_part_of_the_request(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(WATCH_RUN, [batch([5], end=True)], [batch([9], end=True)], [batch([1], end=True)])
    await watched(client, after_sequence=4, heartbeat_interval=7.5)
    await watched(client, cursor="c", kinds=[EventKind.PROGRESS, EventKind.LOG])
    await watched(client, from_now=True)
    first, second, third = server.asked(WATCH_RUN)
    assert (first.after_sequence, first.heartbeat_interval.ToTimedelta().total_seconds()) == (4, 7.5)
    assert (second.cursor, list(second.kinds)) == ("c", [8, 15])
    assert third.from_now


async def test_a_read_that_is_cancelled_loses_nothing(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(WATCH_RUN, [batch([1]), Hang()], [batch([2], end=True)])
    watch = client.watch("r")
    await anext(watch)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(watch), 0.05)
    assert [event.sequence for event in (await anext(watch)).events] == [2]
    assert server.asked(WATCH_RUN)[1].cursor == "after-1"


async def test_leaving_the_loop_ends_the_stream(server: ScriptedServer, client: AsyncClient) -> None:
    hang = Hang()
    server.script(WATCH_RUN, [batch([1]), hang])
    async with client.watch("r") as watch:
        async for _ in watch:
            await hang.reached.wait()
            break
    await asyncio.wait_for(hang.left.wait(), 5)
    assert [update async for update in watch] == []


@pytest.mark.parametrize("blocking", [False, True])
async def test_closing_a_watch_ends_an_iteration_that_waits_elsewhere(
    server: ScriptedServer, client: AsyncClient, blocking_client: Client, blocking: bool
) -> None:
    hang = Hang()
    server.script(WATCH_RUN, [batch([1]), hang])

    async def rest(watch: AsyncWatch) -> list[WatchUpdate]:
        return [update async for update in watch]

    watch: Any = blocking_client.watch("r") if blocking else client.watch("r")
    await (asyncio.to_thread(next, watch) if blocking else anext(watch))
    reading = asyncio.ensure_future(asyncio.to_thread(list, watch) if blocking else rest(watch))
    await hang.reached.wait()
    watch.close()
    assert await asyncio.wait_for(reading, 5) == []


async def test_a_watch_that_is_closed_while_it_waits_to_reconnect_does_not(
    server: ScriptedServer, client: AsyncClient, slept: list[float]
) -> None:
    watch = client.watch("r", on_reconnect=lambda *_: watch.close())
    server.script(WATCH_RUN, [UNAVAILABLE], [batch([1], end=True)])
    assert [update async for update in watch] == []
    assert len(server.asked(WATCH_RUN)) == 1


async def test_a_watch_that_is_dropped_ends_its_stream(server: ScriptedServer, blocking_client: Client) -> None:
    hang = Hang()
    server.script(WATCH_RUN, [batch([1]), hang])

    def first(watch: Watch) -> list[int]:
        return [event.sequence for event in next(watch).events]

    assert await asyncio.to_thread(lambda: first(blocking_client.watch("r"))) == [1]
    await asyncio.wait_for(hang.left.wait(), 5)


async def test_the_stream_of_a_run_that_ended_ends_with_ok(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(WATCH_RUN, [batch([1], end=True)])
    await watched(client)
    assert server.ended_streams == [True]


@pytest.mark.parametrize("blocking", [False, True])
async def test_closing_the_client_ends_its_watches_with_an_error_of_ours(
    server: ScriptedServer, blocking: bool
) -> None:
    hang = Hang()
    server.script(WATCH_RUN, [batch([1]), hang])
    if blocking:
        blocking_client = Client(server.address)
        reading = asyncio.ensure_future(asyncio.to_thread(watched_blocking, blocking_client))
        await hang.reached.wait()
        blocking_client.close()
    else:
        client = AsyncClient(server.address)
        reading = asyncio.ensure_future(watched(client))
        await hang.reached.wait()
        await client.close()
    with pytest.raises(ClientClosed):
        await reading


# ---- the inbox -------------------------------------------------------------------------------------------------------


def approval(name: str, revision: int = 1, state: str = "PENDING") -> dict[str, Any]:
    return {"approval_id": name, "run_id": "r", "revision": revision, "state": f"APPROVAL_STATE_{state}"}


def inbox(*approvals: dict[str, Any], caught_up: bool = False) -> approval_service_pb2.WatchApprovalsResponse:
    return approval_service_pb2.WatchApprovalsResponse(approvals=approvals, caught_up=caught_up)  # type: ignore[arg-type]


async def test_the_inbox_tells_every_revision_once_over_reconnects(server: ScriptedServer, client: AsyncClient) -> None:
    decided_meanwhile = approval("a", 2, "APPROVED")
    server.script(
        WATCH_APPROVALS,
        [inbox(approval("a"), approval("b"), caught_up=True), UNAVAILABLE],
        [inbox(approval("b"), approval("c")), inbox(caught_up=True), inbox(approval("b", 2, "REJECTED")), Hang()],
    )
    server.script(GET_APPROVAL, lambda _: approval_service_pb2.GetApprovalResponse(approval=decided_meanwhile))  # type: ignore[arg-type]
    seen: list[tuple[str, int, ApprovalState]] = []
    async with client.watch_approvals() as watch:
        async for item in watch:
            seen.append((item.approval_id, item.revision, item.state))
            if len(seen) == 5:
                break
    assert seen == [
        ("a", 1, ApprovalState.PENDING),
        ("b", 1, ApprovalState.PENDING),
        ("c", 1, ApprovalState.PENDING),
        ("a", 2, ApprovalState.APPROVED),
        ("b", 2, ApprovalState.REJECTED),
    ]


async def test_an_approval_that_was_deleted_meanwhile_is_forgotten(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(
        WATCH_APPROVALS,
        [inbox(approval("a"), caught_up=True), UNAVAILABLE],
        [inbox(caught_up=True), inbox(approval("b")), Hang()],
    )
    server.script(GET_APPROVAL, Fail(grpc.StatusCode.NOT_FOUND, "APPROVAL_NOT_FOUND"))
    watch = client.watch_approvals()
    assert [(await anext(watch)).approval_id, (await anext(watch)).approval_id] == ["a", "b"]
    watch.close()


async def test_the_blocking_inbox_is_the_same(server: ScriptedServer, blocking_client: Client) -> None:
    server.script(
        WATCH_APPROVALS, [inbox(approval("a"))], [inbox(approval("a"), approval("b"), caught_up=True), Hang()]
    )

    def read() -> list[str]:
        with blocking_client.watch_approvals() as watch:
            return [next(watch).approval_id, next(watch).approval_id]

    assert await asyncio.to_thread(read) == ["a", "b"]


EXPIRED = Fail(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")


async def test_a_client_whose_token_is_a_function_renews_it_when_it_has_expired(
    server: ScriptedServer, slept: list[float]
) -> None:
    tokens = iter(["first", "second", "third", "fourth"])
    async with AsyncClient(server.address, token=lambda: next(tokens)) as client:
        server.script(WATCH_RUN, [batch([1]), EXPIRED], finished_run(LAST))
        assert await watched(client) == list(range(1, LAST + 1))
        server.script(GET_APPROVAL, EXPIRED, approval_service_pb2.GetApprovalResponse())
        await client.get_approval("a/1")
    sent = [metadata["authorization"] for metadata in server.metadata]
    assert sent == ["Bearer first", "Bearer second", "Bearer third", "Bearer fourth"]


async def test_a_token_that_is_a_text_cannot_be_renewed(server: ScriptedServer) -> None:
    async with AsyncClient(server.address, token="only") as client:
        server.script(WATCH_RUN, [batch([1]), EXPIRED])
        with pytest.raises(TokenExpired):
            await watched(client)
        for reason, error in (("TOKEN_MISSING", TokenMissing), ("TOKEN_INVALID", Unauthenticated)):
            server.script(GET_APPROVAL, Fail(grpc.StatusCode.UNAUTHENTICATED, reason))
            with pytest.raises(error):
                await client.get_approval("a/1")
