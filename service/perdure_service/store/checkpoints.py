"""Writes checkpoints of many runs in one statement a kind: starts, steps, outcomes, and events that ride alone.

A row here is what one run commits at one time: a pack of events (see `event_log`) and, but for a pack alone, DBOS's
rows and ours that belong to it. The statement of a kind

1. locks the status rows, and *skips* those that somebody else has locked;
2. inserts each pack behind the one that its owner knows to be the last, if it is still the owner and that the last;
3. writes the rest of a row only where the pack went in, and returns whose did.

So a row is written as a whole or not at all, by the statement's own atomicity, and what the statement returns was
written by it and by nobody before. It does not say why a row was not written: lost owner, a foreign pack in its place,
a locked row, or that an earlier attempt, whose reply was lost, had been committed. Whoever is told so asks again in a
transaction of its own (`durable.operation`), which presents the same pack and finds out.

Why no one overtakes: everybody who appends to a log holds the lock of the run's status row. In one statement the
snapshot may be older than the lock, so the end of the log that it sees may be, too; but then the place behind that end
is taken, and the key (workflow_id, first_sequence) refuses the pack. No snapshot can show an end that is too far, as
the owner says where the pack goes, and the pack before it must be there.

One kind a statement, and at most one row of a run or request in it: CockroachDB refuses a statement that changes a
table twice, and PostgreSQL gives both changes the same snapshot. A run's last step and its end may be one row, which
has one pack.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import sqlalchemy as sa

from perdure_service.domain.events import Pack, encode_events
from perdure_service.domain.runs import RunStart
from perdure_service.store import hot_statements
from perdure_service.store.dbos_tables import APPLICATION, INPUT, OUTPUT, OUTPUTS, STATUS
from perdure_service.store.engine import is_cockroach
from perdure_service.store.runs import RUN_COLUMNS, RunChanges

Written = Mapping[str, Any]
"""What the statement returns of a row that it has written."""

_NOW_MS = "CAST(extract(epoch FROM now()) * 1000 AS BIGINT)"

_PACK = {
    "workflow_id": "TEXT", "owner_xid": "TEXT", "pack_id": "TEXT", "first_sequence": "BIGINT",
    "previous_first": "BIGINT", "event_count": "INT", "events": "TEXT",
}  # fmt: skip
_RUN = {
    "moves": "BOOL", "waiting_for": "TEXT", "state_reason": "TEXT", "progress": "TEXT",
    "input_tokens": "BIGINT", "output_tokens": "BIGINT",
}  # fmt: skip

_IN_ROWS = "IN (SELECT workflow_id FROM i)"

_OWN = f"""
    own AS (SELECT s.workflow_uuid, s.owner_xid, s.status FROM {STATUS} AS s
            WHERE s.workflow_uuid {_IN_ROWS}
            FOR NO KEY UPDATE OF s SKIP LOCKED)"""
# The state is looked at afterwards: as a condition here it would offer the planner the index of all that is pending.

_INSERT_PACK = """
    pack AS (INSERT INTO perdure.run_event
                 (workflow_id, first_sequence, event_count, pack_id, previous_first, events)
             SELECT i.workflow_id, i.first_sequence, i.event_count, i.pack_id, i.previous_first, i.events
             FROM i
             JOIN own ON own.workflow_uuid = i.workflow_id AND own.owner_xid = i.owner_xid AND own.status = 'PENDING'
             JOIN perdure.run_event AS last ON last.workflow_id = i.workflow_id
                  AND last.first_sequence = i.previous_first
             {join}
             WHERE last.first_sequence + last.event_count = i.first_sequence {where}
             ON CONFLICT (workflow_id, first_sequence) DO NOTHING
             RETURNING workflow_id)"""

_RUN_CHANGES = """
    waiting_for = CASE WHEN i.moves THEN i.waiting_for ELSE r.waiting_for END,
    state_reason = CASE WHEN i.moves THEN i.state_reason ELSE r.state_reason END,
    progress = coalesce(i.progress, r.progress),
    input_tokens = r.input_tokens + i.input_tokens, output_tokens = r.output_tokens + i.output_tokens"""

_CHANGE_RUN = f"""
    run AS (UPDATE perdure.run AS r SET {_RUN_CHANGES}
            FROM i JOIN pack ON pack.workflow_id = i.workflow_id
            WHERE r.workflow_id = i.workflow_id
              AND (i.moves OR i.progress IS NOT NULL OR i.input_tokens > 0 OR i.output_tokens > 0)
            RETURNING r.workflow_id)"""

_INTO_OUTPUTS = f"""INSERT INTO {OUTPUTS}
                 (workflow_uuid, function_id, function_name, started_at_epoch_ms, completed_at_epoch_ms, output, error,
                  serialization, application_name, retention_timestamp)"""

_INSERT_STEP = f"""
    step AS ({_INTO_OUTPUTS}
             SELECT i.workflow_id, i.function_id, i.function_name, i.started_ms, i.completed_ms, {{result}},
                    '{APPLICATION}', {_NOW_MS}
             FROM i JOIN pack ON pack.workflow_id = i.workflow_id {{where}}
             RETURNING workflow_uuid)"""

_END = f"""
    status AS (UPDATE {STATUS} AS s SET status = i.status, deduplication_id = NULL, owner_xid = NULL,
                   updated_at = {_NOW_MS}, completed_at = {_NOW_MS}
               FROM i JOIN pack ON pack.workflow_id = i.workflow_id
               WHERE s.workflow_uuid = i.workflow_id
               RETURNING s.workflow_uuid, s.workflow_deadline_epoch_ms, s.queue_name, s.priority),
    output AS (INSERT INTO {OUTPUT} (workflow_uuid, output, error)
               SELECT i.workflow_id, i.output, i.error FROM i JOIN pack ON pack.workflow_id = i.workflow_id
               ON CONFLICT (workflow_uuid) DO UPDATE SET output = excluded.output, error = excluded.error
               RETURNING workflow_uuid),
    run AS (UPDATE perdure.run AS r SET ended_at = now(), end_reason = NULL, failure = i.failure, output = i.shown,
                parked_for = NULL, {_RUN_CHANGES}
            FROM i JOIN pack ON pack.workflow_id = i.workflow_id
            WHERE r.workflow_id = i.workflow_id
            RETURNING {RUN_COLUMNS}, r.traceparent)"""

_MAY_END = """
             AND r.ended_at IS NULL AND NOT EXISTS (SELECT 1 FROM perdure.approval AS a
                 WHERE a.workflow_id = i.workflow_id AND (a.state = 'PENDING') IS TRUE)"""
# In these words it does not offer the index of all approvals that are open, to find those of one run.

_BEGIN = f"""
    run AS (INSERT INTO perdure.run (workflow_id, namespace, run_id, agent, agent_version, input_argument, input_sha256,
                request_id, unique_request_id, caller, labels, context_id, trace_id, traceparent, execution,
                executor_id, forked_from_step, begun_at)
            SELECT i.workflow_id, i.namespace, i.run_id, i.agent, i.agent_version, i.input_argument, i.input_sha256,
                i.request_id, i.unique_request_id, i.caller, CAST(i.labels AS JSONB), i.context_id, i.trace_id,
                i.traceparent, i.execution, CASE WHEN i.execution > 0 THEN i.executor_id ELSE '' END, 0,
                CASE WHEN i.execution > 0 THEN now() END
            FROM i
            WHERE NOT EXISTS (SELECT 1 FROM {STATUS} AS s WHERE s.workflow_uuid = i.workflow_id)
            ON CONFLICT DO NOTHING
            RETURNING workflow_id, created_at),
    status AS (INSERT INTO {STATUS}
                   (workflow_uuid, status, name, executor_id, application_version, application_id, queue_name,
                    recovery_attempts, workflow_deadline_epoch_ms, priority, serialization, creator_xid, owner_xid,
                    delay_until_epoch_ms, attributes, application_name)
               SELECT i.workflow_id, i.status, i.name, i.executor_id, i.app_version, i.app_id, i.queue,
                      CASE WHEN i.status = 'PENDING' THEN 1 ELSE 0 END, i.deadline_ms, i.priority, i.serialization,
                      i.owner_xid, CASE WHEN i.status = 'PENDING' THEN i.owner_xid END, i.delay_until_ms,
                      CAST('null' AS JSONB), i.application
               FROM i JOIN run ON run.workflow_id = i.workflow_id
               RETURNING workflow_uuid),
    input AS (INSERT INTO {INPUT} (workflow_uuid, inputs)
              SELECT i.workflow_id, i.inputs FROM i JOIN status ON status.workflow_uuid = i.workflow_id
              ON CONFLICT (workflow_uuid) DO NOTHING
              RETURNING workflow_uuid),
    pack AS (INSERT INTO perdure.run_event (workflow_id, first_sequence, event_count, pack_id, events)
             SELECT i.workflow_id, i.first_sequence, i.event_count, i.pack_id, i.events
             FROM i JOIN status ON status.workflow_uuid = i.workflow_id
             RETURNING workflow_id)"""
"""The run's row goes first, as its keys are all that can tell that it, or its request, was there already: to look for
the request beforehand is a scan of the namespace's runs until PostgreSQL has statistics."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement over the rows `i`: as arrays, as one JSON text, or one row alone as parameters.

    To make twenty arrays costs Python more than everything else that a batch does. CockroachDB was tried with arrays.
    Of one row PostgreSQL knows that it is one: it makes no tables to join with, a tenth of the time of a lone step.
    """

    arrays: str
    json: str
    alone: str

    @classmethod
    def over(cls, columns: Mapping[str, str], parts: Sequence[str], *, of: str) -> Statement:
        """Returns what returns all of its part `of`."""
        arrays = ", ".join(f"CAST(%({name})s AS {kind}[])" for name, kind in columns.items())
        typed = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        values = ", ".join(f"CAST(%({name})s AS {kind}) AS {name}" for name, kind in columns.items())
        rest = f"{', '.join(parts)} SELECT * FROM {of}"
        of_arrays = rest.replace(_IN_ROWS, "= ANY(CAST(%(workflow_id)s AS TEXT[]))")
        of_one = rest.replace(_IN_ROWS, "= CAST(%(workflow_id)s AS TEXT)")
        return cls(
            f"WITH i AS (SELECT * FROM unnest({arrays}) AS i ({', '.join(columns)})), {of_arrays}",
            f"WITH i AS (SELECT * FROM json_to_recordset(CAST(%(rows)s AS JSON)) AS i ({typed})), {rest}",
            f"WITH i AS (SELECT {values}), {of_one}",
        )


@dataclass(slots=True)
class EventsRow:
    """Events that ride on no checkpoint; and what all rows have.

    Attributes:
        workflow_id: The run.
        owner_xid: The token that must own it.
        pack: The events; `first_sequence` is set.
        previous_first: The first sequence of the pack before.
    """

    columns: ClassVar[Mapping[str, str]] = _PACK | _RUN
    statement: ClassVar[Statement] = Statement.over(
        columns, [_OWN, _INSERT_PACK.format(join="", where=""), _CHANGE_RUN], of="pack"
    )

    workflow_id: str
    owner_xid: str
    pack: Pack
    previous_first: int | None
    first_sequence: int | None = field(init=False)
    event_count: int = field(init=False)
    events: str = field(init=False)
    changes: RunChanges = field(init=False)
    waits: bool = field(init=False, default=False)
    """Whether it waits to be taken by a writer; under the writer's lock."""
    instead: EventsRow | None = field(init=False, default=None)
    """The row that has taken its place while it waited."""

    def __post_init__(self) -> None:
        self.first_sequence, self.event_count = self.pack.first_sequence, len(self.pack.events)
        self.events, self.changes = self._encoded(), RunChanges.of(self.pack.events)

    def _encoded(self) -> str:
        return encode_events(self.pack.events)

    @property
    def pack_id(self) -> str:
        """The pack's."""
        return self.pack.pack_id

    @property
    def keys(self) -> tuple[str, ...]:
        """What no other row of a statement may have."""
        return (self.workflow_id,)


