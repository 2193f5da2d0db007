"""Turns what the service answers (runs, steps, approvals, catalogue entries) into messages."""

from __future__ import annotations

import json

from perdure.v1 import agent_catalog_service_pb2, agent_run_pb2, agent_run_service_pb2, approval_pb2

from perdure_service.domain.agents import AgentSpec
from perdure_service.domain.approvals import Approval
from perdure_service.domain.events import Step
from perdure_service.domain.runs import Progress, Run, Usage
from perdure_service.durable.artifacts import Artifact
from perdure_service.rpc import enums, fields

_SELDOM_TEXTS = ("state_reason", "context_id", "parent_run_id", "forked_from_run_id")
_SELDOM_NUMBERS = ("pending_approvals", "forked_from_step_id", "priority")
_NOTHING_USED = Usage()


def agent_run(run: Run, *, full: bool, output: bool = False) -> agent_run_pb2.AgentRun:
    """Returns a run as a message; with input and output only when `full`, or with its output alone.

    Fields that most runs have nothing in are set only when there is something: each costs.
    """
    message = agent_run_pb2.AgentRun(
        namespace=fields.text(run.key.namespace),
        run_id=fields.text(run.key.run_id),
        agent=fields.text(run.agent),
        agent_version=fields.text(run.agent_version),
        input_sha256=run.input_sha256,
        state=enums.RUN_STATES[run.state],
        create_time=fields.timestamp(run.create_time),
        start_time=fields.timestamp(run.start_time),
        end_time=fields.timestamp(run.end_time),
        deadline_time=fields.timestamp(run.deadline_time),
        execution=fields.int32(run.execution),
        executor_id=fields.text(run.executor_id),
        progress=_progress(run.progress),
        failure=fields.failure(run.failure),
        usage=_usage(run.usage),
        trace_id=fields.text(run.trace_id),
        last_sequence=fields.int64(run.last_sequence),
        caller=fields.text(run.caller),
        queue=fields.text(run.queue),
    )
    for name in _SELDOM_TEXTS:
        if value := getattr(run, name):
            setattr(message, name, fields.text(value))
    for name in _SELDOM_NUMBERS:
        if value := getattr(run, name):
            setattr(message, name, fields.int32(value))
    for key, value in run.labels.items():
        message.labels[fields.text(key)] = fields.text(value)
    if full:
        message.input_json = fields.text(run.input_json)
        message.input_bytes = fields.int64(run.input_bytes)
    if full or output:
        message.output_json = fields.text(run.output_json)
        message.output_bytes = fields.int64(run.output_bytes)
    return message


def step(value: Step) -> agent_run_service_pb2.Step:
    """Returns a step as a message."""
    return agent_run_service_pb2.Step(
        step_id=fields.int32(value.step_id),
        step_name=fields.text(value.step_name),
        state=enums.STEP_STATES[value.state],
        attempts=fields.int32(value.attempts),
        execution=fields.int32(value.execution),
        start_time=fields.timestamp_of_ms(value.start_ms),
        end_time=fields.timestamp_of_ms(value.end_ms),
        error=fields.failure_of_json(value.error),
        output_preview=fields.text(value.output_preview),
        child_run_id=fields.text(value.child_run_id),
    )


def approval(value: Approval) -> approval_pb2.Approval:
    """Returns an approval as a message."""
    return approval_pb2.Approval(
        approval_id=fields.text(value.approval_id),
        namespace=fields.text(value.key.namespace),
        run_id=fields.text(value.key.run_id),
        agent=fields.text(value.agent),
        step_id=fields.int32(value.step_id),
        title=fields.text(value.title),
        payload_json=fields.text(value.payload_json),
        answer_schema_json=fields.text(value.answer_schema_json),
        assignees=[fields.text(assignee) for assignee in value.assignees],
        create_time=fields.timestamp(value.create_time),
        deadline_time=fields.timestamp(value.deadline_time),
        on_timeout=enums.TIMEOUT_OUTCOMES[value.on_timeout],
        state=enums.APPROVAL_STATES[value.state],
        decided_by=fields.text(value.decided_by),
        decide_time=fields.timestamp(value.decide_time),
        comment=fields.text(value.comment),
        answer_json=fields.text(value.answer_json),
        revision=fields.int64(value.revision),
    )


def artifact_part(part: Artifact | bytes) -> agent_run_service_pb2.ReadArtifactResponse:
    """Returns what an artifact is, or some of its bytes, as a message."""
    if isinstance(part, bytes):
        return agent_run_service_pb2.ReadArtifactResponse(data=part)
    return agent_run_service_pb2.ReadArtifactResponse(
        artifact=agent_run_service_pb2.ArtifactInfo(
            name=fields.text(part.name),
            media_type=fields.text(part.media_type),
            size_bytes=fields.int64(part.size_bytes),
            sha256=part.sha256,
        )
    )


def agent(spec: AgentSpec) -> agent_catalog_service_pb2.Agent:
    """Returns a catalogue entry as a message."""
    return agent_catalog_service_pb2.Agent(
        agent=fields.text(spec.name),
        agent_version=fields.text(spec.version),
        description=fields.text(spec.description),
        input_schema_json=json.dumps(dict(spec.input_schema)),
        output_schema_json="" if spec.output_schema is None else json.dumps(dict(spec.output_schema)),
        current=spec.current,
        max_steps=fields.int64(spec.budget.max_steps),
        max_tokens=fields.int64(spec.budget.max_tokens),
        queue=fields.text(spec.queue),
        max_running=fields.int32(spec.max_running),
    )


def _usage(value: Usage) -> agent_run_pb2.RunUsage | None:
    if value == _NOTHING_USED:
        return None
    return agent_run_pb2.RunUsage(
        input_tokens=fields.int64(value.input_tokens), output_tokens=fields.int64(value.output_tokens)
    )


def _progress(value: Progress | None) -> agent_run_pb2.RunProgress | None:
    if value is None:
        return None
    return agent_run_pb2.RunProgress(
        message=fields.text(value.message), completed=fields.int64(value.completed), total=fields.int64(value.total)
    )
