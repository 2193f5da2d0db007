"""CockroachDB's own grammar takes every statement of the product, DBOS's included.

Run by `make test-sql`, which builds the grammar and records what the tests of the server send. Not part of `make test`.
What is shown is that the statements parse: not that there are such functions and tables, nor what they do.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from dbos._migration import get_dbos_migrations
from perdure_service.store.schema import MIGRATIONS

from tests.helpers import sql_record, sql_source
from tests.helpers.go_programs import program
from tests.helpers.sql_source import Statement, numbered

GRAMMAR = Path(__file__).parent / "grammar"
POSTGRESQL_ONLY = {
    "SET lock_timeout = '…s'": "schema changes on CockroachDB take no table locks to queue for",
}
"""What the server sends to PostgreSQL only, and why."""
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


@pytest.fixture(scope="module")
def recorded() -> list[Statement]:
    path = os.environ.get(sql_record.VARIABLE)
    if not path:
        pytest.skip(f"nothing was recorded: {sql_record.VARIABLE} is not set")
    return sql_record.recorded(Path(path))


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


def test_what_the_servers_of_the_tests_have_sent_parses(recorded: list[Statement]) -> None:
    refused = refusals(recorded)

    assert {statement.place.partition("/")[0] for statement in recorded} == {"perdure_service", "dbos"}
    assert not refused, told(refused)


def test_each_statement_with_gaps_in_the_source_was_seen_whole(recorded: list[Statement]) -> None:
    _, templates = sql_source.in_source()
    whole = [*recorded, *(Statement(each.place, numbered(each.text)) for each in migrations())]

    unseen = [
        template
        for template in templates
        if str(template) not in POSTGRESQL_ONLY
        and not template.place.startswith(UNSENT)
        and not any(template.fits(statement) for statement in whole)
    ]
    assert not unseen, "\n".join(f"{template.place}: {template}" for template in unseen)
