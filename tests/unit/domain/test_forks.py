"""Where a fork goes on, and what its log tells of the steps that it takes over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perdure_service.domain.events import STREAM_STEP, Event, EventKind, fold_steps
from perdure_service.domain.forks import ForkPoint, Recorded, fork_point, from_checkpoints, taken_over
from perdure_service.errors import InvalidArgument


def done(step_id: int, name: str = "work", **facts: str | bool) -> Recorded:
    return Recorded(step_id, name, bool(facts.pop("failed", False)), **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ([], 1),
        ([done(1), done(2)], 3),
        ([done(1), done(2, failed=True)], 2),
        ([done(1), done(2, failed=True), done(3)], 2),
        ([done(2)], 1),
        ([done(1), done(3), done(4)], 2),
        ([done(1, "DBOS.recv"), done(3)], 4),
        ([done(1, "DBOS.getEvent"), done(3)], 4),
        ([done(1), done(3, "DBOS.sleep")], 2),
        ([done(1, child_workflow_id="c", child_status="SUCCESS")], 2),
        ([done(1, child_workflow_id="c", child_status="PENDING")], 2),
        ([done(1, child_workflow_id="c", child_status="ERROR"), done(2)], 1),
        ([done(1, child_workflow_id="c", child_status="CANCELLED"), done(2)], 1),
        ([done(1, child_workflow_id="c"), done(2)], 1),
    ],
    ids=[
        "nothing recorded", "all succeeded", "the last failed", "one that was caught failed", "the first never ended",
        "one among others never ended", "a message that was there", "a value that was there", "a wait that never ended",
        "a child with a result", "a child that goes on", "a child that failed", "a cancelled child", "a deleted child",
    ],
)  # fmt: skip
def test_without_a_step_a_fork_begins_at_the_first_that_did_not_succeed(
    recorded: list[Recorded], expected: int
) -> None:
    point = fork_point(recorded, 0)
    assert point.from_step_id == expected
    assert point.taken_over == {one.step_id for one in recorded if one.step_id < expected}


@given(st.sets(st.integers(1, 30)), st.integers(-2, 40))
def test_a_step_is_one_of_the_recorded_or_the_one_behind_them(numbers: set[int], asked: int) -> None:
    recorded = [done(number) for number in sorted(numbers)]
    last = max(numbers, default=0)
    if 0 <= asked <= last + 1:
        point = fork_point(recorded, asked)
        assert asked in (0, point.from_step_id)
        assert 1 <= point.from_step_id <= last + 1
    else:
        with pytest.raises(InvalidArgument, match=f"1 to {last + 1}"):
            fork_point(recorded, asked)


def test_a_fork_needs_the_runs_whose_results_a_replay_reads() -> None:
    recorded = [
        done(1, child_workflow_id="b", child_status="SUCCESS"),
        done(2, "DBOS.getResult", child_workflow_id="b", child_status="SUCCESS"),
        done(3, child_workflow_id="a", child_status="PENDING"),
        done(4, child_workflow_id="gone"),
    ]
    assert fork_point(recorded, 3).awaited == ("b",)
    assert fork_point(recorded, 4).awaited == ("a", "b")
    with pytest.raises(InvalidArgument, match="at most 4"):
        fork_point(recorded, 5)


def test_the_log_of_a_fork_tells_of_the_steps_and_not_of_how_they_came_about() -> None:
    point = ForkPoint(4, frozenset({1, 2, 3}), ())

    def event(kind: EventKind, step_id: int = 0, name: str = "", **data: object) -> Event:
        return Event(kind, 1_000 + step_id, data, step_id, name, 1, 2, 9)

    events = [
        event(EventKind.STATE_CHANGED, to="RUNNING"),
        event(EventKind.STEP_STARTED, 1, "work"),
        event(EventKind.OUTPUT_DELTA, 1, "work", stream="text", text="half"),
        event(EventKind.STEP_SUCCEEDED, 1, "work", preview="x", duration_ms=400),
        event(EventKind.OUTPUT_DELTA, 2, STREAM_STEP, stream="log", text="a line"),
        event(EventKind.APPROVAL_REQUESTED, 3, "perdure.approval", approval_id="old/3"),
        event(EventKind.APPROVAL_DECIDED, 3, "perdure.approval", approval_id="old/3"),
        event(EventKind.STEP_SUCCEEDED, 3, "perdure.approval", preview="approved"),
        event(EventKind.STEP_FAILED, 4, "work", error={"type": "E"}),
        event(EventKind.PROGRESS, 0, message="hm"),
    ]
    told = taken_over(events, point)
    assert [(one.kind.value, one.step_id) for one in told] == [
        ("step_succeeded", 1),
        ("output_delta", 2),
        ("step_succeeded", 3),
    ]
    assert {(one.execution, one.sequence) for one in told} == {(0, 0)}
    steps = fold_steps(told)
    assert [(step.step_id, step.state.value, step.start_ms) for step in steps][:1] == [(1, "SUCCEEDED", 601)]
    assert {step.state.value for step in steps} == {"SUCCEEDED"}


def test_what_a_cut_log_does_not_tell_of_the_steps_is_told_by_their_checkpoints() -> None:
    recorded = [
        Recorded(1, "plan", False, completed_ms=1_000, duration_ms=20),
        Recorded(2, "DBOS.sleep", False, completed_ms=2_000),
        Recorded(3, "reader@1", False, "default.r.r-3", "SUCCESS", 3_000),
        Recorded(4, "DBOS.getResult", False, "default.r.r-3", "SUCCESS", 4_000),
        Recorded(5, "try", True, completed_ms=5_000),
        Recorded(6, "known", False, completed_ms=6_000),
        Recorded(7, "not taken over", False),
    ]
    known = Event(EventKind.STEP_SUCCEEDED, 6_000, {"preview": "kept"}, 6, "known", 1)
    point = ForkPoint(7, frozenset(range(1, 7)), ())
    told = from_checkpoints(recorded, [known], point, "default")
    assert [(event.kind, event.step_id, event.step_name, event.time_ms) for event in told] == [
        (EventKind.STEP_SUCCEEDED, 1, "plan", 1_000),
        (EventKind.CHILD_STARTED, 3, "reader@1", 3_000),
        (EventKind.STEP_SUCCEEDED, 4, "DBOS.getResult", 4_000),
        (EventKind.STEP_FAILED, 5, "try", 5_000),
    ]
    assert (told[0].data["duration_ms"], told[1].data["child_run_id"]) == (20, "r.3")
    assert {event.execution for event in told} == {0}
