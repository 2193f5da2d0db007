"""Counts the runs that have not ended, for metrics: by agent and state, in one bounded query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa

from perdure_service.domain.runs import RunState, derive_state
from perdure_service.store.dbos_tables import APPLICATION, STATUS

MAX_RUNS = 100_000
"""Runs that are counted at most: a fraction of a second's work. Where there are more, the counts say this many."""

# The state is derived in one place, `derive_state`; here its arguments are grouped. A run is in the queue since it was
# created, released or given back, whichever was last.
_COUNT = sa.text(f"""
    SELECT agent, status, waiting_for, has_begun, asks, count(*) AS runs, max(queued_ms) AS queued_ms FROM (
        SELECT r.agent, s.status, r.execution > 0 AS has_begun,
            CASE WHEN r.waiting_for LIKE 'signal%' THEN 'signal' ELSE r.waiting_for END AS waiting_for,
            EXISTS (SELECT 1 FROM perdure.approval AS a
                    WHERE a.workflow_id = r.workflow_id AND a.state = 'PENDING') AS asks,
            CAST(extract(epoch FROM now()) * 1000 AS BIGINT)
                - greatest(s.created_at, s.updated_at, coalesce(s.delay_until_epoch_ms, 0)) AS queued_ms
        FROM {STATUS} AS s JOIN perdure.run AS r ON r.workflow_id = s.workflow_uuid
        WHERE s.status IN ('ENQUEUED', 'PENDING', 'DELAYED') AND s.application_name = :application LIMIT :limit
    ) AS one
    GROUP BY agent, status, waiting_for, has_begun, asks
""")


@dataclass(frozen=True, slots=True)
class OpenRunCounts:
    """How many runs there are of each agent in each state, and the age of the oldest in the queue, in seconds."""

    runs: Mapping[tuple[str, RunState], int] = field(default_factory=dict)
    queue_age_s: float = 0.0


def count_open(conn: sa.Connection) -> OpenRunCounts:
    """Returns the counts of runs that have not ended."""
    counts: Counter[tuple[str, RunState]] = Counter()
    queue_age_ms = 0
    for row in conn.execute(_COUNT, {"application": APPLICATION, "limit": MAX_RUNS}):
        state = derive_state(
            row.status,
            waiting_for=row.waiting_for,
            open_approvals=int(row.asks),
            end_reason=None,
            execution=int(row.has_begun),
        )
        counts[row.agent, state] += row.runs
        if state is RunState.QUEUED:
            queue_age_ms = max(queue_age_ms, int(row.queued_ms))
    return OpenRunCounts(dict(counts), queue_age_ms / 1000)
