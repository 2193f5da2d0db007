"""Where a harness's database comes from: a new one for each, cheaply copied from a template that is migrated once.

Without a URL it is the embedded PostgreSQL, with its data in the user's data folder: it is made once, started by the
first harness of a process, and stopped at the process's end. A template is named after what it was migrated with, so a
new version makes a new one. CockroachDB cannot copy a database, and a new one takes it a minute; there all harnesses
of a process share one, and come one after the other.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa

from perdure_service.durable.migrate import migrate_all
from perdure_service.store import embedded
from perdure_service.store.engine import create_engine, is_cockroach, parse_url
from perdure_service.store.schema import MIGRATIONS

PREFIX = "perdure_test"
ADVISORY_LOCK = 0x70657264
"""Held while a template is made, and while one is copied: PostgreSQL copies no database that somebody uses."""

_lock = threading.Lock()
_servers: dict[Path, embedded.EmbeddedPostgres] = {}
_shared: dict[str, str] = {}


@contextmanager
def own_database(server_url: str | None, data_dir: Path | None = None) -> Iterator[str]:
    """Yields the URL of a migrated database that nobody else uses, and drops it afterwards.

    Args:
        server_url: A database on the server to use, whose user may create databases; None for an embedded PostgreSQL.
        data_dir: Where the embedded PostgreSQL keeps its data; by default in the user's data folder.

    Raises:
        ConfigurationError: The server cannot be used; in one sentence.
    """
    if server_url is None:
        server_url = _embedded_url(data_dir)
    engine = create_engine(server_url, pool_size=1, statement_timeout=timedelta(minutes=5))
    try:
        if is_cockroach(engine):
            yield _of_this_process(engine, server_url)
            return
        name = f"{PREFIX}_{os.getpid()}_{uuid4().hex[:8]}"
        with _exclusively(engine) as execute:
            template = _template(execute, server_url)
            execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield _url(server_url, name)
        finally:
            with _exclusively(engine) as execute:
                execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    finally:
        engine.dispose()


class _Statements:
    """Runs statements outside of transactions."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def __call__(self, statement: str) -> list[str]:
        found = self._connection.exec_driver_sql(statement)
        return [str(row[0]) for row in found] if found.returns_rows else []


@contextmanager
def _exclusively(engine: sa.Engine) -> Iterator[_Statements]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        execute = _Statements(connection)
        execute(f"SELECT pg_advisory_lock({ADVISORY_LOCK})")
        try:
            yield execute
        finally:
            execute(f"SELECT pg_advisory_unlock({ADVISORY_LOCK})")


def _template(execute: _Statements, server_url: str) -> str:
    """Returns the name of a database with today's schema; makes it when there is none."""
    what = f"{version('dbos')} {[(one.number, one.name) for one in MIGRATIONS]}"
    name = f"{PREFIX}_template_{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    if name not in execute("SELECT datname FROM pg_database"):
        # Under another name until it is complete: a killed process leaves no half of a template.
        making = f"{PREFIX}_making_{uuid4().hex[:8]}"
        execute(f"CREATE DATABASE {making} TEMPLATE template0")
        migrate_all(_url(server_url, making), lambda _line: None)
        execute(f"ALTER DATABASE {making} RENAME TO {name}")
    return name


def _of_this_process(engine: sa.Engine, server_url: str) -> str:
    with _lock:
        if server_url not in _shared:
            name = f"{PREFIX}_{os.getpid()}_{uuid4().hex[:8]}"
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql(f"CREATE DATABASE {name}")
            atexit.register(_drop, server_url, name)
            migrate_all(_url(server_url, name), lambda _line: None)
            _shared[server_url] = _url(server_url, name)
        return _shared[server_url]


def _drop(server_url: str, name: str) -> None:
    engine = create_engine(server_url, pool_size=1, statement_timeout=timedelta(minutes=5))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} CASCADE")
    engine.dispose()


def _url(server_url: str, database: str) -> str:
    return parse_url(server_url).set(database=database).render_as_string(hide_password=False)


def _embedded_url(data_dir: Path | None) -> str:
    folder = data_dir or embedded.default_data_dir() / "testing"
    with _lock:
        if folder not in _servers:
            server = embedded.start(folder)
            _servers[folder] = server
            _drop_left_over(server.url("postgres"))
        return _servers[folder].url("postgres")


def _drop_left_over(server_url: str) -> None:
    """Drops the databases of processes of this machine that were killed."""
    engine = create_engine(server_url, pool_size=1, statement_timeout=timedelta(minutes=1))
    try:
        with _exclusively(engine) as execute:
            for name in execute("SELECT datname FROM pg_database"):
                owner = name.removeprefix(f"{PREFIX}_").partition("_")[0] if name.startswith(PREFIX) else ""
                if owner == "making" or (owner.isdigit() and _gone(int(owner))):
                    execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    finally:
        engine.dispose()


def _gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
