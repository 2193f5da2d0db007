"""Turns the requests of ApprovalService into what the domain understands, or says what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from perdure.v1 import approval_service_pb2 as pb

from perdure_service.domain.approvals import ApprovalState, Decision
from perdure_service.domain.runs import canonical_json
from perdure_service.rpc import enums
from perdure_service.rpc.json_values import read_value
from perdure_service.rpc.requests import namespace_of
from perdure_service.rpc.validation import MAX_APPROVAL_ID, Violations

MAX_COMMENT = 4_000
"""Characters."""
_APPROVES = {int(pb.DECISION_APPROVE): True, int(pb.DECISION_REJECT): False}


@dataclass(frozen=True, slots=True)
class ApprovalPage:
    """Which page of which approvals; empty `states` means PENDING, an empty `run_id` all."""

    namespace: str
    states: frozenset[ApprovalState]
    run_id: str
    page_size: int
    page_token: str


@dataclass(frozen=True, slots=True)
class ApprovalLookup:
    """Which approval."""

    namespace: str
    approval_id: str


@dataclass(frozen=True, slots=True)
class InboxWatch:
    """Which inbox, and how often to send a heartbeat."""

    namespace: str
    heartbeat_s: float


def list_approvals(request: pb.ListApprovalsRequest) -> ApprovalPage:
    """Returns which approvals are asked for.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    page = ApprovalPage(
        namespace_of(found, request.namespace),
        found.enums("states", request.states, enums.APPROVAL_STATE_OF),
        found.run_id(request.run_id, required=False),
        found.page_size(request.page_size),
        found.token("page_token", request.page_token),
    )
    found.raise_any()
    return page


def get_approval(request: pb.GetApprovalRequest) -> ApprovalLookup:
    """Returns which approval is asked for.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    lookup = _lookup(found, request)
    found.raise_any()
    return lookup


def decide_approval(
    request: pb.DecideApprovalRequest, *, caller: str, max_bytes: int
) -> tuple[ApprovalLookup, Decision]:
    """Returns which approval is decided, and how.

    Raises:
        InvalidArgument: With every field that is wrong.
        PayloadTooLarge: The answer takes more than `max_bytes`.
    """
    found = Violations()
    lookup = _lookup(found, request)
    if request.expected_revision < 0:
        found.add("expected_revision", "must not be negative")
    decision = Decision(
        approve=found.enum("decision", request.decision, _APPROVES, False),
        decided_by=caller,
        comment=found.prose("comment", request.comment, MAX_COMMENT),
        expected_revision=request.expected_revision,
    )
    found.raise_any()
    if request.HasField("answer"):
        answer = read_value(request.answer, root="answer", max_bytes=max_bytes)
        decision = replace(decision, answer_json=canonical_json(answer))
    return lookup, decision


def watch_approvals(request: pb.WatchApprovalsRequest) -> InboxWatch:
    """Returns which inbox is watched.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    heartbeat = request.heartbeat_interval if request.HasField("heartbeat_interval") else None
    watch = InboxWatch(namespace_of(found, request.namespace), found.heartbeat_s(heartbeat))
    found.raise_any()
    return watch


def _lookup(found: Violations, request: pb.GetApprovalRequest | pb.DecideApprovalRequest) -> ApprovalLookup:
    approval_id = found.name("approval_id", request.approval_id, required=True, max_length=MAX_APPROVAL_ID)
    return ApprovalLookup(namespace_of(found, request.namespace), approval_id)