@dataclass(slots=True)
class StepRow(EventsRow):
    """The checkpoint of a step, as DBOS has it in `operation_outputs`. Times in milliseconds since 1970."""

    columns: ClassVar[Mapping[str, str]] = {
        **_PACK, **_RUN, "function_id": "INT", "function_name": "TEXT", "started_ms": "BIGINT",
        "completed_ms": "BIGINT", "output": "TEXT", "error": "TEXT", "serialization": "TEXT",
    }  # fmt: skip
    statement: ClassVar[Statement] = Statement.over(
        columns,
        [
            _OWN,
            _INSERT_PACK.format(join="", where=""),
            _CHANGE_RUN,
            _INSERT_STEP.format(result="i.output, i.error, i.serialization", where=""),
        ],
        of="step",
    )

    function_id: int = 0
    function_name: str = ""
    started_ms: int | None = None
    completed_ms: int = 0
    output: str | None = None
    error: str | None = None
    serialization: str | None = None


_LAST_STEP_FIELDS: Mapping[str, tuple[str, str]] = {
    "function_id": ("INT", "function_id"),
    "function_name": ("TEXT", "function_name"),
    "started_ms": ("BIGINT", "started_ms"),
    "completed_ms": ("BIGINT", "completed_ms"),
    "step_output": ("TEXT", "output"),
    "step_serialization": ("TEXT", "serialization"),
}
"""The columns of an outcome's last step, with what they are of its row. It has no error: its code went on."""


