"""Fixtures for the client's tests: a scripted server, clients of it, and waits that take no time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from perdure_client import AsyncClient, Client
from perdure_client.cli._app import app
from typer.testing import CliRunner

from tests.unit.client.scripted import ScriptedServer

VARIABLES = (
    "PERDURE_ADDRESS", "PERDURE_ADMIN_ADDRESS", "PERDURE_TOKEN", "PERDURE_NAMESPACE", "PERDURE_TLS", "PERDURE_CA_FILE",
    "PERDURE_CLIENT_CERTIFICATE_FILE", "PERDURE_CLIENT_KEY_FILE", "PERDURE_SERVER_NAME",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds the client would have waited between attempts; it waits none."""
    waits: list[float] = []

    async def sleep_async(_self: object, delay_s: float) -> None:
        waits.append(delay_s)
        await asyncio.sleep(0)

    async def sleep_sync(_self: object, delay_s: float) -> None:
        waits.append(delay_s)

    monkeypatch.setattr("perdure_client._transport_aio.AioTransport.sleep", sleep_async)
    monkeypatch.setattr("perdure_client._transport_sync.SyncTransport.sleep", sleep_sync)
    return waits


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    await scripted.start()
    yield scripted
    await scripted.stop()


@pytest.fixture
async def client(server: ScriptedServer, slept: list[float]) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as scripted_client:
        yield scripted_client


@pytest.fixture
def blocking_client(server: ScriptedServer, slept: list[float]) -> Iterator[Client]:
    """For `asyncio.to_thread`: the server needs the event loop."""
    with Client(server.address) as scripted_client:
        yield scripted_client


@pytest.fixture
def perdure(server: ScriptedServer, slept: list[float]) -> Callable[..., Awaitable[Any]]:
    """Runs the command; its output is piped, so it is JSON unless a test says otherwise."""

    async def invoke(*arguments: str, stdin: str | None = None) -> Any:
        arguments = ("--address", server.address, *arguments)
        return await asyncio.to_thread(CliRunner().invoke, app, list(arguments), input=stdin)

    return invoke
