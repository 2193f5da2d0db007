"""Decides where spans and metrics go: OTLP when `OTEL_*` says so, Prometheus when a setting does."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.resources import SERVICE_NAME as SERVICE_NAME_KEY
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

from perdure_service.errors import ConfigurationError
from perdure_service.telemetry.metrics import METERS
from perdure_service.telemetry.names import SERVICE_NAME
from perdure_service.telemetry.spans import ForcedIds, RunTracer

SHUTDOWN_TIMEOUT_S = 5.0
"""How long `Telemetry.shutdown` waits for the last spans and metrics to be sent."""
QUEUE_SIZE = 16_384
"""Spans kept for export. OpenTelemetry's default of 2,048 is less than a second of a busy executor."""
METRICS_VARIABLE = "PERDURE_METRICS_ADDRESS"


class Telemetry:
    """The process's providers, if there are any, and the tracer that uses them."""

    def __init__(
        self,
        provider: TracerProvider | None = None,
        exporter: SpanExporter | None = None,
        ids: ForcedIds | None = None,
        *,
        meter_provider: MeterProvider | None = None,
        metric_exporter: MetricExporter | None = None,
        stop_prometheus: Callable[[], None] | None = None,
    ) -> None:
        self._provider = provider
        self._meter_provider = meter_provider
        self._exporters = [one for one in (exporter, metric_exporter) if one is not None]
        self._stop_prometheus = stop_prometheus
        self.tracer = RunTracer(provider, ids)

    def install(self) -> None:
        """Makes them the providers that libraries (pydantic-ai, openai) find, and binds the instruments.

        Once per process; OpenTelemetry's rule.
        """
        if self._provider is not None:
            trace.set_tracer_provider(self._provider)
        if self._meter_provider is not None:
            metrics.set_meter_provider(self._meter_provider)
            METERS.bind(self._meter_provider.get_meter("perdure"))

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Sends what is left, for at most `timeout_s`; then gives it up. Blocks. Never raises."""
        providers: list[Any] = [one for one in (self._provider, self._meter_provider) if one is not None]
        self._provider = self._meter_provider = None
        if self._stop_prometheus is not None:
            with suppress(Exception):
                self._stop_prometheus()
            self._stop_prometheus = None
        if not providers:
            return

        # The providers' own shutdown waits up to 30 s for an exporter that repeats itself.
        def shut_down() -> None:
            for provider in providers:
                with suppress(Exception):
                    provider.shutdown()

        thread = threading.Thread(target=shut_down, name="perdure-telemetry-shutdown", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            for exporter in self._exporters:
                with suppress(Exception):
                    exporter.shutdown()
        METERS.unbind()


def start_telemetry(*, instance_id: str = "", version: str = "", metrics_address: str | None = None) -> Telemetry:
    """Returns the process's telemetry, as OpenTelemetry's own variables want it.

    Spans and metrics are exported over OTLP only when `OTEL_EXPORTER_OTLP_ENDPOINT` or, for one of them,
    `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` or `OTEL_EXPORTER_OTLP_METRICS_ENDPOINT` is set, unless
    `OTEL_SDK_DISABLED=true`, `OTEL_TRACES_EXPORTER=none` or `OTEL_METRICS_EXPORTER=none`.

    Args:
        instance_id: `service.instance.id`: the executor's id.
        version: `service.version`: the package's version.
        metrics_address: Where to serve metrics for Prometheus, host and port; None for nowhere.

    Raises:
        ConfigurationError: The protocol is neither `grpc` nor `http/protobuf`, another variable is malformed, or the
            address cannot be listened on.
    """
    resource = _resource(instance_id, version)
    parts: dict[str, Any] = {}
    try:
        if _wanted("TRACES"):
            parts |= _start_traces(resource)
        readers: list[MetricReader] = []
        if _wanted("METRICS"):
            parts["metric_exporter"] = exporter = _metric_exporter()
            readers.append(PeriodicExportingMetricReader(exporter))
        if metrics_address is not None and not _disabled():
            reader, parts["stop_prometheus"] = _serve_prometheus(metrics_address)
            readers.append(reader)
    except ValueError as error:
        raise ConfigurationError(f"an OTEL_* variable is malformed: {error}") from error
    if readers:
        parts["meter_provider"] = MeterProvider(readers, resource, shutdown_on_exit=False)
    return Telemetry(**parts)


def _start_traces(resource: Resource) -> dict[str, Any]:
    queue_size = None if os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") else QUEUE_SIZE
    exporter = _span_exporter()
    processor = BatchSpanProcessor(exporter, max_queue_size=queue_size)
    ids = ForcedIds()
    provider = TracerProvider(
        sampler=ParentBased(ALWAYS_ON),  # everything, unless a caller's `traceparent` says that nobody looks
        resource=resource,
        id_generator=ids,
        shutdown_on_exit=False,  # `Telemetry.shutdown` is bounded, OpenTelemetry's exit hook is not
    )
    provider.add_span_processor(processor)
    return {"provider": provider, "exporter": exporter, "ids": ids}


def _disabled() -> bool:
    return os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def _wanted(signal: str) -> bool:
    """Returns whether there is somewhere to send TRACES, or METRICS, by OTLP."""
    endpoint = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    none = os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() == "none"
    return bool(endpoint) and not none and not _disabled()


def _by_grpc(signal: str) -> bool:
    """Returns whether the protocol for TRACES, or METRICS, is gRPC and not HTTP."""
    variable = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    variable = variable if os.environ.get(variable) else "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = os.environ.get(variable, "").strip() or "grpc"
    if protocol not in ("grpc", "http/protobuf"):
        raise ConfigurationError(f"{variable} is {protocol!r}; it can be grpc (the default) or http/protobuf")
    return protocol == "grpc"


# Imported inside: each takes a tenth of a second, and most processes need none.


def _span_exporter() -> SpanExporter:
    if _by_grpc("TRACES"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()


def _metric_exporter() -> MetricExporter:
    if _by_grpc("METRICS"):
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

    return HttpExporter()


def _serve_prometheus(address: str) -> tuple[MetricReader, Callable[[], None]]:
    """Returns the reader of a Prometheus endpoint that is being served, and what ends it."""
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import CollectorRegistry, start_http_server

    host, _, port = address.rpartition(":")
    # A registry of its own: the global one has metrics of the Python process that nobody asked for.
    registry = CollectorRegistry()
    reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or "it is no address"
        raise ConfigurationError(f"cannot listen on {address} ({why}); choose another in {METRICS_VARIABLE}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return reader, stop


def _resource(instance_id: str, version: str) -> Resource:
    """Returns what is said of this process; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` win."""
    ours = {SERVICE_NAME_KEY: SERVICE_NAME, SERVICE_INSTANCE_ID: instance_id, SERVICE_VERSION: version}
    told = OTELResourceDetector().detect().attributes
    return Resource.create().merge(Resource({key: value for key, value in ours.items() if value and key not in told}))
