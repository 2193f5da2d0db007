"""Migrates a database: DBOS's own schema first, then ours. One process does it; servers only verify."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import sqlalchemy as sa
from dbos._error import DBOSInitializationError
from dbos._serialization import DefaultSerializer
from dbos._sys_db_postgres import PostgresSystemDatabase

from perdure_service.errors import ConfigurationError
from perdure_service.store.engine import create_engine, is_cockroach
from perdure_service.store.migrations import migrate
from perdure_service.store.schema import MIGRATIONS

SCHEMA_CHANGE_TIMEOUT = timedelta(minutes=10)
"""A schema change on CockroachDB takes a second each and may wait for others'."""


def migrate_dbos(engine: sa.Engine) -> None:
    """Brings DBOS's schema to the version of the installed DBOS; does nothing when it is there."""
    _dbos_database(engine).run_migrations()


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
    engine = create_engine(url, pool_size=4, statement_timeout=SCHEMA_CHANGE_TIMEOUT)
    try:
        migrate(engine, lambda: migrate_dbos(engine), report, MIGRATIONS)
    finally:
        engine.dispose()
