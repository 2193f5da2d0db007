"""The run index: what we keep of a run beside DBOS's rows, and how a run is put together for a caller.

A run's *state* is not stored: every read derives it from DBOS's status, the open approvals and what the run waits for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from perdure_service.domain import tokens
from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.payloads import parse
from perdure_service.domain.runs import (
    DEADLINE_PASSED,
    TERMINAL_STATUSES,
    Failure,
    Progress,
    Run,
    RunFilter,
    RunKey,
    RunStart,
    RunState,
    Usage,
    derive_state,
    logged_state,
    of_epoch_ms,
)
from perdure_service.errors import InvalidArgument
from perdure_service.store.dbos_tables import INPUT, STATUS

_INSERT = sa.text("""
    INSERT INTO perdure.run (workflow_id, namespace, run_id, agent, agent_version, input_argument, input_sha256,
        request_id, unique_request_id, caller, labels, context_id, parent_workflow_id, trace_id, traceparent,
        execution, executor_id, forked_from_workflow_id, forked_from_step, begun_at)
    VALUES (:workflow_id, :namespace, :run_id, :agent, :agent_version, :input_argument, :input_sha256,
        :request_id, :unique_request_id, :caller, CAST(:labels AS JSONB), :context_id, :parent_workflow_id, :trace_id,
        :traceparent, :execution, :executor_id, :forked_from_workflow_id, :forked_from_step,
        CASE WHEN CAST(:execution AS INT) > 0 THEN now() END)
    ON CONFLICT DO NOTHING RETURNING created_at
""")

RUN_COLUMNS = """
    r.workflow_id, r.namespace, r.run_id, r.agent, r.agent_version, r.input_argument, r.input_sha256, r.request_id,
    r.caller, r.labels, r.context_id, r.parent_workflow_id, r.trace_id, r.created_at, r.begun_at, r.ended_at,
    r.execution, r.executor_id, r.progress, r.waiting_for, r.state_reason, r.end_reason, r.failure,
    r.input_tokens, r.output_tokens, r.forked_from_workflow_id, r.forked_from_step"""
"""What a run is made of, but for DBOS's columns and the counts."""

_COLUMNS = f"""{RUN_COLUMNS},
    s.status, s.workflow_deadline_epoch_ms, s.queue_name, s.priority,
    (SELECT count(*) FROM perdure.approval AS a
     WHERE a.workflow_id = r.workflow_id AND a.state = 'PENDING') AS approvals,
    (SELECT e.first_sequence + e.event_count - 1 FROM perdure.run_event AS e
     WHERE e.workflow_id = r.workflow_id ORDER BY e.first_sequence DESC LIMIT 1) AS last_sequence
"""
_FROM = f"FROM perdure.run AS r JOIN {STATUS} AS s ON s.workflow_uuid = r.workflow_id"

_FIND = sa.text(f"SELECT {_COLUMNS} {_FROM} WHERE r.workflow_id = ANY(:workflow_ids)")
_FIND_FULL = sa.text(
    f"SELECT {_COLUMNS}, r.output, i.inputs, s.serialization {_FROM} "
    f"LEFT JOIN {INPUT} AS i ON i.workflow_uuid = r.workflow_id WHERE r.workflow_id = ANY(:workflow_ids)"
)

MAX_PAGE_CHARS = 1024 * 1024
"""Text in one page of a list, so that a message stays below what clients take (4 MiB by default)."""

PORTABLE = "portable_json"
"""DBOS's name of its JSON format (dbos/_serialization.py)."""


def insert(
    conn: sa.Connection,
    start: RunStart,
    *,
    input_argument: str | None,
    parent_workflow_id: str | None,
    unique_request_id: str | None,
    executor_id: str,
) -> datetime | None:
    """Inserts a run; returns when it was created, or None when it, or one of the same unique request, exists.

    Args:
        conn: The transaction that inserts DBOS's rows.
        start: What was decided about the run.
        input_argument: The workflow's parameter that holds the whole input; None when the input's members are the
            parameters.
        parent_workflow_id: The workflow that started it, if one did.
        unique_request_id: The request id when it alone identifies the start (the server made the run's id).
        executor_id: The executor on which it begins at once; empty when it is queued.
    """
    created_at: datetime | None = conn.execute(
        _INSERT,
        {
            "workflow_id": start.key.workflow_id,
            "namespace": start.key.namespace,
            "run_id": start.key.run_id,
            "agent": start.agent,
            "agent_version": start.agent_version,
            "input_argument": input_argument,
            "input_sha256": start.input_sha256,
            "request_id": start.request_id,
            "unique_request_id": unique_request_id,
            "caller": start.caller,
            "labels": json.dumps(dict(start.labels)),
            "context_id": start.context_id,
            "parent_workflow_id": parent_workflow_id,
            "trace_id": start.trace_id,
            "traceparent": start.traceparent,
            "execution": 1 if executor_id else 0,
            "executor_id": executor_id,
            "forked_from_workflow_id": start.forked_from_workflow_id,
            "forked_from_step": start.forked_from_step,
        },
    ).scalar()
    return created_at


