"""Lets a run continue the caller's trace: W3C `traceparent` in the metadata, when OpenTelemetry is there."""

from __future__ import annotations

from functools import cache
from typing import Protocol


class _Propagator(Protocol):
    def inject(self, carrier: dict[str, str]) -> None: ...


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Returns `traceparent` (and `tracestate`) of the current span; empty without one, or without OpenTelemetry."""
    propagator = _propagator()
    if propagator is None:
        return ()
    carrier: dict[str, str] = {}
    propagator.inject(carrier)  # injects nothing unless a valid span is current
    return tuple(carrier.items())


@cache
def _propagator() -> _Propagator | None:
    try:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        return None
    return TraceContextTextMapPropagator()
