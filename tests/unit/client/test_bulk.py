"""`start_many` and `perdure start-many`: every start has its result, in order, whatever becomes of the streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_client import (
    AgentNotFound,
    AgentStart,
    AsyncClient,
    InvalidArgument,
    PayloadTooLarge,
    PermissionDenied,
    ProtocolViolation,
    StartResult,
)
from perdure_client._transport import START_AGENTS, WAIT_RUNS

from tests.unit.client.scripted import Fail, ScriptedServer, run_message

GONE = Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_delay_s=0.01)


def started(item: pb.StartAgentsRequest) -> pb.StartAgentsResponse:
    run = run_message(item.start.run_id)
    return pb.StartAgentsResponse(
        request_id=item.start.request_id, started=pb.StartAgentResponse(run=run, created=True)
    )


def refused(item: pb.StartAgentsRequest, failure: Fail) -> pb.StartAgentsResponse:
    return pb.StartAgentsResponse(
        request_id=item.start.request_id, error=status_pb2.Status.FromString(failure.status())
    )


def but(run_id: str, answer: Any) -> Callable[[pb.StartAgentsRequest], Any]:
    """A script entry: all are started but one."""

    def serve(item: pb.StartAgentsRequest) -> Any:
        if item.start.run_id != run_id:
            return started(item)
        return refused(item, answer) if isinstance(answer, Fail) and not answer.message else answer

    return serve


def starts(count: int) -> list[AgentStart]:
    return [AgentStart("research", {"n": n}, run_id=f"run-{n}") for n in range(count)]


async def all_of(server: ScriptedServer, given: Any) -> list[StartResult]:
    async with AsyncClient(server.address, connect_timeout=2, reconnect_timeout=2) as client:
        return [result async for result in client.start_many(given)]


def ids(results: list[StartResult]) -> list[str]:
    return [result.run.run_id if result.run else type(result.error).__name__ for result in results]


async def test_what_breaks_a_stream_is_sent_again_with_the_same_ids_and_told_once(server: ScriptedServer) -> None:
    server.script(START_AGENTS, but("run-2", GONE), but("run-4", GONE), started)
    given = starts(6)
    results = await all_of(server, given)
    assert [result.start for result in results] == given
    assert ids(results) == [f"run-{n}" for n in range(6)]
    asked: dict[str, set[str]] = {}
    for item in server.asked(START_AGENTS):
        asked.setdefault(item.start.run_id, set()).add(item.start.request_id)
    assert sorted(asked) == [f"run-{n}" for n in range(6)]
    assert {len(request_ids) for request_ids in asked.values()} == {1}
    assert len(set.union(*asked.values())) == 6
    assert server.ended_streams[-1]


async def test_an_items_error_is_its_result_unless_repeating_it_may_help(server: ScriptedServer) -> None:
    missing = Fail(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND", "")
    busy = Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "", retry_delay_s=0.01)
    server.script(START_AGENTS, but("run-1", busy), but("run-1", missing))
    results = await all_of(server, starts(3))
    assert ids(results) == ["run-0", "AgentNotFound", "run-2"]
    assert isinstance(results[1].error, AgentNotFound)


async def test_answers_that_come_in_one_message_are_told_one_by_one(server: ScriptedServer) -> None:
    busy = Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "", retry_delay_s=0.01)

    held: list[pb.StartAgentsRequest] = []

    def at_once(item: pb.StartAgentsRequest) -> pb.StartAgentsResponse | None:
        """Answers the second start together with the third, which is to come again, and the fourth."""
        if item.start.run_id == "run-0":
            return started(item)
        held.append(item)
        if len(held) < 2:
            return None
        answer = started(held[0])
        answer.more.extend([refused(held[1], busy), started(held[1])])
        return answer

    server.script(START_AGENTS, at_once, started)
    results = await all_of(server, starts(5))
    assert ids(results) == [f"run-{n}" for n in range(5)]
    asked = [item.start.run_id for item in server.asked(START_AGENTS)]
    assert asked[:3] == ["run-0", "run-1", "run-2"]
    assert asked[-3:] == ["run-2", "run-3", "run-4"], "what came behind the one that is asked again is not told"
    assert all(item.pack_answers for item in server.asked(START_AGENTS))


async def test_a_start_that_cannot_be_sent_has_its_place_among_the_results(server: ScriptedServer) -> None:
    server.script(START_AGENTS, started)
    given = [AgentStart("a", run_id="run-0"), AgentStart("a", priority=-1), AgentStart("a", run_id="run-2")]
    results = await all_of(server, given)
    assert ids(results) == ["run-0", "InvalidArgument", "run-2"]
    assert len(server.asked(START_AGENTS)) == 2
    assert ids(await all_of(server, [AgentStart("a", priority=-1)])) == ["InvalidArgument"]
    assert await all_of(server, []) == []


async def test_one_of_many_starts_may_name_its_home_region_and_has_no_id_then(server: ScriptedServer) -> None:
    server.script(START_AGENTS, started)
    await all_of(server, [AgentStart("a", home_region="south"), AgentStart("a", run_id="run-1")])
    first, second = (item.start for item in server.asked(START_AGENTS))
    assert (first.run_id, first.home_region, bool(first.request_id)) == ("", "south", True)
    assert (second.run_id, second.home_region) == ("run-1", "")
    (refused,) = await all_of(server, [AgentStart("a", home_region="south", run_id="run-1")])
    assert isinstance(refused.error, InvalidArgument)


async def test_starts_may_come_from_an_asynchronous_iterator_and_its_error_comes_last(server: ScriptedServer) -> None:
    async def given() -> AsyncIterator[AgentStart]:
        for start in starts(3):
            yield start
        raise LookupError("no more")

    server.script(START_AGENTS, started)
    async with AsyncClient(server.address) as client:
        told = client.start_many(given())
        results = [await anext(told) for _ in range(3)]
        with pytest.raises(LookupError, match="no more"):
            await anext(told)
    assert ids(results) == ["run-0", "run-1", "run-2"]


async def test_no_more_starts_are_taken_than_fit_the_window(server: ScriptedServer) -> None:
    taken: list[int] = []

    def endless() -> Iterator[AgentStart]:
        while True:
            taken.append(1)
            yield AgentStart("research")

    server.script(START_AGENTS, started)
    async with AsyncClient(server.address) as client:
        results = client.start_many(endless())
        for count in range(1, 1_000):
            await anext(results)
            assert len(taken) <= count + 256
        await results.aclose()  # type: ignore[attr-defined]


async def test_a_stream_that_is_refused_or_answers_another_start_is_an_error(server: ScriptedServer) -> None:
    server.script(START_AGENTS, Fail(grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED"))
    with pytest.raises(PermissionDenied):
        await all_of(server, starts(2))
    server.script(START_AGENTS, pb.StartAgentsResponse(request_id="another"))
    with pytest.raises(ProtocolViolation):
        await all_of(server, starts(2))


async def test_a_message_over_grpcs_limit_is_found_and_the_others_are_started(server: ScriptedServer) -> None:
    """The client's limit, of 8 MiB, and that of a server, which is gRPC's own of 4 MiB here."""
    large, larger = (AgentStart("research", {"text": "x" * (n * 2**20)}) for n in (5, 9))
    server.script(START_AGENTS, *[started] * 10)
    results = await all_of(server, [*starts(3), large, AgentStart("research", run_id="run-4"), larger])
    assert ids(results) == ["run-0", "run-1", "run-2", "PayloadTooLarge", "run-4", "PayloadTooLarge"]
    limits = [result.error.metadata["limit_bytes"] for result in results if isinstance(result.error, PayloadTooLarge)]
    assert limits == [str(4 * 2**20), str(8 * 2**20)]


# ---- the command -----------------------------------------------------------------------------------------------------


async def test_the_command_tells_of_every_line_in_the_order_of_the_file(
    server: ScriptedServer, perdure: Callable[..., Awaitable[Any]]
) -> None:
    server.script(START_AGENTS, but("b", Fail(grpc.StatusCode.ALREADY_EXISTS, "RUN_ID_IN_USE", "")))
    lines = [
        '{"run_id": "a", "input": {"q": 1}, "labels": {"team": "blue"}, "delay": "1m"}',
        "nonsense",
        "",
        '{"run_id": "b", "agent": "other"}',
        '{"run_id": "c", "priority": true}',
        '{"colour": "red"}',
        '{"input": {"text": "\\ud800"}}',
        '{"run_id": "\\ud800"}',
        '{"labels": {"a": 5}}',
        '{"delay": "99999999999d"}',
        "[" * 100_000,
    ]
    result = await perdure("start-many", "-", "--agent", "research", "-o", "json", stdin="\n".join(lines))
    assert result.exit_code == 2, result.output
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["line"] for one in told] == [1, 2, 4, *range(5, 12)]
    assert [one.get("error", {}).get("reason", "") for one in told] == [
        "", "INVALID_FIELD", "RUN_ID_IN_USE", *["INVALID_FIELD"] * 7
    ]  # fmt: skip
    assert told[0]["run"]["run_id"] == "a"
    assert result.stderr.startswith("1 started in ")
    assert "8 wrong; 1 refused." in result.stderr
    first, second = server.asked(START_AGENTS)
    assert (first.start.agent, first.start.delay.seconds, first.start.labels["team"]) == ("research", 60, "blue")
    assert second.start.agent == "other"


async def test_the_command_reads_a_file_and_ends_well_when_all_are_started(
    server: ScriptedServer, perdure: Callable[..., Awaitable[Any]], tmp_path: Any
) -> None:
    server.script(START_AGENTS, started)
    path = tmp_path / "starts.jsonl"
    path.write_text('{"agent": "a", "run_id": "x"}\n{"agent": "a", "run_id": "y"}\n')
    result = await perdure("start-many", str(path), "-o", "table")
    assert result.exit_code == 0, result.output
    assert result.stdout == "line 1  x  RUNNING\nline 2  y  RUNNING\n"
    assert (await perdure("start-many", str(tmp_path / "none"))).exit_code == 2


async def test_the_command_waits_and_tells_of_each_end_for_each_line(
    server: ScriptedServer, perdure: Callable[..., Awaitable[Any]]
) -> None:
    server.script(START_AGENTS, started)
    server.script(
        WAIT_RUNS,
        pb.WaitRunsResponse(
            runs=[
                pb.WaitedRun(run_id="b", run=run_message("b", state="FAILED")),
                pb.WaitedRun(run_id="a", run=run_message("a", state="SUCCEEDED")),
            ]
        ),
    )
    lines = '{"run_id": "a"}\n{"run_id": "b"}\n{"run_id": "a"}\n'
    result = await perdure("start-many", "-", "--agent", "research", "--wait", "-o", "table", stdin=lines)
    assert result.exit_code == 1, result.output
    assert result.stdout == "line 2  b  FAILED\nline 1  a  SUCCEEDED\nline 3  a  SUCCEEDED\n"
    assert result.stderr.endswith("; 1 FAILED; 1 SUCCEEDED.\n")
    assert [list(request.run_ids) for request in server.asked(WAIT_RUNS)] == [["a", "b"]]


async def test_a_run_that_cannot_be_waited_for_is_told_of_like_a_refusal(
    server: ScriptedServer, perdure: Callable[..., Awaitable[Any]]
) -> None:
    server.script(START_AGENTS, started)
    missing = status_pb2.Status.FromString(Fail(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND").status())
    server.script(WAIT_RUNS, pb.WaitRunsResponse(runs=[pb.WaitedRun(run_id="a", error=missing)]))
    result = await perdure("start-many", "-", "-a", "research", "--wait", "-o", "json", stdin='{"run_id": "a"}\n')
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["error"]["reason"] == "RUN_NOT_FOUND"
    assert (await perdure("start-many", "-", "--wait", "--validate-only", stdin="")).exit_code == 2