def find_request(conn: sa.Connection, namespace: str, request_id: str) -> str | None:
    """Returns the workflow id of the run whose server-made id this request was given, or None."""
    found = conn.execute(
        sa.text("SELECT workflow_id FROM perdure.run WHERE namespace = :n AND unique_request_id = :r"),
        {"n": namespace, "r": request_id},
    ).scalar()
    return None if found is None else str(found)


def get(conn: sa.Connection, workflow_id: str, *, full: bool = False) -> Run | None:
    """Returns a run, with input and output when `full`; None when there is none of this workflow id."""
    return find(conn, [workflow_id], full=full).get(workflow_id)


def find(conn: sa.Connection, workflow_ids: Sequence[str], *, full: bool = False) -> dict[str, Run]:
    """Returns those of the runs that exist, by workflow id, with input and output when `full`; in one statement.

    The `last_sequence` of each is from the same statement, so a snapshot and its place in the log agree.
    """
    found = conn.execute(_FIND_FULL if full else _FIND, {"workflow_ids": list(workflow_ids)})
    return {row["workflow_id"]: _run(row) for row in _rows(found)}


def list_page(
    conn: sa.Connection, namespace: str, run_filter: RunFilter, *, page_size: int, page_token: str
) -> tuple[list[Run], str]:
    """Returns a page of runs, newest first, and the token of the next page (empty at the end).

    The order is by the time of creation, then by the workflow id. Neither ever changes, and the token holds both of
    the last run that was returned. So a run that exists when the first page is read comes in exactly one page as long
    as it satisfies the filter, and no run comes twice, whatever is created meanwhile. A run that is created later has
    a later time and is not in the pages that follow; one whose transaction had begun by then, and committed since, may
    be.

    Raises:
        InvalidArgument: The token is not from this list.
    """
    filter_key = [namespace, run_filter.members]
    where, values = conditions(namespace, run_filter)
    values["limit"] = page_size + 1
    if page_token:
        at, workflow_id = decode_token(page_token, filter_key, datetime, str)
        where.append("(r.created_at, r.workflow_id) < (CAST(:at AS TIMESTAMPTZ), CAST(:workflow_id AS TEXT))")
        values |= {"at": at, "workflow_id": workflow_id}
    query = sa.text(
        f"SELECT {_COLUMNS} {_FROM} WHERE {' AND '.join(where)} "
        "ORDER BY r.created_at DESC, r.workflow_id DESC LIMIT :limit"
    )
    rows = _rows(conn.execute(query, values))
    page: list[dict[str, Any]] = []
    chars = 0
    for row in rows[:page_size]:
        chars += _chars(row)
        if page and chars > MAX_PAGE_CHARS:
            break
        page.append(row)
    token = ""
    if len(page) < len(rows):
        token = encode_token((page[-1]["created_at"].isoformat(), page[-1]["workflow_id"]), filter_key)
    return [_run(dict(row)) for row in page], token


def token_after(run: RunKey, created_at: datetime, run_filter: RunFilter) -> str:
    """Returns the token of the page that follows a run, in any database that the list is of.

    Args:
        run: The last run that was returned.
        created_at: When it was created.
        run_filter: What the list is of.
    """
    return encode_token((created_at.isoformat(), run.workflow_id), [run.namespace, run_filter.members])


