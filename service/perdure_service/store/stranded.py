"""Finds the runs that have not ended and that no living executor can continue.

DBOS's rule is followed: an executor takes a run of its own application version only, or one without a version when its
version is the latest that was ever registered; and, as ours, only workflows that it has. Open runs are grouped by
version and workflow first, so that the executors are compared with a few groups, however many runs there are. A run
that a living executor executes is never stranded. An executor that drains counts as living until it is gone, and one
that does not say what it has (an older release) as one that has everything.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from perdure_service.domain.runs import RunKey, derive_state
from perdure_service.domain.stranded import StrandedReason, StrandedRun
from perdure_service.store import runs
from perdure_service.store.dbos_tables import APPLICATION, STATUS, VERSIONS
from perdure_service.store.executors import LIVES

_OPEN = "s.status IN ('ENQUEUED', 'PENDING', 'DELAYED') AND s.application_name = :application"
_NEEDS = "coalesce(s.application_version, (SELECT version_name FROM latest), '')"
_HAS = "(l.agents = CAST('[]' AS JSONB) OR l.agents @> jsonb_build_array(g.workflow))"
_GROUPS = f"""
    WITH living AS (
        SELECT e.executor_id, e.application_version, CAST(e.agents AS JSONB) AS agents FROM perdure.executor AS e
        WHERE {LIVES} AND NOT e.standing_by
    ), latest AS (
        SELECT v.version_name FROM {VERSIONS} AS v
        WHERE v.application_name = :application OR v.application_name IS NULL
        ORDER BY v.version_timestamp DESC LIMIT 1
    ), stranded AS (
        SELECT g.needs, g.workflow,
            EXISTS (SELECT 1 FROM living AS l WHERE l.application_version = g.needs) AS has_version,
            EXISTS (SELECT 1 FROM living AS l WHERE l.application_version <> g.needs AND {_HAS}) AS code_elsewhere
        FROM (SELECT {_NEEDS} AS needs, coalesce(s.name, '') AS workflow FROM {STATUS} AS s WHERE {_OPEN}
              GROUP BY 1, 2) AS g
        WHERE NOT EXISTS (SELECT 1 FROM living AS l WHERE l.application_version = g.needs AND {_HAS})
    )"""
_FROM = f"""
    FROM {STATUS} AS s JOIN stranded AS g ON g.needs = {_NEEDS} AND g.workflow = coalesce(s.name, '')
    LEFT JOIN perdure.run AS r ON r.workflow_id = s.workflow_uuid
    WHERE {_OPEN} AND (s.status <> 'PENDING'
        OR NOT EXISTS (SELECT 1 FROM living AS l WHERE l.executor_id = s.executor_id))"""
_PAGE = f"""{_GROUPS}
    SELECT s.workflow_uuid, s.status, s.created_at, g.needs, g.workflow, g.has_version, g.code_elsewhere,
        r.namespace, r.run_id, r.agent, r.agent_version, r.parent_workflow_id, r.waiting_for, r.execution,
        (SELECT count(*) FROM perdure.approval AS a
         WHERE a.workflow_id = s.workflow_uuid AND a.state = 'PENDING') AS approvals {_FROM}"""
_AFTER = " AND (s.created_at, s.workflow_uuid) > (CAST(:at_ms AS BIGINT), CAST(:workflow_id AS TEXT))"
_COUNT = f"""{_GROUPS} SELECT count(*) {_FROM}
    AND (g.has_version OR CAST(:except_version AS TEXT) IS NULL OR g.needs <> CAST(:except_version AS TEXT))"""


def list_page(conn: sa.Connection, *, page_size: int, page_token: str) -> tuple[list[StrandedRun], str]:
    """Returns a page of stranded runs, the oldest first, and the next page's token (empty at the end).

    Ordered by the time of creation, then by workflow id, which never change: no run comes twice.

    Raises:
        InvalidArgument: The token is not from this list.
    """
    made_for = ["stranded"]
    values: dict[str, Any] = {"application": APPLICATION, "limit": page_size + 1}
    if page_token:
        at, workflow_id = runs.decode_token(page_token, made_for, datetime, str)
        values |= {"at_ms": round(at.timestamp() * 1000), "workflow_id": workflow_id}
    statement = f"{_PAGE}{_AFTER if page_token else ''} ORDER BY s.created_at, s.workflow_uuid LIMIT :limit"
    rows = conn.execute(sa.text(statement), values).fetchall()
    token = ""
    if len(rows) > page_size:
        rows = rows[:page_size]
        token = runs.encode_token([_time(rows[-1]).isoformat(), rows[-1].workflow_uuid], made_for)
    return [_stranded(row) for row in rows], token


def count(conn: sa.Connection, *, except_version: str | None = None) -> int:
    """Returns how many runs are stranded.

    Args:
        conn: A transaction.
        except_version: An application version of which a server is about to start: what lacks that alone is not
            counted.
    """
    values = {"application": APPLICATION, "except_version": except_version}
    return int(conn.execute(sa.text(_COUNT), values).scalar_one())


def _time(row: Any) -> datetime:
    return datetime.fromtimestamp(row.created_at / 1000, UTC)


def _stranded(row: Any) -> StrandedRun:
    foreign = row.run_id is None
    key = RunKey.of_workflow(row.workflow_uuid) if foreign else RunKey(row.namespace, row.run_id, row.workflow_uuid)
    parent = row.parent_workflow_id
    return StrandedRun(
        key=key,
        agent=row.workflow if foreign else row.agent,
        agent_version="" if foreign else row.agent_version,
        application_version=row.needs,
        state=derive_state(
            row.status,
            waiting_for=row.waiting_for,
            open_approvals=row.approvals,
            end_reason=None,
            execution=row.execution or 0,
        ),
        reason=StrandedReason.NO_EXECUTOR_OF_AGENT if row.has_version else StrandedReason.NO_EXECUTOR_OF_VERSION,
        parent=None if parent is None else RunKey.of_workflow(parent, key.namespace),
        code_elsewhere=row.code_elsewhere,
        create_time=_time(row),
    )
