"""CockroachDB's own grammar takes every statement of the product, DBOS's included.

Run by `make test-sql`, which builds the grammar and records what the tests of the server send. Not part of `make test`.
What is shown is that the statements parse: not that there are such functions and tables, nor what they do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from dbos._migration import get_dbos_migrations
from perdure_service.domain.regions import parse_regions
from perdure_service.store import provisioning
from perdure_service.store.schema import MIGRATIONS

from tests.helpers import sql_record, sql_source
from tests.helpers.go_programs import program
from tests.helpers.sql_source import Statement, numbered

GRAMMAR = Path(__file__).parent / "grammar"
K8S = Path(__file__).parents[2] / "k8s"
POSTGRESQL_ONLY = {
    "LISTEN …": "CockroachDB has none; there a changefeed tells of news",
    "SET lock_timeout = '…s'": "schema changes on CockroachDB take no table locks to queue for",
}
"""What the server sends to PostgreSQL only, and why."""
COCKROACHDB_ONLY = (
    "CREATE TABLE IF NOT EXISTS perdure.chunk_vector ( chunk_id TEXT PRIMARY KEY REFERENCES perdure.chunk (chunk_id) "
    "ON DELETE CASCADE, model TEXT NOT NULL, embedding VECTOR(384) NOT NULL )",
    "CREATE VECTOR INDEX IF NOT EXISTS chunk_vector_by_meaning ON perdure.chunk_vector (embedding vector_cosine_ops)",
    "SHOW SURVIVAL GOAL FROM DATABASE perdure_use1",
    "SELECT survival_goal FROM [SHOW SURVIVAL GOAL FROM DATABASE perdure_use1]",
)
"""Statements with gaps in the source, written out, which a PostgreSQL that passes for it is not sent."""
UNSENT = ("perdure_service/testing/databases.py",)
"""Where databases for users' tests are made, on either kind of server; the server sends nothing of it."""


def refusals(statements: Sequence[Statement]) -> dict[Statement, str]:
    """Returns which statements the grammar refuses, and what it says of them."""
    texts = json.dumps([statement.text for statement in statements])
    done = subprocess.run([program(GRAMMAR)], input=texts, capture_output=True, text=True, check=True)
    verdicts = json.loads(done.stdout)
    return {statement: verdict for statement, verdict in zip(statements, verdicts, strict=True) if verdict}


def told(refused: dict[Statement, str]) -> str:
    """Returns a line for each refusal: where, what, why."""
    return "\n".join(
        f"{statement.place}: {verdict.splitlines()[0]}\n    {statement.text}" for statement, verdict in refused.items()
    )


def migrations() -> Iterator[Statement]:
    """Yields what `perdure-server migrate` sends to CockroachDB."""
    for number, text in enumerate(get_dbos_migrations("dbos", use_listen_notify=False, is_cockroach=True), 1):
        if text:  # DBOS leaves numbers out
            yield Statement(f"DBOS's migration {number}", text)
    for migration in MIGRATIONS:
        given = migration.statements
        for text in given if isinstance(given, tuple) else given["cockroachdb"]:
            yield Statement(f"migration {migration.number}, {migration.name}", text)


def provisioning_of_cells() -> Iterator[Statement]:
    """Yields what `perdure-server migrate` sends to CockroachDB besides, for the regions of the manifests."""
    path = K8S / "overlays/multi-cluster/shared/regions.yaml"
    regions = parse_regions(path.read_text(), path.name)
    for cell in regions.cells.values():
        changes = [
            *provisioning.database_changes(regions, cell, cockroach=True),
            *provisioning.cell_changes(regions, cell),
        ]
        for change in changes:
            yield Statement(f"cell {cell.name}, {change.name}", change.statement)
            if change.done:
                yield Statement(f"cell {cell.name}, whether {change.name} is done", change.done)


def manifests() -> Iterator[Statement]:
    """Yields what Jobs of the manifests send: in files of SQL, and in the arguments of their commands."""
    for path in sorted(K8S.rglob("*.sql")):
        yield Statement(str(path.relative_to(K8S.parent)), path.read_text())
    for path in sorted(K8S.rglob("*.yaml")):
        for text in re.findall(r'"([^"]+)"', path.read_text()):
            if sql_source.is_sql(text):
                yield Statement(str(path.relative_to(K8S.parent)), _without_variables(text))


def _without_variables(text: str) -> str:
    return re.sub(r"\$\w+", "perdure_use1", text)


@pytest.fixture(scope="module")
def recorded() -> list[Statement]:
    path = os.environ.get(sql_record.VARIABLE)
    if not path:
        pytest.skip(f"nothing was recorded: {sql_record.VARIABLE} is not set")
    for_postgresql = _for_postgresql()
    return [each for each in sql_record.recorded(Path(path)) if each.text not in for_postgresql]


