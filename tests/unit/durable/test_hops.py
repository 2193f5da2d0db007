"""What needs no thread gets none, nothing blocks the loop, and nothing is done before its commit."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from perdure_service.domain.runs import RunKey
from perdure_service.durable import hops
from perdure_service.durable.executions import Execution
from perdure_service.durable.promises import Promise

from tests.helpers.waiting import eventually


class Stage:
    """A stage that tells where it ran, and can be told to block or to leave its work."""

    def __init__(self, *, blocks: bool = False, leaves: Promise[bool] | None = None, fails: bool = False) -> None:
        self._blocks = blocks
        self._leaves = leaves
        self._fails = fails
        self.left = threading.Event()
        self.threads: list[int] = []

    def __call__(self, value: str = "answer") -> str:
        self.threads.append(threading.get_ident())
        if self._blocks:
            hops.refuse_to_block()
        left = hops.deferral()
        if self._leaves is not None and left is not None:
            left.wait_for(self._leaves)
            self.left.set()
        if self._fails:
            raise ValueError(value)
        return value


def settled(answer: bool) -> Promise[bool]:
    promise: Promise[bool] = Promise()
    promise.set_result(answer)
    return promise


def run(stage: Stage) -> tuple[Any, int]:
    """Returns what a stage answers, and in which thread the loop was."""

    async def main() -> tuple[Any, int]:
        return await hops.answer(stage, "answer"), threading.get_ident()

    return asyncio.run(main())


async def begun(stage: Stage) -> asyncio.Task[Any]:
    """Begins a stage that leaves its work; returns the task that waits for what comes of it."""
    task = asyncio.create_task(hops.answer(stage, "answer"))
    await asyncio.to_thread(stage.left.wait)
    return task


def test_a_stage_that_does_not_block_runs_on_the_loop() -> None:
    stage = Stage()
    result, loop_thread = run(stage)
    assert (result, stage.threads) == ("answer", [loop_thread])


def test_a_stage_that_must_block_runs_again_in_a_thread_where_it_may() -> None:
    stage = Stage(blocks=True)
    result, loop_thread = run(stage)
    assert result == "answer"
    assert stage.threads[0] == loop_thread
    assert len(stage.threads) == 2
    assert stage.threads[1] != loop_thread


def test_work_that_was_written_is_answered_without_a_thread() -> None:
    stage = Stage(leaves=settled(True))
    result, loop_thread = run(stage)
    assert (result, stage.threads) == ("answer", [loop_thread])


def turns_taken(step: Callable[[], Awaitable[object]]) -> list[str]:
    """Returns who ran in which order: code that makes a step three times, and another task."""
    seen: list[str] = []

    async def others() -> None:
        for _ in range(3):
            seen.append("another one")
            await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(others())
        for _ in range(3):
            await step()
            seen.append("the step")
        await task

    asyncio.run(main())
    return seen


def test_code_whose_work_is_always_written_at_once_lets_others_run() -> None:
    seen = turns_taken(lambda: hops.answer(Stage(leaves=settled(True))))
    assert seen == ["another one", "the step"] * 3


@pytest.mark.parametrize("ending", ["false", "failed", "cancelled"])
def test_work_that_may_not_be_written_is_done_in_a_thread_without_a_deferral(ending: str) -> None:
    promise: Promise[bool] = Promise()
    if ending == "false":
        promise.set_result(False)
    elif ending == "failed":
        promise.set_exception(RuntimeError("the batch failed"))
    else:
        promise.cancel()
    stage = Stage(leaves=promise)
    result, loop_thread = run(stage)
    assert result == "answer"
    assert len(stage.threads) == 2
    assert stage.threads[1] != loop_thread


@pytest.mark.parametrize("answer", [True, False])
def test_an_answer_waits_until_the_work_is_settled(answer: bool) -> None:
    promise: Promise[bool] = Promise()
    stage = Stage(leaves=promise)

    async def main() -> tuple[bool, str]:
        task = await begun(stage)
        early = task.done()
        await asyncio.to_thread(promise.set_result, answer)
        return early, await task

    assert asyncio.run(main()) == (False, "answer")
    assert len(stage.threads) == (1 if answer else 2)


@pytest.mark.parametrize("promise", [None, True, False])
def test_what_a_stage_raises_is_raised(promise: bool | None) -> None:
    stage = Stage(leaves=None if promise is None else settled(promise), fails=True)
    with pytest.raises(ValueError, match=r"^answer$"):
        run(stage)
    assert len(stage.threads) == (2 if promise is False else 1)


def test_what_a_stage_raises_in_its_thread_is_raised() -> None:
    with pytest.raises(ValueError, match=r"^answer$"):
        run(Stage(blocks=True, fails=True))


@pytest.mark.parametrize("answer", [True, False])
def test_work_of_a_cancelled_task_goes_its_way(answer: bool) -> None:
    promise: Promise[bool] = Promise()
    stage = Stage(leaves=promise)

    async def main() -> None:
        task = await begun(stage)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        promise.set_result(answer)
        await asyncio.to_thread(eventually, lambda: len(stage.threads) == (1 if answer else 2))

    asyncio.run(main())


def test_work_of_a_task_that_is_cancelled_in_the_very_turn_of_the_answer_goes_its_way() -> None:
    promise: Promise[bool] = Promise()
    stage = Stage(leaves=promise)

    async def main() -> None:
        task = await begun(stage)
        calls = hops.calls_into(asyncio.get_running_loop())

        def tell_and_cancel() -> None:
            with hops.waking_once():
                promise.set_result(False)
                calls.post(task.cancel)

        await asyncio.to_thread(tell_and_cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(eventually, lambda: len(stage.threads) == 2)

    asyncio.run(main())


def test_work_that_waits_for_a_thread_to_decide_it_is_not_cancelled() -> None:
    stage = Stage(leaves=settled(False))
    go_on = threading.Event()
    busy = [hops._deciders.submit(go_on.wait, 10) for _ in range(hops.DECIDERS)]

    async def main() -> None:
        task = asyncio.create_task(hops.answer(stage, "answer"))
        await asyncio.to_thread(eventually, lambda: hops._deciders._work_queue.qsize() > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(stage.threads) == 1
        go_on.set()
        await asyncio.to_thread(eventually, lambda: len(stage.threads) == 2)

    try:
        asyncio.run(main())
    finally:
        go_on.set()
    assert all(one.result() for one in busy)


def test_an_answer_that_comes_when_the_loop_is_closed_is_nobodys() -> None:
    promise: Promise[bool] = Promise()
    stage = Stage(leaves=promise)

    async def main() -> None:
        task = await begun(stage)
        task.cancel()

    asyncio.run(main())
    promise.set_result(False)
    assert len(stage.threads) == 1


class Going:
    """Code that went ahead of a stage."""

    def __init__(self, promise: Promise[bool], *, fails_in_thread: bool = False) -> None:
        self.promise = promise
        self.hurried: list[bool] = []
        self.decides = threading.Event()
        self.may_decide = threading.Event()
        self.may_decide.set()
        self.waited_while_deciding = False
        self._fails = fails_in_thread
        self.ahead: hops.Ahead | None = None

    def stage(self) -> str:
        left = hops.deferral()
        if left is not None:
            assert left.ahead
            self.ahead = hops.Ahead(self.promise, self.hurried.append, self.stage)
            return "answer"
        assert self.ahead is not None
        self.ahead.wait()  # of what decides itself
        self.waited_while_deciding = True
        self.decides.set()
        self.may_decide.wait(10)
        if self._fails:
            raise ValueError("it cannot be")
        return "another answer, which nobody hears"

    async def answer(self) -> hops.Ahead:
        assert await hops.answer(self.stage, ahead=True) == "answer"
        assert self.ahead is not None
        return self.ahead


def test_who_goes_ahead_has_the_answer_at_once_and_waits_for_the_work_later() -> None:
    going = Going(Promise())

    async def main() -> list[bool]:
        ahead = await going.answer()
        seen = [ahead.over]
        waits = asyncio.create_task(ahead.settled())
        await asyncio.sleep(0)
        seen.append(waits.done())
        await asyncio.to_thread(going.promise.set_result, True)
        await waits
        return [*seen, ahead.over]

    assert asyncio.run(main()) == [False, False, True]
    assert going.hurried == [False]
    assert not going.decides.is_set()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("somebody_waits", [False, True])
def test_work_that_may_not_be_written_is_decided_whether_or_not_somebody_waits(
    fails: bool, somebody_waits: bool
) -> None:
    going = Going(Promise(), fails_in_thread=fails)
    going.may_decide.clear()

    async def main() -> None:
        ahead = await going.answer()
        waits = asyncio.create_task(ahead.settled()) if somebody_waits else None
        await asyncio.to_thread(going.promise.set_result, False)
        assert await asyncio.to_thread(going.decides.wait, 10)
        assert not ahead.over
        assert waits is None or not waits.done()
        going.may_decide.set()
        for wait in (waits or ahead.settled(), asyncio.to_thread(ahead.wait)):
            if fails:
                with pytest.raises(ValueError, match="it cannot be"):
                    await wait
            else:
                await wait
        assert ahead.over

    asyncio.run(main())
    assert going.waited_while_deciding, "who decides does not wait for itself"


def test_what_another_commit_takes_with_it_is_nobodys_to_decide() -> None:
    going = Going(Promise())

    async def main() -> None:
        ahead = await going.answer()
        going.promise.cancel()
        await ahead.settled()
        await asyncio.to_thread(ahead.wait)
        assert ahead.over

    asyncio.run(main())
    assert not going.decides.is_set()


def test_an_execution_is_ahead_until_the_work_is_committed_whoever_has_stopped_waiting() -> None:
    going = Going(Promise())
    execution = Execution(RunKey.of_api("default", "run"), "token", "agent", "1", 1, "0" * 32)

    async def main() -> None:
        await execution.settled()  # of nothing
        execution.ahead = await going.answer()
        waits = asyncio.create_task(execution.settled())
        await asyncio.sleep(0)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert execution.ahead is going.ahead
        with hops.refusing(), pytest.raises(hops.NeedsThread):
            execution.settle()
        blocks = asyncio.create_task(asyncio.to_thread(execution.settle))
        await asyncio.to_thread(eventually, lambda: True in going.hurried)
        going.promise.set_result(True)
        await blocks
        assert execution.ahead is None
        with hops.refusing():
            execution.settle()

    asyncio.run(main())


def test_code_that_finds_each_commit_done_lets_others_run() -> None:
    async def step() -> None:
        await (await Going(settled(True)).answer()).settled()

    assert turns_taken(step) == ["another one", "the step"] * 3


def test_a_thread_that_waits_says_that_it_is_held_up() -> None:
    going = Going(Promise())

    async def main() -> None:
        ahead = await going.answer()
        waits = asyncio.create_task(asyncio.to_thread(ahead.wait))
        await asyncio.to_thread(eventually, lambda: going.hurried == [True])
        going.promise.set_result(True)
        await waits

    asyncio.run(main())


def test_what_a_stage_raises_is_not_gone_ahead_of() -> None:
    promise: Promise[bool] = Promise()
    stage = Stage(leaves=promise, fails=True)

    async def main() -> None:
        task = asyncio.create_task(hops.answer(stage, "answer", ahead=True))
        await asyncio.to_thread(stage.left.wait)
        assert not task.done()
        promise.set_result(True)
        with pytest.raises(ValueError, match=r"^answer$"):
            await task

    asyncio.run(main())


def test_a_stage_leaves_one_piece_of_work_and_does_nothing_after_it() -> None:
    def twice() -> None:
        left = hops.deferral()
        assert left is not None
        left.wait_for(settled(True))
        left.wait_for(settled(True))

    def blocks_after_it() -> None:
        left = hops.deferral()
        assert left is not None
        left.wait_for(settled(True))
        hops.refuse_to_block()

    for stage in (twice, blocks_after_it):
        with pytest.raises(RuntimeError):
            asyncio.run(hops.answer(stage))


def test_nothing_refuses_to_block_outside_of_a_stage() -> None:
    hops.refuse_to_block()
    assert hops.deferral() is None
    with hops.refusing():
        assert hops.deferral() is None, "nothing awaits what would be left here"
        with pytest.raises(hops.NeedsThread):
            hops.refuse_to_block()
    hops.refuse_to_block()


def test_what_is_done_for_everybody_within_a_stage_may_block_and_is_no_part_of_it() -> None:
    found: list[object] = []

    def stage() -> None:
        with hops.as_a_thread():
            hops.refuse_to_block()
            found.append(hops.deferral())
        found.append(hops.deferral())
        hops.refuse_to_block()

    with pytest.raises(hops.NeedsThread), hops.refusing(left := hops.Deferral()):
        stage()
    assert found == [None, left]


def test_calls_from_other_threads_come_in_order_and_share_wake_ups() -> None:
    got: list[int] = []

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        wakes = 0
        plain = loop.call_soon_threadsafe

        def counted(callback: Callable[..., object], *arguments: Any, **rest: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return plain(callback, *arguments, **rest)

        loop.call_soon_threadsafe = counted  # type: ignore[assignment]

        def post() -> None:
            for number in range(100):
                hops.calls_into(loop).post(functools.partial(got.append, number))

        thread = threading.Thread(target=post)
        thread.start()
        thread.join()  # the loop does not come to it meanwhile
        from_outside = wakes
        post()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        post()  # from its own thread it need not be woken
        await asyncio.sleep(0)
        return [from_outside, wakes]

    assert asyncio.run(main()) == [1, 1]
    assert got == list(range(100)) * 3


def test_a_thread_that_tells_many_things_wakes_the_loop_once_and_when_it_has_told_them() -> None:
    got: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls = hops.calls_into(loop)
        told, woken_before = threading.Event(), []

        def tell() -> None:
            with hops.waking_once():
                for number in range(10):
                    calls.post(functools.partial(got.append, number))
                    with hops.waking_once():
                        calls.post(functools.partial(got.append, -number))
                told.set()
                loop.call_soon_threadsafe(woken_before.append, len(got))  # the loop runs, and was not woken for these
                eventually(lambda: bool(woken_before), 5)

        await asyncio.to_thread(tell)
        await asyncio.sleep(0)
        assert woken_before == [0]

    asyncio.run(main())
    assert got == [value for number in range(10) for value in (number, -number)]


def test_what_is_told_before_an_error_still_wakes_the_loop() -> None:
    got: list[str] = []

    async def main() -> None:
        calls = hops.calls_into(asyncio.get_running_loop())

        def tell() -> None:
            with hops.waking_once():
                calls.post(lambda: got.append("before"))
                raise ValueError("after")

        with pytest.raises(ValueError, match="after"):
            tell()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert got == ["before"]


def test_a_call_that_fails_does_not_take_the_others_with_it() -> None:
    got: list[str] = []
    told: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: told.append(str(context["exception"])))
        hops.calls_into(loop).post(lambda: [][0])
        hops.calls_into(loop).post(lambda: got.append("next"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert (got, told) == (["next"], ["list index out of range"])


def test_code_is_found_by_the_way_to_it_or_not_at_all() -> None:
    def outer() -> Any:
        def inner() -> None: ...

        return inner

    assert hops.code_within(outer.__code__, "inner") is outer().__code__
    with pytest.raises(LookupError):
        hops.code_within(outer.__code__, "another")
