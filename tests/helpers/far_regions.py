"""Two regions on one machine with distances between them: what goes over is counted, and takes as long as one likes.

The *home* serves its cell at home. The *standby* executes the runs of the other cell away from its home, as after
`perdure evacuate`: its database is in the south, and it is in the west. Each is also the other region's server for the
other one, to which it sends calls on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from tests.helpers.cells import Cluster
from tests.helpers.databases import DatabaseServer
from tests.helpers.distance import Distance
from tests.helpers.proxy import DatabaseProxy, Transaction
from tests.helpers.regions import write_regions
from tests.helpers.rpc import Rpc
from tests.helpers.server import ServerProcess, sql

AT_HOME, AWAY, MOVED = "default", "away", "moved"
"""Namespaces: at home in the north; in the south, whose cell the standby serves; and in the north, but once in the
south."""
RARE_S = "600"
SETTINGS = {
    "PERDURE_LEASE_TTL": RARE_S,
    "PERDURE_CLAIM_TTL": RARE_S,
    "PERDURE_QUEUE_POLL_INTERVAL": RARE_S,
    "PERDURE_WATCH_POLL_INTERVAL": RARE_S,
}
"""What is done again and again, whatever runs, is done hardly ever."""


@dataclass(frozen=True)
class Region:
    """A region's server and what leads to it.

    Attributes:
        database: In front of its cell's database.
        to_database: Between it and its database.
        to_server: Between the other region's server and it.
        rpc: A client in this region.
    """

    server: ServerProcess
    database: DatabaseProxy
    to_database: Distance
    to_server: Distance
    rpc: Rpc


@dataclass(frozen=True)
class Counts:
    """What was done for a run.

    Attributes:
        calls: Calls that one region's server has sent on to the other's, for whatever run.
        commits: Transactions that have written something.
        writing: The round trips that these were, with all else on their connections.
        reading: The round trips of the others.
        hints: The round trips that only told other servers where to look: nobody waits for them.
    """

    calls: int
    commits: int
    writing: int
    reading: int
    hints: int

    def __sub__(self, other: Counts) -> Counts:
        """Returns what was done since."""
        return Counts(*(after - before for after, before in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class FarRegions:
    """See the module."""

    home: Region
    standby: Region

    @property
    def both(self) -> tuple[Region, Region]:
        return self.home, self.standby

    @contextmanager
    def counted(self) -> Iterator[Callable[[str], Counts]]:
        """Yields what returns what was done for a run since."""
        calls = self._calls()
        with self.home.database.counted() as at_home, self.standby.database.counted() as at_standby:

            def counts(run_id: str) -> Counts:
                of_both = [_counts(found, run_id) for found in (at_home, at_standby)]
                return Counts(self._calls() - calls, *map(sum, zip(*of_both, strict=True)))

            yield counts

    def _calls(self) -> int:
        return sum(region.to_server.calls for region in self.both)


def _counts(transactions: Sequence[Transaction], run_id: str) -> tuple[int, int, int, int]:
    """Returns commits, and round trips that write, read and hint, of what one database was asked for a run."""
    ended = [one for one in transactions if one.ended]
    named = [one for one in ended if one.names(run_id)]
    writes = [one for one in named if one.writes]
    hints = [one for one in named if "pg_notify" in one.statements[-1]]
    reads = [one for one in named if one not in writes and one not in hints]
    # Those that write checkpoints do nothing else, so whatever goes over their connections is for this, named or not.
    writers = {one.connection for one in writes}
    beside = [one for one in ended if one.connection in writers and one not in named]
    writing, reading, hinting = (sum(one.round_trips for one in of) for of in ([*writes, *beside], reads, hints))
    return len(writes), writing, reading, hinting


@contextmanager
def far_regions(server: DatabaseServer, folder: Path, *agents: str) -> Iterator[FarRegions]:
    """Starts both.

    Args:
        server: A PostgreSQL on which databases are made.
        folder: Where the regions file is put.
        agents: Modules.
    """
    with ExitStack() as stack:
        cluster = Cluster(server, copies=True)
        stack.callback(cluster.drop)
        cluster.migrate()
        with sql(cluster.url_of("ss1")) as connection:
            connection.execute("UPDATE perdure.cell SET region = 'west', epoch = epoch + 1")
        parts = []
        for cell, region in (("nn1", "north"), ("ss1", "west")):
            database = DatabaseProxy(cluster.url_of(cell))
            stack.callback(database.close)
            to_database = Distance(database.address)
            stack.callback(to_database.close)
            one = ServerProcess(
                database.url_at(to_database.port),
                *agents,
                command="serve",
                **SETTINGS,
                PERDURE_REGION=region,
                PERDURE_CELL=cell,
            )
            stack.callback(one.__exit__)
            to_server = Distance(one.address)
            stack.callback(to_server.close)
            parts.append((one, database, to_database, to_server))
        north, south = (to_server.address for *_, to_server in parts)
        file = write_regions(
            folder,
            cluster.databases,
            addresses={"nn1": north},
            standbys={"ss1": south},
            homes={
                AT_HOME: {"home": "nn1"},
                AWAY: {"home": "ss1"},
                MOVED: {"home": "nn1", "former_homes": ["ss1"]},
            },
        )
        regions = []
        for one, *others in parts:
            one.start(PERDURE_REGIONS_FILE=str(file))
            regions.append(Region(one, *others, stack.enter_context(Rpc(one.address))))
        yield FarRegions(*regions)
