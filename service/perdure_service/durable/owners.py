"""Looks whether the runs executed here are still this process's: another one may have cancelled or taken them.

An execution that lost its run is fenced at its next commit anyway. One that only waits makes none, and would hold its
slot until its wait ends; so all are looked at together, in one query a second, and what is lost is marked dead.

The other way round, the database may have a run as running here that is not: the reply to a claim's COMMIT was lost,
so DBOS does not know what it took. Such a row is given back after a grace, if it was found twice under the same token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa
import structlog

from perdure_service.durable.executions import Execution, Executions, now_ms
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.transactions import QUEUE
from perdure_service.store import executors
from perdure_service.store.dbos_tables import STATUS
from perdure_service.store.sqlstates import reading, retrying

SETTLED_S = 3.0
"""How old an execution must be to be looked at: before its start or claim is committed, its row is not its own."""

GRACE_S = 10.0
"""How long the database may have a run as running here before it must be: a claim and its dispatch take a moment."""

LOOKS_PER_SEARCH = 5
"""After how many looks rows that nobody executes are searched for."""

log = structlog.get_logger()


class OwnerWatch:
    """Looks every `interval_s` from a thread of its own; costs nothing while nothing is executed."""

    def __init__(
        self,
        engine: sa.Engine,
        executor_id: str,
        executions: Executions,
        ledger: Ledger,
        hint: Callable[[Sequence[str]], None],
        interval_s: float,
    ) -> None:
        """Creates the watch.

        Args:
            engine: The database.
            executor_id: This process's.
            executions: What is executed here.
            ledger: Adopts what foreign clients made.
            hint: Told of runs that have news.
            interval_s: Seconds between two looks.
        """
        self._engine = engine
        self._executor_id = executor_id
        self._executions = executions
        self._ledger = ledger
        self._hint = hint
        self._interval_s = interval_s
        self._suspects: set[Execution] = set()
        self._missing: set[tuple[str, str | None]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="owner-watch", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def look(self) -> list[Execution]:
        """Marks every execution dead that has lost its run; returns those."""
        settled_ns = time.time_ns() - int(SETTLED_S * 1_000_000_000)
        watched = [one for one in self._executions if one.begun_ns < settled_ns]
        if not watched:
            return []
        owners = reading(self._engine, "owners.look", lambda conn: _owners(conn, watched))
        suspects = {one for one in watched if owners.get(one.key.workflow_id) != one.owner_xid}
        # Twice in a row: one that has just ended has no owner either, and is forgotten here a moment later.
        lost = [one for one in suspects & self._suspects if one in set(self._executions)]
        self._suspects = suspects
        for one in lost:
            self._executions.kill(one, "its run was taken away")
        return lost

    def search(self) -> list[str]:
        """Gives back runs that the database has as running here and that are not; returns their workflow ids."""
        running = reading(
            self._engine, "owners.search", lambda conn: executors.find_running(conn, self._executor_id, GRACE_S)
        )
        missing = {row for row in running if not self._executions.has(*row)}
        lost = sorted(missing & self._missing, key=str)
        self._missing = missing
        if not lost:
            return []
        given_back = retrying(
            self._engine,
            "owners.requeue_lost",
            lambda conn: executors.give_back_own(
                conn, dict(lost), QUEUE, now_ms(), self._ledger.adopt, "its executor never began it", recovered=True
            ),
        )
        ids = [one.workflow_id for one in given_back]
        self._hint(ids)
        return ids

    def _run(self) -> None:
        looks = 0
        while not self._stop.wait(self._interval_s):
            looks += 1
            try:
                for one in self.look():
                    log.info("execution.lost", run_id=one.key.run_id, execution=one.number)
                if looks % LOOKS_PER_SEARCH == 0:
                    for workflow_id in self.search():
                        log.warning("run.never_begun_given_back", workflow_id=workflow_id)
            except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                log.warning("owners.look_failed", error=type(error).__name__)


def _owners(conn: sa.Connection, executions: list[Execution]) -> dict[str, str | None]:
    rows = conn.execute(
        sa.text(f"SELECT workflow_uuid, owner_xid FROM {STATUS} WHERE workflow_uuid = ANY(:ids)"),
        {"ids": [one.key.workflow_id for one in executions]},
    )
    return {row[0]: row[1] for row in rows}
