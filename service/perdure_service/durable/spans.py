"""The spans of a run: made by us, with ids derived from run, execution, step and attempt.

The tree: the caller's span › the run › each execution of it › each step › each attempt › what its body did. As the ids
are derived, a parent need not exist when its child is sent, and any process can write a span that another's death
left unwritten. An attempt's span is open, and current, while its body runs; the others are written when they end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from perdure_service import telemetry
from perdure_service.domain.runs import Failure, RunState
from perdure_service.durable.executions import Execution, StepProgress
from perdure_service.telemetry import RunSpan, RunTracer, derive_span_id, format_traceparent, parse_traceparent


class Spans:
    """Writes the spans of runs; does nothing, cheaply, when there is nowhere to send them."""

    def __init__(self, tracer: RunTracer, executor_id: str = "") -> None:
        self._tracer = tracer
        self._executor_id = executor_id

    @staticmethod
    def traceparent_of_execution(workflow_id: str, trace_id: str, execution: int) -> str:
        """Returns what a child run started by this execution has as its caller."""
        return format_traceparent(int(trace_id, 16), derive_span_id(workflow_id, execution))

    def attempt(self, execution: Execution, step_id: int, step: StepProgress) -> RunSpan:
        """Opens the span of an attempt and makes it current, so that what its body does nests in it."""
        return self._tracer.span(
            telemetry.ATTEMPT_SPAN,
            trace_id=int(execution.trace_id, 16),
            span_id=derive_span_id(execution.key.workflow_id, execution.number, step_id, step.attempt),
            parent_span_id=derive_span_id(execution.key.workflow_id, execution.number, step_id),
            attributes={**self._step_attributes(execution, step_id, step), telemetry.ATTEMPT: step.attempt},
            sampled=execution.sampled,
            activate=True,
        )

    def step_ended(self, execution: Execution, step_id: int) -> None:
        """Writes the span of a step whose checkpoint is committed."""
        step = execution.steps.get(step_id)
        if step is None:
            return
        self._tracer.record_span(
            telemetry.step_span_name(step.name),
            trace_id=int(execution.trace_id, 16),
            span_id=derive_span_id(execution.key.workflow_id, execution.number, step_id),
            parent_span_id=derive_span_id(execution.key.workflow_id, execution.number),
            start_ns=step.start_ns,
            end_ns=time.time_ns(),
            attributes=self._step_attributes(execution, step_id, step),
            sampled=execution.sampled,
            status="ok" if step.error is None else "error",
            error_type="" if step.error is None else type(step.error).__name__,
        )

    def execution_ended(self, execution: Execution, why: str | None) -> None:
        """Writes the span of an execution; `why` is None when the run ended with it."""
        self._tracer.record_span(
            telemetry.EXECUTION_SPAN,
            trace_id=int(execution.trace_id, 16),
            span_id=derive_span_id(execution.key.workflow_id, execution.number),
            parent_span_id=derive_span_id(execution.key.workflow_id, "run"),
            start_ns=execution.begun_ns,
            end_ns=time.time_ns(),
            attributes=self._run_attributes(execution),
            sampled=execution.sampled,
            status="unset" if why is None else "error",
            error_type="" if why is None else "ExecutionLost",
        )

    def run_ended(self, row: Mapping[str, Any], state: RunState, failure: Failure | None) -> None:
        """Writes the span of a run, from its creation to its end, under the caller's span if it had one."""
        caller = parse_traceparent(row["traceparent"])
        created: datetime = row["created_at"]
        self._tracer.record_span(
            telemetry.run_span_name(row["agent"]),
            trace_id=int(row["trace_id"], 16),
            span_id=derive_span_id(row["workflow_id"], "run"),
            parent_span_id=caller.span_id if caller else None,
            start_ns=int(created.timestamp() * 1_000_000) * 1_000,
            end_ns=time.time_ns(),
            attributes={
                telemetry.RUN_ID: row["run_id"],
                telemetry.NAMESPACE: row["namespace"],
                telemetry.AGENT: row["agent"],
                telemetry.AGENT_VERSION: row["agent_version"],
                telemetry.EXECUTION: row["execution"],
            },
            sampled=caller.sampled if caller else True,
            status="ok" if state is RunState.SUCCEEDED else "error",
            error_type="" if state is RunState.SUCCEEDED else (failure.type if failure else state.value),
        )

    def _run_attributes(self, execution: Execution) -> dict[str, str | int | float | bool]:
        return {
            telemetry.RUN_ID: execution.key.run_id,
            telemetry.NAMESPACE: execution.key.namespace,
            telemetry.AGENT: execution.agent,
            telemetry.AGENT_VERSION: execution.agent_version,
            telemetry.EXECUTION: execution.number,
            telemetry.EXECUTOR_ID: self._executor_id,
        }

    def _step_attributes(
        self, execution: Execution, step_id: int, step: StepProgress
    ) -> dict[str, str | int | float | bool]:
        return {**self._run_attributes(execution), telemetry.STEP_ID: step_id, telemetry.STEP_NAME: step.name}
