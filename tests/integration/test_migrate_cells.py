"""`perdure-server migrate` with regions: databases, roles, rights and homes, whatever happens in the middle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from dbos._migration import ensure_dbos_schema, get_dbos_migrations
from perdure_service.domain.regions import Place, parse_regions
from perdure_service.durable.migrate import migrate_cells, migrate_dbos, plan, verify_dbos
from perdure_service.errors import ConfigurationError
from perdure_service.settings import load_settings
from perdure_service.store import cells, diagnosis, migrations
from perdure_service.store.engine import create_engine, parse_url

from tests.helpers.cells import Cluster
from tests.helpers.databases import FORMS, DatabaseServer, not_in_another_form, url_in_form
from tests.helpers.regions import regions_yaml, write_regions
from tests.helpers.waiting import scaled


@pytest.fixture
def cluster(database_server: DatabaseServer) -> Iterator[Cluster]:
    """One that is not migrated."""
    if database_server.cockroach:
        pytest.skip("databases stand for cells on PostgreSQL only: this one's nodes have no such regions")
    made = Cluster(database_server)
    yield made
    made.drop()


@pytest.fixture(scope="module")
def migrated(database_server: DatabaseServer) -> Iterator[Cluster]:
    """One that is, for all tests that change nothing."""
    if database_server.cockroach:
        pytest.skip("databases stand for cells on PostgreSQL only: this one's nodes have no such regions")
    made = Cluster(database_server, copies=True)
    made.migrate()
    yield made
    made.drop()


def test_a_second_time_only_what_may_be_repeated_is_done(migrated: Cluster) -> None:
    report = migrated.migrate("nn1")
    assert f"the database {migrated.databases['nn1']} …" not in report
    assert f"the role {migrated.role} …" not in report
    assert "the row of the cell nn1 …" not in report
    assert report[0] == f"the cell nn1 in the database {migrated.databases['nn1']}:"
    assert "rights on the tables …" in report, "new tables need them"


def test_each_cell_has_its_row_and_its_servers_may_start(migrated: Cluster) -> None:
    assert migrated.rows("ss1", "SELECT cell, home_region, region, epoch FROM perdure.cell") == [
        ("ss1", "south", "south", 1)
    ]
    for cell in ("nn1", "ss1"):
        assert migrated.findings(cell, migrated.place(cell)) == []


def test_the_servers_role_may_do_what_servers_do_and_no_more(migrated: Cluster) -> None:
    url = parse_url(migrated.url_of("nn1"))
    engine = create_engine(url_in_form(url), pool_size=1, statement_timeout=migrations.STATEMENT_TIMEOUT)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SET ROLE {migrated.role}")
            connection.exec_driver_sql("SELECT count(*) FROM dbos.workflow_status, perdure.run, perdure.cell")
            connection.exec_driver_sql("DELETE FROM perdure.run")
            with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
                connection.exec_driver_sql("CREATE TABLE perdure.mine (number INT)")
    finally:
        engine.dispose()


def test_a_server_refuses_a_database_that_is_not_its_cells(migrated: Cluster) -> None:
    place = migrated.place("nn1")
    (wrong_name,) = migrated.findings("ss1", place)
    assert "PERDURE_DATABASE_URL names the database" in wrong_name
    named = regions_yaml({"nn1": migrated.databases["ss1"]}, role=migrated.role)
    mistaken = parse_regions(named, "regions.yaml")
    (wrong_row,) = migrated.findings("ss1", Place(mistaken, mistaken.cells["nn1"], "north"))
    assert f"{migrated.databases['ss1']} is the home of the cell ss1, not of nn1" in wrong_row
    (unaware,) = migrated.findings("ss1", None)
    assert "is the home of the cell ss1; set PERDURE_REGIONS_FILE" in unaware


@not_in_another_form
def test_a_server_refuses_a_database_that_is_nobodys_home(migrated: Cluster, database_url: str) -> None:
    database = parse_url(database_url).database
    regions = parse_regions(regions_yaml({"nn1": str(database)}), "regions.yaml")
    place = Place(regions, regions.cells["nn1"], "north")
    (finding,) = diagnosis.diagnose(database_url, (cells.verifier(place),))
    assert "has not been migrated as the home of the cell nn1" in finding.text
    assert diagnosis.diagnose(database_url, (cells.verifier(None),)) == []


def test_a_migrator_leaves_another_cells_database_as_it_is(migrated: Cluster) -> None:
    swapped = parse_regions(regions_yaml({"nn1": migrated.databases["ss1"]}, role=migrated.role), "regions.yaml")
    report: list[str] = []
    with pytest.raises(ConfigurationError, match="is the home of the cell ss1, not of nn1"):
        migrate_cells(migrated.url, swapped, ("nn1",), report.append)
    assert "DBOS's own tables …" not in report
    assert migrated.rows("ss1", "SELECT cell FROM perdure.cell") == [("ss1",)]


def test_a_home_region_is_not_moved_by_the_file(migrated: Cluster) -> None:
    text = regions_yaml({"nn1": migrated.databases["nn1"]}, role=migrated.role)
    moved = parse_regions(text.replace("north", "EAST").replace("west", "north").replace("EAST", "west"), "r.yaml")
    assert moved.cells["nn1"].region == "west"
    with pytest.raises(ConfigurationError, match="was made with the home region north, and the regions file says west"):
        migrate_cells(migrated.url, moved, ("nn1",), lambda _line: None)


@pytest.mark.parametrize(("ahead_s", "how"), [(7.0, "7 s ahead of"), (-7.0, "7 s behind"), (4.0, ""), (-4.0, "")])
def test_a_clock_that_is_more_than_five_seconds_off_is_refused(
    migrated: Cluster, monkeypatch: pytest.MonkeyPatch, ahead_s: float, how: str
) -> None:
    real_time = time.time
    monkeypatch.setattr(cells.time, "time", lambda: real_time() + ahead_s)
    found = migrated.findings("nn1", migrated.place("nn1"))
    assert len(found) == bool(how)
    assert all(f"The clock of this machine is {how} the database's" in text for text in found)


def test_it_goes_on_after_a_death_at_every_change(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each migrator makes one change more than those before it, and dies; the migrations die in other tests."""
    real_run = migrations._run
    made: list[str] = []

    def dying_run(connection: sa.Connection, statement: str, name: str, report: migrations.Report) -> None:
        real_run(connection, statement, name, report)
        if "perdure." not in name and name not in made:
            made.append(name)
            raise KeyboardInterrupt

    monkeypatch.setattr(migrations, "_run", dying_run)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            cluster.migrate("nn1")
    cluster.migrate("nn1")
    database = cluster.databases["nn1"]
    assert made == [
        f"the role {cluster.role}",
        f"the database {database}",
        f"the right to connect to {database}",
        "the row of the cell nn1",
        "rights on the schemas",
        "rights on the tables",
    ]
    assert cluster.findings("nn1", cluster.place("nn1")) == []


