"""A place for spans to go: a real OTLP receiver, by gRPC and by HTTP, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []
        self.metrics: list[metrics_pb2.Metric] = []
        self.resources: list[dict[str, Any]] = []
        self.endpoint = ""
        self.paths: list[str] = []
        self._arrived = threading.Condition()

    def Export(self, request: Any, context: Any) -> Any:
        with self._arrived:
            for of_resource in request.resource_spans:
                self.resources.append(attributes_of(of_resource.resource))
                for scope in of_resource.scope_spans:
                    self.spans.extend(scope.spans)
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> trace_pb2.Span:
        [span] = [span for span in self.spans if span.name == name]
        return span


def attributes_of(owner: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in owner.attributes}


def ids_of(span: trace_pb2.Span) -> tuple[int, int, int | None]:
    """Returns trace, span and parent id; None for a root."""
    parent = int.from_bytes(span.parent_span_id) if span.parent_span_id else None
    return int.from_bytes(span.trace_id), int.from_bytes(span.span_id), parent


class MetricsSink(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps metrics beside the spans of a sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def Export(self, request: Any, context: Any) -> Any:
        for of_resource in request.resource_metrics:
            for scope in of_resource.scope_metrics:
                self._sink.metrics.extend(scope.metrics)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextmanager
def grpc_sink() -> Iterator[Sink]:
    sink = Sink()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(sink, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(MetricsSink(sink), server)
    sink.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield sink
    finally:
        server.stop(None).wait()


@contextmanager
def http_sink() -> Iterator[Sink]:
    sink = Sink()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            sink.paths.append(self.path)
            sink.Export(trace_service_pb2.ExportTraceServiceRequest.FromString(data), None)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sink.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
