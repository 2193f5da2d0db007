"""The catalogue's table: every executor writes the agents it has, so that any server knows every agent."""

from __future__ import annotations

import json
from collections.abc import Iterable

import sqlalchemy as sa

from perdure_service.domain.agents import AgentSpec
from perdure_service.domain.budgets import Budget
from perdure_service.store.runs import decode_token, encode_token

_COLUMNS = (
    "name, version, description, input_schema, output_schema, is_current, max_steps, max_tokens, queue, max_running"
)


def publish(conn: sa.Connection, specs: Iterable[AgentSpec], *, alone: bool = False) -> None:
    """Writes catalogue entries. What is current is what the executor that came last says.

    Args:
        conn: A transaction.
        specs: The agents that this executor has.
        alone: Whether no other executor can have agents (`dev`): what is not among them is forgotten.
    """
    if alone:
        conn.execute(sa.text("DELETE FROM perdure.agent"))
    for spec in sorted(specs, key=lambda one: (one.name, one.version)):
        if spec.current:
            conn.execute(
                sa.text("UPDATE perdure.agent SET is_current = false WHERE name = :name AND version <> :version"),
                {"name": spec.name, "version": spec.version},
            )
        conn.execute(
            sa.text(f"""
                INSERT INTO perdure.agent ({_COLUMNS})
                VALUES (:name, :version, :description, :input_schema, :output_schema, :is_current,
                    :max_steps, :max_tokens, :queue, :max_running)
                ON CONFLICT (name, version) DO UPDATE SET description = excluded.description,
                    input_schema = excluded.input_schema, output_schema = excluded.output_schema,
                    is_current = excluded.is_current, max_steps = excluded.max_steps,
                    max_tokens = excluded.max_tokens, queue = excluded.queue, max_running = excluded.max_running,
                    registered_at = now()
            """),
            {
                "name": spec.name,
                "version": spec.version,
                "description": spec.description,
                "input_schema": json.dumps(spec.input_schema),
                "output_schema": None if spec.output_schema is None else json.dumps(spec.output_schema),
                "is_current": spec.current,
                "max_steps": spec.budget.max_steps,
                "max_tokens": spec.budget.max_tokens,
                "queue": spec.queue,
                "max_running": spec.max_running,
            },
        )


def find(conn: sa.Connection, name: str, version: str) -> AgentSpec | None:
    """Returns a catalogue entry, the current one when `version` is empty; None when there is none."""
    row = conn.execute(
        sa.text(f"SELECT {_COLUMNS} FROM perdure.agent WHERE name = :name AND "
                "CASE WHEN :version = '' THEN is_current ELSE version = :version END"),
        {"name": name, "version": version},
    ).first()  # fmt: skip
    return None if row is None else _spec(row)


def list_page(conn: sa.Connection, *, page_size: int, page_token: str) -> tuple[list[AgentSpec], str]:
    """Returns a page of the catalogue by name and version, and the token of the next page (empty at the end).

    Raises:
        InvalidArgument: The token is not from this list.
    """
    name, version = decode_token(page_token, "agents", str, str) if page_token else ("", "")
    rows = conn.execute(
        sa.text(f"SELECT {_COLUMNS} FROM perdure.agent WHERE (name, version) > (:name, :version) "
                "ORDER BY name, version LIMIT :limit"),
        {"name": name, "version": version, "limit": page_size + 1},
    ).fetchall()  # fmt: skip
    specs = [_spec(row) for row in rows[:page_size]]
    more = len(rows) > page_size
    return specs, encode_token((specs[-1].name, specs[-1].version), "agents") if more else ""


def _spec(row: sa.Row[tuple[object, ...]]) -> AgentSpec:
    name, version, description, input_schema, output_schema, current, max_steps, max_tokens, queue, max_running = row
    return AgentSpec(
        str(name),
        str(version),
        str(description),
        json.loads(str(input_schema)),
        None if output_schema is None else json.loads(str(output_schema)),
        bool(current),
        Budget(int(str(max_steps)), int(str(max_tokens))),
        str(queue),
        int(str(max_running)),
    )
