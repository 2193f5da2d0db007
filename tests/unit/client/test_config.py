"""Where the client connects to, and what it refuses to send there."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from perdure_client import AsyncClient, Client, ConfigurationError, ServerUnavailable
from perdure_client._config import CHANNEL_OPTIONS, Config, is_loopback, make_config
from perdure_client._watch import call_metadata

from tests.helpers.security import certified
from tests.helpers.waiting import free_port, scaled


def configure(address: str | None = None, **options: Any) -> Config:
    defaults: dict[str, Any] = {
        "token": None,
        "namespace": None,
        "tls": None,
        "root_certificates": None,
        "timeout": 1.0,
        "connect_timeout": 1.0,
        "reconnect_timeout": 1.0,
    }
    return make_config(address, **defaults | options)


def test_the_defaults() -> None:
    config = configure()
    assert (config.address, config.namespace, config.token) == ("localhost:50051", "default", "")
    assert config.credentials is None


def test_the_environment_is_used_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("PERDURE_NAMESPACE", "team")
    monkeypatch.setenv("PERDURE_TOKEN", "t")
    config = configure()
    assert (config.address, config.namespace, config.token) == ("127.0.0.1:1", "team", "t")
    config = configure("localhost:2", namespace="other", token="")
    assert (config.address, config.namespace, config.token) == ("localhost:2", "other", "")


@pytest.mark.parametrize(
    ("address", "options", "environment", "target", "tls"),
    [
        ("host:1", {}, "", "host:1", False),
        ("host:1", {"tls": True}, "", "host:1", True),
        ("host:1", {}, "1", "host:1", True),
        ("host:1", {"tls": False}, "1", "host:1", False),
        ("https://host:1/", {}, "", "host:1", True),
        ("https://host", {}, "", "host:443", True),
        ("http://host:1", {}, "1", "host:1", False),
    ],
)
def test_tls_is_on_as_the_argument_the_address_or_the_environment_say(
    monkeypatch: pytest.MonkeyPatch, address: str, options: dict[str, Any], environment: str, target: str, tls: bool
) -> None:
    monkeypatch.setenv("PERDURE_TLS", environment)
    config = configure(address, **options)
    assert (config.address, config.credentials is not None) == (target, tls)


@pytest.mark.parametrize(
    ("target", "loopback"),
    [
        ("localhost:50051", True),
        ("LOCALHOST:1", True),
        ("127.0.0.1:1", True),
        ("127.8.9.10:1", True),
        ("[::1]:1", True),
        ("::1", True),
        ("unix:/run/perdure.sock", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("0.0.0.0:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("10.0.0.1:1", False),
        ("[2001:db8::1]:1", False),
        ("dns:///agents.example:1", False),
        ("dns://127.0.0.1/agents.example:1", False),
    ],
)
def test_what_counts_as_loopback(target: str, loopback: bool) -> None:
    assert is_loopback(target) is loopback


def test_a_token_is_never_sent_in_plaintext_over_a_network() -> None:
    with pytest.raises(ConfigurationError, match="refusing to send the token"):
        configure("agents.example:1", token="t")
    assert configure("agents.example:1", token="t", tls=True).token == "t"
    assert configure("localhost:1", token="t").token == "t"


@pytest.mark.parametrize("token", ["t\n", "t\u00e9"])
def test_a_token_that_no_header_may_have_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ConfigurationError, match="the token holds characters") as caught:
        call_metadata(configure(token=token))
    assert token not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_token_for_this_machine_is_not_given_to_a_proxy(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """gRPC sends even `localhost` to the proxy of the environment, unless it is told not to."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("grpc_proxy", "https_proxy", "no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        with (
            Client(f"{host}:{free_port()}", token="t", timeout=scaled(0.5), connect_timeout=scaled(0.2)) as client,
            pytest.raises(ServerUnavailable),
        ):
            client.get("x")
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(configure(token="secret"))


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="TLS is off"):
        configure("localhost:1", root_certificates=b"pem", tls=False)
    with pytest.raises(ConfigurationError, match="above 0"):
        configure(timeout=0)
    with pytest.raises(ValueError, match="plaintext"):
        Client("agents.example:1", token="t")


def test_authorities_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(b"pem")
    monkeypatch.setenv("PERDURE_CA_FILE", str(tmp_path / "ca.pem"))
    assert configure("host:1").credentials is not None
    assert configure("http://host:1").credentials is None
    monkeypatch.setenv("PERDURE_CA_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigurationError, match="PERDURE_CA_FILE"):
        configure("host:1")


def test_a_certificate_of_the_client_comes_with_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = certified("client")
    certificate, key = mine.write(tmp_path)
    assert configure("host:1", client_certificate=mine.pem, client_key=mine.key_pem).credentials is not None
    for half in ({"client_certificate": mine.pem}, {"client_key": mine.key_pem}):
        with pytest.raises(ConfigurationError, match="belong together"):
            configure("host:1", tls=True, **half)
    with pytest.raises(ConfigurationError, match="TLS is off"):
        configure("host:1", tls=False, client_certificate=mine.pem, client_key=mine.key_pem)
    monkeypatch.setenv("PERDURE_CLIENT_CERTIFICATE_FILE", str(certificate))
    with pytest.raises(ConfigurationError, match="belong together"):
        configure("host:1")
    monkeypatch.setenv("PERDURE_CLIENT_KEY_FILE", str(key))
    assert configure("host:1").credentials is not None
    assert configure("http://host:1").credentials is None
    monkeypatch.setenv("PERDURE_CLIENT_KEY_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigurationError, match="PERDURE_CLIENT_KEY_FILE"):
        configure("host:1")


def test_the_servers_name_may_be_another_than_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "grpc.ssl_target_name_override" not in dict(configure("host:1", tls=True).channel_options)
    given = configure("host:1", tls=True, server_name="perdure.test")
    assert dict(given.channel_options)["grpc.ssl_target_name_override"] == "perdure.test"
    monkeypatch.setenv("PERDURE_SERVER_NAME", "perdure.test")
    assert configure("host:1", tls=True).server_name == "perdure.test"
    assert configure("host:1").server_name == ""


def test_the_channel_has_the_options_that_the_servers_expect() -> None:
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert options["grpc.keepalive_timeout_ms"] == 10_000
    assert options["grpc.keepalive_permit_without_calls"] == 0
    assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 8 * 2**20
    assert "round_robin" in str(options["grpc.service_config"])


def test_clients_say_where_they_are() -> None:
    with Client("localhost:1", namespace="team") as client:
        assert (client.address, client.namespace) == ("localhost:1", "team")
    assert AsyncClient("localhost:1").address == "localhost:1"


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 9e9])
def test_a_timeout_for_ever_is_one_that_grpc_knows(timeout: float) -> None:
    config = configure(timeout=timeout, connect_timeout=timeout, reconnect_timeout=timeout)
    assert config.timeout_s == config.connect_timeout_s == config.reconnect_timeout_s == 1e8


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), None, "5"])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="seconds above 0"):
        configure(timeout=timeout)
