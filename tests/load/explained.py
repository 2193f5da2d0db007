"""Growth, explained: by which indexes all statements of the most frequent calls, of a server at rest and of a recovery
read, when many finished runs lie there, and which of them read a table that grows from end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb

from tests.helpers.plans import ExplainedDatabase, Plan
from tests.helpers.rpc import TIMEOUT_S, Reading, Rpc, new_id
from tests.helpers.server import ServerProcess, sql
from tests.helpers.waiting import eventually, scaled
from tests.load import finished

EXECUTIONS = 12
"""Of each call: psycopg prepares a statement at its 6th, and PostgreSQL may make a plan for any values at the 6th of
those (`prepare_threshold`, `plan_cache_mode`)."""
SETTINGS = {
    "PERDURE_LEASE_TTL": "3",
    "PERDURE_WATCH_POLL_INTERVAL": "0.05",
    "PERDURE_NAMESPACES": "default,brief",
    "PERDURE_NAMESPACE_RETENTION": "brief=300",
}
"""So that a server that rests has soon done all that it does from time to time, and a tailer has often looked. Nothing
is deleted, as nothing is in that namespace."""
AT_REST = {
    "the lease": "SET renewed_at = now()",
    "the reaper": "SET tombstoned_at = now() WHERE expires_at",
    "runs without an executor": "AND NOT EXISTS (SELECT 1 FROM perdure.executor AS e",
    "runs that it has lost": "AND updated_at <",
    "parked runs": "WHERE r.parked_for IS NOT NULL AND (",
    "retention": "AND ended_at <",
}
"""What a server does from time to time, and a piece of the statement by which it is known."""
SWEEP = "workflow_deadline_epoch_ms <="
"""A piece of the one by which it looks every second for delays and deadlines that are over."""
SWEEPS = EXECUTIONS + 6
"""More than of calls, as they need not be all on one connection."""
NEWS = "AS watched (workflow_id, sequence)"
"""A piece of the statement by which the tailer reads, for everything that is watched."""
MANY = 0.1
"""Of the rows of a table that grows: who reads so many and drops them has no index for what is looked for."""
PATIENCE_S = 60.0

Plans = dict[str, list[Plan]]
"""By what was going on."""


def explained(url: str, service: ServerProcess, model: str, recovered: int) -> Plans:
    """Restarts a server and has it do everything, explained; returns the plans of its statements.

    Args:
        url: Of its database, on an embedded PostgreSQL.
        service: Runs, and runs again afterwards.
        model: The run of which there are copies.
        recovered: Runs on it when it is killed.

    Raises:
        psycopg.Error: The database explains nothing; see `ExplainedDatabase`.
    """
    database = ExplainedDatabase(url)
    service.stop()
    service.start(**SETTINGS)
    found: Plans = {}
    with Rpc(service.address) as rpc:
        for kind, call in {**finished.calls_of(rpc, model), **_more_calls(rpc)}.items():
            for _ in range(EXECUTIONS):
                call()
            found[kind] = database.plans()
        found["watch a run that goes on"] = _watched(database, rpc)
    found["at rest"] = _rested(database, found)
    finished.recover(service, recovered)
    found["recovery"] = database.plans()
    at_rest = {plan.text for plan in found["at rest"]}
    background = [plan for plans in found.values() for plan in plans if plan.text in at_rest]
    others = {kind: [plan for plan in plans if plan.text not in at_rest] for kind, plans in found.items()}
    return {**others, "at rest": background}


def _more_calls(rpc: Rpc) -> dict[str, Callable[[], Any]]:
    """Returns calls that are explained only, by their kind."""

    def list_by_states() -> None:
        for state in run_pb.AgentRunState.values()[1:]:
            rpc.runs.ListRuns(pb.ListRunsRequest(states=[state]), timeout=scaled(TIMEOUT_S))

    def signal() -> None:
        run_id = rpc.start("listener")
        rpc.signal(run_id, name="go")
        rpc.end_of(run_id)

    def approve() -> None:
        run_id = rpc.start("asking")
        rpc.decide(rpc.approval_of(run_id).approval_id)
        rpc.end_of(run_id)

    def list_by_context() -> None:
        rpc.runs.ListRuns(pb.ListRunsRequest(context_id="talk"), timeout=scaled(TIMEOUT_S))

    return {
        "list by any state": list_by_states, "list by context": list_by_context, "signal": signal, "approve": approve
    }  # fmt: skip


def _watched(database: ExplainedDatabase, rpc: Rpc) -> list[Plan]:
    """Watches a run until the tailer has looked for its news often enough, and then to its end."""
    found: list[Plan] = []
    with TemporaryDirectory() as folder:
        gate = Path(folder) / "gate"
        run_id = rpc.start("gated", {"gate": str(gate)}, run_id=new_id())
        reading = Reading(rpc.watch(run_id, timeout=2 * PATIENCE_S))

        def looked() -> bool:
            found.extend(database.plans())
            return sum(NEWS in plan.text for plan in found) >= EXECUTIONS

        eventually(looked, PATIENCE_S, what="the tailer has looked for news")
        gate.touch()
        reading.join(PATIENCE_S)
    return [*found, *database.plans()]


def _rested(database: ExplainedDatabase, before: Plans) -> list[Plan]:
    """Waits until a server that rests has done all that it does from time to time."""
    found: list[Plan] = []
    sweeps = sum(SWEEP in plan.text for plans in before.values() for plan in plans)

    def rested() -> bool:
        found.extend(database.plans())
        missing = [what for what, piece in AT_REST.items() if not any(piece in plan.text for plan in found)]
        assert not missing, missing
        return sweeps + sum(SWEEP in plan.text for plan in found) >= SWEEPS

    eventually(rested, PATIENCE_S, what="a server at rest has done everything")
    return found


def faults(plans: Iterable[Plan], grown: Mapping[str, int]) -> dict[str, str]:
    """Returns what is wrong with statements, by their text: which read a table that has grown without an index.

    Args:
        plans: Theirs.
        grown: As `grown_tables` returns it.
    """
    found: dict[str, str] = {}
    for plan in plans:
        if scanned := sorted(plan.scanned & grown.keys()):
            found[plan.text] = f"sequential scan of {', '.join(scanned)}"
        for table, rows in grown.items():
            if (dropped := plan.discarded.get(table, 0)) > MANY * rows:
                found.setdefault(plan.text, f"{dropped:,} rows of {table} read and dropped")
    return found


def grown_tables(url: str) -> dict[str, int]:
    """Returns how many rows lie in the tables of finished runs, those that are empty left out."""
    with sql(url) as connection:
        rows = connection.execute(
            "SELECT relname, n_live_tup FROM pg_stat_user_tables "
            "WHERE schemaname || '.' || relname = ANY(%s) AND n_live_tup >= %s",
            (list(finished.TABLES), EXECUTIONS),
        ).fetchall()
    return dict(rows)


def notes(url: str, service: ServerProcess, model: str, level: str) -> list[str]:
    """Returns the lines of a table for a benchmark's result, or a sentence why there is none."""
    try:
        grown = grown_tables(url)
        found = explained(url, service, model, finished.RECOVERED)
    except psycopg.Error as error:
        return [f"The plans are not known here: {type(error).__name__}, {str(error).splitlines()[0]}."]
    lines = ["", f"| statements at {level} | read by these indexes of tables that grow | without an index |"]
    lines.append("|---|---|---|")
    for kind, plans in found.items():
        names = sorted({name for plan in plans for table, name in plan.indexes if table in grown})
        wrong = sorted(set(faults(plans, grown).values()))
        lines.append(f"| {kind} | {', '.join(f'`{name}`' for name in names)} | {'; '.join(wrong) or 'nothing'} |")
    return lines