def conditions(namespace: str, run_filter: RunFilter) -> tuple[list[str], dict[str, Any]]:
    """Returns what a filter means in SQL, over `r` (our row) and `s` (DBOS's status), and the values in it."""
    where, values = ["r.namespace = :namespace"], dict[str, Any](namespace=namespace)
    if run_filter.agent:
        where.append("r.agent = :agent")
        values["agent"] = run_filter.agent
    if run_filter.context_id:
        # Both: the index has only runs with a context, and a plan that knows no value must see that these are such.
        where.append("r.context_id = :context_id AND r.context_id <> ''")
        values["context_id"] = run_filter.context_id
    if run_filter.labels:
        where.append("r.labels @> CAST(:labels AS JSONB)")
        values["labels"] = json.dumps(dict(run_filter.labels))
    if run_filter.states:
        where.append(f"({' OR '.join(_STATE_SQL[state] for state in sorted(run_filter.states))})")
        values["deadline_passed"] = DEADLINE_PASSED
    if run_filter.parent_run_id:
        where.append("r.parent_workflow_id IN (:parent, :foreign_parent)")
        values["parent"] = RunKey.of_api(namespace, run_filter.parent_run_id).workflow_id
        values["foreign_parent"] = RunKey.foreign(namespace, run_filter.parent_run_id).workflow_id
    times = (("from_create_time", "r.created_at >="), ("until_create_time", "r.created_at <"))
    for name, comparison in (*times, ("until_end_time", "r.ended_at <")):
        if (time := getattr(run_filter, name)) is not None:
            where.append(f"{comparison} CAST(:{name} AS TIMESTAMPTZ)")
            values[name] = time
    if run_filter.until_end_time is not None:
        # It follows, and bounds what is read of the index.
        where.append("r.created_at < CAST(:until_end_time AS TIMESTAMPTZ)")
    return where, values


def _chars(row: Mapping[str, Any]) -> int:
    """Returns about how many characters a run takes in a list's message."""
    texts = (row["labels"], row["progress"], row["failure"], row["state_reason"])
    return 600 + sum(len(text) if isinstance(text, str) else len(json.dumps(text)) for text in texts if text)


_OPEN_APPROVAL = (
    "EXISTS (SELECT 1 FROM perdure.approval AS a WHERE a.workflow_id = r.workflow_id AND a.state = 'PENDING')"
)
_HAS_BEGUN = "(s.status = 'PENDING' OR (s.status = 'DELAYED' AND r.execution > 0))"
# derive_state in SQL, one condition a state; a test compares the two over every combination.
_STATE_SQL: dict[RunState, str] = {
    RunState.SCHEDULED: "(s.status = 'DELAYED' AND r.execution = 0)",
    RunState.QUEUED: "s.status = 'ENQUEUED'",
    RunState.RUNNING: f"({_HAS_BEGUN} AND coalesce(r.waiting_for, '') <> 'sleep' "
    f"AND coalesce(r.waiting_for, '') NOT LIKE 'signal%' AND NOT {_OPEN_APPROVAL})",
    RunState.AWAITING_INPUT: f"({_HAS_BEGUN} AND (coalesce(r.waiting_for, '') LIKE 'signal%' OR {_OPEN_APPROVAL}))",
    RunState.SLEEPING: f"({_HAS_BEGUN} AND r.waiting_for = 'sleep' AND NOT {_OPEN_APPROVAL})",
    RunState.SUCCEEDED: "s.status = 'SUCCESS'",
    RunState.FAILED: "s.status IN ('ERROR', 'MAX_RECOVERY_ATTEMPTS_EXCEEDED')",
    RunState.CANCELLED: "(s.status = 'CANCELLED' AND coalesce(r.end_reason, '') <> :deadline_passed)",
    RunState.EXPIRED: "(s.status = 'CANCELLED' AND r.end_reason = :deadline_passed)",
}


def waits_for(conn: sa.Connection, workflow_id: str) -> tuple[str | None, int]:
    """Returns what a run waits for, as its log last said (None: it does not wait), and the number of its execution."""
    row = conn.execute(
        sa.text("SELECT waiting_for, execution FROM perdure.run WHERE workflow_id = :id"), {"id": workflow_id}
    ).first()
    return (row.waiting_for, row.execution) if row else (None, 0)


def logged_states(conn: sa.Connection, workflow_ids: Sequence[str]) -> dict[str, tuple[RunState, int]]:
    """Returns the state that the log of each run last told of, and its execution; of runs that have not ended."""
    rows = conn.execute(
        sa.text(
            f"SELECT r.workflow_id, s.status, r.waiting_for, r.execution {_FROM} "
            "WHERE r.workflow_id = ANY(:ids) AND NOT s.status = ANY(:terminal)"
        ),
        {"ids": list(workflow_ids), "terminal": sorted(TERMINAL_STATUSES)},
    )
    return {
        row.workflow_id: (
            logged_state(row.status, waiting_for=row.waiting_for, execution=row.execution),
            row.execution,
        )
        for row in rows
    }


