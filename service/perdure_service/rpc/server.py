"""Builds, starts, drains and stops the gRPC server, and decides where it may listen and how connections live."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from perdure.v1 import (
    agent_catalog_service_pb2,
    agent_run_service_pb2,
    approval_service_pb2,
    operator_service_pb2,
)
from perdure.v1.agent_catalog_service_pb2_grpc import add_AgentCatalogServiceServicer_to_server
from perdure.v1.agent_run_service_pb2_grpc import add_AgentRunServiceServicer_to_server
from perdure.v1.approval_service_pb2_grpc import add_ApprovalServiceServicer_to_server
from perdure.v1.operator_service_pb2_grpc import add_OperatorServiceServicer_to_server

from perdure_service.domain.regions import Place
from perdure_service.durable.service import RunService
from perdure_service.errors import ConfigurationError
from perdure_service.rpc.addresses import check_addresses
from perdure_service.rpc.agent_runs import AgentRuns
from perdure_service.rpc.approvals import Approvals
from perdure_service.rpc.authentication import make_authentication
from perdure_service.rpc.calls import ANONYMOUS
from perdure_service.rpc.catalog import Catalog
from perdure_service.rpc.forwarding import Routed, Router
from perdure_service.rpc.handlers import Handlers
from perdure_service.rpc.operators import Operators
from perdure_service.rpc.peers import Peers
from perdure_service.rpc.streams import Streams
from perdure_service.rpc.tls import server_credentials
from perdure_service.settings import Settings
from perdure_service.telemetry import RunTracer

SERVICES = tuple(
    file.services_by_name[name].full_name
    for file, name in (
        (agent_run_service_pb2.DESCRIPTOR, "AgentRunService"),
        (approval_service_pb2.DESCRIPTOR, "ApprovalService"),
        (agent_catalog_service_pb2.DESCRIPTOR, "AgentCatalogService"),
    )
)
ADMIN_SERVICE = operator_service_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name
"""What the admin port serves, and no other."""
MIN_PING_INTERVAL = timedelta(seconds=10)
"""Clients may send keepalive pings this often, so that one every 30 s is safe. gRPC's default is five minutes, and a
client that pings more often than it may is thrown out (GOAWAY, too_many_pings)."""
KEEPALIVE_TIME = timedelta(seconds=60)
KEEPALIVE_TIMEOUT = timedelta(seconds=20)
"""A connection that was silent for the first and does not answer a ping within the second is dead, and its streams
end. gRPC's default for the first is two hours."""
MAX_HEALTH_STREAMS = 1_000
_SERVING = health_pb2.HealthCheckResponse.SERVING


def server_options(settings: Settings) -> list[tuple[str, int]]:
    """Returns the options of the gRPC server (https://grpc.github.io/grpc/core/group__grpc__arg__keys.html)."""
    max_age_ms = _ms(settings.max_connection_age)
    table = {
        # Two servers on one port would each get half of the calls; a port in use is to be noticed.
        "grpc.so_reuseport": 0,
        "grpc.max_receive_message_length": settings.max_message_bytes,
        "grpc.max_send_message_length": settings.max_message_bytes,
        # Old connections are asked to go (GOAWAY), so that load spreads; what is open on them may end in peace.
        "grpc.max_connection_age_ms": max_age_ms,
        "grpc.max_connection_age_grace_ms": max_age_ms,
        # A watcher of a quiet run has a connection without data: it may ping, and so do we.
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": _ms(MIN_PING_INTERVAL),
        "grpc.keepalive_time_ms": _ms(KEEPALIVE_TIME),
        "grpc.keepalive_timeout_ms": _ms(KEEPALIVE_TIMEOUT),
    }
    return list(table.items())


@dataclass(frozen=True, slots=True)
class BoundPorts:
    """Where a server listens. `health` and `admin` are None when there is no such port."""

    rpc: int
    health: int | None = None
    admin: int | None = None


