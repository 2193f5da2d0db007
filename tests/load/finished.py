"""Finished runs in great number, all rows of each copied from one by SQL, and what is done among them: calls, and a
recovery.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import psycopg
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb
from psycopg import sql as statements

from tests.helpers.rpc import TIMEOUT_S, Rpc, new_id
from tests.helpers.server import ServerProcess
from tests.helpers.waiting import eventually, scaled

RECOVERED = 20
"""Runs on the server that is killed."""
PATIENCE_S = 120.0
TABLES = {
    "dbos.workflow_status": "workflow_uuid",
    "dbos.workflow_input": "workflow_uuid",
    "dbos.workflow_output": "workflow_uuid",
    "dbos.operation_outputs": "workflow_uuid",
    "perdure.run": "workflow_id",
    "perdure.run_event": "workflow_id",
    "perdure.approval": "workflow_id",
    "dbos.notifications": "destination_uuid",
}
"""What a finished run has rows in, and the column of its workflow id."""
KINDS = ("start and wait", "get", "list", "list running", "list by label", "watch to the end")
"""Of calls, see `calls_of`."""


def fill(connection: psycopg.Connection[Any], model: str, first: int, end: int) -> None:
    """Copies a finished run, all its rows, under other ids: those of the numbers from `first` to before `end`."""
    row = connection.execute("SELECT workflow_id FROM perdure.run WHERE run_id = %s", (model,)).fetchone()
    assert row is not None
    names = {"model": row[0], "run_id": model, "first": first, "last": end - 1}
    for table, key in TABLES.items():
        schema, _, name = table.partition(".")
        found = connection.execute(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = %s "
            "AND is_generated = 'NEVER' ORDER BY ordinal_position",
            (schema, name),
        ).fetchall()
        columns = [one for (one,) in found]
        replaced = {key: "replace(t.{key}, %(run_id)s, %(run_id)s || '-' || n)", "run_id": "t.run_id || '-' || n"}
        replaced |= {"unique_request_id": "NULL", "message_uuid": "CAST(gen_random_uuid() AS TEXT)"}
        replaced |= {"created_at": _EARLIER.get(name, "t.created_at")}
        values = [
            statements.SQL(replaced.get(one, "t.{column}")).format(  # type: ignore[arg-type]
                key=statements.Identifier(key), column=statements.Identifier(one)
            )
            for one in columns
        ]
        connection.execute(
            statements.SQL(
                "INSERT INTO {table} ({columns}) SELECT {values} FROM {table} AS t, "
                "generate_series(CAST(%(first)s AS INT), CAST(%(last)s AS INT)) AS n WHERE t.{key} = %(model)s"
            ).format(
                table=statements.Identifier(schema, name),
                columns=statements.SQL(", ").join(map(statements.Identifier, columns)),
                values=statements.SQL(", ").join(values),
                key=statements.Identifier(key),
            ),
            names,
        )


_EARLIER = {"run": "t.created_at - n * INTERVAL '1 second'", "workflow_status": "t.created_at - n * 1000"}
"""The copies are older than what is measured, each by another second."""


def calls_of(rpc: Rpc, model: str) -> dict[str, Callable[[], Any]]:
    """Returns what makes a call, by its kind; `model` is the run of which there are copies."""
    timeout = scaled(TIMEOUT_S)

    def listing(**chosen: Any) -> Callable[[], Any]:
        request = pb.ListRunsRequest(page_size=50, **chosen)
        return lambda: rpc.runs.ListRuns(request, timeout=timeout)

    calls = (
        lambda: rpc.end_of(rpc.start("two-steps", {"number": 1}, run_id=new_id())),
        lambda: rpc.get(f"{model}-7"),
        listing(),
        listing(states=[run_pb.AGENT_RUN_STATE_RUNNING]),
        listing(labels={"bench": "growth"}),
        lambda: rpc.events(f"{model}-7"),
    )
    return dict(zip(KINDS, calls, strict=True))


def recover(service: ServerProcess, runs: int = RECOVERED) -> float:
    """Kills the server under its runs; returns how long after the next one's start all have ended."""
    with TemporaryDirectory() as folder, Rpc(service.address) as rpc:
        gate = Path(folder) / "gate"
        run_ids = [rpc.start("gated", {"gate": str(gate)}, run_id=new_id()) for _ in range(runs)]
        service.kill()
        gate.touch()
        began = monotonic()
        service.start()
        with Rpc(service.address) as again:
            for run_id in run_ids:
                eventually(lambda run_id=run_id: again.get(run_id).end_time.seconds, PATIENCE_S, what=f"{run_id} ended")
        return monotonic() - began
