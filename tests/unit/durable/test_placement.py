"""Slots, limits of agents and queues, and who is woken: without a database."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
from perdure_service.domain.queues import QueueLimits, Queues
from perdure_service.domain.runs import RunKey
from perdure_service.durable.executions import AgentKey, Execution, Executions
from perdure_service.durable.placement import CLAIM_BATCH, Placement
from perdure_service.durable.queue_threads import Bells, _StopOrBell
from perdure_service.errors import ConfigurationError, InvalidArgument

A, B = ("a", "1"), ("b", "1")
MAIN = QueueLimits("main")


class Executor:
    """A placement, what it runs, and the queues it has woken."""

    def __init__(self, max_running: int, limits: Mapping[AgentKey, int]) -> None:
        self.executions = Executions()
        self.placement = Placement(self.executions, max_running, lambda: limits)
        self.woken: list[str] = []
        self.placement.wake = self.woken.append

    def run(self, agent: AgentKey = A, queue: str = "main") -> Execution:
        number = len(self.executions)
        execution = Execution(
            RunKey("n", str(number), f"n.{number}.{id(object())}"), "x", *agent, number=1, trace_id="", queue=queue
        )
        return self.executions.add(execution)

    def begins(self, agent: AgentKey = A, queue: str = "main") -> bool:
        with self.placement.start(queue, agent) as here:
            return here

    def claim(self, found: list[AgentKey], limits: QueueLimits = MAIN, *, fair: bool = False) -> list[int]:
        """Claims of what waits, in order; returns the places of what was taken."""
        with self.placement.claim(limits) as room:
            seen = found[: room.left]
            places, _ = self.placement.choose(room, seen, room.left, fair=fair)
            for place in places:
                self.run(seen[place], limits.name)
        return places


@pytest.fixture
def executor() -> Executor:
    return Executor(4, {A: 0, B: 2})


@pytest.mark.parametrize(
    ("limits", "frees"),
    [(MAIN, True), (QueueLimits("main", worker_concurrency=4), True), (MAIN, False)],
)
def test_a_slot_that_frees_while_a_full_executor_looks_is_not_missed(
    executor: Executor, limits: QueueLimits, *, frees: bool
) -> None:
    running = [executor.run() for _ in range(4)]
    with executor.placement.claim(limits) as room:
        assert room.left == 0
        if frees:
            executor.executions.remove(running[0])
    assert executor.woken == (["main"] if frees else [])


def test_the_place_of_an_agent_that_frees_while_a_claim_looks_is_not_missed(executor: Executor) -> None:
    running = [executor.run(B) for _ in range(2)]
    with executor.placement.claim(MAIN) as room:
        assert room.full_agents == {B}
        executor.executions.remove(running[0])
    assert executor.woken == ["main"]


def test_a_start_holds_a_slot_until_it_is_committed(executor: Executor) -> None:
    for _ in range(3):
        executor.run()
    with executor.placement.start("main", A) as first, executor.placement.start("main", A) as second:
        assert (first, second) == (True, False)
    assert executor.begins()


def test_an_agent_at_its_limit_does_not_begin_and_is_not_claimed(executor: Executor) -> None:
    executor.run(B)
    assert executor.claim([B, B, A]) == [0, 2]
    assert executor.woken == ["main"], "others may wait behind what it could not take"
    assert not executor.begins(B)
    with executor.placement.child("main", B) as here:
        assert not here


def test_a_child_begins_although_no_slot_is_free(executor: Executor) -> None:
    for _ in range(4):
        executor.run()
    assert not executor.begins()
    with executor.placement.child("main", A) as here:
        assert here


def test_what_a_claim_may_take_is_not_given_to_starts(executor: Executor) -> None:
    executor.run()
    with executor.placement.claim(MAIN) as room:
        assert room.total == 3
        assert not executor.begins()
    assert executor.begins()


def test_a_queue_with_a_shared_limit_is_only_claimed_from(executor: Executor) -> None:
    for limits in (QueueLimits("s", global_concurrency=9), QueueLimits("s", rate_limit=9, rate_period_s=1)):
        executor.placement.saw(limits)
        assert not executor.begins(queue="s")
        with executor.placement.child("s", A) as here:
            assert not here


def test_a_queue_keeps_its_limit_on_this_executor(executor: Executor) -> None:
    limits = QueueLimits("w", worker_concurrency=1)
    executor.placement.saw(limits)
    with executor.placement.start("w", A) as here:
        assert here
        assert not executor.begins(queue="w")
    held = executor.run(queue="w")
    assert executor.claim([A], limits) == []
    executor.run()
    executor.executions.remove(held)
    assert executor.woken == ["w"]


def test_a_start_does_not_overtake_what_waits_for_a_slot(executor: Executor) -> None:
    runs = [executor.run() for _ in range(4)]
    executor.placement.queued("main")
    assert executor.claim([A]) == []
    executor.woken.clear()
    executor.executions.remove(runs[0])
    assert executor.woken == ["main"]
    assert not executor.begins()
    assert executor.claim([A]) == [0]
    executor.executions.remove(runs[1])
    assert executor.claim([]) == []
    assert executor.begins()


def test_what_waits_for_another_agent_is_not_in_the_way(executor: Executor) -> None:
    runs = [executor.run(B), executor.run(B)]
    assert executor.claim([]) == []
    assert executor.begins(A)
    executor.executions.remove(runs[0])
    assert executor.woken == ["main"]


def test_the_end_of_a_run_wakes_nobody_when_nothing_waits(executor: Executor) -> None:
    runs = [executor.run() for _ in range(3)]
    assert executor.claim([]) == []
    for run in runs:
        executor.executions.remove(run)
    assert executor.woken == []


def test_an_agent_with_its_share_lets_others_go_first_when_more_wait_than_fit(executor: Executor) -> None:
    with executor.placement.claim(MAIN) as room:
        assert room.share == 2
        assert executor.placement.choose(room, [A, A, A, A], 4, fair=True) == ([0, 1], {A})
        assert executor.placement.choose(room, [A, A], 2, fair=False) == ([0, 1], set())
    assert executor.claim([A, A, A], fair=True) == [0, 1, 2], "nobody else waits"


def test_a_claim_that_took_all_it_may_is_followed_by_another_while_there_are_slots() -> None:
    executor = Executor(2 * CLAIM_BATCH, {A: 0})
    assert len(executor.claim([A] * 300)) == CLAIM_BATCH
    assert executor.woken == ["main"]
    executor.woken.clear()
    assert len(executor.claim([A] * 300)) == CLAIM_BATCH
    assert executor.woken == []


def test_after_a_claim_that_failed_nobody_is_overtaken(executor: Executor) -> None:
    with pytest.raises(ConnectionResetError), executor.placement.claim(MAIN):
        raise ConnectionResetError
    assert not executor.begins()
    assert executor.claim([]) == []
    assert executor.begins()


def test_a_ring_ends_the_wait_of_a_queue_thread_and_the_end_does_too() -> None:
    bells, stop = Bells(3600), threading.Event()
    bells.ring("main")  # before its thread has begun
    waits = _StopOrBell(stop, bells._bells["main"], 3600)
    assert waits.wait(3600) is False
    bells.ring_all()
    assert waits.wait(3600) is False
    threading.Timer(0.05, stop.set).start()
    assert waits.wait(3600) is True
    assert waits.is_set()


def test_a_start_names_a_queue_that_is_declared() -> None:
    queues = Queues([QueueLimits("mail")])
    assert queues.of_start("", "") == "perdure"
    assert queues.of_start("", "mail") == "mail"
    assert queues.of_start("perdure", "mail") == "perdure"
    with pytest.raises(InvalidArgument, match="mail, perdure"):
        queues.of_start("gpu", "mail")
    queues.check_agents({"a@1": "", "b@1": "mail"})
    with pytest.raises(ConfigurationError, match=r"b@1 wants the queue 'gpu'.*PERDURE_QUEUES"):
        queues.check_agents({"a@1": "", "b@1": "gpu"})


def test_a_claim_that_knows_of_nothing_that_waits_leaves_half_of_the_slots_to_starts() -> None:
    executor = Executor(60, {A: 0})
    with executor.placement.claim(MAIN) as room:
        assert room.total == 30
    executor.placement.queued(MAIN.name)
    with executor.placement.claim(MAIN) as room:
        assert room.total == 60, "who waits goes before who comes"
