"""Databases of one PostgreSQL that stand for the cells of a cluster."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from perdure_service.domain.regions import Place, parse_regions
from perdure_service.durable.migrate import database_of, migrate_all, migrate_cells, verify_dbos
from perdure_service.store import cells, diagnosis, migrations
from perdure_service.store.engine import create_engine, parse_url

from tests.helpers.databases import DatabaseServer
from tests.helpers.regions import regions_yaml


@contextmanager
def cluster_of_copies(server: DatabaseServer) -> Iterator[Cluster]:
    """Yields migrated databases for the cells; skips what cannot be on this server."""
    if server.cockroach:
        pytest.skip("databases stand for cells on PostgreSQL only: this one's nodes have no such regions")
    cluster = Cluster(server, copies=True)
    try:
        yield cluster
    finally:
        cluster.drop()


class Cluster:
    """A PostgreSQL with databases for two cells, and the regions that name them.

    Nobody has made them yet; or they are copies of the session's migrated one, which is quicker.
    """

    def __init__(self, server: DatabaseServer, *, copies: bool = False) -> None:
        mark = uuid.uuid4().hex[:8]
        self.server = server
        self.databases = {"nn1": f"perdure_nn1_{mark}", "ss1": f"perdure_ss1_{mark}"}
        if copies:
            self.databases = {cell: str(parse_url(server.migrated(cell, _migrate)).database) for cell in self.databases}
        self.role = f"perdure_role_{mark}"
        self.regions = parse_regions(regions_yaml(self.databases, role=self.role), "regions.yaml")
        self.url = server.url

    def migrate(self, *names: str) -> list[str]:
        """Migrates some cells, or both; returns what was reported."""
        report: list[str] = []
        migrate_cells(self.url, self.regions, names or tuple(self.regions.cells), report.append)
        return report

    def url_of(self, cell: str) -> str:
        return database_of(self.url, self.regions.cells[cell])

    def place(self, cell: str) -> Place:
        return Place(self.regions, self.regions.cells[cell], self.regions.cells[cell].region)

    def rows(self, cell: str, query: str) -> list[tuple[object, ...]]:
        engine = create_engine(self.url_of(cell), pool_size=1, statement_timeout=migrations.STATEMENT_TIMEOUT)
        try:
            with engine.begin() as connection:
                return [tuple(row) for row in connection.execute(sa.text(query))]
        finally:
            engine.dispose()

    def findings(self, cell: str, place: Place | None) -> list[str]:
        """Returns why a server at a place would not start on the database of a cell."""
        checks = (verify_dbos, migrations.verify, cells.verifier(place))
        return [found.text for found in diagnosis.diagnose(self.url_of(cell), checks) if found.severity == "error"]

    def drop(self) -> None:
        """Drops the databases and the role."""
        for database in self.databases.values():
            self.server.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        self.server.execute(f"DROP ROLE IF EXISTS {self.role}")


def _migrate(url: str) -> None:
    migrate_all(url, lambda _line: None)
