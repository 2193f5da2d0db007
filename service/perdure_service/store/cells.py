"""The row `perdure.cell`: whose home a database is, so that no server works on another cell's by mistake.

**Who may write it?** `perdure-server migrate`, which is alone (`migrations.sole_migrator`), inserts it and never
changes it. **What if it dies on the next line, or the reply to COMMIT is lost?** The insert does nothing the second
time, and what is there is compared. Servers read it before they take a lease: whatever they are pointed at, nothing has
been written then. Which region serves the cell they change by compare-and-set of the epoch: see `durable.cell_claim`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from perdure_service.domain.regions import Cell, Place, SurvivalGoal
from perdure_service.errors import ConfigurationError
from perdure_service.store import sqlstates
from perdure_service.store.engine import is_cockroach
from perdure_service.store.executors import LIVES
from perdure_service.store.migrations import Change

MAX_CLOCK_SKEW_S = 5.0
"""Leases and deadlines go by the database's clock, sleeps and delays of the engine by the host's."""

_READ = "SELECT cell, home_region, region, epoch, claimed_at FROM perdure.cell WHERE id = 1"
# An executor of a version that knew no regions is at home.
_HOLDS = "NOT e.standing_by AND coalesce(nullif(e.region, ''), c.home_region) = c.region"
_MOVE = "UPDATE perdure.cell AS c SET region = :region, epoch = epoch + 1, claimed_at = now()"
_TAKE_OVER = f"""
    {_MOVE} WHERE c.id = 1 AND c.epoch = :epoch
        AND (c.claimed_at IS NULL OR c.claimed_at <= now() - CAST(:ttl_s AS FLOAT8) * INTERVAL '1 second')
        AND (c.claimed_at IS NOT NULL OR EXISTS (SELECT 1 FROM perdure.executor AS e WHERE {_HOLDS}))
        AND NOT EXISTS (SELECT 1 FROM perdure.executor AS e
                        WHERE {_HOLDS} AND e.renewed_at > now() - CAST(:ttl_s AS FLOAT8) * INTERVAL '1 second')"""
_GIVE = f"""
    {_MOVE} WHERE c.id = 1 AND c.epoch = :epoch
        AND EXISTS (SELECT 1 FROM perdure.executor AS e
                    WHERE {LIVES} AND e.standing_by AND NOT e.draining AND e.region = :region)"""
_COUNTS = f"""
    SELECT count(*) FILTER (WHERE NOT e.standing_by), count(*) FILTER (WHERE e.standing_by)
    FROM perdure.executor AS e WHERE {LIVES} AND NOT e.draining"""
_CLOCK = "SELECT CAST(extract(epoch FROM clock_timestamp()) AS FLOAT8)"


@dataclass(frozen=True, slots=True)
class CellRow:
    """Whose home a database is.

    Attributes:
        cell: The cell's name.
        home_region: Its home region.
        region: The region that serves it now.
        epoch: How often another region has begun to serve it, from 1.
        claimed_at: When its region has begun to; None for the home since ever.
    """

    cell: str
    home_region: str
    region: str
    epoch: int
    claimed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class CellStatus:
    """Who serves a cell, and who could.

    Attributes:
        row: Which region has the claim.
        executors: How many executors take its runs.
        standing_by: How many stand by.
    """

    row: CellRow
    executors: int
    standing_by: int


def read(connection: sa.Connection) -> CellRow | None:
    """Returns whose home the database is; None when it is that of a service without regions."""
    row = connection.execute(sa.text(_READ)).first()
    return None if row is None else CellRow(*row)


def take_over(connection: sa.Connection, seen: CellRow, region: str, ttl: timedelta) -> bool:
    """Gives the claim of a cell to a region if its holder is gone; returns whether it did.

    Gone is a region that has had the claim for `ttl`, and no executor of which has renewed its lease since so long. A
    home where none has ever been is not gone: it has not come yet.

    Args:
        connection: A transaction.
        seen: The row as it was read.
        region: Where the executor is that takes it over.
        ttl: How long.
    """
    values = {"region": region, "epoch": seen.epoch, "ttl_s": ttl.total_seconds()}
    return connection.execute(sa.text(_TAKE_OVER), values).rowcount == 1


def give(connection: sa.Connection, seen: CellRow, region: str) -> bool:
    """Gives the claim of a cell to a region in which an executor of it stands by; returns whether it did."""
    return connection.execute(sa.text(_GIVE), {"region": region, "epoch": seen.epoch}).rowcount == 1


def status(connection: sa.Connection) -> CellStatus | None:
    """Returns who serves the cell of the database; None when it is that of a service without regions."""
    row = read(connection)
    return None if row is None else CellStatus(row, *connection.execute(sa.text(_COUNTS)).one())


def record(cell: Cell) -> Change:
    """Returns the change that writes whose home a database is; it leaves what is there."""
    return Change(
        f"the row of the cell {cell.name}",
        "INSERT INTO perdure.cell (id, cell, home_region, region, epoch) "
        f"VALUES (1, '{cell.name}', '{cell.region}', '{cell.region}', 1) ON CONFLICT (id) DO NOTHING",
        "SELECT 1 FROM perdure.cell WHERE id = 1",
    )


def check_unclaimed(engine: sa.Engine, cell: Cell) -> None:
    """Returns if a database is no other cell's home, whatever else it is: before it is migrated.

    Raises:
        ConfigurationError: It is; in one sentence.
    """
    try:
        with engine.connect() as connection:
            row = read(connection)
    except sa.exc.DBAPIError as error:
        if sqlstates.sqlstate_of(error) in (sqlstates.UNDEFINED_TABLE, sqlstates.INVALID_SCHEMA_NAME):
            return
        raise
    if row is not None:
        _compare(engine, row, cell)


def check_home(engine: sa.Engine, cell: Cell) -> None:
    """Returns if a database is the home of a cell.

    Raises:
        ConfigurationError: It is not; in one sentence.
    """
    with engine.connect() as connection:
        row = read(connection)
    if row is None:
        raise ConfigurationError(
            f"The database {engine.url.database} has not been migrated as the home of the cell {cell.name}; run "
            "`perdure-server migrate` with the same PERDURE_REGIONS_FILE."
        )
    _compare(engine, row, cell)


def _compare(engine: sa.Engine, row: CellRow, cell: Cell) -> None:
    if row.cell != cell.name:
        raise ConfigurationError(
            f"The database {engine.url.database} is the home of the cell {row.cell}, not of {cell.name}; correct "
            "PERDURE_DATABASE_URL, PERDURE_REGION or the regions file."
        )
    if row.home_region != cell.region:
        raise ConfigurationError(
            f"The cell {cell.name} was made with the home region {row.home_region}, and the regions file says "
            f"{cell.region}; correct the file, as a home is not moved by it."
        )


def verifier(place: Place | None) -> Callable[[sa.Engine], None]:
    """Returns the check that a server makes of its database before it starts.

    Args:
        place: The server's; None without regions.
    """

    def verify(engine: sa.Engine) -> None:
        _check_clock(engine)
        if place is None:
            _check_no_home(engine)
            return
        if engine.url.database != place.cell.database:
            raise ConfigurationError(
                f"PERDURE_DATABASE_URL names the database {engine.url.database}, and the cell {place.cell.name} lives "
                f"in {place.cell.database}; correct one of the two."
            )
        check_home(engine, place.cell)
        if is_cockroach(engine):
            _check_survival(engine, place.cell)

    return verify


def _check_no_home(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        row = read(connection)
    if row is not None:
        raise ConfigurationError(
            f"The database {engine.url.database} is the home of the cell {row.cell}; set PERDURE_REGIONS_FILE and "
            "PERDURE_REGION, or correct PERDURE_DATABASE_URL."
        )


def _check_survival(engine: sa.Engine, cell: Cell) -> None:
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"SET statement_timeout = '{int(MAX_CLOCK_SKEW_S)}s'")
            goal = connection.exec_driver_sql(f"SELECT survival_goal FROM [{survival_goal(cell)}]").scalar()
    except sa.exc.DBAPIError as error:
        if sqlstates.sqlstate_of(error) == sqlstates.INSUFFICIENT_PRIVILEGE:
            return  # `migrate`, which has the right, has set it
        raise
    if goal is None:
        raise ConfigurationError(
            f"The database {cell.database} is not multi-region, and the cell {cell.name} is to survive the loss of a "
            f"{cell.survive}; run `perdure-server migrate`."
        )
    if cell.survive is SurvivalGoal.REGION and goal != SurvivalGoal.REGION:
        raise ConfigurationError(
            f"The database {cell.database} survives the loss of a {goal} only, and the cell {cell.name} is to survive "
            f"that of a {cell.survive}; run `perdure-server migrate`."
        )


def survival_goal(cell: Cell) -> str:
    """Returns the statement by which CockroachDB tells what a cell's database survives."""
    return f"SHOW SURVIVAL GOAL FROM DATABASE {cell.database}"


def _check_clock(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")  # connected: what follows is one round trip
        asked_s = time.time()
        database_s = float(connection.execute(sa.text(_CLOCK)).scalar_one())
        answered_s = time.time()
    skew_s = max(asked_s - database_s, database_s - answered_s)
    if skew_s > MAX_CLOCK_SKEW_S:
        behind = "behind" if database_s > answered_s else "ahead of"
        raise ConfigurationError(
            f"The clock of this machine is {skew_s:.0f} s {behind} the database's, and may be {MAX_CLOCK_SKEW_S:.0f} s "
            "off at most; set it by NTP."
        )
