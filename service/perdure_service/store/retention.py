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

# Level by level, by keys: a recursive statement is guessed to be large, and then reads whole tables.
_RUNS = f"""
    SELECT r.workflow_id, r.parent_workflow_id,
      coalesce(r.ended_at < CAST(:before AS TIMESTAMPTZ) AND s.status = ANY(:terminal), false) AS old
    FROM perdure.run AS r JOIN {STATUS} AS s ON s.workflow_uuid = r.workflow_id
"""
_BY_ID = sa.text(f"{_RUNS} WHERE r.workflow_id = ANY(:ids)")
_BY_PARENT = sa.text(f"{_RUNS} WHERE r.parent_workflow_id = ANY(:ids)")

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
    values = {"before": before, "terminal": sorted(TERMINAL_STATUSES)}
    old: dict[str, bool] = {}
    parents: dict[str, str | None] = {}
    ids = set(workflow_ids)
    while ids:
        for row in conn.execute(_BY_ID, {**values, "ids": sorted(ids)}):
            old[row.workflow_id], parents[row.workflow_id] = row.old, row.parent_workflow_id
        ids = {parent for one in ids if (parent := parents.get(one)) is not None} - parents.keys()

    def is_free(one: str | None) -> bool:
        while one in old:  # up to the run that heads the family, or whose parent is not there
            if not old[one]:
                return False
            one = parents[one]
        return True

    level = [one for one in workflow_ids if one in old and is_free(one)]
    found = set(level)
    while level:
        rows = conn.execute(_BY_PARENT, {**values, "ids": level})
        level = sorted({row.workflow_id for row in rows if row.old} - found)
        found.update(level)
    return sorted(found)


def cut_logs(conn: sa.Connection, workflow_ids: Sequence[str], packs: int) -> list[str]:
    """Removes packs of logs from their beginnings, never the last one; returns the run of each removed pack.

    Args:
        conn: A transaction.
        workflow_ids: Whose logs.
        packs: At most so many; as many are returned when there may be more.
    """
    return [row[0] for row in conn.execute(_CUT, {"ids": list(workflow_ids), "packs": packs})]
