"""A loop that asks its sockets less often misses nothing, and keeps nobody waiting who has nothing else to wait for."""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from perdure_service import event_loop
from perdure_service.event_loop import UNASKED, SeldomAsking


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        yield here, there


def test_only_questions_that_do_not_wait_are_left_out_and_not_all_of_them(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    here, there = pair
    with SeldomAsking() as selector:
        selector.register(here, selectors.EVENT_READ)
        there.send(b"x")
        for _ in range(3):
            asked = [bool(selector.select(0)) for _ in range(UNASKED + 1)]
            assert asked == [False] * UNASKED + [True]
        assert selector.select(None)
        assert selector.select(60)
        selector.select(0)
        assert selector.select(60), "who would wait is answered"


def test_who_wakes_a_loop_that_is_closed_at_that_moment_is_not_told_by_the_bell() -> None:
    selector = SeldomAsking()
    selector._sleeps = True
    selector.close()
    selector.wake()


def test_a_busy_loop_serves_its_sockets_within_some_turns(pair: tuple[socket.socket, socket.socket]) -> None:
    async def main() -> int:
        here, there = pair
        loop = asyncio.get_running_loop()
        reading = loop.create_task(loop.sock_recv(here, 1))
        await asyncio.sleep(0)
        there.send(b"x")
        turns = 0
        while not reading.done():
            await asyncio.sleep(0)  # something is always ready
            turns += 1
        assert await reading == b"x"
        return turns

    assert event_loop.run(main()) <= 2 * UNASKED


def test_a_sleeping_loop_is_woken_by_one_write_and_has_nothing_to_read() -> None:
    if not SeldomAsking.can_be_woken:
        pytest.skip("asyncio's own way, without an eventfd")
    with SeldomAsking() as selector:
        began = time.monotonic()
        for _ in range(3):
            timer = threading.Timer(0.05, selector.wake)
            timer.start()
            assert selector.select(60) == []
            timer.join()
        assert time.monotonic() - began < 30
        began = time.monotonic()
        assert selector.select(0.05) == []
        assert time.monotonic() - began >= 0.04, "what woke it once does not wake it again"


def test_a_call_that_comes_before_the_loop_sleeps_keeps_it_from_sleeping(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    with SeldomAsking() as selector:
        assert selector.select(0) == []
        selector.wake()  # the loop is awake, and has looked for calls already
        began = time.monotonic()
        assert selector.select(60) == []
        assert time.monotonic() - began < 30

        here, there = pair
        selector.register(here, selectors.EVENT_READ)
        selector.wake()
        assert selector.select(0) == [], "it was not to sleep, and sees the call in its next turn"
        there.send(b"x")
        assert selector.select(60), "that call is not taken for another one"


def test_asyncio_wakes_its_loops_by_the_method_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    if not SeldomAsking.can_be_woken:
        pytest.skip("asyncio's own way, without an eventfd")
    woken: list[int] = []
    monkeypatch.setattr(SeldomAsking, "wake", lambda _self: woken.append(1))
    loop = event_loop.new()
    loop.call_soon_threadsafe(woken.append, 2)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert woken == [1, 2], "an upgrade of Python has another way"


def test_no_call_between_two_loops_is_ever_missed() -> None:
    """Each call is the only thing that the other loop waits for: one that is missed hangs."""
    loops = [event_loop.new() for _ in range(3)]
    calls, rounds, done = [0, 0], 20_000, threading.Event()

    def call(who: int, into: int) -> None:
        calls[who] += 1
        if calls[who] < rounds:
            loops[into].call_soon_threadsafe(call, who, (into + 1 + who) % 3)
        elif min(calls) >= rounds:
            done.set()

    threads = [threading.Thread(target=loop.run_forever) for loop in loops]
    for thread in threads:
        thread.start()
    for who in range(2):
        loops[who].call_soon_threadsafe(call, who, who)
    came = done.wait(20)
    for loop in loops:
        loop.call_soon_threadsafe(loop.stop)
    for thread, loop in zip(threads, loops, strict=True):
        thread.join(10)
        loop.close()

    assert came, calls


def test_a_closed_loop_is_not_woken_and_its_bell_is_nobody_elses() -> None:
    loop = event_loop.new()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    with pytest.raises(RuntimeError):
        loop.call_soon_threadsafe(lambda: None)


def test_a_signal_wakes_it() -> None:
    async def main() -> None:
        came = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, came.set)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        await asyncio.wait_for(came.wait(), 30)

    event_loop.run(main())


def test_threads_timers_and_errors_come_through() -> None:
    async def main() -> float:
        loop, called = asyncio.get_running_loop(), asyncio.Event()
        thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(called.set))
        thread.start()
        await called.wait()  # it has nothing else to do
        thread.join()
        began = time.monotonic()
        await asyncio.sleep(0.01)
        return time.monotonic() - began

    assert event_loop.run(main()) >= 0.009

    async def fails() -> None:
        raise LookupError("it")

    with pytest.raises(LookupError, match="it"):
        event_loop.run(fails())
