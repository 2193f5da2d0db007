"""Which runs ended so long ago that they, or their logs, are no longer kept; and cutting a log.

Runs are looked at in the order of their ends, a page at a time, by the index `run_by_end`.

* A *run* goes with its family (see `deletions`), once every run of that ended long enough ago.
* The *log* of a run goes, but for its last pack, once the run and all that it descends from ended long enough ago: so
  what a view with children shows is kept as long as the log of the run whose view it is. The last pack stays: it says
  how the run ended, and how many events there were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from perdure_service.domain.runs import TERMINAL_STATUSES
from perdure_service.store import deletions
from perdure_service.store.dbos_tables import STATUS
from perdure_service.store.deletions import Families

# Of a page only, so that what is looked at is bounded, whatever is chosen of it.
_ENDED = """
    SELECT r.workflow_id, r.ended_at,
      NOT EXISTS (SELECT 1 FROM perdure.run AS p WHERE p.workflow_id = r.parent_workflow_id) AS is_root
    FROM (
      SELECT workflow_id, ended_at, parent_workflow_id FROM perdure.run
      WHERE namespace = :namespace AND ended_at < CAST(:before AS TIMESTAMPTZ) {after}
      ORDER BY ended_at, workflow_id LIMIT :limit
    ) AS r ORDER BY r.ended_at, r.workflow_id
"""
_AFTER = "AND (ended_at, workflow_id) > (CAST(:at AS TIMESTAMPTZ), CAST(:workflow_id AS TEXT))"

_WITH_OLD_LOGS = sa.text(f"""
    WITH RECURSIVE up (start, workflow_id) AS (
      SELECT r.workflow_id, r.workflow_id FROM perdure.run AS r WHERE r.workflow_id = ANY(:ids)
      UNION
      SELECT u.start, r.parent_workflow_id FROM up AS u JOIN perdure.run AS r ON r.workflow_id = u.workflow_id
      WHERE r.parent_workflow_id IS NOT NULL
    ), free (workflow_id) AS (
      SELECT u.start FROM up AS u
      LEFT JOIN perdure.run AS r ON r.workflow_id = u.workflow_id
      LEFT JOIN {STATUS} AS s ON s.workflow_uuid = u.workflow_id
      GROUP BY u.start
      HAVING bool_and((r.workflow_id IS NULL OR r.ended_at < CAST(:before AS TIMESTAMPTZ))
                      AND (s.workflow_uuid IS NULL OR s.status = ANY(:terminal)))
    ), down (workflow_id) AS (
      SELECT f.workflow_id FROM free AS f
      UNION
      SELECT r.workflow_id FROM down AS d JOIN perdure.run AS r ON r.parent_workflow_id = d.workflow_id
      JOIN {STATUS} AS s ON s.workflow_uuid = r.workflow_id
      WHERE r.ended_at < CAST(:before AS TIMESTAMPTZ) AND s.status = ANY(:terminal)
    )
    SELECT workflow_id FROM down ORDER BY workflow_id
""")

# In the order of the key: of each log its beginning goes first, so that what is left has no hole at any moment.
_CUT = sa.text("""
    DELETE FROM perdure.run_event WHERE (workflow_id, first_sequence) IN (
      SELECT e.workflow_id, e.first_sequence
      FROM unnest(CAST(:ids AS TEXT[])) AS w (id) JOIN perdure.run_event AS e ON e.workflow_id = w.id
      WHERE EXISTS (SELECT 1 FROM perdure.run_event AS later
                    WHERE later.workflow_id = e.workflow_id AND later.first_sequence > e.first_sequence)
      ORDER BY e.workflow_id, e.first_sequence LIMIT :packs
    ) RETURNING workflow_id
""")


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that has ended.

    Attributes:
        is_root: Whether the run that started it, if one did, is not there: it heads its family.
    """

    workflow_id: str
    ended_at: datetime
    is_root: bool


def now(conn: sa.Connection) -> datetime:
    """Returns the database's time: the one by which runs end."""
    found: datetime = conn.execute(sa.text("SELECT now()")).scalar_one()
    return found


def ended(conn: sa.Connection, namespace: str, before: datetime, after: Ended | None, limit: int) -> list[Ended]:
    """Returns runs that ended before a time, the first first.

    Args:
        conn: A transaction.
        namespace: Whose.
        before: The time.
        after: The last one seen; None for the beginning.
        limit: At most so many.
    """
    values = {"namespace": namespace, "before": before, "limit": limit}
    if after is not None:
        values |= {"at": after.ended_at, "workflow_id": after.workflow_id}
    rows = conn.execute(sa.text(_ENDED.format(after="" if after is None else _AFTER)), values)
    return [Ended(row.workflow_id, row.ended_at, row.is_root) for row in rows]


def expired_families(conn: sa.Connection, roots: Sequence[str], before: Mapping[str, datetime]) -> Families:
    """Returns the families of some runs; held are also those of which one ended too late, or is of somebody else's.

    Args:
        conn: A transaction.
        roots: Workflow ids.
        before: When a run must have ended, by its namespace; one that is not there keeps its runs.
    """
    found = deletions.families(conn, roots)
    late = {
        root
        for root, family in found.deletable.items()
        if any(
            member.namespace is not None
            and (member.namespace not in before or not member.ended_at or member.ended_at >= before[member.namespace])
            for member in family
        )
    }
    kept = {root: family for root, family in found.deletable.items() if root not in late}
    return Families(kept, found.held | late)


def with_old_logs(conn: sa.Connection, workflow_ids: Sequence[str], before: datetime) -> list[str]:
    """Returns those of these runs, and of their descendants, whose logs may be cut; see the module."""
    values = {"ids": list(workflow_ids), "before": before, "terminal": sorted(TERMINAL_STATUSES)}
    return [row[0] for row in conn.execute(_WITH_OLD_LOGS, values)]


def cut_logs(conn: sa.Connection, workflow_ids: Sequence[str], packs: int) -> list[str]:
    """Removes packs of logs from their beginnings, never the last one; returns the run of each removed pack.

    Args:
        conn: A transaction.
        workflow_ids: Whose logs.
        packs: At most so many; as many are returned when there may be more.
    """
    return [row[0] for row in conn.execute(_CUT, {"ids": list(workflow_ids), "packs": packs})]
