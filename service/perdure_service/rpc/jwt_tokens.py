"""Decides what a JSON Web Token (RFC 7519) says of its caller, and whether that may be believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jwt

from perdure_service.domain.callers import MAX_CALLER_NAME, Caller, Role
from perdure_service.errors import TokenExpired, Unauthenticated
from perdure_service.rpc.jwks import Key, Keys

NAMESPACES_CLAIM = "perdure_namespaces"
ROLES_CLAIM = "perdure_roles"
INVALID_TEXT = "the token is not valid"
EXPIRED_TEXT = "the token has expired; get a new one"
LAST_EXPIRY_S = 253_402_300_799
"""The end of the year 9999: a token may name a number that no clock and no float has."""
_REQUIRED = ["exp", "iss", "aud", "sub"]


class JwtTokens:
    """Checks tokens with the keys of one identity provider."""

    def __init__(self, keys: Keys, *, issuer: str, audience: str, algorithms: tuple[str, ...], leeway_s: float) -> None:
        """Makes a checker.

        Args:
            keys: Of the provider.
            issuer: What `iss` must be.
            audience: What must be in `aud`.
            algorithms: The signatures that are taken, all of them with a public key.
            leeway_s: How far the clocks of provider and server may differ.
        """
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        self._leeway_s = leeway_s

    async def start(self) -> None:
        """Reads the keys."""
        await self._keys.start()

    async def stop(self) -> None:
        """Ends the reading of keys."""
        await self._keys.stop()

    async def check(self, token: str) -> Caller:
        """Returns whose token this is.

        Raises:
            TokenExpired: It was good.
            Unauthenticated: It never was; the cause, which the log gets, says why.
            KeysUnavailable: Nobody can tell yet.
        """
        key_id, algorithm = self._header(token)
        key = await self._keys.find(key_id)
        if key is None:
            raise _invalid("no key of the token's name")
        if key.algorithm not in ("", algorithm):
            raise _invalid("the key is for another algorithm")
        return self._caller(self._claims(token, key, algorithm))

    def _header(self, token: str) -> tuple[str | None, str]:
        try:
            header = jwt.get_unverified_header(token)
        except Exception as error:  # whatever a made-up token breaks
            raise Unauthenticated(INVALID_TEXT) from error
        algorithm = header.get("alg")
        if algorithm not in self._algorithms:  # before anything else is done with it: `none` and `HS256` end here
            raise _invalid("its algorithm is not allowed")
        key_id = header.get("kid")
        if key_id is not None and not isinstance(key_id, str):
            raise _invalid("its kid is not text")
        return key_id, str(algorithm)

    def _claims(self, token: str, key: Key, algorithm: str) -> Mapping[str, Any]:
        try:
            return jwt.decode(
                token,
                key.public,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway_s,
                options={"require": _REQUIRED},
            )
        except jwt.ExpiredSignatureError as error:
            raise TokenExpired(EXPIRED_TEXT) from error
        except Exception as error:  # PyJWT's own, and what numbers such as 1e999 cause in it
            raise Unauthenticated(INVALID_TEXT) from error

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        name = claims["sub"]
        if not isinstance(name, str) or not 0 < len(name) <= MAX_CALLER_NAME or not name.isprintable():
            raise _invalid("its sub cannot be a caller's name")
        roles = {role for role in _texts(claims, ROLES_CLAIM) if role in set(Role)}  # others' roles may be there, too
        return Caller(
            name,
            frozenset(_texts(claims, NAMESPACES_CLAIM)),
            frozenset(map(Role, roles)),
            expires_at_s=float(min(int(claims["exp"]), LAST_EXPIRY_S)) + self._leeway_s,
        )


def _texts(claims: Mapping[str, Any], name: str) -> list[str]:
    value = claims.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _invalid(f"its {name} is not a list of texts")
    return value


def _invalid(cause: str) -> Unauthenticated:
    error = Unauthenticated(INVALID_TEXT)
    error.__cause__ = ValueError(cause)
    return error
