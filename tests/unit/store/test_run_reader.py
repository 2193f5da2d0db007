"""Reads of single runs: who asks while queries are under way shares the next one, and nobody shares another's error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
from perdure_service.domain.runs import Run, RunKey
from perdure_service.errors import Draining, Overloaded, StoreUnavailable
from perdure_service.store.run_reader import MAX_QUERIES, MAX_RUNS, RunReader

from tests.helpers.waiting import eventually_async
from tests.unit.rpc.doubles import a_run

MAX_WAITING = 200
UNAVAILABLE = StoreUnavailable("the database is away")


class Table:
    """Runs in memory, whose queries can be held up and fail."""

    def __init__(self) -> None:
        self.queries: list[tuple[list[str], bool]] = []
        self.bad: set[str] = set()
        self.failing: Exception | None = None
        self._open = threading.Event()
        self._open.set()

    def find(self, workflow_ids: Sequence[str], full: bool) -> Mapping[str, Run]:
        self.queries.append((list(workflow_ids), full))
        assert self._open.wait(30)
        if self.failing is not None:
            raise self.failing
        if bad := self.bad & set(workflow_ids):
            raise ValueError(f"cannot understand {bad}")
        return {
            one: a_run(key=RunKey("default", one, one), input_json="{}" if full else None)
            for one in workflow_ids
            if not one.startswith("missing")
        }

    @contextmanager
    def held_up(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
async def reader(table: Table) -> AsyncIterator[RunReader]:
    reader = RunReader(table.find, max_waiting=MAX_WAITING, patience_s=60)
    yield reader
    reader.close()


def asking(reader: RunReader, *workflow_ids: str, full: bool = False) -> asyncio.Task[list[str]]:
    async def ask() -> list[str]:
        return [run.key.workflow_id for run in await reader.get(*workflow_ids, full=full)]

    return asyncio.create_task(ask())


async def busy(reader: RunReader, table: Table) -> list[asyncio.Task[list[str]]]:
    """Takes all queries that may be under way; the table is held up."""
    tasks = []
    for number in range(MAX_QUERIES):
        tasks.append(asking(reader, f"first-{number}"))
        await eventually_async(lambda number=number: len(table.queries) == number + 1)
    return tasks


async def test_what_is_asked_for_in_one_turn_of_the_loop_is_one_query(reader: RunReader, table: Table) -> None:
    names = [f"r{number}" for number in range(MAX_RUNS)]
    assert await asyncio.gather(*(asking(reader, name) for name in names)) == [[name] for name in names]
    assert table.queries == [(sorted(names), False)]


async def test_who_asks_while_queries_are_under_way_shares_the_next_one(reader: RunReader, table: Table) -> None:
    with table.held_up():
        first = await busy(reader, table)
        later = [asking(reader, f"later-{number}") for number in range(MAX_RUNS + 1)]
        await eventually_async(lambda: reader.waiting == MAX_QUERIES + MAX_RUNS + 1)
        assert len(table.queries) == MAX_QUERIES
    await asyncio.gather(*first, *later)
    assert sorted(len(ids) for ids, _full in table.queries) == [*[1] * MAX_QUERIES, 1, MAX_RUNS]


async def test_each_gets_what_it_asked_for_in_its_order_and_view(reader: RunReader, table: Table) -> None:
    basic, full, both = await asyncio.gather(
        reader.get("a"), reader.get("a", full=True), reader.get("missing-1", "b", "a")
    )
    assert ([run.input_json for run in basic], [run.input_json for run in full]) == ([None], ["{}"])
    assert [run.key.run_id for run in both] == ["b", "a"]
    assert await reader.get("missing-1", "missing-2") == []
    assert sorted(table.queries[:2]) == [(["a"], True), (["a", "b", "missing-1"], False)]


async def test_one_run_that_cannot_be_read_fails_alone(reader: RunReader, table: Table) -> None:
    table.bad = {"bad"}
    answers = await asyncio.gather(*(reader.get(one) for one in ("a", "bad", "b")), return_exceptions=True)
    assert [type(answer) for answer in answers] == [list, ValueError, list]
    with pytest.raises(ValueError, match="bad"):
        await reader.get("bad")


async def test_what_is_wrong_with_the_database_is_told_to_all_of_a_query(reader: RunReader, table: Table) -> None:
    table.failing = UNAVAILABLE
    answers = await asyncio.gather(*(reader.get(one) for one in ("a", "b")), return_exceptions=True)
    assert answers == [UNAVAILABLE, UNAVAILABLE]
    assert len(table.queries) == 1
    table.failing = None
    assert await reader.get("a")


async def test_who_has_waited_long_enough_when_a_query_fails_is_not_made_to_wait_for_another(table: Table) -> None:
    reader = RunReader(table.find, max_waiting=MAX_WAITING, patience_s=0)
    table.failing = UNAVAILABLE
    with table.held_up():
        first = await busy(reader, table)
        later = [asking(reader, f"later-{number}") for number in range(10)]
        await eventually_async(lambda: reader.waiting == MAX_QUERIES + 10)
    assert await asyncio.gather(*first, *later, return_exceptions=True) == [UNAVAILABLE] * (MAX_QUERIES + 10)
    assert len(table.queries) == MAX_QUERIES
    reader.close()


async def test_a_caller_that_gives_up_is_not_read_for_and_disturbs_nobody(reader: RunReader, table: Table) -> None:
    with table.held_up():
        first = await busy(reader, table)
        given_up, stays = asking(reader, "given-up"), asking(reader, "stays")
        await eventually_async(lambda: reader.waiting == MAX_QUERIES + 2)
        given_up.cancel()
        first[0].cancel()
        await eventually_async(lambda: reader.waiting == MAX_QUERIES)
    assert await stays == ["stays"]
    assert await first[1] == ["first-1"]
    assert "given-up" not in {one for ids, _full in table.queries for one in ids}
    assert reader.waiting == 0


async def test_more_than_may_wait_are_refused_at_once(reader: RunReader, table: Table) -> None:
    with table.held_up():
        tasks = [asking(reader, f"r{number}") for number in range(MAX_WAITING)]
        await eventually_async(lambda: reader.waiting == MAX_WAITING)
        with pytest.raises(Overloaded):
            await reader.get("one-too-many")
    assert len(await asyncio.gather(*tasks)) == MAX_WAITING
    assert await reader.get("now-it-is-served")


async def test_who_waits_when_the_server_stops_is_told_so(table: Table) -> None:
    reader = RunReader(table.find, max_waiting=MAX_WAITING, patience_s=60)
    with table.held_up():
        first = await busy(reader, table)
        later = asking(reader, "later")
        await eventually_async(lambda: reader.waiting == MAX_QUERIES + 1)
        reader.close()
        with pytest.raises(Draining):
            await later
        with pytest.raises(Draining):
            await reader.get("a")
    assert await asyncio.gather(*first) == [["first-0"], ["first-1"]]
