"""Who decides in a test."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from perdure_service.domain.approvals import Approval, ApprovalState, Decision, TimeoutOutcome
from perdure_service.domain.runs import RunKey
from perdure_service.testing import approval, rejection
from perdure_service.testing.decisions import Decisions, decider


def asked(title: str) -> Approval:
    return Approval(
        approval_id="run/1",
        key=RunKey.of_api("default", "run"),
        agent="agent",
        step_id=1,
        title=title,
        payload_json="null",
        answer_schema_json="",
        assignees=(),
        create_time=datetime.now(UTC),
        deadline_time=None,
        on_timeout=TimeoutOutcome.REJECT,
        state=ApprovalState.PENDING,
        decided_by="",
        decide_time=None,
        comment="",
        answer_json="",
        revision=1,
    )


@pytest.mark.parametrize(
    ("decisions", "publish", "spend"),
    [
        (True, True, True),
        (False, False, False),
        ({"Publish?": True}, True, None),
        ({"Publish?": False, "Spend?": approval("yes")}, False, True),
        (lambda one: rejection("too much") if one.title == "Spend?" else None, None, False),
    ],
)
def test_decisions_are_taken_for_all_by_title_or_by_a_function(
    decisions: Decisions, publish: bool | None, spend: bool | None
) -> None:
    decide = decider(decisions)
    for title, expected in (("Publish?", publish), ("Spend?", spend)):
        decision = decide(asked(title))
        assert (None if decision is None else decision.approve) is expected


def test_an_approval_can_carry_an_answer() -> None:
    assert approval("fine", answer={"limit": 3}) == Decision(True, "test", "fine", '{"limit": 3}')
