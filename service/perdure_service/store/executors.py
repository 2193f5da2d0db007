"""Executors' leases, and giving back the runs of executors that are gone. Every time is the database's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.domain.executors import Executor, ExecutorState
from perdure_service.domain.runs import RunState
from perdure_service.store import event_log, runs
from perdure_service.store.dbos_tables import APPLICATION, STATUS

BATCH = 200
"""Runs given back in one transaction: short enough that its locks are not noticed."""

LIVES = "e.tombstoned_at IS NULL AND e.expires_at > now()"
"""The condition that an executor `e` is alive."""
_NOT_ALIVE = f"""NOT EXISTS (SELECT 1 FROM perdure.executor AS e WHERE e.executor_id = s.executor_id AND {LIVES})"""


def register(
    conn: sa.Connection,
    executor_id: str,
    *,
    application_version: str,
    address: str,
    max_running: int,
    ttl: timedelta,
    agents: Sequence[str] = (),
    region: str = "",
    standing_by: bool = False,
) -> None:
    """Inserts the lease of a new executor. Done before DBOS is launched, so that its runs never look orphaned.

    Args:
        conn: A transaction.
        executor_id: Its id.
        application_version: Of the runs that it takes.
        address: Where it listens, for people.
        max_running: How many runs it takes at most.
        ttl: How long it is alive after a renewal.
        agents: The names of the workflows that it has; none when it does not say.
        region: Where it is; empty without regions.
        standing_by: Whether it takes no runs, as another region has the claim of its cell.
    """
    conn.execute(
        sa.text("""
            INSERT INTO perdure.executor (executor_id, application_version, address, max_running, agents, region,
                                          standing_by, expires_at)
            VALUES (:executor_id, :application_version, :address, :max_running, :agents, :region, :standing_by,
                    now() + CAST(:ttl_s AS FLOAT8) * INTERVAL '1 second')
            ON CONFLICT (executor_id) DO NOTHING
        """),
        {
            "executor_id": executor_id,
            "application_version": application_version,
            "address": address,
            "max_running": max_running,
            "agents": json.dumps(sorted(agents)),
            "region": region,
            "standing_by": standing_by,
            "ttl_s": ttl.total_seconds(),
        },
    )


def renew(conn: sa.Connection, executor_id: str, ttl: timedelta) -> bool:
    """Extends a lease, also one that has expired; returns False when it was tombstoned: this executor is over."""
    renewed = conn.execute(
        sa.text("""
            UPDATE perdure.executor SET renewed_at = now(),
                expires_at = now() + CAST(:ttl_s AS FLOAT8) * INTERVAL '1 second'
            WHERE executor_id = :executor_id AND tombstoned_at IS NULL
        """),
        {"executor_id": executor_id, "ttl_s": ttl.total_seconds()},
    )
    return renewed.rowcount == 1


def drain(conn: sa.Connection, executor_id: str) -> None:
    """Tells that an executor takes no more runs; its lease goes on."""
    conn.execute(
        sa.text("UPDATE perdure.executor SET draining = true WHERE executor_id = :executor_id"),
        {"executor_id": executor_id},
    )


def stand_by(conn: sa.Connection, executor_id: str, standing_by: bool) -> None:
    """Tells whether an executor leaves the runs of its cell to another region."""
    conn.execute(
        sa.text("UPDATE perdure.executor SET standing_by = :standing_by WHERE executor_id = :executor_id"),
        {"executor_id": executor_id, "standing_by": standing_by},
    )


def remove(conn: sa.Connection, executor_id: str) -> None:
    """Ends a lease politely: whatever it still has is free for others at once."""
    conn.execute(
        sa.text(
            "UPDATE perdure.executor SET renewed_at = now(), expires_at = now(), tombstoned_at = now() "
            "WHERE executor_id = :executor_id AND tombstoned_at IS NULL"
        ),
        {"executor_id": executor_id},
    )


def tombstone_others(conn: sa.Connection, executor_id: str) -> Sequence[str]:
    """Declares every other executor gone: for a server that owns its database alone (`dev`); returns their ids."""
    rows = conn.execute(
        sa.text(
            "UPDATE perdure.executor SET tombstoned_at = now() WHERE executor_id <> :e AND tombstoned_at IS NULL "
            "RETURNING executor_id"
        ),
        {"e": executor_id},
    )
    return [row[0] for row in rows]


def tombstone_expired(conn: sa.Connection, executor_id: str) -> Sequence[str]:
    """Declares executors whose lease has expired gone, for good; returns their ids.

    The condition is in the statement itself, so a renewal that came first wins, and one that comes later finds the
    tombstone.
    """
    rows = conn.execute(
        sa.text("""
            UPDATE perdure.executor SET tombstoned_at = now()
            WHERE expires_at <= now() AND tombstoned_at IS NULL AND executor_id <> :executor_id RETURNING executor_id
        """),
        {"executor_id": executor_id},
    )
    return [row[0] for row in rows]


@dataclass(frozen=True, slots=True)
class Requeued:
    """A run that was given back to the queue."""

    workflow_id: str
    from_executor_id: str


def requeue_orphans(
    conn: sa.Connection, queue: str, now_ms: int, adopt: Callable[[sa.Connection, Sequence[str]], object]
) -> list[Requeued]:
    """Gives running runs without a live executor back to the queue, at most `BATCH`, each with its events.

    "No live executor" is the rule, not a list of the dead: it also catches a run that a zombie dequeues later. The
    new owner is nobody (`owner_xid` NULL), so whatever the old one still writes is refused. Rows that somebody holds
    are left for the next time; so of two of us at once, one has them.

    They are looked for without locks first, and then locked by their keys: CockroachDB locks what it reads before it
    looks at the conditions, which would be every running run, each time, though mostly none is an orphan.

    Args:
        conn: A transaction.
        queue: The queue for runs that have none.
        now_ms: The time of the events.
        adopt: Called with the workflow ids before their logs are written, to give foreign ones a run.
    """
    orphans = conn.execute(
        sa.text(f"""
            SELECT s.workflow_uuid FROM {STATUS} AS s
            WHERE s.status = 'PENDING' AND s.application_name = :application AND {_NOT_ALIVE}
            ORDER BY s.workflow_uuid LIMIT :limit
        """),
        {"application": APPLICATION, "limit": BATCH},
    )
    ids = [row[0] for row in orphans]
    if not ids:
        return []
    found = conn.execute(
        sa.text(f"""
            SELECT s.workflow_uuid, s.executor_id,
                   (SELECT e.renewed_at FROM perdure.executor AS e WHERE e.executor_id = s.executor_id) AS seen,
                   now() AS now
            FROM {STATUS} AS s WHERE s.workflow_uuid = ANY(:ids) AND s.status = 'PENDING' AND {_NOT_ALIVE}
            ORDER BY s.workflow_uuid FOR NO KEY UPDATE SKIP LOCKED
        """),
        {"ids": ids},
    ).fetchall()
    return _give_back(conn, found, queue, now_ms, adopt, "its executor is gone", crashed=True, recovered=True)


def find_running(conn: sa.Connection, executor_id: str, older_than_s: float) -> list[tuple[str, str | None]]:
    """Returns what the database has as running on an executor since a while: workflow ids and ownership tokens."""
    rows = conn.execute(
        sa.text(f"""
            SELECT workflow_uuid, owner_xid FROM {STATUS}
            WHERE status = 'PENDING' AND executor_id = :executor_id AND application_name = :application
              AND updated_at < CAST(extract(epoch FROM now()) * 1000 AS BIGINT) - :older_than_ms
            ORDER BY workflow_uuid
        """),
        {
            "executor_id": executor_id,
            "application": APPLICATION,
            "older_than_ms": int(older_than_s * 1000),
        },
    )
    return [(row[0], row[1]) for row in rows]


def give_back_own(
    conn: sa.Connection,
    tokens_by_id: Mapping[str, str | None],
    queue: str,
    now_ms: int,
    adopt: Callable[[sa.Connection, Sequence[str]], object],
    reason: str,
    *,
    recovered: bool = False,
) -> list[Requeued]:
    """Gives back runs of the executor that calls: those it stops to execute, or was given and never executed.

    None of this is a crash: the attempt that the claim counted is taken off again.

    Args:
        conn: A transaction of that executor.
        tokens_by_id: Workflow ids, and the tokens under which they were executed, or found; what has another one by
            now is left alone. At most `BATCH` are given back, and none that somebody else holds.
        queue: As of `requeue_orphans`.
        now_ms: As of `requeue_orphans`.
        adopt: As of `requeue_orphans`.
        reason: Why, for people.
        recovered: Whether the log tells of it as of a recovery: nobody knows how the execution ended.
    """
    found = conn.execute(
        sa.text(f"""
            SELECT s.workflow_uuid, s.executor_id, now() AS seen, now() AS now, s.owner_xid
            FROM {STATUS} AS s WHERE s.status = 'PENDING' AND s.workflow_uuid = ANY(:ids)
            ORDER BY s.workflow_uuid LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED
        """),
        {"ids": sorted(tokens_by_id), "limit": BATCH},
    ).fetchall()
    still = [row[:4] for row in found if row[4] == tokens_by_id[row[0]]]
    return _give_back(conn, still, queue, now_ms, adopt, reason, crashed=False, recovered=recovered)


def still_own(conn: sa.Connection, tokens_by_id: Mapping[str, str | None]) -> set[str]:
    """Returns which of these runs are running under these tokens: after `give_back_own`, those that somebody held."""
    rows = conn.execute(
        sa.text(
            f"SELECT workflow_uuid, owner_xid FROM {STATUS} WHERE workflow_uuid = ANY(:ids) AND status = 'PENDING'"
        ),
        {"ids": sorted(tokens_by_id)},
    )
    return {row[0] for row in rows if row[1] == tokens_by_id[row[0]]}


def _give_back(
    conn: sa.Connection,
    found: Sequence[Any],
    queue: str,
    now_ms: int,
    adopt: Callable[[sa.Connection, Sequence[str]], object],
    reason: str,
    *,
    crashed: bool,
    recovered: bool,
) -> list[Requeued]:
    """Puts locked running rows (id, executor, when it was last seen, now) back into the queue, with their events.

    A crash counts as an attempt. Unless the log tells of it by `recovered`, the execution ended in good order.
    """
    if not found:
        return []
    ids = [row[0] for row in found]
    adopt(conn, ids)
    before = runs.logged_states(conn, ids)
    conn.execute(
        sa.text(f"""
            UPDATE {STATUS} SET status = 'ENQUEUED', owner_xid = NULL, started_at_epoch_ms = NULL,
                queue_name = coalesce(queue_name, :queue),
                updated_at = CAST(extract(epoch FROM now()) * 1000 AS BIGINT),
                recovery_attempts = greatest(coalesce(recovery_attempts, 0) - :uncounted, 0)
            WHERE workflow_uuid = ANY(:ids) AND status = 'PENDING'
        """),
        {"ids": ids, "queue": queue, "uncounted": 0 if crashed else 1},
    )
    for workflow_id, executor_id, seen, now in found:
        gap_ms = 0 if seen is None else max(0, int((now - seen).total_seconds() * 1000))
        state, execution = before[workflow_id]
        told: dict[str, Any] = {"from": state, "to": RunState.QUEUED, "reason": reason}
        if not recovered:
            told["handed_over"] = True
        events = [Event(EventKind.STATE_CHANGED, now_ms, told, execution=execution)]
        if recovered:
            lost = {"from_executor_id": executor_id or "", "gap_ms": gap_ms}
            events.insert(0, Event(EventKind.RECOVERED, now_ms, lost, execution=execution))
        event_log.append(conn, Pack(workflow_id, events))
        runs.apply_events(conn, workflow_id, events)
    return [Requeued(workflow_id, executor_id or "") for workflow_id, executor_id, _, _ in found]


_STATE_ORDER = (
    ExecutorState.ALIVE,
    ExecutorState.STANDING_BY,
    ExecutorState.DRAINING,
    ExecutorState.EXPIRED,
    ExecutorState.GONE,
)
_LIST = f"""
    SELECT executor_id, address, application_version, region, max_running, started_at, expires_at, place, running
    FROM (
        SELECT e.executor_id, e.address, e.application_version, e.region, e.max_running, e.started_at, e.expires_at,
            CASE WHEN e.tombstoned_at IS NOT NULL THEN 4 WHEN e.expires_at <= now() THEN 3
                WHEN e.draining THEN 2 WHEN e.standing_by THEN 1 ELSE 0 END AS place,
            coalesce(c.running, 0) AS running
        FROM perdure.executor AS e LEFT JOIN (
            SELECT s.executor_id, count(*) AS running FROM {STATUS} AS s
            WHERE s.status = 'PENDING' AND s.application_name = :application GROUP BY s.executor_id
        ) AS c ON c.executor_id = e.executor_id
    ) AS found
    WHERE place <= :last_place"""
_AFTER = """
    AND (place > :place OR (place = :place
         AND (started_at, executor_id) < (CAST(:at AS TIMESTAMPTZ), CAST(:executor_id AS TEXT))))"""


def list_page(
    conn: sa.Connection, *, include_gone: bool, page_size: int, page_token: str
) -> tuple[list[Executor], str]:
    """Returns a page of executors, the living first, then the youngest, and the next page's token (empty at the end).

    An executor that dies between two pages moves behind the first, and may be seen twice or not at all.

    Raises:
        InvalidArgument: The token is not from this list.
    """
    made_for = ["executors", include_gone]
    values: dict[str, Any] = {
        "application": APPLICATION,
        "last_place": len(_STATE_ORDER) - (1 if include_gone else 2),
        "limit": page_size + 1,
    }
    if page_token:
        place, at, executor_id = runs.decode_token(page_token, made_for, int, datetime, str)
        values |= {"place": place, "at": at, "executor_id": executor_id}
    statement = f"{_LIST}{_AFTER if page_token else ''} ORDER BY place, started_at DESC, executor_id DESC LIMIT :limit"
    rows = conn.execute(sa.text(statement), values).fetchall()
    token = ""
    if len(rows) > page_size:
        rows = rows[:page_size]
        token = runs.encode_token([rows[-1].place, rows[-1].started_at.isoformat(), rows[-1].executor_id], made_for)
    return [_executor(row) for row in rows], token


def _executor(row: Any) -> Executor:
    return Executor(
        executor_id=row.executor_id,
        address=row.address,
        application_version=row.application_version,
        region=row.region,
        state=_STATE_ORDER[row.place],
        running=row.running,
        max_running=row.max_running,
        start_time=row.started_at,
        expire_time=row.expires_at,
    )
