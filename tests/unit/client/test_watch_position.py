"""The state machine of a watch, without a server."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure.v1 import agent_run_service_pb2, run_event_pb2
from perdure_client import ProtocolViolation
from perdure_client._watch import HoleInLog, WatchPosition

from tests.unit.client.scripted import batch, run_message


def position(**fields: object) -> WatchPosition:
    return WatchPosition(agent_run_service_pb2.WatchRunRequest(run_id="r", **fields))  # type: ignore[arg-type]


def sequences(update: object) -> list[int]:
    return [event.sequence for event in getattr(update, "events", ())]


@settings(max_examples=60)
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=12))
def test_every_event_comes_once_and_in_order_whatever_is_sent_twice(steps: list[tuple[int, int]]) -> None:
    watch = position()
    seen: list[int] = []
    sent = 0
    for repeated, fresh in steps:
        seen += sequences(watch.accept(batch(range(max(1, sent - repeated + 1), sent + fresh + 1))))
        sent += fresh
    assert seen == list(range(1, sent + 1))


def test_the_first_request_is_the_callers_and_the_next_has_the_cursor() -> None:
    watch = position(after_sequence=4, kinds=[run_event_pb2.RUN_EVENT_KIND_LOG])
    assert watch.next_request().after_sequence == 4
    watch.accept(batch([5, 6], cursor="here"))
    again = watch.next_request()
    assert again.WhichOneof("position") == "cursor"
    assert again.cursor == "here"
    assert list(again.kinds) == [run_event_pb2.RUN_EVENT_KIND_LOG]


def test_a_heartbeat_moves_the_cursor_and_is_not_an_update() -> None:
    watch = position()
    watch.accept(batch([1], snapshot=True))
    assert watch.accept(batch([], cursor="later")) is None
    assert watch.next_request().cursor == "later"


def test_the_first_update_of_every_connection_has_the_run_as_it_was_then() -> None:
    watch = position()
    first = watch.accept(batch([1], snapshot=True))
    again = watch.accept(batch([1], snapshot=True))
    assert first is not None
    assert first.snapshot is not None
    assert again is not None
    assert again.snapshot is not None
    assert again.events == ()


def test_catching_up_is_told_once_even_without_events() -> None:
    watch = position()
    watch.accept(batch([1]))
    update = watch.accept(batch([], caught_up=True))
    assert update is not None
    assert update.caught_up
    assert update.events == ()
    assert watch.accept(batch([], caught_up=True)) is None


def test_a_hole_is_not_delivered_but_asked_for_again_from_the_last_event_seen() -> None:
    watch = position()
    watch.accept(batch([1, 2]))
    with pytest.raises(HoleInLog):
        watch.accept(batch([4, 5]))
    assert watch.next_request().after_sequence == 2
    assert sequences(watch.accept(batch([3, 4, 5]))) == [3, 4, 5]
    assert watch.next_request().cursor == "after-5"


def test_a_hole_inside_a_batch_is_found_too() -> None:
    with pytest.raises(HoleInLog, match="events 2 to 2"):
        position().accept(batch([1, 3]))


def test_the_same_hole_twice_is_the_servers_fault() -> None:
    watch = position()
    watch.accept(batch([1]))
    with pytest.raises(HoleInLog):
        watch.accept(batch([3]))
    with pytest.raises(ProtocolViolation, match="events 2 to 2 of run r"):
        watch.accept(batch([3]))


def test_a_filtered_watch_has_holes_by_right() -> None:
    watch = position(kinds=[run_event_pb2.RUN_EVENT_KIND_LOG])
    assert sequences(watch.accept(batch([3, 9]))) == [3, 9]


def test_a_watch_from_a_cursor_begins_with_any_sequence_and_is_dense_from_there() -> None:
    watch = position(cursor="somewhere")
    assert sequences(watch.accept(batch([8, 9]))) == [8, 9]
    with pytest.raises(HoleInLog):
        watch.accept(batch([11]))


def test_a_watch_from_now_begins_after_the_snapshot() -> None:
    watch = position(from_now=True)
    response = batch([7, 8], cursor="c")
    response.snapshot.CopyFrom(run_message(last_sequence=7))
    assert sequences(watch.accept(response)) == [8]


def test_a_watch_from_now_that_breaks_before_any_answer_asks_the_same_again() -> None:
    watch = position(from_now=True)
    assert watch.next_request() == watch.next_request()
    assert watch.next_request().from_now


def test_the_last_update_says_so() -> None:
    watch = position()
    update = watch.accept(batch([1, 2], end=True))
    assert update is not None
    assert update.end_of_run
    assert update.events[-1].ends_run
    assert watch.ended
