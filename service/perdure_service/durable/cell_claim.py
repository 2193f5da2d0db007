"""Which region executes the runs of this server's cell, and what this executor does about it.

A cell has one row that names the region with the *claim* to it. Executors in that region take runs; those of the cell
that are elsewhere (its standbys, or at home when the home was lost and is back) *stand by*: they answer every call, as
they work on the same database, and take no run. The claim has no renewal of its own. It holds while an executor of its
region lives, and when none has renewed its lease for `ttl`, whoever stands by takes it with a higher epoch. It goes
back to the home when an operator says so, and not by itself: a region that is half back would pull the runs to and fro.

**The claim is advice**, for load and nearness; no correctness hangs on it. Runs are owned one by one, by the token of
their claim from the queue, leases say who is alive, and every commit is fenced by the token. So two regions that both
believe they have the cell are two executors of one database, who share its runs as any two do.

**Who may write the row?** Every executor of the cell, by compare-and-set of the epoch that it has read; a take-over
looks in the same statement whether its holder lives. **If a renewal comes at that moment,** the holder lives and has
lost the claim; it sees that at its next look, and hands its runs over. **If we die on the next line**, our region has
the claim: its other executors see that, and without one it is taken back, after the same time. **If the reply to COMMIT
is lost**, the repeat finds another epoch and changes nothing, and the next look finds our region. **If two take it at
once**, one finds another epoch. **If the database was away**, everyone looks dead: so nobody judges whose own lease
has not held for `ttl` without a lapse, and by then the living have renewed theirs.

Handing over is as in `drain`, but nothing is cut short: a step body that has begun may end and is recorded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import sqlalchemy as sa
import structlog

from perdure_service.domain.regions import Place
from perdure_service.durable.drain import Drain
from perdure_service.durable.leases import Lease, renewal_interval_s
from perdure_service.durable.placement import Placement
from perdure_service.errors import ConfigurationError
from perdure_service.store import cells, executors
from perdure_service.store.cells import CellRow
from perdure_service.store.sqlstates import JITTER, reading, retrying
from perdure_service.telemetry import METERS
from perdure_service.telemetry import metrics as m

HAND_OVER_POLL_S = 0.1
"""How often it is looked whether a run that is to be handed over has come to a rest."""

log = structlog.get_logger()


class CellClaim:
    """See the module. Looks from a thread of its own, about as often as leases are renewed."""

    def __init__(
        self,
        engine: sa.Engine,
        executor_id: str,
        place: Place,
        *,
        ttl: timedelta,
        lease_ttl: timedelta,
        lease: Lease,
        placement: Placement,
        drain: Drain,
        look_for_runs: Callable[[], None],
    ) -> None:
        """Creates it; `begin`, then `start`.

        Args:
            engine: The database.
            executor_id: This process's.
            place: Where it is, and which cell it serves.
            ttl: How long no executor of the region with the claim may have renewed its lease.
            lease_ttl: The time to live of leases.
            lease: This executor's.
            placement: Takes runs, or none.
            drain: Hands over what is executed here; nobody else's.
            look_for_runs: Makes this executor look into all queues.
        """
        self._engine = engine
        self._executor_id = executor_id
        self._region = place.region
        self._cell = place.cell
        self._ttl = ttl
        self._interval_s = renewal_interval_s(lease_ttl)
        self._lease = lease
        self._placement = placement
        self._drain = drain
        self._look_for_runs = look_for_runs
        self._told = False
        self._away = 0
        METERS.observe(m.CELL_AWAY, lambda: [(self._away, {m.CELL: place.cell.name})])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cell-claim", daemon=True)

    def begin(self) -> None:
        """Finds out who has the claim, before the lease is taken: an executor that stands by never took anything."""
        row = self._read()
        self._placement.standing_by = self._told = row.region != self._region
        if self._placement.standing_by:
            log.info("cell.stands_by", cell=row.cell, served_by=row.region, epoch=row.epoch)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def look(self) -> None:
        """Does what the row asks for: take runs, stand by, or take over. Blocks."""
        row = self._read()
        if row.region == self._region:
            self._serve(row.epoch)
        elif not self._placement.standing_by:
            log.warning("cell.moved", cell=row.cell, to_region=row.region, epoch=row.epoch)
            self._placement.standing_by = True
            self._drain.begin()
        elif self._lease.held_for(self._ttl):
            self._take_over(row)
        self._tell()

    def _take_over(self, row: CellRow) -> None:
        def claim(conn: sa.Connection) -> bool:
            taken = cells.take_over(conn, row, self._region, self._ttl)
            if taken:  # at once, or for a moment nobody would live in the region that has the claim
                executors.stand_by(conn, self._executor_id, False)
            return taken

        if retrying(self._engine, "cell.take_over", claim):
            log.warning("cell.taken_over", cell=row.cell, from_region=row.region, epoch=row.epoch + 1)
            self._serve(row.epoch + 1)

    def _serve(self, epoch: int) -> None:
        if not self._placement.standing_by:
            return
        self._drain.end()
        self._placement.standing_by = False
        log.info("cell.served", cell=self._cell.name, region=self._region, epoch=epoch)
        self._look_for_runs()

    def _tell(self) -> None:
        """Writes for others what this executor does, if they do not know yet."""
        standing_by = self._placement.standing_by
        if standing_by is not self._told:
            retrying(self._engine, "cell.tell", lambda conn: executors.stand_by(conn, self._executor_id, standing_by))
            self._told = standing_by

    def _read(self) -> CellRow:
        row = reading(self._engine, "cell.read", cells.read)
        if row is None:  # looked at before the start: somebody has emptied it since
            raise ConfigurationError(f"the row of the cell {self._cell.name} is gone; run `perdure-server migrate`")
        self._away = int(row.region != row.home_region)
        return row

    def _run(self) -> None:
        pause_s = next_look = 0.0
        while not self._stop.wait(pause_s):
            try:
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + self._interval_s * JITTER.uniform(0.8, 1.2)
                    self.look()
                handing_over = self._drain.step()
            except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                log.warning("cell.look_failed", error=type(error).__name__)
                handing_over = False
            pause_s = HAND_OVER_POLL_S if handing_over else max(0.0, next_look - time.monotonic())
