"""Reads what is recorded of a run, DBOS's checkpoints, in pages that are bounded in rows and in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from perdure_service.store.dbos_tables import OUTPUTS

PAGE_ROWS = 256
"""Operations that one read returns at most."""

PAGE_BYTES = 2**20
"""What they take at most, but for the last of them; what is larger than a row's share is stored apart (`payloads`)."""

# The size of a stored text is known without reading it, so the inner query fetches nothing large in vain.
_PAGE = sa.text(f"""
    SELECT function_id, function_name, output, error, serialization, child_workflow_id, found FROM (
        SELECT *, count(*) OVER () AS found, sum(coalesce(octet_length(output), 0) + coalesce(octet_length(error), 0))
                  OVER (ORDER BY function_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
        FROM (SELECT function_id, function_name, output, error, serialization, child_workflow_id FROM {OUTPUTS}
              WHERE workflow_uuid = :workflow_id AND function_id > :after
              ORDER BY function_id LIMIT :rows) AS page
    ) AS sized
    WHERE coalesce(bytes_before, 0) < :bytes
    ORDER BY function_id
""")


@dataclass(frozen=True, slots=True)
class RecordedOperation:
    """An operation of a run as DBOS has recorded it; output and error as they are stored."""

    function_id: int
    name: str
    output: str | None
    error: str | None
    serialization: str | None
    child_workflow_id: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """Recorded operations in order, and whether there are no more."""

    operations: Sequence[RecordedOperation]
    last: bool


def read(conn: sa.Connection, workflow_id: str, after: int) -> Page:
    """Returns the recorded operations of a run after a number."""
    rows = conn.execute(
        _PAGE, {"workflow_id": workflow_id, "after": after, "rows": PAGE_ROWS, "bytes": PAGE_BYTES}
    ).fetchall()
    operations = [RecordedOperation(int(row[0]), *row[1:6]) for row in rows]
    return Page(operations, last=not rows or len(rows) == rows[0].found < PAGE_ROWS)
