"""Lists of runs: what a page promises while runs come, what each filter finds, and which index answers it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from perdure_service.domain.runs import Run, RunFilter, RunKey, RunStart, RunState
from perdure_service.errors import InvalidArgument
from perdure_service.store import deletions, runs
from perdure_service.store.engine import create_engine, is_cockroach


@pytest.fixture(scope="module")
def engine(dialect_url: str) -> Iterator[sa.Engine]:
    engine = create_engine(dialect_url, pool_size=8, statement_timeout=timedelta(seconds=20))
    yield engine
    engine.dispose()


@pytest.fixture
def namespace(engine: sa.Engine, request: pytest.FixtureRequest) -> str:
    """A namespace of the test's own, in every dialect's turn."""
    return f"n{abs(hash((request.node.name, engine.dialect.driver, engine.dialect.name))):x}"[:32]


def add(conn: sa.Connection, namespace: str, run_id: str, *, parent: str | None = None, label: str = "") -> None:
    """Adds a run as a start does: its time is that of the transaction's begin."""
    key = RunKey.of_api(namespace, run_id)
    conn.execute(
        sa.text("INSERT INTO dbos.workflow_status (workflow_uuid, status, name) VALUES (:id, 'ENQUEUED', 'x')"),
        {"id": key.workflow_id},
    )
    parent_id = RunKey.of_api(namespace, parent).workflow_id if parent else None
    start = RunStart(key, "x", "1", "hash", "request", "me", {"l": label} if label else {})
    runs.insert(conn, start, input_argument=None, parent_workflow_id=parent_id, unique_request_id=None, executor_id="")


def pages(engine: sa.Engine, namespace: str, run_filter: RunFilter, size: int) -> Iterator[list[Run]]:
    """Yields all pages of a list, each read when it is asked for."""
    token = ""
    while True:
        with engine.begin() as conn:
            page, token = runs.list_page(conn, namespace, run_filter, page_size=size, page_token=token)
        yield page
        if not token:
            return


def found(engine: sa.Engine, namespace: str, run_filter: RunFilter) -> list[str]:
    """Returns the ids of all pages."""
    return [run.key.run_id for page in pages(engine, namespace, run_filter, 2) for run in page]


def test_pages_are_consistent_while_runs_come_and_commit_late(engine: sa.Engine, namespace: str) -> None:
    for number in range(60):
        with engine.begin() as conn:
            add(conn, namespace, f"old-{number}")
    late = engine.connect()
    add(late, namespace, "late")  # begins here, and commits between two pages
    for number in range(60, 90):
        with engine.begin() as conn:
            add(conn, namespace, f"old-{number}")
    stop = threading.Event()

    def keep_coming() -> int:
        number = 0
        while not stop.is_set():
            with engine.begin() as conn:
                add(conn, namespace, f"new-{number}")
            number += 1
        return number

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(keep_coming)
        listed: list[str] = []
        for index, page in enumerate(pages(engine, namespace, RunFilter(), 7)):
            listed += [run.key.run_id for run in page]
            if index == 1:
                late.commit()
        stop.set()
        assert coming.result() > 0
    late.close()
    assert len(listed) == len(set(listed)), "no run comes twice"
    old = [run_id for run_id in listed if run_id.startswith("old-")]
    assert old == [f"old-{number}" for number in reversed(range(90))], "and none that was there is missing"
    first_old = listed.index(old[0])
    assert not [run_id for run_id in listed[first_old:] if run_id.startswith("new-")], "what came later is not in"
    assert listed.index("late") == listed.index("old-60") + 1, "one that had begun before comes at its place"


def test_runs_are_found_by_their_parent_and_their_time(engine: sa.Engine, namespace: str) -> None:
    for run_id, parent in (("a", None), ("a.1", "a"), ("b", None), ("a.2", "a"), ("a.2.4", "a.2")):
        with engine.begin() as conn:
            add(conn, namespace, run_id, parent=parent)
    assert found(engine, namespace, RunFilter(parent_run_id="a")) == ["a.2", "a.1"]
    assert found(engine, namespace, RunFilter(parent_run_id="a.2")) == ["a.2.4"]
    assert found(engine, namespace, RunFilter(parent_run_id="b")) == []
    everything = [run for page in pages(engine, namespace, RunFilter(), 2) for run in page]
    times = {run.key.run_id: run.create_time for run in everything}
    assert found(engine, namespace, RunFilter(from_create_time=times["b"])) == ["a.2.4", "a.2", "b"]
    assert found(engine, namespace, RunFilter(until_create_time=times["b"])) == ["a.1", "a"]
    both = RunFilter(from_create_time=times["a.1"], until_create_time=times["a.2"])
    assert found(engine, namespace, both) == ["b", "a.1"]


