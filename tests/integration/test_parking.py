"""Runs that wait leave memory, and nothing that comes for them is lost: every wait, and every way to be woken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from dbos import DBOS
from perdure_service.domain.events import EventKind
from perdure_service.durable import drain
from perdure_service.durable.parking import WaitingDatabase
from perdure_service.testing import BlockingHarness, BlockingRun, RunFailed

from tests.helpers import judge
from tests.helpers.databases import DatabaseServer
from tests.helpers.server import sql
from tests.helpers.waiting import eventually, scaled
from tests.helpers.waiting_agents import DONE, MAX_RECOVERIES


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    with BlockingHarness(
        ["tests.helpers.waiting_agents"],
        database_url=database_server.url,
        timeout_s=scaled(15),
        park_after="0",
        max_running=2,
    ) as harness:
        yield harness


def row(harness: BlockingHarness, workflow_id: str) -> dict[str, Any]:
    names = ("status", "owner_xid", "started_at_epoch_ms", "recovery_attempts", "queue_name", "parked_for")
    with sql(harness.harness._url) as connection:
        found = connection.execute(
            "SELECT s.status, s.owner_xid, s.started_at_epoch_ms, s.recovery_attempts, s.queue_name, r.parked_for "
            "FROM perdure.run AS r JOIN dbos.workflow_status AS s ON s.workflow_uuid = r.workflow_id "
            "WHERE r.workflow_id = %s",
            (workflow_id,),
        ).fetchone()
    return {} if found is None else dict(zip(names, found, strict=True))


def until_parked(harness: BlockingHarness, run: BlockingRun, mark: str, child: str = "") -> str:
    """Waits until a run, or a child of it, is parked for exactly this; returns its workflow id."""
    workflow_id = run.run.key.workflow_id + child
    eventually(lambda: row(harness, workflow_id).get("parked_for") == mark, what=f"parked for {mark}")
    return workflow_id


def done(run: BlockingRun) -> list[str]:
    return [what.partition(" ")[2] for what in DONE if what.startswith(f"{run.id} ")]


def test_a_run_that_is_parked_is_nobodys_and_nothing_of_it_stays_in_memory(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-signals")
    workflow_id = until_parked(harness, run, "signal:go")
    assert row(harness, workflow_id) == {
        "status": "DELAYED",
        "owner_xid": None,
        "started_at_epoch_ms": None,
        "recovery_attempts": 0,
        "queue_name": "perdure",
        "parked_for": "signal:go",
    }
    seen = run.get()
    assert (seen.state, seen.state_reason, seen.execution) == ("AWAITING_INPUT", "waits for signal go", 1)
    runtime = engine(harness)
    eventually(lambda: len(runtime.executions) == 0)
    eventually(lambda: workflow_id not in runtime.database_dbos._active_workflows_set.activeList())
    harness.signal(run, "go", "now")
    assert run.result() == ["now"]
    assert done(run) == ["before 0", "after"], "what is recorded is not run again"
    log = judge.assert_consistent(harness.harness._url, workflow_id)
    moves = [(e.data.get("from"), e.data["to"]) for e in log if e.kind is EventKind.STATE_CHANGED]
    begun = moves.index(("RUNNING", "AWAITING_INPUT"))
    # A start that comes while the slots, two here, are held by a look into the queue is queued, and claimed after it.
    assert moves[:begun] in ([(None, "RUNNING")], [(None, "QUEUED"), ("QUEUED", "RUNNING")])
    assert moves[begun:] == [
        ("RUNNING", "AWAITING_INPUT"),
        ("AWAITING_INPUT", "AWAITING_INPUT"),
        ("AWAITING_INPUT", "QUEUED"),
        ("QUEUED", "RUNNING"),
        ("RUNNING", "SUCCEEDED"),
    ]
    assert [e.data["message"] for e in log if e.kind is EventKind.PROGRESS] == ["begins"], "said once"
    assert EventKind.RECOVERED not in {e.kind for e in log}


class _Engine:
    """What the tests look at of the harness's engine."""

    def __init__(self, harness: BlockingHarness) -> None:
        assert harness.harness._engine is not None
        self.runtime = harness.harness._engine.mortal.runtime
        self.executions = self.runtime.executions

    @property
    def database_dbos(self) -> Any:
        from dbos._dbos import _get_dbos_instance

        return _get_dbos_instance()


def engine(harness: BlockingHarness) -> _Engine:
    return _Engine(harness)


