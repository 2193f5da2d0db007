"""All statements of the most frequent calls, of a server at rest and of a recovery use an index, whatever has grown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from perdure_service.durable.migrate import migrate_all
from perdure_service.store import checkpoints, writer_sessions

from tests.helpers.databases import DatabaseServer, given_server
from tests.helpers.rpc import Rpc, new_id
from tests.helpers.server import ServerProcess, sql
from tests.load import explained, finished

COPIES = 4_000
"""Of each of two runs: many enough that PostgreSQL takes an index wherever there is one, and made within a second."""
RECOVERED = 2
"""For so few it never pays to read a table of `COPIES` rows from end to end."""

pytestmark = pytest.mark.skipif(given_server() is not None, reason="the plans are read from the embedded one's log")


@dataclass
class Grown:
    """What was run among the copies, and what lay there: see `explained`."""

    url: str
    plans: explained.Plans
    tables: dict[str, int]


@pytest.fixture(scope="module")
def grown(database_server: DatabaseServer) -> Iterator[Grown]:
    """A server that has done everything, explained, with thousands of finished runs in its tables."""
    url = database_server.migrated("growth", lambda url: migrate_all(url, lambda _line: None))
    with ServerProcess(url, "tests.load.agents") as service:
        with Rpc(service.address) as rpc:
            model = rpc.start("two-steps", {"number": 1}, run_id=new_id("grown"), labels={"bench": "growth"})
            asking = rpc.start("asking", run_id=new_id("asking"))
            listening = rpc.start("listener", run_id=new_id("listening"))
            rpc.decide(rpc.approval_of(asking).approval_id)
            rpc.signal(listening, name="go")
            for run_id in (model, asking, listening):
                rpc.end_of(run_id)
        with sql(url) as connection:
            for run_id in (model, asking, listening):
                finished.fill(connection, run_id, 0, COPIES)
            connection.commit()
            connection.execute("ANALYZE")
        plans = explained.explained(url, service, model, RECOVERED)
        yield Grown(url, plans, explained.grown_tables(url))
    database_server.drop_of(url)


@pytest.mark.parametrize("form", ["json", "alone"])
@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_the_writers_statements_go_by_keys_before_there_are_any_statistics(
    database_server: DatabaseServer, kind: type[checkpoints.CheckpointRow], form: str
) -> None:
    """The plan of a prepared statement is kept; one that goes through an index of all runs costs more with each run."""
    url = database_server.migrated("planned", lambda url: migrate_all(url, lambda _line: None))
    with sql(url) as connection:
        for setting in writer_sessions.SESSION_SETTINGS:
            connection.execute(setting)
        names = dict.fromkeys(re.findall(r"%\((\w+)\)s", getattr(kind.statement, form)))
        numbers = {name: f"${number}" for number, name in enumerate(names, 1)}
        text = re.sub(r"%\((\w+)\)s", lambda found: numbers[found[1]], getattr(kind.statement, form))
        plan = "\n".join(row[0] for row in connection.execute(f"EXPLAIN (GENERIC_PLAN) {text}"))
    database_server.drop_of(url)

    read = set(re.findall(r"(?:Index|Index Only|Bitmap Index) Scan (?:Backward )?(?:using|on) (\S+)", plan))
    assert read, plan
    assert all(name.endswith("_pkey") for name in read), plan
    assert "Seq Scan" not in plan


def test_no_statement_of_a_server_reads_a_table_that_grows_from_end_to_end(grown: Grown) -> None:
    faults = [
        f"{kind}: {wrong}, by {text[:300]}"
        for kind, plans in grown.plans.items()
        for text, wrong in explained.faults(plans, grown.tables).items()
    ]

    assert not faults, "\n".join(faults)


def test_all_tables_of_finished_runs_had_grown_and_were_read_by_an_index(grown: Grown) -> None:
    read = {table for plans in grown.plans.values() for plan in plans for table, _ in plan.indexes}
    names = {table.partition(".")[2] for table in finished.TABLES}

    assert {name for name in names if grown.tables.get(name, 0) >= COPIES} == names
    assert names - {"workflow_output"} <= read  # an output is in `run`, too, and read from there