class _NoStep:
    """What an outcome without a last step has in its columns."""

    function_id = function_name = started_ms = completed_ms = output = serialization = None


_NO_STEP = _NoStep()


@dataclass(slots=True)
class OutcomeRow(EventsRow):
    """The end of a run whose code has ended, and which has no approval open.

    Attributes:
        status: DBOS's, SUCCESS or ERROR.
        output: What the workflow returned, as DBOS stores it.
        error: What it raised, as DBOS stores it.
        shown: The output as our row has it: JSON.
        failure: Why it failed, as our row has it: JSON.
        last_step: The step that goes with it, whose events are in the pack; None for none.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **_PACK, **_RUN, "status": "TEXT", "output": "TEXT", "error": "TEXT", "shown": "TEXT", "failure": "TEXT",
        **{name: kind for name, (kind, _) in _LAST_STEP_FIELDS.items()},
    }  # fmt: skip
    statement: ClassVar[Statement] = Statement.over(
        columns,
        [
            _OWN,
            _INSERT_PACK.format(join="JOIN perdure.run AS r ON r.workflow_id = i.workflow_id", where=_MAY_END),
            _END,
            _INSERT_STEP.format(
                result="i.step_output, CAST(NULL AS TEXT), i.step_serialization",
                where="WHERE i.function_id IS NOT NULL",
            ),
        ],
        of="run JOIN status ON status.workflow_uuid = run.workflow_id",
    )

    status: str = ""
    output: str | None = None
    error: str | None = None
    shown: str | None = None
    failure: str | None = None
    last_step: StepRow | None = None

    @property
    def step(self) -> StepRow | _NoStep:
        """The last step, or one of which nothing is known."""
        return self.last_step or _NO_STEP

    def _encoded(self) -> str:
        step, events = self.last_step, self.pack.events
        if step is None or events[0] is not step.pack.events[0]:
            return encode_events(events)
        return f"{step.events[:-1]},{encode_events(events[step.event_count :])[1:]}"  # the step's are JSON already


_encode = json.JSONEncoder(separators=(",", ":")).encode

_START_FIELDS: Mapping[str, tuple[str, str]] = {
    "namespace": ("TEXT", "start.key.namespace"),
    "run_id": ("TEXT", "start.key.run_id"),
    "agent": ("TEXT", "start.agent"),
    "agent_version": ("TEXT", "start.agent_version"),
    "input_sha256": ("TEXT", "start.input_sha256"),
    "request_id": ("TEXT", "start.request_id"),
    "caller": ("TEXT", "start.caller"),
    "context_id": ("TEXT", "start.context_id"),
    "trace_id": ("TEXT", "start.trace_id"),
    "traceparent": ("TEXT", "start.traceparent"),
    "queue": ("TEXT", "start.queue"),
    "priority": ("INT", "start.priority"),
}


@dataclass(slots=True)
class StartRow(EventsRow):
    """A new run, of which a caller has asked; `owner_xid` is the token of its creation.

    Attributes:
        start: What was decided about it.
        status: DBOS's: PENDING when it begins here, else ENQUEUED or DELAYED.
        execution: 1 when it begins here, else 0.
        unique_request_id: The request id when it alone identifies the start.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **{name: kind for name, kind in _PACK.items() if name != "previous_first"},
        **{name: kind for name, (kind, _) in _START_FIELDS.items()},
        "status": "TEXT", "name": "TEXT", "executor_id": "TEXT", "app_version": "TEXT", "app_id": "TEXT",
        "application": "TEXT", "deadline_ms": "BIGINT", "serialization": "TEXT", "delay_until_ms": "BIGINT",
        "inputs": "TEXT", "input_argument": "TEXT", "unique_request_id": "TEXT", "labels": "TEXT", "execution": "INT",
    }  # fmt: skip
    statement: ClassVar[Statement] = Statement.over(columns, [_BEGIN], of="run")

    start: RunStart | None = None
    status: str = ""
    name: str = ""
    executor_id: str = ""
    app_version: str | None = None
    app_id: str | None = None
    application: str | None = None
    deadline_ms: int | None = None
    serialization: str | None = None
    delay_until_ms: int | None = None
    inputs: str | None = None
    input_argument: str | None = None
    unique_request_id: str | None = None
    labels: str = "{}"
    execution: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The run, and the request when that is unique."""
        if self.unique_request_id is None or self.start is None:
            return (self.workflow_id,)
        return (self.workflow_id, f"{self.start.key.namespace}\n{self.unique_request_id}")


CheckpointRow = EventsRow
KINDS: tuple[type[EventsRow], ...] = (StartRow, StepRow, OutcomeRow, EventsRow)


def _attribute(kind: type[EventsRow], column: str) -> str:
    """Returns the attribute of a row, or the way to it, that is a column's value."""
    if column in _RUN:
        return f"changes.{column}"
    if kind is StartRow and column in _START_FIELDS:
        return _START_FIELDS[column][1]
    if kind is OutcomeRow and column in _LAST_STEP_FIELDS:
        return f"step.{_LAST_STEP_FIELDS[column][1]}"
    return column


