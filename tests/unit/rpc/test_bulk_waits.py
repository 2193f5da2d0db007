"""WaitRuns tells each end once, those that come together in one message, and ends in peace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio
import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.domain.runs import RunKey
from perdure_service.errors import Overloaded, RunNotFound
from perdure_service.rpc import bulk_waits

from tests.helpers.waiting import eventually_async
from tests.unit.rpc.doubles import ScriptedService, a_run, failing, serving


class Runs:
    """Runs that end when a test says so."""

    def __init__(self, service: ScriptedService) -> None:
        self.ends: dict[str, asyncio.Event] = {}
        self.asked: list[str] = []
        service.script["wait"] = self._wait

    def end(self, *run_ids: str) -> None:
        for run_id in run_ids:
            self.ends.setdefault(run_id, asyncio.Event()).set()

    async def _wait(self, namespace: str, run_id: str, **_: Any) -> Any:
        self.asked.append(run_id)
        if run_id.startswith("none"):
            raise RunNotFound(f"there is no run {run_id!r}")
        if run_id == "long" and self.asked.count("long") < 3:
            return a_run(key=RunKey.of_api(namespace, run_id)), True
        await self.ends.setdefault(run_id, asyncio.Event()).wait()
        return a_run(key=RunKey.of_api(namespace, run_id)), False


@pytest.fixture
def runs(service: ScriptedService) -> Runs:
    return Runs(service)


class Open:
    """A stream that stays open until `close`."""

    def __init__(self, served: Any) -> None:
        self._requests: asyncio.Queue[pb.WaitRunsRequest | None] = asyncio.Queue()
        self.stream = served.runs.WaitRuns(self._sent())

    async def _sent(self) -> AsyncIterator[pb.WaitRunsRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    def name(self, *run_ids: str, namespace: str = "") -> None:
        self._requests.put_nowait(pb.WaitRunsRequest(namespace=namespace, run_ids=run_ids))

    def close(self) -> None:
        self._requests.put_nowait(None)

    async def read(self) -> list[str]:
        """Returns the runs of the next message; with * those that have an error."""
        answer = await asyncio.wait_for(self.stream.read(), 10)
        assert answer is not grpc.aio.EOF
        return [one.run_id + ("*" if one.WhichOneof("result") == "error" else "") for one in answer.runs]


async def ended(requests: Sequence[pb.WaitRunsRequest], served: Any) -> list[pb.WaitedRun]:
    return [one async for answer in served.runs.WaitRuns(iter(requests)) for one in answer.runs]


async def test_ends_are_told_in_their_order_and_those_that_come_together_in_one_message(
    service: ScriptedService, runs: Runs
) -> None:
    async with serving(service) as served:
        waits = Open(served)
        waits.name("a", "b", "c", "d")
        waits.name("e")
        await eventually_async(lambda: len(runs.asked) == 5)
        runs.end("c")
        assert await waits.read() == ["c"]
        runs.end("e", "a", "b")
        assert sorted(await waits.read()) == ["a", "b", "e"]
        waits.close()
        runs.end("d")
        assert await waits.read() == ["d"]
        assert await waits.stream.read() is grpc.aio.EOF
        assert await waits.stream.code() is grpc.StatusCode.OK


async def test_a_run_that_cannot_be_waited_for_is_answered_and_the_others_go_on(
    service: ScriptedService, runs: Runs
) -> None:
    runs.end("a", "long")
    requests = [
        pb.WaitRunsRequest(run_ids=["none", "a"]),
        pb.WaitRunsRequest(namespace="elsewhere", run_ids=["x"]),
        pb.WaitRunsRequest(namespace="lab", run_ids=["long", ""]),
    ]
    async with serving(service) as served:
        found = {(one.namespace, one.run_id): one for one in await ended(requests, served)}
    assert set(found) == {("default", "none"), ("default", "a"), ("elsewhere", "x"), ("lab", "long"), ("lab", "")}
    assert found["default", "a"].run.run_id == "a"
    assert found["lab", "long"].run.namespace == "lab"
    assert runs.asked.count("long") == 3, "a wait that came back before the end was begun again"
    assert "no run 'none'" in found["default", "none"].error.message
    assert found["elsewhere", "x"].error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert found["lab", ""].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_a_run_that_is_named_twice_is_told_once_and_again_when_it_is_named_after_that(
    service: ScriptedService, runs: Runs
) -> None:
    async with serving(service) as served:
        waits = Open(served)
        waits.name("a", "a")
        waits.name("a")
        await eventually_async(lambda: runs.asked == ["a"])
        runs.end("a")
        assert await waits.read() == ["a"]
        waits.name("a")
        assert await waits.read() == ["a"]
        waits.close()
        assert await waits.stream.read() is grpc.aio.EOF
    assert runs.asked == ["a", "a"]


async def test_more_looks_than_the_server_has_room_for_are_made_one_after_another_and_are_no_errors(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Overloaded, "retry_delay_s", 0.01)
    looking = 0

    async def wait(namespace: str, run_id: str, **_: Any) -> Any:
        nonlocal looking
        if looking >= 10:
            raise Overloaded("too many calls")
        looking += 1
        await asyncio.sleep(0)
        looking -= 1
        return a_run(key=RunKey.of_api(namespace, run_id)), False

    service.script["wait"] = wait
    names = [f"run-{number}" for number in range(100)]
    async with serving(service) as served:
        stream = served.runs.WaitRuns(iter([pb.WaitRunsRequest(run_ids=names)]))
        told = [one async for response in stream for one in response.runs]
    assert sorted(one.run_id for one in told) == sorted(names)
    assert {one.WhichOneof("result") for one in told} == {"run"}


async def test_too_many_runs_in_a_request_end_the_stream(service: ScriptedService, runs: Runs) -> None:
    request = pb.WaitRunsRequest(run_ids=[f"r{n}" for n in range(bulk_waits.MAX_RUNS + 1)])
    async with serving(service) as served:
        failure = await failing(served.runs.WaitRuns(iter([request])).read())
    assert failure.code.name == "INVALID_ARGUMENT"
    assert "run_ids" in failure.violations
    assert runs.asked == []


async def test_a_stream_that_waits_for_as_many_as_it_may_is_read_when_some_have_ended(
    service: ScriptedService, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_waits, "MAX_WAITING", 3)
    async with serving(service) as served:
        waits = Open(served)
        waits.name("a", "b", "c")
        waits.name("d")
        await eventually_async(lambda: len(runs.asked) == 3)
        await asyncio.sleep(0.1)
        assert len(runs.asked) == 3
        runs.end("b")
        assert await waits.read() == ["b"]
        await eventually_async(lambda: runs.asked[-1] == "d")
        waits.stream.cancel()


@pytest.mark.parametrize("most", [1, 10_000], ids=["full", "with room"])
async def test_a_drain_ends_a_stream_that_waits_and_tells_when_to_come_again(
    service: ScriptedService, runs: Runs, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(bulk_waits, "MAX_WAITING", most)
    async with serving(service) as served:
        waits = Open(served)
        waits.name("a")
        waits.name("b")
        await eventually_async(lambda: "a" in runs.asked)
        await served.server.drain()
        failure = await failing(asyncio.wait_for(waits.stream.read(), 10))
    assert failure.code.name == "UNAVAILABLE"
    assert failure.retry_delay_s is not None


async def test_a_client_that_goes_away_leaves_no_wait_behind(service: ScriptedService, runs: Runs) -> None:
    async with serving(service) as served:
        waits = Open(served)
        waits.name("a", "b")
        await eventually_async(lambda: len(runs.asked) == 2)
        waits.stream.cancel()
        await eventually_async(
            lambda: not [task for task in asyncio.all_tasks() if "_await_end" in repr(task.get_coro())]
        )


async def test_many_ends_are_cut_into_messages(
    service: ScriptedService, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"run-{n}" for n in range(500)]
    runs.end(*names)
    monkeypatch.setattr("perdure_service.rpc.agent_runs.RESPONSE_BYTES", 5_000)
    async with serving(service) as served:
        sizes, found = [], []
        async for answer in served.runs.WaitRuns(iter([pb.WaitRunsRequest(run_ids=names)])):
            sizes.append(answer.ByteSize())
            found += [one.run_id for one in answer.runs]
    assert sorted(found) == sorted(names)
    assert max(sizes) < 6_000
