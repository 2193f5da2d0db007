"""What the seam writes into our tables, and the events it makes of what DBOS does.

Everything here runs inside a transaction of DBOS's (see `operation`) that holds the status rows it is about, or makes
events from values without touching the database. Nothing here begins or ends a transaction but the three reads that
say so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from dbos._serialization import Serializer

from perdure_service.agents.catalogue import budget_of, by_workflow
from perdure_service.domain.approvals import ApprovalState
from perdure_service.domain.events import (
    APPROVAL_STEP,
    MAX_VALUE_CHARS,
    PUBLISH_STEP,
    STREAM_STEP,
    Event,
    EventKind,
    Pack,
    half_written,
    text_pieces,
)
from perdure_service.domain.payloads import stored_bytes
from perdure_service.domain.queues import DEFAULT_QUEUE
from perdure_service.domain.runs import (
    TERMINAL_STATUSES,
    Failure,
    RunKey,
    RunStart,
    RunState,
    derive_state,
    logged_state,
)
from perdure_service.durable import metering, values
from perdure_service.durable.executions import Execution, now_ms
from perdure_service.durable.spans import Spans
from perdure_service.store import approvals, event_log, runs
from perdure_service.store.dbos_tables import APPLICATION, INPUT, OUTPUTS, STATUS
from perdure_service.telemetry import derive_trace_id, parse_traceparent

AddEvents = Callable[..., None]


@dataclass(frozen=True, slots=True)
class StartRecord:
    """A run that has just been written, and its first events.

    Attributes:
        created_at: When, by the database's clock; None for one that an earlier attempt of the start has written.
    """

    key: RunKey
    agent: str
    agent_version: str
    trace_id: str
    sampled: bool
    events: list[Event]
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A run whose status is terminal and whose log is still open."""

    key: RunKey
    status: str
    serialization: str | None
    state: RunState


