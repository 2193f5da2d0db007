"""Packs, and the steps that a log tells of."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from perdure_service.domain import events
from perdure_service.domain.events import Event, EventKind, StepState, fold_steps, half_written, in_pieces

kinds = st.sampled_from(list(EventKind))
texts = st.text(max_size=20) | st.just("\0") | st.just("\ud800")
some_events = st.builds(
    Event,
    kinds,
    st.integers(0, 2**41),
    st.dictionaries(st.sampled_from(["text", "stream", "to", "message"]), texts, max_size=3),
    st.integers(0, 9),
    texts,
    st.integers(0, 3),
    st.integers(0, 3),
)


@given(st.lists(some_events, max_size=8), st.integers(1, 10_000))
def test_a_pack_is_read_as_it_was_written(written: list[Event], first: int) -> None:
    text = events.encode_events(written)
    assert text.isascii()
    assert "\0" not in text
    read = events.decode_events(text, first)
    assert [event.sequence for event in read] == list(range(first, first + len(written)))
    assert [(e.kind, e.time_ms, dict(e.data), e.step_id, e.step_name, e.attempt, e.execution) for e in read] == [
        (e.kind, e.time_ms, dict(e.data), e.step_id, e.step_name, e.attempt, e.execution) for e in written
    ]


@given(st.lists(st.integers(0, 300_000), max_size=12))
def test_long_commits_are_cut_into_packs_in_order(sizes: list[int]) -> None:
    commit = [Event(EventKind.LOG, n, {"message": "x" * size}) for n, size in enumerate(sizes)]
    packs = in_pieces(commit, events.MAX_PACK_CHARS)
    assert [event for pack in packs for event in pack] == commit
    for pack in packs:
        assert len(pack) <= 1 or sum(events.event_chars(event) for event in pack) <= events.MAX_PACK_CHARS


@given(st.text(max_size=3), st.integers(0, 40_000))
def test_text_is_cut_into_pieces_that_join_to_it(text: str, times: int) -> None:
    whole = text * times
    pieces = events.text_pieces(whole)
    assert "".join(pieces) == whole
    assert all(len(piece) <= events.MAX_TEXT_CHARS for piece in pieces)


def _log(*rows: tuple[EventKind, int, dict[str, Any]], execution: int = 1) -> list[Event]:
    return [
        Event(kind, 1_000 + n, data, step_id, f"step {step_id}" if step_id else "", 1, execution, n + 1)
        for n, (kind, step_id, data) in enumerate(rows)
    ]


def test_steps_are_listed_as_they_began_with_what_became_of_them() -> None:
    log = _log(
        (EventKind.STATE_CHANGED, 0, {"to": "RUNNING"}),
        (EventKind.STEP_STARTED, 1, {}),
        (EventKind.STEP_STARTED, 2, {}),
        (EventKind.STEP_RETRYING, 1, {"error": {"type": "E"}}),
        (EventKind.STEP_SUCCEEDED, 2, {"preview": "two"}),
        (EventKind.STEP_FAILED, 1, {"error": {"type": "E"}}),
        (EventKind.CHILD_STARTED, 3, {"child_run_id": "r.3"}),
        (EventKind.STEP_STARTED, 4, {}),
    )
    steps = fold_steps(log)
    assert [(step.step_id, step.state) for step in steps] == [
        (1, StepState.FAILED),
        (2, StepState.SUCCEEDED),
        (3, StepState.SUCCEEDED),
        (4, StepState.RUNNING),
    ]
    assert steps[0].attempts == 2
    assert steps[1].output_preview == "two"
    assert steps[2].child_run_id == "r.3"


def test_a_step_whose_execution_died_is_interrupted_until_it_runs_again() -> None:
    first = _log((EventKind.STATE_CHANGED, 0, {"to": "RUNNING"}), (EventKind.STEP_STARTED, 1, {}))
    requeued = Event(EventKind.STATE_CHANGED, 5, {"to": "QUEUED"}, execution=1)
    assert fold_steps([*first, requeued])[0].state is StepState.INTERRUPTED
    again = Event(EventKind.STATE_CHANGED, 6, {"to": "RUNNING"}, execution=2)
    begun = Event(EventKind.STEP_STARTED, 7, {}, 1, "step 1", 1, 2)
    step = fold_steps([*first, requeued, again, begun])[0]
    assert (step.state, step.execution) == (StepState.RUNNING, 2)


def test_an_approval_stays_asked_whatever_becomes_of_its_execution() -> None:
    asked = Event(EventKind.APPROVAL_REQUESTED, 1, {"approval_id": "r/1"}, 1, events.APPROVAL_STEP, 0, 1)
    requeued = Event(EventKind.STATE_CHANGED, 5, {"to": "QUEUED"}, execution=1)
    assert fold_steps([asked, requeued])[0].state is StepState.RUNNING


def test_only_text_of_unfinished_steps_is_half_written() -> None:
    log = _log(
        (EventKind.OUTPUT_DELTA, 1, {"text": "a"}),
        (EventKind.STEP_SUCCEEDED, 1, {}),
        (EventKind.OUTPUT_DELTA, 2, {"text": "b"}),
        (EventKind.ATTEMPT_RESET, 2, {}),
        (EventKind.OUTPUT_DELTA, 3, {"text": "c"}),
        (EventKind.OUTPUT_DELTA, 0, {"text": "d"}),
    )
    assert half_written(log) == [(0, ""), (3, "step 3")]


def test_an_entry_of_a_stream_is_a_step_of_its_own_unless_a_step_wrote_it() -> None:
    own = Event(EventKind.OUTPUT_DELTA, 1, {"text": "x"}, 1, events.STREAM_STEP, 1, 1)
    published = Event(EventKind.PUBLISHED, 1, {"key": "k"}, 2, events.PUBLISH_STEP, 0, 1)
    begun = Event(EventKind.STEP_STARTED, 1, {}, 3, "step", 1, 1)
    within = [
        Event(EventKind.OUTPUT_DELTA, 1, {"text": "x"}, 3, "step", 1, 1),
        Event(EventKind.PUBLISHED, 1, {"key": "k"}, 3, "step", 1, 1),
    ]
    log = [own, published, begun, *within]
    assert [step.state for step in fold_steps(log)] == [StepState.SUCCEEDED, StepState.SUCCEEDED, StepState.RUNNING]
    assert half_written(log) == [(3, "step")]


def test_a_filter_lets_the_end_pass() -> None:
    end = Event(EventKind.STATE_CHANGED, 1, {"to": "SUCCEEDED"})
    other = Event(EventKind.STATE_CHANGED, 1, {"to": "RUNNING"})
    text = Event(EventKind.OUTPUT_DELTA, 1, {"text": "x"})
    assert list(events.of_kinds([other, text, end], frozenset({EventKind.OUTPUT_DELTA}))) == [text, end]
    assert list(events.of_kinds([other, text, end], frozenset())) == [other, text, end]
