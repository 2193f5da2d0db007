"""Who decides approvals in a test: everything alike, by title, or a function of the approval."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from perdure_service.domain.approvals import Approval, Decision

DECIDED_BY = "test"

Decide = Callable[[Approval], Decision | None]
"""Returns the decision of an approval, None to leave it open."""

Decisions = Decide | bool | Mapping[str, bool | Decision]
"""What `AgentHarness(decide=…)` takes: True approves all, False rejects all, a mapping decides by title."""


def approval(comment: str = "", *, answer: Any = None, decided_by: str = DECIDED_BY) -> Decision:
    """Returns the decision to approve."""
    return Decision(True, decided_by, comment, "" if answer is None else json.dumps(answer))


def rejection(comment: str = "", *, decided_by: str = DECIDED_BY) -> Decision:
    """Returns the decision to reject."""
    return Decision(False, decided_by, comment)


def decider(decisions: Decisions) -> Decide:
    """Returns the function that decides as `decisions` says."""
    if isinstance(decisions, bool):
        return lambda _approval: approval() if decisions else rejection()
    if isinstance(decisions, Mapping):
        by_title = {
            title: one if isinstance(one, Decision) else (approval() if one else rejection())
            for title, one in decisions.items()
        }
        return lambda asked: by_title.get(asked.title)
    return decisions
