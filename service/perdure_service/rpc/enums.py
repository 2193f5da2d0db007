"""Pairs the names of the domain with the numbers of the API's enums; both directions, made from the names alone."""

from __future__ import annotations

from perdure.v1 import agent_run_pb2, agent_run_service_pb2, approval_pb2, run_event_pb2

from perdure_service.domain.approvals import ApprovalState, TimeoutOutcome
from perdure_service.domain.events import EventKind, StepState
from perdure_service.domain.runs import RunState
from perdure_service.domain.trace import TraceSpanKind

RUN_STATES = {state: agent_run_pb2.AgentRunState.Value(f"AGENT_RUN_STATE_{state}") for state in RunState}
STEP_STATES = {state: agent_run_service_pb2.StepState.Value(f"STEP_STATE_{state}") for state in StepState}
APPROVAL_STATES = {state: approval_pb2.ApprovalState.Value(f"APPROVAL_STATE_{state}") for state in ApprovalState}
TIMEOUT_OUTCOMES = {
    outcome: approval_pb2.ApprovalTimeoutOutcome.Value(f"APPROVAL_TIMEOUT_OUTCOME_{outcome}")
    for outcome in TimeoutOutcome
}
EVENT_KINDS = {kind: run_event_pb2.RunEventKind.Value(f"RUN_EVENT_KIND_{kind.upper()}") for kind in EventKind}
SPAN_KINDS = {kind: agent_run_service_pb2.SpanKind.Value(f"SPAN_KIND_{kind}") for kind in TraceSpanKind}
SPAN_STATUSES = {
    "unset": agent_run_service_pb2.SPAN_STATUS_UNSPECIFIED,
    "ok": agent_run_service_pb2.SPAN_STATUS_OK,
    "error": agent_run_service_pb2.SPAN_STATUS_ERROR,
}

# Requests: the unspecified number is missing where it is refused.
RUN_STATE_OF = {int(number): state for state, number in RUN_STATES.items()}
APPROVAL_STATE_OF = {int(number): state for state, number in APPROVAL_STATES.items()}
EVENT_KIND_OF = {int(number): kind for kind, number in EVENT_KINDS.items()}
IS_FULL_VIEW = {
    int(agent_run_pb2.AGENT_RUN_VIEW_UNSPECIFIED): False,
    int(agent_run_pb2.AGENT_RUN_VIEW_BASIC): False,
    int(agent_run_pb2.AGENT_RUN_VIEW_FULL): True,
}
REFUSES_EXISTING = {
    int(agent_run_service_pb2.CONFLICT_POLICY_UNSPECIFIED): False,
    int(agent_run_service_pb2.CONFLICT_POLICY_USE_EXISTING): False,
    int(agent_run_service_pb2.CONFLICT_POLICY_FAIL): True,
}
