"""Decides whose token a token is by a file of tokens, for development and tests."""

from __future__ import annotations

import hashlib
import hmac
import stat
import time
from pathlib import Path
from typing import Annotated

import structlog
import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from perdure_service.domain.callers import MAX_CALLER_NAME, Caller, Role
from perdure_service.errors import ConfigurationError, Unauthenticated
from perdure_service.rpc.jwt_tokens import INVALID_TEXT
from perdure_service.rpc.watched_files import WatchedFiles

LOOK_INTERVAL_S = 1.0
"""How often the file is looked at for changes, at most."""
MIN_TOKEN = 16
"""Characters of a token, so that nobody guesses one."""

_log = structlog.get_logger(__name__)


class _Entry(BaseModel):
    """A token, or its hash, and whose it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: SecretStr | None = Field(None, min_length=MIN_TOKEN)
    sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None
    caller: str = Field(min_length=1, max_length=MAX_CALLER_NAME)
    namespaces: tuple[str, ...] = ()
    roles: tuple[Role, ...] = ()

    @model_validator(mode="after")
    def _one_secret(self) -> _Entry:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("takes either token or sha256")
        if not self.caller.isprintable():
            raise ValueError("caller must be printable")
        return self

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the token."""
        if self.token is not None:
            return hashlib.sha256(self.token.get_secret_value().encode()).digest()
        return bytes.fromhex(self.sha256 or "")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[_Entry, ...] = Field(min_length=1)


def load_tokens(path: Path) -> dict[bytes, Caller]:
    """Reads a file of tokens; returns the callers by the SHA-256 of their tokens.

    Raises:
        ConfigurationError: It cannot be read or is malformed. The message names the place, never a token.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML, too
        entries = _Document.model_validate(content).tokens
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError):
        raise _broken(path, "is neither YAML nor JSON") from None  # the error quotes the line
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _broken(path, f"is wrong at {where or 'its top'}: {first['msg']}") from None
    found: dict[bytes, Caller] = {}
    for index, entry in enumerate(entries):
        if entry.digest in found:
            raise _broken(path, f"has the token of tokens.{index} twice")
        found[entry.digest] = Caller(entry.caller, frozenset(entry.namespaces), frozenset(entry.roles))
    return found


def is_readable_by_others(path: Path) -> bool:
    """Returns whether every user of this machine can read a file."""
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


class TokenFile:
    """Checks tokens with a file, which is read again when it changes; a broken one leaves the old tokens."""

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            ConfigurationError: It is no good.
        """
        self._path = path
        self._files = WatchedFiles(path)
        self._callers = load_tokens(path)
        self._looked_s = time.monotonic()
        if is_readable_by_others(path):
            _log.warning("auth.tokens_file_readable", file=str(path), advice=f"chmod o-r {path}")

    async def start(self) -> None:
        """Does nothing: the file has been read."""

    async def stop(self) -> None:
        """Does nothing."""

    async def check(self, token: str) -> Caller:
        """Returns whose token this is.

        Raises:
            Unauthenticated: Nobody's.
        """
        self._reload()
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        found: Caller | None = None
        for known, caller in self._callers.items():  # to the end, so that the time does not tell which was near
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthenticated(INVALID_TEXT)
        return found

    def _reload(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_INTERVAL_S:
            return
        self._looked_s = now_s
        if not self._files.changed():
            return
        try:
            self._callers = load_tokens(self._path)
        except ConfigurationError as error:
            _log.warning("auth.tokens_not_reloaded", error=error.message)
        else:
            _log.info("auth.tokens_reloaded", callers=len(self._callers))


def _broken(path: Path, what: str) -> ConfigurationError:
    return ConfigurationError(f"PERDURE_AUTH__TOKENS_FILE: {path} {what}")