_VALUES: Mapping[type[EventsRow], Callable[[EventsRow], tuple[Any, ...]]] = {
    kind: attrgetter(*(_attribute(kind, column) for column in kind.columns)) for kind in KINDS
}
"""What a row has in each of its kind's columns: in one call, as each start, step and end of a run needs it."""


def record_last_step(conn: sa.Connection, step: StepRow) -> None:
    """Records a step in the transaction of its run's owner that ends the run, unless it is recorded."""
    conn.execute(
        sa.text(
            f"{_INTO_OUTPUTS} VALUES (:workflow_id, :function_id, :function_name, :started_ms, :completed_ms, "
            f":step_output, NULL, :step_serialization, '{APPLICATION}', {_NOW_MS}) ON CONFLICT DO NOTHING"
        ),
        {"workflow_id": step.workflow_id, **{name: getattr(step, of) for name, (_, of) in _LAST_STEP_FIELDS.items()}},
    )


def write_all(conn: sa.Connection, rows: Sequence[CheckpointRow]) -> dict[str, Written]:
    """Writes rows of any kinds, a statement each, in the transaction of a connection; see `commit_all`."""
    return _by_workflow(hot_statements.run(conn, statement) for statement in _statements(conn, rows))


def commit_all(conn: sa.Connection, rows: Sequence[CheckpointRow]) -> dict[str, Written]:
    """Writes rows of any kinds and commits them; returns what the statements say of those written, by workflow id.

    Args:
        conn: A connection that commits each statement by itself.
        rows: No two with a key in common.
    """
    return _by_workflow(hot_statements.commit(conn, _statements(conn, rows)))


