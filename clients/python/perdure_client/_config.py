"""Where the server is and how to speak to it: address, token, TLS, and the channel's options, each with its reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import grpc

from perdure_client._errors import ConfigurationError

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_ADMIN_ADDRESS = "localhost:50053"
DEFAULT_NAMESPACE = "default"
DEFAULT_TIMEOUT_S = 30.0
"""For one call in all, repeats included."""
DEFAULT_CONNECT_TIMEOUT_S = 10.0
"""How long a call goes on trying while no server can be reached. A restart takes a few seconds."""
DEFAULT_RECONNECT_TIMEOUT_S = 300.0
"""How long a watch or a wait that has had answers goes on trying without any."""


def _version() -> str:
    try:
        return version("perdure")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0"


VERSION = _version()

MAX_MESSAGE_BYTES = 8 * 2**20  # the server's own limit (PERDUREMAX_MESSAGE_BYTES)
_FOR_EVER_S = 1e8
"""Three years: to gRPC a deadline that is much later has passed already."""
_TRUE = frozenset({"1", "true", "yes", "on"})
_LOOPBACK = re.compile(r"localhost|127(?:\.\d{1,3}){3}|::1|0:0:0:0:0:0:0:1", re.IGNORECASE)

TokenSource = Callable[[], str]
"""Returns a token that is good now."""
ChannelOptions = tuple[tuple[str, str | int], ...]

CHANNEL_OPTIONS: ChannelOptions = (
    # A watch is quiet for minutes: pings find a dead connection within 40 s. Never without a call: servers punish it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Every server serves every run, so spread the calls over all addresses of the name.
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.service_config_disable_resolution", 1),
    # gRPC's own waits between connection attempts (1 s, 1.6 s, … 120 s) are for fleets; ours end an outage sooner.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # in truth: how long one connection attempt may take
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.primary_user_agent", f"perdure-python/{VERSION}"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a client was told, checked.

    Attributes:
        address: gRPC's name of the server, without our `http://` or `https://`.
        namespace: The namespace of every call.
        token: The bearer token, or what returns one; empty for none.
        credentials: Of the channel; None for plaintext.
        server_name: The name that the server's certificate is for; empty for the address.
        timeout_s: For one call in all, repeats included.
        connect_timeout_s: How long a call goes on trying while no server can be reached.
        reconnect_timeout_s: How long a watch or a wait that has had answers goes on trying without any.
    """

    address: str
    namespace: str = DEFAULT_NAMESPACE
    token: str | TokenSource = field(default="", repr=False)
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    server_name: str = ""
    timeout_s: float = DEFAULT_TIMEOUT_S
    connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S
    reconnect_timeout_s: float = DEFAULT_RECONNECT_TIMEOUT_S

    @property
    def renews_token(self) -> bool:
        """Whether another token can be had when one has expired."""
        return callable(self.token)

    def current_token(self) -> str:
        """Returns the token of the next call; empty for none."""
        return self.token() if callable(self.token) else self.token

    @property
    def channel_options(self) -> ChannelOptions:
        """The channel's options, those that every channel has and its own."""
        own: list[tuple[str, str | int]] = []
        if self.server_name:
            own.append(("grpc.ssl_target_name_override", self.server_name))
        if is_loopback(self.address):
            # gRPC would ask the proxy of `http_proxy` for this machine, too, and hand it the token.
            own.append(("grpc.enable_http_proxy", 0))
        return (*CHANNEL_OPTIONS, *own)


def make_config(
    address: str | None,
    *,
    token: str | TokenSource | None,
    namespace: str | None,
    tls: bool | None,
    root_certificates: bytes | None,
    timeout: float,
    connect_timeout: float,
    reconnect_timeout: float,
    client_certificate: bytes | None = None,
    client_key: bytes | None = None,
    server_name: str | None = None,
) -> Config:
    """Returns the configuration of a client: the arguments, else the environment, else the defaults.

    Raises:
        ConfigurationError: The parts contradict each other, a file is unreadable, or a token would go in plaintext.
    """
    target, scheme_tls = _split_scheme(address or os.environ.get("PERDURE_ADDRESS") or DEFAULT_ADDRESS)
    if tls is None:
        tls = scheme_tls
    if tls is not False:
        root_certificates = root_certificates or _file_of("PERDURE_CA_FILE")
        if client_certificate is None and client_key is None:
            client_certificate = _file_of("PERDURE_CLIENT_CERTIFICATE_FILE")
            client_key = _file_of("PERDURE_CLIENT_KEY_FILE")
    given = root_certificates is not None or client_certificate is not None
    if tls is None:
        tls = given or os.environ.get("PERDURE_TLS", "").lower() in _TRUE
    if not tls and given:
        raise ConfigurationError("certificates were given, but TLS is off; drop one of the two")
    if (client_certificate is None) != (client_key is None):
        raise ConfigurationError("a client's certificate and its key belong together; give both")
    token = os.environ.get("PERDURE_TOKEN", "") if token is None else token
    if token and not tls and not is_loopback(target):
        raise ConfigurationError(
            f"refusing to send the token to {target} in plaintext; use TLS (tls=True, or an https:// address)"
        )
    timeouts = (timeout, connect_timeout, reconnect_timeout)
    # Callers without a type checker give others, too.
    if not all(isinstance(one, int | float) and one > 0 for one in timeouts):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError("timeouts are seconds above 0")
    return Config(
        address=target,
        namespace=namespace or os.environ.get("PERDURE_NAMESPACE") or DEFAULT_NAMESPACE,
        token=token,
        credentials=(grpc.ssl_channel_credentials(root_certificates, client_key, client_certificate) if tls else None),
        server_name=(server_name or os.environ.get("PERDURE_SERVER_NAME", "")) if tls else "",
        timeout_s=min(timeout, _FOR_EVER_S),
        connect_timeout_s=min(connect_timeout, _FOR_EVER_S),
        reconnect_timeout_s=min(reconnect_timeout, _FOR_EVER_S),
    )


def _file_of(variable: str) -> bytes | None:
    """Returns the content of the file that a variable names; None when it is unset."""
    path = os.environ.get(variable)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{variable}={path} cannot be read: {error.strerror}") from error


def is_loopback(target: str) -> bool:
    """Whether what is sent to this gRPC target never leaves the machine."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        target = rest.rpartition("/")[2]
    bracketed = re.fullmatch(r"\[([^\]]+)\](?::\d+)?", target)
    host = bracketed[1] if bracketed else target if target.count(":") > 1 else target.partition(":")[0]
    return _LOOPBACK.fullmatch(host) is not None


def _split_scheme(address: str) -> tuple[str, bool | None]:
    """Returns gRPC's target, and whether the address itself says that it speaks TLS."""
    for scheme, tls in (("http://", False), ("https://", True)):
        if address.startswith(scheme):
            host = address.removeprefix(scheme).rstrip("/")
            has_port = re.search(r":\d+$", host) is not None
            return (host if has_port or not tls else f"{host}:443"), tls
    return address, None
