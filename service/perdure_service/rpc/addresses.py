"""Decides where a server may listen: whatever others can reach needs TLS and authentication, or a word."""

from __future__ import annotations

import re

from perdure_service.errors import ConfigurationError
from perdure_service.settings import Settings, is_loopback

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:/\s]*):(?P<port>\d{1,5})")


def check_addresses(settings: Settings, *, dev: bool = False) -> None:
    """Refuses addresses where this server must not listen.

    Args:
        settings: The addresses, and how what comes there is secured.
        dev: Whether it is `dev`, whose callers may do everything: on this machine only, then.

    Raises:
        ConfigurationError: With the way out.
    """
    for variable, address in (
        ("PERDURE_ADDRESS", settings.address),
        ("PERDURE_ADMIN_ADDRESS", settings.admin_address),
    ):
        if address is None:
            continue
        host, port = split_address(address, variable)
        if is_loopback(host):
            continue
        if dev:
            raise ConfigurationError(
                f"{variable} is {address}, which others can reach, and `dev` is for this machine only: "
                f"listen on 127.0.0.1:{port}, or use `perdure-server serve`"
            )
        _check_reachable(settings, variable, address, port)
    for variable, address in (
        ("PERDURE_HEALTH_ADDRESS", settings.health_address),
        ("PERDURE_METRICS_ADDRESS", settings.metrics_address),
    ):
        if address is not None:
            split_address(address, variable)  # says nothing of runs that others may not know


def split_address(address: str, variable: str) -> tuple[str, int]:
    """Returns host and port of an address.

    Raises:
        ConfigurationError: It is malformed.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65_535:
        raise ConfigurationError(
            f"{variable} is {address!r}; it must be HOST:PORT, e.g. 127.0.0.1:50051 or [::1]:50051"
        )
    return match["host"], int(match["port"])


def _check_reachable(settings: Settings, variable: str, address: str, port: int) -> None:
    if settings.insecure or (settings.tls.enabled and settings.auth.enabled):
        return
    missing, advice = "there is no authentication", "configure PERDURE_AUTH__… and PERDURE_TLS__…"
    if settings.auth.enabled:
        missing, advice = "tokens would travel in plaintext", "set PERDURE_TLS__CERTIFICATE_FILE and __KEY_FILE"
    elif settings.tls.enabled:
        advice = "set PERDURE_AUTH__JWKS_URL"
    raise ConfigurationError(
        f"{variable} is {address}, which others can reach, and {missing}: {advice}, listen on 127.0.0.1:{port}, "
        "or set PERDURE_INSECURE=1 if the network keeps others out"
    )
