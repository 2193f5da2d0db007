"""Looks whether the runs executed here are still this process's: another one may have cancelled or taken them.

An execution that lost its run is fenced at its next commit anyway. One that only waits makes none, and would hold its
slot until its wait ends; so all are looked at together, in one query a second, and what is lost is marked dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import sqlalchemy as sa
import structlog

from perdure_service.durable.executions import Execution, Executions
from perdure_service.store.dbos_tables import STATUS
from perdure_service.store.sqlstates import retrying

SETTLED_S = 3.0
"""How old an execution must be to be looked at: before its start or claim is committed, its row is not its own."""

log = structlog.get_logger()


class OwnerWatch:
    """Looks every `interval_s` from a thread of its own; costs nothing while nothing is executed."""

    def __init__(
        self, engine: sa.Engine, executions: Executions, over: Callable[[Execution, str], None], interval_s: float
    ) -> None:
        """Creates the watch.

        Args:
            engine: The database.
            executions: What is executed here.
            over: Told of each execution that has lost its run, and why.
            interval_s: Seconds between two looks.
        """
        self._engine = engine
        self._executions = executions
        self._over = over
        self._interval_s = interval_s
        self._suspects: set[Execution] = set()
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
        owners = retrying(self._engine, "owners.look", lambda conn: _owners(conn, watched))
        suspects = {one for one in watched if owners.get(one.key.workflow_id) != one.owner_xid}
        # Twice in a row: one that has just ended has no owner either, and is forgotten here a moment later.
        lost = [one for one in suspects & self._suspects if one in set(self._executions)]
        self._suspects = suspects
        for one in lost:
            self._executions.kill(one, "its run was taken away")
            self._over(one, "its run was taken away")
        return lost

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                for one in self.look():
                    log.info("execution.lost", run_id=one.key.run_id, execution=one.number)
            except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                log.warning("owners.look_failed", error=type(error).__name__)


def _owners(conn: sa.Connection, executions: list[Execution]) -> dict[str, str | None]:
    rows = conn.execute(
        sa.text(f"SELECT workflow_uuid, owner_xid FROM {STATUS} WHERE workflow_uuid = ANY(:ids)"),
        {"ids": [one.key.workflow_id for one in executions]},
    )
    return {row[0]: row[1] for row in rows}
