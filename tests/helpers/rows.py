"""Looks at the rows that runs have in the tables, and makes runs behind the server's back."""

from __future__ import annotations

from collections.abc import Mapping

import psycopg
import sqlalchemy as sa

from tests.helpers.server import sql

OF_A_WORKFLOW = ("workflow_uuid", "destination_uuid", "workflow_id")
"""The columns by which a table, DBOS's or ours, says of which workflow its rows are."""


OF_CODE = {
    "dbos.operation_outputs": "workflow_uuid",
    "dbos.notifications": "destination_uuid",
    "dbos.workflow_events": "workflow_uuid",
    "dbos.streams": "workflow_uuid",
    "perdure.approval": "workflow_id",
    "perdure.payload_use": "workflow_id",
}
"""Where the code of a run leaves something, beside its log, and by which column."""


def counted(engine: sa.Engine, workflow_id: str, tables: Mapping[str, str]) -> dict[str, int]:
    """Returns how many rows each of some tables, given with their columns, has of a run."""
    with engine.connect() as conn:
        return {
            table: conn.execute(
                sa.text(f"SELECT count(*) FROM {table} WHERE {column} = :id"), {"id": workflow_id}
            ).scalar_one()
            for table, column in tables.items()
        }


def tables(connection: psycopg.Connection) -> list[tuple[str, str, str]]:
    """Returns schema, name and column of every table that has rows of a workflow, but for the reports of agents."""
    return connection.execute(
        "SELECT table_schema, table_name, column_name FROM information_schema.columns "
        "WHERE table_schema IN ('dbos', 'perdure') AND column_name = ANY(%s) ORDER BY 1, 2",
        (list(OF_A_WORKFLOW),),
    ).fetchall()


def rows_of(database_url: str, run_id: str) -> dict[str, int]:
    """Returns how many rows each table has of a run and its children; tables without any are left out."""
    found = {}
    with sql(database_url) as connection:
        for schema, table, column in tables(connection):
            row = connection.execute(
                f"SELECT count(*) FROM {schema}.{table} WHERE {column} LIKE %s", (f"default.{run_id}.r%",)
            ).fetchone()
            assert row is not None
            if row[0]:
                found[f"{schema}.{table}"] = row[0]
    return found


def copy_runs(database_url: str, run_id: str, copies: int) -> None:
    """Makes copies of a run behind the server's back, each a little younger: `<run_id>-<n>`."""
    with sql(database_url) as connection:
        for schema, table, key, own in (
            ("dbos", "workflow_status", "workflow_uuid", ()),
            ("dbos", "workflow_input", "workflow_uuid", ()),
            ("dbos", "operation_outputs", "workflow_uuid", ()),
            ("perdure", "run_event", "workflow_id", ()),
            ("perdure", "run", "workflow_id", ("run_id", "created_at")),
        ):
            names = [
                row[0]
                for row in connection.execute(
                    "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = %s",
                    (schema, table),
                ).fetchall()
            ]
            new = {
                key: "'default.' || %(run_id)s || '-' || n || '.r'",
                "run_id": "%(run_id)s || '-' || n",
                "created_at": "t.created_at + n * INTERVAL '1 millisecond'",
            }
            values = [new[name] if name == key or name in own else f't."{name}"' for name in names]
            columns = ", ".join(f'"{name}"' for name in names)
            connection.execute(
                f"INSERT INTO {schema}.{table} ({columns}) SELECT {', '.join(values)} "  # type: ignore[arg-type]
                f"FROM {schema}.{table} AS t, generate_series(1, %(copies)s) AS n WHERE t.{key} = %(workflow_id)s",
                {"run_id": run_id, "copies": copies, "workflow_id": f"default.{run_id}.r"},
            )