def _for_postgresql() -> set[str]:
    """Returns DBOS's migrations of a PostgreSQL, which it also chooses for one that passes for a CockroachDB."""
    texts = {text for listen in (False, True) for text in get_dbos_migrations("dbos", listen, is_cockroach=False)}
    return {numbered(text.replace("%", "%%")) for text in texts}  # as SQLAlchemy sends it


@pytest.mark.parametrize(
    "text",
    [
        "LISTEN run_event",
        "MERGE INTO perdure.run USING perdure.agent AS a ON a.name = agent WHEN MATCHED THEN DELETE",
        "VACUUM perdure.run",
        "WITH family (id) AS (SELECT 1) SELECT id FROM family",
        "CREATE FUNCTION f() RETURNS void AS $$ BEGIN PERFORM nonsense nonsense; END; $$ LANGUAGE plpgsql",
        "",
    ],
)
def test_a_statement_that_is_postgresqls_only_is_refused_and_named_with_its_place(text: str) -> None:
    statement = Statement("store/runs.py:1", text)
    refused = refusals([Statement("store/runs.py:2", "SELECT 1"), statement])

    assert list(refused) == [statement]
    assert told(refused).startswith("store/runs.py:1: ")


@pytest.mark.parametrize(
    ("file", "beginning"),
    [
        ("store/migrations.py", "INSERT INTO perdure.migration (number, name) VALUES ($1, $2)"),  # a string
        ("store/event_log.py", "SELECT first_sequence, events FROM perdure.run_event"),  # sa.text
        ("store/schema.py", "CREATE TABLE IF NOT EXISTS perdure.run ("),  # in a migration
        ("durable/transactions.py", "SELECT workflow_uuid FROM dbos.workflow_status WHERE"),  # in a function
        ("store/retention.py", "SELECT r.workflow_id, r.ended_at, NOT EXISTS"),  # with a gap
        (
            "store/provisioning.py",
            "SELECT 1 FROM [SHOW REGIONS FROM DATABASE …] WHERE …",
        ),  # begun only
    ],
)
def test_statements_are_found_in_the_source_however_they_are_written(file: str, beginning: str) -> None:
    statements, templates = sql_source.in_source()
    of_file = [each for each in (*statements, *templates) if each.place.startswith(f"perdure_service/{file}:")]

    assert any(str(each).startswith(beginning) for each in of_file), of_file


def test_the_statements_in_the_source_parse() -> None:
    statements, _ = sql_source.in_source()
    refused = refusals([statement for statement in statements if str(statement) not in POSTGRESQL_ONLY])

    assert len(statements) > 150
    assert not refused, told(refused)


def test_what_is_excepted_stands_in_the_source() -> None:
    statements, templates = sql_source.in_source()

    assert set(POSTGRESQL_ONLY) <= {str(each) for each in (*statements, *templates)}


def test_the_migrations_parse() -> None:
    statements = list(migrations())
    refused = refusals(statements)

    assert {statement.place.partition(" ")[0] for statement in statements} == {"DBOS's", "migration"}
    assert not refused, told(refused)


def test_what_makes_databases_and_roles_parses() -> None:
    statements = list(provisioning_of_cells())
    refused = refusals(statements)

    assert sum("SURVIVE REGION FAILURE" in statement.text for statement in statements) >= 3
    assert not refused, told(refused)


def test_what_the_jobs_of_the_manifests_send_parses() -> None:
    statements = list(manifests())
    refused = refusals(statements)

    assert {Path(statement.place).name for statement in statements} >= {"bootstrap.sql", "bootstrap.yaml", "job.yaml"}
    assert not refused, told(refused)


def test_what_is_for_cockroachdb_only_parses() -> None:
    _, templates = sql_source.in_source()
    statements = [Statement("written out here", text) for text in COCKROACHDB_ONLY]

    assert all(any(template.fits(statement) for template in templates) for statement in statements)
    assert not refusals(statements), told(refusals(statements))


def test_what_the_servers_of_the_tests_have_sent_parses(recorded: list[Statement]) -> None:
    refused = refusals(recorded)

    assert {statement.place.partition("/")[0] for statement in recorded} == {"perdure_service", "dbos"}
    assert not refused, told(refused)


def test_each_statement_with_gaps_in_the_source_was_seen_whole(recorded: list[Statement]) -> None:
    statements, templates = sql_source.in_source()
    migrating = [*migrations(), *provisioning_of_cells()]
    texts = [*COCKROACHDB_ONLY, *(numbered(each.text) for each in migrating)]
    whole = [*recorded, *statements, *(Statement("", text) for text in texts)]

    unseen = [
        template
        for template in templates
        if str(template) not in POSTGRESQL_ONLY
        and not template.place.startswith(UNSENT)
        and not any(template.fits(statement) for statement in whole)
    ]
    assert not unseen, "\n".join(f"{template.place}: {template}" for template in unseen)
