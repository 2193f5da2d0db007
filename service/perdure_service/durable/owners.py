"""Looks whether the runs executed here are still this process's: another one may have cancelled or taken them.

An execution that lost its run is fenced at its next commit anyway. One that only waits makes none, and would hold its
slot until its wait ends; so all are looked at together, in one query a second, and what is lost is marked dead. Where
hints of other servers arrive, runs that somebody else has changed are looked at within milliseconds, and all together
less often.

The other way round, the database may have a run as running here that is not: the reply to a claim's COMMIT was lost,
so DBOS does not know what it took. Such a row is given back after a grace, if it was found twice under the same token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa
import structlog

from perdure_service.durable.executions import Execution, Executions, now_ms
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.transactions import QUEUE
from perdure_service.store import executors
from perdure_service.store.dbos_tables import STATUS
from perdure_service.store.sqlstates import reading, retrying
from perdure_service.store.tailer import HINTED_POLL_FACTOR

SETTLED_S = 3.0
"""How old an execution must be to be looked at: before its start or claim is committed, its row is not its own."""

GRACE_S = 10.0
"""How long the database may have a run as running here before it must be: a claim and its dispatch take a moment."""

SEARCH_S = 5.0
"""How often rows that nobody executes are searched for."""

PAUSE_S = 0.1
"""Between two looks for hints: where a feed tells of this process's own commits, too, they come all the time."""

OWN_ENDS = frozenset({"SUCCESS", "ERROR"})
"""Statuses that a run is given by its own execution, which leaves a moment later."""

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
        hinted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Creates the watch.

        Args:
            engine: The database.
            executor_id: This process's.
            executions: What is executed here.
            ledger: Adopts what foreign clients made.
            hint: Told of runs that have news.
            interval_s: Seconds between two looks.
            hinted: Whether hints of other servers are known to arrive.
        """
        self._hinted = hinted
        self._changed: set[str] = set()
        self._all_changed = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
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
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def look(self) -> list[Execution]:
        """Marks every execution dead that has lost its run; returns those."""
        settled_ns = time.time_ns() - int(SETTLED_S * 1_000_000_000)
        watched = [one for one in self._executions if one.begun_ns < settled_ns]
        if not watched:
            return []
        owners = self._owners(watched)
        suspects = {one for one in watched if owners.get(one.key.workflow_id, NOBODY)[0] != one.owner_xid}
        # Twice in a row: one that has just ended has no owner either, and is forgotten here a moment later.
        lost = [one for one in suspects & self._suspects if one in set(self._executions)]
        self._suspects = suspects
        self._kill(lost)
        return lost

    def changed(self, workflow_ids: Collection[str] | None) -> None:
        """Says that somebody else may have changed these runs, None for all; from any thread, and returns at once."""
        if not len(self._executions):
            return
        with self._lock:
            if workflow_ids is None:
                self._all_changed = True
            else:
                self._changed.update(workflow_ids)
        self._wake.set()

    def look_at(self, workflow_ids: Collection[str] | None) -> list[Execution]:
        """Marks those of the executions dead that have lost one of these runs, None for any; returns them.

        One look is enough here. Who has a task or thread of his own began after his claim was committed, so the row
        was his; and by an own end, after which he leaves in a moment, it has another status.
        """
        begun = [
            one
            for one in self._executions
            if not one.inline and (workflow_ids is None or one.key.workflow_id in workflow_ids)
        ]
        owners = self._owners(begun) if begun else {}
        lost = []
        for one in begun:
            owner, status = owners.get(one.key.workflow_id, NOBODY)
            if owner != one.owner_xid and status not in OWN_ENDS:
                lost.append(one)
        self._kill(lost)
        return lost

    def _kill(self, lost: Sequence[Execution]) -> None:
        for one in lost:
            self._executions.kill(one, "its run was taken away")
            log.info("execution.lost", run_id=one.key.run_id, execution=one.number)

    def _owners(self, executions: Sequence[Execution]) -> dict[str, tuple[str | None, str]]:
        return reading(self._engine, "owners.look", lambda conn: _owners(conn, executions))

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
        last_look = last_search = time.monotonic()
        while not self._stop.is_set():
            interval_s = self._interval_s * (HINTED_POLL_FACTOR if self._hinted() else 1)
            next_at = min(last_look + interval_s, last_search + SEARCH_S)
            if self._wake.wait(max(0.0, next_at - time.monotonic())):
                self._wake.clear()
                if self._stop.is_set():
                    return
            now = time.monotonic()
            with self._lock:
                changed, everything = self._changed, self._all_changed
                self._changed, self._all_changed = set(), False
            try:
                if changed or everything:
                    self.look_at(None if everything else changed)
                    self._stop.wait(PAUSE_S)
                if now >= last_look + interval_s:
                    last_look = now
                    self.look()
                if now >= last_search + SEARCH_S:
                    last_search = now
                    for workflow_id in self.search():
                        log.warning("run.never_begun_given_back", workflow_id=workflow_id)
            except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                log.warning("owners.look_failed", error=type(error).__name__)


NOBODY = (None, "")


def _owners(conn: sa.Connection, executions: Sequence[Execution]) -> dict[str, tuple[str | None, str]]:
    rows = conn.execute(
        sa.text(f"SELECT workflow_uuid, owner_xid, status FROM {STATUS} WHERE workflow_uuid = ANY(:ids)"),
        {"ids": [one.key.workflow_id for one in executions]},
    )
    return {row[0]: (row[1], row[2]) for row in rows}
