"""Where the server listens, what health says, how it stops, and that quiet connections stay open."""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.errors import ConfigurationError
from perdure_service.rpc import server as server_module
from perdure_service.rpc.addresses import check_addresses
from perdure_service.rpc.server import SERVICES, RpcServer

from tests.helpers.waiting import eventually_async, free_port, scaled
from tests.unit.rpc.doubles import ScriptedService, a_batch, a_run, failing, serving, settings_of, streams

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CLIENT_PING_MS = 1_000
"""gRPC's core lets a client ping every second at most."""


async def check(channel: grpc.aio.Channel, name: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status)


async def test_health_is_told_per_service_and_as_a_whole(service):
    async with serving(service) as served:
        assert {await check(served.channel, name) for name in ("", *SERVICES)} == {SERVING}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await check(served.channel, "perdure.v1.Nothing")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert SERVICES == (
        "perdure.v1.AgentRunService",
        "perdure.v1.ApprovalService",
        "perdure.v1.AgentCatalogService",
    )


async def test_the_health_port_has_health_and_nothing_else(service):
    async with serving(service, health_address="0.0.0.0:0") as served:
        assert served.health_port not in (None, served.port)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.health_port}") as probe:
            assert await check(probe) == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await probe.unary_unary("/perdure.v1.AgentRunService/GetRun")(b"")
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            await served.server.drain()
            assert await check(probe) == NOT_SERVING
            assert await check(probe, "perdure.v1.AgentRunService") == NOT_SERVING
            assert await check(served.channel) == NOT_SERVING


async def test_a_watcher_of_health_sees_the_drain_and_does_not_hold_up_the_stop(service):
    async with serving(service) as served:
        call = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await call.read()).status == SERVING
        await served.server.drain()
        assert (await call.read()).status == NOT_SERVING
        began = time.monotonic()
        await served.server.stop(30)
        assert time.monotonic() - began < 5
        assert (await failing(call)).code is grpc.StatusCode.UNAVAILABLE


async def test_calls_that_are_open_at_the_stop_are_answered_within_the_grace(service):
    finish = asyncio.Event()

    async def answer_late(*args: Any, **kwargs: Any) -> Any:
        await finish.wait()
        return a_run()

    service.script["get"] = answer_late
    async with serving(service) as served:
        call = asyncio.ensure_future(served.runs.GetRun(pb.GetRunRequest(run_id="foo")))
        await eventually_async(lambda: service.calls)
        stopping = asyncio.create_task(served.server.stop(30))

        async def takes_no_others() -> bool:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as other:
                try:
                    await other.unary_unary("/perdure.v1.AgentRunService/GetRun")(b"", timeout=5)
                except grpc.aio.AioRpcError as error:
                    return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

        await eventually_async(takes_no_others)
        assert not stopping.done()
        finish.set()
        assert (await call).run.run_id == "foo"
        await stopping


async def test_calls_that_outlast_the_grace_are_cut(service):
    cut = asyncio.Event()

    async def never(*args: Any, **kwargs: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cut.set()

    service.script["get"] = never
    async with serving(service) as served:
        call = asyncio.ensure_future(served.runs.GetRun(pb.GetRunRequest(run_id="foo")))
        await eventually_async(lambda: service.calls)
        began = time.monotonic()
        await served.server.stop(0.2)
        assert time.monotonic() - began < 5
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        await asyncio.wait_for(cut.wait(), 5)


async def test_a_server_can_be_stopped_twice_and_before_it_starts(service):
    server = RpcServer(service, settings_of())
    await server.stop()
    server = RpcServer(service, settings_of())
    await server.start()
    await server.stop(0)
    await server.stop(0)


async def test_reflection_is_served_when_it_is_asked_for(service):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with serving(service, reflection=True) as served:
        call = reflection_pb2_grpc.ServerReflectionStub(served.channel).ServerReflectionInfo(iter([request]))
        names = [s.name async for response in call for s in response.list_services_response.service]
        assert set(SERVICES) < set(names)
        assert "grpc.health.v1.Health" in names
    async with serving(service) as served:
        call = reflection_pb2_grpc.ServerReflectionStub(served.channel).ServerReflectionInfo(iter([request]))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:50051", "[::1]:50051", "127.9.9.9:0"])
def test_loopback_needs_no_permission(address):
    check_addresses(settings_of(address=address))
    check_addresses(settings_of(address=address), dev=True)


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "[::]:50051", ":50051", "10.0.0.1:50051", "example.org:50051"])
def test_other_addresses_need_to_be_allowed(address):
    with pytest.raises(ConfigurationError, match="PERDURE_INSECURE=1") as refused:
        check_addresses(settings_of(address=address))
    assert "127.0.0.1:50051" in refused.value.message
    check_addresses(settings_of(address=address, insecure=True))