@dataclass(slots=True)
class RunChanges:
    """What a pack of its log says of a run's row.

    Attributes:
        moves: Whether the run's state changes: to `waiting_for`, with `state_reason`.
        progress: The last one told, as JSON; None for none.
        input_tokens: Those that were used, to be added; so are `output_tokens`.
    """

    moves: bool = False
    waiting_for: str | None = None
    state_reason: str = ""
    progress: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def of(cls, events: Sequence[Event]) -> RunChanges:
        """Returns what the events of a pack change."""
        told = cls()
        for event in events:
            if event.kind is EventKind.PROGRESS:
                told.progress = json.dumps(dict(event.data))
            elif event.kind is EventKind.STATE_CHANGED:
                told.moves = True
                told.waiting_for = event.data.get("waiting_for")
                told.state_reason = str(event.data.get("reason", ""))
            elif event.kind is EventKind.USAGE:
                told.input_tokens += int(event.data.get("input_tokens", 0))
                told.output_tokens += int(event.data.get("output_tokens", 0))
        return told


def apply_events(conn: sa.Connection, workflow_id: str, events: Sequence[Event]) -> None:
    """Brings the run's row up to what a pack of its log says: progress, usage, and what it waits for.

    Usage is a sum, so a pack must be applied once: in the transaction that appends it, and not when it is presented
    again. The row holds what the log's `usage` events add up to, at every commit.
    """
    told = RunChanges.of(events)
    changes: dict[str, Any] = {}
    if told.progress is not None:
        changes["progress"] = told.progress
    if told.moves:
        changes |= {"waiting_for": told.waiting_for, "state_reason": told.state_reason}
    used = {"input_tokens": told.input_tokens, "output_tokens": told.output_tokens}
    added = {name: tokens for name, tokens in used.items() if tokens}
    assignments = ", ".join(
        [*(f"{name} = :{name}" for name in changes), *(f"{name} = {name} + :{name}" for name in added)]
    )
    if assignments:
        changes |= added
        conn.execute(
            sa.text(f"UPDATE perdure.run SET {assignments} WHERE workflow_id = :workflow_id"),
            {**changes, "workflow_id": workflow_id},
        )


def begin_executions(
    conn: sa.Connection, workflow_ids: Sequence[str], executor_id: str
) -> dict[str, Mapping[str, Any]]:
    """Counts a new execution of each run on this executor; returns their rows by workflow id."""
    rows = conn.execute(
        sa.text("""
            UPDATE perdure.run SET execution = execution + 1, executor_id = :executor_id, ended_at = NULL,
                begun_at = coalesce(begun_at, now()), waiting_for = NULL, end_reason = NULL, parked_for = NULL
            WHERE workflow_id = ANY(:workflow_ids)
            RETURNING workflow_id, namespace, run_id, agent, agent_version, execution, trace_id, traceparent,
                created_at, begun_at, input_tokens + output_tokens AS tokens
        """),
        {"executor_id": executor_id, "workflow_ids": list(workflow_ids)},
    ).mappings()
    return {row["workflow_id"]: dict(row) for row in rows}


def end(
    conn: sa.Connection,
    workflow_id: str,
    *,
    end_reason: str | None = None,
    failure: Failure | None = None,
    output: str | None = None,
) -> Mapping[str, Any] | None:
    """Marks a run's log as closed; returns its row, or None when it was closed, or is not ours to know."""
    row = (
        conn.execute(
            sa.text("""
            UPDATE perdure.run SET ended_at = now(), end_reason = :end_reason, failure = :failure, output = :output,
                waiting_for = NULL, parked_for = NULL
            WHERE workflow_id = :workflow_id AND ended_at IS NULL
            RETURNING workflow_id, namespace, run_id, agent, agent_version, execution, trace_id, traceparent,
                created_at, executor_id, begun_at, forked_from_workflow_id, parent_workflow_id
        """),
            {
                "workflow_id": workflow_id,
                "end_reason": end_reason,
                "failure": None if failure is None else json.dumps(failure.to_json()),
                "output": output,
            },
        )
        .mappings()
        .first()
    )
    return None if row is None else dict(row)


