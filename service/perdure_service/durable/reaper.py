"""Takes back the runs of executors that are gone: whose lease has expired, or was ended.

Every executor reaps, at its start and then about as often as it renews its lease, each at other moments (jitter). It
does so from a thread of its own, as a long take-back must not delay a renewal, and only while its own lease has held
without a lapse for one time to live: after an outage of the database everyone looks dead, and everyone must have had
the time to say otherwise. `dev` owns its database, so what another process left is taken back at once.

**Who may write these rows?** Everyone: the tombstone is set by compare-and-set, in the transaction that gives back what
the dead one had, and a run's status row is locked first. **What if we die on the next line?** Before COMMIT nothing has
happened; after it the rule "no live executor", which is no list of the dead, gives back whatever is left. **If the
reply to COMMIT is lost?** The repeat finds nothing to do. **If two reap at once?** One sets the tombstone; of the rows
each skips what the other one has locked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import sqlalchemy as sa
import structlog

from perdure_service.durable.executions import now_ms
from perdure_service.durable.leases import Lease, renewal_interval_s
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.transactions import QUEUE
from perdure_service.store import executors
from perdure_service.store.sqlstates import JITTER, retrying

MAX_BATCHES = 1_000
"""Batches that one take-back works through; the rest waits for the next."""

log = structlog.get_logger()


class Reaper:
    """See the module."""

    def __init__(
        self,
        engine: sa.Engine,
        executor_id: str,
        *,
        lease: Lease,
        ttl: timedelta,
        ledger: Ledger,
        hint: Callable[[Sequence[str]], None],
        gone: Callable[[Sequence[str]], None],
        owns_database: bool,
    ) -> None:
        """Creates the reaper.

        Args:
            engine: The database.
            executor_id: This process's; it does not reap itself.
            lease: Says whether this executor may judge others.
            ttl: The time to live of all leases.
            ledger: Writes the logs of runs that are given back.
            hint: Told of runs that have news.
            gone: Told of executors that this one has declared gone.
            owns_database: Whether no other executor can be alive (`dev`).
        """
        self._engine = engine
        self._executor_id = executor_id
        self._lease = lease
        self._ttl = ttl
        self._ledger = ledger
        self._hint = hint
        self._gone = gone
        self._owns_database = owns_database
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> int:
        """Takes back what was left behind, and goes on looking; returns how many runs were given back."""
        if self._owns_database:
            others = retrying(
                self._engine, "reaper.alone", lambda conn: executors.tombstone_others(conn, self._executor_id)
            )
            if others:
                self._gone(sorted(others))
        count = self.take_back()
        self._thread.start()
        return count

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def take_back(self) -> int:
        """Gives back the runs of executors that are gone, with their events; returns how many."""
        count = 0
        declared_gone: set[str] = set()

        def reap(conn: sa.Connection) -> list[executors.Requeued]:
            declared_gone.update(executors.tombstone_expired(conn, self._executor_id))
            return executors.requeue_orphans(conn, QUEUE, now_ms(), self._ledger.adopt)

        for _ in range(MAX_BATCHES):
            batch = retrying(self._engine, "reaper.take_back", reap)
            count += len(batch)
            self._hint([one.workflow_id for one in batch])
            for one in batch:
                log.info("run.taken_back", workflow_id=one.workflow_id, from_executor_id=one.from_executor_id)
            if len(batch) < executors.BATCH:
                break
        if declared_gone:
            log.warning("executor.declared_gone", executor_ids=sorted(declared_gone))
            self._gone(sorted(declared_gone))
        return count

    def _run(self) -> None:
        while not self._stop.wait(renewal_interval_s(self._ttl) * JITTER.uniform(0.5, 1.5)):
            if not self._lease.held_for(self._ttl):
                continue
            try:
                self.take_back()
            except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                log.warning("reaper.failed", error=type(error).__name__)
