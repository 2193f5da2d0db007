"""The view of a watch under any order of events: families that grow while readers come and go.

The log is in memory; the view, the tailer and the cursors are the real ones.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from perdure_service.domain.cursors import MAX_ACTIVE_CHILDREN, Cursor
from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.runs import RunKey, RunState
from perdure_service.durable import view as view_module
from perdure_service.durable.view import View
from perdure_service.errors import CursorOutOfRange, RunNotFound, ViewTooLarge
from perdure_service.store.event_log import News
from perdure_service.store.run_heads import Head
from perdure_service.store.tailer import Tailer

from tests.helpers.waiting import eventually_async, scaled

ROOT = RunKey.of_api("default", "root")


@dataclass
class Family:
    """Runs and their logs. Each commit is a pack."""

    packs: dict[str, list[list[Event]]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    tailer: Tailer | None = None
    reads: int = 0

    def start(self, key: RunKey, parent: RunKey | None = None) -> None:
        self.parents[key.workflow_id] = parent.workflow_id if parent else None
        self.packs[key.workflow_id] = []
        self.commit(key, EventKind.STATE_CHANGED, to="RUNNING")

    def commit(self, key: RunKey, kind: EventKind = EventKind.LOG, *, hint: bool = True, **data: Any) -> None:
        packs = self.packs[key.workflow_id]
        event = Event(kind, 0, data, sequence=self.last(key.workflow_id) + 1, step_id=len(packs))
        packs.append([event])
        if hint and self.tailer is not None:
            self.tailer.hint([key.workflow_id])

    def child(self, parent: RunKey) -> RunKey:
        run_id = f"{parent.run_id}.{len(self.packs[parent.workflow_id])}"
        key = RunKey.of_api("default", run_id)
        self.commit(parent, EventKind.CHILD_STARTED, child_run_id=run_id)
        self.start(key, parent)
        return key

    def end(self, key: RunKey) -> None:
        self.commit(key, EventKind.STATE_CHANGED, to=RunState.SUCCEEDED.value)

    def delete(self, key: RunKey) -> None:
        del self.packs[key.workflow_id], self.parents[key.workflow_id]

    def cut(self, key: RunKey) -> None:
        """Keeps the last pack of a log only."""
        del self.packs[key.workflow_id][:-1]

    def last(self, workflow_id: str) -> int:
        packs = self.packs[workflow_id]
        return packs[-1][-1].sequence if packs else 0

    def ended(self, workflow_id: str) -> bool:
        return self.packs[workflow_id][-1][-1].ends_run

    # ---- what the view and the tailer ask for

    def read(self, _conn: object, workflow_id: str, after_sequence: int) -> list[Event]:
        self.reads += 1
        rest = [e for pack in self.packs.get(workflow_id, []) for e in pack if e.sequence > after_sequence]
        return rest[:64]

    def earliest(self, _conn: object, workflow_id: str) -> int:
        return self.packs[workflow_id][0][0].sequence

    def heads(self, _conn: object, _namespace: str, workflow_ids: Sequence[str]) -> dict[str, Head]:
        return {
            one: Head(RunKey.of_workflow(one), self.parents[one], self.last(one), self.ended(one))
            for one in workflow_ids
            if one in self.packs
        }

    def news(self, seen: Mapping[str, int]) -> Sequence[News]:
        return [
            News(one, pack[0].sequence, tuple(pack))
            for one, position in seen.items()
            for pack in list(self.packs.get(one, []))
            if pack[0].sequence > position
        ]

    def missing(self, workflow_ids: Sequence[str]) -> list[str]:
        return [one for one in workflow_ids if one not in self.packs]


@pytest.fixture
async def family(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Family]:
    family = Family()
    monkeypatch.setattr(view_module.event_log, "read", family.read)
    monkeypatch.setattr(view_module.event_log, "earliest_sequence", family.earliest)
    monkeypatch.setattr(view_module.run_heads, "heads", family.heads)
    family.tailer = Tailer(family.news, family.missing, poll_s=0.02)
    family.tailer.start()
    family.start(ROOT)
    yield family
    await family.tailer.stop()


async def read(_name: str, function: Callable[[Any], Any]) -> Any:
    await asyncio.sleep(0)
    return function(None)


def begin(family: Family, cursor: str = "") -> View:
    """Returns a view as WatchRun makes it: from the beginning, or from a cursor."""
    assert family.tailer is not None
    view = View(read, family.tailer, ROOT, include_children=True)
    place = Cursor.decode(cursor, ROOT.workflow_id, include_children=True) if cursor else Cursor(ROOT.workflow_id)
    heads = family.heads(None, "default", [ROOT.workflow_id, *(place.children or {})])
    children = [(head, (place.children or {})[one]) for one, head in heads.items() if one != ROOT.workflow_id]
    view.begin(heads[ROOT.workflow_id], place.sequence, children)
    return view


class Reader:
    """Reads a view, breaking off at random and going on at the last cursor; remembers what it saw."""

    def __init__(self, family: Family, chance: random.Random, breaks: float) -> None:
        self.family = family
        self.seen: list[tuple[str, Event]] = []
        self.widest = 0
        self._chance = chance
        self._breaks = breaks

    async def run(self) -> None:
        cursor, over = "", False
        while not over:
            view = begin(self.family, cursor)
            try:
                over = view.over
                while not over:
                    piece = await view.next(5)
                    for event in piece.events if piece else ():
                        assert piece is not None
                        self.seen.append((piece.key.workflow_id, event))
                    cursor, over = view.cursor.encode(), view.over
                    self.widest = max(self.widest, len(view.cursor.children or ()))
                    if self._chance.random() < self._breaks:
                        break
                    if self._chance.random() < 0.2:
                        await asyncio.sleep(0)
            finally:
                view.close()

    def check(self) -> None:
        started = {ROOT.workflow_id}
        numbers: dict[str, list[int]] = {}
        for workflow_id, event in self.seen:
            assert workflow_id in started
            numbers.setdefault(workflow_id, []).append(event.sequence)
            if event.kind is EventKind.CHILD_STARTED:
                started.add(RunKey.of_api("default", event.data["child_run_id"]).workflow_id)
        assert set(numbers) == set(self.family.packs)
        for workflow_id, own in numbers.items():
            assert own == list(range(1, self.family.last(workflow_id) + 1)), workflow_id


async def live(family: Family, chance: random.Random, commits: int) -> None:
    """Lets the family grow at random until everyone has ended; hints may be lost."""
    open_runs = [ROOT]
    for _ in range(commits):
        key = chance.choice(open_runs)
        what = chance.random()
        if what < 0.15:
            open_runs.append(family.child(key))
        elif what < 0.25 and len(open_runs) > 1:
            family.end(key)
            open_runs.remove(key)
        else:
            for _ in range(chance.choice((1, 1, 1, 90))):  # now and then more than a mailbox holds
                family.commit(key, hint=chance.random() < 0.8)
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    for key in chance.sample(open_runs, len(open_runs)):
        family.end(key)


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_every_reader_sees_every_run_whole(family: Family, seed: int) -> None:
    chance = random.Random(seed)
    readers = [Reader(family, random.Random(seed + 100 * n), breaks) for n, breaks in enumerate((0.0, 0.05, 0.5))]
    async with asyncio.timeout(scaled(20)):
        await asyncio.gather(live(family, chance, 150), *(reader.run() for reader in readers))
    for reader in readers:
        reader.check()


async def test_thousands_of_children_that_have_ended_take_no_room_in_the_cursor(family: Family) -> None:
    for _ in range(3 * MAX_ACTIVE_CHILDREN):
        family.end(family.child(ROOT))
    family.end(ROOT)
    reader = Reader(family, random.Random(1), 0.01)
    await reader.run()
    reader.check()
    assert reader.widest == 1


async def test_more_children_that_go_on_than_a_cursor_holds_end_the_view(family: Family) -> None:
    for _ in range(MAX_ACTIVE_CHILDREN):
        family.child(ROOT)
    family.end(ROOT)
    children = Reader(family, random.Random(1), 0.0)
    task = asyncio.create_task(children.run())
    await eventually_async(lambda: len(children.seen) == 2 * MAX_ACTIVE_CHILDREN + 2)
    assert not task.done()
    family.child(RunKey.of_workflow(next(one for one in family.packs if one != ROOT.workflow_id)))
    with pytest.raises(ViewTooLarge):
        await task


async def test_who_waits_reads_nothing(family: Family) -> None:
    keys = [family.child(ROOT) for _ in range(200)]
    reader = Reader(family, random.Random(1), 0.0)
    task = asyncio.create_task(reader.run())
    await eventually_async(lambda: len(reader.seen) == 401)
    tailer = family.tailer
    assert tailer is not None
    await eventually_async(
        lambda: (
            not tailer._hinted and not any(one.behind for feed in tailer._feeds.values() for one in feed.subscriptions)
        )
    )
    known = family.reads
    family.commit(keys[7])
    await eventually_async(lambda: len(reader.seen) == 402)
    assert family.reads == known
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_deleted_child_ends_and_a_deleted_root_is_not_found(family: Family) -> None:
    child = family.child(ROOT)
    view = begin(family)
    while not view.caught_up:
        await view.next(5)
    family.delete(child)
    await view.next(scaled(5))
    assert view.cursor.children == {}
    assert not view.over
    family.delete(ROOT)
    with pytest.raises(RunNotFound):
        await view.next(scaled(5))
    view.close()


async def seen_until_cut(view: View) -> tuple[list[tuple[str, int]], CursorOutOfRange]:
    """Reads a view until it is refused; returns what it had by then, and the error."""
    seen: list[tuple[str, int]] = []
    while True:
        try:
            piece = await view.next(scaled(5))
        except CursorOutOfRange as error:
            return seen, error
        assert piece is not None, "it should be refused"
        seen += [(piece.key.run_id, event.sequence) for event in piece.events]


async def test_a_log_that_is_cut_under_a_reader_is_told_with_where_it_begins_now(family: Family) -> None:
    for _ in range(200):
        family.commit(ROOT, hint=False)
    family.end(ROOT)
    view = begin(family)
    first = await view.next(scaled(5))
    assert first is not None
    family.cut(ROOT)
    seen, error = await seen_until_cut(view)
    view.close()
    sequences = [event.sequence for event in first.events] + [sequence for _, sequence in seen]
    assert sequences == list(range(1, len(sequences) + 1)), "what came before was whole"
    assert len(sequences) < 201
    assert error.metadata == {"earliest_sequence": "202", "run_id": "root"}


async def test_a_childs_log_that_is_cut_is_told_as_the_childs(family: Family) -> None:
    child = family.child(ROOT)
    family.commit(child)
    family.end(child)
    family.end(ROOT)
    family.cut(child)
    view = begin(family)
    seen, error = await seen_until_cut(view)
    view.close()
    assert seen == [("root", 1), ("root", 2)], "nothing of the child, and of its parent only what comes before it"
    assert error.metadata == {"earliest_sequence": "3", "run_id": child.run_id}
    assert "one by one" in error.message
