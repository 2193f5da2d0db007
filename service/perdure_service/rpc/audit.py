"""Writes who changed what: a line `audit` for each call that changes something or tried to, without any payload."""

from __future__ import annotations

import re
from typing import Any

from perdure.v1 import approval_service_pb2

from perdure_service.domain.runs import DEFAULT_NAMESPACE
from perdure_service.logs import audit_log, audit_written
from perdure_service.rpc.access import ACCESS
from perdure_service.rpc.calls import Call

MAX_ID = 256
"""Characters of an id in the log."""
MALFORMED = "(malformed)"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
"""What ids look like, those of foreign workflows among them. Anything else may be a payload in the wrong place."""

_DECISIONS = {number: name.removeprefix("DECISION_") for name, number in approval_service_pb2.Decision.items()}


def audit(call: Call, request: Any, response: Any, outcome: str, reason: str = "") -> None:
    """Writes the line of a call that is over, if its method changes something.

    Args:
        call: The call.
        request: Its message; None if it did not come to that.
        response: The answer; None if there is none.
        outcome: The name of the status.
        reason: Why, if not OK.
    """
    access = ACCESS.get(call.method)
    if access is None or not access.changes:
        return
    facts: dict[str, Any] = {"caller": call.caller, "method": call.method, "call_id": call.call_id}
    if request is not None:
        facts |= _facts(request)
    answered = getattr(getattr(response, "run", None), "run_id", "")
    if answered and answered != facts.get("run_id"):  # an id that the server made, or the run that a fork made
        facts["new_run_id" if "run_id" in facts else "run_id"] = _id(answered)
    if hasattr(response, "deleted_count"):
        facts["deleted_count"] = response.deleted_count
    if reason:
        facts["reason"] = reason
    audit_log().info("audit", outcome=outcome, **facts)


async def audit_once(call: Call, request: Any, response: Any, outcome: str, reason: str = "") -> None:
    """Writes the line of a call, unless it has one, and returns when it is written; arguments as of `audit`."""
    if not call.audited:
        audit(call, request, response, outcome, reason)
        call.audited = True
        await audit_written()


def _facts(request: Any) -> dict[str, Any]:
    """Returns what a request is about: ids only."""
    facts: dict[str, Any] = {"namespace": _id(getattr(request, "namespace", "") or DEFAULT_NAMESPACE)}
    for name in ("run_id", "approval_id", "agent"):
        value = getattr(request, name, "")
        if value:
            facts[name] = _id(value)
    if isinstance(request, approval_service_pb2.DecideApprovalRequest):
        facts["decision"] = _DECISIONS.get(request.decision, str(request.decision))
    run_ids = list(getattr(request, "run_ids", ()))
    if run_ids:
        facts["run_ids"] = [_id(run_id) for run_id in run_ids[:100]]
    if getattr(request, "validate_only", False):
        facts["validate_only"] = True
    return facts


def _id(value: str) -> str:
    """Returns an id as the log may hold it."""
    return value[:MAX_ID] if _ID.fullmatch(value) else MALFORMED
