"""Decides which metrics there are: names, units, attributes and buckets, each in one place, and how they are recorded.

No attribute holds an id of a run, a caller or a namespace: their number grows with use. The SDK bounds what is left
(names of agents and steps, which code could make up) at 2,000 combinations a metric; the rest is counted together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation

from perdure_service.telemetry.names import AGENT, RPC_METHOD, RPC_STATUS, RPC_SYSTEM, STEP_NAME

STATE = "perdure.state"
"""A state of runs, as in the API."""
OUTCOME = "perdure.outcome"
"""`succeeded`, `failed`, or (attempts) `retried`: failed, and there will be another."""
WATCH = "perdure.watch"
"""What is watched: `run`, or `approvals`."""
SQLSTATE = "db.response.status_code"
"""The database's error code; `none` when the connection was lost without one."""
POOL_STATE = "db.client.connection.state"
"""`used` or `idle`."""
POOL_NAME = "db.client.connection.pool.name"

CELL = "perdure.cell"
"""The cell that a server serves."""

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets of what should be quick."""
LONG_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
"""Buckets of work, and of waiting for people."""

Value = int | float
Attributes = Mapping[str, str]
Observe = Callable[[], Iterable[tuple[Value, Attributes]]]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as the documents have it.

    Attributes:
        unit: As UCUM writes it: `s`, or what is counted in braces.
        buckets: The upper bounds of a histogram's.
    """

    name: str
    kind: Literal["counter", "histogram", "gauge", "up-down counter"]
    unit: str
    attributes: tuple[str, ...]
    text: str
    buckets: tuple[float, ...] = ()


RUNS = Metric(
    "perdure.runs", "gauge", "{run}", (AGENT, STATE),
    "Runs that have not ended, in the whole database; every server tells the same",
)  # fmt: skip
QUEUE_AGE = Metric(
    "perdure.queue.age", "gauge", "s", (),
    "How long the oldest queued run has been waiting, in the whole database; 0 when none waits",
)  # fmt: skip
EXECUTIONS = Metric(
    "perdure.executions", "gauge", "{run}", (), "Runs that this server executes, those that wait included"
)
CELL_AWAY = Metric(
    "perdure.cell.away", "gauge", "{cell}", (CELL,),
    "1 while another region than its home executes the runs of this server's cell, else 0; nothing without regions",
)  # fmt: skip
START_LATENCY = Metric(
    "perdure.run.start.latency", "histogram", "s", (AGENT,),
    "From a run's creation, or the time it was scheduled for, until it began to run",
    SHORT_S,
)  # fmt: skip
RUN_DURATION = Metric(
    "perdure.run.duration",
    "histogram",
    "s",
    (AGENT, STATE),
    "From a run's creation to its end, by how it ended",
    LONG_S,
)
STEP_DURATION = Metric(
    "perdure.step.duration", "histogram", "s", (AGENT, STEP_NAME, OUTCOME),
    "How long steps took, all attempts and delays together, until their checkpoint",
    LONG_S,
)  # fmt: skip
STEP_ATTEMPTS = Metric(
    "perdure.step.attempts", "counter", "{attempt}", (AGENT, STEP_NAME, OUTCOME), "Attempts of steps that are over"
)
WATCHERS = Metric("perdure.watchers", "gauge", "{watcher}", (WATCH,), "Open watches of this server, and waits for runs")
EVENT_LAG = Metric(
    "perdure.event.lag",
    "histogram",
    "s",
    (),
    "From when an event happened until it was handed to the watchers here",
    SHORT_S,
)
DB_RETRIES = Metric(
    "perdure.db.retries", "counter", "{transaction}", (SQLSTATE,),
    "Transactions that were repeated, by the error that made it necessary",
)  # fmt: skip
POOL = Metric(
    "db.client.connection.count", "up-down counter", "{connection}", (POOL_NAME, POOL_STATE),
    "Connections to the database that this server has",
)  # fmt: skip
POOL_MAX = Metric(
    "db.client.connection.max", "up-down counter", "{connection}", (POOL_NAME,), "Connections that it may have"
)
RETENTION_RUNS = Metric(
    "perdure.retention.runs", "counter", "{run}", (), "Runs that this server deleted because they had grown old"
)
RETENTION_LOGS = Metric(
    "perdure.retention.logs", "counter", "{run}", (), "Runs whose logs this server cut because they had grown old"
)
RPC_DURATION = Metric(
    "rpc.server.call.duration", "histogram", "s", (RPC_SYSTEM, RPC_METHOD, RPC_STATUS),
    "How long calls took, with what StartAgent and WaitRun waited for the end; a stream, until it ended; "
    "each item of StartAgents and WaitRuns, not their streams",
    LONG_S,
)  # fmt: skip

METRICS = (
    RUNS, QUEUE_AGE, EXECUTIONS, CELL_AWAY, START_LATENCY, RUN_DURATION, STEP_DURATION, STEP_ATTEMPTS, WATCHERS,
    EVENT_LAG, DB_RETRIES, POOL, POOL_MAX, RETENTION_RUNS, RETENTION_LOGS, RPC_DURATION,
)  # fmt: skip


class Meters:
    """The instruments of this process. Until `bind` it does nothing, cheaply; it never raises."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._observed: dict[str, Observe] = {}

    def bind(self, meter: Meter) -> None:
        """Makes the instruments; what was recorded before is lost."""
        for metric in METRICS:
            match metric.kind:
                case "counter":
                    self._counters[metric.name] = meter.create_counter(metric.name, metric.unit, metric.text)
                case "histogram":
                    self._histograms[metric.name] = meter.create_histogram(
                        metric.name, metric.unit, metric.text, explicit_bucket_boundaries_advisory=metric.buckets
                    )
                case "gauge":
                    meter.create_observable_gauge(metric.name, [self._observer(metric)], metric.unit, metric.text)
                case "up-down counter":
                    meter.create_observable_up_down_counter(
                        metric.name, [self._observer(metric)], metric.unit, metric.text
                    )

    def unbind(self) -> None:
        """Goes back to doing nothing."""
        self._counters.clear()
        self._histograms.clear()
        self._observed.clear()

    def add(self, metric: Metric, attributes: Attributes, value: int = 1) -> None:
        """Counts."""
        counter = self._counters.get(metric.name)
        if counter is not None:
            counter.add(value, attributes)

    def record(self, metric: Metric, value: float, attributes: Attributes) -> None:
        """Adds a value to a histogram; clocks of two hosts may disagree, and nothing takes less than no time."""
        histogram = self._histograms.get(metric.name)
        if histogram is not None:
            histogram.record(max(0.0, value), attributes)

    def observe(self, metric: Metric, observe: Observe) -> None:
        """Says where the values of a gauge come from when somebody looks; may be called from any thread."""
        self._observed[metric.name] = observe

    def _observer(self, metric: Metric) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def look(_options: CallbackOptions) -> Iterable[Observation]:
            observe = self._observed.get(metric.name)
            return [] if observe is None else [Observation(value, attributes) for value, attributes in observe()]

        return look


METERS = Meters()
"""The process's: metrics, like logs, are recorded where something happens, in every layer."""
