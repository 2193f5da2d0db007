"""Decides which addresses of the web an agent may read: hosts that an operator lists, and nowhere else.

A model chooses the URL, and what it read may have told it which. So every URL, a redirect's too, must be of a listed
host and port; the host's addresses are looked up here and the connection goes to the one that was checked, so that a
second look-up cannot lead elsewhere; and an address that is not public must be listed itself.
"""

from __future__ import annotations

import asyncio
import codecs
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from perdure_service.errors import ConfigurationError

if TYPE_CHECKING:
    import httpx2

TIMEOUT_S = 15.0
"""For one fetch in all: look-ups, connections, redirects and the text."""
MAX_BYTES = 1024 * 1024
MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TEXT_TYPES = ("text/", "application/json", "application/xml")
_TEXT_SUFFIXES = ("+json", "+xml")
_BUSY = frozenset({408, 425, 429})
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""RFC 4291 section 2.4: the rest of IPv6 is not for the public, whatever `is_global` says of it."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052: how a host without IPv4 reaches one."""
_NO_CHARSETS = frozenset({"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"})
"""Python's own codecs for text; some cannot replace what is wrong, and `punycode` takes minutes for a megabyte."""


class FetchRefused(Exception):
    """The URL may not be read, or there is no text to read; trying again does not help."""


class FetchFailed(Exception):
    """The host could not be reached, or asks to come back; trying again may help."""


@dataclass(frozen=True, slots=True)
class AllowList:
    """The hosts that may be read: names or addresses, each with its port, None for 80 and 443."""

    entries: frozenset[tuple[str, int | None]]

    @classmethod
    def of(cls, hosts: Iterable[str]) -> AllowList:
        """Returns the list of `host` or `host:port` entries, as the setting has checked them."""
        parts = [urlsplit(f"//{host}") for host in hosts]
        return cls(frozenset(((part.hostname or "").lower(), part.port) for part in parts))

    def allows(self, host: str, port: int, scheme: str) -> bool:
        """Returns whether a host may be read on a port."""
        usual = port == PORTS.get(scheme)
        return (host, port) in self.entries or (usual and (host, None) in self.entries)

    def check_address(self, address: str, host: str, port: int, scheme: str) -> None:
        """Refuses an address that is not public, unless it is listed itself.

        Raises:
            FetchRefused: It must not be connected to.
        """
        plain = _plain(address)
        public = plain.is_global and not plain.is_multicast and (plain.version == 4 or plain in _GLOBAL_UNICAST)
        if not public and not self.allows(str(plain), port, scheme):
            raise FetchRefused(f"{host} is at {plain}, which is not a public address")


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns an address, or the IPv4 address that an IPv6 one only carries: what is spoken to in the end."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv4Address):
        return found
    if found in _NAT64:
        return ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
    return found.ipv4_mapped or found.sixtofour or found


async def fetch(url: str, allowed: AllowList) -> tuple[str, str]:
    """Returns the URL that was read in the end, and its text.

    Raises:
        FetchRefused: It may not be read, or is no text, or too long, or is not there.
        FetchFailed: The host cannot be reached, or not in time, or asks to come back.
        ConfigurationError: The client is not installed.
    """
    try:
        import httpx2
    except ImportError as error:
        raise ConfigurationError(
            "PERDURE_FETCH_ALLOW is set; install the client: pip install 'perdure[agents]'"
        ) from error
    try:
        here = httpx2.URL(url)
        async with asyncio.timeout(TIMEOUT_S), httpx2.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
            for _ in range(MAX_REDIRECTS + 1):
                found = await _read(client, here, allowed)
                if isinstance(found, str):
                    return str(here), found
                here = found
    except httpx2.InvalidURL as error:
        raise FetchRefused(f"it is not a URL: {error}") from None
    except UnicodeError:  # half of a character, in what a model wrote or in a name that the resolver does not take
        raise FetchRefused("it is not a URL") from None
    except (httpx2.HTTPError, OSError, TimeoutError) as error:
        raise FetchFailed(f"{here.host} cannot be read: {type(error).__name__}") from error
    raise FetchRefused(f"it redirects more than {MAX_REDIRECTS} times")


async def _read(client: httpx2.AsyncClient, url: httpx2.URL, allowed: AllowList) -> str | httpx2.URL:
    """Returns the text of a URL, or where it redirects to."""
    addresses, port = await _addresses(url, allowed)
    response = await _open(client, url, addresses, port)
    try:
        if response.status_code in _REDIRECTS and "location" in response.headers:
            return url.join(response.headers["location"])
        _check(response)
        text = bytearray()
        async for piece in response.aiter_raw():
            text += piece
            if len(text) > MAX_BYTES:
                raise FetchRefused(f"it is longer than {MAX_BYTES} bytes")
        return text.decode(_charset(response), errors="replace")
    finally:
        await response.aclose()


async def _open(client: httpx2.AsyncClient, url: httpx2.URL, addresses: list[str], port: int) -> httpx2.Response:
    """Asks the first of a host's addresses that can be connected to."""
    import httpx2

    for place, address in enumerate(addresses, start=1):
        # The connection goes to the address, but the host is asked, and its certificate is the host's.
        request = client.build_request(
            "GET",
            url.copy_with(host=address, port=port),
            headers={
                "host": url.netloc.decode("ascii"),
                "accept": "text/*, application/json",
                "accept-encoding": "identity",
            },
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        try:
            return await client.send(request, stream=True)
        except httpx2.ConnectError:
            if place == len(addresses):
                raise
    raise FetchFailed(f"{url.host} has no address")


async def _addresses(url: httpx2.URL, allowed: AllowList) -> tuple[list[str], int]:
    """Returns the addresses and the port to connect to for a URL that may be read."""
    if url.scheme not in PORTS or not url.host or url.userinfo:
        raise FetchRefused("only http:// and https:// URLs without a user can be read")
    host, port = url.raw_host.decode("ascii").lower(), url.port or PORTS[url.scheme]
    if not allowed.allows(host, port, url.scheme):
        raise FetchRefused(f"the host {host}, port {port}, is not on the list of those that may be read")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise FetchFailed(f"{host} has no address: {error.strerror}") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        allowed.check_address(address, host, port, url.scheme)
    return addresses, port


def _check(response: httpx2.Response) -> None:
    """Refuses an answer without text."""
    status = response.status_code
    if status >= 500 or status in _BUSY:
        raise FetchFailed(f"it answered {status}")
    if status != 200:
        raise FetchRefused(f"it answered {status}")
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind.startswith(_TEXT_TYPES) and not kind.endswith(_TEXT_SUFFIXES):
        raise FetchRefused(f"it is {kind or 'of no known type'}, and not text")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise FetchRefused("it is compressed, although it was asked not to be")


def _charset(response: httpx2.Response) -> str:
    charset = response.charset_encoding or "utf-8"
    try:
        "".encode(charset)
        known = codecs.lookup(charset).name not in _NO_CHARSETS
    except (LookupError, ValueError):
        known = False
    return charset if known else "utf-8"
