"""Removes what is no longer kept: runs that ended long ago, in whole families, and before that their logs.

Every server does it, at moments of its own, a bounded piece at a time, so that no one of them has to live.

**Who may write these rows?** As for `deletions`, whose transaction this is: a run that has ended is written by nobody,
and what somebody may still read is left alone. The rules are looked at once more under the locks, ages included: an id
that was deleted and started anew in between is another run. Of a log everything but the last pack goes. A run that a
foreign client revives meanwhile appends behind that pack, so no number comes twice.

**What if we die on the next line?** A batch is one commit: whole families are gone, the others are whole. Logs are cut
from their beginnings, so what is left of one is always its end, without a hole. The next round, of whichever server,
goes on.

**What if the reply to COMMIT is lost?** The transaction is repeated and finds less; nothing is counted on but the log
line.

**What if two do it at once?** The second one waits for the locks, finds that there is less than it had planned, and
leaves the rest of that batch for its next round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Literal

import sqlalchemy as sa
import structlog

from perdure_service.durable.deletions import BATCH_RUNS, Changed, delete_families
from perdure_service.durable.runtime import Runtime
from perdure_service.store import deletions, retention
from perdure_service.store.retention import Ended
from perdure_service.store.sqlstates import JITTER, reading, retrying
from perdure_service.telemetry import METERS
from perdure_service.telemetry import metrics as m

PAGE_RUNS = 200
"""Runs that one statement looks for."""
ROUND_RUNS = 2_000
"""Runs of one namespace that one round looks at."""
ROUND_PATIENCE_S = 5.0
"""How long a round begins something new."""
CUT_PACKS = 2_000
"""Packs of logs that one transaction removes."""
LONGEST_REST_S = 60.0
"""Between two rounds, when the last one has left nothing."""
RESTS_PER_RETENTION = 100
"""How many rests at least fit into the shortest time that something is kept."""
SHORTEST_REST_S = 0.2
FULL_PASS_S = 6 * 3_600.0
"""After this all old runs are looked at for their logs again, not only those that have grown old since: should one have
ended out of turn, as its transaction took that long."""

log = structlog.get_logger()

_What = Literal["run", "log"]


@dataclass(slots=True)
class _Pass:
    """How far the runs of a namespace have been looked at, from the one that ended first.

    Attributes:
        after: The last one; None at the beginning.
        begun_s: When it began, by the monotonic clock.
    """

    after: Ended | None = None
    begun_s: float = field(default_factory=time.monotonic)


class Retention:
    """See the module. Works in a thread of its own; `stop` it before the runtime."""

    def __init__(
        self, runtime: Runtime, kept: Mapping[str, timedelta | None], events_kept: timedelta | None = None
    ) -> None:
        """Creates it.

        Args:
            runtime: The engine.
            kept: How long after their end runs are kept in each namespace; None is for ever.
            events_kept: How long after their end logs are; None is as long as the runs.
        """
        self._runtime = runtime
        self._kept = dict(kept)
        self._events_kept = events_kept
        times = [one for one in (*kept.values(), events_kept) if one is not None]
        self._idle = not times
        shortest_s = min(times, default=timedelta()).total_seconds()
        self._rest_s = max(SHORTEST_REST_S, min(LONGEST_REST_S, shortest_s / RESTS_PER_RETENTION))
        self._passes: dict[tuple[str, _What], _Pass] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Begins; does nothing where everything is kept for ever."""
        if not self._idle:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the transaction that it is in."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def round(self) -> bool:
        """Removes a bounded piece of what is no longer kept; returns whether there is more to look at. Blocks."""
        deadline = time.monotonic() + ROUND_PATIENCE_S
        now = reading(self._runtime.engine, "retention.now", retention.now)
        before = {name: now - kept for name, kept in self._kept.items() if kept is not None}
        more = False
        for namespace in self._kept:
            if namespace in before:
                more |= self._delete_expired(namespace, before, deadline)
            if self._events_kept is not None:
                more |= self._cut_logs(namespace, now - self._events_kept, deadline)
        return more

    def _run(self) -> None:
        rest_s = self._rest_s
        while not self._stop.wait(rest_s * JITTER.uniform(0.5, 1.5)):
            began = time.monotonic()
            rest_s = self._rest_s
            try:
                if self.round():
                    # Half of the time, until what has piled up is gone.
                    rest_s = max(SHORTEST_REST_S, time.monotonic() - began)
            except Exception as error:  # noqa: BLE001 - logged; the next round tries again
                log.warning("retention.failed", error=type(error).__name__)

    # ---- runs --------------------------------------------------------------------------------------------------------

    def _delete_expired(self, namespace: str, before: Mapping[str, datetime], deadline: float) -> bool:
        """Deletes families of a namespace; returns whether there is more to look at."""
        this = self._passes.setdefault((namespace, "run"), _Pass())
        plan = partial(retention.expired_families, before=before)
        deleted = looked_at = 0
        more = True
        while more and looked_at < ROUND_RUNS and self._goes_on(deadline):
            page = self._page(namespace, before[namespace], this.after)
            looked_at += len(page)
            roots = [one.workflow_id for one in page if one.is_root]
            if roots:
                found = retrying(self._runtime.engine, "retention.plan", lambda conn, roots=roots: plan(conn, roots))  # type: ignore[misc]
                for batch in deletions.in_batches(found, BATCH_RUNS):
                    if not self._goes_on(deadline + ROUND_PATIENCE_S):
                        break
                    try:
                        delete_families(self._runtime, batch, plan)
                    except Changed:
                        continue  # by another server, or by a fork; what is left is for the next pass
                    deleted += len(batch.workflow_ids)
            more = len(page) == PAGE_RUNS
            this.after = page[-1] if more else None  # at the end: again from the beginning, for what was held
        if deleted:
            METERS.add(m.RETENTION_RUNS, {}, deleted)
            log.info("retention.deleted", namespace=namespace, count=deleted)
        return more and deleted > 0  # what is held is not looked at without a rest

    # ---- logs --------------------------------------------------------------------------------------------------------

    def _cut_logs(self, namespace: str, before: datetime, deadline: float) -> bool:
        """Cuts logs of a namespace; returns whether there is more to look at."""
        this = self._passes.setdefault((namespace, "log"), _Pass())
        if time.monotonic() - this.begun_s > FULL_PASS_S:
            this = self._passes[namespace, "log"] = _Pass()
        runs: set[str] = set()
        packs = looked_at = 0
        more = True
        while more and looked_at < ROUND_RUNS and self._goes_on(deadline):
            page = self._page(namespace, before, this.after)
            looked_at += len(page)
            cut = self._cut([one.workflow_id for one in page], before)
            runs.update(cut)
            packs += len(cut)
            if len(cut) == CUT_PACKS:
                continue  # with the same page
            more = len(page) == PAGE_RUNS
            this.after = page[-1] if page else this.after
        if runs:
            METERS.add(m.RETENTION_LOGS, {}, len(runs))
            log.info("retention.logs_cut", namespace=namespace, count=len(runs), packs=packs)
        return more

    def _cut(self, workflow_ids: Sequence[str], before: datetime) -> list[str]:
        def cut(conn: sa.Connection) -> list[str]:
            old = retention.with_old_logs(conn, workflow_ids, before)
            return retention.cut_logs(conn, old, CUT_PACKS) if old else []

        return retrying(self._runtime.engine, "retention.cut_logs", cut)

    def _page(self, namespace: str, before: datetime, after: Ended | None) -> list[Ended]:
        return reading(
            self._runtime.engine,
            "retention.ended",
            lambda conn: retention.ended(conn, namespace, before, after, PAGE_RUNS),
        )

    def _goes_on(self, deadline: float) -> bool:
        return not self._stop.is_set() and time.monotonic() < deadline
