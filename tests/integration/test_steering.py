"""Approvals, signals, cancellation and the steps of runs: what people do to a run, and what they see of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Value
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb

from tests.helpers import marks
from tests.helpers.rpc import (
    TIMEOUT_S,
    Reading,
    Rpc,
    approval_state,
    duration,
    events_of,
    kind_of,
    kinds_of,
    new_id,
    only,
    refusal_of,
    refused,
    sequences,
    state_of,
    states_in,
    valid_text,
)
from tests.helpers.server import ServerProcess, effects
from tests.helpers.waiting import eventually, scaled


def value(content: Any) -> Value:
    return ParseDict(content, Value())


def asking(rpc: Rpc, run_input: Any = None) -> tuple[str, Any]:
    """Starts a run that asks; returns its id and the approval."""
    run_id = rpc.start("asker", run_input)
    return run_id, rpc.approval_of(run_id)


# ---- approvals -------------------------------------------------------------------------------------------------------


def test_an_approval_says_what_is_asked_of_whom(rpc: Rpc) -> None:
    run_id, approval = asking(rpc, {"timeout_s": 60.0, "on_timeout": "APPROVE", "answer_schema": {"type": "object"}})
    assert approval.approval_id.startswith(f"{run_id}/")
    assert approval.approval_id == f"{run_id}/{approval.step_id}"
    assert (approval.namespace, approval.run_id, approval.agent) == ("default", run_id, "asker")
    assert (approval.title, json.loads(approval.payload_json)["why"]) == ("Go on?", "test")
    assert json.loads(approval.answer_schema_json) == {"type": "object"}
    assert list(approval.assignees) == ["ann"]
    assert approval_state(approval) == "PENDING"
    assert approval.revision >= 1
    assert approval.decided_by == ""
    left = approval.deadline_time.ToDatetime(UTC) - approval.create_time.ToDatetime(UTC)
    assert timedelta(seconds=55) < left < timedelta(seconds=65)
    run = rpc.get(run_id)
    assert (state_of(run), run.pending_approvals) == ("AWAITING_INPUT", 1)
    request = approval_pb.GetApprovalRequest(approval_id=approval.approval_id)
    assert rpc.approvals.GetApproval(request).approval == approval
    rpc.cancel(run_id)


def test_an_approved_run_goes_on_and_knows_who_and_why(rpc: Rpc, database_url: str) -> None:
    run_id, approval = asking(rpc)
    decided = rpc.decide(approval.approval_id, comment="looks good", answer=value({"x": [1, None]}))
    assert approval_state(decided) == "APPROVED"
    assert decided.revision > approval.revision
    assert decided.comment == "looks good"
    assert json.loads(decided.answer_json) == {"x": [1, None]}
    assert decided.HasField("decide_time")
    assert rpc.output_of(run_id) == {
        "approved": True, "state": "APPROVED", "by": "dev", "comment": "looks good", "answer": {"x": [1, None]},
    }  # fmt: skip
    assert effects(database_url, run_id) == ["count 0", "count 1"]
    assert rpc.get(run_id).pending_approvals == 0


def test_a_rejected_run_is_told_so(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    assert approval_state(rpc.decide(approval.approval_id, approve=False, comment="no")) == "REJECTED"
    output = rpc.output_of(run_id)
    assert (output["approved"], output["state"], output["comment"]) == (False, "REJECTED", "no")


def test_the_log_tells_of_question_wait_decision_and_going_on(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    rpc.decide(approval.approval_id, comment="yes")
    events = rpc.events(run_id)
    assert states_in(events) == ["RUNNING", "AWAITING_INPUT", "RUNNING", "SUCCEEDED"]
    (asked,), (decided,) = only(events, "approval_requested"), only(events, "approval_decided")
    assert asked.sequence < decided.sequence
    assert (asked.approval_requested.approval_id, asked.approval_requested.title) == (approval.approval_id, "Go on?")
    assert asked.step_id == decided.step_id == approval.step_id
    assert not asked.approval_requested.HasField("deadline_time")
    told = decided.approval_decided
    assert (told.approval_id, approval_state(told), told.decided_by, told.comment) == (
        approval.approval_id, "APPROVED", "dev", "yes",
    )  # fmt: skip


def test_a_decision_wakes_its_run_at_once(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    began = time.monotonic()
    rpc.decide(approval.approval_id)
    rpc.end_of(run_id)
    assert time.monotonic() - began < scaled(1.0)


def test_an_answer_that_violates_its_schema_is_refused_and_another_one_may_follow(rpc: Rpc) -> None:
    schema = {"type": "object", "required": ["amount"], "properties": {"amount": {"type": "integer"}}}
    run_id, approval = asking(rpc, {"answer_schema": schema})
    for wrong in ({"amount": "much"}, {}, [], "text", None, 3):
        with refused("INVALID_ARGUMENT", "INVALID_FIELD") as error:
            rpc.decide(approval.approval_id, answer=value(wrong))
        assert all(field.startswith("answer") for field in error.fields)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "answer"):
        rpc.decide(approval.approval_id)
    assert rpc.approval_of(run_id) == approval
    rpc.decide(approval.approval_id, answer=value({"amount": 12}))
    assert rpc.output_of(run_id)["answer"] == {"amount": 12}


def test_a_rejection_needs_no_answer(rpc: Rpc) -> None:
    run_id, approval = asking(rpc, {"answer_schema": {"type": "object", "required": ["amount"]}})
    rpc.decide(approval.approval_id, approve=False)
    assert rpc.output_of(run_id)["state"] == "REJECTED"


@pytest.mark.parametrize("answer", [None, False, 0, "", [], {}], ids=repr)
def test_an_answer_may_be_any_json(rpc: Rpc, answer: object) -> None:
    run_id, approval = asking(rpc)
    rpc.decide(approval.approval_id, answer=value(answer))
    assert rpc.output_of(run_id)["answer"] == answer


def test_the_same_decision_again_is_ok_before_and_after_the_run_ended(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    decided = rpc.decide(approval.approval_id, comment="ok", answer=value({"b": 1, "a": 2}))
    assert rpc.decide(approval.approval_id, comment="ok", answer=value({"a": 2, "b": 1})) == decided
    rpc.end_of(run_id)
    assert rpc.decide(approval.approval_id, comment="ok", answer=value({"b": 1, "a": 2})) == decided
    # As a client repeats it whose first answer was lost.
    again = rpc.decide(
        approval.approval_id, comment="ok", answer=value({"b": 1, "a": 2}), expected_revision=approval.revision
    )
    assert again == decided
    assert len(only(rpc.events(run_id), "approval_decided")) == 1


@pytest.mark.parametrize(
    "changes", [{"approve": False}, {"comment": "other"}, {"answer": 1}], ids=lambda c: next(iter(c))
)
def test_another_decision_after_the_first_is_refused(rpc: Rpc, changes: dict[str, Any]) -> None:
    _, approval = asking(rpc)
    rpc.decide(approval.approval_id)
    if "answer" in changes:
        changes = {"answer": value(changes["answer"])}
    with refused("FAILED_PRECONDITION", "APPROVAL_CLOSED") as error:
        rpc.decide(approval.approval_id, **changes)
    assert error.metadata["state"] == "APPROVED"


def test_a_decision_about_another_revision_is_refused(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    with refused("ABORTED", "REVISION_CONFLICT"):
        rpc.decide(approval.approval_id, expected_revision=approval.revision + 1)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "expected_revision"):
        rpc.decide(approval.approval_id, expected_revision=-1)
    assert approval_state(rpc.approval_of(run_id)) == "PENDING"
    rpc.decide(approval.approval_id, expected_revision=approval.revision)
    rpc.end_of(run_id)


def test_of_concurrent_different_decisions_exactly_one_wins(rpc: Rpc, database_url: str) -> None:
    run_id, approval = asking(rpc)

    def decide(number: int) -> Any:
        return refusal_of(lambda: rpc.decide(approval.approval_id, approve=number % 2 == 0, comment=f"by {number}"))

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(decide, range(12)))
    (winner,) = [number for number, answer in enumerate(answers) if answer is None]
    assert {answer.reason for answer in answers if answer is not None} == {"APPROVAL_CLOSED"}
    output = rpc.output_of(run_id)
    assert (output["approved"], output["comment"]) == (winner % 2 == 0, f"by {winner}")
    assert len(only(rpc.events(run_id), "approval_decided")) == 1
    assert effects(database_url, run_id) == ["count 0", "count 1"]


def test_concurrent_equal_decisions_are_all_ok(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    with ThreadPoolExecutor(12) as pool:
        decided = list(pool.map(lambda _: rpc.decide(approval.approval_id, comment="yes"), range(12)))
    assert all(one == decided[0] for one in decided)
    assert len(only(rpc.events(run_id), "approval_decided")) == 1


@pytest.mark.parametrize("outcome", ["REJECT", "APPROVE"])
def test_the_deadline_decides_as_the_agent_said(rpc: Rpc, outcome: str) -> None:
    run_id, approval = asking(rpc, {"timeout_s": 0.4, "on_timeout": outcome})
    output = rpc.output_of(run_id)
    assert output == {
        "approved": outcome == "APPROVE", "state": "EXPIRED", "by": "", "comment": "", "answer": None,
    }  # fmt: skip
    closed = rpc.approval_of(run_id, "EXPIRED")
    assert closed.decided_by == ""
    assert closed.decide_time.ToDatetime() >= closed.deadline_time.ToDatetime()
    (told,) = only(rpc.events(run_id), "approval_decided")
    assert approval_state(told.approval_decided) == "EXPIRED"
    with refused("FAILED_PRECONDITION", "APPROVAL_CLOSED") as error:
        rpc.decide(approval.approval_id)
    assert error.metadata["state"] == "EXPIRED"


def test_the_deadline_may_fail_the_run(rpc: Rpc, database_url: str) -> None:
    run_id, approval = asking(rpc, {"timeout_s": 0.4, "on_timeout": "FAIL_RUN"})
    run = rpc.end_of(run_id)
    assert state_of(run) == "FAILED"
    assert run.failure.type == "ApprovalTimeout"
    assert "Go on?" in run.failure.message
    assert approval_state(rpc.approval_of(run_id, "EXPIRED")) == "EXPIRED"
    assert effects(database_url, run_id) == ["count 0"]
    with refused("FAILED_PRECONDITION", "APPROVAL_CLOSED"):
        rpc.decide(approval.approval_id)


def test_a_decision_before_the_deadline_counts(rpc: Rpc) -> None:
    run_id, approval = asking(rpc, {"timeout_s": 5.0, "on_timeout": "FAIL_RUN"})
    rpc.decide(approval.approval_id, approve=False)
    assert rpc.output_of(run_id)["state"] == "REJECTED"


def test_the_approval_of_a_cancelled_run_is_withdrawn(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    rpc.cancel(run_id)
    withdrawn = rpc.approval_of(run_id, "WITHDRAWN")
    assert withdrawn.approval_id == approval.approval_id
    assert withdrawn.revision > approval.revision
    with refused("FAILED_PRECONDITION", "APPROVAL_CLOSED") as error:
        rpc.decide(approval.approval_id)
    assert error.metadata["state"] == "WITHDRAWN"
    events = rpc.events(run_id)
    assert states_in(events)[-1] == "CANCELLED"
    assert kinds_of(events)[-1] == "state_changed"
    (told,) = only(events, "approval_decided")
    assert approval_state(told.approval_decided) == "WITHDRAWN"
    assert rpc.get(run_id).pending_approvals == 0


def test_the_approval_of_an_expired_run_is_withdrawn(rpc: Rpc) -> None:
    from tests.helpers.rpc import in_seconds

    run_id = rpc.start("asker", {}, deadline_time=in_seconds(0.8))
    assert approval_state(rpc.approval_of(run_id, "WITHDRAWN")) == "WITHDRAWN"
    assert state_of(rpc.get(run_id)) == "EXPIRED"


def test_an_approval_that_does_not_exist_is_not_found(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    for approval_id in (f"{run_id}/999", f"{run_id}/x", run_id, "x", f"{approval.approval_id}/1"):
        with refused("NOT_FOUND", "APPROVAL_NOT_FOUND"):
            rpc.decide(approval_id)
        with refused("NOT_FOUND", "APPROVAL_NOT_FOUND"):
            rpc.approvals.GetApproval(approval_pb.GetApprovalRequest(approval_id=approval_id))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "approval_id"):
        rpc.decide("")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "decision"):
        rpc.approvals.DecideApproval(approval_pb.DecideApprovalRequest(approval_id=approval.approval_id))
    rpc.cancel(run_id)


# ---- the inbox -------------------------------------------------------------------------------------------------------


def inbox(rpc: Rpc) -> Reading:
    reading = Reading(rpc.approvals.WatchApprovals(approval_pb.WatchApprovalsRequest(), timeout=scaled(TIMEOUT_S)))
    eventually(lambda: any(response.caught_up for response in reading.responses))
    return reading


def states_of(reading: Reading, approval_id: str) -> list[str]:
    return [
        approval_state(one)
        for response in list(reading.responses)
        for one in response.approvals
        if one.approval_id == approval_id
    ]


def test_the_inbox_sends_what_is_pending_first_and_then_what_changes(rpc: Rpc) -> None:
    run_id, before = asking(rpc)
    reading = inbox(rpc)
    assert before.approval_id in {one.approval_id for one in reading.responses[0].approvals}
    assert all(approval_state(one) == "PENDING" for one in reading.responses[0].approvals)
    other_run, after = asking(rpc)
    eventually(lambda: states_of(reading, after.approval_id) == ["PENDING"])
    rpc.decide(before.approval_id)
    rpc.decide(after.approval_id, approve=False)
    eventually(lambda: states_of(reading, before.approval_id) == ["PENDING", "APPROVED"])
    eventually(lambda: states_of(reading, after.approval_id) == ["PENDING", "REJECTED"])
    rpc.end_of(run_id)
    rpc.end_of(other_run)
    assert reading.open
    reading.close()


def test_an_inbox_in_which_nothing_happens_sends_heartbeats(rpc: Rpc) -> None:
    """As often as asked for, although it is looked at more often."""
    request = approval_pb.WatchApprovalsRequest(heartbeat_interval=duration(5))
    reading = Reading(rpc.approvals.WatchApprovals(request, timeout=scaled(TIMEOUT_S)))
    eventually(lambda: len(reading.responses) > 1, TIMEOUT_S)
    assert (len(reading.responses[1].approvals), reading.responses[1].caught_up) == (0, True)
    reading.close()


def test_the_inbox_tells_of_expired_and_withdrawn_approvals(rpc: Rpc) -> None:
    reading = inbox(rpc)
    _, expiring = asking(rpc, {"timeout_s": 0.5})
    cancelled_run, withdrawn = asking(rpc)
    eventually(lambda: states_of(reading, withdrawn.approval_id) == ["PENDING"])
    rpc.cancel(cancelled_run)
    eventually(lambda: states_of(reading, withdrawn.approval_id)[-1:] == ["WITHDRAWN"])
    eventually(lambda: states_of(reading, expiring.approval_id)[-1:] == ["EXPIRED"])
    reading.close()


def test_the_inbox_of_a_watcher_that_comes_later_has_no_closed_approvals(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    rpc.decide(approval.approval_id)
    rpc.end_of(run_id)
    reading = inbox(rpc)
    _, marker = asking(rpc)
    eventually(lambda: states_of(reading, marker.approval_id))
    assert states_of(reading, approval.approval_id) == []
    reading.close()


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_during_the_wait_arrives(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {})
    assert "more" in rpc.until(run_id, "AWAITING_INPUT").state_reason
    assert rpc.signal(run_id, {"a": [1, 2, {"b": None}], "c": 2**60})
    assert rpc.output_of(run_id) == [{"a": [1, 2, {"b": None}], "c": 2**60}]
    events = rpc.events(run_id)
    (received,) = only(events, "signal_received")
    assert (received.signal_received.name, received.signal_received.sender) == ("more", "dev")
    assert received.signal_received.payload_bytes > 0
    assert states_in(events) == ["RUNNING", "AWAITING_INPUT", "RUNNING", "SUCCEEDED"]


def test_a_signal_before_the_wait_is_kept(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {}, delay=duration(0.4))
    assert rpc.signal(run_id, "early")
    assert state_of(rpc.get(run_id)) == "SCHEDULED"
    assert rpc.output_of(run_id) == ["early"]


def test_signals_arrive_in_order(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {"signals": 5})
    for number in range(5):
        rpc.signal(run_id, number)
    assert rpc.output_of(run_id) == [0, 1, 2, 3, 4]


def test_a_repeated_signal_arrives_once(rpc: Rpc) -> None:
    run_id, request_id = rpc.start("listener", {"signals": 2}), new_id()
    assert rpc.signal(run_id, "a", request_id=request_id)
    assert not rpc.signal(run_id, "a", request_id=request_id)
    assert not rpc.signal(run_id, "changed", request_id=request_id)
    assert rpc.signal(run_id, "b")
    assert rpc.output_of(run_id) == ["a", "b"]
    assert len(only(rpc.events(run_id), "signal_received")) == 2
    assert not rpc.signal(run_id, "a", request_id=request_id)


def test_concurrent_repeats_of_a_signal_arrive_once(rpc: Rpc) -> None:
    run_id, request_id = rpc.start("listener", {"signals": 2}), new_id()
    with ThreadPoolExecutor(12) as pool:
        created = list(pool.map(lambda _: rpc.signal(run_id, "a", request_id=request_id), range(12)))
    assert sum(created) == 1
    rpc.signal(run_id, "b")
    assert rpc.output_of(run_id) == ["a", "b"]


def test_one_request_id_may_signal_two_runs(rpc: Rpc) -> None:
    request_id = new_id()
    runs = [rpc.start("listener", {}) for _ in range(2)]
    for run_id in runs:
        assert rpc.signal(run_id, run_id, request_id=request_id)
    for run_id in runs:
        assert rpc.output_of(run_id) == [run_id]


def test_a_signal_of_another_name_does_not_wake(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {})
    rpc.signal(run_id, "other", name="other")
    rpc.signal(run_id, "more")
    assert rpc.output_of(run_id) == ["more"]


def test_plain_dbos_recv_gets_signals(rpc: Rpc) -> None:
    run_id = rpc.start("plain", {"name": "x", "wait": True})
    rpc.until(run_id, "AWAITING_INPUT")
    rpc.signal(run_id, {"hello": 1}, name="topic")
    assert rpc.output_of(run_id)["message"] == {"hello": 1}


def test_a_signal_to_a_finished_run_is_refused(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 0})
    rpc.end_of(run_id)
    before = rpc.get(run_id).last_sequence
    with refused("FAILED_PRECONDITION", "RUN_FINISHED"):
        rpc.signal(run_id)
    assert rpc.get(run_id).last_sequence == before


def test_a_signal_that_does_not_come_fails_the_run(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {"timeout_s": 0.3})
    run = rpc.end_of(run_id)
    assert state_of(run) == "FAILED"
    assert run.failure.type == "SignalTimeout"
    assert "more" in run.failure.message


@pytest.mark.parametrize("payload", [0, False, "", [], {}], ids=repr)
def test_a_falsy_payload_is_a_payload(rpc: Rpc, payload: object) -> None:
    run_id = rpc.start("listener", {})
    rpc.signal(run_id, payload)
    assert rpc.output_of(run_id) == [payload]


def test_an_absent_payload_is_an_empty_object(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {})
    rpc.runs.SignalRun(pb.SignalRunRequest(run_id=run_id, name="more", request_id=new_id()))
    assert rpc.output_of(run_id) == [{}]


def test_a_null_payload_arrives_as_null_or_is_refused_but_is_no_timeout(rpc: Rpc) -> None:
    run_id = rpc.start("listener", {"timeout_s": 30.0})
    refusal = refusal_of(lambda: rpc.signal(run_id, None))
    if refusal is not None:
        assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        rpc.cancel(run_id)
        return
    run = rpc.end_of(run_id)
    assert state_of(run) == "SUCCEEDED", run.failure
    assert json.loads(run.output_json) == [None]


@pytest.mark.parametrize("name", ["", " ", "a b", ".a", "-a", "a" * 65, "ä", "a/b", "a\x00", "a\n"])
def test_a_bad_signal_name_is_refused(rpc: Rpc, name: str) -> None:
    run_id = rpc.start("counter", {"steps": 0})
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "name"):
        rpc.signal(run_id, name=name)


def test_a_signal_cannot_pretend_to_be_a_decision(rpc: Rpc) -> None:
    run_id, approval = asking(rpc)
    topic = f"perdure.approval.{approval.step_id}"
    refusal_of(lambda: rpc.signal(run_id, {"revision": 99}, name=topic))
    assert approval_state(rpc.approval_of(run_id)) == "PENDING"
    rpc.decide(approval.approval_id, approve=False)
    assert rpc.output_of(run_id)["state"] == "REJECTED"


def test_a_signal_needs_a_request_id(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 0})
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "request_id"):
        rpc.runs.SignalRun(pb.SignalRunRequest(run_id=run_id, name="more"))


# ---- cancellation ----------------------------------------------------------------------------------------------------


def test_cancelling_a_running_run_stops_its_effects(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("counter", {"steps": 500, "delay_s": 0.05})
    eventually(lambda: len(effects(database_url, run_id)) >= 3)
    run = rpc.cancel(run_id, "enough")
    assert state_of(run) == "CANCELLED"
    assert run.state_reason == "cancelled by dev: enough"
    assert run.HasField("end_time")
    done = len(effects(database_url, run_id))
    events = rpc.events(run_id)
    assert states_in(events) == ["RUNNING", "CANCELLED"]
    assert events[-1].state_changed.reason == "cancelled by dev: enough"
    # Another run has its whole life meanwhile, as a measure of time.
    rpc.output_of(rpc.start("counter", {"steps": 6, "delay_s": 0.05}))
    assert len(effects(database_url, run_id)) <= done + 1
    assert rpc.events(run_id) == events


@pytest.mark.parametrize(
    ("agent", "run_input", "state"),
    [
        ("asker", {}, "AWAITING_INPUT"),
        ("listener", {}, "AWAITING_INPUT"),
        ("sleeper", {"seconds": 600}, "SLEEPING"),
        ("plain", {"name": "x", "wait": True}, "AWAITING_INPUT"),
    ],
)
def test_cancelling_a_waiting_run_ends_it_at_once(
    rpc: Rpc, database_url: str, agent: str, run_input: Any, state: str
) -> None:
    run_id = rpc.start(agent, run_input)
    rpc.until(run_id, state)
    reading = Reading(rpc.watch(run_id))
    eventually(lambda: reading.responses)
    began = time.monotonic()
    assert state_of(rpc.cancel(run_id)) == "CANCELLED"
    reading.join()
    assert time.monotonic() - began < scaled(1.0)
    assert reading.refusal is None
    assert states_in(reading.events)[-1] == "CANCELLED"
    assert effects(database_url, run_id) in ([], ["count 0"])


@pytest.mark.parametrize("how", ["scheduled", "queued"])
def test_cancelling_a_run_that_has_not_begun(how: str, request: pytest.FixtureRequest) -> None:
    if how == "scheduled":
        rpc: Rpc = request.getfixturevalue("rpc")
        run_id = rpc.start("counter", {}, delay=duration(600))
        expected = ["SCHEDULED", "CANCELLED"]
    else:
        own: ServerProcess = request.getfixturevalue("own_server")
        own.start(PERDURE_MAX_RUNNING="1")
        rpc = Rpc(own.address)
        request.addfinalizer(rpc.close)
        rpc.until(rpc.start("listener", {}), "AWAITING_INPUT")
        run_id = rpc.start("counter", {})
        expected = ["QUEUED", "CANCELLED"]
    assert state_of(rpc.cancel(run_id)) == "CANCELLED"
    assert states_in(rpc.events(run_id)) == expected
    assert not rpc.get(run_id).HasField("start_time")


def test_cancelling_a_run_cancels_its_children(rpc: Rpc) -> None:
    run_id = rpc.start("parent", {"children": 3, "seconds": 600.0})
    eventually(lambda: len(rpc.runs.ListSteps(pb.ListStepsRequest(run_id=run_id)).steps) >= 3)
    children = [f"{run_id}.{number}" for number in (1, 2, 3)]
    for child in children:
        eventually(lambda child=child: refusal_of(lambda: rpc.get(child)) is None)
        rpc.until(child, "SLEEPING")
    assert state_of(rpc.cancel(run_id, "all of it")) == "CANCELLED"
    for child in children:
        run = rpc.until(child, "CANCELLED", timeout=2)
        assert run.parent_run_id == run_id
        assert states_in(rpc.events(child))[-1] == "CANCELLED"


def test_cancelling_a_child_leaves_its_parent_to_decide(rpc: Rpc) -> None:
    run_id = rpc.start("parent", {"children": 1, "seconds": 600.0})
    child = f"{run_id}.1"
    eventually(lambda: refusal_of(lambda: rpc.get(child)) is None)
    rpc.until(child, "SLEEPING")
    assert state_of(rpc.cancel(child)) == "CANCELLED"
    run = rpc.until(run_id, "FAILED", timeout=5)
    assert run.failure.message


def test_cancelling_a_run_that_ended_changes_nothing(rpc: Rpc) -> None:
    for agent, state in (("counter", "SUCCEEDED"), ("failing", "FAILED")):
        run_id = rpc.start(agent, {})
        before = rpc.end_of(run_id)
        after = rpc.cancel(run_id, "too late")
        assert state_of(after) == state
        assert rpc.get(run_id) == before


def test_cancelling_twice_keeps_the_first_reason(rpc: Rpc) -> None:
    run_id = rpc.start("sleeper", {"seconds": 600})
    first = rpc.cancel(run_id, "first")
    assert rpc.cancel(run_id, "second") == first
    assert len([state for state in states_in(rpc.events(run_id)) if state == "CANCELLED"]) == 1


def test_concurrent_cancellations_end_a_run_once(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 500, "delay_s": 0.02})
    with ThreadPoolExecutor(12) as pool:
        runs = list(pool.map(lambda number: rpc.cancel(run_id, str(number)), range(12)))
    assert {state_of(run) for run in runs} == {"CANCELLED"}
    events = rpc.events(run_id)
    assert states_in(events).count("CANCELLED") == 1
    assert sequences(events) == list(range(1, len(events) + 1))


def test_a_cancelled_run_is_not_started_again_by_the_same_start(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start_call("counter", {"steps": 1}, run_id=new_id(), delay=duration(600)).run.run_id
    rpc.cancel(run_id)
    again = rpc.start_call("counter", {"steps": 1}, run_id=run_id)
    assert (again.created, state_of(again.run)) == (False, "CANCELLED")
    assert effects(database_url, run_id) == []


def test_cancelling_what_does_not_exist_is_not_found(rpc: Rpc) -> None:
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        rpc.cancel(new_id())


# ---- steps and attempts ----------------------------------------------------------------------------------------------


def steps_of(rpc: Rpc, run_id: str) -> list[Any]:
    return list(rpc.runs.ListSteps(pb.ListStepsRequest(run_id=run_id)).steps)


def step_state(step: Any) -> str:
    return pb.StepState.Name(step.state).removeprefix("STEP_STATE_")


def test_a_retried_step_shows_every_attempt(rpc: Rpc) -> None:
    run_id = rpc.start("flaky", {"failures": 2})
    events = rpc.events(run_id)
    assert [event.attempt for event in only(events, "step_retrying")] == [1, 2]
    for event in only(events, "step_retrying"):
        assert event.step_name == "flaky_step"
        assert event.step_retrying.error.type == "FlakyError"
        assert (
            event.step_retrying.error.message == f"attempt {event.attempt} of the flaky step failed on {marks.PAYLOAD}"
        )
        assert event.step_retrying.delay.ToTimedelta() == timedelta(milliseconds=10)
    (started,) = only(events, "step_started")
    assert (started.attempt, started.step_started.max_attempts) == (1, 4)
    (done,) = only(events, "step_succeeded")
    assert (done.attempt, json.loads(f'"{done.step_succeeded.output_preview}"')) == (3, "after 3")
    assert done.step_succeeded.duration.ToTimedelta() >= timedelta(milliseconds=20)
    (step,) = steps_of(rpc, run_id)
    assert (step.step_name, step_state(step), step.attempts) == ("flaky_step", "SUCCEEDED", 3)


def test_a_step_whose_attempts_are_used_up_fails_its_run(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("flaky", {"failures": 9})
    run = rpc.end_of(run_id)
    assert state_of(run) == "FAILED"
    assert run.failure.step_name == "flaky_step"
    assert run.failure.retryable
    assert "attempt 4 of the flaky step failed" in run.failure.message + run.failure.cause
    events = rpc.events(run_id)
    assert len(only(events, "step_retrying")) == 3
    (failed,) = only(events, "step_failed")
    assert failed.step_name == "flaky_step"
    assert events[-1].state_changed.failure == run.failure
    (step,) = steps_of(rpc, run_id)
    assert (step_state(step), step.attempts) == ("FAILED", 4)
    assert step.error.message
    assert effects(database_url, run_id) == [f"flaky {number}" for number in (1, 2, 3, 4)]


def test_a_failure_after_a_step_that_was_caught_is_not_blamed_on_the_step(rpc: Rpc) -> None:
    run = rpc.end_of(rpc.start("catcher", {}))
    assert (state_of(run), run.failure.type, run.failure.message) == ("FAILED", "ValueError", "of its own")
    assert run.failure.step_name == ""


@pytest.mark.parametrize(
    "message", ["no way", "", "ä🙂\n\t", "a\x00b", "x" * 100_000], ids=lambda text: text[:8] or "empty"
)
def test_a_failure_of_the_agent_is_told_by_type_and_message(rpc: Rpc, message: str) -> None:
    run_id = rpc.start("failing", {"message": message.replace("\x00", "")})
    run = rpc.end_of(run_id)
    assert (state_of(run), run.failure.type, run.failure.step_name) == ("FAILED", "FlakyError", "")
    assert run.failure.message[:100] == message.replace("\x00", "")[:100]
    assert not run.failure.retryable
    assert rpc.events(run_id)[-1].state_changed.failure == run.failure


def test_steps_are_listed_in_the_order_in_which_they_began(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 4})
    rpc.end_of(run_id)
    steps = steps_of(rpc, run_id)
    assert [(step.step_id, step.step_name, step_state(step)) for step in steps] == [
        (number, "count_one", "SUCCEEDED") for number in (1, 2, 3, 4)
    ]
    assert [step.output_preview for step in steps] == ["0", "1", "2", "3"]
    for step in steps:
        assert (step.attempts, step.execution) == (1, 1)
        assert step.start_time.ToDatetime() <= step.end_time.ToDatetime()


def test_a_step_that_runs_is_listed_as_running(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 1, "delay_s": 60})
    (step,) = eventually(lambda: steps_of(rpc, run_id))
    assert (step_state(step), step.HasField("end_time")) == ("RUNNING", False)
    rpc.cancel(run_id)
    (step,) = steps_of(rpc, run_id)
    assert step_state(step) == "INTERRUPTED"


def test_progress_is_told_and_kept(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 3})
    told = [event.progress for event in only(rpc.events(run_id), "progress")]
    assert [(one.message, one.completed, one.total) for one in told] == [("counting", n, 3) for n in range(3)]
    assert rpc.get(run_id).progress == told[-1]


def test_all_operations_of_plain_dbos_code_are_visible(rpc: Rpc) -> None:
    run_id = rpc.start("plain", {"name": "x"})
    events = rpc.events(run_id)
    output = rpc.output_of(run_id)
    assert output == {"value": 4, "child": 11, "message": None}
    (published,) = only(events, "published")
    assert (published.published.key, json.loads(published.published.value_json)) == ("status", {"name": "x"})
    assert "plain_step" in [event.step_name for event in only(events, "step_succeeded")]
    (delta,) = only(events, "output_delta")
    assert (delta.output_delta.stream, delta.output_delta.text) == ("log", "a line")
    assert states_in(events) == ["RUNNING", "SLEEPING", "RUNNING", "SUCCEEDED"]
    children = [event.child_started.child_run_id for event in only(events, "child_started")]
    assert len(children) == 2
    for child, expected in zip(children, (4, 11), strict=True):
        run = rpc.get(child)
        assert (state_of(run), json.loads(run.output_json), run.parent_run_id) == ("SUCCEEDED", expected, run_id)
        assert run.trace_id == rpc.get(run_id).trace_id
        child_events = rpc.events(child)
        assert sequences(child_events) == list(range(1, len(child_events) + 1))
        assert {event.run_id for event in child_events} == {child}
        assert "step_succeeded" in kinds_of(child_events)
    numbers = {event.step_id for event in events if event.step_id}
    assert numbers == set(range(1, max(numbers) + 1))


def test_every_operation_of_plain_dbos_code_is_listed_as_a_step(rpc: Rpc) -> None:
    run_id = rpc.start("plain", {"name": "x"})
    numbers = {event.step_id for event in rpc.events(run_id) if event.step_id}
    steps = steps_of(rpc, run_id)
    assert {step.step_id for step in steps} == numbers
    assert all(step_state(step) == "SUCCEEDED" for step in steps)
    assert [step.child_run_id for step in steps if step.child_run_id] == [f"{run_id}.3", f"{run_id}.7"]


def test_a_run_sleeps_from_the_sleep_until_it_goes_on(rpc: Rpc) -> None:
    run_id = rpc.start("sleeper", {"seconds": 0.3})
    events = rpc.events(run_id)
    asleep, awake = only(events, "state_changed")[1:3]
    assert states_in(events) == ["RUNNING", "SLEEPING", "RUNNING", "SUCCEEDED"]
    assert awake.event_time.ToDatetime() - asleep.event_time.ToDatetime() > timedelta(seconds=0.25)
    early = asleep.state_changed.until_time.ToDatetime() - awake.event_time.ToDatetime()
    assert early <= timedelta(milliseconds=5)  # it waits by the monotonic clock, and times are cut to whole ms
    # What happened before the sleep is told before it, and what happened after it after.
    between = [event for event in events if asleep.sequence < event.sequence < awake.sequence]
    assert kinds_of(between) == []


def test_nothing_is_told_of_plain_dbos_code_while_it_sleeps(rpc: Rpc) -> None:
    run_id = rpc.start("plain", {"name": "x"})
    events = rpc.events(run_id)
    asleep, awake = only(events, "state_changed")[1:3]
    assert [kind_of(event) for event in events if asleep.sequence < event.sequence < awake.sequence] == []


def test_a_blocking_agent_does_not_hold_up_health_streams_or_others(rpc: Rpc) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    runs = [rpc.start("blocking", {"seconds": 1.5}) for _ in range(4)]
    health = health_pb2_grpc.HealthStub(rpc.channel)
    began = time.monotonic()
    slowest = 0.0
    run_id = rpc.start("counter", {"steps": 5})
    while time.monotonic() - began < 0.8:
        one = time.monotonic()
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=1).status == health_pb2.HealthCheckResponse.SERVING
        slowest = max(slowest, time.monotonic() - one)
    assert events_of(rpc.stream(run_id))
    assert rpc.output_of(run_id) == {"total": 10}
    assert time.monotonic() - began < scaled(1.4)
    assert slowest < scaled(0.5)
    for run in runs:
        assert rpc.output_of(run) == "done"


# ---- a killed server -------------------------------------------------------------------------------------------------


def _again(call: Callable[[], Any]) -> Any:
    """Repeats a call while the server comes up."""

    answers: list[Any] = []

    def attempt() -> bool:
        refusal = refusal_of(lambda: answers.append(call()))
        assert refusal is None or refusal.code is grpc.StatusCode.UNAVAILABLE, refusal
        return refusal is None

    eventually(attempt, 15)
    return answers[-1]


def test_waits_survive_a_kill_and_what_comes_right_after_the_restart_is_honoured(own_server: ServerProcess) -> None:
    own_server.start()
    with Rpc(own_server.address) as rpc:
        asker, approval = asking(rpc)
        listener = rpc.start("listener", {"signals": 2})
        sleeper = rpc.start("sleeper", {"seconds": 2.0})
        rpc.signal(listener, "before")
        eventually(lambda: len(only_steps(rpc, listener)) >= 1)
        rpc.until(sleeper, "SLEEPING")
        own_server.kill()
        own_server.start()
        _again(lambda: rpc.decide(approval.approval_id, comment="after"))
        _again(lambda: rpc.signal(listener, "after"))
        assert rpc.output_of(asker)["comment"] == "after"
        assert rpc.output_of(listener) == ["before", "after"]
        assert rpc.output_of(sleeper) == "slept"
        for run_id in (asker, listener, sleeper):
            run, events = rpc.get(run_id), rpc.events(run_id)
            assert run.execution == 2
            assert sequences(events) == list(range(1, len(events) + 1))
            assert len(only(events, "recovered")) == 1
        events = rpc.events(asker)
        assert len(only(events, "approval_requested")) == 1
        assert len(only(events, "approval_decided")) == 1
    for run_id in (asker, sleeper):
        assert effects(own_server.database_url, run_id) == ["count 0", "count 1"]


def only_steps(rpc: Rpc, run_id: str) -> list[Any]:
    return [step for step in steps_of(rpc, run_id) if step_state(step) == "SUCCEEDED"]


def test_a_decision_waits_for_a_run_whose_server_is_dead(own_server: ServerProcess) -> None:
    """Decided by another server (the same, started again, before it has taken the run back would do as well)."""
    own_server.start()
    with Rpc(own_server.address) as rpc:
        runs = [asking(rpc, {"timeout_s": 2.0, "on_timeout": outcome}) for outcome in ("REJECT", "FAIL_RUN")]
        own_server.kill()
        eventually(lambda: not _pending(own_server, runs))
        own_server.start()
        first = _again(lambda: rpc.end_of(runs[0][0]))
        second = rpc.end_of(runs[1][0])
    # Their deadlines passed while nobody was there.
    assert json.loads(first.output_json)["state"] == "EXPIRED"
    assert state_of(second) == "FAILED"
    assert second.failure.type == "ApprovalTimeout"


def _pending(server: ServerProcess, runs: list[tuple[str, Any]]) -> bool:
    from tests.helpers.server import sql

    with sql(server.database_url) as connection:
        found = connection.execute(
            "SELECT count(*) FROM perdure.approval WHERE approval_id = ANY(%s) AND deadline_at > now()",
            ([approval.approval_id for _, approval in runs],),
        ).fetchone()
    assert found is not None
    return bool(found[0])


def test_text_of_an_attempt_that_was_killed_is_void(own_server: ServerProcess) -> None:
    own_server.start()
    with Rpc(own_server.address) as rpc:
        run_id = rpc.start("counter", {"steps": 1, "delay_s": 0.8, "text": "once"})
        eventually(lambda: effects(own_server.database_url, run_id))
        eventually(lambda: "output_delta" in kinds_of(_now(rpc, run_id)))
        own_server.kill()
        own_server.start()
        _again(lambda: rpc.end_of(run_id))
        events = rpc.events(run_id)
    assert valid_text(events) == "once"
    assert len(only(events, "output_delta")) == 2
    assert len(only(events, "attempt_reset")) == 1


def _now(rpc: Rpc, run_id: str) -> list[Any]:
    return list(rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id)).events)


def test_a_wait_that_is_woken_for_nothing_goes_on_waiting(rpc: Rpc) -> None:
    run_id = rpc.start("falsely-woken")
    rpc.until(run_id, "AWAITING_INPUT")
    rpc.signal(run_id, {"it": "came"})
    assert json.loads(rpc.end_of(run_id).output_json) == {"it": "came"}
