"""Payloads: bytes that are too large for a row, kept once by their hash, and gone with the last run that uses them.

`perdure.payload` holds a payload's bytes in pieces of 512 KiB, from piece 0, as CockroachDB asks for rows under 1 MiB;
or, where an object store has them, one row of piece -1 that holds the object's key. Both kinds may be there side by
side, so a store can be configured, or taken away, while runs go on. `perdure.payload_use` says which run uses which.

**Who may write these rows?** Whoever commits a pointer to them, in that very transaction: it inserts its use, then
locks the payload's first row, or inserts it where there is none. Whoever deletes runs: it deletes their uses, locks
the first rows of what they had used, and then, in a later statement, deletes those that have no use left.

**What if we die on the next line?** Use, bytes and pointer are one commit. An object is written before, and is found
by the sweep when no row tells of it.

**What if the reply to COMMIT is lost?** The repeat finds its own use and its own bytes, and changes nothing.

**What if two do it at once?** Two that write the same bytes: the second waits at the key of the first row, and finds
it. One that writes and one that deletes meet at the lock of the first row. If the writer has it, the deleter's next
statement is newer than the writer's commit and sees the use. If the deleter has it, the writer finds the row gone, and
inserts the bytes anew. On CockroachDB each transaction is serializable by itself, and one of the two is repeated.
Several payloads are always locked in order of their hashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from perdure_service.domain.payloads import Pointer

PIECE_BYTES = 512 * 1024
OBJECT_PIECE = -1
"""The piece of a row that holds an object's key."""

