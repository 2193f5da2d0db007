"""Past its time to live an executor begins no step body, and does not hold up those that have begun."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from perdure_service.durable.executions import Executions
from perdure_service.durable.leases import Lease

from tests.helpers.waiting import eventually, eventually_async


@pytest.fixture
def lease() -> Lease:
    nothing: Any = None
    return Lease(
        nothing, "me", application_version="1", address="", max_running=1, ttl=timedelta(seconds=1),
        executions=Executions(), lost=lambda: None,
    )  # fmt: skip


async def test_an_asynchronous_step_waits_without_blocking_the_loop(lease: Lease) -> None:
    waiting = asyncio.create_task(lease.gate_async())
    ticks = 0

    async def tick() -> bool:
        nonlocal ticks
        ticks += 1
        return ticks > 5

    await eventually_async(tick)
    assert not waiting.done()
    lease._valid_until = time.monotonic() + 60
    await asyncio.wait_for(waiting, timeout=5)


def test_a_blocking_step_waits_in_its_thread(lease: Lease) -> None:
    thread = threading.Thread(target=lease.gate, daemon=True)
    thread.start()
    assert thread.is_alive()
    lease._valid_until = time.monotonic() + 60
    eventually(lambda: not thread.is_alive())


def test_a_lease_that_was_ended_holds_nobody_up(lease: Lease) -> None:
    lease._stop.set()
    lease.gate()
