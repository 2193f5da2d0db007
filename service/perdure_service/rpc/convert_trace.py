"""Turns the spans of a trace into messages."""

from __future__ import annotations

from perdure.v1 import agent_run_service_pb2 as pb

from perdure_service import telemetry
from perdure_service.domain.trace import RunLink, TraceSpan
from perdure_service.durable.requests import RunTrace
from perdure_service.rpc import enums, fields


def run_trace(trace: RunTrace, max_bytes: int) -> pb.GetRunTraceResponse:
    """Returns a trace as a message of about `max_bytes` at most; the last spans are left out if need be."""
    response = pb.GetRunTraceResponse(trace_id=fields.text(trace.trace_id), truncated=trace.truncated)
    size_bytes = 0
    for span in trace.spans:
        message = _span(span)
        size_bytes += message.ByteSize() + 4
        if size_bytes > max_bytes:
            response.truncated = True
            break
        response.spans.append(message)
    return response


def _span(span: TraceSpan) -> pb.TraceSpan:
    return pb.TraceSpan(
        span_id=f"{span.span_id:016x}",
        parent_span_id="" if span.parent_span_id is None else f"{span.parent_span_id:016x}",
        name=fields.text(span.name),
        kind=enums.SPAN_KINDS[span.kind],
        run_id=fields.text(span.run_id),
        start_time=fields.timestamp_of_ms(span.start_ms),
        end_time=fields.timestamp_of_ms(span.end_ms),
        status=enums.SPAN_STATUSES[span.status],
        error_type=fields.text(span.error_type),
        attributes={name: fields.text(str(value)) for name, value in _attributes(span).items()},
        links=[_link(link) for link in span.links],
    )


def _attributes(span: TraceSpan) -> dict[str, str | int]:
    """Returns the attributes as they are exported."""
    error = {telemetry.ERROR_TYPE: span.error_type} if span.error_type else {}
    return {**span.attributes, **error}


def _link(link: RunLink) -> pb.SpanLink:
    return pb.SpanLink(trace_id=link.trace_id, span_id=f"{link.span_id:016x}", run_id=fields.text(link.run_id))
