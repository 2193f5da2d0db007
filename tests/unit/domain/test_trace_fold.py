"""The spans that a log tells of: a tree, complete, the same however the log is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perdure_service import telemetry
from perdure_service.domain.events import APPROVAL_STEP, Event, EventKind
from perdure_service.domain.runs import RunKey
from perdure_service.domain.trace import RunLink, TracedRun, TraceSpan, in_tree_order
from perdure_service.domain.trace_fold import ExecutionFold, RunFold, fold_trace
from perdure_service.telemetry import derive_span_id

KEY = RunKey.of_api("default", "foo")
CALLER = 0xB7AD6B7169203331
TRACE = "0af7651916cd43dd8448eb211c80319c"
RUN = TracedRun(KEY, "research", "2", TRACE, f"00-{TRACE}-{CALLER:016x}-01", create_ms=90)


class Log:
    """Writes a log, in the words that executors use."""

    def __init__(self, *, queued: bool = False) -> None:
        self.events: list[Event] = []
        self.now = 100
        self.execution = 0
        if queued:
            self.state("QUEUED")
        else:
            self.execution = 1
            self.state("RUNNING", executor_id="host-1")

    def add(self, kind: EventKind, step_id: int = 0, name: str = "", attempt: int = 0, **data: Any) -> Log:
        sequence = len(self.events) + 1
        self.events.append(Event(kind, self.now, data, step_id, name, attempt, self.execution, sequence))
        self.now += 10
        return self

    def state(self, to: str, **data: Any) -> Log:
        return self.add(EventKind.STATE_CHANGED, to=to, **data)

    def claim(self, executor_id: str = "host-2") -> Log:
        self.execution += 1
        return self.state("RUNNING", **{"from": "QUEUED", "executor_id": executor_id})

    def recover(self, gap_ms: int = 25) -> Log:
        self.add(EventKind.RECOVERED, from_executor_id="host-1", gap_ms=gap_ms)
        self.now -= 10
        return self.state("QUEUED", **{"from": "RUNNING", "reason": "its executor is gone"})

    def park(self, state: str = "AWAITING_INPUT", **data: Any) -> Log:
        self.state(state, **{"from": state, "parked": True, **data})
        return self.state("QUEUED", **{"from": state, "reason": "what it waited for is there"})

    def start(self, step_id: int, name: str = "ask") -> Log:
        return self.add(EventKind.STEP_STARTED, step_id, name, 1, max_attempts=3)

    def retry(self, step_id: int, attempt: int, delay_ms: int = 5, name: str = "ask") -> Log:
        return self.add(
            EventKind.STEP_RETRYING, step_id, name, attempt, error={"type": "TimeoutError"}, delay_ms=delay_ms
        )

    def succeed(self, step_id: int, attempt: int = 1, name: str = "ask", duration_ms: int = 7) -> Log:
        return self.add(EventKind.STEP_SUCCEEDED, step_id, name, attempt, duration_ms=duration_ms)

    def spans(self, run: TracedRun = RUN, now_ms: int | None = None) -> list[TraceSpan]:
        return fold_trace(run, self.events, now_ms)


def told(spans: list[TraceSpan]) -> list[tuple[Any, ...]]:
    """Returns the tree: depth, name, beginning, end, status, error."""
    depth = {CALLER: -1}
    rows = []
    for span in in_tree_order(spans):
        depth[span.span_id] = depth[span.parent_span_id or CALLER] + 1
        rows.append((depth[span.span_id], span.name, span.start_ms, span.end_ms, span.status, span.error_type))
    return rows


def test_a_run_that_succeeded_with_a_retried_step() -> None:
    log = Log().start(1).retry(1, 1).succeed(1, 2).state("SUCCEEDED", **{"from": "RUNNING"})
    spans = log.spans()
    assert told(spans) == [
        (0, "agent_run research", 90, 140, "ok", ""),
        (1, "execution", 100, 140, "ok", ""),
        (2, "step ask", 110, 130, "ok", ""),
        (3, "attempt", 110, 120, "error", "TimeoutError"),
        (3, "attempt", 125, 130, "ok", ""),
    ]
    by_name = {span.name: span for span in spans}
    assert by_name["execution"].span_id == derive_span_id(KEY.workflow_id, 1)
    assert by_name["step ask"].span_id == derive_span_id(KEY.workflow_id, 1, 1)
    assert by_name["attempt"].span_id == derive_span_id(KEY.workflow_id, 1, 1, 2)
    assert by_name["attempt"].attributes == {
        "perdure.run_id": "foo",
        "perdure.namespace": "default",
        "perdure.agent": "research",
        "perdure.agent_version": "2",
        "perdure.execution": 1,
        "perdure.executor_id": "host-1",
        "perdure.step_id": 1,
        "perdure.step_name": "ask",
        "perdure.attempt": 2,
    }


def test_what_an_executors_death_cut_off_ends_at_the_recovery_and_the_gap_shows() -> None:
    log = Log().start(1).succeed(1).start(2).recover(gap_ms=8).claim().start(2).succeed(2)
    log.state("SUCCEEDED", **{"from": "RUNNING"})
    assert told(log.spans()) == [
        (0, "agent_run research", 90, 180, "ok", ""),
        (1, "execution", 100, 140, "error", "ExecutionLost"),
        (2, "step ask", 110, 120, "ok", ""),
        (3, "attempt", 110, 120, "ok", ""),
        (2, "step ask", 130, 140, "error", "ExecutionLost"),
        (3, "attempt", 130, 140, "error", "ExecutionLost"),
        (1, "wait recovery", 132, 140, "unset", ""),
        (1, "wait queued", 140, 150, "unset", ""),
        (1, "execution", 150, 180, "ok", ""),
        (2, "step ask", 160, 170, "ok", ""),
        (3, "attempt", 160, 170, "ok", ""),
    ]
    [gap] = [span for span in log.spans() if span.name == "wait recovery"]
    assert gap.attributes[telemetry.FROM_EXECUTOR_ID] == "host-1"


def test_a_run_that_is_parked_has_lost_no_execution_and_its_wait_goes_on_outside() -> None:
    log = Log().start(1).succeed(1)
    log.state("AWAITING_INPUT", **{"from": "RUNNING", "waiting_for": "signal:go"})
    log.park(waiting_for="signal:go").claim().succeed(2, name="DBOS.recv").state("SUCCEEDED", **{"from": "RUNNING"})
    assert told(log.spans()) == [
        (0, "agent_run research", 90, 180, "ok", ""),
        (1, "execution", 100, 140, "unset", ""),
        (2, "step ask", 110, 120, "ok", ""),
        (3, "attempt", 110, 120, "ok", ""),
        (2, "wait signal go", 130, 140, "unset", ""),
        (1, "wait parked", 140, 150, "unset", ""),
        (1, "wait queued", 150, 160, "unset", ""),
        (1, "execution", 160, 180, "ok", ""),
    ]


def test_an_attempt_that_never_came_is_none() -> None:
    log = Log().start(1).retry(1, 1, delay_ms=1_000).recover()
    assert [row[1:4] for row in told(log.spans()) if row[1] == "attempt"] == [("attempt", 110, 120)]
    waiting = Log().start(1).retry(1, 1, delay_ms=1_000)
    assert [row[1] for row in told(waiting.spans(now_ms=200))].count("attempt") == 1
    assert [row[1] for row in told(waiting.spans(now_ms=2_000))].count("attempt") == 2


def test_what_goes_on_has_no_end() -> None:
    log = Log().start(1)
    assert told(log.spans()) == [
        (0, "agent_run research", 90, None, "unset", ""),
        (1, "execution", 100, None, "unset", ""),
        (2, "step ask", 110, None, "unset", ""),
        (3, "attempt", 110, None, "unset", ""),
    ]


def test_waits_are_named_after_what_is_waited_for() -> None:
    log = Log(queued=True).claim()
    log.state("SLEEPING", **{"from": "RUNNING", "waiting_for": "sleep"})
    log.succeed(3, name="DBOS.sleep").state("RUNNING", **{"from": "SLEEPING"})
    log.state("AWAITING_INPUT", **{"from": "RUNNING", "waiting_for": "signal:add-note"})
    log.state("RUNNING", **{"from": "AWAITING_INPUT"}).succeed(4, name="DBOS.recv")
    waits = [row for row in told(log.spans()) if row[1].startswith("wait")]
    assert waits == [
        (1, "wait queued", 90, 110, "unset", ""),
        (2, "wait sleep", 120, 140, "unset", ""),
        (2, "wait signal add-note", 150, 160, "unset", ""),
    ]
    scheduled = Log(queued=True)
    scheduled.events[0] = replace(scheduled.events[0], data={"to": "SCHEDULED"})
    scheduled.state("QUEUED", **{"from": "SCHEDULED"}).claim()
    assert [row[1:4] for row in told(scheduled.spans()) if row[1].startswith("wait")] == [
        ("wait scheduled", 90, 110),
        ("wait queued", 110, 120),
    ]


def ask(log: Log, step_id: int) -> Log:
    log.add(EventKind.APPROVAL_REQUESTED, step_id, APPROVAL_STEP, approval_id=f"foo/{step_id}", title="secret")
    return log.state("AWAITING_INPUT", **{"from": "RUNNING", "waiting_for": "approval"})


def decide(log: Log, step_id: int, state: str) -> Log:
    return log.add(
        EventKind.APPROVAL_DECIDED, step_id, APPROVAL_STEP, approval_id=f"foo/{step_id}", state=state,
        decided_by="ann" if state != "WITHDRAWN" else "", comment="private",
    )  # fmt: skip


def test_an_approval_lasts_from_the_question_to_the_answer_whatever_becomes_of_who_asked() -> None:
    log = decide(ask(Log(), 2).recover().claim(), 2, "REJECTED").succeed(2, name=APPROVAL_STEP)
    [approval] = [span for span in log.spans() if span.name == "approval"]
    assert (approval.start_ms, approval.end_ms) == (110, 150)
    assert approval.parent_span_id == derive_span_id(KEY.workflow_id, 1)
    assert approval.span_id == derive_span_id(KEY.workflow_id, 1, 2)
    assert approval.attributes[telemetry.DECIDED_BY] == "ann"
    assert approval.attributes[telemetry.APPROVAL_STATE] == "REJECTED"
    assert not {"private", "secret"} & set(approval.attributes.values())
    assert not [span for span in log.spans() if span.name.startswith(("wait signal", "step"))]


def test_the_end_of_a_run_from_outside_ends_all_that_is_open() -> None:
    log = ask(Log().start(1), 2)
    decide(log, 2, "WITHDRAWN").state("CANCELLED", **{"from": "AWAITING_INPUT", "reason": "enough"})
    spans = log.spans()
    assert all(span.end_ms is not None for span in spans)
    ended = {span.name: (span.status, span.error_type) for span in spans}
    assert ended == {
        "agent_run research": ("error", "CANCELLED"),
        "execution": ("error", "CANCELLED"),
        "step ask": ("error", "CANCELLED"),
        "attempt": ("error", "CANCELLED"),
        "approval": ("unset", ""),
    }


def test_a_failed_step_tells_what_the_last_attempt_raised() -> None:
    log = Log().start(1).retry(1, 1)
    error = {"type": "DBOSMaxStepRetriesExceeded", "retryable": True, "cause": "TimeoutError: secret", "message": "x"}
    log.add(EventKind.STEP_FAILED, 1, "ask", 2, error=error, duration_ms=3)
    log.state("FAILED", **{"from": "RUNNING", "failure": {"type": "DBOSMaxStepRetriesExceeded", "message": "secret"}})
    errors = [(row[1], row[5]) for row in told(log.spans())]
    assert errors == [
        ("agent_run research", "DBOSMaxStepRetriesExceeded"),
        ("execution", "DBOSMaxStepRetriesExceeded"),
        ("step ask", "DBOSMaxStepRetriesExceeded"),
        ("attempt", "TimeoutError"),
        ("attempt", "TimeoutError"),
    ]


def test_an_operation_without_a_body_is_a_step_without_attempts() -> None:
    log = Log().succeed(1, 0, name="DBOS.getResult", duration_ms=4).succeed(2, 0, name="DBOS.sleep")
    assert [row for row in told(log.spans()) if row[0] > 1] == [(2, "step DBOS.getResult", 106, 110, "ok", "")]


def test_tokens_are_told_on_the_attempt_that_paid_for_them() -> None:
    usage = replace(Log().start(1).events[-1], kind="usage", data={"input_tokens": 5, "output_tokens": 2})  # type: ignore[arg-type]
    log = Log().start(1)
    log.events += [replace(usage, sequence=3), replace(usage, sequence=4)]
    log.retry(1, 1).succeed(1, 2)
    first, second = [span for span in in_tree_order(log.spans()) if span.name == "attempt"]
    assert (first.attributes[telemetry.INPUT_TOKENS], first.attributes[telemetry.OUTPUT_TOKENS]) == (10, 4)
    assert telemetry.INPUT_TOKENS not in second.attributes


def test_a_fork_goes_back_to_the_run_it_came_from() -> None:
    origin = RunLink("1" * 32, "default.bar.r", "bar")
    [run, *_] = in_tree_order(Log().spans(replace(RUN, forked_from=origin)))
    assert run.links == (origin,)
    assert origin.place == (int("1" * 32, 16), derive_span_id("default.bar.r", "run"), True)


def test_a_run_that_a_foreign_client_revived_goes_on() -> None:
    log = Log().state("CANCELLED", **{"from": "RUNNING"})
    log.state("QUEUED", **{"from": "CANCELLED"}).claim().state("SUCCEEDED", **{"from": "RUNNING"})
    spans = log.spans()
    assert [span.status for span in spans if span.name.startswith("agent_run")] == ["ok"]
    assert len({span.span_id for span in spans}) == len(spans)


def test_a_trace_is_read_from_its_top_parents_first() -> None:
    spans = Log().start(1).succeed(1).recover().claim().start(2).spans()
    seen = {CALLER}
    for span in in_tree_order(reversed(spans)):
        assert span.parent_span_id in seen
        seen.add(span.span_id)


HAPPENINGS = ["start", "retry", "succeed", "fail", "ask", "decide", "sleep", "wake", "recover", "park"]


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """A log of any length that executors, people and reapers might write."""
    log = Log(queued=draw(st.booleans()))
    open_steps: dict[int, int] = {}
    asked: list[int] = []
    step_id = 0
    for _ in range(draw(st.integers(0, 25))):
        running = log.execution and log.events[-1].data.get("to") != "QUEUED"
        if not running:
            log.claim()
            continue
        match draw(st.sampled_from(HAPPENINGS)):
            case "start":
                step_id += 1
                open_steps[step_id] = 1
                log.start(step_id)
            case "retry" if open_steps:
                one = draw(st.sampled_from(sorted(open_steps)))
                log.retry(one, open_steps[one], draw(st.integers(0, 50)))
                open_steps[one] += 1
            case "succeed" | "fail" as how if open_steps:
                one = draw(st.sampled_from(sorted(open_steps)))
                kind = EventKind.STEP_SUCCEEDED if how == "succeed" else EventKind.STEP_FAILED
                log.add(kind, one, "ask", open_steps.pop(one), duration_ms=1)
            case "ask":
                step_id += 1
                asked.append(step_id)
                ask(log, step_id)
            case "decide" if asked:
                decide(log, asked.pop(), "APPROVED")
            case "sleep":
                log.state("SLEEPING", waiting_for="sleep")
            case "wake":
                log.state("RUNNING")
            case "park" if not open_steps:
                log.park("SLEEPING", waiting_for="sleep")
            case "recover":
                open_steps.clear()
                log.recover(draw(st.integers(0, 30)))
            case _:
                pass
    if draw(st.booleans()):
        log.state(draw(st.sampled_from(["SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED"])))
    return log


@given(logs())
def test_every_log_makes_a_tree_in_which_nothing_ends_before_it_begins(log: Log) -> None:
    spans = log.spans()
    ids = {span.span_id for span in spans}
    assert len(ids) == len(spans), "each id once"
    assert all(span.parent_span_id in ids | {CALLER} for span in spans), "every parent is there"
    assert all(span.end_ms is None or span.end_ms >= span.start_ms for span in spans)
    ended = log.events[-1].ends_run
    assert [span for span in spans if span.end_ms is None] == [] or not ended
    assert any(span.end_ms is None for span in spans) or ended
    assert len(list(in_tree_order(spans))) == len(spans)


@given(logs())
def test_what_an_executor_tells_while_it_works_is_what_the_log_tells_later(log: Log) -> None:
    whole = {span.span_id: span for span in log.spans()}
    for number in {event.execution for event in log.events} - {0}:
        own = [event for event in log.events if event.execution == number]
        begun = next(event for event in own if event.kind is EventKind.STATE_CHANGED)
        # As an executor knows itself: it sees what it writes, and neither the row of its run nor its recovery.
        identity = TracedRun(KEY, RUN.agent, RUN.agent_version, TRACE)
        live = ExecutionFold(identity, number, str(begun.data["executor_id"]), begun.time_ms)
        for event in own[1:]:
            if event.kind is EventKind.RECOVERED or event.data.get("to") == "QUEUED":
                break
            for span in live.apply(event):
                assert whole[span.span_id] == span


@given(logs(), st.integers(0, 25))
def test_a_log_tells_the_same_in_pieces(log: Log, cut: int) -> None:
    fold = RunFold(RUN)
    first = [span for event in log.events[:cut] for span in fold.apply(event)]
    rest = [span for event in log.events[cut:] for span in fold.apply(event)]
    whole = RunFold(RUN)
    assert first + rest == [span for event in log.events for span in whole.apply(event)]


@pytest.mark.parametrize(("end", "expected"), [("recover", 110 - 25), ("cancel", 110)])
def test_it_tells_when_the_last_execution_was_at_work(end: str, expected: int) -> None:
    log = Log().recover() if end == "recover" else Log().state("CANCELLED")
    fold = RunFold(RUN)
    assert fold.cut_ms is None
    for event in log.events:
        fold.apply(event)
    assert fold.cut_ms == expected