def _half_made(url: str) -> sa.Engine:
    """Makes DBOS's schema as a migrator leaves it on CockroachDB that dies between a change and its record."""
    engine = create_engine(url_in_form(url, FORMS[1]), pool_size=4, statement_timeout=migrations.STATEMENT_TIMEOUT)
    ensure_dbos_schema(engine, "dbos")
    with engine.begin() as connection:
        for sql in get_dbos_migrations("dbos", False, False)[:4]:
            connection.execute(sa.text(sql))
        connection.exec_driver_sql("INSERT INTO dbos.dbos_migrations VALUES (3)")
    return engine


def test_on_cockroachdb_dbos_begins_anew_where_its_making_broke_off(empty_database_url: str) -> None:
    engine = _half_made(empty_database_url)
    try:
        migrate_dbos(engine)
        verify_dbos(engine)
    finally:
        engine.dispose()


def test_on_cockroachdb_a_schema_with_workflows_is_left_alone(empty_database_url: str) -> None:
    engine = _half_made(empty_database_url)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO dbos.workflow_status (workflow_uuid, status) VALUES ('theirs', 'SUCCESS')"
            )
        with pytest.raises(sa.exc.DBAPIError, match="already exists"):
            migrate_dbos(engine)
        with engine.begin() as connection:
            assert connection.exec_driver_sql("SELECT workflow_uuid FROM dbos.workflow_status").scalar() == "theirs"
    finally:
        engine.dispose()