def begin_all(conn: sa.Connection, rows: Sequence[CheckpointRow]) -> hot_statements.Exchange | None:
    """Begins what `commit_all` does, and does not wait for it; None when the driver cannot. `written_by` tells."""
    if not hot_statements.is_direct(conn.engine):
        return None
    return hot_statements.Exchange(conn, _statements(conn, rows))


def written_by(exchange: hot_statements.Exchange) -> dict[str, Written]:
    """Returns what `commit_all` does, once an exchange is over.

    Raises:
        sqlalchemy.exc.DBAPIError: As `commit_all` does.
    """
    return _by_workflow(exchange.rows())


def _by_workflow(found: Iterable[hot_statements.Rows]) -> dict[str, Written]:
    return {next(iter(row.values())): row for rows in found for row in rows}


def _statements(conn: sa.Connection, rows: Sequence[CheckpointRow]) -> list[hot_statements.Statement]:
    """Returns the statements that write rows, one for each kind that is among them."""
    found: list[hot_statements.Statement] = []
    arrays = is_cockroach(conn.engine)
    for kind in KINDS:
        of_kind = [row for row in rows if type(row) is kind]
        if not of_kind:
            continue
        names, values_of = tuple(kind.columns), _VALUES[kind]
        if arrays:
            columns = zip(*map(values_of, of_kind), strict=True)
            found.append((kind.statement.arrays, dict(zip(names, map(list, columns), strict=True))))
        elif len(of_kind) == 1:
            found.append((kind.statement.alone, dict(zip(names, values_of(of_kind[0]), strict=True))))
        else:
            # What is NULL is left out: that is half of it.
            found_in = (zip(names, values_of(row), strict=True) for row in of_kind)
            rows_json = _encode([{name: value for name, value in each if value is not None} for each in found_in])
            found.append((kind.statement.json, {"rows": rows_json}))
    return found
