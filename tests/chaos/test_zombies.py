"""A server that was frozen past its lease, while another one went on with its runs: it writes nothing, and ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import chaos_report, judge
from tests.helpers.rpc import Rpc
from tests.helpers.server import ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually, scaled

TTL_S = scaled(1.5)
SETTINGS = {"PERDURE_LEASE_TTL": str(TTL_S), "PERDURE_PARK_AFTER": "3600"}
"""What waits stays in memory, so that there is something to take from a zombie."""
TABLES = {
    "dbos.workflow_status": "workflow_uuid",
    "dbos.operation_outputs": "workflow_uuid",
    "perdure.run": "workflow_id",
    "perdure.run_event": "workflow_id",
    "perdure.approval": "workflow_id",
}
"""What belongs to a run, and by which column."""


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_effects_table(database_url)
    return database_url


@pytest.fixture(scope="module")
def living(url: str) -> Iterator[Rpc]:
    """The server that lives on."""
    with (
        ServerProcess(url, "tests.helpers.trouble_agents", command="serve", **SETTINGS) as server,
        Rpc(server.address) as rpc,
    ):
        yield rpc


def _rows(url: str, run_ids: list[str]) -> dict[str, list[Any]]:
    """Returns everything that the database has of some runs."""
    ids = [f"default.{run_id}.r" for run_id in run_ids]
    with sql(url) as connection:
        return {
            table: sorted(
                str(row)
                for row in connection.execute(
                    f"SELECT * FROM {table} WHERE {column} = ANY(%s)",  # type: ignore[arg-type]
                    (ids,),
                ).fetchall()
            )
            for table, column in TABLES.items()
        }


def _is_frozen(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("where", ["body", "commit", "outside"])
def test_a_zombie_writes_nothing_and_ends(url: str, living: Rpc, where: str) -> None:
    """It is frozen in a step's body, right before a COMMIT with the run's row locked, or whatever it does; all wait."""
    environment = {**SETTINGS, "PERDURE_TROUBLE_FREEZE": where}
    with ServerProcess(url, "tests.helpers.trouble_agents", command="serve", **environment) as zombie:
        assert zombie._process is not None
        pid = zombie._process.pid
        with Rpc(zombie.address) as rpc:
            asking, listening = rpc.start("asker"), rpc.start("listener")
            sleeping = rpc.start("sleeper", {"seconds": scaled(4)})
            rpc.approval_of(asking)
            rpc.until(listening, "AWAITING_INPUT")
            rpc.until(sleeping, "SLEEPING")
            freezing = rpc.start("freezer") if where != "outside" else rpc.start("counter", {"steps": 1})
            if where == "outside":
                rpc.output_of(freezing)
                os.kill(pid, signal.SIGSTOP)
                chaos_report.fault("servers frozen")
        try:
            eventually(lambda: _is_frozen(pid), what="it is frozen")
            runs = [asking, listening, sleeping, *([freezing] if where != "outside" else [])]
            for run_id in runs:
                eventually(lambda run_id=run_id: living.get(run_id).execution == 2, 15, what=f"{run_id} goes on")
            living.decide(living.approval_of(asking).approval_id)
            assert living.signal(listening, "hello")
            assert living.output_of(asking)["approved"]
            assert living.output_of(listening) == ["hello"]
            assert living.output_of(sleeping) == "slept"
            if where != "outside":
                assert living.output_of(freezing) == [0, "thawed", 1]
            before = _rows(url, [*runs, freezing])
        finally:
            os.kill(pid, signal.SIGCONT)
        assert zombie.wait_for_end() == 1, "it was declared gone, and knows it"
    assert _rows(url, [*runs, freezing]) == before, "after its tombstone it has written no row, and changed none"
    for run_id in runs:
        log = judge.assert_consistent(url, f"default.{run_id}.r")
        assert [event.kind for event in log].count("recovered") == 1
    if where != "outside":
        log = judge.log_of(url, f"default.{freezing}.r")
        judge.assert_effects(url, freezing, log, "count 0", "freezing", "count 1", deaths=1)
