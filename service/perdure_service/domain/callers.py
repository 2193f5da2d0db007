"""Who calls, what a caller may do and which namespaces exist for it; roles and nothing finer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from perdure_service.errors import NamespaceNotFound, PermissionDenied

ALL_NAMESPACES = "*"
MAX_CALLER_NAME = 256
"""Characters. OpenID Connect allows a `sub` of 255."""


class Role(StrEnum):
    """What a caller may do; names as in the claim `perdure_roles`."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    APPROVER = "approver"
    ADMIN = "admin"


_IMPLIED = {
    Role.VIEWER: frozenset({Role.VIEWER}),
    Role.OPERATOR: frozenset({Role.OPERATOR, Role.VIEWER}),
    Role.APPROVER: frozenset({Role.APPROVER, Role.VIEWER}),
    Role.ADMIN: frozenset(Role),
}
_THAT_HAVE = {role: frozenset(given for given, implied in _IMPLIED.items() if role in implied) for role in Role}


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller.

    Attributes:
        name: Its name: the token's `sub`.
        namespaces: Those that exist for it; `*` among them means all.
        roles: What it was given; `may` knows what follows from them.
        expires_at_s: When its token is no longer good, in seconds since 1970; None for never.
    """

    name: str
    namespaces: frozenset[str] = field(default_factory=frozenset)
    roles: frozenset[Role] = field(default_factory=frozenset)
    expires_at_s: float | None = None

    def may(self, role: Role) -> bool:
        """Returns whether it has a role, given or implied."""
        return not _THAT_HAVE[role].isdisjoint(self.roles)

    def sees(self, namespace: str) -> bool:
        """Returns whether a namespace exists for it, if it exists at all."""
        return ALL_NAMESPACES in self.namespaces or namespace in self.namespaces


def everything(name: str) -> Caller:
    """Returns a caller that may do everything: whoever calls where there is no authentication."""
    return Caller(name, frozenset({ALL_NAMESPACES}), frozenset({Role.ADMIN}))


def check_namespace(namespace: str, declared: Collection[str], caller: Caller | None = None) -> None:
    """Refuses a namespace that is not declared, or not the caller's, with one answer for both.

    Raises:
        NamespaceNotFound: It does not exist for the caller.
    """
    if namespace not in declared or (caller is not None and not caller.sees(namespace)):
        raise NamespaceNotFound(f"there is no namespace {namespace!r}")


def check_role(caller: Caller, role: Role) -> None:
    """Refuses a caller without a role.

    Raises:
        PermissionDenied: It has neither the role nor one that implies it; metadata `role` names it.
    """
    if not caller.may(role):
        raise PermissionDenied(f"this needs the role {role.value}", role=role.value)