def test_a_token_is_good_for_its_own_list_only(engine: sa.Engine, namespace: str) -> None:
    for number in range(3):
        with engine.begin() as conn:
            add(conn, namespace, f"r{number}")
    since = datetime.now(UTC) - timedelta(hours=1)
    with engine.begin() as conn:
        _, token = runs.list_page(conn, namespace, RunFilter(from_create_time=since), page_size=2, page_token="")
        for other in (RunFilter(), RunFilter(from_create_time=since - timedelta(microseconds=1)), RunFilter(agent="x")):
            with pytest.raises(InvalidArgument):
                runs.list_page(conn, namespace, other, page_size=2, page_token=token)
        page, _ = runs.list_page(conn, namespace, RunFilter(from_create_time=since), page_size=2, page_token=token)
    assert [run.key.run_id for run in page] == ["r0"]


def test_a_page_of_large_runs_is_cut_to_what_a_message_carries(
    engine: sa.Engine, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MAX_PAGE_CHARS", 10_000)
    for number in range(12):
        with engine.begin() as conn:
            add(conn, namespace, f"r{number}", label="x" * 3_000)
    sizes = [len(page) for page in pages(engine, namespace, RunFilter(), 50)]
    assert sizes == [2, 2, 2, 2, 2, 2]
    assert len(found(engine, namespace, RunFilter())) == 12


def test_lists_are_answered_from_their_indexes(engine: sa.Engine) -> None:
    if is_cockroach(engine):
        pytest.skip("the plan is PostgreSQL's; CockroachDB has the same indexes")
    with engine.begin() as conn:
        for table, rows in (
            (
                "dbos.workflow_status (workflow_uuid, status, name)",
                "'plan-' || n % 5 || '.r' || n || '.r', CASE WHEN n % 2 = 0 THEN 'SUCCESS' ELSE 'PENDING' END, 'x'",
            ),
            (
                "perdure.run (workflow_id, namespace, run_id, agent, agent_version, input_sha256, request_id, caller, "
                "labels, context_id, trace_id, traceparent, parent_workflow_id, created_at)",
                "'plan-' || n % 5 || '.r' || n || '.r', 'plan-' || n % 5, 'r' || n, 'x', '1', '', '', '', "
                "CAST('{}' AS JSONB), '', '', '', 'plan-0.r' || n % 100 || '.r', now() - n * INTERVAL '1 minute'",
            ),
        ):
            conn.execute(sa.text(f"INSERT INTO {table} SELECT {rows} FROM generate_series(1, 6000) AS n"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(sa.text("ANALYZE perdure.run"))
        conn.execute(sa.text("ANALYZE dbos.workflow_status"))
    plans: list[str] = []

    def explain(conn: sa.Connection, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        if "FROM perdure.run AS r JOIN" in statement and not statement.startswith("EXPLAIN"):
            rows = conn.exec_driver_sql(f"EXPLAIN {statement}", parameters)  # type: ignore[arg-type]
            plans.append("\n".join(row[0] for row in rows))

    sa.event.listen(engine, "before_cursor_execute", explain)
    try:
        with engine.begin() as conn:
            succeeded = RunFilter(states=frozenset({RunState.SUCCEEDED}))
            page, token = runs.list_page(conn, "plan-1", succeeded, page_size=20, page_token="")
            runs.list_page(conn, "plan-1", succeeded, page_size=20, page_token=token)
            runs.list_page(conn, "plan-0", RunFilter(parent_run_id="r5"), page_size=20, page_token="")
            deletions.candidates(conn, "plan-1", succeeded, (page[-1].create_time, page[-1].key.workflow_id), 20)
    finally:
        sa.event.remove(engine, "before_cursor_execute", explain)
    by_time, next_page, by_parent, to_delete = plans
    assert all("run_by_time" in plan for plan in (by_time, next_page, to_delete)), plans
    assert "run_by_parent" in by_parent, by_parent
    assert not any("Seq Scan on run " in plan for plan in plans), plans
