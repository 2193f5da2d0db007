"""Decides where spans and metrics go: OTLP when `OTEL_*` says so, Prometheus when a setting does."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.resources import SERVICE_NAME as SERVICE_NAME_KEY
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

from perdure_service.errors import ConfigurationError
from perdure_service.telemetry.names import SERVICE_NAME
from perdure_service.telemetry.spans import ForcedIds, RunTracer

SHUTDOWN_TIMEOUT_S = 5.0
"""How long `Telemetry.shutdown` waits for the last spans to be sent."""
QUEUE_SIZE = 16_384
"""Spans kept for export. OpenTelemetry's default of 2,048 is less than a second of a busy executor."""


class Telemetry:
    """The process's tracer provider, if there is one, and the tracer that uses it."""

    def __init__(
        self, provider: TracerProvider | None = None, exporter: SpanExporter | None = None, ids: ForcedIds | None = None
    ) -> None:
        self._provider = provider
        self._exporter = exporter
        self.tracer = RunTracer(provider, ids)

    def install(self) -> None:
        """Makes it the provider that libraries (pydantic-ai, openai) find. Once per process; OpenTelemetry's rule."""
        if self._provider is not None:
            trace.set_tracer_provider(self._provider)

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Sends what is left, for at most `timeout_s`; then gives it up. Blocks. Never raises."""
        provider, self._provider = self._provider, None
        if provider is None:
            return

        # The provider's own shutdown waits up to 30 s for an exporter that repeats itself.
        def shut_down() -> None:
            with suppress(Exception):
                provider.shutdown()

        thread = threading.Thread(target=shut_down, name="perdure-telemetry-shutdown", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive() and self._exporter is not None:
            with suppress(Exception):
                self._exporter.shutdown()


def start_telemetry(*, instance_id: str = "", version: str = "") -> Telemetry:
    """Returns the process's telemetry, as OpenTelemetry's own variables want it.

    Spans are exported only when `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set and
    neither `OTEL_SDK_DISABLED=true` nor `OTEL_TRACES_EXPORTER=none`; otherwise nothing is recorded.

    Args:
        instance_id: `service.instance.id`: the executor's id.
        version: `service.version`: the package's version.

    Raises:
        ConfigurationError: The protocol is neither `grpc` nor `http/protobuf`, or another variable is malformed.
    """
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if not endpoint or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return Telemetry()
    queue_size = None if os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") else QUEUE_SIZE
    try:
        exporter = _exporter()
        processor = BatchSpanProcessor(exporter, max_queue_size=queue_size)
    except ValueError as error:
        raise ConfigurationError(f"an OTEL_* variable is malformed: {error}") from error
    ids = ForcedIds()
    provider = TracerProvider(
        sampler=ParentBased(ALWAYS_ON),  # everything, unless a caller's `traceparent` says that nobody looks
        resource=_resource(instance_id, version),
        id_generator=ids,
        shutdown_on_exit=False,  # `Telemetry.shutdown` is bounded, OpenTelemetry's exit hook is not
    )
    provider.add_span_processor(processor)
    return Telemetry(provider, exporter, ids)


def _exporter() -> SpanExporter:
    variable = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    variable = variable if os.environ.get(variable) else "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = os.environ.get(variable, "").strip() or "grpc"
    # Imported here: each takes a tenth of a second, and most processes need none.
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    raise ConfigurationError(f"{variable} is {protocol!r}; it can be grpc (the default) or http/protobuf")


def _resource(instance_id: str, version: str) -> Resource:
    """Returns what all spans say of this process; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` win."""
    ours = {SERVICE_NAME_KEY: SERVICE_NAME, SERVICE_INSTANCE_ID: instance_id, SERVICE_VERSION: version}
    told = OTELResourceDetector().detect().attributes
    return Resource.create().merge(Resource({key: value for key, value in ours.items() if value and key not in told}))
