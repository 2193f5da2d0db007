"""What an approval is: a question put to a person, with a deadline and a default, decided once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from perdure_service.domain.runs import RunKey
from perdure_service.errors import ApprovalClosed, RevisionConflict


class ApprovalState(StrEnum):
    """Where an approval stands; names as in the API without their prefix."""

    PENDING = "PENDING"
    APPROVED = "APPROVED"
    REJECTED = "REJECTED"
    EXPIRED = "EXPIRED"
    WITHDRAWN = "WITHDRAWN"


class TimeoutOutcome(StrEnum):
    """What happens when nobody decides in time; names as in the API without their prefix."""

    REJECT = "REJECT"
    APPROVE = "APPROVE"
    FAIL_RUN = "FAIL_RUN"


@dataclass(frozen=True, slots=True)
class Approval:
    """An approval as a caller sees it. `answer_json`, `payload_json` and `answer_schema_json` are JSON text."""

    approval_id: str
    key: RunKey
    agent: str
    step_id: int
    title: str
    payload_json: str
    answer_schema_json: str
    assignees: tuple[str, ...]
    create_time: datetime
    deadline_time: datetime | None
    on_timeout: TimeoutOutcome
    state: ApprovalState
    decided_by: str
    decide_time: datetime | None
    comment: str
    answer_json: str
    revision: int


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision somebody makes. `expected_revision` 0 means whatever it is now."""

    approve: bool
    decided_by: str
    comment: str = ""
    answer_json: str = ""
    expected_revision: int = 0

    @property
    def state(self) -> ApprovalState:
        """The state the decision leads to."""
        return ApprovalState.APPROVED if self.approve else ApprovalState.REJECTED


def must_decide(approval: Approval, decision: Decision, *, past_deadline: bool) -> bool:
    """Returns whether the decision changes the approval; False when it is the one already made.

    Args:
        approval: As it is, locked.
        decision: What the caller wants.
        past_deadline: Whether its deadline has passed, by the database's clock.

    Raises:
        ApprovalClosed: It is decided otherwise, expired, or withdrawn.
        RevisionConflict: It is open but not as the caller saw it.
    """
    same = (decision.state, decision.comment, decision.answer_json) == (
        approval.state, approval.comment, approval.answer_json,
    )  # fmt: skip
    if same:
        return False
    if approval.state is not ApprovalState.PENDING:
        raise ApprovalClosed(
            f"the approval is {approval.state.lower()} already", state=approval.state, revision=str(approval.revision)
        )
    if past_deadline:
        raise ApprovalClosed("the approval's deadline has passed", state=ApprovalState.EXPIRED)
    if decision.expected_revision not in (0, approval.revision):
        raise RevisionConflict(
            f"the approval is at revision {approval.revision}, not {decision.expected_revision}",
            revision=str(approval.revision),
        )
    return True


@dataclass(frozen=True, slots=True)
class ApprovalResult:
    """What the agent is told.

    Attributes:
        approved: Yes or no.
        state: How it came about; EXPIRED when the deadline decided.
        decided_by: Who decided; empty for the deadline.
        comment: What they said.
        answer: The answer given, a JSON value; None for none.
    """

    approved: bool
    state: ApprovalState
    decided_by: str = ""
    comment: str = ""
    answer: Any = None
