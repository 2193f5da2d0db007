"""Applies the migrations: numbered, idempotent, forward only, one schema change each, by one process at a time.

Every statement runs by itself, with its own timeout, and may run again: a migrator that died at any line is followed
by one that continues there. Statements must therefore say IF NOT EXISTS and the like. Servers only verify.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa

from perdure_service.errors import ConfigurationError, Contention, StoreUnavailable
from perdure_service.store import sqlstates
from perdure_service.store.engine import is_cockroach

STATEMENT_TIMEOUT = timedelta(minutes=10)
"""For one schema change: building an index over a large table takes minutes."""
LOCK_TIMEOUT = timedelta(seconds=5)
"""A schema change that waits for a table's lock makes everyone queue behind it, so it gives way and tries again."""
MAX_ATTEMPTS = 20
NEWER_VERSIONS_ACCEPTED = 1
"""A rolling upgrade migrates first, so servers bear a schema one version newer than theirs."""
ADVISORY_LOCK = int.from_bytes(b"perdure", "big")
CLAIM_TTL = timedelta(seconds=30)
CLAIM_POLL_INTERVAL_S = 1.0
MAX_WAIT = timedelta(minutes=30)
"""For another migrator."""

_CREATE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS perdure"
_CREATE_TABLE = """
    CREATE TABLE IF NOT EXISTS perdure.migration (
        number INT PRIMARY KEY, name TEXT NOT NULL, applied_at TIMESTAMPTZ NOT NULL DEFAULT now()
    )"""
_CREATE_CLAIM = """
    CREATE TABLE IF NOT EXISTS perdure.migration_claim (
        id INT PRIMARY KEY, holder TEXT NOT NULL, expires_at TIMESTAMPTZ NOT NULL
    )"""
_APPLIED = "SELECT number FROM perdure.migration"
_RECORD = "INSERT INTO perdure.migration (number, name) VALUES (:number, :name) ON CONFLICT (number) DO NOTHING"
# One statement, so that it is atomic; times are the database's.
_CLAIM = """
    INSERT INTO perdure.migration_claim (id, holder, expires_at)
    VALUES (1, :holder, now() + CAST(:ttl_s AS FLOAT8) * INTERVAL '1 second')
    ON CONFLICT (id) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
    WHERE migration_claim.holder = excluded.holder OR migration_claim.expires_at < now()
    RETURNING holder"""
_RELEASE = "DELETE FROM perdure.migration_claim WHERE holder = :holder"

Report = Callable[[str], None]
"""Gets a line for each thing that is done or waited for."""


@dataclass(frozen=True)
class Migration:
    """One schema change.

    Attributes:
        number: From 1, without gaps; the schema's version is the highest number applied.
        name: What it creates or changes, in the schema `perdure`.
        statements: Idempotent SQL; where the databases differ, by SQLAlchemy dialect (`postgresql`, `cockroachdb`).
    """

    number: int
    name: str
    statements: tuple[str, ...] | Mapping[str, tuple[str, ...]]

    def statements_for(self, engine: sa.Engine) -> tuple[str, ...]:
        """Returns the statements to run on the engine's kind of database."""
        if isinstance(self.statements, Mapping):
            return self.statements["cockroachdb" if is_cockroach(engine) else "postgresql"]
        return self.statements


@dataclass(frozen=True)
class Change:
    """One change beside the numbered ones: of roles, databases, rights.

    Attributes:
        name: What it makes or changes, for people.
        statement: The SQL; idempotent, or not run when it has been done.
        done: A query that finds a row when nothing is left to do; empty for a statement that may be repeated.
    """

    name: str
    statement: str
    done: str = ""


def shipped() -> Sequence[Migration]:
    """Returns the migrations of this version of the product."""
    from perdure_service.store.schema import MIGRATIONS  # imports `Migration` from here

    return MIGRATIONS


def migrate(
    engine: sa.Engine,
    dbos_migrate: Callable[[], object],
    report: Report,
    migrations: Sequence[Migration] | None = None,
) -> None:
    """Brings the schema up to date: DBOS's own first, then ours. Safe to run at any time, again, and twice at once.

    Args:
        engine: The database, with at least two connections in its pool.
        dbos_migrate: Runs DBOS's migrations; it is called while no other migrator runs.
        report: Gets the progress.
        migrations: What to apply; by default this version's.

    Raises:
        ConfigurationError: A migration failed, or another migrator has been at it for too long. Correct what the
            message says and run it again.
        StoreUnavailable: The database went away. Run it again.
    """
    wanted = _in_order(shipped() if migrations is None else migrations)
    try:
        with sole_migrator(engine, report) as still_alone, _session(engine) as connection:
            report("DBOS's own tables …")
            dbos_migrate()
            _apply(connection, engine, wanted, still_alone, report)
    except sa.exc.DBAPIError as error:
        raise _told(error) from error