@pytest.mark.parametrize(
    "address", ["", "50051", "localhost", "localhost:", "localhost:x", "::1:50051", "a:70000", "a b:1"]
)
def test_a_malformed_address_is_told(address):
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        check_addresses(settings_of(address=address, insecure=True))


async def test_a_server_does_not_start_where_it_must_not(service):
    with pytest.raises(ConfigurationError, match="no authentication"):
        await RpcServer(service, settings_of(address="0.0.0.0:0")).start()
    async with serving(service, address="0.0.0.0:0", insecure=True) as served:
        assert await check(served.channel) == SERVING


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
async def test_a_port_in_use_is_told_in_one_sentence(service, host):
    async with serving(service) as served:
        again = RpcServer(service, settings_of(address=f"{host}:{served.port}", insecure=True))
        with pytest.raises(ConfigurationError, match="PERDURE_ADDRESS") as refused:
            await again.start()
        assert str(served.port) in refused.value.message
        assert "in use" in refused.value.message
        assert "\n" not in refused.value.message
        await again.stop(0)
        with pytest.raises(ConfigurationError, match="PERDURE_HEALTH_ADDRESS"):
            await RpcServer(service, settings_of(health_address=f"{host}:{served.port}")).start()


async def test_an_address_this_host_does_not_have_is_told(service):
    # 192.0.2.0/24 is kept for documentation (RFC 5737).
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1:50051"):
        await RpcServer(service, settings_of(address="192.0.2.1:50051", insecure=True)).start()


async def test_the_port_of_the_settings_is_the_port_it_listens_on(service):
    port = free_port()
    async with serving(service, address=f"127.0.0.1:{port}") as served:
        assert served.port == port
        assert await check(served.channel) == SERVING
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


async def test_messages_are_bounded_both_ways(service):
    service.script["get"] = lambda *args, **kwargs: a_run(state_reason="x" * 70_000)
    async with serving(service, max_message_bytes=2**16) as served:
        for request in (pb.GetRunRequest(run_id="foo"), pb.GetRunRequest(run_id="f" * 70_000)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await served.runs.GetRun(request)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(service.calls) == 1


def test_the_options_are_those_of_the_settings():
    options = dict(server_module.server_options(settings_of(max_connection_age=1_800.0, max_message_bytes=2**20)))
    assert options["grpc.max_connection_age_ms"] == options["grpc.max_connection_age_grace_ms"] == 1_800_000
    assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 2**20
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 10_000
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.so_reuseport"] == 0


async def test_a_quiet_stream_survives_the_pings_of_its_client(monkeypatch):
    """With a control: a server that wants fewer pings throws the same client out, so pings there are."""
    pings = (
        ("grpc.keepalive_time_ms", CLIENT_PING_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )

    async def outlives(min_ping_interval: timedelta) -> bool:
        service = ScriptedService({"watch": streams(a_batch(1), then_stay=True)})
        monkeypatch.setattr(server_module, "MIN_PING_INTERVAL", min_ping_interval)
        serve = serving(service, channel_options=pings)
        async with serve as served:
            call = served.runs.WatchRun(pb.WatchRunRequest(run_id="foo"))
            await call.read()
            reading = asyncio.ensure_future(call.read())
            await asyncio.wait([reading], timeout=scaled(4.5))
            ended = reading.done()
            call.cancel()
            await asyncio.wait([reading])
            return not ended

    # Both read their interval before the first one waits.
    patient = asyncio.create_task(outlives(timedelta(seconds=CLIENT_PING_MS / 3_000)))
    await asyncio.wait([patient], timeout=0.2)
    assert await outlives(timedelta(minutes=5)) is False
    assert await patient is True
