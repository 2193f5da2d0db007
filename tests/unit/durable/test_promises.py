"""A promise is settled once, tells everybody, and keeps nobody."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from perdure_service.durable.promises import Promise

THREADS = 8


def test_a_value_is_told_to_those_who_came_before_and_after() -> None:
    promise: Promise[int] = Promise()
    told: list[int] = []
    promise.add_done_callback(lambda done: told.append(done.result()))
    assert not promise.done()
    promise.set_result(7)
    promise.add_done_callback(lambda done: told.append(done.result() + 1))
    assert told == [7, 8]
    assert (promise.done(), promise.cancelled(), promise.exception(), promise.result()) == (True, False, None, 7)


def test_a_failure_is_raised_and_what_is_given_up_is_a_failure_of_its_own() -> None:
    failed: Promise[int] = Promise()
    failed.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match=r"^no$"):
        failed.result()
    assert not failed.cancelled()
    given_up: Promise[int] = Promise()
    given_up.cancel()
    with pytest.raises(CancelledError):
        given_up.result()
    assert given_up.cancelled()


def test_whoever_asks_waits_until_it_is_settled() -> None:
    promise: Promise[int] = Promise()
    with ThreadPoolExecutor(THREADS) as pool:
        asked = [pool.submit(promise.result) for _ in range(THREADS)]
        assert not any(one.done() for one in asked)
        promise.set_result(1)
        assert [one.result(10) for one in asked] == [1] * THREADS


def test_everybody_is_told_once_while_it_is_being_settled() -> None:
    for _ in range(200):
        promise: Promise[int] = Promise()
        told: list[int] = []
        begin = threading.Barrier(3)

        def ask(promise: Promise[int] = promise, told: list[int] = told, begin: threading.Barrier = begin) -> None:
            begin.wait()
            for number in range(5):
                promise.add_done_callback(lambda _, number=number: told.append(number))  # type: ignore[misc]

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        begin.wait()
        promise.set_result(1)
        for thread in threads:
            thread.join()
        assert sorted(told) == sorted([*range(5)] * 2)


def test_who_fails_does_not_keep_the_others_from_being_told() -> None:
    promise: Promise[int] = Promise()
    told: list[str] = []
    promise.add_done_callback(lambda _: 1 / 0)
    promise.add_done_callback(lambda _: told.append("the other one"))
    promise.set_result(1)
    assert told == ["the other one"]


def test_it_does_not_keep_whom_it_has_told() -> None:
    class Waiter:
        def __init__(self, promise: Promise[int]) -> None:
            self.promise = promise
            promise.add_done_callback(self.told)

        def told(self, _promise: Promise[int]) -> None:
            pass

    promise: Promise[int] = Promise()
    waiter = Waiter(promise)
    gone = weakref.ref(waiter)
    promise.set_result(1)
    gc.disable()
    try:
        del waiter
        assert gone() is None
    finally:
        gc.enable()