def test_two_migrators_at_once_take_turns(cluster: Cluster) -> None:
    with ThreadPoolExecutor(2) as pool:
        reports = [future.result(scaled(60)) for future in [pool.submit(cluster.migrate, "nn1") for _ in range(2)]]
    made = [f"the database {cluster.databases['nn1']} …" in report for report in reports]
    assert sorted(made) == [False, True]
    assert cluster.findings("nn1", cluster.place("nn1")) == []


def test_the_plan_does_nothing_and_names_every_statement(cluster: Cluster) -> None:
    text = "\n".join(plan(cluster.url, cluster.regions, ("nn1", "ss1")))
    for part in (
        f"CREATE DATABASE {cluster.databases['ss1']};",
        f"CREATE ROLE {cluster.role} WITH LOGIN;",
        "CREATE TABLE IF NOT EXISTS perdure.cell",
        'CREATE TABLE "dbos".workflow_status',
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA perdure, dbos TO {cluster.role};",
    ):
        assert part in text
    assert "REGION" not in text.split("-- the cell nn1, in the database")[0], "PostgreSQL has none"
    assert cluster.findings("nn1", None)[0].endswith("does not exist; create it, or correct the URL.")


def test_on_cockroachdb_a_database_gets_its_regions_and_its_goal() -> None:
    regions = parse_regions(regions_yaml({"nn1": "perdure_nn1"}), "regions.yaml")
    text = "\n".join(plan("cockroachdb+psycopg://root@nowhere:1/defaultdb", regions, ("nn1",)))
    for statement in (
        'CREATE DATABASE IF NOT EXISTS perdure_nn1 PRIMARY REGION "north" REGIONS "north", "south", "west" '
        "SURVIVE REGION FAILURE;",
        'ALTER DATABASE perdure_nn1 ADD REGION IF NOT EXISTS "west";',
        "ALTER DATABASE perdure_nn1 SURVIVE REGION FAILURE;",
        'ALTER DATABASE perdure_nn1 SET SECONDARY REGION "south";',
        "CREATE ROLE IF NOT EXISTS perdure WITH LOGIN;",
    ):
        assert f"\n{statement}\n" in text
    assert "CONCURRENTLY" not in text, "DBOS's statements are those for CockroachDB"
    for_a_zone = parse_regions(regions_yaml({"nn1": "perdure_nn1"}, survive="zone"), "regions.yaml")
    assert "SURVIVE ZONE FAILURE" in "\n".join(plan("cockroachdb://nowhere/db", for_a_zone, ("nn1",)))


def test_the_command_takes_the_file_and_names_an_unknown_cell(
    migrated: Cluster, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perdure_service import app

    path = write_regions(tmp_path, migrated.databases, role=migrated.role)  # type: ignore[arg-type]
    settings = load_settings(regions_file=path, region="north", database_url=migrated.url)
    lines: list[str] = []
    app.migrate_database(settings, lines.append, cells_named=["nn1"], plan=True)
    assert not any("ss1" in line for line in lines)
    with pytest.raises(ConfigurationError, match="--cell zz1: there is no such cell; there are nn1, ss1"):
        app.migrate_database(settings, lines.append, cells_named=["zz1"])


def test_the_check_says_where_a_server_is(migrated: Cluster, tmp_path: object) -> None:
    from perdure_service import app

    path = write_regions(tmp_path, migrated.databases, role=migrated.role)  # type: ignore[arg-type]
    settings = load_settings(regions_file=path, region="north", database_url=migrated.url_of("nn1"))
    lines: list[str] = []
    assert app.check(settings, lines.append), lines
    assert "regions: this server serves the cell nn1 of north" in lines
