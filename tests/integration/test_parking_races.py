"""What comes for a run while it is being parked is not lost: the parker is stopped between its statements."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from dbos import DBOS
from perdure_service.durable import operation as seam
from perdure_service.store import parked
from perdure_service.testing import BlockingHarness, BlockingRun, RunFailed

from tests.helpers import judge
from tests.helpers.databases import DatabaseServer
from tests.helpers.server import sql
from tests.helpers.waiting import eventually, scaled

BEFORE_LOCK, AFTER_LOOK = "lock", "has_come"
"""Where the parker is stopped: before it has the lock, and after it has looked for what comes, before it commits."""


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    with BlockingHarness(
        ["tests.helpers.waiting_agents"], database_url=database_server.url, timeout_s=scaled(15), park_after="0"
    ) as harness:
        yield harness


@contextmanager
def stopped_parker(monkeypatch: pytest.MonkeyPatch, workflow_id: str, where: str) -> Iterator[threading.Event]:
    """Stops whoever parks a run the first time, until the end of the `with`; yields what says that it stands."""
    stands, go = threading.Event(), threading.Event()
    plain = getattr(parked, where)

    def stopping(conn: Any, which: Any) -> Any:
        first = workflow_id in which and not stands.is_set()
        if first and where == BEFORE_LOCK:
            stands.set()
            assert go.wait(scaled(15))
        found = plain(conn, which)
        if first and where == AFTER_LOOK:
            stands.set()
            assert go.wait(scaled(15))
        return found

    monkeypatch.setattr(parked, where, stopping)
    try:
        yield stands
    finally:
        go.set()


def lock_waits(harness: BlockingHarness) -> bool:
    """Whether somebody waits for the lock of a row."""
    with sql(harness.harness._url) as connection:
        found = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        ).fetchone()
    return found is not None and found[0] > 0


Waker = Callable[[BlockingHarness, BlockingRun], object]


def signals(harness: BlockingHarness, run: BlockingRun) -> object:
    return harness.signal(run, "go", "x")


def sends(_harness: BlockingHarness, run: BlockingRun) -> object:
    return DBOS.send(run.run.key.workflow_id, "x", topic="go")


def decides(harness: BlockingHarness, run: BlockingRun) -> object:
    return harness.approve(run)


def ends_the_child(harness: BlockingHarness, run: BlockingRun) -> object:
    child = run.run.key.workflow_id + "-1"
    DBOS.send(child, "x", topic="go")
    with sql(harness.harness._url) as connection:
        return eventually(
            lambda: connection.execute(
                "SELECT 1 FROM dbos.workflow_status WHERE workflow_uuid = %s AND status = 'SUCCESS'", (child,)
            ).fetchone()
        )


def cancels(harness: BlockingHarness, run: BlockingRun) -> object:
    return harness.cancel(run)


@pytest.mark.parametrize("where", [BEFORE_LOCK, AFTER_LOOK])
@pytest.mark.parametrize(
    ("agent", "waker"),
    [
        ("waits-for-signals", signals),
        ("waits-for-signals", sends),
        ("blocking-waiter", signals),
        ("waits-for-approval", decides),
        ("waits-for-children", ends_the_child),
        ("waits-for-signals", cancels),
    ],
)
def test_what_comes_while_a_run_is_being_parked_is_not_lost(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch, agent: str, waker: Waker, where: str
) -> None:
    run_id = f"race-{agent}-{waker.__name__.replace('_', '-')}-{where.replace('_', '-')}"
    workflow_id = f"default.{run_id}.r"
    with stopped_parker(monkeypatch, workflow_id, where) as stands:
        run = harness.start(agent, {}, run_id=run_id)
        assert stands.wait(scaled(15))
        coming = threading.Thread(target=waker, args=(harness, run))
        coming.start()
        if where == BEFORE_LOCK:
            coming.join(scaled(15))  # all of it comes first, and the parker looks after it
            assert not coming.is_alive()
        else:
            eventually(lambda: lock_waits(harness))
    coming.join(scaled(15))
    if waker is cancels:
        with pytest.raises(RunFailed, match="CANCELLED"):
            run.result()
        end = "CANCELLED"
    else:
        assert run.result() is not None
        end = "SUCCEEDED"
    judge.assert_consistent(harness.harness._url, workflow_id, end)


def seam_is_at_work(harness: BlockingHarness) -> bool:
    assert harness.harness._engine is not None
    return len(harness.harness._engine.mortal.runtime.executions) > 0


def test_a_park_whose_commit_is_not_acknowledged_is_not_made_twice(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    plain = seam.Operations._run

    @contextmanager
    def losing(operations: Any, operation: Any, begin: Any) -> Iterator[Any]:
        @contextmanager
        def begin_and_lose() -> Iterator[Any]:
            with begin() as conn:
                yield conn
            parks = any(e.data.get("parked") for events in operation._events.values() for e in events)
            if parks and operation.attempts == 1:
                lost.extend(operation._events)
                gone = psycopg.OperationalError("server closed the connection unexpectedly")
                raise sa.exc.OperationalError("COMMIT", None, gone, connection_invalidated=True)

        with plain(operations, operation, begin_and_lose) as conn:
            yield conn

    monkeypatch.setattr(seam.Operations, "_run", losing)
    run = harness.start("waits-for-signals")
    workflow_id = run.run.key.workflow_id
    eventually(lambda: lost == [workflow_id] and not seam_is_at_work(harness))
    harness.signal(run, "go", 1)
    assert run.result() == [1]
    log = judge.assert_consistent(harness.harness._url, workflow_id)
    assert len([event for event in log if event.data.get("parked")]) == 1
