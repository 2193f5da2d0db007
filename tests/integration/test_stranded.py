"""Which runs are stranded, by version, by agent and by what executes them, page by page, and what is said of each."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.domain.runs import RunState
from perdure_service.domain.stranded import StrandedReason, StrandedRun
from perdure_service.errors import InvalidArgument
from perdure_service.store import executors, stranded
from perdure_service.store.dbos_tables import APPLICATION, STATUS, VERSIONS
from perdure_service.store.engine import create_engine

from tests.helpers.rpc import new_id

HOUR = timedelta(hours=1)
OF_VERSION, OF_AGENT = StrandedReason.NO_EXECUTOR_OF_VERSION, StrandedReason.NO_EXECUTOR_OF_AGENT


@pytest.fixture
def conn(dialect_url: str) -> Iterator[sa.Connection]:
    """A transaction that nobody else sees."""
    engine = create_engine(dialect_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    with engine.connect() as connection:
        yield connection
        connection.rollback()
    engine.dispose()


def serve(conn: sa.Connection, version: str, *agents: str, ttl: timedelta = HOUR) -> str:
    """Inserts an executor; returns its id."""
    executor_id = new_id("executor")
    executors.register(
        conn, executor_id, application_version=version, address="host:1", max_running=9, ttl=ttl, agents=agents
    )
    return executor_id


def make(
    conn: sa.Connection,
    run_id: str,
    version: str | None,
    *,
    agent: str = "greet",
    status: str = "ENQUEUED",
    executor_id: str = "",
    created_ms: int = 1_000,
    execution: int = 0,
) -> str:
    """Inserts a run; returns its id."""
    workflow_id = f"default.{run_id}.r"
    conn.execute(
        sa.text(
            f"INSERT INTO {STATUS} (workflow_uuid, status, name, executor_id, application_name, application_version, "
            "created_at, updated_at, recovery_attempts, priority) "
            "VALUES (:id, :status, :name, :executor, :application, :version, :at, :at, 0, 0)"
        ),
        {
            "id": workflow_id, "status": status, "name": f"{agent}@1", "executor": executor_id,
            "application": APPLICATION, "version": version, "at": created_ms,
        },
    )  # fmt: skip
    conn.execute(
        sa.text(
            "INSERT INTO perdure.run (workflow_id, namespace, run_id, agent, agent_version, input_sha256, request_id, "
            "caller, labels, context_id, trace_id, traceparent, execution, parked_for) VALUES (:id, 'default', :run, "
            ":agent, '1', '', '', '', CAST('{}' AS JSONB), '', '', '', :execution, :parked)"
        ),
        {
            "id": workflow_id, "run": run_id, "agent": agent, "execution": execution,
            "parked": "signal:go" if execution and status == "DELAYED" else None,
        },
    )  # fmt: skip
    return run_id


def everything(conn: sa.Connection, page_size: int = 100) -> list[StrandedRun]:
    found: list[StrandedRun] = []
    token = ""
    while True:
        page, token = stranded.list_page(conn, page_size=page_size, page_token=token)
        assert len(page) <= page_size
        found += page
        if not token:
            return found


def reasons(conn: sa.Connection) -> dict[str, StrandedReason]:
    return {one.key.run_id: one.reason for one in everything(conn)}


def test_a_run_is_stranded_when_its_version_or_its_agent_is_served_by_nobody(conn: sa.Connection) -> None:
    dead = serve(conn, "1", "greet@1", ttl=timedelta(seconds=-1))
    serve(conn, "2", "greet@1", "other@1")
    make(conn, "queued-1", "1")
    make(conn, "later-1", "1", status="DELAYED")
    make(conn, "parked-1", "1", status="DELAYED", execution=1)
    make(conn, "running-1", "1", status="PENDING", executor_id=dead, execution=1)
    make(conn, "unknown-2", "2", agent="lost")
    make(conn, "queued-2", "2")
    make(conn, "ended-1", "1", status="SUCCESS")
    made = ("queued-1", "later-1", "parked-1", "running-1")
    assert reasons(conn) == dict.fromkeys(made, OF_VERSION) | {"unknown-2": OF_AGENT}
    by_id = {one.key.run_id: one for one in everything(conn)}
    states = [by_id[name].state for name in made]
    assert states == [RunState.QUEUED, RunState.SCHEDULED, RunState.RUNNING, RunState.RUNNING]
    assert stranded.count(conn) == 5
    assert stranded.count(conn, except_version="1") == 1, "a server of version 1 is about to start"
    assert stranded.count(conn, except_version="2") == 5, "one of version 2 is there, without that agent"
    serve(conn, "1", "greet@1")
    serve(conn, "2", "lost@1")
    assert everything(conn) == []


def test_what_a_living_executor_executes_is_not_stranded_whatever_the_executor_has(conn: sa.Connection) -> None:
    executor_id = serve(conn, "1", "other@1")
    make(conn, "runs", "1", status="PENDING", executor_id=executor_id)
    make(conn, "waits", "1")
    assert reasons(conn) == {"waits": OF_AGENT}
    executors.remove(conn, executor_id)
    assert reasons(conn) == {"runs": OF_VERSION, "waits": OF_VERSION}


def test_an_executor_that_does_not_say_what_it_has_may_have_everything(conn: sa.Connection) -> None:
    serve(conn, "1")
    make(conn, "waits", "1")
    assert everything(conn) == []


def test_a_run_without_a_version_needs_the_latest_one(conn: sa.Connection) -> None:
    for place, version in enumerate(("1", "2")):
        conn.execute(
            sa.text(
                f"INSERT INTO {VERSIONS} (version_id, version_name, version_timestamp, created_at, application_name) "
                "VALUES (:id, :id, :at, :at, :application)"
            ),
            {"id": version, "at": 10**15 + place, "application": APPLICATION},
        )
    serve(conn, "1", "greet@1")
    make(conn, "foreign", None)
    (found,) = everything(conn)
    assert (found.application_version, found.reason) == ("2", OF_VERSION)
    serve(conn, "2", "greet@1")
    assert everything(conn) == []


def test_pages_come_oldest_first_and_no_run_twice(conn: sa.Connection) -> None:
    made = [
        make(conn, f"run-{number:02}", str(number % 3), created_ms=1_700_000_000_000 + number // 4)
        for number in range(20)
    ]
    for page_size in (1, 3, 100):
        assert [one.key.run_id for one in everything(conn, page_size)] == made
    _, token = stranded.list_page(conn, page_size=2, page_token="")
    make(conn, "older", "1", created_ms=1)
    rest, _ = stranded.list_page(conn, page_size=100, page_token=token)
    assert [one.key.run_id for one in rest] == made[2:]
    with pytest.raises(InvalidArgument):
        stranded.list_page(conn, page_size=2, page_token="x")


def test_the_advice_names_commands_for_what_is_served(conn: sa.Connection) -> None:
    serve(conn, "2", "greet@1")
    make(conn, "old", "1 b", created_ms=1)
    make(conn, "lost", "2", agent="lost", created_ms=2)
    old, lost = (one.advice for one in everything(conn))
    assert "`'PERDURE_APPLICATION_VERSION=1 b' perdure-server serve`" in old
    assert "`perdure cancel old`, then `perdure fork old`" in old
    assert "Serve lost@1 on a server of application version 2" in lost
    assert "`perdure cancel lost`, then `perdure fork lost --version VERSION`" in lost
    conn.execute(sa.text("UPDATE perdure.run SET parent_workflow_id = 'default.mum.r' WHERE run_id = 'old'"))
    assert "see to the run that started it, mum" in everything(conn)[0].advice
