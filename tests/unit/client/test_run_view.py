"""The reducer of the live view, without a terminal."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from perdure_client import (
    Approval,
    ApprovalDecided,
    ApprovalRequested,
    ApprovalState,
    AttemptReset,
    ChildStarted,
    EventData,
    Failure,
    LogLine,
    ModelUsage,
    OutputDelta,
    Progress,
    Published,
    Recovered,
    Run,
    RunEvent,
    RunForked,
    RunState,
    SignalReceived,
    StateChanged,
    StepFailed,
    StepRetrying,
    StepStarted,
    StepState,
    StepSucceeded,
    UnknownData,
    Usage,
)
from perdure_client._run_view import NOTES, TAIL_CHARACTERS, RunView

BEGAN = datetime(2030, 1, 1, tzinfo=UTC)
ERROR = Failure(type="Timeout", message="slow")


class Log:
    """Makes events with sequences and times of their own: one a second."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []

    def add(self, data: EventData, step: int = 0, **fields: Any) -> None:
        sequence = len(self.events) + 1
        defaults: dict[str, Any] = {"execution": 1, "step_name": f"step{step}" if step else ""}
        self.events.append(
            RunEvent(
                sequence=sequence,
                event_time=BEGAN + timedelta(seconds=sequence),
                run_id="r",
                step_id=step,
                data=data,
                **{**defaults, **fields},
            )
        )

    def view(self, view: RunView | None = None) -> RunView:
        view = view or RunView(run_id="r")
        for event in self.events:
            view = view.apply(event)
        return view


@pytest.fixture
def log() -> Log:
    log = Log()
    log.add(StateChanged(to_state=RunState.QUEUED), execution=0)
    log.add(StateChanged(from_state=RunState.QUEUED, to_state=RunState.RUNNING))
    return log


def test_usage_adds_up_and_what_the_snapshot_counts_is_not_counted_again(log: Log) -> None:
    log.add(ModelUsage(model="small", input_tokens=7, output_tokens=3), step=1)
    log.add(ModelUsage(model="small", input_tokens=5, output_tokens=1), step=1)
    assert log.view().usage == Usage(input_tokens=12, output_tokens=4)
    snapshot = Run(
        namespace="default", run_id="r", agent="a", state=RunState.RUNNING, last_sequence=3,
        usage=Usage(input_tokens=7, output_tokens=3),
    )  # fmt: skip
    assert log.view(RunView(run_id="r").with_run(snapshot)).usage == Usage(input_tokens=12, output_tokens=4)


def test_the_states_and_times_of_a_run(log: Log) -> None:
    log.add(StateChanged(to_state=RunState.SLEEPING, until_time=BEGAN))
    view = log.view()
    assert (view.state, view.until_time, view.execution) == (RunState.SLEEPING, BEGAN, 1)
    log.add(StateChanged(to_state=RunState.FAILED, failure=ERROR, reason="x"))
    view = log.view()
    assert (view.state, view.failure, view.state_reason, view.until_time) == (RunState.FAILED, ERROR, "x", None)
    assert view.create_time == BEGAN + timedelta(seconds=1)
    assert view.start_time == BEGAN + timedelta(seconds=2)
    assert view.end_time == BEGAN + timedelta(seconds=4)
    assert view.last_sequence == 4


def test_a_step_from_its_beginning_over_a_retry_to_its_end(log: Log) -> None:
    log.add(StepStarted(max_attempts=4), 1, attempt=1)
    (step,) = log.view().steps.values()
    assert (step.name, step.state, step.attempt, step.max_attempts) == ("step1", StepState.RUNNING, 1, 4)
    log.add(StepRetrying(error=ERROR, delay=timedelta(seconds=9)), 1, attempt=1)
    (step,) = log.view().steps.values()
    assert (step.state, step.attempt, step.error) == (StepState.RUNNING, 2, ERROR)
    assert step.next_attempt_time == BEGAN + timedelta(seconds=4 + 9)
    log.add(StepSucceeded(duration=timedelta(seconds=10), output_preview="ok"), 1, attempt=2)
    (step,) = log.view().steps.values()
    assert (step.state, step.attempt, step.error, step.next_attempt_time) == (StepState.SUCCEEDED, 2, None, None)
    assert (step.duration, step.preview, step.max_attempts) == (timedelta(seconds=10), "ok", 4)


def test_a_step_that_failed_keeps_its_error(log: Log) -> None:
    log.add(StepStarted(), 1, attempt=1)
    log.add(StepFailed(error=ERROR, duration=timedelta(seconds=1)), 1, attempt=3)
    (step,) = log.view().steps.values()
    assert (step.state, step.error, step.attempt) == (StepState.FAILED, ERROR, 3)


