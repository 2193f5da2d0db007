"""Queues in the database: their limits, what waits and runs in each, and when runs of a limited one have begun."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from perdure_service.domain.queues import Queue, QueueLimits
from perdure_service.store.dbos_tables import APPLICATION, QUEUES, STATUS
from perdure_service.store.runs import decode_token, encode_token


def lock(conn: sa.Connection, name: str) -> None:
    """Lets one claim at a time into a queue. A statement of its own: what is read after it is newer than the lock."""
    conn.execute(sa.text(f"SELECT name FROM {QUEUES} WHERE name = :name FOR UPDATE"), {"name": name})


def workflow_names(conn: sa.Connection, workflow_ids: Sequence[str]) -> dict[str, str]:
    """Returns the names of workflows by their ids."""
    rows = conn.execute(
        sa.text(f"SELECT workflow_uuid, name FROM {STATUS} WHERE workflow_uuid = ANY(:ids)"),
        {"ids": list(workflow_ids)},
    )
    return {row[0]: row[1] or "" for row in rows}


def starts(conn: sa.Connection, limits: QueueLimits) -> int:
    """Returns how many executions of a queue have begun in the last period of its rate limit. The queue is locked."""
    count = conn.execute(
        sa.text(
            "SELECT count(*) FROM perdure.queue_start "
            "WHERE queue = :queue AND started_at > now() - CAST(:period_s AS FLOAT8) * INTERVAL '1 second'"
        ),
        {"queue": limits.name, "period_s": limits.rate_period_s},
    ).scalar_one()
    return int(count)


def add_starts(conn: sa.Connection, limits: QueueLimits, workflow_ids: Sequence[str]) -> None:
    """Notes that executions of a queue have begun, and forgets those of former periods. The queue is locked.

    The time is that of the statement, which is after the lock: a transaction that had to wait for it began earlier.
    """
    conn.execute(
        sa.text(
            "INSERT INTO perdure.queue_start (queue, started_at, workflow_id) "
            "SELECT :queue, clock_timestamp(), taken.id FROM unnest(CAST(:ids AS TEXT[])) AS taken (id) "
            "ON CONFLICT DO NOTHING"
        ),
        {"queue": limits.name, "ids": list(workflow_ids)},
    )
    conn.execute(
        sa.text(
            "DELETE FROM perdure.queue_start "
            "WHERE queue = :queue AND started_at < now() - CAST(:period_s AS FLOAT8) * INTERVAL '2 seconds'"
        ),
        {"queue": limits.name, "period_s": limits.rate_period_s},
    )


def limits_of(conn: sa.Connection, names: Sequence[str]) -> dict[str, QueueLimits]:
    """Returns the limits in force of those queues that exist, by name."""
    rows = conn.execute(
        sa.text(f"SELECT {_LIMITS} FROM {QUEUES} AS q WHERE q.name = ANY(:names) ORDER BY q.name"),
        {"names": list(names)},
    )
    return {row.name: _limits(row) for row in rows}


_LIMITS = "q.name, q.worker_concurrency, q.concurrency, q.rate_limit_max, q.rate_limit_period_sec"
# A run waits since it was created, released or given back, whichever was last.
_LIST = sa.text(f"""
    SELECT {_LIMITS}, coalesce(c.queued, 0) AS queued, coalesce(c.running, 0) AS running, c.oldest_ms
    FROM {QUEUES} AS q LEFT JOIN (
        SELECT s.queue_name,
            count(CASE WHEN s.status = 'ENQUEUED' THEN 1 END) AS queued,
            count(CASE WHEN s.status = 'PENDING' THEN 1 END) AS running,
            min(CASE WHEN s.status = 'ENQUEUED'
                THEN greatest(s.created_at, s.updated_at, coalesce(s.delay_until_epoch_ms, 0)) END) AS oldest_ms
        FROM {STATUS} AS s
        WHERE s.status IN ('ENQUEUED', 'PENDING') AND s.application_name = :application GROUP BY s.queue_name
    ) AS c ON c.queue_name = q.name
    WHERE q.application_name = :application AND q.name > :after ORDER BY q.name LIMIT :limit
""")


def list_page(conn: sa.Connection, *, page_size: int, page_token: str) -> tuple[list[Queue], str]:
    """Returns a page of the queues by name, and the token of the next page (empty at the end).

    Raises:
        InvalidArgument: The token is not from this list.
    """
    after = decode_token(page_token, "queues", str)[0] if page_token else ""
    rows = conn.execute(_LIST, {"application": APPLICATION, "after": after, "limit": page_size + 1}).fetchall()
    found = [
        Queue(
            _limits(row),
            row.queued,
            row.running,
            None if row.oldest_ms is None else datetime.fromtimestamp(row.oldest_ms / 1000, UTC),
        )
        for row in rows[:page_size]
    ]
    return found, encode_token([found[-1].limits.name], "queues") if len(rows) > page_size else ""


def _limits(row: sa.Row[tuple[object, ...]]) -> QueueLimits:
    return QueueLimits(
        row.name,
        row.worker_concurrency or 0,
        row.concurrency or 0,
        row.rate_limit_max or 0,
        row.rate_limit_period_sec or 0.0,
    )
