"""Metrics: what the documents say of them, that nothing is recorded unless somebody wants it, and where they go."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from perdure_service.domain.runs import RunState
from perdure_service.durable import metering
from perdure_service.errors import ConfigurationError
from perdure_service.store import sqlstates
from perdure_service.store.run_counts import OpenRunCounts
from perdure_service.telemetry import METERS, METRICS, start_telemetry
from perdure_service.telemetry import metrics as m
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.waiting import free_port
from tests.unit.telemetry.sink import Sink

PAGE = Path(__file__).resolve().parents[3] / "service" / "docs" / "telemetry.md"


@pytest.fixture
def reader() -> Iterator[InMemoryMetricReader]:
    """The process's instruments, read by the test."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    METERS.bind(provider.get_meter("test"))
    yield reader
    METERS.unbind()
    provider.shutdown()


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    return {
        metric.name: list(metric.data.data_points)
        for of_resource in (data.resource_metrics if data else ())
        for scope in of_resource.scope_metrics
        for metric in scope.metrics
    }


def test_the_documents_have_every_metric_with_its_unit_and_attributes() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    documented = [row for row in rows if row.count("|") == 6 and row.split("|")[2].strip() in KINDS]
    assert documented == [
        f"| `{one.name}` | {one.kind} | `{one.unit}` | {_list(one.attributes)}| {one.text} |" for one in METRICS
    ]


KINDS = ("counter", "histogram", "gauge", "up-down counter")


def _list(attributes: tuple[str, ...]) -> str:
    return "".join(", ".join(f"`{name}`" for name in attributes) + " ") if attributes else ""


def test_every_metric_of_the_module_is_in_the_table_once() -> None:
    defined = [value for value in vars(m).values() if isinstance(value, m.Metric)]
    assert sorted(one.name for one in defined) == sorted({one.name for one in METRICS})
    assert len(METRICS) == len(defined)
    for metric in METRICS:
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert not [name for name in metric.attributes if "_id" in name or "namespace" in name], metric.name


def test_nothing_is_recorded_before_somebody_wants_it(reader: InMemoryMetricReader) -> None:
    METERS.unbind()
    METERS.add(m.DB_RETRIES, {m.SQLSTATE: "40001"})
    METERS.record(m.START_LATENCY, 1.0, {})
    assert points(reader) == {}


def test_values_of_gauges_are_asked_for_when_somebody_looks(reader: InMemoryMetricReader) -> None:
    values = iter([1, 2])
    METERS.observe(m.WATCHERS, lambda: [(next(values), {m.WATCH: "run"})])
    assert [point.value for point in points(reader)["perdure.watchers"]] == [1]
    assert [point.value for point in points(reader)["perdure.watchers"]] == [2]


def test_nothing_takes_less_than_no_time(reader: InMemoryMetricReader) -> None:
    METERS.record(m.EVENT_LAG, -0.5, {})
    [point] = points(reader)["perdure.event.lag"]
    assert (point.sum, point.count) == (0, 1)
    assert tuple(point.explicit_bounds) == m.SHORT_S


def test_a_repeated_transaction_is_counted_by_its_error(reader: InMemoryMetricReader) -> None:
    engine = sa.create_engine("sqlite://")
    codes = iter(["40001", "40001", "40P01"])

    class DriverError(Exception):
        def __init__(self, code: str) -> None:
            super().__init__(code)
            self.sqlstate = code

    def fn(_connection: sa.Connection) -> str:
        code = next(codes, None)
        if code:
            raise sa.exc.OperationalError("x", None, DriverError(code))
        return "done"

    assert sqlstates.retrying(engine, "counted", fn) == "done"
    engine.dispose()
    counted = {point.attributes[m.SQLSTATE]: point.value for point in points(reader)["perdure.db.retries"]}
    assert counted == {"40001": 2, "40P01": 1}


def test_the_counts_of_runs_are_kept_for_a_while_and_survive_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    asked: list[str] = []
    answers: Iterator[Any] = iter(
        [OpenRunCounts({("a", RunState.QUEUED): 2}, 1.5), ConnectionError("gone"), OpenRunCounts()]
    )

    def retrying(_engine: Any, name: str, _fn: Any) -> OpenRunCounts:
        asked.append(name)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(metering, "reading", retrying)
    engine = sa.create_engine("sqlite://")
    runs = metering.OpenRuns(engine, clock=lambda: now[0])
    expected = [(2, {"perdure.agent": "a", "perdure.state": "QUEUED"})]
    assert (runs.runs(), runs.queue_age(), len(asked)) == (expected, [(1.5, {})], 1)
    now[0] = metering.REFRESH_S
    assert (runs.runs(), len(asked)) == (expected, 2), "the last counts stand while the database is away"
    now[0] = 2 * metering.REFRESH_S
    assert (runs.runs(), runs.queue_age(), len(asked)) == ([], [(0.0, {})], 3)
    engine.dispose()


# ---- where they go ---------------------------------------------------------------------------------------------------


def test_metrics_go_by_otlp_beside_the_spans(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", sink.endpoint)
    telemetry = start_telemetry(instance_id="host-1")
    assert not telemetry.tracer.enabled, "there is a place for metrics only"
    assert telemetry._meter_provider is not None
    METERS.bind(telemetry._meter_provider.get_meter("test"))
    METERS.record(m.RPC_DURATION, 0.2, {"rpc.method": "x"})
    telemetry.shutdown()
    [metric] = sink.metrics
    assert (metric.name, metric.unit) == ("rpc.server.call.duration", "s")
    METERS.record(m.RPC_DURATION, 0.2, {"rpc.method": "x"})  # after the end: nothing


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_without_a_place_to_send_metrics_there_are_none(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    telemetry = start_telemetry()
    assert telemetry._meter_provider is None
    telemetry.shutdown()


def test_prometheus_reads_them_where_the_setting_says() -> None:
    address = f"127.0.0.1:{free_port()}"
    telemetry = start_telemetry(instance_id="host-1", metrics_address=address)
    assert telemetry._meter_provider is not None
    METERS.bind(telemetry._meter_provider.get_meter("test"))
    METERS.add(m.DB_RETRIES, {m.SQLSTATE: "40001"})
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:  # our own
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    [sample] = families["perdure_db_retries"].samples
    assert (sample.name, sample.labels, sample.value) == (
        "perdure_db_retries_total", {"db_response_status_code": "40001"}, 1,
    )  # fmt: skip
    assert families["target_info"].samples[0].labels["service_instance_id"] == "host-1"

    with pytest.raises(ConfigurationError, match=rf"cannot listen on {address} \(Address already in use\); choose"):
        start_telemetry(metrics_address=address)
    telemetry.shutdown()
    start_telemetry(metrics_address=address).shutdown()  # it is free again
    with pytest.raises(ConfigurationError, match="choose another in PERDURE_METRICS_ADDRESS"):
        start_telemetry(metrics_address="no.such.host.invalid:9464")
