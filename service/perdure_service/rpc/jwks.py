"""Keeps the public keys of an identity provider: read ahead, looked up when unknown, used on while it is away.

All on the server's event loop; only the reading itself is done in a thread.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from perdure_service.errors import KeysUnavailable
from perdure_service.settings import is_loopback

FETCH_TIMEOUT_S = 5.0
LOOKUP_TIMEOUT_S = 10.0
"""How long a call with an unknown key waits for the keys to be read again."""
MIN_LOOKUP_INTERVAL_S = 10.0
"""Unknown keys cause one reading in this time: who makes up names of keys must not make us hammer the provider."""
RETRY_S = 15.0
"""The longest until the next attempt after one that failed."""
MAX_BYTES = 2**20
MIN_RSA_BITS = 2048
_PUBLIC = (rsa.RSAPublicKey, ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """A public key.

    Attributes:
        public: The key itself.
        algorithm: The only signature it is for; empty for any that fits it.
    """

    public: Any
    algorithm: str


def read_keys(url: str) -> Mapping[str, Key]:
    """Reads the keys that an identity provider publishes, by their `kid` (empty for one without). Blocks.

    Raises:
        OSError: It cannot be reached, or answers with an error or elsewhere.
        ValueError: The answer is not a set of keys that can be used.
    """
    handlers: list[Any] = [_NoRedirects]
    if is_loopback(urlsplit(url).hostname or ""):
        # Whoever answers could make tokens, and http is allowed here: so no proxy may answer for this machine.
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310 - checked in settings
    with opener.open(request, timeout=FETCH_TIMEOUT_S) as answer:
        text = answer.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"the answer has more than {MAX_BYTES} bytes")
    return keys_of(json.loads(text))


def keys_of(document: Any) -> Mapping[str, Key]:
    """Returns the usable keys of a JSON Web Key Set (RFC 7517): public, for signatures, and long enough.

    Raises:
        ValueError: There is none.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    found: dict[str, Key] = {}
    for entry in entries if isinstance(entries, list) else ():
        key = _key_of(entry)
        if key is not None:
            found[str(entry.get("kid") or "")] = key
    if not found:
        raise ValueError("the answer holds no key that could be used")
    return found


def _key_of(entry: Any) -> Key | None:
    # A symmetric key must never be taken from a public place, nor a private one.
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    try:
        public = jwt.PyJWK(entry).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):  # of a kind that we do not know
        return None
    if not isinstance(public, _PUBLIC) or (isinstance(public, rsa.RSAPublicKey) and public.key_size < MIN_RSA_BITS):
        return None
    return Key(public, str(entry.get("alg") or ""))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What was allowed is one address; it must not lead to another, perhaps in plaintext. So a redirect is an error."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Keys:
    """The keys of one identity provider."""

    def __init__(self, url: str, *, refresh_s: float, read: Callable[[str], Mapping[str, Key]] = read_keys) -> None:
        """Makes a store without keys; `start` reads them.

        Args:
            url: Where they are.
            refresh_s: How often to read them again.
            read: Reads them; blocks.
        """
        self._url = url
        self._refresh_s = refresh_s
        self._read = read
        self._keys: Mapping[str, Key] = {}
        self._reading: asyncio.Task[bool] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._looked_up_s = float("-inf")

    async def start(self) -> None:
        """Reads the keys, and again from time to time. A provider that is away does not keep a server from starting."""
        await self._read_once()
        self._refreshing = asyncio.create_task(self._refresh())

    async def stop(self) -> None:
        """Ends the reading."""
        task, self._refreshing = self._refreshing, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def find(self, key_id: str | None) -> Key | None:
        """Returns a key, reading the keys again if it is unknown; None when there is none of that name.

        Args:
            key_id: The `kid` of a token; None for a token without one, which may mean the only key there is.

        Raises:
            KeysUnavailable: The keys have never been read.
        """
        found = self._known(key_id)
        now_s = time.monotonic()
        if found is None and now_s - self._looked_up_s >= MIN_LOOKUP_INTERVAL_S:
            self._looked_up_s = now_s
            self._begin_reading()
        if found is None and self._reading is not None:
            # Who comes while the keys are read waits for them as well.
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._reading), LOOKUP_TIMEOUT_S)
            found = self._known(key_id)
        if found is None and not self._keys:
            raise KeysUnavailable("the keys of the identity provider cannot be read; call again later")
        return found

    def _known(self, key_id: str | None) -> Key | None:
        if key_id is not None:
            return self._keys.get(key_id)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    async def _refresh(self) -> None:
        good = bool(self._keys)
        while True:
            await asyncio.sleep(self._refresh_s if good else min(self._refresh_s, RETRY_S))
            good = await self._read_once()

    def _begin_reading(self) -> asyncio.Task[bool]:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._replace())
        return self._reading

    async def _read_once(self) -> bool:
        return await asyncio.shield(self._begin_reading())

    async def _replace(self) -> bool:
        """Reads the keys; what cannot be read leaves those there are. Returns whether it could be."""
        try:
            keys = await asyncio.to_thread(self._read, self._url)
        except Exception as error:  # noqa: BLE001 - whatever it is, the keys that there are go on
            cause = f"{type(error).__qualname__}: {error}"[:300]
            _log.warning("auth.keys_unreadable", url=self._url, cause=cause, kept=len(self._keys))
            return False
        if set(keys) != set(self._keys):
            _log.info("auth.keys_changed", key_ids=sorted(keys))
        self._keys = keys
        return True