def test_steps_stand_in_the_order_in_which_they_began(log: Log) -> None:
    for step in (3, 1, 2):
        log.add(StepStarted(), step, attempt=1)
    log.add(StepSucceeded(), 3, attempt=1)
    assert list(log.view().steps) == [3, 1, 2]


def test_a_child_is_a_step_of_its_own(log: Log) -> None:
    log.add(ChildStarted(child_run_id="r.4"), 4)
    (step,) = log.view().steps.values()
    assert (step.state, step.child_run_id) == (StepState.SUCCEEDED, "r.4")


def test_deltas_are_joined_by_step_and_stream_with_the_latest_last(log: Log) -> None:
    for step, stream, text in ((1, "a", "x"), (1, "b", "y"), (2, "a", "z"), (1, "a", "!")):
        log.add(OutputDelta(stream=stream, text=text), step, attempt=1)
    assert list(log.view().streams.items()) == [((1, "b"), "y"), ((2, "a"), "z"), ((1, "a"), "x!")]


def test_a_reset_voids_the_deltas_of_its_step_and_no_others(log: Log) -> None:
    log.add(OutputDelta(stream="a", text="dead"), 1, attempt=1)
    log.add(OutputDelta(stream="b", text="dead too"), 1, attempt=1)
    log.add(OutputDelta(stream="a", text="alive"), 2, attempt=1)
    log.add(AttemptReset(), 1, attempt=2)
    log.add(OutputDelta(stream="a", text="again"), 1, attempt=2)
    assert log.view().streams == {(2, "a"): "alive", (1, "a"): "again"}


def test_only_the_end_of_a_long_stream_is_kept(log: Log) -> None:
    log.add(OutputDelta(stream="a", text="x" * TAIL_CHARACTERS), 1)
    log.add(OutputDelta(stream="a", text="end"), 1)
    (text,) = log.view().streams.values()
    assert len(text) == TAIL_CHARACTERS
    assert text.endswith("xend")


def test_a_recovery_interrupts_what_ran_until_it_runs_again(log: Log) -> None:
    log.add(StepStarted(max_attempts=3), 1, attempt=1)
    log.add(StepSucceeded(), 1, attempt=1)
    log.add(StepStarted(max_attempts=3), 2, attempt=1)
    log.add(StepRetrying(error=ERROR, delay=timedelta(seconds=1)), 2, attempt=1)
    log.add(Recovered(from_executor_id="e1", gap=timedelta(seconds=12.5)))
    log.add(StateChanged(from_state=RunState.RUNNING, to_state=RunState.QUEUED))
    view = log.view()
    assert [step.state for step in view.steps.values()] == [StepState.SUCCEEDED, StepState.INTERRUPTED]
    assert view.steps[2].next_attempt_time is None
    assert (view.recoveries, view.standstill, view.state) == (1, timedelta(seconds=12.5), RunState.QUEUED)
    assert "stood still for 12.5 s" in view.notes[-1].text
    log.add(StateChanged(to_state=RunState.RUNNING), execution=2)
    log.add(AttemptReset(), 2, attempt=1, execution=2)
    log.add(StepStarted(max_attempts=3), 2, attempt=1, execution=2)
    view = log.view()
    assert (view.execution, view.steps[2].state, view.steps[2].attempt) == (2, StepState.RUNNING, 1)
    assert view.steps[2].error is None


def test_a_new_execution_interrupts_even_when_no_recovery_was_told(log: Log) -> None:
    log.add(StepStarted(), 1, attempt=1)
    log.add(LogLine(message="x"), execution=2)
    view = log.view()
    assert view.steps[1].state is StepState.INTERRUPTED
    assert view.execution == 2


def test_a_step_that_never_ended_is_interrupted_at_the_end(log: Log) -> None:
    log.add(StepStarted(), 1, attempt=1)
    log.add(StateChanged(to_state=RunState.CANCELLED))
    assert log.view().steps[1].state is StepState.INTERRUPTED


def test_questions_wait_until_they_are_decided(log: Log) -> None:
    log.add(ApprovalRequested(approval_id="r/3", title="Publish?", deadline_time=BEGAN), 3)
    (pending,) = log.view().pending_approvals
    assert (pending.approval_id, pending.title, pending.deadline_time) == ("r/3", "Publish?", BEGAN)
    log.add(ApprovalDecided(approval_id="r/3", state=ApprovalState.APPROVED, decided_by="me", comment="ok"), 3)
    view = log.view()
    assert view.pending_approvals == ()
    assert view.approvals["r/3"].decided_by == "me"
    assert view.approvals["r/3"].title == "Publish?"


