"""This executor's claim to be alive, and taking back the runs of executors that no longer are.

Only being *tombstoned* ends a claim: the reaper sets the tombstone by compare-and-set, and a renewal that comes late to
a row without one succeeds, so a database pause of minutes costs nothing. Past its time to live an executor starts no
step body and waits (`gate`); tombstoned, it marks its executions dead and ends.

Who looks after the dead: each executor, at its start and then every third of the time to live, but not before one time
to live has passed since its own first renewal (after an outage everyone looks dead). `dev` owns its database, so what
another process left is taken back at once.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import sqlalchemy as sa
import structlog

from perdure_service.durable.executions import Executions, now_ms
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.transactions import QUEUE
from perdure_service.store import executors
from perdure_service.store.sqlstates import retrying

log = structlog.get_logger()

GATE_POLL_S = 0.1
"""How often a step that may not begin looks whether it may."""

MAX_BATCHES = 1_000
"""Batches that one take-back works through; the rest waits for the next."""


SHORTEST_STATEMENT_TIMEOUT = timedelta(seconds=1)


def lease_statement_timeout(ttl: timedelta) -> timedelta:
    """Returns how long a statement about leases may take: so short that a renewal that hangs is tried once more."""
    return max(ttl / 4, SHORTEST_STATEMENT_TIMEOUT)


def new_executor_id() -> str:
    """Returns an id that no process has had before: host name and 8 random hex digits."""
    return f"{socket.gethostname()[:40].lower()}-{secrets.token_hex(4)}"


class Lease:
    """The lease of this process."""

    def __init__(
        self,
        engine: sa.Engine,
        executor_id: str,
        *,
        application_version: str,
        address: str,
        max_running: int,
        ttl: timedelta,
        executions: Executions,
        ledger: Ledger,
        hint: Callable[[Sequence[str]], None],
        lost: Callable[[], None],
        owns_database: bool,
        gone: Callable[[Sequence[str]], None] = lambda _executor_ids: None,
        agents: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """Creates the lease; `start` takes it.

        Args:
            engine: The database.
            executor_id: This process's id, new at every start.
            application_version: The version whose runs it can continue.
            address: Where it can be reached.
            max_running: How many runs it takes.
            ttl: How long it counts as alive after a renewal.
            executions: What it runs.
            ledger: Writes the logs of runs that are given back.
            hint: Told of runs that have news.
            lost: Called once when this executor was declared gone; it must end the process.
            owns_database: Whether no other executor can be alive (`dev`).
            gone: Told of executors that this one has declared gone.
            agents: Returns the names of the workflows that it has, asked at its start.
        """
        self._engine = engine
        self._executor_id = executor_id
        self._application_version = application_version
        self._address = address
        self._max_running = max_running
        self._ttl = ttl
        self._executions = executions
        self._ledger = ledger
        self._hint = hint
        self._lost = lost
        self._owns_database = owns_database
        self._gone = gone
        self._agents = agents
        self._declared_gone: set[str] = set()
        self._valid_until = 0.0
        self._first_success = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> int:
        """Takes the lease, gives back the runs of executors without one, and begins to renew.

        Returns:
            How many runs were given back.
        """

        def register(conn: sa.Connection) -> None:
            executors.register(
                conn,
                self._executor_id,
                application_version=self._application_version,
                address=self._address,
                max_running=self._max_running,
                ttl=self._ttl,
                agents=self._agents(),
            )
            if self._owns_database:
                self._declared_gone.update(executors.tombstone_others(conn, self._executor_id))

        before = time.monotonic()
        retrying(self._engine, "lease.register", register)
        self._valid_until = before + self._ttl.total_seconds()
        self._first_success = before
        requeued = self.take_back()
        self._thread.start()
        return requeued

    def stop(self) -> None:
        """Ends the lease and gives back what is left of this executor's runs, so that others go on at once."""
        self.forget()
        try:
            retrying(self._engine, "lease.remove", lambda conn: executors.remove(conn, self._executor_id))
            self.take_back()
        except Exception as error:  # noqa: BLE001 - logged; the next renewal tries again
            log.warning("lease.stop_failed", error=type(error).__name__)

    def forget(self) -> None:
        """Ends the thread and leaves the lease as it is, as a killed process does."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @property
    def open(self) -> bool:
        """Whether a step body may begin: past its time to live this executor may be taken for dead."""
        return time.monotonic() < self._valid_until or self._stop.is_set()

    def gate(self) -> None:
        """Waits until a step body may begin. Blocks the thread."""
        while not self.open:
            time.sleep(GATE_POLL_S)

    async def gate_async(self) -> None:
        """Waits until a step body may begin, and lets the loop go on with those that have begun."""
        while not self.open:  # noqa: ASYNC110 - renewed by another thread; seldom waited for
            await asyncio.sleep(GATE_POLL_S)

    def _requeue(self, conn: sa.Connection) -> list[executors.Requeued]:
        """Declares the expired gone and gives back what they had, in one transaction."""
        self._declared_gone.update(executors.tombstone_expired(conn, self._executor_id))
        return executors.requeue_orphans(conn, QUEUE, now_ms(), self._ledger.adopt)

    def take_back(self) -> int:
        """Gives back the runs of executors that are gone, with their events; returns how many."""
        count = 0
        for _ in range(MAX_BATCHES):
            batch = retrying(
                self._engine,
                "lease.requeue_orphans",
                self._requeue,
            )
            count += len(batch)
            self._hint([one.workflow_id for one in batch])
            for one in batch:
                log.info("run.taken_back", workflow_id=one.workflow_id, from_executor_id=one.from_executor_id)
            if len(batch) < executors.BATCH:
                break
        if self._declared_gone:
            self._gone(sorted(self._declared_gone))
            self._declared_gone.clear()
        return count

    def _run(self) -> None:
        interval = self._ttl.total_seconds() / 3
        while not self._stop.wait(interval):
            before = time.monotonic()
            try:
                alive = retrying(
                    self._engine, "lease.renew", lambda conn: executors.renew(conn, self._executor_id, self._ttl)
                )
            except Exception as error:  # noqa: BLE001 - logged; the next renewal tries again
                log.warning("lease.renew_failed", error=type(error).__name__)
                continue
            if not alive:
                log.error("lease.lost", executor_id=self._executor_id)
                self._executions.kill_all("this executor was declared gone")
                self._lost()
                return
            self._valid_until = before + self._ttl.total_seconds()
            if before - self._first_success >= self._ttl.total_seconds():
                try:
                    self.take_back()
                except Exception as error:  # noqa: BLE001 - logged; the next renewal tries again
                    log.warning("lease.take_back_failed", error=type(error).__name__)
