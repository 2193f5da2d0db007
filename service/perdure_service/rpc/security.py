"""Says how a server is secured, in a sentence, and what is wrong with that, for `check`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from perdure_service.domain.callers import ALL_NAMESPACES
from perdure_service.errors import ConfigurationError
from perdure_service.rpc.addresses import check_addresses, split_address
from perdure_service.rpc.jwks import read_keys
from perdure_service.rpc.tls import load_certificates
from perdure_service.rpc.token_file import is_readable_by_others, load_tokens
from perdure_service.settings import Settings, is_loopback
from perdure_service.store.diagnosis import Finding

EXPIRES_SOON = timedelta(days=14)


def describe(settings: Settings) -> str:
    """Returns how calls reach the server and who may make them, in one sentence."""
    wire = "in plaintext"
    if settings.tls.enabled:
        wire = "over TLS" + (" with certificates of clients" if settings.tls.client_ca_file else "")
    who = "everyone may do everything"
    if settings.auth.jwks_url is not None:
        who = f"callers need a token of {settings.auth.issuer} for {settings.auth.audience}"
    elif settings.auth.tokens_file is not None:
        who = f"callers need a token of {settings.auth.tokens_file}"
    admin = f"admin calls at {settings.admin_address}" if settings.admin_address else "no admin port"
    return f"security: calls at {settings.address} come {wire}, {who}; {admin}"


def findings(settings: Settings, *, dev: bool = False) -> list[Finding]:
    """Returns what is wrong with addresses, certificates and the file of tokens, each with the way out.

    Args:
        settings: As they would be served.
        dev: Whether by `dev`.
    """
    return [*_addresses(settings, dev), *_tls(settings), *_tokens(settings)]


def diagnose(settings: Settings) -> list[Finding]:
    """Returns the same for `serve`, and whether the keys of the identity provider can be read. Asks for them once."""
    return [*findings(settings), *_keys(settings)]


def _addresses(settings: Settings, dev: bool) -> Iterator[Finding]:
    try:
        check_addresses(settings, dev=dev)
    except ConfigurationError as error:
        yield Finding("error", error.message)
        return
    reachable = not is_loopback(split_address(settings.address, "PERDURE_ADDRESS")[0])
    if reachable and not (settings.tls.enabled and settings.auth.enabled):
        yield Finding(
            "warning",
            f"PERDURE_INSECURE lets others reach {settings.address} although "
            + ("tokens travel in plaintext." if settings.auth.enabled else "there is no authentication."),
        )


def _tls(settings: Settings) -> Iterator[Finding]:
    if not settings.tls.enabled:
        return
    try:
        certificates = load_certificates(settings.tls)
    except ConfigurationError as error:
        yield Finding("error", error.message)
        return
    if certificates.expires_at - datetime.now(UTC) < EXPIRES_SOON:
        yield Finding(
            "warning",
            f"The certificate of PERDURE_TLS__CERTIFICATE_FILE expires at {certificates.expires_at:%Y-%m-%d %H:%M} "
            "UTC; renew it.",
        )
    key = settings.tls.key_file
    if key is not None and is_readable_by_others(key):
        yield Finding("warning", f"Every user of this machine can read {key}; chmod o-r it.")


def _keys(settings: Settings) -> Iterator[Finding]:
    url = settings.auth.jwks_url
    if url is None:
        return
    try:
        read_keys(url)
    except (OSError, ValueError) as error:
        # A warning: `serve` starts, answers UNAVAILABLE and goes on trying.
        yield Finding("warning", f"The keys at {url} cannot be read ({error}); no token can be checked until they can.")


def _tokens(settings: Settings) -> Iterator[Finding]:
    auth = settings.auth
    if auth.tokens_file is None:
        return
    try:
        callers = load_tokens(auth.tokens_file).values()
    except ConfigurationError as error:
        yield Finding("error", error.message)
        return
    if is_readable_by_others(auth.tokens_file):
        yield Finding("warning", f"Every user of this machine can read {auth.tokens_file}; chmod o-r it.")
    known = {*settings.namespaces, ALL_NAMESPACES}
    for namespace in sorted({name for caller in callers for name in caller.namespaces} - known):
        yield Finding(
            "warning", f"{auth.tokens_file} names the namespace {namespace!r}, which PERDURE_NAMESPACES does not have."
        )
