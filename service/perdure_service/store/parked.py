"""Parked runs in the database: what each is to be woken by, which of them it has come for, and putting them back.

A parked run has DBOS's status DELAYED, and in `run.parked_for` its *marks*, one a line: `signal:<topic>`,
`approval:<step>`, `result:<workflow id>`, `sleep`. Its release time is the deadline of its wait. Whoever wakes it goes
by the marks, never by the status alone, which runs that are scheduled for later have, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from perdure_service.domain.runs import TERMINAL_STATUSES
from perdure_service.store.dbos_tables import NOTIFICATIONS, STATUS

SIGNAL = "signal:"
APPROVAL = "approval:"
RESULT = "result:"
SLEEP = "sleep"

NO_DEADLINE_MS = 253_402_300_799_000
"""The release time of a wait without a deadline: the end of the year 9999."""

_MARKS = "string_to_array(r.parked_for, chr(10))"

_ARRIVED = f"""
    EXISTS (SELECT 1 FROM {NOTIFICATIONS} AS n WHERE n.destination_uuid = r.workflow_id AND n.consumed = false
            AND ('{SIGNAL}' || n.topic) = ANY({_MARKS}))
    OR EXISTS (SELECT 1 FROM perdure.approval AS a WHERE a.workflow_id = r.workflow_id AND a.state <> 'PENDING'
               AND ('{APPROVAL}' || CAST(a.step_id AS TEXT)) = ANY({_MARKS}))
    OR EXISTS (SELECT 1 FROM {STATUS} AS s WHERE r.parked_for LIKE '{RESULT}%'
               AND s.workflow_uuid = substr(r.parked_for, {len(RESULT) + 1}) AND s.status = ANY(:terminal))
    OR EXISTS (SELECT 1 FROM perdure.run AS c JOIN {STATUS} AS s ON s.workflow_uuid = c.workflow_id
               WHERE r.parked_for LIKE '%{RESULT}%' AND c.parent_workflow_id = r.workflow_id
               AND s.status = ANY(:terminal) AND ('{RESULT}' || c.workflow_id) = ANY({_MARKS}))
"""
# What a foreign client has ended or resumed keeps its marks until that is logged, and is not to be woken.
_STILL = f"EXISTS (SELECT 1 FROM {STATUS} AS p WHERE p.workflow_uuid = r.workflow_id AND p.status = 'DELAYED')"
_DUE = sa.text(
    f"SELECT r.workflow_id FROM perdure.run AS r WHERE r.parked_for IS NOT NULL AND ({_ARRIVED}) AND {_STILL} "
    "ORDER BY r.workflow_id LIMIT :limit"
)
_DUE_OF = sa.text(
    f"SELECT r.workflow_id FROM perdure.run AS r WHERE r.workflow_id = ANY(:ids) AND r.parked_for IS NOT NULL "
    f"AND ({_ARRIVED}) AND {_STILL} ORDER BY r.workflow_id"
)


@dataclass(frozen=True, slots=True)
class Row:
    """Where a run that is about to be parked stands, its row locked."""

    status: str
    owner_xid: str | None


def lock(conn: sa.Connection, workflow_id: str) -> Row | None:
    """Locks a run's status row, in a statement of its own; returns it."""
    row = conn.execute(
        sa.text(f"SELECT status, owner_xid FROM {STATUS} WHERE workflow_uuid = :id FOR NO KEY UPDATE"),
        {"id": workflow_id},
    ).first()
    return None if row is None else Row(row.status, row.owner_xid)


def park(conn: sa.Connection, workflow_id: str, marks: Sequence[str], remaining_s: float | None) -> None:
    """Parks a run whose lock the caller holds: nobody's, until one of the marks comes, or the time is up.

    What its claim counted as an attempt is given back, as a run that waits has not crashed.

    Args:
        conn: A transaction.
        workflow_id: The run.
        marks: What wakes it.
        remaining_s: How long until it is woken anyway, by the database's clock; None for ever.
    """
    values = {
        "id": workflow_id,
        "for": "\n".join(marks),
        "remaining_ms": None if remaining_s is None else int(remaining_s * 1000),
        "never": NO_DEADLINE_MS,
    }
    conn.execute(sa.text("UPDATE perdure.run SET parked_for = :for WHERE workflow_id = :id"), values)
    conn.execute(
        sa.text(f"""
            UPDATE {STATUS} SET status = 'DELAYED', owner_xid = NULL, started_at_epoch_ms = NULL,
                recovery_attempts = greatest(coalesce(recovery_attempts, 0) - 1, 0),
                updated_at = CAST(extract(epoch FROM now()) * 1000 AS BIGINT),
                delay_until_epoch_ms = least(CAST(:never AS BIGINT), coalesce(
                    CAST(extract(epoch FROM now()) * 1000 AS BIGINT) + CAST(:remaining_ms AS BIGINT),
                    CAST(:never AS BIGINT)))
            WHERE workflow_uuid = :id
        """),
        values,
    )


def has_come(conn: sa.Connection, workflow_ids: Sequence[str]) -> list[str]:
    """Returns those of the runs that are parked and for which something has come. The caller holds their locks."""
    values = {"ids": list(workflow_ids), "terminal": sorted(TERMINAL_STATUSES)}
    return [row[0] for row in conn.execute(_DUE_OF, values)]


def due(conn: sa.Connection, limit: int) -> list[str]:
    """Returns parked runs for which something has come; nobody may hold their locks, so look again under them."""
    return [row[0] for row in conn.execute(_DUE, {"limit": limit, "terminal": sorted(TERMINAL_STATUSES)})]


def parked_of(conn: sa.Connection, workflow_ids: Sequence[str]) -> list[str]:
    """Returns those of the runs that are parked. The caller holds their locks."""
    rows = conn.execute(
        sa.text("SELECT workflow_id FROM perdure.run WHERE workflow_id = ANY(:ids) AND parked_for IS NOT NULL"),
        {"ids": list(workflow_ids)},
    )
    return sorted(row[0] for row in rows)


def is_parked_for(conn: sa.Connection, workflow_id: str, mark: str) -> bool:
    """Returns whether a run, whose lock the caller holds, is parked for this."""
    found = conn.execute(
        sa.text("SELECT parked_for FROM perdure.run WHERE workflow_id = :id"), {"id": workflow_id}
    ).scalar()
    return found is not None and mark in str(found).split("\n")


def release(conn: sa.Connection, workflow_ids: Sequence[str]) -> list[str]:
    """Puts parked runs back into their queues, if they still are parked; returns those.

    The caller holds their locks, and has seen in an earlier statement that they are to be woken.
    """
    ids = [
        row[0]
        for row in conn.execute(
            sa.text(f"""
                UPDATE {STATUS} SET status = 'ENQUEUED', delay_until_epoch_ms = NULL,
                    updated_at = CAST(extract(epoch FROM now()) * 1000 AS BIGINT)
                WHERE workflow_uuid = ANY(:ids) AND status = 'DELAYED' RETURNING workflow_uuid
            """),
            {"ids": list(workflow_ids)},
        )
    ]
    conn.execute(sa.text("UPDATE perdure.run SET parked_for = NULL WHERE workflow_id = ANY(:ids)"), {"ids": ids})
    return sorted(ids)