def test_questions_from_before_the_first_event_can_be_added(log: Log) -> None:
    asked = Approval(approval_id="r/1", namespace="n", run_id="r", title="Go?", state=ApprovalState.PENDING)
    view = RunView(run_id="r").with_approvals([asked])
    assert [approval.title for approval in view.pending_approvals] == ["Go?"]
    log.add(ApprovalDecided(approval_id="r/1", state=ApprovalState.REJECTED))
    assert log.view(view).pending_approvals == ()


def test_progress_published_values_signals_and_log_lines(log: Log) -> None:
    log.add(Progress(message="a", completed=1, total=3))
    log.add(Progress(message="b", completed=2, total=3))
    log.add(Published(key="k", value=1))
    log.add(Published(key="k", value=[2]))
    log.add(SignalReceived(name="go", sender="me"))
    log.add(LogLine(message="careful", level="warning"))
    log.add(UnknownData())
    view = log.view()
    assert view.progress == Progress(message="b", completed=2, total=3)
    assert view.published == {"k": [2]}
    assert [(note.text, note.level) for note in view.notes] == [("signal go from me", "info"), ("careful", "warning")]


def test_only_the_last_notes_are_kept(log: Log) -> None:
    for number in range(NOTES + 5):
        log.add(LogLine(message=str(number)))
    assert [note.text for note in log.view().notes] == [str(number) for number in range(5, NOTES + 5)]


def test_an_event_that_comes_again_changes_nothing(log: Log) -> None:
    log.add(OutputDelta(stream="a", text="once"), 1)
    view = log.view()
    again = view
    for event in random.Random(1).sample(log.events, len(log.events)):
        again = again.apply(event)
    assert again is view


def test_a_view_is_a_value_that_events_do_not_touch(log: Log) -> None:
    before = log.view()
    kept = dict(before.steps)
    log.add(StepStarted(), 1)
    log.view()
    assert before.steps == kept == {}


def snapshot(**fields: Any) -> Run:
    defaults: dict[str, Any] = {"state": RunState.RUNNING, "agent": "a", "agent_version": "2", "trace_id": "t"}
    return Run(namespace="n", run_id="r", **{**defaults, **fields})


def test_a_snapshot_that_is_ahead_of_the_replay_keeps_its_state(log: Log) -> None:
    view = RunView(run_id="r").with_run(snapshot(state=RunState.AWAITING_INPUT, last_sequence=3, execution=1))
    for event in log.events:
        view = view.apply(event)
    assert view.state is RunState.AWAITING_INPUT
    log.add(StateChanged(to_state=RunState.AWAITING_INPUT))
    log.add(StateChanged(to_state=RunState.RUNNING))
    view = view.apply(log.events[2]).apply(log.events[3])
    assert view.state is RunState.RUNNING
    assert (view.agent, view.agent_version, view.trace_id) == ("a", "2", "t")


def test_a_replay_under_a_later_snapshot_still_interrupts_the_steps_of_dead_executions(log: Log) -> None:
    log.add(StepStarted(), 1)
    log.add(StateChanged(to_state=RunState.RUNNING), execution=2)
    view = log.view(RunView(run_id="r").with_run(snapshot(execution=2, last_sequence=4)))
    assert view.steps[1].state is StepState.INTERRUPTED


def test_the_result_completes_the_view(log: Log) -> None:
    log.add(StateChanged(to_state=RunState.SUCCEEDED))
    done = snapshot(state=RunState.SUCCEEDED, output={"a": 1}, end_time=BEGAN)
    view = log.view().with_run(done)
    assert (view.output, view.state, view.end_time) == ({"a": 1}, RunState.SUCCEEDED, BEGAN)


def test_a_fork_says_where_it_comes_from_and_shows_the_steps_that_it_took_over(log: Log) -> None:
    log.add(StateChanged(to_state=RunState.QUEUED), execution=0)
    log.add(RunForked(from_run_id="old", from_step_id=2), execution=0)
    log.add(StepSucceeded(duration=timedelta(seconds=9), output_preview="kept"), step=1, execution=0)
    log.add(StateChanged(to_state=RunState.RUNNING, from_state=RunState.QUEUED))
    log.add(StepStarted(), step=2)
    view = log.view()
    assert view.notes[0].text == "forked from old, goes on at step 2"
    assert [(step.state, step.preview) for step in view.steps.values()] == [
        (StepState.SUCCEEDED, "kept"),
        (StepState.RUNNING, ""),
    ]
    assert view.steps[1].duration == timedelta(seconds=9)
    assert (view.execution, view.recoveries) == (1, 0)
