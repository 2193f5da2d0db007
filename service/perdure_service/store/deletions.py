"""Which runs may be deleted, together with which others, and what of them is ours.

A run goes with its descendants, its *family*. A family is left alone while one of it has not ended, and while somebody
who has not ended may still read the result of one of it: the run that started it, or a fork of either, as a fork has
taken over the steps that say which child to wait for. Forks of forks count, too. The chain to them breaks when a fork
between them is deleted, so what forks have recorded of children is looked at, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from perdure_service.domain.runs import TERMINAL_STATUSES, RunFilter, RunKey
from perdure_service.store import payloads, runs
from perdure_service.store.dbos_tables import OUTPUTS, STATUS

OUR_TABLES = ("run_event", "approval", "run")
"""Those that hold rows of a run, keyed by its workflow id."""

_FAMILIES = f"""
    families (root, workflow_id) AS (
        SELECT s.workflow_uuid, s.workflow_uuid FROM {STATUS} AS s WHERE s.workflow_uuid = ANY(:roots)
        UNION
        SELECT f.root, s.workflow_uuid FROM families AS f JOIN {STATUS} AS s ON s.parent_workflow_id = f.workflow_id
    )
"""

_MEMBERS = sa.text(f"""
    WITH RECURSIVE {_FAMILIES}
    SELECT f.root, f.workflow_id, r.run_id, r.created_at, r.namespace, r.ended_at
    FROM families AS f LEFT JOIN perdure.run AS r ON r.workflow_id = f.workflow_id
""")

_HELD = sa.text(f"""
    WITH RECURSIVE {_FAMILIES}, readers (root, workflow_id) AS (
        (SELECT f.root, f.workflow_id FROM families AS f
         UNION
         SELECT s.workflow_uuid, s.parent_workflow_id FROM {STATUS} AS s
         WHERE s.workflow_uuid = ANY(:roots) AND s.parent_workflow_id IS NOT NULL)
        UNION
        SELECT o.root, s.workflow_uuid FROM readers AS o JOIN {STATUS} AS s ON s.forked_from = o.workflow_id
    )
    SELECT DISTINCT o.root FROM readers AS o JOIN {STATUS} AS s ON s.workflow_uuid = o.workflow_id
    WHERE NOT s.status = ANY(:terminal)
""")

# There is no index of children; forks have one, are few, and so are their steps.
_NEEDED = sa.text(f"""
    SELECT DISTINCT o.child_workflow_id FROM {STATUS} AS s JOIN {OUTPUTS} AS o ON o.workflow_uuid = s.workflow_uuid
    WHERE s.forked_from IS NOT NULL AND NOT s.status = ANY(:terminal) AND o.child_workflow_id = ANY(:ids)
