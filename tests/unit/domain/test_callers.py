"""What follows from roles and namespaces."""

from __future__ import annotations

import pytest
from perdure_service.domain.callers import Caller, Role, check_namespace, check_role, everything
from perdure_service.errors import NamespaceNotFound, PermissionDenied


def caller(*roles: Role, namespaces: tuple[str, ...] = ("a",)) -> Caller:
    return Caller("ann", frozenset(namespaces), frozenset(roles))


@pytest.mark.parametrize(
    ("given", "may"),
    [
        ((), ""),
        ((Role.VIEWER,), "viewer"),
        ((Role.OPERATOR,), "viewer operator"),
        ((Role.APPROVER,), "viewer approver"),
        ((Role.OPERATOR, Role.APPROVER), "viewer operator approver"),
        ((Role.ADMIN,), "viewer operator approver admin"),
    ],
)
def test_a_role_implies_what_it_says(given: tuple[Role, ...], may: str) -> None:
    assert {role for role in Role if caller(*given).may(role)} == {Role(name) for name in may.split()}


def test_a_missing_role_is_named() -> None:
    with pytest.raises(PermissionDenied, match="the role approver") as refused:
        check_role(caller(Role.OPERATOR), Role.APPROVER)
    assert refused.value.metadata == {"role": "approver"}
    check_role(caller(Role.APPROVER), Role.APPROVER)


def test_a_namespace_of_another_is_told_of_as_one_that_does_not_exist() -> None:
    told = []
    for declared in ({"a", "b"}, {"a"}):
        with pytest.raises(NamespaceNotFound) as refused:
            check_namespace("b", declared, caller(Role.ADMIN))
        told.append((refused.value.message, refused.value.metadata, refused.value.reason))
    assert told[0] == told[1]
    check_namespace("a", {"a", "b"}, caller())


def test_all_namespaces_are_those_that_are_declared() -> None:
    for one in (everything("dev"), caller(namespaces=("*",))):
        check_namespace("b", {"b"}, one)
        with pytest.raises(NamespaceNotFound):
            check_namespace("*", {"b"}, one)
        with pytest.raises(NamespaceNotFound):
            check_namespace("c", {"b"}, one)


def test_a_caller_without_namespaces_sees_none() -> None:
    assert not Caller("ann", roles=frozenset({Role.ADMIN})).sees("default")
