"""The closed loop: who asks next, what is counted, and that an error is not lost."""

from __future__ import annotations

import asyncio

import pytest

from tests.load.loop import closed_loop, quantile, threads_loop


async def test_no_more_are_under_way_than_there_are_clients() -> None:
    now, most = 0, 0

    async def work() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1

    found = await closed_loop(work, 3, 0.02)
    assert most == 3
    assert found["count"] == len(found["latencies_ms"]) >= 3
    assert found["latencies_ms"] == sorted(found["latencies_ms"])


async def test_an_error_ends_the_loop() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await closed_loop(work, 2, 60)


def test_an_error_of_a_thread_is_raised() -> None:
    def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        threads_loop([work, work], 60)


def test_a_quantile_is_a_value_that_was_measured() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 3.0, 4.0, 4.0]
    assert quantile([], 0.5) == 0.0
