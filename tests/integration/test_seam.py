"""Everything that DBOS does with a run is in the run's log, through every dialect and driver, whoever did it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from dbos import DBOSClient
from perdure_client import Client
from perdure_service.store.engine import create_engine

from tests.helpers import judge
from tests.helpers.server import ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually


@pytest.fixture(scope="module")
def server(dialect_url: str) -> Iterator[ServerProcess]:
    create_effects_table(dialect_url)
    with ServerProcess(dialect_url) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture
def mark(dialect_url: str, request: pytest.FixtureRequest) -> str:
    """A part of run ids that differs between the dialects, which share a database."""
    return dialect_url.partition(":")[0].replace("+", "-")


@contextmanager
def foreign_client(url: str) -> Iterator[DBOSClient]:
    """What another program has: DBOS's own client, which knows nothing of this product."""
    engine = create_engine(url, pool_size=2, statement_timeout=timedelta(seconds=10))
    client = DBOSClient(system_database_url=url, system_database_engine=engine, application_name="perdure")
    try:
        yield client
    finally:
        client.destroy()
        engine.dispose()


def test_steps_text_and_outcome_of_a_run_are_in_its_log(client: Client, server: ServerProcess, mark: str) -> None:
    run_id = f"log-{mark}"
    client.start("counter", {"steps": 3, "text": "words "}, run_id=run_id)
    assert client.wait(run_id).output == {"total": 3}
    log = judge.assert_consistent(server.database_url, f"default.{run_id}.r")
    judge.assert_effects(server.database_url, run_id, log, "count 0", "count 1", "count 2", deaths=0)
    assert judge.text_of(log) == "words " * 3


def test_a_plain_workflow_is_visible_in_all_it_does(client: Client, server: ServerProcess, mark: str) -> None:
    run_id = f"plain-{mark}"
    client.start("plain", {"name": "x"}, run_id=run_id)
    assert client.wait(run_id).state == "SUCCEEDED"
    log = judge.assert_consistent(server.database_url, f"default.{run_id}.r")
    names = [event.step_name for event in log if event.step_name]
    assert {"DBOS.setEvent", "plain_step", "DBOS.sleep", "DBOS.writeStream", "DBOS.getResult"} <= set(names)
    children = [event.data["child_run_id"] for event in log if event.kind == "child_started"]
    assert len(children) == 2
    for child in children:
        assert client.get(child).state == "SUCCEEDED"
        assert client.get(child).parent_run_id == run_id
    assert any(event.data.get("to") == "SLEEPING" for event in log)


def test_approvals_and_signals_work(client: Client, server: ServerProcess, mark: str) -> None:
    asker, listener = f"asker-{mark}", f"listener-{mark}"
    client.start("asker", {}, run_id=asker)
    client.start("listener", {}, run_id=listener)
    asked = eventually(lambda: list(client.approvals(run=asker)))
    assert client.get(asker).state == "AWAITING_INPUT"
    client.approve(asked[0], comment="ok")
    client.signal(listener, "more", {"n": 1})
    assert client.wait(asker).output["comment"] == "ok"
    assert client.wait(listener).output == [{"n": 1}]
    judge.assert_consistent(server.database_url, f"default.{asker}.r")
    judge.assert_consistent(server.database_url, f"default.{listener}.r")


def test_a_cancelled_parent_takes_its_children_along(client: Client, server: ServerProcess, mark: str) -> None:
    run_id = f"parent-{mark}"
    client.start("parent", {"children": 2, "seconds": 60}, run_id=run_id)
    eventually(lambda: client.get(run_id).last_sequence >= 3)
    client.cancel(run_id, reason="enough")
    judge.assert_consistent(server.database_url, f"default.{run_id}.r", "CANCELLED")
    for child in (f"{run_id}.1", f"{run_id}.2"):
        eventually(lambda child=child: client.get(child).state == "CANCELLED")


