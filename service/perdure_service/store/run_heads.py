"""How far runs have come, and which of a run's descendants go on: what a watch needs to know of many runs at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from perdure_service.domain.runs import TERMINAL_STATUSES, RunKey
from perdure_service.store.dbos_tables import STATUS

_HEAD = f"""
    SELECT r.workflow_id, r.namespace, r.run_id, r.parent_workflow_id,
      r.ended_at IS NOT NULL AND s.status = ANY(:terminal) AS ended,
      (SELECT e.first_sequence + e.event_count - 1 FROM perdure.run_event AS e
       WHERE e.workflow_id = r.workflow_id ORDER BY e.first_sequence DESC LIMIT 1) AS last_sequence
    FROM perdure.run AS r JOIN {STATUS} AS s ON s.workflow_uuid = r.workflow_id
"""
_HEADS = sa.text(f"{_HEAD} WHERE r.namespace = :namespace AND r.workflow_id = ANY(:workflow_ids)")
# Not `family`: CockroachDB does not take that word as the name of a query.
_OPEN_HEADS = sa.text(f"""
    WITH RECURSIVE members (workflow_id) AS (
      SELECT CAST(:workflow_id AS TEXT)
      UNION
      SELECT c.workflow_id FROM members AS m JOIN perdure.run AS c ON c.parent_workflow_id = m.workflow_id
    )
    {_HEAD} JOIN members AS m ON m.workflow_id = r.workflow_id
    WHERE r.namespace = :namespace AND (r.ended_at IS NULL OR r.workflow_id = :workflow_id)
""")
_CLOSED = sa.text("SELECT workflow_id FROM perdure.run WHERE workflow_id = ANY(:workflow_ids) AND ended_at IS NOT NULL")


@dataclass(frozen=True, slots=True)
class Head:
    """How far a run has come.

    Attributes:
        parent_workflow_id: Of the run that started it; None when a caller did.
        last_sequence: The number of its events.
        ended: Whether it has ended, with its last event in the log.
    """

    key: RunKey
    parent_workflow_id: str | None
    last_sequence: int
    ended: bool


def heads(conn: sa.Connection, namespace: str, workflow_ids: Sequence[str]) -> dict[str, Head]:
    """Returns how far those of the runs have come that exist in a namespace, by workflow id."""
    return _heads(conn, _HEADS, {"namespace": namespace, "workflow_ids": list(workflow_ids)})


def open_heads(conn: sa.Connection, key: RunKey) -> dict[str, Head]:
    """Returns how far a run and those of its descendants that have not ended have come, at one moment."""
    return _heads(conn, _OPEN_HEADS, {"namespace": key.namespace, "workflow_id": key.workflow_id})


def closed(conn: sa.Connection, workflow_ids: Sequence[str]) -> list[str]:
    """Returns those of the runs whose last event is in the log."""
    rows = conn.execute(_CLOSED, {"workflow_ids": list(workflow_ids)})
    return [row.workflow_id for row in rows]


def _heads(conn: sa.Connection, query: sa.TextClause, values: dict[str, Any]) -> dict[str, Head]:
    rows = conn.execute(query, {**values, "terminal": sorted(TERMINAL_STATUSES)})
    return {
        row.workflow_id: Head(
            RunKey(row.namespace, row.run_id, row.workflow_id),
            row.parent_workflow_id,
            row.last_sequence or 0,
            bool(row.ended),
        )
        for row in rows
    }
