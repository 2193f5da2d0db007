"""The tailer: what is new reaches whoever watches, once registered, whatever others do meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from perdure_service.domain.events import Event, EventKind
from perdure_service.store.event_log import News
from perdure_service.store.tailer import MAILBOX_PACKS, Subscription, Tailer

from tests.helpers.waiting import eventually_async


class Log:
    """A log in memory: one pack an event."""

    def __init__(self) -> None:
        self.events: dict[str, int] = {}
        self.reads: list[dict[str, int]] = []
        self.missing: list[str] = []

    def news(self, seen: Mapping[str, int]) -> Sequence[News]:
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