class Ledger:
    """See the module."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self.nudge: Callable[[Sequence[str]], None] = lambda _workflow_ids: None
        """Told of the parents of runs that have ended; set by the runtime."""

    # ---- starts ------------------------------------------------------------------------------------------------------

    def record_start(
        self,
        conn: sa.Connection,
        *,
        status: Mapping[str, Any],
        start: RunStart | None = None,
        input_argument: str | None = None,
        unique_request_id: str | None = None,
        executor_id: str = "",
    ) -> StartRecord | None:
        """Writes the run of a new workflow; returns None when there is one already.

        Args:
            conn: The transaction that has written DBOS's row.
            status: DBOS's row.
            start: What was decided about a run that a caller starts; None for children and foreign workflows.
            input_argument: See `runs.insert`.
            unique_request_id: See `runs.insert`.
            executor_id: The executor on which it begins at once; empty when it waits.
        """
        parent = status.get("parent_workflow_id") or None
        if start is None:
            start = self._start_of(conn, status, parent)
            declared = by_workflow(status["name"] or "")
            input_argument = (declared.input_argument if declared else "") or None
        created_at = runs.insert(
            conn,
            start,
            input_argument=input_argument,
            parent_workflow_id=parent,
            unique_request_id=unique_request_id,
            executor_id=executor_id,
        )
        if created_at is None:
            return None
        return replace(self.started(start, status, executor_id), created_at=created_at)

    @staticmethod
    def started(start: RunStart, status: Mapping[str, Any], executor_id: str) -> StartRecord:
        """Returns what is known of a run that is about to be written; arguments as of `record_start`."""
        data: dict[str, Any] = {"to": RunState.QUEUED.value}
        if executor_id:
            data = {"to": RunState.RUNNING.value, "executor_id": executor_id}
        elif status["status"] == "DELAYED":
            data = {"to": RunState.SCHEDULED.value, "until_ms": status.get("delay_until_epoch_ms") or 0}
        first = Event(EventKind.STATE_CHANGED, now_ms(), data, execution=1 if executor_id else 0)
        sampled = _sampled(start.traceparent)
        return StartRecord(start.key, start.agent, start.agent_version, start.trace_id, sampled, [first])

    def known(self, conn: sa.Connection, workflow_id: str) -> StartRecord | None:
        """Returns a run that an earlier attempt of the same start has written; without events."""
        run = runs.get(conn, workflow_id)
        return None if run is None else StartRecord(run.key, run.agent, run.agent_version, run.trace_id, True, [])

    @staticmethod
    def append(conn: sa.Connection, workflow_id: str, events: Iterable[Event]) -> None:
        """Appends events in a transaction that is not an operation (a caller's own)."""
        event_log.append(conn, Pack(workflow_id, list(events)))

    def _start_of(self, conn: sa.Connection, status: Mapping[str, Any], parent: str | None) -> RunStart:
        """Returns what is to be known of a run that was not started through the API."""
        workflow_id, name = status["workflow_uuid"], status["name"] or ""
        row = None
        if parent is not None:
            row = (
                conn.execute(
                    sa.text(
                        "SELECT namespace, context_id, trace_id, traceparent, caller, execution FROM perdure.run "
                        "WHERE workflow_id = :id"
                    ),
                    {"id": parent},
                )
                .mappings()
                .first()
            )
        key = RunKey.of_workflow(workflow_id, row["namespace"] if row else "default")
        if row:
            trace_id = row["trace_id"]
            traceparent = self._spans.traceparent_of_execution(
                parent or "", trace_id, row["execution"], sampled=_sampled(row["traceparent"])
            )
        else:
            trace_id, traceparent = f"{derive_trace_id(workflow_id):032x}", ""
        declared = by_workflow(name)
        agent, _, version = name.partition("@")
        if declared is not None:
            agent, version = declared.spec.name, declared.spec.version
        digest = hashlib.sha256(f"{agent}\n{status.get('inputs') or ''}".encode()).hexdigest()
        return RunStart(
            key=key,
            agent=agent,
            agent_version=version,
            input_sha256=digest,
            request_id="",
            caller=row["caller"] if row else "",
            context_id=row["context_id"] if row else "",
            trace_id=trace_id,
            traceparent=traceparent,
            forked_from_workflow_id=status.get("forked_from") or None,
        )

    def adopt(self, conn: sa.Connection, workflow_ids: Sequence[str], add: AddEvents | None = None) -> list[str]:
        """Gives a run and event 1 to workflows that have none: foreign clients wrote them.

        Args:
            conn: A transaction that holds the status rows.
            workflow_ids: Any; those that have a run are left alone.
            add: Takes the events for the transaction's packs; None appends them here.

        Returns:
            The workflow ids that were adopted.
        """
        rows = (
            conn.execute(
                sa.text(
                    "SELECT s.workflow_uuid, s.status, s.name, s.parent_workflow_id, s.forked_from, "
                    "s.delay_until_epoch_ms, i.inputs "
                    f"FROM {STATUS} AS s LEFT JOIN {INPUT} AS i ON i.workflow_uuid = s.workflow_uuid "
                    "WHERE s.workflow_uuid = ANY(:ids) AND NOT EXISTS "
                    "(SELECT 1 FROM perdure.run AS r WHERE r.workflow_id = s.workflow_uuid) ORDER BY s.workflow_uuid"
                ),
                {"ids": list(workflow_ids)},
            )
            .mappings()
            .fetchall()
        )
        adopted = []
        for row in rows:
            record = self.record_start(conn, status=dict(row))
            if record is None:
                continue
            adopted.append(row["workflow_uuid"])
            if add is None:
                self.append(conn, row["workflow_uuid"], record.events)
            else:
                add(row["workflow_uuid"], *record.events)
        return adopted

    # ---- claims ------------------------------------------------------------------------------------------------------

    def claimed(
        self, conn: sa.Connection, workflow_ids: Sequence[str], owner_xid: str, executor_id: str, add: AddEvents
    ) -> list[Execution]:
        """Logs a claim: counts an execution of each run that `owner_xid` has just taken, and returns them."""
        statuses = {
            row.workflow_uuid: row
            for row in conn.execute(
                sa.text(
                    f"SELECT workflow_uuid, delay_until_epoch_ms, queue_name, serialization FROM {STATUS} "
                    "WHERE workflow_uuid = ANY(:ids) AND owner_xid = :owner AND status = 'PENDING' "
                    "ORDER BY workflow_uuid"
                ),
                {"ids": list(workflow_ids), "owner": owner_xid},
            )
        }
        taken = list(statuses)
        if not taken:
            return []
        self.adopt(conn, taken, add)
        executions = []
        for workflow_id, row in sorted(runs.begin_executions(conn, taken, executor_id).items()):
            execution = Execution(
                key=RunKey(row["namespace"], row["run_id"], workflow_id),
                owner_xid=owner_xid,
                agent=row["agent"],
                agent_version=row["agent_version"],
                number=row["execution"],
                trace_id=row["trace_id"],
                sampled=_sampled(row["traceparent"]),
                waited_s=row["begun_at"].timestamp()
                - max(row["created_at"].timestamp(), (statuses[workflow_id].delay_until_epoch_ms or 0) / 1000),
                queue=statuses[workflow_id].queue_name or DEFAULT_QUEUE,
                serialization=statuses[workflow_id].serialization,
                state=RunState.QUEUED,
                replaying=row["execution"] > 1,
                budget=budget_of(row["agent"], row["agent_version"]),
                tokens=row["tokens"],
            )
            begins = execution.moved(RunState.RUNNING, executor_id=executor_id)
            execution.begun_ns = begins.time_ms * 1_000_000
            add(workflow_id, begins)
            if execution.number > 1:
                # Before any new text: what the dead execution wrote of steps that it did not finish is void.
                for step_id, name in half_written(self._log(conn, workflow_id)):
                    add(workflow_id, Event(EventKind.ATTEMPT_RESET, now_ms(), {}, step_id, name, 1, execution.number))
            executions.append(execution)
        return executions

    @staticmethod
    def _log(conn: sa.Connection, workflow_id: str) -> Iterator[Event]:
        """Yields a run's whole log."""
        after = 0
        while events := event_log.read(conn, workflow_id, after):
            yield from events
            after = events[-1].sequence

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint_events(self, execution: Execution, result: Mapping[str, Any], serializer: Serializer) -> list[Event]:
        """Returns the events of a checkpoint: what the step's end looks like to a watcher."""
        function_id, name = result["function_id"], result["function_name"]
        if name == "DBOS.sleep":
            return []
        step = execution.steps.get(function_id)
        at = now_ms()
        data: dict[str, Any] = {"duration_ms": max(0, at - (result["started_at_epoch_ms"] or at))}
        attempt = step.attempt if step else 0
        if result["child_workflow_id"] and result["error"] is None:
            key = RunKey.of_workflow(result["child_workflow_id"], execution.key.namespace)
            data = {"child_run_id": key.run_id}
            return [Event(EventKind.CHILD_STARTED, at, data, function_id, name, 0, execution.number)]
        if result["error"] is None:
            data["output_bytes"] = stored_bytes(result["output"])
            if step and step.preview:
                data["preview"] = step.preview
            return [Event(EventKind.STEP_SUCCEEDED, at, data, function_id, name, attempt, execution.number)]
        failure = values.stored_failure(
            result["error"], result["serialization"], serializer, name, step.error if step else None
        )
        execution.last_failure = failure
        data["error"] = failure.to_json()
        return [Event(EventKind.STEP_FAILED, at, data, function_id, name, attempt, execution.number)]

    def step_done(self, execution: Execution, function_id: int) -> None:
        """Is called after the commit of a step's checkpoint."""
        execution.steps.pop(function_id, None)

    @staticmethod
    def published(function_id: int, key: str, value: Any) -> Callable[[Execution], list[Event]]:
        """Returns what makes the event of a value that the workflow's own code, or a step's body, publishes."""

        def events(execution: Execution) -> list[Event]:
            text = values.to_json(value)
            data = {"key": key, "value_bytes": len(text), "value_json": text if len(text) <= MAX_VALUE_CHARS else ""}
            step = execution.steps.get(function_id)
            name, attempt = (step.name, step.attempt) if step else (PUBLISH_STEP, 0)
            return [Event(EventKind.PUBLISHED, now_ms(), data, function_id, name, attempt, execution.number)]

        return events

    @staticmethod
    def streamed(function_id: int, key: str, value: Any) -> Callable[[Execution], list[Event]]:
        """Returns what makes the events of an entry of one of DBOS's streams; see `published`."""

        def events(execution: Execution) -> list[Event]:
            text = value if isinstance(value, str) else values.to_json(value)
            kind, at = EventKind.OUTPUT_DELTA, now_ms()
            step = execution.steps.get(function_id)
            if step is not None:
                step.wrote_output = True
            name, attempt = (step.name, step.attempt) if step else (STREAM_STEP, 1)
            return [
                Event(kind, at, {"stream": key, "text": piece}, function_id, name, attempt, execution.number)
                for piece in text_pieces(text)
            ]

        return events

    @staticmethod
    def recorded_name(conn: sa.Connection, workflow_id: str, function_id: int) -> str | None:
        """Returns the name of the operation that is recorded under a number, None if none is."""
        found = conn.execute(
            sa.text(f"SELECT function_name FROM {OUTPUTS} WHERE workflow_uuid = :w AND function_id = :f"),
            {"w": workflow_id, "f": function_id},
        ).scalar()
        return None if found is None else str(found)

    # ---- the end -----------------------------------------------------------------------------------------------------

    @staticmethod
    def ended(conn: sa.Connection, workflow_ids: Sequence[str]) -> list[Ended]:
        """Returns those of the runs whose status is terminal and whose log is open, in order of ids."""
        rows = conn.execute(
            sa.text(
                "SELECT r.workflow_id, r.namespace, r.run_id, s.status, s.serialization, r.waiting_for, r.execution "
                f"FROM perdure.run AS r JOIN {STATUS} AS s ON s.workflow_uuid = r.workflow_id "
                "WHERE r.workflow_id = ANY(:ids) AND r.ended_at IS NULL AND s.status = ANY(:terminal) "
                "ORDER BY r.workflow_id"
            ),
            {"ids": list(workflow_ids), "terminal": sorted(TERMINAL_STATUSES)},
        )
        found = []
        for row in rows:
            # What it was before it ended, as far as that can still be told.
            waited = "PENDING" if row.execution else "ENQUEUED"
            state = logged_state(waited, waiting_for=row.waiting_for, execution=row.execution)
            found.append(
                Ended(RunKey(row.namespace, row.run_id, row.workflow_id), row.status, row.serialization, state)
            )
        return found

    def close_own(
        self,
        conn: sa.Connection,
        ended: Ended,
        execution: Execution | None,
        output: str | None,
        error: str | None,
        serializer: Serializer,
        shown: str | None = None,
    ) -> tuple[list[Event], Callable[[], None]]:
        """Closes the log of a run that this process has just ended; see `close`.

        Of a large output, `shown` is what the run's row shows of it: its JSON text, or a pointer to that.
        """
        failure = self.failure_of(execution, error, ended.serialization, serializer)
        return self.close(
            conn,
            ended,
            execution.state if execution else None,
            failure=failure,
            output=shown or values.output_json(output, ended.serialization, serializer),
            execution=execution.number if execution else 0,
        )

    @staticmethod
    def failure_of(
        execution: Execution | None, error: str | None, serialization: str | None, serializer: Serializer
    ) -> Failure | None:
        """Returns why a run failed, from the error that its code ended with as DBOS stores it; None when it did not."""
        failure = None
        if error is not None:
            failure = values.stored_failure(error, serialization, serializer)
            last = execution.last_failure if execution else None
            if last is not None and (last.type, last.message) == (failure.type, failure.message):
                failure = last  # which knows the step, and the cause that the portable form has lost
            elif last is not None and failure.retryable and f"Step {last.step_name} " in failure.message:
                # An error of the attempts that pickle cannot read back: the step's own failure is the last of them.
                failure = replace(failure, step_name=last.step_name, cause=f"{last.type}: {last.message}")
            if execution is not None and execution.diverged is not None:
                failure = execution.diverged
        return failure

    def close(
        self,
        conn: sa.Connection,
        ended: Ended,
        from_state: RunState | None = None,
        *,
        reason: str = "",
        end_reason: str | None = None,
        failure: Failure | None = None,
        output: str | None = None,
        execution: int = 0,
    ) -> tuple[list[Event], Callable[[], None]]:
        """Marks a run as ended and withdraws what it still asks.

        Returns:
            The last events of its log, the terminal one last, and what to call after the commit.
        """
        if ended.status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED" and failure is None:
            deaths = self._deaths(conn, ended.key.workflow_id)
            failure = Failure(
                "MaxRecoveryAttemptsExceeded",
                f"its executor died {deaths} times, and a run is recovered less often (PERDURE_MAX_RECOVERIES); "
                "when the cause is mended, fork it",
            )
        row = runs.end(conn, ended.key.workflow_id, end_reason=end_reason, failure=failure, output=output)
        if row is None:
            return [], lambda: None
        number = execution or int(row["execution"])
        state = derive_state(ended.status, waiting_for=None, open_approvals=0, end_reason=end_reason, execution=number)
        at = now_ms()
        events = [
            Event(
                EventKind.APPROVAL_DECIDED, at,
                {"approval_id": approval.approval_id, "state": ApprovalState.WITHDRAWN.value},
                approval.step_id, APPROVAL_STEP, 0, number,
            )
            for approval in approvals.withdraw_all(conn, ended.key.workflow_id)
        ]  # fmt: skip
        terminal = _terminal(from_state or ended.state, state, at, number, reason=reason, failure=failure)
        events.append(terminal)
        return events, lambda: self._ended(row, state, terminal, here=bool(execution))

    def ending(
        self, execution: Execution, status: str, failure: Failure | None
    ) -> tuple[Event, Callable[[Mapping[str, Any]], None]]:
        """Returns the last event of a run that an execution here ends, and what to call with its row after that."""
        state = derive_state(status, waiting_for=None, open_approvals=0, end_reason=None, execution=execution.number)
        terminal = _terminal(execution.state, state, now_ms(), execution.number, failure=failure)
        return terminal, lambda row: self._ended(row, state, terminal, here=True)

    def _ended(self, row: Mapping[str, Any], state: RunState, terminal: Event, *, here: bool) -> None:
        """Tells of the end of a run; `here` if its own execution ended it: else its log tells for its trace."""
        if row["parent_workflow_id"] is not None:
            self.nudge([row["parent_workflow_id"]])
        with metering.telling(row["workflow_id"]):
            metering.run_ended(row["agent"], state, row["created_at"], terminal.time_ms)
            if here:
                self._spans.run_ended(row, terminal)

    @staticmethod
    def _deaths(conn: sa.Connection, workflow_id: str) -> int:
        """Returns how many executions of a run ended with their executor; the claim that ends it has counted itself."""
        attempts = conn.execute(
            sa.text(f"SELECT recovery_attempts FROM {STATUS} WHERE workflow_uuid = :id"), {"id": workflow_id}
        ).scalar()
        return max(0, int(attempts or 0) - 1)

    def ended_perhaps(self, workflow_id: str) -> None:
        """Is called after an end that had to be committed twice."""
        with metering.telling(workflow_id):
            self._spans.run_ended_perhaps(workflow_id)

    # ---- reads of status ---------------------------------------------------------------------------------------------

    @staticmethod
    def states(conn: sa.Connection, workflow_ids: Sequence[str]) -> dict[str, tuple[str, RunState]]:
        """Returns DBOS's status and the derived state of each run that exists."""
        rows = conn.execute(
            sa.text(
                "SELECT s.workflow_uuid, s.status, r.waiting_for, r.end_reason, r.execution, "
                "(SELECT count(*) FROM perdure.approval AS a WHERE a.workflow_id = s.workflow_uuid "
                f"AND a.state = 'PENDING') AS approvals FROM {STATUS} AS s "
                "LEFT JOIN perdure.run AS r ON r.workflow_id = s.workflow_uuid WHERE s.workflow_uuid = ANY(:ids)"
            ),
            {"ids": list(workflow_ids)},
        )
        return {
            row.workflow_uuid: (
                row.status,
                derive_state(
                    row.status,
                    waiting_for=row.waiting_for,
                    open_approvals=row.approvals,
                    end_reason=row.end_reason,
                    execution=row.execution or 0,
                ),
            )
            for row in rows
        }

    @staticmethod
    def statuses(engine: sa.Engine, workflow_ids: Sequence[str]) -> dict[str, str]:
        """Returns DBOS's status of those of the workflows that exist, in order of ids. Its own transaction."""
        with engine.begin() as conn:
            rows = conn.execute(
                sa.text(
                    f"SELECT workflow_uuid, status FROM {STATUS} WHERE workflow_uuid = ANY(:ids) ORDER BY workflow_uuid"
                ),
                {"ids": list(workflow_ids)},
            )
            return {row.workflow_uuid: row.status for row in rows}

    @staticmethod
    def serialization(conn: sa.Connection, workflow_id: str) -> str | None:
        """Returns DBOS's name of the format in which a workflow's input and output are stored."""
        found = conn.execute(
            sa.text(f"SELECT serialization FROM {STATUS} WHERE workflow_uuid = :id"), {"id": workflow_id}
        ).scalar()
        return None if found is None else str(found)

    @staticmethod
    def is_foreign(conn: sa.Connection, workflow_id: str) -> bool:
        """Returns whether there is a workflow of this application that has no run yet."""
        found = conn.execute(
            sa.text(
                f"SELECT 1 FROM {STATUS} WHERE workflow_uuid = :id "
                "AND (application_name = :application OR application_name IS NULL) "
                "AND NOT EXISTS (SELECT 1 FROM perdure.run AS r WHERE r.workflow_id = :id)"
            ),
            {"id": workflow_id, "application": APPLICATION},
        ).first()
        return found is not None


def _terminal(
    before: RunState, after: RunState, at_ms: int, execution: int, *, reason: str = "", failure: Failure | None = None
) -> Event:
    data: dict[str, Any] = {"from": before.value, "to": after.value}
    if reason:
        data["reason"] = reason
    if failure is not None:
        data["failure"] = failure.to_json()
    return Event(EventKind.STATE_CHANGED, at_ms, data, execution=execution)


def _sampled(traceparent: str) -> bool:
    caller = parse_traceparent(traceparent)
    return caller.sampled if caller else True
