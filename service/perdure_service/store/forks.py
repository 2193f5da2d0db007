"""What a fork needs of the run that it is made from, and what makes DBOS's copy of it the fork that was asked for.

DBOS copies status, input and checkpoints (`fork_workflow`); what is said here is what it does not know: another
version, another input, a deadline.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from perdure_service.domain.forks import Recorded
from perdure_service.store.dbos_tables import INPUT, OUTPUTS, STATUS


@dataclass(frozen=True, slots=True)
class Origin:
    """What the API does not show of a run that is forked.

    Attributes:
        workflow_name: The name of its workflow in DBOS.
        input_argument: See `runs.insert`.
        created_at: When it was created: tells it from a later run of the same id.
    """

    workflow_name: str
    input_argument: str | None
    created_at: datetime


def origin(conn: sa.Connection, workflow_id: str) -> Origin | None:
    """Returns the facts about a run, None when it does not exist (any more)."""
    row = conn.execute(
        sa.text(
            f"SELECT s.name, r.input_argument, r.created_at FROM perdure.run AS r "
            f"JOIN {STATUS} AS s ON s.workflow_uuid = r.workflow_id WHERE r.workflow_id = :id"
        ),
        {"id": workflow_id},
    ).first()
    return None if row is None else Origin(row.name or "", row.input_argument, row.created_at)


def recorded(conn: sa.Connection, workflow_id: str) -> list[Recorded]:
    """Returns the checkpoints of a run in the order of their numbers, without what they hold."""
    rows = conn.execute(
        sa.text(
            "SELECT o.function_id, o.function_name, o.error IS NOT NULL AS failed, o.child_workflow_id, c.status, "
            "coalesce(o.completed_at_epoch_ms, o.started_at_epoch_ms, 0) AS completed_ms, "
            "coalesce(o.completed_at_epoch_ms - o.started_at_epoch_ms, 0) AS duration_ms "
            f"FROM {OUTPUTS} AS o LEFT JOIN {STATUS} AS c ON c.workflow_uuid = o.child_workflow_id "
            "WHERE o.workflow_uuid = :id ORDER BY o.function_id"
        ),
        {"id": workflow_id},
    )
    return [
        Recorded(
            row.function_id,
            row.function_name,
            row.failed,
            row.child_workflow_id or "",
            row.status or "",
            row.completed_ms,
            max(0, row.duration_ms),
        )
        for row in rows
    ]


def step_ids(conn: sa.Connection, workflow_id: str) -> frozenset[int]:
    """Returns the numbers of a run's checkpoints."""
    rows = conn.execute(sa.text(f"SELECT function_id FROM {OUTPUTS} WHERE workflow_uuid = :id"), {"id": workflow_id})
    return frozenset(row[0] for row in rows)


def finish(
    conn: sa.Connection,
    workflow_id: str,
    *,
    workflow_name: str,
    deadline_at: datetime | None,
    inputs: tuple[str, str] | None,
    priority: int,
) -> None:
    """Makes DBOS's copy of a run the fork that was asked for.

    Args:
        conn: The transaction that has made the copy.
        workflow_id: The fork's.
        workflow_name: The name in DBOS of the workflow that goes on.
        deadline_at: When the fork ends as EXPIRED; None for never.
        inputs: The serialized arguments and DBOS's name of their format; None for those of the forked run.
        priority: Its place in its queue.
    """
    conn.execute(
        sa.text(
            f"UPDATE {STATUS} SET name = :name, workflow_deadline_epoch_ms = CAST(:deadline_ms AS BIGINT), "
            "serialization = coalesce(CAST(:format AS TEXT), serialization), priority = :priority "
            "WHERE workflow_uuid = :id"
        ),
        {
            "id": workflow_id,
            "name": workflow_name,
            "deadline_ms": None if deadline_at is None else int(deadline_at.timestamp() * 1000),
            "format": inputs[1] if inputs else None,
            "priority": priority,
        },
    )
    if inputs is not None:
        conn.execute(
            sa.text(f"UPDATE {INPUT} SET inputs = :inputs WHERE workflow_uuid = :id"),
            {"id": workflow_id, "inputs": inputs[0]},
        )
