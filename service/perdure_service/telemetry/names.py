"""Decides what spans and their attributes are called. The names of metrics are beside them, in `metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

SERVICE_NAME = "perdure"

# ---- names of spans --------------------------------------------------------------------------------------------------

EXECUTION_SPAN = "execution"
"""The time in which one executor ran a run; child of the run's span."""
ATTEMPT_SPAN = "attempt"
"""One try of a step; child of the step's span."""
APPROVAL_SPAN = "approval"
"""A question put to a person, until it was answered; child of the span of the execution that asked. Its title is not
told: agents put what users wrote into it."""
WAIT_QUEUED = "queued"
WAIT_SCHEDULED = "scheduled"
WAIT_RECOVERY = "recovery"
"""From the last sign of life of an executor that is gone until its run was given back."""
WAIT_PARKED = "parked"
"""From the parking of a run, which ends its execution, until it was put back into its queue."""
WAIT_SLEEP = "sleep"
WAIT_SIGNAL = "signal"


def run_span_name(agent: str) -> str:
    """Returns the name of a run's span, from its creation to its end."""
    return f"agent_run {agent}"


def step_span_name(step_name: str) -> str:
    """Returns the name of a step's span, all attempts and delays together; child of an execution's span."""
    return f"step {step_name}"


def wait_span_name(what: str) -> str:
    """Returns the name of the span of a time in which a run waited, e.g. `wait queued`, `wait signal add-note`."""
    return f"wait {what}"


def model_span_name(operation: str, model: str) -> str:
    """Returns the name of a model call's span as OpenTelemetry's `gen_ai` conventions have it, e.g. `chat qwen3`."""
    return f"{operation} {model}"


# ---- names of attributes ---------------------------------------------------------------------------------------------

# Numbers (execution, step_id, attempt) are those of the API.
RUN_ID = "perdure.run_id"
NAMESPACE = "perdure.namespace"
AGENT = "perdure.agent"
AGENT_VERSION = "perdure.agent_version"
EXECUTION = "perdure.execution"
STEP_ID = "perdure.step_id"
STEP_NAME = "perdure.step_name"
ATTEMPT = "perdure.attempt"
EXECUTOR_ID = "perdure.executor_id"
ERROR_CUT_OFF = "ExecutionLost"
"""`error.type` of what an executor's death, or its end, cut off: its execution, and the steps and attempts in it."""
WAITING_FOR = "perdure.waiting_for"
"""What a wait is for: `queued`, `scheduled`, `recovery`, `sleep`, `signal`."""
SIGNAL_NAME = "perdure.signal_name"
FROM_EXECUTOR_ID = "perdure.from_executor_id"
"""The executor that was gone, on `wait recovery`."""
APPROVAL_ID = "perdure.approval_id"
APPROVAL_STATE = "perdure.approval_state"
"""How it was closed: `APPROVED`, `REJECTED`, `EXPIRED`, `WITHDRAWN`."""
DECIDED_BY = "perdure.decided_by"
INPUT_TOKENS = "perdure.input_tokens"
OUTPUT_TOKENS = "perdure.output_tokens"
"""Tokens that an attempt, or a whole run, has paid for. Not named `gen_ai.…`: the span of the model call inside has
those, and whoever adds them up would count twice."""
CALL_ID = "perdure.call_id"
"""The id of one gRPC call, as in the log."""

# https://opentelemetry.io/docs/specs/semconv/general/attributes/ and …/rpc/grpc/ and …/gen-ai/
ERROR_TYPE = "error.type"
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.response.status_code"
"""The name of the gRPC status code, e.g. `NOT_FOUND`."""
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"

Attributes = Mapping[str, str | int | float | bool]
SpanStatus = Literal["unset", "ok", "error"]
