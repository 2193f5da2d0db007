"""`wait_many`: every run is told once, as it ends, whatever becomes of the streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_client import AsyncClient, InvalidArgument, PermissionDenied, RunNotFound, ServerUnavailable, WaitResult
from perdure_client._transport import WAIT_RUNS

from tests.unit.client.scripted import Clock, Fail, ScriptedServer, run_message

GONE = Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_delay_s=0.01)
MISSING = Fail(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")


def ended(*run_ids: str) -> pb.WaitRunsResponse:
    return pb.WaitRunsResponse(runs=[pb.WaitedRun(run_id=one, run=run_message(one)) for one in run_ids])


def failed(run_id: str, failure: Fail) -> pb.WaitedRun:
    return pb.WaitedRun(run_id=run_id, error=status_pb2.Status.FromString(failure.status()))


def backwards(request: pb.WaitRunsRequest) -> pb.WaitRunsResponse:
    return ended(*reversed(request.run_ids))


async def all_of(server: ScriptedServer, run_ids: list[str]) -> list[WaitResult]:
    async with AsyncClient(server.address, connect_timeout=2, reconnect_timeout=2) as client:
        return [result async for result in client.wait_many(run_ids)]


def ids(server: ScriptedServer) -> list[list[str]]:
    return [list(request.run_ids) for request in server.asked(WAIT_RUNS)]


async def test_ends_come_in_their_order_and_each_run_once(server: ScriptedServer) -> None:
    server.script(WAIT_RUNS, backwards)
    results = await all_of(server, ["a", "b", "a", "c"])
    assert [result.run_id for result in results] == ["c", "b", "a"]
    assert all(result.run is not None and result.run.run_id == result.run_id for result in results)
    assert ids(server) == [["a", "b", "c"]]


async def test_none_are_none(server: ScriptedServer) -> None:
    assert await all_of(server, []) == []
    assert ids(server) == []


async def test_after_a_break_those_without_an_answer_are_named_again(server: ScriptedServer) -> None:
    def one_then_gone(_request: pb.WaitRunsRequest) -> Any:
        return ended("b")

    # A stream that ends with OK before its last answer has broken, too.
    server.script(WAIT_RUNS, one_then_gone, GONE, backwards)
    results = await all_of(server, ["a", "b", "c"])
    assert [result.run_id for result in results] == ["b", "c", "a"]
    assert ids(server) == [["a", "b", "c"], ["a", "c"], ["a", "c"]]


@pytest.mark.parametrize("told_before", [[], ["b"]])
async def test_a_runs_error_is_its_result_unless_repeating_it_may_help(
    server: ScriptedServer, told_before: list[str]
) -> None:
    def mixed(_request: pb.WaitRunsRequest) -> pb.WaitRunsResponse:
        answer = ended(*told_before)
        answer.runs.append(failed("a", GONE))
        return answer

    def rest(request: pb.WaitRunsRequest) -> pb.WaitRunsResponse:
        assert "a" in request.run_ids
        answer = ended(*(one for one in request.run_ids if one != "a"))
        answer.runs.append(failed("a", MISSING))
        return answer

    server.script(WAIT_RUNS, mixed, rest)
    results = {result.run_id: result for result in await all_of(server, ["a", "b"])}
    assert isinstance(results["a"].error, RunNotFound)
    assert results["b"].error is None
    assert len(ids(server)) == 2


async def test_a_stream_that_had_nothing_to_tell_for_long_was_no_outage(
    server: ScriptedServer, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock.of("_retry", "_bulk_waits", "_rpc_errors", patch=monkeypatch)

    def dies(_request: pb.WaitRunsRequest) -> Fail:
        clock.ahead_s += 20
        return Fail(grpc.StatusCode.UNAVAILABLE, message="Socket closed")

    server.script(WAIT_RUNS, dies, dies, dies, backwards)
    assert [result.run_id for result in await all_of(server, ["a", "b"])] == ["b", "a"]


async def test_many_are_named_in_several_messages(server: ScriptedServer) -> None:
    run_ids = [f"run-{number}" for number in range(2_500)]
    server.script(WAIT_RUNS, backwards)

    answers: list[Callable[[pb.WaitRunsRequest], Any]] = [backwards]
    server.script(WAIT_RUNS, *answers * 3)
    results = await all_of(server, run_ids)
    assert {result.run_id for result in results} == set(run_ids)
    assert len(results) == len(run_ids)
    assert [len(one) for one in ids(server)][:3] == [1_000, 1_000, 500]


async def test_what_a_repeat_does_not_help_is_raised(server: ScriptedServer) -> None:
    server.script(WAIT_RUNS, Fail(grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED"))
    with pytest.raises(PermissionDenied):
        await all_of(server, ["a"])
    with pytest.raises(InvalidArgument):
        await all_of(server, ["a", ""])
    await server.stop()
    with pytest.raises(ServerUnavailable):
        await all_of(server, ["a"])