def _rows(found: sa.CursorResult[Any]) -> list[dict[str, Any]]:
    """Returns rows as plain dicts: from a `RowMapping` a run takes half as long again to be made."""
    names = tuple(found.keys())
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def _run(row: Mapping[str, Any]) -> Run:
    status = row["status"]
    deadline_ms = row["workflow_deadline_epoch_ms"]
    progress = json.loads(row["progress"]) if row["progress"] else None
    labels = row["labels"] if isinstance(row["labels"], dict) else json.loads(row["labels"])
    parent, origin = row["parent_workflow_id"], row["forked_from_workflow_id"]
    return Run(
        key=RunKey(row["namespace"], row["run_id"], row["workflow_id"]),
        agent=row["agent"],
        agent_version=row["agent_version"],
        input_sha256=row["input_sha256"],
        request_id=row["request_id"],
        state=derive_state(
            status,
            waiting_for=row["waiting_for"],
            open_approvals=row["approvals"],
            end_reason=row["end_reason"],
            execution=row["execution"],
        ),
        state_reason=row["state_reason"],
        create_time=row["created_at"],
        start_time=row["begun_at"],
        end_time=row["ended_at"] if status in TERMINAL_STATUSES else None,
        deadline_time=None if deadline_ms is None else of_epoch_ms(deadline_ms),
        execution=row["execution"],
        executor_id=row["executor_id"],
        progress=None if progress is None else Progress(**progress),
        pending_approvals=row["approvals"],
        labels=labels,
        context_id=row["context_id"],
        parent_run_id="" if parent is None else RunKey.of_workflow(parent).run_id,
        trace_id=row["trace_id"],
        last_sequence=row["last_sequence"] or 0,
        failure=Failure.from_json(json.loads(row["failure"])) if row["failure"] else None,
        input_json=_stored_input(row) if "inputs" in row else None,
        output_json=row.get("output"),
        usage=Usage(row["input_tokens"], row["output_tokens"]),
        caller=row["caller"],
        forked_from_run_id="" if origin is None else RunKey.of_workflow(origin).run_id,
        forked_from_step_id=row["forked_from_step"],
        queue=row["queue_name"] or "",
        priority=row["priority"],
        input_argument=row["input_argument"],
    )


def as_ended(row: Mapping[str, Any], status: str, last_sequence: int) -> Run:
    """Returns a run as the statement that ended it returned it: what a read would find."""
    return _run({**row, "status": status, "approvals": 0, "last_sequence": last_sequence})


def _stored_input(row: Mapping[str, Any]) -> str | None:
    """Returns the input, or the pointer to it; None for a foreign workflow's own format."""
    if row["serialization"] != PORTABLE or row["inputs"] is None:
        return None
    stored = str(row["inputs"])
    return stored if parse(stored) else input_json(stored, row["input_argument"])


def input_json(stored: str, argument: str | None) -> str:
    """Returns the input as it was sent, from DBOS's portable arguments.

    Args:
        stored: The arguments.
        argument: The one that is the whole input; None when their names are the input's members.
    """
    arguments = json.loads(stored)
    named = arguments.get("namedArgs") or {}
    value: Any = named
    if argument is not None:
        # A parent may have called it by position.
        value = named.get(argument, next(iter(arguments.get("positionalArgs") or ()), None))
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# ---- page tokens -----------------------------------------------------------------------------------------------------


def encode_token(position: Sequence[Any], filter_key: Any) -> str:
    """Returns an opaque page token: a position, bound to the list (its filter) it was made for."""
    return tokens.encode([1, list(position), filter_key])


def decode_token(token: str, filter_key: Any, *kinds: type[int | str | datetime]) -> list[Any]:
    """Returns the position of a page token, its members of the given types.

    A token is not signed, so whoever has one can change the position in it. It opens no more than its list does, and
    what the database could not take is refused here.

    Args:
        token: As a client gave it back.
        filter_key: What the list is of.
        kinds: The types of the position's members; a number is from 0 to what a 32-bit column holds.

    Raises:
        InvalidArgument: It is not a token, or one of another list.
    """
    try:
        version, position, made_for = tokens.decode(token)
    except (ValueError, TypeError):
        raise InvalidArgument("page_token", "is not a token of this service") from None
    if version != 1 or not isinstance(position, list) or made_for != json.loads(json.dumps(filter_key)):
        raise InvalidArgument("page_token", "belongs to another list; keep the other fields as they were")
    try:
        return [_member(value, kind) for value, kind in zip(position, kinds, strict=True)]
    except ValueError:
        raise InvalidArgument("page_token", "is not a token of this service") from None


def _member(value: Any, kind: type[int | str | datetime]) -> int | str | datetime:
    """Returns a member of a position.

    Raises:
        ValueError: It is not of this kind.
    """
    if kind is int and type(value) is int and 0 <= value < 2**31:
        return value
    if kind is not int and isinstance(value, str) and "\0" not in value:
        value.encode()  # a lone surrogate is a ValueError, too
        if kind is str:
            return value
        time = datetime.fromisoformat(value)
        if time.tzinfo is not None:
            return time
    raise ValueError("not a member of a position")
