"""Migrates databases: DBOS's own schema first, then ours. One process does it; servers only verify.

With regions it makes the databases of the cells, too, with the servers' role and its rights.

**Who may write?** One migrator at a time: for all cells by the lock of the database of the URL, for each database by
its own, which also keeps out a migrator without regions. **What if it dies on the next line?** Every statement commits
alone, is repeated without harm or found to be done, and is in a fixed order: the next migrator does what is left.
**What if the reply is lost?** The same. **What if a database is another cell's home?** Its row says so, and it is
left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import sqlalchemy as sa
from dbos._error import DBOSInitializationError
from dbos._migration import get_dbos_migrations, get_migration_versions
from dbos._serialization import DefaultSerializer
from dbos._sys_db_postgres import PostgresSystemDatabase

from perdure_service.domain.regions import Cell, Regions
from perdure_service.errors import ConfigurationError
from perdure_service.store import cells, provisioning
from perdure_service.store.engine import create_engine, is_cockroach, parse_url
from perdure_service.store.migrations import Change, apply, migrate, sole_migrator
from perdure_service.store.schema import MIGRATIONS

SCHEMA_CHANGE_TIMEOUT = timedelta(minutes=10)
"""A schema change on CockroachDB takes a second each and may wait for others'."""
REPEATABLE_FROM = 20
"""The first of DBOS's migrations from which on each says IF NOT EXISTS (dbos/_migration.py)."""
DBOS_SCHEMA = "dbos"
_TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = :schema"
_ANY_WORKFLOW = "SELECT 1 FROM dbos.workflow_status LIMIT 1"


def migrate_dbos(engine: sa.Engine) -> None:
    """Brings DBOS's schema to the version of the installed DBOS; does nothing when it is there."""
    if is_cockroach(engine):
        _drop_half_made(engine)
    _dbos_database(engine).run_migrations()


def _drop_half_made(engine: sa.Engine) -> None:
    """Drops DBOS's schema where its making broke off at a migration that cannot be repeated, so that it begins anew.

    CockroachDB commits before each schema change, so DBOS's version of its schema may lag one migration behind what is
    there. Nobody has worked with a schema that is not made to its end: it has no workflow, or else it is left alone.
    """
    version, _ = get_migration_versions(engine, DBOS_SCHEMA, False)
    if version >= REPEATABLE_FROM:
        return
    with engine.connect() as connection:
        tables = set(connection.execute(sa.text(_TABLES), {"schema": DBOS_SCHEMA}).scalars())
        if not tables or ("workflow_status" in tables and connection.execute(sa.text(_ANY_WORKFLOW)).first()):
            return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(f"DROP SCHEMA {DBOS_SCHEMA} CASCADE"))


def verify_dbos(engine: sa.Engine) -> None:
    """Checks that DBOS's schema is recent enough.

    Raises:
        ConfigurationError: It is not there, or older than the installed DBOS needs.
    """
    try:
        _dbos_database(engine).verify_migrations()
    except DBOSInitializationError as error:
        raise ConfigurationError(
            "DBOS's schema is missing in the database, or older than the installed DBOS needs; "
            "run `perdure-server migrate`."
        ) from error


def _dbos_database(engine: sa.Engine) -> PostgresSystemDatabase:
    """Returns DBOS's system database on our engine, only to migrate or to verify."""
    return PostgresSystemDatabase(
        system_database_url=engine.url.render_as_string(hide_password=False),
        engine_kwargs={},
        engine=engine,
        schema=None,
        serializer=DefaultSerializer(),
        executor_id=None,
        # LISTEN/NOTIFY needs triggers that CockroachDB does not take, so it is decided when the schema is made.
        use_listen_notify=not is_cockroach(engine),
    )


def migrate_all(url: str, report: Callable[[str], None]) -> None:
    """Migrates the database at `url`, reporting each change.

    Raises:
        ConfigurationError: The database cannot be reached, or refuses; in one sentence.
    """
    with _engine(url) as engine:
        migrate(engine, lambda: migrate_dbos(engine), report, MIGRATIONS)


def migrate_cells(url: str, regions: Regions, names: Sequence[str], report: Callable[[str], None]) -> None:
    """Makes and migrates the databases of cells, reporting each change.

    Args:
        url: Any database of the cluster that is not a cell's own, by a user who may create roles and databases.
        regions: All there is.
        names: The cells.
        report: Gets a line for each change.

    Raises:
        ConfigurationError: The database cannot be reached, or refuses, or is another cell's; in one sentence.
    """
    with _engine(url) as engine, sole_migrator(engine, report) as still_alone:
        for name in names:
            cell = regions.cells[name]
            report(f"the cell {name} in the database {cell.database}:")
            changes = provisioning.database_changes(regions, cell, cockroach=is_cockroach(engine))
            apply(engine, changes, still_alone, report)
            with _engine(database_of(url, cell)) as home:
                cells.check_unclaimed(home, cell)
                migrate(home, lambda home=home: migrate_dbos(home), report, MIGRATIONS)  # type: ignore[misc]
                row, *rights = provisioning.cell_changes(regions, cell)
                apply(home, [row], still_alone, report)
                cells.check_home(home, cell)
                apply(home, rights, still_alone, report)


def database_of(url: str, cell: Cell) -> str:
    """Returns the URL of a cell's database on the same cluster."""
    return parse_url(url).set(database=cell.database).render_as_string(hide_password=False)


@contextmanager
def _engine(url: str) -> Iterator[sa.Engine]:
    engine = create_engine(url, pool_size=4, statement_timeout=SCHEMA_CHANGE_TIMEOUT)
    try:
        yield engine
    finally:
        engine.dispose()


def plan(url: str, regions: Regions | None, names: Sequence[str] = ()) -> Iterator[str]:
    """Yields the SQL of a migration from nothing, a piece at a time; connects nowhere.

    What a migrator would find done, it does not do; the query by which it finds that stands above the statement.
    """
    engine = create_engine(url, pool_size=1, statement_timeout=SCHEMA_CHANGE_TIMEOUT)  # never connects
    cockroach = is_cockroach(engine)
    schema = [*_dbos_plan(cockroach), *_our_plan(engine)]
    if regions is None:
        yield from schema
        return
    for name in names:
        cell = regions.cells[name]
        yield f"-- the cell {name}, in any database of the cluster"
        yield from map(_shown, provisioning.database_changes(regions, cell, cockroach=cockroach))
        yield f"-- the cell {name}, in the database {cell.database}"
        yield from schema
        yield from map(_shown, provisioning.cell_changes(regions, cell))


def _shown(change: Change) -> str:
    unless = f"-- unless this finds a row: {change.done}\n" if change.done else ""
    return f"-- {change.name}\n{unless}{change.statement};"


def _dbos_plan(cockroach: bool) -> Iterator[str]:
    yield f"CREATE SCHEMA IF NOT EXISTS {DBOS_SCHEMA};"
    for number, sql in enumerate(get_dbos_migrations(DBOS_SCHEMA, not cockroach, cockroach), 1):
        if sql.strip():
            yield f"-- DBOS's migration {number}\n{sql.strip().rstrip(';')};"


def _our_plan(engine: sa.Engine) -> Iterator[str]:
    yield "CREATE SCHEMA IF NOT EXISTS perdure;"
    for migration in MIGRATIONS:
        for sql in migration.statements_for(engine):
            yield f"-- {migration.number} perdure.{migration.name}\n{sql.strip()};"