_LOCK = sa.text(
    "SELECT sha256, piece FROM perdure.payload WHERE sha256 = ANY(:hashes) AND piece <= 0 ORDER BY sha256, piece "
    "FOR UPDATE"
)
_INSERT_USE = sa.text(
    "INSERT INTO perdure.payload_use (workflow_id, sha256, size_bytes) VALUES (:workflow_id, :sha256, :size_bytes) "
    "ON CONFLICT DO NOTHING"
)
# The first row is written, not only looked at: whoever comes second waits here, and then holds its lock.
_INSERT_FIRST = sa.text(
    "INSERT INTO perdure.payload (sha256, piece, data) VALUES (:sha256, :piece, :data) "
    "ON CONFLICT (sha256, piece) DO UPDATE SET piece = excluded.piece"
)
_INSERT_PIECE = sa.text(
    "INSERT INTO perdure.payload (sha256, piece, data) VALUES (:sha256, :piece, :data) ON CONFLICT DO NOTHING"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a payload are: the key of an object, or None for pieces in the table."""

    object_key: str | None


def use(conn: sa.Connection, workflow_id: str, pointer: Pointer, data: bytes, object_key: str | None = None) -> None:
    """Notes that a run uses a payload, and stores it if it is not there.

    Args:
        conn: The transaction that writes the pointer.
        workflow_id: The run.
        pointer: The payload.
        data: Its bytes.
        object_key: The object that holds them; None to keep them in the table.
    """
    conn.execute(_INSERT_USE, {"workflow_id": workflow_id, "sha256": pointer.sha256, "size_bytes": pointer.size_bytes})
    if conn.execute(_LOCK, {"hashes": [pointer.sha256]}).first() is not None:
        return
    if object_key is not None:
        first = {"sha256": pointer.sha256, "piece": OBJECT_PIECE, "data": object_key.encode()}
        conn.execute(_INSERT_FIRST, first)
        return
    for piece, start in enumerate(range(0, max(len(data), 1), PIECE_BYTES)):
        row = {"sha256": pointer.sha256, "piece": piece, "data": data[start : start + PIECE_BYTES]}
        conn.execute(_INSERT_PIECE if piece else _INSERT_FIRST, row)


def copy_uses(conn: sa.Connection, origins: Mapping[str, str]) -> None:
    """Makes copies of runs use what the runs use, in the transaction that copies them.

    Args:
        conn: The transaction.
        origins: The runs that were copied, by their copies.
    """
    for copy, origin in sorted(origins.items()):
        ids = {"origin": origin, "copy": copy}
        hashes = conn.execute(
            sa.text("SELECT sha256 FROM perdure.payload_use WHERE workflow_id = :origin"), ids
        ).scalars()
        found = list(hashes)
        if not found:
            continue
        conn.execute(_LOCK, {"hashes": found}).all()
        conn.execute(
            sa.text(
                "INSERT INTO perdure.payload_use (workflow_id, sha256, size_bytes) SELECT :copy, sha256, size_bytes "
                "FROM perdure.payload_use WHERE workflow_id = :origin ON CONFLICT DO NOTHING"
            ),
            ids,
        )


def forget(conn: sa.Connection, workflow_ids: Sequence[str]) -> list[str]:
    """Deletes the uses of runs, and the payloads that nobody uses then, in the transaction that deletes the runs.

    Returns:
        The keys of objects that nothing tells of any more; delete them after the commit.
    """
    hashes = sorted(
        set(
            conn.execute(
                sa.text("DELETE FROM perdure.payload_use WHERE workflow_id = ANY(:ids) RETURNING sha256"),
                {"ids": list(workflow_ids)},
            ).scalars()
        )
    )
    if not hashes:
        return []
    conn.execute(_LOCK, {"hashes": hashes}).all()
    unused = list(
        conn.execute(
            sa.text(
                "SELECT DISTINCT p.sha256 FROM perdure.payload AS p WHERE p.sha256 = ANY(:hashes) AND p.piece <= 0 "
                "AND NOT EXISTS (SELECT 1 FROM perdure.payload_use AS u WHERE u.sha256 = p.sha256)"
            ),
            {"hashes": hashes},
        ).scalars()
    )
    if not unused:
        return []
    objects = conn.execute(
        sa.text("SELECT data FROM perdure.payload WHERE sha256 = ANY(:unused) AND piece = :piece"),
        {"unused": unused, "piece": OBJECT_PIECE},
    ).scalars()
    keys = [bytes(data).decode() for data in objects]
    conn.execute(sa.text("DELETE FROM perdure.payload WHERE sha256 = ANY(:unused)"), {"unused": unused})
    return keys


def place(conn: sa.Connection, sha256: str) -> Place | None:
    """Returns where a payload's bytes are, None when there are none of this hash."""
    row = conn.execute(
        sa.text(
            "SELECT piece, CASE WHEN piece < 0 THEN data END AS data FROM perdure.payload "
            "WHERE sha256 = :sha256 AND piece <= 0 ORDER BY piece DESC LIMIT 1"
        ),
        {"sha256": sha256},
    ).first()
    if row is None:
        return None
    return Place(None if row.piece >= 0 else bytes(row.data).decode())


def read_piece(conn: sa.Connection, sha256: str, piece: int) -> bytes | None:
    """Returns a piece of a payload that is in the table, None behind the last one."""
    data = conn.execute(
        sa.text("SELECT data FROM perdure.payload WHERE sha256 = :sha256 AND piece = :piece"),
        {"sha256": sha256, "piece": piece},
    ).scalar()
    return None if data is None else bytes(data)


def is_used_by(conn: sa.Connection, workflow_id: str, sha256: str) -> bool:
    """Returns whether a run uses a payload: only then may its readers have it."""
    found = conn.execute(
        sa.text("SELECT 1 FROM perdure.payload_use WHERE workflow_id = :workflow_id AND sha256 = :sha256"),
        {"workflow_id": workflow_id, "sha256": sha256},
    ).first()
    return found is not None


def known_objects(conn: sa.Connection, hashes: Sequence[str]) -> set[str]:
    """Returns the keys of the objects that rows of these payloads tell of."""
    rows = conn.execute(
        sa.text("SELECT data FROM perdure.payload WHERE sha256 = ANY(:hashes) AND piece = :piece"),
        {"hashes": list(hashes), "piece": OBJECT_PIECE},
    ).scalars()
    return {bytes(data).decode() for data in rows}


def now(conn: sa.Connection) -> datetime:
    """Returns the database's time."""
    time: datetime = conn.execute(sa.text("SELECT now()")).scalar_one()
    return time
