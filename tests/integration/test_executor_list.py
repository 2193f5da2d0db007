"""The executors as operators see them: the living first, with what they run, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.domain.executors import ExecutorState
from perdure_service.errors import InvalidArgument
from perdure_service.store import executors
from perdure_service.store.dbos_tables import APPLICATION, STATUS
from perdure_service.store.engine import create_engine

from tests.helpers.rpc import new_id

LEASES = {"alive": timedelta(hours=1), "expired": timedelta(seconds=-1), "gone": timedelta(hours=1)}
STATES = {"alive": ExecutorState.ALIVE, "expired": ExecutorState.EXPIRED, "gone": ExecutorState.GONE}


@pytest.fixture
def conn(dialect_url: str) -> Iterator[sa.Connection]:
    """A transaction that nobody else sees."""
    engine = create_engine(dialect_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    with engine.connect() as connection:
        yield connection
        connection.rollback()
    engine.dispose()


def make(conn: sa.Connection, kind: str, *, running: int = 0) -> str:
    executor_id = new_id(kind)
    executors.register(
        conn, executor_id, application_version="7", address="host:50051", max_running=10, ttl=LEASES[kind]
    )
    if kind == "gone":
        executors.remove(conn, executor_id)
    for number in range(running):
        for status in ("PENDING", "SUCCESS"):
            conn.execute(
                sa.text(
                    f"INSERT INTO {STATUS} (workflow_uuid, status, name, executor_id, application_name, created_at, "
                    "updated_at, recovery_attempts, priority) VALUES (:id, :status, 'x', :e, :a, 1, 1, 0, 0)"
                ),
                {"id": f"{executor_id}-{number}-{status}", "status": status, "e": executor_id, "a": APPLICATION},
            )
    return executor_id


def everything(conn: sa.Connection, page_size: int, *, include_gone: bool) -> list[executors.Executor]:
    found: list[executors.Executor] = []
    token = ""
    while True:
        page, token = executors.list_page(conn, include_gone=include_gone, page_size=page_size, page_token=token)
        assert len(page) <= page_size
        found += page
        if not token:
            return found


def test_the_living_come_first_with_what_they_run(conn: sa.Connection) -> None:
    made = {
        make(conn, kind, running=running): (STATES[kind], running)
        for kind, running in (("gone", 0), ("expired", 1), ("alive", 2), ("alive", 0), ("gone", 3))
    }
    for page_size in (1, 2, 100):
        found = [one for one in everything(conn, page_size, include_gone=True) if one.executor_id in made]
        assert {one.executor_id: (one.state, one.running) for one in found} == made
        assert len(found) == len(made)
        order = list(STATES.values())
        assert [order.index(one.state) for one in found] == sorted(order.index(one.state) for one in found)
        living = [one for one in everything(conn, page_size, include_gone=False) if one.executor_id in made]
        assert [one.executor_id for one in living] == [one.executor_id for one in found[:3]]
    (first, *_) = found
    assert (first.application_version, first.address, first.max_running) == ("7", "host:50051", 10)
    assert first.start_time < first.expire_time


def test_a_page_token_is_of_one_list(conn: sa.Connection) -> None:
    make(conn, "alive")
    make(conn, "alive")
    _, token = executors.list_page(conn, include_gone=False, page_size=1, page_token="")
    assert token
    for wrong in (token, "x"):
        with pytest.raises(InvalidArgument):
            executors.list_page(conn, include_gone=True, page_size=1, page_token=wrong)
