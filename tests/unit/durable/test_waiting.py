"""WaitRun: an end is not missed whenever it comes, and a run is not looked at before there is something to see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from perdure_service.domain.runs import Run, RunKey, RunState
from perdure_service.durable import waiting
from perdure_service.durable.executions import Execution, Executions
from perdure_service.durable.waiting import Waiting
from perdure_service.errors import RunNotFound
from perdure_service.store.tailer import Tailer

from tests.helpers.waiting import eventually_async
from tests.unit.rpc.doubles import a_run

RUN = RunKey.of_api("default", "run")
LONG_S = 60.0


class World:
    """A run, whoever executes it, and what is asked about it."""

    def __init__(self, poll_s: float = LONG_S) -> None:
        self.run: Run | None = a_run(key=RUN)
        self.executions = Executions()
        self.tailer = Tailer(lambda _seen: [], self.gone, self.closed, poll_s=poll_s)
        self.waiting = Waiting(self.get, self.executions, self.tailer)
        self.reads = 0
        self.looks = 0
        self.before_read: list[asyncio.Event] = []

    async def get(self, namespace: str, run_id: str, *, full: bool) -> Run:
        self.reads += 1
        found = self.run
        await asyncio.sleep(0)  # what comes now is not in what was read
        if self.before_read:
            await self.before_read.pop().wait()
        if found is None:
            raise RunNotFound("gone")
        return found

    def closed(self, workflow_ids: Sequence[str]) -> Sequence[str]:
        self.looks += 1
        return [one for one in workflow_ids if self.run is not None and self.run.state.terminal]

    def gone(self, workflow_ids: Sequence[str]) -> Sequence[str]:
        return [one for one in workflow_ids if self.run is None]

    def execute(self) -> Execution:
        return self.executions.add(Execution(RUN, "token", "agent", "1", 1, "0" * 32))

    def end(self) -> None:
        self.run = a_run(key=RUN, state=RunState.SUCCEEDED)

    def end_here(self, execution: Execution) -> None:
        """As the runtime tells of a commit."""
        self.end()
        execution.ended = True
        self.tailer.ended([RUN.workflow_id])
        self.tailer.hint([RUN.workflow_id])
        self.executions.remove(execution)

    def wait(self, timeout_s: float = LONG_S) -> asyncio.Task[tuple[Run, bool]]:
        return asyncio.create_task(self.waiting.wait("default", "run", full=False, timeout_s=timeout_s))

    async def waits(self) -> None:
        await eventually_async(lambda: self.tailer.watchers == 1)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    world.tailer.start()
    yield world
    assert world.tailer.watchers == 0, "nobody is left registered"
    await world.tailer.stop()


async def test_a_run_that_executes_here_is_read_once_at_its_end(world: World) -> None:
    execution = world.execute()
    task = world.wait()
    await world.waits()
    world.tailer.hint([RUN.workflow_id])  # a step
    await asyncio.sleep(0)
    assert world.reads == 0
    world.end_here(execution)
    run, timed_out = await task
    assert (run.state, timed_out) == (RunState.SUCCEEDED, False)
    assert (world.reads, world.looks) == (1, 0)


async def test_an_end_that_was_told_before_the_wait_registered_is_seen_though_the_execution_is_still_there(
    world: World,
) -> None:
    execution = world.execute()
    world.end()
    execution.ended = True
    world.tailer.ended([RUN.workflow_id])
    run, timed_out = await world.wait()
    assert (run.state, timed_out, world.reads) == (RunState.SUCCEEDED, False, 1)
    world.executions.remove(execution)


async def test_a_run_that_has_ended_is_read_once(world: World) -> None:
    world.end()
    assert (await world.wait())[1] is False
    assert (world.reads, world.looks) == (1, 0)


async def test_an_end_between_the_look_and_the_wait_is_not_missed(world: World) -> None:
    goes_on = asyncio.Event()
    world.before_read = [goes_on]
    task = world.wait()
    await eventually_async(lambda: world.reads == 1)
    world.end()
    world.tailer.hint([RUN.workflow_id])
    await eventually_async(lambda: world.looks == 1)
    goes_on.set()  # with the run as it was before
    assert (await task)[0].state is RunState.SUCCEEDED
    assert world.reads == 2


async def test_news_of_a_run_elsewhere_that_are_not_its_end_cause_no_read_of_it(world: World) -> None:
    task = world.wait()
    await eventually_async(lambda: world.reads == 1)
    for number in range(1, 4):
        world.tailer.hint([RUN.workflow_id])
        await eventually_async(lambda number=number: world.looks == number)
    assert world.reads == 1
    world.end()
    world.tailer.hint([RUN.workflow_id])
    assert (await task)[0].state is RunState.SUCCEEDED
    assert world.reads == 2


async def test_a_run_that_leaves_this_process_is_followed_wherever_it_goes(world: World) -> None:
    execution = world.execute()
    task = world.wait()
    await world.waits()
    world.executions.kill(execution, "its run is parked")
    world.end()  # by another server
    world.tailer.hint([RUN.workflow_id])
    assert (await task)[0].state is RunState.SUCCEEDED
    assert (world.reads, world.looks) == (1, 1)


async def test_a_run_that_is_taken_away_and_ends_elsewhere_unheard_is_found_by_the_poll() -> None:
    world = World(poll_s=0.02)
    world.tailer.start()
    execution = world.execute()
    task = world.wait()
    await world.waits()
    world.end()
    assert (await task)[0].state is RunState.SUCCEEDED
    world.executions.kill(execution, "its run was taken away")
    await world.tailer.stop()


async def test_a_wait_that_nobody_wakes_looks_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RECHECK_S", 0.02)
    execution = world.execute()
    task = world.wait()
    await eventually_async(lambda: world.reads > 2)
    world.end()
    assert (await task)[0].state is RunState.SUCCEEDED
    world.executions.remove(execution)


async def test_a_run_that_is_deleted_while_it_is_waited_for_is_not_found() -> None:
    world = World(poll_s=0.02)
    world.tailer.start()
    task = world.wait()
    await eventually_async(lambda: world.reads == 1)
    world.run = None
    with pytest.raises(RunNotFound):
        await task
    assert world.tailer.watchers == 0
    await world.tailer.stop()


@pytest.mark.parametrize("here", [True, False])
async def test_when_the_time_is_up_the_run_is_answered_as_it_is(world: World, here: bool) -> None:
    execution = world.execute() if here else None
    run, timed_out = await world.wait(timeout_s=0.05)
    assert (run.state, timed_out) == (RunState.RUNNING, True)
    assert world.reads == (1 if here else 2)
    run, timed_out = await world.wait(timeout_s=0)
    assert (run.state, timed_out) == (RunState.RUNNING, True)
    if execution is not None:
        world.executions.remove(execution)


async def test_a_caller_that_gives_up_leaves_nothing_behind(world: World) -> None:
    execution = world.execute()
    task = world.wait()
    await world.waits()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    world.executions.remove(execution)


async def test_another_namespaces_run_of_this_id_is_not_taken_for_it(world: World) -> None:
    other = RunKey("other", "run_", "run_")  # a foreign workflow's id is the same in all namespaces
    execution = world.executions.add(Execution(other, "token", "agent", "1", 1, "0" * 32))
    world.run = None
    with pytest.raises(RunNotFound):
        await world.waiting.wait("default", "run_", full=False, timeout_s=LONG_S)
    world.executions.remove(execution)


async def test_a_run_with_a_workflow_id_of_its_own_is_waited_for_under_that(world: World) -> None:
    world.run = a_run(key=RunKey.foreign("default", "run"))
    task = world.wait()
    await eventually_async(lambda: world.reads == 2)
    world.run = a_run(key=RunKey.foreign("default", "run"), state=RunState.FAILED)
    world.tailer.hint(["run"])
    assert (await task)[0].state is RunState.FAILED


async def test_a_start_that_may_be_a_repeat_says_nothing_about_the_run_before_it_stands(world: World) -> None:
    perhaps = world.executions.add(Execution(RUN, "repeat", "agent", "1", 1, "0" * 32), perhaps=True)
    world.end()  # long ago
    assert (await world.wait())[0].state is RunState.SUCCEEDED
    executes = world.execute()
    assert world.executions.newest(RUN.workflow_id) is executes
    world.executions.remove(perhaps)
    assert world.executions.newest(RUN.workflow_id) is executes
    world.executions.remove(executes)


def test_a_start_that_stands_is_the_newest_unless_it_has_left() -> None:
    executions = Executions()
    first = executions.add(Execution(RUN, "first", "agent", "1", 1, "0" * 32), perhaps=True)
    assert executions.newest(RUN.workflow_id) is None
    executions.stands(first)
    assert executions.newest(RUN.workflow_id) is first
    executions.remove(first)
    executions.stands(first)
    assert executions.newest(RUN.workflow_id) is None


def test_the_newest_execution_of_a_run_is_known_until_it_leaves() -> None:
    executions = Executions()
    first = executions.add(Execution(RUN, "first", "agent", "1", 1, "0" * 32))
    second = executions.add(Execution(RUN, "second", "agent", "1", 2, "0" * 32))
    assert (executions.newest(RUN.workflow_id), bool(first.dead)) == (second, True)
    executions.remove(first)
    assert executions.newest(RUN.workflow_id) is second
    executions.remove(second)
    assert executions.newest(RUN.workflow_id) is None
