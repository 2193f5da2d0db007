"""The tailer: what is new reaches whoever watches, once registered, whatever others do meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.store import tailer as tailer_module
from perdure_service.store.event_log import News
from perdure_service.store.tailer import HINTED_POLL_FACTOR, MAILBOX_PACKS, Subscription, Tailer

from tests.helpers.waiting import eventually_async


class Log:
    """A log in memory: one pack an event."""

    def __init__(self) -> None:
        self.events: dict[str, int] = {}
        self.reads: list[dict[str, int]] = []
        self.missing: list[str] = []
        self.failures = 0

    def news(self, seen: Mapping[str, int]) -> Sequence[News]:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the database is away")
        self.reads.append(dict(seen))
        return [
            News(one, sequence, (Event(EventKind.LOG, 0, sequence=sequence),))
            for one, position in seen.items()
            for sequence in range(position + 1, self.events.get(one, 0) + 1)
        ]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def tailer(log: Log) -> AsyncIterator[Tailer]:
    tailer = Tailer(log.news, lambda ids: [one for one in ids if one in log.missing], poll_s=60)
    tailer.start()
    yield tailer
    await tailer.stop()


def at(tailer: Tailer, subscription: Subscription, *places: tuple[str, int]) -> Subscription:
    for workflow_id, position in places:
        tailer.caught_up(subscription, workflow_id, position)
    return subscription


def got(subscription: Subscription) -> list[tuple[str, int]]:
    return [(pack.workflow_id, pack.first_sequence) for pack in subscription.packs]


async def test_a_watcher_of_several_runs_gets_their_packs_in_one_mailbox(tailer: Tailer, log: Log) -> None:
    log.events = {"a": 3, "b": 5}
    both = at(tailer, tailer.subscribe("a", "b"), ("a", 3), ("b", 5))
    log.events = {"a": 4, "b": 6}
    tailer.hint(["a", "b"])
    await eventually_async(lambda: sorted(got(both)) == [("a", 4), ("b", 6)])
    assert both.behind == set()
    assert both.changed.is_set()


async def test_news_of_many_runs_is_read_at_once(tailer: Tailer, log: Log) -> None:
    names = [f"r{number}" for number in range(500)]
    log.events = dict.fromkeys(names, 1)
    many = at(tailer, tailer.subscribe(*names), *((name, 1) for name in names))
    await eventually_async(lambda: log.reads)
    log.reads.clear()
    log.events["r7"] = 2
    tailer.hint(names)
    await eventually_async(lambda: got(many) == [("r7", 2)])
    assert [len(seen) for seen in log.reads] == [500]


async def test_an_overflow_sets_the_runs_in_the_mailbox_back_and_no_others(tailer: Tailer, log: Log) -> None:
    log.events = {"a": 1, "b": 1}
    both = at(tailer, tailer.subscribe("a", "b"), ("a", 1), ("b", 1))
    log.events["a"] = 1 + MAILBOX_PACKS + 1
    tailer.hint(["a"])
    await eventually_async(lambda: both.behind == {"a"})
    assert got(both) == []
    log.events["b"] = 2
    tailer.hint(["b"])
    await eventually_async(lambda: got(both) == [("b", 2)])


async def test_who_left_a_run_is_not_told_of_it_any_more(tailer: Tailer, log: Log) -> None:
    log.events = {"a": 1, "b": 1}
    both = at(tailer, tailer.subscribe("a", "b"), ("a", 1), ("b", 1))
    tailer.leave(both, "a")
    log.events = {"a": 2, "b": 2}
    tailer.hint(["a", "b"])
    await eventually_async(lambda: got(both) == [("b", 2)])
    assert both.behind == set()


async def test_a_newcomer_that_read_further_does_not_take_news_from_those_who_wait(tailer: Tailer, log: Log) -> None:
    log.events = {"a": 5}
    first = at(tailer, tailer.subscribe("a"), ("a", 5))
    log.events = {"a": 7}  # committed; the hint is on its way
    second = at(tailer, tailer.subscribe("a"), ("a", 7))
    await eventually_async(lambda: got(first) == [("a", 6), ("a", 7)])
    assert second.behind == set()


async def test_a_newcomer_that_read_less_than_the_feed_reads_on(tailer: Tailer, log: Log) -> None:
    log.events = {"a": 7}
    at(tailer, tailer.subscribe("a"), ("a", 7))
    late = at(tailer, tailer.subscribe("a"), ("a", 5))
    assert late.behind == {"a"}
    at(tailer, late, ("a", 7))
    assert late.behind == set()


async def test_a_run_that_was_deleted_is_looked_at_again(log: Log) -> None:
    tailer = Tailer(log.news, lambda ids: [one for one in ids if one in log.missing], poll_s=0.01)
    tailer.start()
    try:
        log.events = {"a": 3, "b": 3}
        both = at(tailer, tailer.subscribe("a", "b"), ("a", 3), ("b", 3))
        both.changed.clear()
        log.missing = ["b"]
        await eventually_async(lambda: both.behind == {"b"})
        assert both.changed.is_set()
    finally:
        await tailer.stop()


# ---- what this process commits ---------------------------------------------------------------------------------------


def pack_of(workflow_id: str, first: int, count: int = 1) -> Pack:
    events = [Event(EventKind.LOG, 0, {"message": str(first + place)}) for place in range(count)]
    return Pack(workflow_id, events, first_sequence=first)


async def test_a_commit_of_this_process_is_handed_on_without_a_read(tailer: Tailer, log: Log) -> None:
    log.events = {"a": 1}
    watcher = at(tailer, tailer.subscribe("a"), ("a", 1))
    await eventually_async(lambda: log.reads)
    log.reads.clear()
    await asyncio.to_thread(tailer.committed, [pack_of("a", 2, count=3), pack_of("unwatched", 1), pack_of("a", 5)])
    await eventually_async(lambda: got(watcher) == [("a", 2), ("a", 5)])
    assert [event.sequence for pack in watcher.packs for event in pack.events] == [2, 3, 4, 5]
    assert [event.data["message"] for pack in watcher.packs for event in pack.events] == ["2", "3", "4", "5"]
    assert log.reads == []


async def test_a_commit_that_does_not_follow_makes_the_run_be_read(tailer: Tailer, log: Log) -> None:
    log.events = {"a": 1}
    watcher = at(tailer, tailer.subscribe("a"), ("a", 1))
    log.events["a"] = 3  # 2 was committed elsewhere
    tailer.committed([pack_of("a", 3)])
    await eventually_async(lambda: got(watcher) == [("a", 2), ("a", 3)])


async def test_commits_that_come_together_wake_the_loop_once(
    tailer: Tailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.events = {"a": 1}
    watcher = at(tailer, tailer.subscribe("a"), ("a", 1))
    await eventually_async(lambda: log.reads and not tailer._hinted)
    loop = asyncio.get_running_loop()
    wakes: list[object] = []
    plain = loop.call_soon_threadsafe

    def counted(callback: Any, *arguments: Any) -> Any:
        wakes.append(callback)
        return plain(callback, *arguments)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    for first in range(2, 32):
        tailer.committed([pack_of("a", first)])
    assert len(wakes) == 1
    monkeypatch.undo()
    await eventually_async(lambda: got(watcher) == [("a", first) for first in range(2, 32)])


async def test_a_mailbox_that_overflows_by_commits_makes_its_watcher_read(tailer: Tailer, log: Log) -> None:
    log.events = {"a": 1}
    watcher = at(tailer, tailer.subscribe("a"), ("a", 1))
    await eventually_async(lambda: log.reads and not tailer._hinted)
    tailer.committed([pack_of("a", first) for first in range(2, 3 + MAILBOX_PACKS)])
    await eventually_async(lambda: watcher.behind == {"a"})
    assert got(watcher) == []


async def test_everything_that_is_watched_is_read_when_hints_may_have_been_lost(tailer: Tailer, log: Log) -> None:
    names = [f"r{number}" for number in range(50)]
    log.events = dict.fromkeys(names, 1)
    watcher = at(tailer, tailer.subscribe(*names), *((name, 1) for name in names))
    await eventually_async(lambda: log.reads and not tailer._hinted)
    log.events = dict.fromkeys(names, 2)
    tailer.hint_all()
    await eventually_async(lambda: sorted(got(watcher)) == sorted((name, 2) for name in names))


async def test_without_any_hint_a_poll_brings_the_news_and_seldom_while_hints_arrive(log: Log) -> None:
    arrive = True
    tailer = Tailer(log.news, lambda _ids: [], poll_s=0.05, hinted=lambda: arrive)
    tailer.start()
    try:
        log.events = {"a": 1}
        watcher = at(tailer, tailer.subscribe("a"), ("a", 1))
        assert tailer._interval_s == pytest.approx(0.05 * HINTED_POLL_FACTOR)
        log.events["a"] = 2
        await eventually_async(lambda: got(watcher) == [("a", 2)])
        arrive = False
        assert tailer._interval_s == pytest.approx(0.05)
        log.events["a"] = 3
        await eventually_async(lambda: got(watcher) == [("a", 2), ("a", 3)])
    finally:
        await tailer.stop()


async def test_a_read_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch, tailer: Tailer, log: Log) -> None:
    monkeypatch.setattr(tailer_module, "ERROR_BACKOFF_S", 0.01)
    log.events = {"a": 1}
    watcher = at(tailer, tailer.subscribe("a"), ("a", 1))
    await eventually_async(lambda: log.reads and not tailer._hinted)
    log.failures = 2
    log.events["a"] = 2
    tailer.hint(["a"])
    await eventually_async(lambda: got(watcher) == [("a", 2)])


@pytest.mark.parametrize("round_", range(20))
async def test_whatever_comes_when_a_watcher_gets_every_event_once_and_in_order(
    round_: int, rng: random.Random, tailer: Tailer, log: Log
) -> None:
    """Commits here and elsewhere, told in any order, late, twice or never, with reads between."""
    end = 60
    log.events = {"a": 1}
    watcher = at(tailer, tailer.subscribe("a"), ("a", 1))
    seen: list[int] = []
    untold: list[Pack] = []

    def take() -> None:
        while watcher.packs:
            seen.extend(event.sequence for event in watcher.packs.popleft().events)

    while log.events["a"] < end:
        match rng.choice(["here", "here", "elsewhere", "late", "hint", "loop", "take"]):
            case "here":
                log.events["a"] += 1
                untold.append(pack_of("a", log.events["a"]))
                if rng.random() < 0.7:
                    tailer.committed([untold.pop()])
            case "elsewhere":
                log.events["a"] += 1
            case "late" if untold:
                tailer.committed([untold.pop(rng.randrange(len(untold)))])
            case "hint":
                await asyncio.to_thread(tailer.hint, ["a"])
            case "loop":
                await asyncio.sleep(0)
            case _:
                take()
    tailer.hint(["a"])

    def arrived() -> bool:
        take()
        return bool(seen) and seen[-1] == end

    await eventually_async(arrived)
    assert seen == list(range(2, end + 1))
    assert watcher.behind == set()


async def test_ten_thousand_idle_watchers_cost_a_look_and_no_more(log: Log) -> None:
    asked: list[int] = []

    def close_ended(workflow_ids: Sequence[str]) -> list[str]:
        asked.append(len(workflow_ids))
        return []

    tailer = Tailer(log.news, close_ended, poll_s=0.1)
    names = [f"r{number}" for number in range(10_000)]
    log.events = dict.fromkeys(names, 1)
    for name in names:
        tailer.caught_up(tailer.subscribe(name), name, 1)
    tailer.start()
    try:
        await eventually_async(lambda: len(asked) >= 3)
        assert set(asked) == {10_000}
        assert len(log.reads) <= len(asked) + 1
    finally:
        await tailer.stop()
