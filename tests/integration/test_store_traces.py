"""What traces and metrics read of the database, on every dialect."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.domain.runs import RunKey, RunStart, RunState
from perdure_service.durable.spans import traced_run
from perdure_service.store import executors, run_counts, runs, traces
from perdure_service.store.dbos_tables import APPLICATION
from perdure_service.store.engine import create_engine


@pytest.fixture(scope="module")
def engine(dialect_url: str) -> Iterator[sa.Engine]:
    engine = create_engine(dialect_url, pool_size=5, statement_timeout=timedelta(seconds=10))
    yield engine
    engine.dispose()


@pytest.fixture
def namespace(engine: sa.Engine, request: pytest.FixtureRequest) -> str:
    """One for each test and dialect, as the module's database is shared."""
    return f"{request.node.name[5:12]}-{engine.dialect.name[:8]}-{engine.dialect.driver[-1]}".replace("_", "-")


def add(conn: sa.Connection, key: RunKey, status: str, *, parent: str | None = None, **columns: object) -> None:
    """Adds a run with DBOS's row."""
    executor_id = columns.pop("executor_id", "")
    conn.execute(
        sa.text(
            "INSERT INTO dbos.workflow_status (workflow_uuid, status, name, application_name, executor_id, created_at, "
            "updated_at) VALUES (:id, :status, 'x', :application, :executor_id, "
            "CAST(extract(epoch FROM now()) * 1000 AS BIGINT) - 60000, "
            "CAST(extract(epoch FROM now()) * 1000 AS BIGINT) - 30000)"
        ),
        {"id": key.workflow_id, "status": status, "application": APPLICATION, "executor_id": executor_id},
    )
    start = RunStart(key, key.namespace, "1", "hash", "request", "me", trace_id="ab" * 16)
    runs.insert(conn, start, input_argument=None, parent_workflow_id=parent, unique_request_id=None, executor_id="")
    for name, value in columns.items():
        text = f"UPDATE perdure.run SET {name} = :value WHERE workflow_id = :id"
        conn.execute(sa.text(text), {"value": value, "id": key.workflow_id})


def test_open_runs_are_counted_by_agent_and_state(engine: sa.Engine, namespace: str) -> None:
    rows = [
        ("ENQUEUED", {}, RunState.QUEUED),
        ("ENQUEUED", {"execution": 1}, RunState.QUEUED),
        ("DELAYED", {}, RunState.SCHEDULED),
        ("PENDING", {"execution": 1}, RunState.RUNNING),
        ("PENDING", {"execution": 1, "waiting_for": "signal:a"}, RunState.AWAITING_INPUT),
        ("PENDING", {"execution": 2, "waiting_for": "signal:b"}, RunState.AWAITING_INPUT),
        ("PENDING", {"execution": 1, "waiting_for": "sleep"}, RunState.SLEEPING),
        ("SUCCESS", {"execution": 1}, RunState.SUCCEEDED),
    ]
    with engine.begin() as conn:
        for number, (status, columns, _) in enumerate(rows):
            add(conn, RunKey.of_api(namespace, f"r{number}"), status, **columns)
        counts = run_counts.count_open(conn)
    assert {state: n for (agent, state), n in counts.runs.items() if agent == namespace} == {
        RunState.QUEUED: 2,
        RunState.SCHEDULED: 1,
        RunState.RUNNING: 1,
        RunState.AWAITING_INPUT: 2,
        RunState.SLEEPING: 1,
    }
    assert 29 < counts.queue_age_s < 60, "since it was last put into the queue"


def test_a_run_is_found_with_its_origin_and_its_children_in_order(engine: sa.Engine, namespace: str) -> None:
    origin, fork, *children = (RunKey.of_api(namespace, name) for name in ("origin", "fork", "fork.1", "fork.2"))
    with engine.begin() as conn:
        add(conn, origin, "SUCCESS", trace_id="cd" * 16)
        add(conn, fork, "SUCCESS", forked_from_workflow_id=origin.workflow_id)
        for child in (*children, RunKey.of_api(f"{namespace}-b", "elsewhere")):
            add(conn, child, "SUCCESS", parent=fork.workflow_id)
        row = traces.find(conn, fork.workflow_id)
        assert row is not None
        run = traced_run(row)
        assert run.key == fork
        assert run.forked_from is not None
        assert (run.forked_from.trace_id, run.forked_from.run_id) == ("cd" * 16, "origin")
        plain = traces.find(conn, origin.workflow_id)
        assert plain is not None
        assert traced_run(plain).forked_from is None
        found = traces.children(conn, namespace, [fork.workflow_id, origin.workflow_id], 10)
        assert [traced_run(one).key for one in found] == children
        assert len(traces.children(conn, namespace, [fork.workflow_id], 1)) == 1
        assert traces.find(conn, "nosuch") is None


def test_what_a_dead_executor_ended_last_is_found(engine: sa.Engine, namespace: str) -> None:
    with engine.begin() as conn:
        executors.register(
            conn, namespace, application_version="1", address="a", max_running=1, ttl=timedelta(seconds=5)
        )
        for number, age in enumerate(("0 seconds", "50 seconds", "70 seconds")):
            key = RunKey.of_api(namespace, f"r{number}")
            add(conn, key, "SUCCESS", executor_id=namespace)
            conn.execute(
                sa.text("UPDATE perdure.run SET ended_at = now() - CAST(:age AS INTERVAL) WHERE workflow_id = :id"),
                {"age": age, "id": key.workflow_id},
            )
        add(conn, RunKey.of_api(namespace, "goes-on"), "PENDING", executor_id=namespace)
        found = traces.ended_last(conn, [namespace, "another"], 60.0, 10)
        assert found == [RunKey.of_api(namespace, f"r{number}").workflow_id for number in (0, 1)]
        assert len(traces.ended_last(conn, [namespace], 60.0, 1)) == 1


def test_a_server_that_owns_its_database_is_told_whom_it_declared_gone(engine: sa.Engine, namespace: str) -> None:
    with engine.begin() as conn:
        for name in (namespace, f"{namespace}-2"):
            executors.register(
                conn, name, application_version="1", address="a", max_running=1, ttl=timedelta(seconds=5)
            )
        assert f"{namespace}-2" in executors.tombstone_others(conn, namespace)
        assert executors.tombstone_others(conn, namespace) == []
