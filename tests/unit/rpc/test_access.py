"""The table of roles: every method of the schema has its place, every role gets what it should, and nothing more."""

from __future__ import annotations

import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.domain.callers import Caller, Role
from perdure_service.errors import InvalidArgument, NamespaceNotFound, PermissionDenied
from perdure_service.rpc import access
from perdure_service.rpc.access import ACCESS

from tests.helpers.schema import METHODS, request_of


def caller(*roles: Role, namespaces: tuple[str, ...] = ("a",)) -> Caller:
    return Caller("ann", frozenset(namespaces), frozenset(roles))


def test_every_method_of_the_schema_has_its_role_and_there_is_no_other():
    assert len(METHODS) >= 19
    assert set(ACCESS) == set(METHODS)


def test_a_stream_of_requests_has_an_answer_for_each_as_each_is_checked_where_it_is_answered():
    streams = [name for name, method in METHODS.items() if method.client_streaming]
    assert streams == ["perdure.v1.AgentRunService/StartAgents", "perdure.v1.AgentRunService/WaitRuns"]
    assert all(METHODS[name].server_streaming for name in streams)


def test_what_does_not_only_read_is_in_the_audit_log():
    reads = {name for name in METHODS if name.partition("/")[2].startswith(("Get", "List", "Watch", "Wait", "Read"))}
    assert {name for name, needed in ACCESS.items() if not needed.changes} == reads
    assert {needed.role for name, needed in ACCESS.items() if name in reads} == {Role.VIEWER, Role.ADMIN}


def test_a_namespace_is_a_field_of_the_request_itself_where_there_is_one():
    """As the check looks for it there: a nested one would not be found."""
    for name, method in METHODS.items():
        if method.client_streaming:
            continue  # what is checked is the message of an item
        nested = [
            f"{name}.{field.name}.namespace"
            for field in method.input_type.fields
            if field.message_type is not None and "namespace" in field.message_type.fields_by_name
        ]
        assert nested == []
        if "namespace" not in method.input_type.fields_by_name:
            assert name.partition("/")[2] in {
                "ListAgents",
                "GetAgent",
                "ListExecutors",
                "ListQueues",
                "ListStrandedRuns",
                "ListCells",
                "EvacuateCell",
                "ReturnCell",
            }


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("role", [None, *Role])
def test_a_role_gets_what_the_table_says_and_nothing_more(method, role):
    request = request_of(method)
    if "namespace" in request.DESCRIPTOR.fields_by_name:
        request.namespace = "a"
    who = caller(*([role] if role else []))
    if who.may(ACCESS[method].role):
        access.check(method, who, request, {"a"})
        return
    with pytest.raises(PermissionDenied) as refused:
        access.check(method, who, request, {"a"})
    assert refused.value.metadata == {"role": ACCESS[method].role.value}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_namespace_that_is_not_the_callers_does_not_exist_whatever_its_role(method):
    request = request_of(method)
    if "namespace" not in request.DESCRIPTOR.fields_by_name:
        return
    for who in (caller(), caller(Role.ADMIN)):
        for namespace in ("b", ""):
            request.namespace = namespace
            with pytest.raises(NamespaceNotFound):
                access.check(method, who, request, {"a", "b", "default"})


def test_a_malformed_namespace_is_wrong_and_not_missing():
    with pytest.raises(InvalidArgument) as refused:
        access.check("perdure.v1.AgentRunService/GetRun", caller(), pb.GetRunRequest(namespace="a\x00"), {"a"})
    assert refused.value.violations[0][0] == "namespace"


def test_a_method_without_a_role_is_refused_to_everybody(monkeypatch):
    monkeypatch.setattr(access, "ACCESS", {})
    with pytest.raises(PermissionDenied):
        access.check("perdure.v1.AgentRunService/GetRun", caller(Role.ADMIN), pb.GetRunRequest(namespace="a"), {"a"})


def test_the_roles_are_those_of_the_documentation():
    """Spelled out once more, so that a change of the table is a decision."""
    by_role: dict[str, set[str]] = {}
    for name, needed in ACCESS.items():
        by_role.setdefault(needed.role.value, set()).add(name.partition("/")[2])
    assert by_role["operator"] == {"StartAgent", "StartAgents", "SignalRun", "CancelRun", "ForkRun"}
    assert by_role["approver"] == {"DecideApproval"}
    assert by_role["admin"] == {
        "DeleteRuns",
        "ListExecutors",
        "ListQueues",
        "ListStrandedRuns",
        "ListCells",
        "EvacuateCell",
        "ReturnCell",
    }