def test_a_run_that_a_foreign_client_enqueues_has_a_whole_log(client: Client, server: ServerProcess, mark: str) -> None:
    workflow_id = f"foreign/{mark}"
    with foreign_client(server.database_url) as foreign:
        options = {"queue_name": "perdure", "workflow_name": "plain_workflow", "workflow_id": workflow_id}
        handle = foreign.enqueue(options, "someone", count=5)
        assert handle.get_result()["value"] == 7
    log = judge.assert_consistent(server.database_url, workflow_id)
    assert log[0].data["to"] == "QUEUED"
    run = client.get(workflow_id)
    assert (run.state, run.agent) == ("SUCCEEDED", "plain")
    assert [event.sequence for update in client.watch(workflow_id) for event in update.events] == list(
        range(1, len(log) + 1)
    )


def test_a_run_that_a_foreign_client_cancels_ends_for_its_watchers(
    client: Client, server: ServerProcess, mark: str
) -> None:
    run_id = f"foreign-cancel-{mark}"
    client.start("sleeper", {"seconds": 60}, run_id=run_id)
    eventually(lambda: client.get(run_id).state == "SLEEPING")
    with foreign_client(server.database_url) as foreign:
        foreign.cancel_workflow(f"default.{run_id}.r")
    ends = [event for update in client.watch(run_id) for event in update.events]
    assert ends[-1].kind == "state_changed"
    judge.assert_consistent(server.database_url, f"default.{run_id}.r", "CANCELLED")
    assert client.get(run_id).state == "CANCELLED"


def test_a_run_that_was_enqueued_and_cancelled_by_foreign_clients_can_be_read(
    client: Client, server: ServerProcess, mark: str
) -> None:
    workflow_id = f"foreign-unseen-{mark}"
    with foreign_client(server.database_url) as foreign:
        foreign.enqueue(
            {"queue_name": "no-such-queue", "workflow_name": "plain_workflow", "workflow_id": workflow_id}, "someone"
        )
        foreign.cancel_workflow(workflow_id)
    # Its id could be that of a run, which would have another workflow id.
    assert [event.sequence for update in client.watch(workflow_id) for event in update.events] == [1, 2]
    assert client.get(workflow_id).state == "CANCELLED"
    log = judge.assert_consistent(server.database_url, workflow_id, "CANCELLED")
    assert [event.data["to"] for event in log] == ["QUEUED", "CANCELLED"]


def test_a_message_of_a_foreign_client_reaches_a_waiting_run(client: Client, server: ServerProcess, mark: str) -> None:
    run_id = f"foreign-message-{mark}"
    client.start("plain", {"name": "x", "wait": True}, run_id=run_id)
    eventually(lambda: client.get(run_id).state == "AWAITING_INPUT")
    with foreign_client(server.database_url) as foreign:
        foreign.send(f"default.{run_id}.r", "hello", topic="topic")
    assert client.wait(run_id).output["message"] == "hello"
    judge.assert_consistent(server.database_url, f"default.{run_id}.r")


def test_a_deadline_ends_a_run_as_expired(client: Client, server: ServerProcess, mark: str) -> None:
    run_id = f"deadline-{mark}"
    client.start("sleeper", {"seconds": 60}, run_id=run_id, deadline=timedelta(seconds=1))
    assert client.wait(run_id, timeout=20).state == "EXPIRED"
    judge.assert_consistent(server.database_url, f"default.{run_id}.r", "EXPIRED")


def test_a_delayed_run_begins_at_its_time(client: Client, server: ServerProcess, mark: str) -> None:
    run_id = f"delay-{mark}"
    run = client.start("counter", {"steps": 1}, run_id=run_id, delay=timedelta(seconds=1))
    assert run.state == "SCHEDULED"
    assert client.wait(run_id, timeout=20).state == "SUCCEEDED"
    log = judge.assert_consistent(server.database_url, f"default.{run_id}.r")
    states = [event.data["to"] for event in log if event.kind == "state_changed"]
    assert states == ["SCHEDULED", "QUEUED", "RUNNING", "SUCCEEDED"]


def test_an_ended_run_is_not_revived_and_takes_nothing(client: Client, server: ServerProcess, mark: str) -> None:
    run_id = f"ended-{mark}"
    client.start("counter", {"steps": 1}, run_id=run_id)
    before = client.wait(run_id).last_sequence
    assert client.cancel(run_id).state == "SUCCEEDED"
    with sql(server.database_url) as connection:
        connection.execute("SELECT 1")
    assert client.get(run_id).last_sequence == before
