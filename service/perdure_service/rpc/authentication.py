"""Decides who calls, from the call's metadata: by a bearer token, or without asking where nothing is configured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from perdure_service.domain.callers import Caller, everything
from perdure_service.errors import TokenMissing, Unauthenticated
from perdure_service.rpc.jwks import Keys
from perdure_service.rpc.jwt_tokens import INVALID_TEXT, JwtTokens
from perdure_service.rpc.token_file import TokenFile
from perdure_service.settings import AuthSettings

AUTHORIZATION_KEY = "authorization"
SCHEME = "bearer"
MISSING_TEXT = "the call carries no bearer token; send one in the metadata `authorization`"


class TokenChecker(Protocol):
    """Knows whose a token is."""

    async def start(self) -> None:
        """Begins to look after what it needs."""
        ...

    async def stop(self) -> None:
        """Ends that."""
        ...

    async def check(self, token: str) -> Caller:
        """Returns whose token this is.

        Raises:
            Unauthenticated: Nobody's, or it has expired.
        """
        ...


class Authentication:
    """Finds the caller of a call."""

    def __init__(self, checker: TokenChecker | None, everyone: str) -> None:
        """Makes one.

        Args:
            checker: Knows tokens; None: there is no authentication.
            everyone: The name of every caller then, who may do everything.
        """
        self._checker = checker
        self._everyone = everything(everyone)

    @property
    def enabled(self) -> bool:
        """Whether callers are told apart."""
        return self._checker is not None

    async def start(self) -> None:
        """Begins to look after keys."""
        if self._checker is not None:
            await self._checker.start()

    async def stop(self) -> None:
        """Ends that."""
        if self._checker is not None:
            await self._checker.stop()

    async def caller_of(self, metadata: Iterable[tuple[str, Any]]) -> Caller:
        """Returns who calls.

        Raises:
            TokenMissing: There is no bearer token.
            Unauthenticated: The token is not valid, or there are several.
            TokenExpired: It no longer is.
            KeysUnavailable: The token cannot be checked yet.
        """
        if self._checker is None:
            return self._everyone
        return await self._checker.check(bearer_token(metadata))


def make_authentication(auth: AuthSettings, everyone: str) -> Authentication:
    """Returns the authentication that the settings ask for.

    Raises:
        ConfigurationError: The file of tokens is no good.
    """
    if auth.tokens_file is not None:
        return Authentication(TokenFile(auth.tokens_file), everyone)
    if auth.jwks_url is None:
        return Authentication(None, everyone)
    checker = JwtTokens(
        Keys(auth.jwks_url, refresh_s=auth.jwks_refresh.total_seconds()),
        issuer=auth.issuer or "",
        audience=auth.audience or "",
        algorithms=auth.algorithms,
        leeway_s=auth.leeway.total_seconds(),
    )
    return Authentication(checker, everyone)


def bearer_token(metadata: Iterable[tuple[str, Any]]) -> str:
    """Returns the token of a call (RFC 6750 section 2.1).

    Raises:
        TokenMissing: There is none.
        Unauthenticated: There are several, and so it is not clear who calls.
    """
    values = [value for key, value in metadata if key == AUTHORIZATION_KEY]
    if len(values) > 1:
        raise Unauthenticated(INVALID_TEXT)
    scheme, _, token = (values[0] if values and isinstance(values[0], str) else "").partition(" ")
    if scheme.lower() != SCHEME or not token.strip():
        raise TokenMissing(MISSING_TEXT)
    return token.strip()
