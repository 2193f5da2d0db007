"""A loop that asks its sockets less often misses nothing, and keeps nobody waiting who has nothing else to wait for."""

from __future__ import annotations

import asyncio
import selectors
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
