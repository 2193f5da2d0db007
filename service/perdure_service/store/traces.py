"""Finds the runs of a trace: a run with its origin, and the children of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from perdure_service.store.dbos_tables import STATUS

_COLUMNS = """
    r.workflow_id, r.namespace, r.run_id, r.agent, r.agent_version, r.trace_id, r.traceparent, r.created_at,
    r.forked_from_workflow_id, origin.trace_id AS origin_trace_id, origin.run_id AS origin_run_id
"""
_FROM = (
    "FROM perdure.run AS r LEFT JOIN perdure.run AS origin "
    "ON origin.workflow_id = r.forked_from_workflow_id AND origin.namespace = r.namespace"
)

_FIND = sa.text(f"SELECT {_COLUMNS} {_FROM} WHERE r.workflow_id = :workflow_id")
_CHILDREN = sa.text(
    f"SELECT {_COLUMNS} {_FROM} WHERE r.parent_workflow_id = ANY(:workflow_ids) AND r.namespace = :namespace "
    "ORDER BY r.created_at, r.workflow_id LIMIT :limit"
)

_ENDED_LAST = sa.text(f"""
    SELECT r.workflow_id FROM perdure.executor AS e
    JOIN {STATUS} AS s ON s.executor_id = e.executor_id
    JOIN perdure.run AS r ON r.workflow_id = s.workflow_uuid
    WHERE e.executor_id = ANY(:executor_ids)
      AND r.ended_at >= e.renewed_at - CAST(:horizon_s AS FLOAT8) * INTERVAL '1 second'
    ORDER BY r.ended_at DESC LIMIT :limit
""")


def find(conn: sa.Connection, workflow_id: str) -> Mapping[str, Any] | None:
    """Returns the row of a run with the trace of the run it was forked from; None when there is no such run."""
    row = conn.execute(_FIND, {"workflow_id": workflow_id}).mappings().first()
    return None if row is None else dict(row)


def children(conn: sa.Connection, namespace: str, workflow_ids: Sequence[str], limit: int) -> list[Mapping[str, Any]]:
    """Returns the rows of the runs that these have started, oldest first, at most `limit`.

    Those of another namespace are left out: code can start a child under an id of any, and who may see the parent may
    perhaps not see that.
    """
    values = {"namespace": namespace, "workflow_ids": list(workflow_ids), "limit": limit}
    return [dict(row) for row in conn.execute(_CHILDREN, values).mappings()]


def ended_last(conn: sa.Connection, executor_ids: Sequence[str], horizon_s: float, limit: int) -> list[str]:
    """Returns the workflow ids of runs that executors ended shortly before their last sign of life, or later.

    Args:
        conn: A transaction.
        executor_ids: Executors that are gone.
        horizon_s: How long before, seconds.
        limit: At most so many, the last ones.
    """
    values = {"executor_ids": list(executor_ids), "horizon_s": horizon_s, "limit": limit}
    return [row[0] for row in conn.execute(_ENDED_LAST, values)]
