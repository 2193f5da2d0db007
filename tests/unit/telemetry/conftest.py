"""Fixtures of the telemetry's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from opentelemetry import context as otel_context
from perdure_service.telemetry import Telemetry, start_telemetry

from tests.unit.telemetry.sink import Sink, grpc_sink


@pytest.fixture(autouse=True)
def nothing_stays_current() -> Iterator[None]:
    """Some tests end a span elsewhere than they began it, on purpose; later tests must not find it current."""
    before = otel_context.get_current()
    yield
    if otel_context.get_current() is not before:
        otel_context.attach(before)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the developer's own decides a test."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def sink() -> Iterator[Sink]:
    with grpc_sink() as sink:
        yield sink


@pytest.fixture
def telemetry(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    """Telemetry that sends to the sink; `shutdown` sends what is left."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
    telemetry = start_telemetry(instance_id="host-1", version="0.1.0")
    yield telemetry
    telemetry.shutdown()
