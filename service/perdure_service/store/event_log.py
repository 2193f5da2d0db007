"""The event log: appends packs and reads them back.

**Appending.** Whoever appends to a run's log holds the lock of the run's row in DBOS's status table (`FOR NO KEY
UPDATE`), taken by an *earlier statement* of the same transaction, so that the append's snapshot is newer than the
lock. Then one statement reads the end of the log and inserts behind it. The key (workflow_id, first_sequence) refuses
anyone who did not hold the lock.

**What if we die on the next line?** The pack and the checkpoint are one transaction: both are there or neither.

**What if the reply to COMMIT is lost?** The caller repeats its transaction with the same `Pack`, which knows the
sequence it was given; when a pack with our id lies there, it was committed, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from perdure_service.domain.events import Event, Pack, decode_events, encode_events

PAGE_PACKS = 64
"""Packs that one read returns at most; a reader that wants more reads again."""

NEWS_PACKS = 1_000
"""Packs that one look at many runs returns at most."""

_APPEND = sa.text("""
    INSERT INTO perdure.run_event (workflow_id, first_sequence, event_count, pack_id, previous_first, events)
    SELECT CAST(:workflow_id AS TEXT), coalesce(tail.first_sequence + tail.event_count, 1), CAST(:event_count AS INT),
           CAST(:pack_id AS TEXT), tail.first_sequence, CAST(:events AS TEXT)
    FROM (SELECT 1 AS one) AS one
    LEFT JOIN (SELECT first_sequence, event_count FROM perdure.run_event
               WHERE workflow_id = :workflow_id ORDER BY first_sequence DESC LIMIT 1) AS tail ON one.one = 1
    RETURNING first_sequence
""")

_PACK_AT = sa.text(
    "SELECT pack_id FROM perdure.run_event WHERE workflow_id = :workflow_id AND first_sequence = :first_sequence"
)

_READ = sa.text("""
    SELECT first_sequence, events FROM perdure.run_event
    WHERE workflow_id = :workflow_id
      AND first_sequence >= coalesce((SELECT max(first_sequence) FROM perdure.run_event
                                      WHERE workflow_id = :workflow_id AND first_sequence <= :next_sequence), 0)
    ORDER BY first_sequence LIMIT :packs
""")

_NEWS = sa.text("""
    SELECT e.workflow_id, e.first_sequence, e.events
    FROM unnest(CAST(:workflow_ids AS TEXT[]), CAST(:sequences AS BIGINT[])) AS watched (workflow_id, sequence)
    JOIN perdure.run_event AS e ON e.workflow_id = watched.workflow_id AND e.first_sequence > watched.sequence
    ORDER BY e.workflow_id, e.first_sequence LIMIT :packs
""")

_LAST = sa.text("""
    SELECT first_sequence + event_count - 1 FROM perdure.run_event
    WHERE workflow_id = :workflow_id ORDER BY first_sequence DESC LIMIT 1
""")

_FIRST = sa.text("SELECT min(first_sequence) FROM perdure.run_event WHERE workflow_id = :workflow_id")


def append(conn: sa.Connection, pack: Pack) -> bool:
    """Appends a pack behind the end of its run's log and tells the pack where.

    Args:
        conn: A transaction that holds the lock of the run's status row.
        pack: At least one event. Presented again, it is written once.

    Returns:
        False when the pack had been committed before.
    """
    if is_committed(conn, pack):
        return False
    pack.first_sequence = conn.execute(
        _APPEND,
        {
            "workflow_id": pack.workflow_id,
            "event_count": len(pack.events),
            "pack_id": pack.pack_id,
            "events": encode_events(pack.events),
        },
    ).scalar_one()
    return True


def is_committed(conn: sa.Connection, pack: Pack) -> bool:
    """Returns whether a pack that was presented before lies in the log; asks nothing about a new one."""
    if pack.first_sequence is None:
        return False
    place = {"workflow_id": pack.workflow_id, "first_sequence": pack.first_sequence}
    return bool(conn.execute(_PACK_AT, place).scalar() == pack.pack_id)


def read(conn: sa.Connection, workflow_id: str, after_sequence: int, packs: int = PAGE_PACKS) -> list[Event]:
    """Returns the events after a sequence in order: those of at most `packs` packs; empty at the end of the log."""
    rows = conn.execute(
        _READ, {"workflow_id": workflow_id, "next_sequence": after_sequence + 1, "packs": packs}
    ).fetchall()
    events = [event for first, text in rows for event in decode_events(text, first)]
    return [event for event in events if event.sequence > after_sequence]


def last_sequence(conn: sa.Connection, workflow_id: str) -> int:
    """Returns the number of events of a run; 0 when it has no log."""
    return int(conn.execute(_LAST, {"workflow_id": workflow_id}).scalar() or 0)


def earliest_sequence(conn: sa.Connection, workflow_id: str) -> int:
    """Returns the sequence of the first event that is kept; 1 for a log that has never been cut."""
    return int(conn.execute(_FIRST, {"workflow_id": workflow_id}).scalar() or 1)


@dataclass(frozen=True, slots=True)
class News:
    """A pack that a watched run has gained."""

    workflow_id: str
    first_sequence: int
    events: tuple[Event, ...]


def news(conn: sa.Connection, seen: Mapping[str, int], packs: int = NEWS_PACKS) -> Sequence[News]:
    """Returns the packs of many runs that begin after what has been seen of each, in one statement."""
    rows = conn.execute(
        _NEWS, {"workflow_ids": list(seen), "sequences": list(seen.values()), "packs": packs}
    ).fetchall()
    return [News(workflow_id, first, tuple(decode_events(text, first))) for workflow_id, first, text in rows]
