"""Fixtures for the tests that talk to a real server: one process and one channel per module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from perdure_service.durable.migrate import migrate_all

from tests.helpers.databases import DatabaseServer
from tests.helpers.rpc import Rpc
from tests.helpers.server import ServerProcess, create_effects_table


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[ServerProcess]:
    """A server with the test agents, on the module's database. Tests that kill one start their own."""
    create_effects_table(database_url)
    with ServerProcess(database_url) as process:
        yield process


@pytest.fixture(scope="module")
def rpc(server: ServerProcess) -> Iterator[Rpc]:
    """The stubs of the module's server."""
    with Rpc(server.address) as stubs:
        yield stubs


@pytest.fixture
def own_database_url(database_server: DatabaseServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A migrated database of this test's own: `dev` takes all runs of its database from other servers."""
    url = database_server.migrated(request.node.name, migrate_quietly)
    create_effects_table(url)
    yield url
    database_server.drop_of(url)


@pytest.fixture
def own_server(own_database_url: str) -> Iterator[ServerProcess]:
    """A server of this test's own, not started yet: to kill, to start again, or with settings of its own."""
    process = ServerProcess(own_database_url)
    yield process
    process.__exit__()


def migrate_quietly(url: str) -> None:
    """Migrates the session's template, if this test is the first to need one."""
    migrate_all(url, lambda _line: None)
