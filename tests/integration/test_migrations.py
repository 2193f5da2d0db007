"""The migration runner on real databases: by advisory lock (PostgreSQL) and by claim row (the CockroachDB dialect)."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.errors import ConfigurationError, StoreUnavailable
from perdure_service.store import migrations
from perdure_service.store.engine import create_engine
from perdure_service.store.migrations import Migration, migrate, verify

from tests.helpers import eventually, free_port, scaled
from tests.helpers.databases import FORMS, DatabaseServer, url_in_form

COLOUR = Migration(1, "colour", ("CREATE TABLE IF NOT EXISTS perdure.colour (name TEXT PRIMARY KEY)",))
BY_NAME = Migration(2, "colour_by_name", ("CREATE INDEX IF NOT EXISTS colour_by_name ON perdure.colour (name)",))
SHADE = Migration(
    3,
    "shade",
    {
        "postgresql": ("ALTER TABLE perdure.colour ADD COLUMN IF NOT EXISTS shade TEXT DEFAULT '100%'",),
        "cockroachdb": ("ALTER TABLE perdure.colour ADD COLUMN IF NOT EXISTS shade STRING DEFAULT '100%'",),
    },
)
ON_POSTGRESQL = Migration(3, "shade", SHADE.statements["postgresql"])  # type: ignore[index]
ALL = (COLOUR, BY_NAME, ON_POSTGRESQL)

BY_CLAIM = pytest.mark.parametrize("url", FORMS[1:], indirect=True)
"""For what concerns the claim row only, which is CockroachDB's way."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "CLAIM_POLL_INTERVAL_S", 0.02)


@pytest.fixture(params=FORMS)
def url(empty_database_url: str, database_server: DatabaseServer, request: pytest.FixtureRequest) -> str:
    if request.param not in database_server.forms:
        pytest.skip(f"CockroachDB is not reached by {request.param}")
    return url_in_form(empty_database_url, request.param)