def apply(engine: sa.Engine, changes: Sequence[Change], still_alone: Callable[[], None], report: Report) -> None:
    """Makes the changes that have not been made, each by itself and with a timeout.

    Args:
        engine: Where they are made.
        changes: In order.
        still_alone: As `sole_migrator` yields it.
        report: Gets a line for each that is made.

    Raises:
        ConfigurationError: One failed. Correct what the message says and run it again.
        StoreUnavailable: The database went away. Run it again.
    """
    try:
        with _session(engine) as connection:
            for change in changes:
                if change.done and connection.exec_driver_sql(change.done).first() is not None:
                    continue
                still_alone()
                report(f"{change.name} …")
                _run(connection, change.statement, change.name, report)
    except sa.exc.DBAPIError as error:
        raise _told(error) from error


def verify(engine: sa.Engine, migrations: Sequence[Migration] | None = None) -> None:
    """Returns if a server of this version can work with the database's schema.

    Raises:
        ConfigurationError: It cannot; the message says in a sentence what to do.
        StoreUnavailable: The database cannot be asked.
    """
    wanted = _in_order(shipped() if migrations is None else migrations)
    try:
        with engine.connect() as connection:
            applied = set(connection.execute(sa.text(_APPLIED)).scalars())
    except sa.exc.DBAPIError as error:
        raise _told(error) from error
    missing = [migration for migration in wanted if migration.number not in applied]
    if missing:
        raise ConfigurationError(
            f"The database's schema is older than this server needs (version {len(wanted)}; "
            f"{missing[0].number} {missing[0].name} is missing); run `perdure-server migrate`."
        )
    newest = max(applied, default=0)
    if newest > len(wanted) + NEWER_VERSIONS_ACCEPTED:
        raise ConfigurationError(
            f"The database's schema is at version {newest}, too new for this server, which knows {len(wanted)}; "
            "upgrade the server."
        )


def _in_order(migrations: Sequence[Migration]) -> Sequence[Migration]:
    numbers = [migration.number for migration in migrations]
    assert numbers == list(range(1, len(numbers) + 1)), f"migrations must be numbered from 1 without gaps: {numbers}"
    return migrations


def _told(error: sa.exc.DBAPIError) -> Exception:
    """Returns what to raise for an error of the database outside of a migration's own statements."""
    code = sqlstates.sqlstate_of(error)
    if code in (sqlstates.UNDEFINED_TABLE, sqlstates.INVALID_SCHEMA_NAME):
        return ConfigurationError("The database has not been migrated; run `perdure-server migrate`.")
    if code == sqlstates.INSUFFICIENT_PRIVILEGE:
        return ConfigurationError(f"The database user lacks a right ({_first_line(error)}); grant it.")
    return sqlstates.translate(error) or error


def _first_line(error: sa.exc.DBAPIError) -> str:
    return str(error.orig).partition("\n")[0]


def _session(engine: sa.Engine) -> sa.Connection:
    """Returns a connection that commits each statement and in the end is closed, so that no setting gets around."""
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)
    connection.detach()
    connection.exec_driver_sql(f"SET statement_timeout = '{STATEMENT_TIMEOUT.total_seconds():.0f}s'")
    if not is_cockroach(engine):  # whose schema changes take no table locks to queue for
        connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT.total_seconds():.0f}s'")
    return connection


def _apply(
    connection: sa.Connection,
    engine: sa.Engine,
    migrations: Sequence[Migration],
    still_alone: Callable[[], None],
    report: Report,
) -> None:
    _run(connection, _CREATE_TABLE, "perdure.migration", report)
    applied = set(connection.execute(sa.text(_APPLIED)).scalars())
    for migration in migrations:
        if migration.number in applied:
            continue
        report(f"{migration.number}/{len(migrations)} perdure.{migration.name} …")
        for statement in migration.statements_for(engine):
            still_alone()
            _run(connection, statement, f"{migration.number} perdure.{migration.name}", report)
        connection.execute(sa.text(_RECORD), {"number": migration.number, "name": migration.name})
        applied.add(migration.number)
    report(f"The schema is at version {max(applied, default=0)}.")


