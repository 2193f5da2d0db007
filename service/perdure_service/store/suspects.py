"""The leases of other executors as somebody sees them who suspects that one is gone before its lease is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

_PEERS = sa.text("""
    SELECT executor_id, address, renewed_at, CAST(extract(epoch FROM now() - renewed_at) AS FLOAT8) AS silent_s
    FROM perdure.executor WHERE tombstoned_at IS NULL AND executor_id <> :executor_id
""")

_TOMBSTONE = sa.text("""
    UPDATE perdure.executor SET tombstoned_at = now()
    WHERE executor_id = :executor_id AND renewed_at = CAST(:renewed_at AS TIMESTAMPTZ) AND tombstoned_at IS NULL
""")


@dataclass(frozen=True, slots=True)
class Peer:
    """An executor whose claim has not ended.

    Attributes:
        address: Where it says it can be reached, `host:port`.
        renewed_at: When it renewed its lease last, by the database's clock.
        silent_s: How long ago that is.
    """

    executor_id: str
    address: str
    renewed_at: datetime
    silent_s: float


def peers(conn: sa.Connection, executor_id: str) -> Sequence[Peer]:
    """Returns the executors, but for one, whose claim has not ended."""
    return [Peer(*row) for row in conn.execute(_PEERS, {"executor_id": executor_id})]


def tombstone_unchanged(conn: sa.Connection, peer: Peer) -> bool:
    """Declares an executor gone if it has not renewed since it was seen; returns whether it is.

    As with an expired lease, the condition is in the statement: a renewal that came first wins, and one that comes
    later finds the tombstone. Repeated, because the reply to its COMMIT was lost, it returns False.
    """
    values = {"executor_id": peer.executor_id, "renewed_at": peer.renewed_at}
    return bool(conn.execute(_TOMBSTONE, values).rowcount)
