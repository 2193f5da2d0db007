"""Databases for tests: a server, a migrated template on it, and cheap copies of that."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.store.engine import create_engine, parse_url

FORMS = ("postgresql+psycopg", "cockroachdb+psycopg", "cockroachdb+psycopg2")
"""The dialects and drivers that the store must work with. `sqlalchemy-cockroachdb` does not ask PostgreSQL for its
version (its `_get_server_version_info` is a constant), so its dialect can be tried there without more ado; what is
tried is driver and dialect, not the server."""

FORM = os.environ.get("PERDURE_TEST_DATABASE_FORM")
"""One of these in which the tests of the server reach the PostgreSQL; by default its own."""
not_in_another_form = pytest.mark.skipif(
    FORM is not None, reason="it depends on which database it is, and this PostgreSQL passes for another"
)

Migrate = Callable[[str], None]


@dataclass
class DatabaseServer:
    """A real PostgreSQL or CockroachDB.

    Attributes:
        url: Of a database on it that always exists.
        cockroach: Which of the two it is.
    """

    url: str
    cockroach: bool
    _template: str | None = field(default=None, init=False)
    _shared: str | None = field(default=None, init=False)
    _made: list[str] = field(default_factory=list, init=False)

    @property
    def forms(self) -> tuple[str, ...]:
        """Returns the URL forms that this server can be reached with."""
        return FORMS[1:] if self.cockroach else FORMS

    def migrated(self, name: str, migrate: Migrate) -> str:
        """Returns the URL of a migrated database: a copy of its own on PostgreSQL, the session's on CockroachDB.

        Creating a database takes a minute on CockroachDB, as each of DBOS's 125 migrations is a schema change; there
        tests keep apart by namespaces.
        """
        if self.cockroach:
            if self._shared is None:
                self._shared = self.empty("shared")
                migrate(self.url_of(self._shared))
            return self.url_of(self._shared)
        if self._template is None:
            template = self.empty("template")
            migrate(self.url_of(template))
            self._template = template
        return self.url_of(self._create(name, f"TEMPLATE {self._template}"))

    def empty(self, name: str) -> str:
        """Returns the name of a new database with nothing in it."""
        return self._create(name, "" if self.cockroach else "TEMPLATE template0")

    def url_of(self, database: str, form: str | None = None) -> str:
        """Returns the URL of a database, in one of `forms`."""
        return url_in_form(parse_url(self.url).set(database=database), form)

    def drop(self, database: str) -> None:
        """Drops a database, whoever is connected to it."""
        how = "CASCADE" if self.cockroach else "WITH (FORCE)"
        self.execute(f"DROP DATABASE IF EXISTS {database} {how}")
        self._made.remove(database)

    def drop_of(self, url: str) -> None:
        """Drops the database of a URL from `migrated`, unless others share it."""
        database = parse_url(url).database
        assert database is not None
        if database != self._shared:
            self.drop(database)

    def drop_all(self) -> None:
        """Drops every database that was made here."""
        for database in self._made[:]:
            self.drop(database)

    def execute(self, statement: str) -> None:
        """Runs a statement outside of a transaction, as `CREATE DATABASE` needs it."""
        engine = create_engine(self.url, pool_size=1, statement_timeout=timedelta(minutes=5))
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql(statement)
        finally:
            engine.dispose()

    def _create(self, name: str, how: str) -> str:
        database = f"perdure_{re.sub('[^a-z0-9]+', '_', name.lower())[-30:]}_{uuid.uuid4().hex[:8]}"
        self.execute(f"CREATE DATABASE {database} {how}")
        self._made.append(database)
        return database


def url_in_form(url: str | sa.URL, form: str | None = None) -> str:
    """Returns `url` as a text with its password, for another dialect and driver when `form` is given."""
    parsed = parse_url(url) if isinstance(url, str) else url
    return (parsed.set(drivername=form) if form else parsed).render_as_string(hide_password=False)


def given_server() -> DatabaseServer | None:
    """Returns the server that the environment names, None if the tests should bring their own."""
    if url := os.environ.get("PERDURE_TEST_COCKROACHDB_URL"):
        return DatabaseServer(url, cockroach=True)
    if url := os.environ.get("PERDURE_TEST_DATABASE_URL"):
        return DatabaseServer(url, cockroach=False)
    return None
