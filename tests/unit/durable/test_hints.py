"""Whom news wakes: what is committed here, what others tell of, and what wakes nobody."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.durable.executions import Wait
from perdure_service.durable.hints import ANY_QUEUE, Hints
from perdure_service.durable.queue_threads import Bells, _StopOrBell
from perdure_service.durable.waits import Waits
from perdure_service.store.hints import EVERYTHING, Heard, Hint

from tests.helpers.waiting import eventually


class Told:
    """A feed that keeps what it is to send, and whatever else hints wake."""

    def __init__(self, *, tells_all: bool = True) -> None:
        self.arrives = True
        self.tells_all = tells_all
        self.alone = False
        self.sent: list[Hint] = []
        self.woken: list[tuple[str, Any]] = []
        self.hints = Hints(self._made)
        for name in ("ring", "owner_changed", "look_for", "ended"):
            setattr(self.hints, name, self._note(name))
        self.hints.wake = lambda channel, name: self.woken.append(("wake", (channel, name)))
        self.hints.ring_own = lambda: self.woken.append(("ring_own", None))
        self.hints.attach(self, lambda: self.woken.append(("inbox", None)))  # type: ignore[arg-type]

    def _made(self, _heard: Heard) -> Told:
        return self

    def _note(self, name: str) -> Any:
        def note(what: Collection[str] | None) -> None:
            self.woken.append((name, None if what is None else sorted(what)))

        return note

    def send(self, hint: Hint) -> None:
        self.sent.append(hint)

    def start(self) -> None: ...

    def stop(self) -> None: ...

    # ---- the tailer

    def hint(self, workflow_ids: Collection[str]) -> None:
        self.woken.append(("tailer", sorted(workflow_ids)))

    def hint_all(self) -> None:
        self.woken.append(("tailer", None))

    def committed(self, packs: Collection[Pack]) -> None:
        self.woken.append(("committed", [pack.workflow_id for pack in packs]))

    def ended(self, workflow_ids: Collection[str]) -> None:
        self.woken.append(("ended for the tailer", sorted(workflow_ids)))


def pack(workflow_id: str, kind: EventKind = EventKind.LOG, **data: Any) -> Pack:
    return Pack(workflow_id, [Event(kind, 0, data)], first_sequence=1)


def test_a_commit_is_handed_to_the_tailer_and_told_to_the_others() -> None:
    told = Told()
    told.hints.committed([pack("a"), pack("b", EventKind.STATE_CHANGED, to="SUCCEEDED")])
    assert told.woken == [("committed", ["a", "b"]), ("ended for the tailer", ["b"]), ("ended", ["b"])]
    assert told.sent == [Hint(runs=frozenset("ab"), ended=frozenset("b"))]


def test_only_news_of_approvals_wakes_the_inbox() -> None:
    told = Told()
    told.hints.committed([pack("a", EventKind.APPROVAL_REQUESTED)])
    assert ("inbox", None) in told.woken
    assert told.sent[0].approvals


def test_a_signal_makes_the_waits_of_its_run_be_looked_at() -> None:
    told = Told()
    told.hints.committed([pack("a", EventKind.SIGNAL_RECEIVED), pack("b")])
    assert ("look_for", ["a"]) in told.woken


def test_a_hint_at_a_run_wakes_whoever_may_be_concerned() -> None:
    told = Told()
    told.hints.heard(Hint(runs=frozenset("ab"), ended=frozenset("b"), queues=frozenset({"mail"})))
    assert told.woken == [
        ("tailer", ["a", "b"]), ("ring", ["mail"]), ("owner_changed", ["a", "b"]), ("ended", ["b"]),
    ]  # fmt: skip
    assert told.sent == [], "what was heard is not told again"


def test_where_a_feed_does_not_tell_who_has_ended_any_run_may_have() -> None:
    told = Told(tells_all=False)
    told.hints.heard(Hint(runs=frozenset("ab")))
    assert ("ended", ["a", "b"]) in told.woken
    assert not told.hints.tells_queues


def test_after_a_start_of_the_feed_everybody_looks() -> None:
    told = Told()
    told.hints.heard(EVERYTHING)
    assert told.woken == [
        ("tailer", None), ("inbox", None), ("ring", None), ("owner_changed", None), ("ended", None), ("look_for", None),
    ]  # fmt: skip


def test_a_message_nobody_knows_for_whom_makes_all_waits_be_looked_at() -> None:
    told = Told()
    told.hints.heard(Hint(messages=True, wakes=frozenset({("channel", "a::b")})))
    assert told.woken == [("look_for", None), ("wake", ("channel", "a::b"))]


def test_what_is_given_back_rings_here_and_elsewhere() -> None:
    told = Told()
    told.hints.given_back([])
    assert told.woken == told.sent == []
    told.hints.given_back(["a"])
    assert told.woken == [("tailer", ["a"]), ("ring_own", None)]
    assert told.sent == [Hint(runs=frozenset("a")), Hint(queues=ANY_QUEUE)]


def test_whoever_waits_for_the_end_of_a_run_is_woken_by_it_and_by_no_other_one() -> None:
    waits = Waits(sa.create_engine("postgresql+psycopg://nowhere"), lambda: True)
    either, other = Wait(("result:a", "result:b")), Wait(("result:c",))
    with waits.for_results(["a", "b"], either), waits.for_results(["c"], other):
        waits.ended(["x"])
        assert not either.event.is_set()
        waits.ended(["b"])
        assert either.event.is_set()
        assert not other.event.is_set()
        waits.ended(None)
        assert other.event.is_set()
    assert waits._results == {}


def test_what_others_queue_is_looked_for_at_once_and_then_after_a_pause() -> None:
    bells, stop = Bells(3600), threading.Event()
    waits = _StopOrBell(stop, bells._of("main"), 3600)
    assert not waits.wait(3600), "its thread looks when it begins"
    bells.ring_for_others({"another"})
    assert not bells._of("main").others
    bells.ring_for_others({"main"})
    assert not waits.wait(3600)
    looked_at = waits._looked_at
    bells.ring_for_others(None)
    assert not waits.wait(3600)
    assert waits._looked_at - looked_at >= 0.1
    bells.ring("main")  # what this process has queued does not wait
    assert not waits.wait(3600)


def test_a_quiet_queue_is_polled_seldom_while_hints_arrive() -> None:
    arrive = True
    bells, stop = Bells(3600), threading.Event()
    waits = _StopOrBell(stop, bells._of("main"), 3600, lambda: arrive)
    assert not waits.wait(3600)
    for _ in range(3):  # at its own interval, after whatever rang
        assert not waits.wait(0.001)
    seldom = threading.Thread(target=waits.wait, args=(3600,))
    seldom.start()
    arrive = False
    bells.ring_for_others(None)  # as when the feed breaks
    seldom.join(timeout=30)
    assert not seldom.is_alive()
    assert waits._quick_polls == 3


def test_the_thread_of_the_waits_looks_when_it_is_told_of_a_run_that_waits() -> None:
    waits = Waits(sa.create_engine("postgresql+psycopg://nowhere"), lambda: True)
    looked: list[object] = []
    waits.look = looked.append  # type: ignore[method-assign, assignment]

    class Map:
        def snapshot(self) -> list[Any]:
            return [("a::x", ("a", "x", None), None)]

    waits.bind(Map(), Map(), Map())
    going_on = threading.Event()
    going_on.set()
    thread = threading.Thread(target=waits.run, args=(going_on.is_set,))
    thread.start()
    try:
        waits.look_for(["another"])
        waits.look_for(["another", "a"])
        eventually(lambda: looked == [{"a"}])
        waits.look_for(None)
        eventually(lambda: looked == [{"a"}, None])
    finally:
        going_on.clear()
        thread.join(timeout=10)