""")


@dataclass(frozen=True, slots=True)
class Member:
    """A run of a family. A child that a foreign client made may have no run of ours; it is named by its own id.

    Attributes:
        created_at: None when it has no run of ours.
        namespace: None likewise.
        ended_at: When its log was closed; None also while it is open.
    """

    workflow_id: str
    run_id: str
    created_at: datetime | None
    namespace: str | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Families:
    """Runs with their descendants.

    Attributes:
        deletable: The members of each family that may be deleted, by its root; the root is one of them.
        held: Roots of families that must be left alone.
    """

    deletable: Mapping[str, Sequence[Member]]
    held: frozenset[str]

    @property
    def workflow_ids(self) -> list[str]:
        """Everything that may be deleted, in order of ids."""
        return sorted({member.workflow_id for family in self.deletable.values() for member in family})


def families(conn: sa.Connection, roots: Sequence[str]) -> Families:
    """Returns the families of some runs, by workflow id; what does not exist is left out."""
    values = {"roots": list(roots), "terminal": sorted(TERMINAL_STATUSES)}
    held = {row[0] for row in conn.execute(_HELD, values)}
    found: dict[str, list[Member]] = {}
    for row in conn.execute(_MEMBERS, {"roots": list(roots)}):
        run_id = row.run_id or row.workflow_id
        member = Member(row.workflow_id, run_id, row.created_at, row.namespace, row.ended_at)
        found.setdefault(row.root, []).append(member)
    ids = sorted({member.workflow_id for family in found.values() for member in family})
    needed = {row[0] for row in conn.execute(_NEEDED, {"ids": ids, "terminal": values["terminal"]})}
    held |= {root for root, family in found.items() if any(member.workflow_id in needed for member in family)}
    return Families({root: family for root, family in found.items() if root not in held}, frozenset(held))


def lock(conn: sa.Connection, workflow_ids: Sequence[str]) -> Sequence[str]:
    """Locks status rows for their deletion, in order of ids; returns those that exist."""
    rows = conn.execute(
        sa.text(
            f"SELECT workflow_uuid FROM {STATUS} WHERE workflow_uuid = ANY(:ids) ORDER BY workflow_uuid FOR UPDATE"
        ),
        {"ids": list(workflow_ids)},
    )
    return [row[0] for row in rows]


def delete_ours(conn: sa.Connection, workflow_ids: Sequence[str]) -> list[str]:
    """Deletes our rows of these runs, in the transaction that deletes DBOS's.

    Returns:
        The keys of objects to delete after the commit; see `payloads.forget`.
    """
    for table in OUR_TABLES:
        conn.execute(sa.text(f"DELETE FROM perdure.{table} WHERE workflow_id = ANY(:ids)"), {"ids": list(workflow_ids)})
    return payloads.forget(conn, workflow_ids)


def find(conn: sa.Connection, namespace: str, run_ids: Sequence[str]) -> dict[str, str]:
    """Returns the workflow ids of those of these runs that exist, by run id."""
    keys = [key(namespace, run_id).workflow_id for run_id in run_ids for key in (RunKey.of_api, RunKey.foreign)]
    rows = conn.execute(
        sa.text(
            "SELECT run_id, workflow_id FROM perdure.run WHERE workflow_id = ANY(:keys) AND namespace = :namespace "
            "AND run_id = ANY(:run_ids)"
        ),
        {"keys": keys, "namespace": namespace, "run_ids": list(run_ids)},
    )
    return {row.run_id: row.workflow_id for row in rows}


def candidates(
    conn: sa.Connection, namespace: str, run_filter: RunFilter, after: tuple[datetime, str] | None, limit: int
) -> list[tuple[datetime, str]]:
    """Returns runs that have ended and satisfy a filter, oldest first: when they were created, and workflow ids.

    Args:
        conn: A transaction.
        namespace: Whose.
        run_filter: Which; without states, all that have ended.
        after: The last one seen; None for the beginning.
        limit: At most so many.
    """
    where, values = runs.conditions(namespace, run_filter)
    where.append("s.status = ANY(:terminal)")
    values |= {"terminal": sorted(TERMINAL_STATUSES), "limit": limit}
    if after is not None:
        where.append("(r.created_at, r.workflow_id) > (CAST(:at AS TIMESTAMPTZ), CAST(:workflow_id AS TEXT))")
        values |= {"at": after[0], "workflow_id": after[1]}
    query = sa.text(
        f"SELECT r.created_at, r.workflow_id FROM perdure.run AS r JOIN {STATUS} AS s "
        f"ON s.workflow_uuid = r.workflow_id WHERE {' AND '.join(where)} "
        "ORDER BY r.created_at, r.workflow_id LIMIT :limit"
    )
    return [(row.created_at, row.workflow_id) for row in conn.execute(query, values)]


def gone(conn: sa.Connection, workflow_ids: Sequence[str]) -> list[str]:
    """Returns those of these runs that do not exist any more."""
    rows = conn.execute(
        sa.text(
            "SELECT w.id FROM unnest(CAST(:ids AS TEXT[])) AS w (id) "
            "WHERE NOT EXISTS (SELECT 1 FROM perdure.run AS r WHERE r.workflow_id = w.id)"
        ),
        {"ids": list(workflow_ids)},
    )
    return [row[0] for row in rows]


def in_batches(found: Families, most: int) -> Iterator[Families]:
    """Yields the families that may be deleted in groups of about `most` runs; a family is never divided."""
    batch: dict[str, Sequence[Member]] = {}
    size = 0
    for root, family in found.deletable.items():
        if batch and size + len(family) > most:
            yield Families(batch, frozenset())
            batch, size = {}, 0
        batch[root] = family
        size += len(family)
    if batch:
        yield Families(batch, frozenset())
