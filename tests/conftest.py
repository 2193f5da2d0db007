"""Fixtures for all tests: databases, seeds, and the rule that no folder may be skipped as a whole."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import chaos_report, marks, sql_record
from tests.helpers.databases import FORM, FORMS, DatabaseServer, given_server, url_in_form

HERE = Path(__file__).parent
SEED = int(os.environ.get("PERDURE_TEST_SEED") or random.SystemRandom().randrange(2**32))
os.environ["PERDURE_TEST_SEED"] = str(SEED)  # the workers of pytest-xdist are made later, and take it from here
CHAOS_FOLDER = "PERDURE_TEST_CHAOS_FOLDER"
_outcomes: dict[str, Counter[str]] = {}
_logged_marks: set[str] = set()
sql_record.start()


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder in which the chaos tests of all workers, which are made later, count."""
    if not hasattr(config, "workerinput"):
        os.environ[CHAOS_FOLDER] = tempfile.mkdtemp(prefix="perdure-chaos-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(CHAOS_FOLDER), ignore_errors=True)


@pytest.fixture(scope="session")
def chaos_folder() -> str:
    """The folder in which chaos tests count what they break and find."""
    return os.environ[CHAOS_FOLDER]


def pytest_report_header() -> list[str]:
    """The seed stands at the top of every report, so that a failure can be repeated."""
    return [f"PERDURE_TEST_SEED={SEED}"]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness that depends on the session's seed and the test's name only."""
    return random.Random(f"{SEED}:{request.node.nodeid}")


@pytest.fixture(scope="session")
def database_server() -> Iterator[DatabaseServer]:
    """A real server: the one that the environment names, else an embedded PostgreSQL with data of its own."""
    server = given_server()
    if server is not None:
        yield server
        server.drop_all()
        return
    from perdure_service.store import embedded

    data_dir = Path(tempfile.mkdtemp(prefix="perdure-test-"))
    try:
        with embedded.start(data_dir) as postgres:
            yield DatabaseServer(postgres.url("postgres"), cockroach=False)
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def database_url(database_server: DatabaseServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A migrated database, DBOS's tables and ours, of this module's own (but see `DatabaseServer.migrated`)."""
    url = database_server.migrated(Path(request.node.nodeid).stem, _migrate)
    yield url_in_form(url, FORM)
    database_server.drop_of(url)


@pytest.fixture(scope="module", params=FORMS)
def dialect_url(database_url: str, database_server: DatabaseServer, request: pytest.FixtureRequest) -> str:
    """The module's migrated database through each dialect and driver that the store must work with."""
    if request.param not in database_server.forms:
        pytest.skip(f"CockroachDB is not reached by {request.param}")
    return url_in_form(database_url, request.param)


@pytest.fixture
def empty_database_url(database_server: DatabaseServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database with nothing in it, of this test's own."""
    database = database_server.empty(request.node.name)
    yield database_server.url_of(database)
    database_server.drop(database)


def _migrate(url: str) -> None:
    # Late, as most of the unit tests can do without DBOS.
    from perdure_service.durable.migrate import migrate_all

    migrate_all(url, lambda _line: None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts, by folder, what ran and what was skipped, and searches what was logged for payloads and secrets."""
    for title, text in report.sections:
        if title.startswith(("Captured log", "Captured stderr")):
            _logged_marks.update(f"{report.nodeid}: {line}" for line in marks.marks_in(text))
    if report.when == "call" or report.skipped:
        _count(report.nodeid, "skipped" if report.skipped else "ran")
    elif report.failed:
        _count(report.nodeid, "ran")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Counts modules that were skipped while they were collected."""
    if report.skipped:
        _count(report.nodeid, "skipped")


def _count(node_id: str, outcome: str) -> None:
    parts = Path(node_id.partition("::")[0]).parts
    if len(parts) > 2 and parts[0] == HERE.name:
        _outcomes.setdefault(parts[1], Counter())[outcome] += 1


def _skipped_folders(config: pytest.Config) -> list[str]:
    """Returns the folders of which every test was skipped; of a choice of tests that may be so."""
    if any("::" in argument for argument in config.args) or config.option.keyword or config.option.markexpr:
        return []
    return sorted(folder for folder, counted in _outcomes.items() if counted["skipped"] and not counted["ran"])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A folder that was skipped as a whole is a failure: nothing was shown. So is a payload or a secret in a log, or a
    run that the chaos tests found to have lost or doubled something.
    """
    if hasattr(session.config, "workerinput"):
        return  # a worker of pytest-xdist has seen a part only; every report reaches the process that made it
    sound = chaos_report.read(Path(os.environ[CHAOS_FOLDER])).sound
    if (_skipped_folders(session.config) or _logged_marks or not sound) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Sums up the chaos tests; names the folders that were skipped, and the tests that logged what they must not."""
    chaos = chaos_report.read(Path(os.environ[CHAOS_FOLDER])).lines(SEED)
    if chaos:
        terminalreporter.section("chaos")
    for line in chaos:
        terminalreporter.write_line(line)
    for line in sorted(_logged_marks):
        terminalreporter.write_line(f"ERROR: a payload or a secret was logged by {line}", red=True)
    for folder in _skipped_folders(config):
        terminalreporter.write_line(f"ERROR: every test in tests/{folder} was skipped", red=True)
