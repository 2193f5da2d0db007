"""This executor's claim to be alive.

Only being *tombstoned* ends a claim: the reaper (`durable.reaper`) sets the tombstone by compare-and-set, and a renewal
that comes late to a row without one succeeds, so a database pause of minutes costs nothing. Past its time to live an
executor starts no step body and waits (`gate`); tombstoned, it marks its executions dead and ends.

The lease is renewed every quarter of its time to live by a thread that does nothing else, on a connection of its own:
neither a long take-back nor a pool whose connections are all in use makes this executor look dead.
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

from perdure_service.durable.executions import Executions
from perdure_service.store import executors
from perdure_service.store.sqlstates import retrying

log = structlog.get_logger()

GATE_POLL_S = 0.1
"""How often a step that may not begin looks whether it may."""

NOTE = timedelta(seconds=2)
"""How long telling that this executor drains, or is over, may take: its end waits for neither."""

RENEWALS_PER_TTL = 4
"""Three may fail before the lease runs out."""

SHORTEST_STATEMENT_TIMEOUT = timedelta(seconds=1)


def renewal_interval_s(ttl: timedelta) -> float:
    """Returns how often a lease is renewed, in seconds."""
    return ttl.total_seconds() / RENEWALS_PER_TTL


def lease_statement_timeout(ttl: timedelta) -> timedelta:
    """Returns how long a statement about leases may take: so short that a renewal that hangs is tried once more."""
    return max(ttl / RENEWALS_PER_TTL, SHORTEST_STATEMENT_TIMEOUT)


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
        lost: Callable[[], None],
        agents: Callable[[], Sequence[str]] = tuple,
        region: str = "",
        standing_by: Callable[[], bool] = lambda: False,
    ) -> None:
        """Creates the lease; `start` takes it.

        Args:
            engine: The database, by a connection of the lease's own.
            executor_id: This process's id, new at every start.
            application_version: The version whose runs it can continue.
            address: Where it can be reached.
            max_running: How many runs it takes.
            ttl: How long it counts as alive after a renewal.
            executions: What it runs.
            lost: Called once when this executor was declared gone; it must end the process.
            agents: Returns the names of the workflows that it has, asked at its start.
            region: Where it is; empty without regions.
            standing_by: Returns whether it takes no runs, asked at its start.
        """
        self._engine = engine
        self._executor_id = executor_id
        self._application_version = application_version
        self._address = address
        self._max_running = max_running
        self._ttl = ttl
        self._executions = executions
        self._lost = lost
        self._agents = agents
        self._region = region
        self._standing_by = standing_by
        self._valid_until = 0.0
        self._alive_since = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        """Takes the lease and begins to renew it."""

        def register(conn: sa.Connection) -> None:
            executors.register(
                conn,
                self._executor_id,
                application_version=self._application_version,
                address=self._address,
                max_running=self._max_running,
                ttl=self._ttl,
                agents=self._agents(),
                region=self._region,
                standing_by=self._standing_by(),
            )

        before = time.monotonic()
        retrying(self._engine, "lease.register", register)
        self._succeeded(before)
        self._thread.start()

    def drain(self) -> None:
        """Tells that this executor takes no more runs; nothing depends on it but what operators see."""
        try:
            retrying(self._engine, "lease.drain", lambda conn: executors.drain(conn, self._executor_id), budget=NOTE)
        except Exception as error:  # noqa: BLE001 - logged; it is for people
            log.warning("lease.drain_not_told", error=type(error).__name__)

    def stop(self) -> None:
        """Ends the lease, so that whatever this executor still has is free for others at once."""
        self.forget()
        try:
            retrying(self._engine, "lease.remove", lambda conn: executors.remove(conn, self._executor_id), budget=NOTE)
        except Exception as error:  # noqa: BLE001 - logged; it expires
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

    def held_for(self, duration: timedelta) -> bool:
        """Returns whether the lease has been renewed without a lapse for so long, and holds."""
        return self.open and time.monotonic() - self._alive_since >= duration.total_seconds()

    def _succeeded(self, before: float) -> None:
        """Is told that a renewal sent at `before` succeeded."""
        if before >= self._valid_until:
            self._alive_since = before  # the first one, or the first after an outage
        self._valid_until = before + self._ttl.total_seconds()

    def _run(self) -> None:
        while not self._stop.wait(renewal_interval_s(self._ttl)):
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
            self._succeeded(before)
