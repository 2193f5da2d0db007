"""Decides by what each method finds the cell that answers it: the one table of methods and routes."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType


class Route(Enum):
    """By what a method finds its cell."""

    START = auto()
    """By `home_region`, or the home of the namespace."""
    RUN = auto()
    """By `run_id`."""
    FORK = auto()
    """By `run_id`; and an id of its own must be at home there."""
    APPROVAL = auto()
    """By the run in `approval_id`."""
    RUNS = auto()
    APPROVALS = auto()
    INBOX = auto()
    DELETION = auto()
    """All cells are asked; see `gathering`."""
    HERE = auto()
    """Whoever is asked answers; the starts and waits of a stream go their ways one by one
    (`Router.start`, `Router.wait`)."""


_RUNS = "perdure.v1.AgentRunService."
_APPROVALS = "perdure.v1.ApprovalService."

ROUTES: Mapping[str, Route] = MappingProxyType(
    {
        _RUNS + "StartAgent": Route.START,
        _RUNS + "StartAgents": Route.HERE,
        _RUNS + "GetRun": Route.RUN,
        _RUNS + "ListRuns": Route.RUNS,
        _RUNS + "WatchRun": Route.RUN,
        _RUNS + "WaitRun": Route.RUN,
        _RUNS + "WaitRuns": Route.HERE,
        _RUNS + "ListRunEvents": Route.RUN,
        _RUNS + "ListSteps": Route.RUN,
        _RUNS + "SignalRun": Route.RUN,
        _RUNS + "CancelRun": Route.RUN,
        _RUNS + "ForkRun": Route.FORK,
        _RUNS + "DeleteRuns": Route.DELETION,
        _RUNS + "GetRunTrace": Route.RUN,
        _RUNS + "ReadArtifact": Route.RUN,
        _APPROVALS + "ListApprovals": Route.APPROVALS,
        _APPROVALS + "GetApproval": Route.APPROVAL,
        _APPROVALS + "DecideApproval": Route.APPROVAL,
        _APPROVALS + "WatchApprovals": Route.INBOX,
    }
)
"""By full name of the method. A test walks the schema and finds one without an entry."""