class RpcServer:
    """The gRPC server of one process: `start`, then `drain`, then `stop`, all on one event loop."""

    def __init__(
        self,
        service: RunService,
        settings: Settings,
        *,
        tracer: RunTracer | None = None,
        caller: str = ANONYMOUS,
        place: Place | None = None,
    ) -> None:
        """Makes a server; nothing listens yet.

        Args:
            service: What is served.
            settings: Addresses, limits, reflection, certificates, tokens.
            tracer: Makes the spans of calls; None makes none.
            caller: Who everybody is where there is no authentication: `dev` in `dev`.
            place: Where it is, so that calls for other cells are sent there; None without regions.

        Raises:
            ConfigurationError: The file of tokens is no good, or tokens would travel between servers in plaintext.
        """
        self._service = service
        self._settings = settings
        self._health = health.aio.HealthServicer()
        self._streams = Streams(
            settings.max_watches,
            settings.max_connection_age.total_seconds(),
            per_caller=settings.max_streams_per_caller,
        )
        self._health_streams = Streams(MAX_HEALTH_STREAMS)
        self._authentication = make_authentication(settings.auth, caller)
        self._new_handlers = partial(
            Handlers,
            streams=self._streams,
            infrastructure=self._health_streams,
            authentication=self._authentication,
            namespaces=settings.namespaces,
            tracer=tracer,
        )
        self._peers = None if place is None else Peers(settings, place)
        self._router = None if place is None or self._peers is None else Router(place, self._peers, self._streams)
        self._server: grpc.aio.Server | None = None
        self._admin_server: grpc.aio.Server | None = None
        self._health_server: grpc.aio.Server | None = None

    @property
    def streams(self) -> Streams:
        """The streams that are open."""
        return self._streams

    async def start(self) -> BoundPorts:
        """Begins to serve, and says so in health.

        Returns:
            The ports it listens on; those of the settings unless they are 0.

        Raises:
            ConfigurationError: An address is malformed, in use, or not loopback although anyone may call; or a
                certificate is no good.
        """
        settings = self._settings
        check_addresses(settings)
        server = self._make_server()
        rpc = self._bind(server, settings.address, "PERDURE_ADDRESS")
        admin = health = None
        admin_server = health_server = None
        if settings.admin_address is not None:
            admin_server = self._make_admin_server()
            admin = self._bind(admin_server, settings.admin_address, "PERDURE_ADMIN_ADDRESS")
        if settings.health_address is not None:
            health_server = self._new_server()
            health = self._bind(health_server, settings.health_address, "PERDURE_HEALTH_ADDRESS", plaintext=True)
        await self._authentication.start()
        await server.start()
        self._server = server
        if admin_server is not None:
            await admin_server.start()
            self._admin_server = admin_server
        if health_server is not None:
            await health_server.start()
            self._health_server = health_server
        for name in ("", *SERVICES, *((ADMIN_SERVICE,) if admin_server is not None else ())):
            await self._health.set(name, _SERVING)
        return BoundPorts(rpc, health, admin)

    async def drain(self) -> None:
        """Says NOT_SERVING, ends all streams and waits with UNAVAILABLE and RetryInfo, and takes no new ones.

        Other calls are answered as before, until `stop`.
        """
        await self._health.enter_graceful_shutdown()
        self._streams.drain()

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuses new calls, lets those that are open finish for `grace_s`, cancels the rest, and closes the ports.

        Args:
            grace_s: Seconds; None means the setting `drain_timeout`.
        """
        await self.drain()
        self._health_streams.drain()
        grace_s = self._settings.drain_timeout.total_seconds() if grace_s is None else grace_s
        server, self._server = self._server, None
        if server is not None:
            if grace_s:
                await self._streams.refuse()
            await server.stop(grace_s)
        admin_server, self._admin_server = self._admin_server, None
        if admin_server is not None:
            await admin_server.stop(0)
        await self._authentication.stop()
        if self._peers is not None:
            await self._peers.close()
        health_server, self._health_server = self._health_server, None
        if health_server is not None:  # last: probes are answered to the end
            await health_server.stop(0)

    def _new_server(self, *services: tuple[Callable[[Any, Any], None], Any]) -> grpc.aio.Server:
        """Returns a server of some services, each with the generated function that adds it, and of health."""
        handlers = self._new_handlers()
        health_service: Any = (health_pb2_grpc.add_HealthServicer_to_server, self._health)
        for add, servicer in (health_service, *services):
            add(servicer, handlers)
        return grpc.aio.server(handlers=[handlers], options=server_options(self._settings))

    def _make_server(self) -> grpc.aio.Server:
        runs: Any = AgentRuns(self._service, self._settings, self._streams, self._router)
        approvals: Any = Approvals(self._service, self._settings)
        if self._router is not None:
            runs = Routed(runs, agent_run_service_pb2.DESCRIPTOR.services_by_name["AgentRunService"], self._router)
            service = approval_service_pb2.DESCRIPTOR.services_by_name["ApprovalService"]
            approvals = Routed(approvals, service, self._router)
        return self._new_server(
            (add_AgentRunServiceServicer_to_server, runs),
            (add_ApprovalServiceServicer_to_server, approvals),
            (add_AgentCatalogServiceServicer_to_server, Catalog(self._service)),
            *self._reflection_of(SERVICES),
        )

    def _make_admin_server(self) -> grpc.aio.Server:
        operators = Operators(self._service, self._router)
        return self._new_server(
            (add_OperatorServiceServicer_to_server, operators), *self._reflection_of((ADMIN_SERVICE,))
        )

    def _reflection_of(self, services: Sequence[str]) -> list[tuple[Callable[[Any, Any], None], Any]]:
        if not self._settings.reflection:
            return []
        servicer = reflection.aio.ReflectionServicer((*services, health.SERVICE_NAME, reflection.SERVICE_NAME))
        return [(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, servicer)]

    def _bind(self, server: grpc.aio.Server, address: str, variable: str, *, plaintext: bool = False) -> int:
        """Takes an address for a server, with TLS where that is configured, and returns its port."""
        tls = self._settings.tls
        credentials = server_credentials(tls) if tls.enabled and not plaintext else None
        try:
            _check_free(address)
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "gRPC cannot bind it"
            raise ConfigurationError(f"cannot listen on {address} ({why}); choose another in {variable}") from error


def _check_free(address: str) -> None:
    """Tries an address: gRPC is content with one of the addresses of a name, and says the rest to stderr only.

    Raises:
        OSError: Somebody else listens on one of its addresses, or this host has none of them.
    """
    host, _, port = address.rpartition(":")
    if int(port) == 0:
        return
    missing: OSError | None = None
    found = False
    for family, kind, protocol, _, target in socket.getaddrinfo(
        host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(target)
                found = True
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
            missing = error  # e.g. no IPv6 here, which is no trouble if there is IPv4
    if not found and missing is not None:
        raise missing


def _ms(duration: timedelta) -> int:
    return int(duration / timedelta(milliseconds=1))
