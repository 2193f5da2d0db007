"""Makes a run from the recorded steps of another one: ForkRun.

Everything is decided before anything is written: the first step, the steps that are taken over, version, input. Steps
that are recorded never change, so what is read for the decision need not be locked. One transaction then lets DBOS
copy status, input, checkpoints, published values and streams, and writes the run and the beginning of its log: QUEUED,
`forked`, and what the forked run's log says of the steps that were taken over.

**Who may write these rows?** Nobody else yet: they are new. The status rows of the forked run, and of the runs whose
results it has read (DBOS reads them again in a replay), are locked first, in order of ids, so that a deletion of one
comes before or after. The
copied steps are compared with those that were decided on; a step that was recorded, or a run that was deleted and
started anew, in between makes the call ABORTED, and a repeat decides again.

**What if we die on the next line, or the reply to COMMIT is lost?** The rows are one commit. A repeat of the
transaction, or of the whole call, finds the run: by its id, or by its request where the server makes the id.

**What if there are two of us?** The primary key lets one in; the other finds its run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from dbos._error import DBOSNonExistentWorkflowError
from dbos._sys_db_postgres import PostgresSystemDatabase

from perdure_service.agents import catalogue
from perdure_service.domain.agents import check_input
from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.forks import ForkPoint, Recorded, fork_point, from_checkpoints, taken_over
from perdure_service.domain.queues import DEFAULT_QUEUE
from perdure_service.domain.runs import Run, RunKey, RunStart, RunState, check_client_run_id, input_sha256, new_run_id
from perdure_service.durable.executions import now_ms
from perdure_service.durable.operation import Operation
from perdure_service.durable.requests import ForkCommand
from perdure_service.durable.retries import repeated
from perdure_service.durable.runtime import Runtime, portable_inputs
from perdure_service.errors import (
    Contention,
    InvalidArgument,
    RunConflict,
    RunInputMismatch,
    RunNotFound,
    VersionUnavailable,
)
from perdure_service.store import event_log, forks, payloads, runs
from perdure_service.store.forks import Origin
from perdure_service.store.sqlstates import reading, retrying
from perdure_service.telemetry import derive_trace_id, parse_traceparent


class _ForkExists(Exception):
    """A transaction found the run that it was to make, or one that has its id or its request."""


@dataclass(frozen=True, slots=True)
class _Code:
    """What the fork runs, and with what.

    Attributes:
        inputs: The serialized arguments and their format; None for those of the forked run.
    """

    agent_version: str
    workflow_name: str
    input_argument: str | None
    input_sha256: str
    inputs: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """A fork, decided."""

    origin: RunKey
    facts: Origin
    point: ForkPoint
    code: _Code
    start: RunStart
    told: list[Event]


def fork(runtime: Runtime, origin: Run | None, command: ForkCommand) -> tuple[Run | RunStart, bool]:
    """Forks a run; returns the new run and whether this request created it. Blocks.

    With `validate_only` nothing is written, and the start that would be is returned.

    Args:
        runtime: The engine.
        origin: The run to fork, with its input; None when there is none.
        command: What is asked for.

    Raises:
        RunNotFound: There is no run to fork.
        InvalidArgument: There is no such step, or the input does not fit the agent.
        VersionUnavailable: No executor here has the code that would go on.
        RunConflict: The new id, or the request's id, was used for something else.
        Contention: The forked run changed meanwhile; repeat the call.
    """
    if command.new_run_id:
        check_client_run_id(command.new_run_id, "new_run_id")
    found = None if command.validate_only else _existing(runtime, command)
    if found is not None:
        # Before the forked run is looked at: the answer to a repeat must not depend on what became of it.
        return _the_same(found, origin, command)
    if origin is None:
        raise RunNotFound(f"there is no run {command.run_id!r} in namespace {command.namespace!r}")
    plan = _decide(runtime, origin, command)
    if command.validate_only:
        return plan.start, False
    try:
        with runtime.database.bounded():
            # DBOS repeats no fork. When the first attempt was committed after all, the next one finds the fork.
            write = repeated(sys_db=runtime.database)(_write)
            write(runtime, plan, unique_request_id=None if command.new_run_id else command.request_id)
    except (_ForkExists, sa.exc.IntegrityError) as error:
        found = _existing(runtime, command)
        if found is None:
            taken = f"the id {plan.start.key.run_id!r} is taken by something that is not a run"
            raise RunConflict(taken) from error
        return _the_same(found, origin, command)
    except DBOSNonExistentWorkflowError:
        raise RunNotFound(f"run {command.run_id!r} was deleted while it was forked") from None
    made = reading(runtime.engine, "runs.get", lambda conn: runs.get(conn, plan.start.key.workflow_id))
    if made is None:
        raise RunNotFound(f"run {plan.start.key.run_id!r} was deleted as soon as it was made")
    return made, True


def _existing(runtime: Runtime, command: ForkCommand) -> Run | None:
    """Returns the run that has the new id or, where the server makes it, that this request was given before."""

    def look(conn: sa.Connection) -> Run | None:
        if command.new_run_id:
            return runs.get(conn, RunKey.of_api(command.namespace, command.new_run_id).workflow_id)
        workflow_id = runs.find_request(conn, command.namespace, command.request_id)
        return None if workflow_id is None else runs.get(conn, workflow_id)

    return retrying(runtime.engine, "runs.find_fork", look)


def _the_same(found: Run, origin: Run | None, command: ForkCommand) -> tuple[Run, bool]:
    """Returns a run that exists if it is the fork that is asked for; what the request leaves open is not compared.

    Raises:
        RunConflict: It is another one.
    """
    version = command.agent_version or (origin.agent_version if origin else found.agent_version)
    digest = origin.input_sha256 if origin else found.input_sha256
    if command.run_input is not None:
        digest = input_sha256(found.agent, command.run_input)
    if (
        found.forked_from_run_id != command.run_id
        or command.from_step_id not in (0, found.forked_from_step_id)
        or version != found.agent_version
    ):
        raise RunConflict(
            f"run {found.key.run_id!r} exists and is not this fork of {command.run_id!r}; "
            "choose another new_run_id, and a request_id of its own for every call"
        )
    if digest != found.input_sha256:
        raise RunInputMismatch(
            f"run {found.key.run_id!r} exists with another input; choose another new_run_id",
            existing_sha256=found.input_sha256,
            requested_sha256=digest,
        )
    return found, found.request_id == command.request_id


# ---- deciding --------------------------------------------------------------------------------------------------------


def _decide(runtime: Runtime, origin: Run, command: ForkCommand) -> _Plan:
    """Fixes everything about a fork before anything is written."""
    workflow_id = origin.key.workflow_id
    recorded = reading(runtime.engine, "forks.recorded", lambda conn: forks.recorded(conn, workflow_id))
    facts = reading(runtime.engine, "forks.origin", lambda conn: forks.origin(conn, workflow_id))
    if facts is None:  # after the steps: those of a run that was deleted in between are not taken for all there are
        raise RunNotFound(f"there is no run {command.run_id!r} in namespace {command.namespace!r}")
    point = fork_point(recorded, command.from_step_id)
    code = _code(runtime, origin, facts, command)
    key = RunKey.of_api(command.namespace, command.new_run_id or new_run_id(runtime.cell))
    caller_span = parse_traceparent(command.trace_parent)
    start = RunStart(
        key=key,
        agent=origin.agent,
        agent_version=code.agent_version,
        input_sha256=code.input_sha256,
        request_id=command.request_id,
        caller=command.caller,
        labels=dict(command.labels or origin.labels),
        context_id=origin.context_id,
        trace_id=f"{caller_span.trace_id if caller_span else derive_trace_id(key.workflow_id):032x}",
        traceparent=command.trace_parent if caller_span else "",
        deadline_at=command.deadline_at,
        forked_from_workflow_id=workflow_id,
        forked_from_step=point.from_step_id,
        queue=origin.queue or DEFAULT_QUEUE,
        priority=origin.priority,
    )
    told = [] if command.validate_only else _told(runtime, origin.key, recorded, point)
    return _Plan(origin.key, facts, point, code, start, told)


def _code(runtime: Runtime, origin: Run, facts: Origin, command: ForkCommand) -> _Code:
    """Returns the code and the input of a fork, checked against each other where one of them is new."""
    if command.run_input is None and command.agent_version in ("", origin.agent_version):
        if not runtime.has_code_of(facts.workflow_name):
            raise VersionUnavailable(
                f"no executor here has the code of {facts.workflow_name!r}; fork with another version, or deploy it"
            )
        return _Code(origin.agent_version, facts.workflow_name, facts.input_argument, origin.input_sha256)
    version = command.agent_version or origin.agent_version
    agent = catalogue.find(origin.agent, version) if version else None
    if agent is None:
        raise VersionUnavailable(
            f"no executor here has the code of {origin.agent}@{version}; ListAgents tells which versions there are"
        )
    run_input: Any = command.run_input
    if run_input is None:
        if origin.input_json is None:
            raise InvalidArgument("input", "is required: that of the forked run is not JSON")
        run_input = json.loads(origin.input_json)
    check_input(agent.spec, run_input)
    digest = origin.input_sha256 if command.run_input is None else input_sha256(origin.agent, run_input)
    inputs = portable_inputs(agent.arguments(run_input))
    return _Code(version, agent.workflow_name, agent.input_argument or None, digest, inputs)


def _told(runtime: Runtime, key: RunKey, recorded: Sequence[Recorded], point: ForkPoint) -> list[Event]:
    """Returns what the forked run's log says of the steps that are taken over, or their checkpoints where it is cut."""
    told: list[Event] = []
    after = 0
    cut = False
    while point.taken_over and (
        events := reading(
            runtime.engine, "events.read", partial(event_log.read, workflow_id=key.workflow_id, after_sequence=after)
        )
    ):
        cut |= events[0].sequence != after + 1
        told += taken_over(events, point)
        after = events[-1].sequence
    return [*(from_checkpoints(recorded, told, point, key.namespace) if cut else ()), *told]


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write(runtime: Runtime, plan: _Plan, *, unique_request_id: str | None) -> None:
    """Writes a fork in one transaction.

    Raises:
        _ForkExists: It is there already, perhaps by an earlier attempt of this very call.
    """
    database, key, origin_id = runtime.database, plan.start.key, plan.origin.workflow_id
    operation = Operation(None)
    inputs = plan.code.inputs
    stowed = database.payloads.stow(inputs[0], patient=False) if inputs else None
    if inputs and stowed:
        inputs = (stowed.pointer.text, inputs[1])

    def begin(conn: sa.Connection) -> None:
        needed = sorted({origin_id, *plan.point.awaited})
        locked = database._lock(conn, needed)
        if runs.get(conn, key.workflow_id) is not None:
            raise _ForkExists(key.workflow_id)
        if locked != needed:
            raise Contention("a run that the fork needs was deleted meanwhile; repeat the call")

    def finish(conn: sa.Connection) -> None:
        facts = forks.origin(conn, origin_id)
        same = facts is not None and facts.created_at == plan.facts.created_at
        if not same or forks.step_ids(conn, key.workflow_id) != plan.point.taken_over:
            raise Contention(f"run {plan.origin.run_id!r} changed while it was forked; repeat the call")
        forks.finish(
            conn,
            key.workflow_id,
            workflow_name=plan.code.workflow_name,
            deadline_at=plan.start.deadline_at,
            inputs=inputs,
            priority=plan.start.priority,
        )
        payloads.copy_uses(conn, {key.workflow_id: origin_id})
        database.payloads.write(conn, key.workflow_id, stowed)
        inserted = runs.insert(
            conn,
            plan.start,
            input_argument=plan.code.input_argument,
            parent_workflow_id=None,
            unique_request_id=unique_request_id,
            executor_id="",
        )
        if not inserted:
            raise _ForkExists(key.workflow_id)
        forked = {"from_run_id": plan.origin.run_id, "from_step_id": plan.point.from_step_id}
        at = now_ms()
        operation.add(
            key.workflow_id,
            Event(EventKind.STATE_CHANGED, at, {"to": RunState.QUEUED.value}),
            Event(EventKind.FORKED, at, forked),
            *plan.told,
        )

    operation.begin, operation.finish = begin, finish
    operation.done = lambda: database.placement.queued(plan.start.queue)
    with database.operations.open(operation):
        PostgresSystemDatabase.fork_workflow(
            database, [origin_id], [key.workflow_id], [plan.point.from_step_id],
            application_version=runtime.application_version, queue_name=plan.start.queue,
        )  # fmt: skip
