"""Decides what each method needs: the one table of methods and roles, and the check before anything is looked up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from perdure_service.domain.callers import Caller, Role, check_namespace, check_role
from perdure_service.errors import PermissionDenied
from perdure_service.rpc.requests import namespace_of
from perdure_service.rpc.validation import Violations


@dataclass(frozen=True, slots=True)
class Access:
    """What a method needs.

    Attributes:
        role: The role.
        changes: Whether it changes something, so that each call of it is in the audit log.
    """

    role: Role
    changes: bool = False


_RUNS = "perdure.v1.AgentRunService/"
_APPROVALS = "perdure.v1.ApprovalService/"
_AGENTS = "perdure.v1.AgentCatalogService/"
_OPERATORS = "perdure.v1.OperatorService/"

ACCESS: Mapping[str, Access] = MappingProxyType(
    {
        _RUNS + "StartAgent": Access(Role.OPERATOR, changes=True),
        _RUNS + "StartAgents": Access(Role.OPERATOR, changes=True),
        _RUNS + "GetRun": Access(Role.VIEWER),
        _RUNS + "ListRuns": Access(Role.VIEWER),
        _RUNS + "WatchRun": Access(Role.VIEWER),
        _RUNS + "WaitRun": Access(Role.VIEWER),
        _RUNS + "WaitRuns": Access(Role.VIEWER),
        _RUNS + "ListRunEvents": Access(Role.VIEWER),
        _RUNS + "ListSteps": Access(Role.VIEWER),
        _RUNS + "SignalRun": Access(Role.OPERATOR, changes=True),
        _RUNS + "CancelRun": Access(Role.OPERATOR, changes=True),
        _RUNS + "ForkRun": Access(Role.OPERATOR, changes=True),
        _RUNS + "DeleteRuns": Access(Role.ADMIN, changes=True),
        _RUNS + "GetRunTrace": Access(Role.VIEWER),
        _RUNS + "ReadArtifact": Access(Role.VIEWER),
        _APPROVALS + "ListApprovals": Access(Role.VIEWER),
        _APPROVALS + "GetApproval": Access(Role.VIEWER),
        _APPROVALS + "DecideApproval": Access(Role.APPROVER, changes=True),
        _APPROVALS + "WatchApprovals": Access(Role.VIEWER),
        # The catalogue belongs to no namespace: whoever may do anything may see what can be started.
        _AGENTS + "ListAgents": Access(Role.VIEWER),
        _AGENTS + "GetAgent": Access(Role.VIEWER),
        _OPERATORS + "ListExecutors": Access(Role.ADMIN),
        _OPERATORS + "ListQueues": Access(Role.ADMIN),
        _OPERATORS + "ListStrandedRuns": Access(Role.ADMIN),
        _OPERATORS + "ListCells": Access(Role.ADMIN),
        _OPERATORS + "EvacuateCell": Access(Role.ADMIN, changes=True),
        _OPERATORS + "ReturnCell": Access(Role.ADMIN, changes=True),
    }
)
"""By method. One without an entry is refused to everybody; a test walks the schema and finds it."""


def check(method: str, caller: Caller, request: Any, namespaces: Collection[str]) -> None:
    """Lets a call pass, or ends it before the database is asked for anything.

    The namespace comes first: one that the caller may not see does not exist, whatever its roles.

    Args:
        method: As in `Call`.
        caller: Who calls.
        request: The message; None for a stream of requests as a whole, whose items are checked one by one.
        namespaces: Those that are declared.

    Raises:
        InvalidArgument: The namespace is malformed.
        NamespaceNotFound: There is no such namespace, or not for this caller.
        PermissionDenied: The caller lacks the role.
    """
    access = ACCESS.get(method)
    if access is None:
        raise PermissionDenied("nobody may call this method yet")
    if request is not None and "namespace" in request.DESCRIPTOR.fields_by_name:
        found = Violations()
        namespace = namespace_of(found, request.namespace)
        found.raise_any()
        check_namespace(namespace, namespaces, caller)
    check_role(caller, access.role)
