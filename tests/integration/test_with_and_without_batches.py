"""The checkpoint writer, and the plain ways beside DBOS's, change when rows are committed, never which."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from perdure_service.domain.events import decode_events

from tests.helpers.rpc import Rpc, new_id
from tests.helpers.server import ServerProcess, sql

RUNS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "steps": ("counter", {"steps": 3}),
    "a blocking agent": ("sync-counter", {"steps": 2}),
    "attempts": ("flaky", {}),
    "a failure": ("failing", {}),
    "events and text": ("talker", {}),
    "a sleep": ("sleeper", {}),
    "a child": ("parent", {"children": 1}),
}

CHANGES = re.compile(
    r"_ms$|_at$|_timestamp$|_xid$|^pack_id$|^first_sequence$|^previous_first$|^executor_id$|^request_id$"
)
"""Columns and members that no two runs have in common: times, tokens, and how events were packed."""

OWN = re.compile(r"[0-9a-f]{32}|\b\d{10}\.\d+")
"""Ids of traces, and the time until which a run sleeps."""


def _rows(url: str, workflow_id: str) -> dict[str, list[dict[str, Any]]]:
    found = {}
    with sql(url) as connection:
        for table, key in (
            ("dbos.workflow_status", "workflow_uuid"),
            ("dbos.workflow_input", "workflow_uuid"),
            ("dbos.workflow_output", "workflow_uuid"),
            ("dbos.operation_outputs", "workflow_uuid"),
            ("perdure.run", "workflow_id"),
        ):
            rows = connection.execute(
                f"SELECT to_jsonb(t) FROM {table} AS t WHERE {key} = %s ORDER BY to_jsonb(t)->>'function_id'",
                (workflow_id,),
            ).fetchall()
            found[table] = [_plain(row) for (row,) in rows]
        packs = connection.execute(
            "SELECT first_sequence, events FROM perdure.run_event WHERE workflow_id = %s ORDER BY 1", (workflow_id,)
        ).fetchall()
    events = [event for first, text in packs for event in decode_events(text, first)]
    found["events"] = [
        {**_plain(dict(event.data)), "kind": event.kind, "step": event.step_name, "attempt": event.attempt,
         "execution": event.execution, "sequence": event.sequence}
        for event in events
    ]  # fmt: skip
    return found


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with whether there is something instead of what differs from run to run."""
    return {name: value is not None if CHANGES.search(name) else value for name, value in row.items()}


def _of_each(address: str, url: str, runs: Mapping[str, tuple[str, dict[str, Any]]] = RUNS) -> dict[str, Any]:
    found = {}
    with Rpc(address) as rpc:
        for name, (agent, given) in runs.items():
            run_id = new_id()
            rpc.start(agent, given, run_id=run_id, labels={"of": name})
            rpc.end_of(run_id)
            text = json.dumps(_rows(url, f"default.{run_id}.r"), default=str, sort_keys=True)
            found[name] = json.loads(OWN.sub("own", text.replace(run_id, "run")))
    return found


def test_the_rows_are_the_same_with_and_without_batches(own_database_url: str) -> None:
    left = {}
    for batches in ("true", "false"):
        with ServerProcess(own_database_url, PERDURE_BATCH_CHECKPOINTS=batches) as server:
            left[batches] = _of_each(server.address, own_database_url)
    for name in RUNS:
        assert left["true"][name]["events"]
        for table, rows in left["true"][name].items():
            assert rows == left["false"][name][table], f"{name}: {table}"


STEPS = {
    name: (name, {})
    for name in (
        "values", "caught", "uncaught", "unserializable", "large-output", "large-end", "together", "in-steps",
        "cancelled-by-a-step",
    )
}  # fmt: skip


@pytest.mark.parametrize("batches", ["true", "false"])
def test_the_rows_are_the_same_when_steps_and_ends_go_dboss_way(own_database_url: str, batches: str) -> None:
    left = {}
    settings = {"PERDURE_BATCH_CHECKPOINTS": batches, "PERDURE_MAX_OUTPUT_BYTES": "65536"}
    modules = ("tests.helpers.agents", "tests.helpers.way_agents")
    for dboss in ("", "1"):
        with ServerProcess(own_database_url, *modules, PERDURE_TEST_DBOS_WAY=dboss, **settings) as server:
            left[dboss] = _of_each(server.address, own_database_url, {**RUNS, **STEPS})
    for name in (*RUNS, *STEPS):
        assert left[""][name]["events"]
        for table, rows in left[""][name].items():
            assert rows == left["1"][name][table], f"{name}: {table}"


@pytest.mark.parametrize("batches", ["true", "false"])
def test_the_setting_decides_who_writes(own_database_url: str, batches: str) -> None:
    with ServerProcess(own_database_url, PERDURE_BATCH_CHECKPOINTS=batches) as server, Rpc(server.address) as rpc:
        rpc.end_of(rpc.start("counter", {"steps": 1}))
        with sql(own_database_url) as connection:
            writers = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'WITH i AS%%' AND datname = current_database()",
            ).fetchone()
    assert writers is not None
    assert bool(writers[0]) == (batches == "true")
