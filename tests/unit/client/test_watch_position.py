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
    first = batch([], cursor="c", last_sequence=7)
    first.snapshot.CopyFrom(run_message(last_sequence=7))
    assert watch.accept(first) is not None
    assert sequences(watch.accept(batch([7, 8], cursor="d"))) == [8]
    with pytest.raises(HoleInLog):
        watch.accept(batch([10]))


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


# ---- with children in the view ---------------------------------------------------------------------------------------


def in_view(update: object) -> list[tuple[str, int]]:
    return [(event.run_id, event.sequence) for event in getattr(update, "events", ())]


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["r", "r.1", "r.2"]), st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=20
    )
)
def test_every_event_of_every_run_comes_once_and_in_order_whatever_is_sent_twice(
    steps: list[tuple[str, int, int]],
) -> None:
    watch = position(include_children=True)
    seen: list[tuple[str, int]] = []
    sent = dict.fromkeys(["r", "r.1", "r.2"], 0)
    for run_id, repeated, fresh in steps:
        upto = sent[run_id] + fresh
        seen += in_view(watch.accept(batch(range(max(1, sent[run_id] - repeated + 1), upto + 1), run_id=run_id)))
        sent[run_id] = upto
    for run_id, upto in sent.items():
        assert [number for one, number in seen if one == run_id] == list(range(1, upto + 1))


def test_a_view_goes_on_by_its_cursor_and_tells_the_place_in_the_watched_run() -> None:
    watch = position(include_children=True)
    watch.accept(batch([1, 2], cursor="a"))
    update = watch.accept(batch([1, 2, 3], run_id="r.1", cursor="b"))
    assert update is not None
    assert update.last_sequence == 2
    assert watch.next_request().cursor == "b"
    assert watch.next_request().include_children


def test_a_hole_in_a_child_is_asked_for_again_from_the_last_cursor() -> None:
    watch = position(include_children=True)
    watch.accept(batch([1], cursor="a"))
    watch.accept(batch([1, 2], run_id="r.1", cursor="b"))
    with pytest.raises(HoleInLog, match=r"events 3 to 3 of run r\.1"):
        watch.accept(batch([4], run_id="r.1", cursor="c"))
    assert watch.next_request().WhichOneof("position") == "cursor"
    assert watch.next_request().cursor == "b"
    with pytest.raises(ProtocolViolation, match=r"events 3 to 3 of run r\.1"):
        watch.accept(batch([4], run_id="r.1", cursor="c"))


def test_a_hole_before_any_cursor_is_asked_for_from_the_beginning() -> None:
    watch = position(include_children=True)
    with pytest.raises(HoleInLog, match=r"events 1 to 1 of run r\.1"):
        watch.accept(batch([2], run_id="r.1"))
    assert watch.next_request().WhichOneof("position") is None


@pytest.mark.parametrize("fields", [{"cursor": "somewhere"}, {"from_now": True}])
def test_a_view_that_begins_in_the_middle_takes_each_run_from_where_the_server_begins(
    fields: dict[str, object],
) -> None:
    watch = position(include_children=True, **fields)
    watch.accept(batch([], cursor="a", last_sequence=6))
    assert in_view(watch.accept(batch([7], cursor="b"))) == [("r", 7)]
    assert in_view(watch.accept(batch([4, 5], run_id="r.1", cursor="c"))) == [("r.1", 4), ("r.1", 5)]
    with pytest.raises(HoleInLog):
        watch.accept(batch([7], run_id="r.1"))