@pytest.fixture
def new_engine(url: str) -> Iterator[Callable[[], sa.Engine]]:
    engines: list[sa.Engine] = []

    def make() -> sa.Engine:
        engines.append(create_engine(url, pool_size=4, statement_timeout=timedelta(seconds=20)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


@pytest.fixture
def engine(new_engine: Callable[[], sa.Engine]) -> sa.Engine:
    return new_engine()


def nothing() -> None:
    """DBOS's part, where it does not matter."""


def applied(engine: sa.Engine) -> list[tuple[int, str]]:
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT number, name FROM perdure.migration ORDER BY number")
        return [(row.number, row.name) for row in rows]


def test_an_empty_database_is_migrated_with_dbos_first_and_a_line_each(engine: sa.Engine) -> None:
    report: list[str] = []
    migrate(engine, lambda: report.append("(dbos)"), report.append, ALL)
    assert report == [
        "DBOS's own tables …",
        "(dbos)",
        "1/3 perdure.colour …",
        "2/3 perdure.colour_by_name …",
        "3/3 perdure.shade …",
        "The schema is at version 3.",
    ]
    assert applied(engine) == [(1, "colour"), (2, "colour_by_name"), (3, "shade")]
    verify(engine, ALL)


def test_a_second_time_nothing_is_left_to_do(engine: sa.Engine) -> None:
    migrate(engine, nothing, lambda _line: None, ALL)
    report: list[str] = []
    migrate(engine, nothing, report.append, ALL)
    # The place is free when the database has noticed the end of the session that held it, a moment after the first.
    report = [line for line in report if not line.startswith("Another migrator is at work")]
    assert report == ["DBOS's own tables …", "The schema is at version 3."]


def test_the_sessions_settings_do_not_get_around(engine: sa.Engine) -> None:
    migrate(engine, nothing, lambda _line: None, ALL)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() in ("20s", "20000")


@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_it_continues_where_it_died_even_before_it_could_record(
    engine: sa.Engine, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0
    real_run = migrations._run

    def dying_run(*args: object) -> None:
        nonlocal runs
        real_run(*args)  # type: ignore[arg-type]
        runs += 1
        if runs == 1 + crash_at:  # the first is the table of the migrations
            raise KeyboardInterrupt

    monkeypatch.setattr(migrations, "_run", dying_run)
    with pytest.raises(KeyboardInterrupt):
        migrate(engine, nothing, lambda _line: None, ALL)
    assert len(applied(engine)) == crash_at - 1
    monkeypatch.setattr(migrations, "_run", real_run)
    migrate(engine, nothing, lambda _line: None, ALL)
    assert len(applied(engine)) == 3


def test_statements_may_differ_by_database(engine: sa.Engine) -> None:
    """STRING is a type of CockroachDB's only, so on PostgreSQL its dialect's statement fails."""
    with engine.connect() as connection:
        real_cockroach = "CockroachDB" in connection.exec_driver_sql("SELECT version()").scalar_one()
    migrating = (COLOUR, BY_NAME, SHADE)
    if engine.dialect.name == "cockroachdb" and not real_cockroach:
        with pytest.raises(ConfigurationError, match=r'3 perdure\.shade failed .*"string" does not exist'):
            migrate(engine, nothing, lambda _line: None, migrating)
    else:
        migrate(engine, nothing, lambda _line: None, migrating)


def test_a_failure_says_which_and_is_repeated_after_correction(engine: sa.Engine) -> None:
    bad = Migration(2, "wrong", ("CREATE TABLE perdure.colour (name TEXT)",))
    with pytest.raises(ConfigurationError, match=r"2 perdure\.wrong failed .*already exists.*migrate` continues"):
        migrate(engine, nothing, lambda _line: None, (COLOUR, bad))
    assert applied(engine) == [(1, "colour")]
    migrate(engine, nothing, lambda _line: None, ALL)
    verify(engine, ALL)


def test_migrators_at_once_take_turns(new_engine: Callable[[], sa.Engine]) -> None:
    inside = most_inside = 0
    reports: list[str] = []
    guard = threading.Lock()
    held = threading.Event()

    def dbos_migrate() -> None:
        nonlocal inside, most_inside
        with guard:
            inside += 1
            most_inside = max(most_inside, inside)
        if not held.is_set():  # the first one stays until another has reported that it waits
            eventually(lambda: "Another migrator is at work; waiting for it …" in reports)
            held.set()
        with guard:
            inside -= 1

    with ThreadPoolExecutor(4) as threads:
        engines = [new_engine() for _ in range(4)]
        for done in [threads.submit(migrate, engine, dbos_migrate, reports.append, ALL) for engine in engines]:
            done.result(scaled(30))
    assert most_inside == 1
    assert sum("1/3" in line for line in reports) == 1
    verify(engines[0], ALL)


CHILD = """
import sys, time
from datetime import timedelta
from perdure_service.store.engine import create_engine
from perdure_service.store.migrations import migrate
def hang():
    print("inside", flush=True)
    time.sleep(600)
migrate(create_engine(sys.argv[1], pool_size=4, statement_timeout=timedelta(seconds=20)), hang, lambda line: None, ())
"""


def test_a_killed_migrator_does_not_block_the_next(
    engine: sa.Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "inside\n"
        child.kill()
        child.wait()
    if engine.dialect.name == "cockroachdb":
        with engine.begin() as connection:  # instead of waiting for half a minute
            assert connection.exec_driver_sql("SELECT count(*) FROM perdure.migration_claim").scalar_one() == 1
            connection.exec_driver_sql("UPDATE perdure.migration_claim SET expires_at = now() + INTERVAL '0.3 second'")
    migrate(engine, nothing, lambda _line: None, ALL)
    verify(engine, ALL)


@BY_CLAIM
def test_a_claim_is_renewed_while_a_change_takes_long(
    new_engine: Callable[[], sa.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "CLAIM_TTL", timedelta(seconds=scaled(0.6)))
    engine, other = new_engine(), new_engine()
    order: list[str] = []
    started, finish = threading.Event(), threading.Event()
    expiries: set[object] = set()

    def long_change() -> None:
        started.set()
        assert finish.wait(scaled(30))
        order.append("first")

    def renewals() -> int:
        with engine.connect() as connection:
            expiries.add(connection.exec_driver_sql("SELECT expires_at FROM perdure.migration_claim").scalar_one())
        return len(expiries) - 1

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(migrate, engine, long_change, lambda _line: None, ALL)
        assert started.wait(scaled(30))
        second = threads.submit(migrate, other, lambda: order.append("second"), lambda _line: None, ALL)
        eventually(lambda: renewals() > 5)  # each is a third of its life, so it would have expired by now
        assert not second.done()
        finish.set()
        first.result(scaled(30))
        second.result(scaled(30))
    assert order == ["first", "second"]


@BY_CLAIM
def test_a_migrator_that_lost_its_claim_changes_nothing_more(engine: sa.Engine) -> None:
    def steal() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE perdure.migration_claim SET holder = 'thief', expires_at = now() + INTERVAL '1 hour'"
            )

    with pytest.raises(ConfigurationError, match="Another migrator has taken over"):
        migrate(engine, steal, lambda _line: None, ALL)
    assert applied(engine) == []


@pytest.mark.parametrize("url", FORMS[:1], indirect=True)
def test_a_schema_change_gives_way_to_a_transaction_and_comes_again(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", timedelta(seconds=1))
    migrate(engine, nothing, lambda _line: None, ALL[:2])
    report: list[str] = []
    with engine.connect() as reader, ThreadPoolExecutor(1) as threads:
        reader.exec_driver_sql("SELECT * FROM perdure.colour")
        migrating = threads.submit(migrate, engine, nothing, report.append, ALL)
        eventually(lambda: any("another transaction is in the way (55P03)" in line for line in report))
        reader.rollback()
        migrating.result(scaled(20))
    verify(engine, ALL)


def test_verify_says_what_to_do(engine: sa.Engine) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^The database has not been migrated; run `perdure-server migrate`\.$"
    ):
        verify(engine, ALL)
    migrate(engine, nothing, lambda _line: None, ALL[:1])
    with pytest.raises(
        ConfigurationError, match=r"older .*version 3; 2 colour_by_name is missing.*`perdure-server migrate`"
    ):
        verify(engine, ALL)
    migrate(engine, nothing, lambda _line: None, ALL)
    verify(engine, ALL)
    verify(engine, ALL[:2])  # one version newer: a rolling upgrade migrates first
    with pytest.raises(
        ConfigurationError, match="version 3, too new for this server, which knows 1; upgrade the server"
    ):
        verify(engine, ALL[:1])


def test_a_database_that_is_away_is_unavailable() -> None:
    engine = create_engine(
        f"postgresql://u@127.0.0.1:{free_port()}/d", pool_size=2, statement_timeout=timedelta(seconds=5)
    )
    with pytest.raises(StoreUnavailable):
        verify(engine, ALL)
    with pytest.raises(StoreUnavailable):
        migrate(engine, nothing, lambda _line: None, ALL)


def test_the_products_migrations_are_numbered_without_gaps() -> None:
    shipped = migrations.shipped()
    assert [migration.number for migration in shipped] == list(range(1, len(shipped) + 1))
    assert len({migration.name for migration in shipped}) == len(shipped)
    for migration in shipped:
        assert not isinstance(migration.statements, str)


def test_the_product_migrates_with_dbos_and_verifies(database_url: str) -> None:
    engine = create_engine(database_url, pool_size=2, statement_timeout=timedelta(seconds=20))
    verify(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM dbos.workflow_status").scalar_one() == 0
    engine.dispose()