def _run(connection: sa.Connection, statement: str, name: str, report: Report) -> None:
    """Runs one schema change, again where another transaction was in its way.

    Raises:
        ConfigurationError: It failed. What the database said is in the message: these statements hold no data.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            connection.exec_driver_sql(statement)
            return
        except sa.exc.DBAPIError as error:
            code = sqlstates.sqlstate_of(error)
            if sqlstates.is_connection_lost(error):
                raise
            if code == sqlstates.QUERY_CANCELED:
                raise ConfigurationError(
                    f"{name} was not done within {STATEMENT_TIMEOUT.total_seconds():.0f} s; see what it waits for "
                    "(SHOW JOBS on CockroachDB, pg_stat_activity on PostgreSQL), and run `perdure-server migrate` "
                    "again."
                ) from error
            if attempt == MAX_ATTEMPTS or code not in sqlstates.CONFLICTS | {sqlstates.LOCK_NOT_AVAILABLE}:
                raise ConfigurationError(
                    f"The migration {name} failed ({_first_line(error)}); after that is corrected "
                    "`perdure-server migrate` continues here."
                ) from error
            report(f"{name}: another transaction is in the way ({code}); again …")
        time.sleep(random.uniform(0.1, 1.0))


@contextmanager
def sole_migrator(engine: sa.Engine, report: Report) -> Iterator[Callable[[], None]]:
    """Waits until no other migrator works and holds the place; creates the schema `perdure`.

    PostgreSQL has advisory locks, which the death of their session frees at once. CockroachDB grants each of them to
    everyone, so there it is a row with an expiry that its holder keeps renewing.

    Yields:
        A function to call before each change: it raises ConfigurationError if the place was lost in the meantime.
    """
    with _claim_row(engine, report) if is_cockroach(engine) else _advisory_lock(engine, report) as acquired:

        def still_alone() -> None:
            if not acquired():
                raise ConfigurationError(
                    "Another migrator has taken over; run `perdure-server migrate` again when it has finished."
                )

        yield still_alone


@contextmanager
def _advisory_lock(engine: sa.Engine, report: Report) -> Iterator[Callable[[], bool]]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.detach()  # closed in the end rather than pooled, and the lock with it

        def acquired() -> bool:
            # A session may take its own lock again; of a lost session this raises.
            return bool(connection.execute(sa.text(f"SELECT pg_try_advisory_lock({ADVISORY_LOCK})")).scalar())

        _wait_for(acquired, report)
        connection.execute(sa.text(_CREATE_SCHEMA))
        yield acquired


@contextmanager
def _claim_row(engine: sa.Engine, report: Report) -> Iterator[Callable[[], bool]]:
    holder = uuid.uuid4().hex
    done = threading.Event()

    def claim(connection: sa.Connection) -> bool:
        values = {"holder": holder, "ttl_s": CLAIM_TTL.total_seconds()}
        return connection.execute(sa.text(_CLAIM), values).first() is not None

    def acquired() -> bool:
        return sqlstates.retrying(engine, "claim_migration", claim)

    def renew() -> None:
        while not done.wait(CLAIM_TTL.total_seconds() / 3):
            with suppress(StoreUnavailable, Contention):  # for a moment; `still_alone` has the last word
                acquired()

    _create_claim(engine)
    _wait_for(acquired, report)
    renewer = threading.Thread(target=renew, name="migration-claim", daemon=True)
    renewer.start()
    try:
        yield acquired
    finally:
        done.set()
        renewer.join()
        with suppress(sa.exc.DBAPIError), engine.begin() as connection:  # without it the claim expires
            connection.execute(sa.text(_RELEASE), {"holder": holder})


def _create_claim(engine: sa.Engine) -> None:
    """Creates the table of the claim. Two that create it at once disturb each other, whatever IF NOT EXISTS says."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text(_CREATE_SCHEMA))
                connection.execute(sa.text(_CREATE_CLAIM))
            return
        except sa.exc.DBAPIError as error:
            code = sqlstates.sqlstate_of(error)
            if attempt == MAX_ATTEMPTS or sqlstates.is_connection_lost(error) or code in _NO_USE_TO_REPEAT:
                raise
        time.sleep(random.uniform(0.05, 0.5))


_NO_USE_TO_REPEAT = frozenset({sqlstates.INSUFFICIENT_PRIVILEGE, sqlstates.QUERY_CANCELED})


def _wait_for(acquired: Callable[[], bool], report: Report) -> None:
    deadline = time.monotonic() + MAX_WAIT.total_seconds()
    reported = False
    while not acquired():
        if not reported:
            report("Another migrator is at work; waiting for it …")
            reported = True
        if time.monotonic() > deadline:
            raise ConfigurationError("Another migrator has been at work for half an hour; see what became of it.")
        time.sleep(CLAIM_POLL_INTERVAL_S)