def test_dbos_clients_elsewhere_are_notified_and_nobody_looks_a_hundred_times_a_second_for_what_to_tell(
    harness: BlockingHarness, database_server: DatabaseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if database_server.cockroach:
        pytest.skip("CockroachDB has no NOTIFY")
    database = engine(harness).runtime.database
    flushes: list[str] = []

    def flush() -> None:
        flushes.append("flush")
        type(database)._flush_notifications(database)

    monkeypatch.setattr(database, "_flush_notifications", flush)
    run = harness.start("publishes-when-told")
    workflow_id = until_parked(harness, run, "signal:go")
    with sql(harness.harness._url) as listening:
        listening.execute("LISTEN dbos_workflow_events_channel")
        listening.commit()
        harness.signal(run, "go", "now")
        told = next(listening.notifies(timeout=scaled(15), stop_after=1))
    assert told.payload == f"{workflow_id}::status"
    run.ended()
    assert flushes == ["flush"]


def test_what_is_signalled_to_the_end_is_told() -> None:
    told: list[str] = []
    database: Any = SimpleNamespace(
        use_listen_notify=True, _run_background_processes=False, _flush_notifications=lambda: told.append("told")
    )
    WaitingDatabase.run_notifier(database)
    assert told == ["told"]


def test_a_decision_wakes_who_asked(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-approval")
    workflow_id = until_parked(harness, run, "approval:2")
    seen = run.get()
    assert (seen.state, seen.state_reason, seen.pending_approvals) == ("AWAITING_INPUT", "asks: Go on?", 1)
    harness.approve(run)
    assert run.result()[0] == "APPROVED"
    assert done(run) == ["before", "after"]
    log = judge.assert_consistent(harness.harness._url, workflow_id)
    assert len([e for e in log if e.kind is EventKind.APPROVAL_REQUESTED]) == 1


def test_an_approval_that_nobody_decides_expires_while_its_run_is_parked(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-approval", {"timeout_s": 0.5})
    until_parked(harness, run, "approval:2")
    assert run.result()[0] == "EXPIRED"


def test_a_signal_that_does_not_come_in_time_wakes_by_its_timeout(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-signals", {"timeout_s": 0.5})
    until_parked(harness, run, "signal:go")
    with pytest.raises(RunFailed, match=r"no signal 'go' came within 0\.5 s"):
        run.result()


def test_a_sleep_goes_on_without_its_run(harness: BlockingHarness) -> None:
    began = time.monotonic()
    run = harness.start("waits-for-time", {"seconds": 0.8})
    workflow_id = until_parked(harness, run, "sleep")
    assert run.get().state == "SLEEPING"
    assert run.result() == "after"
    assert time.monotonic() - began >= 0.8
    judge.assert_consistent(harness.harness._url, workflow_id)


def test_blocking_code_is_parked_as_well(harness: BlockingHarness) -> None:
    run = harness.start("blocking-waiter", {"seconds": 0.4})
    until_parked(harness, run, "sleep")
    workflow_id = until_parked(harness, run, "signal:go")
    harness.signal(run, "go", 7)
    assert run.result() == 7
    assert done(run) == ["before", "after"]
    judge.assert_consistent(harness.harness._url, workflow_id)


@pytest.mark.parametrize("how", ["handle", "call", "gather", "gather-calls", "queue", "id", "first"])
def test_a_parent_is_parked_until_its_child_has_ended(harness: BlockingHarness, how: str) -> None:
    run = harness.start("waits-for-children", {"how": how})
    child = until_parked(harness, run, "signal:go", "-1")
    parent = until_parked(harness, run, f"result:{child}")
    assert run.get().state == "RUNNING"
    eventually(lambda: len(engine(harness).executions) == 0)
    DBOS.send(child, "x", topic="go")
    assert run.result() == ["0: x"]
    judge.assert_consistent(harness.harness._url, parent)
    judge.assert_consistent(harness.harness._url, child)
    assert len([what for what in DONE if what == f"{run.id}.1 child 0"]) == 1


@pytest.mark.parametrize("how", ["handle", "call", "queue"])
def test_a_blocking_parent_is_parked_until_its_child_has_ended(harness: BlockingHarness, how: str) -> None:
    run = harness.start("blocking-parent", {"how": how})
    child = until_parked(harness, run, "signal:go", "-1")
    parent = until_parked(harness, run, f"result:{child}")
    DBOS.send(child, "x", topic="go")
    assert run.result() == "0: x"
    judge.assert_consistent(harness.harness._url, parent)


@pytest.mark.parametrize("how", ["gather", "gather-calls"])
def test_a_run_that_waits_for_several_is_woken_by_any(harness: BlockingHarness, how: str) -> None:
    run = harness.start("waits-for-children", {"how": how, "children": 2})
    numbers = (1, 2) if how == "gather" else (1, 3)
    first, second = (run.run.key.workflow_id + f"-{number}" for number in numbers)
    for child in (first, second):
        eventually(lambda child=child: row(harness, child).get("parked_for") == "signal:go")  # type: ignore[misc]
    parent = until_parked(harness, run, f"result:{first}\nresult:{second}")
    DBOS.send(second, "b", topic="go")
    until_parked(harness, run, f"result:{first}")
    DBOS.send(first, "a", topic="go")
    assert run.result() == ["0: a", "1: b"]
    judge.assert_consistent(harness.harness._url, parent)


def test_what_comes_first_of_a_signal_and_a_time_is_done_first(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-either", {"seconds": 600})
    until_parked(harness, run, "signal:go\nsleep")
    harness.signal(run, "go", 1)
    eventually(lambda: done(run) == ["told"])
    until_parked(harness, run, "sleep")
    harness.cancel(run)
    other = harness.start("waits-for-either", {"seconds": 0.6})
    eventually(lambda: done(other) == ["slept"])
    until_parked(harness, other, "signal:go")
    harness.signal(other, "go", 2)
    assert other.result() == [2, "slept"]


@pytest.mark.parametrize("how", ["workflow", "step"])
def test_a_message_of_another_run_wakes(harness: BlockingHarness, how: str) -> None:
    run = harness.start("waits-for-signals")
    workflow_id = until_parked(harness, run, "signal:go")
    harness.run("sends", {"workflow_id": workflow_id, "how": how})
    assert run.result() == [f"from a {'step' if how == 'step' else 'run'}"]


def test_what_others_wrote_is_found_by_the_sweep(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-signals")
    workflow_id = until_parked(harness, run, "signal:go")
    with sql(harness.harness._url) as connection:
        connection.execute(
            "INSERT INTO dbos.notifications (message_uuid, destination_uuid, topic, message, serialization) "
            "VALUES ('foreign', %s, 'go', '\"swept\"', 'portable_json')",
            (workflow_id,),
        )
    engine(harness).runtime._waker.sweep()
    assert run.result() == ["swept"]


def test_a_message_on_another_topic_wakes_nobody(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-signals")
    workflow_id = until_parked(harness, run, "signal:go")
    harness.signal(run, "other", 1)
    assert engine(harness).runtime.database.wake([workflow_id]) == []
    assert run.get().execution == 1
    harness.cancel(run)


def test_a_parked_run_is_cancelled_at_once_and_withdraws_what_it_asks(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-approval")
    workflow_id = until_parked(harness, run, "approval:2")
    assert harness.cancel(run).state == "CANCELLED"
    assert run.get().pending_approvals == 0
    assert row(harness, workflow_id)["parked_for"] is None
    judge.assert_consistent(harness.harness._url, workflow_id, "CANCELLED")


def test_a_child_that_is_cancelled_wakes_its_parent(harness: BlockingHarness) -> None:
    run = harness.start("waits-for-children")
    child = until_parked(harness, run, "signal:go", "-1")
    until_parked(harness, run, f"result:{child}")
    engine(harness).runtime.database.cancel_workflows([child])
    with pytest.raises(RunFailed, match="FAILED"):
        run.result()


def test_code_that_catches_everything_is_ended_all_the_same(harness: BlockingHarness) -> None:
    DONE.clear()
    run = harness.start("catches-all")
    until_parked(harness, run, "signal:go")
    eventually(lambda: len(engine(harness).executions) == 0)
    assert "caught" in DONE
    assert done(run) == []
    harness.signal(run, "go", "x")
    assert run.result() == "x"


@pytest.mark.parametrize("how", ["wait", "event"])
def test_what_only_this_process_can_end_keeps_its_run_in_memory(harness: BlockingHarness, how: str) -> None:
    run = harness.start("waits-with-a-limit-in-memory", {"how": how})
    (execution,) = eventually(lambda: engine(harness).executions.of(run.run.key.workflow_id))
    eventually(lambda: execution.waits and drain._rests(execution), 1.5, what="it rests, for a server that stops")
    assert run.result() == 1
    assert run.get().execution == 1


def test_parking_counts_no_crash(harness: BlockingHarness) -> None:
    times = 3 * MAX_RECOVERIES
    run = harness.start("parks-often", {"times": times})
    workflow_id = run.run.key.workflow_id
    for number in range(1, times + 1):
        eventually(
            lambda number=number: (
                run.get().execution == number  # type: ignore[misc]
                and row(harness, workflow_id)["parked_for"] == "signal:go"
            )
        )
        assert row(harness, workflow_id)["recovery_attempts"] == 0
        harness.signal(run, "go", number)
    assert run.result() == times
