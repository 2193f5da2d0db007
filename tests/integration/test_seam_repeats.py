"""Events that wait for a ride are written by the repeat of a transaction that failed, as they were by the first try."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from dbos import _core
from dbos._dbos import _get_dbos_instance
from dbos._sys_db import SystemDatabase
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.domain.runs import Run
from perdure_service.durable import metering
from perdure_service.durable import operation as seam
from perdure_service.durable.claims import Claim, ClaimDatabase
from perdure_service.durable.payloads import Payloads
from perdure_service.durable.placement import Placement
from perdure_service.durable.requests import StartCommand
from perdure_service.durable.runtime import Runtime
from perdure_service.durable.service import RunService
from perdure_service.durable.system_database import PerdureSystemDatabase
from perdure_service.testing import BlockingHarness

from tests.helpers import judge
from tests.helpers.databases import DatabaseServer
from tests.helpers.waiting import eventually, scaled


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    with BlockingHarness(
        ["tests.helpers.harness_agents"], database_url=database_server.url, timeout_s=scaled(15)
    ) as harness:
        yield harness


def lost() -> sa.exc.OperationalError:
    """Returns what a lost connection raises."""
    why = psycopg.OperationalError("server closed the connection unexpectedly")
    return sa.exc.OperationalError("COMMIT", None, why, connection_invalidated=True)


def lose_one_reply(monkeypatch: pytest.MonkeyPatch, of: Callable[[Event], bool]) -> list[Event]:
    """Lets one commit happen that writes such an event, and loses its reply; returns where the event will be."""
    plain_run = seam.Operations._run
    failed: list[Event] = []

    @contextmanager
    def loses_once(operations: seam.Operations, operation: seam.Operation, begin: Any) -> Iterator[sa.Connection]:
        @contextmanager
        def begin_and_lose() -> Iterator[sa.Connection]:
            with begin() as conn:
                yield conn
            found = [event for events in operation._events.values() for event in events if of(event)]
            if found and not failed:
                failed.extend(found)
                raise lost()

        with plain_run(operations, operation, begin_and_lose) as conn:
            yield conn

    monkeypatch.setattr(seam.Operations, "_run", loses_once)
    return failed


def test_events_that_were_to_be_written_alone_are_not_lost_when_their_transaction_is_repeated(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = seam.event_log.append
    failed: list[Pack] = []

    def fails_once(conn: sa.Connection, pack: Pack) -> bool:
        written = append(conn, pack)
        if not failed and any(event.kind is EventKind.OUTPUT_DELTA for event in pack.events):
            failed.append(pack)
            raise lost()
        return written

    monkeypatch.setattr(seam.event_log, "append", fails_once)
    run = harness.start("murmurer")
    assert run.result() == "good bye"
    assert failed, "the transaction failed once"
    assert not any(event.kind is EventKind.STEP_SUCCEEDED for event in failed[0].events), "it was not the checkpoint's"
    assert run.output("text") == "hello world"


def test_events_that_ride_on_a_message_are_written_once_when_the_reply_to_its_commit_is_lost(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = lose_one_reply(monkeypatch, lambda event: event.step_name == "DBOS.send")
    run = harness.start("sender")
    assert run.result() == "hello"
    assert failed, "the reply was lost once"
    assert run.output("text") == "once "
    assert [event.step_name for event in run.events("step_succeeded")].count("DBOS.send") == 1


def test_a_start_whose_id_the_server_makes_begins_at_once_when_the_reply_to_its_commit_is_lost(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_one_reply(monkeypatch, lambda event: event.sequence == 0 and event.data.get("to") == "RUNNING")
    command = StartCommand("default", "adder", "1", "", "made by the server", {"steps": 1}, "test")

    async def start_and_wait(service: RunService) -> tuple[Run, bool, bool]:
        run, created = await service.start(command)
        ended, _ = await service.wait("default", run.key.run_id, full=True, timeout_s=scaled(15))
        return ended, created, (await service.start(command))[1]

    run, created, again = harness.harness.wait(harness.harness.call(start_and_wait))
    assert (run.output_json, created, again) == ("1", True, True)
    assert run.execution == 1, "it was not given back as a run that nobody executes"


def test_what_goes_wrong_in_telling_of_an_end_does_not_reach_dbos(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[str] = []
    write_outcome = PerdureSystemDatabase.update_workflow_outcome

    def counted(database: PerdureSystemDatabase, workflow_id: str, status: Any, **rest: Any) -> bool:
        outcomes.append(status)
        return write_outcome(database, workflow_id, status, **rest)

    commits: list[str] = []
    tell = seam.Operations.tell

    def counted_commit(operations: seam.Operations, execution: Any, workflow_id: str, packs: Sequence[Pack]) -> None:
        commits.extend(workflow_id for pack in packs if pack.events[-1].ends_run)
        tell(operations, execution, workflow_id, packs)

    def fails(*_: Any) -> None:
        raise ValueError("no meter")

    monkeypatch.setattr(PerdureSystemDatabase, "update_workflow_outcome", counted)
    monkeypatch.setattr(seam.Operations, "tell", counted_commit)
    monkeypatch.setattr(metering, "run_ended", fails)
    run = harness.start("adder", {"steps": 1})
    assert run.result() == 1
    # A stage of DBOS's that would have to wait is run again, in a thread; its commit is one.
    assert (commits, set(outcomes)) == ([run.run.key.workflow_id], {"SUCCESS"})


def test_what_a_claim_has_taken_is_run_when_it_fails_in_going_on(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = ClaimDatabase._claim_some, list[str]()

    def fails_in_going_on(database: ClaimDatabase, *arguments: Any) -> Claim:
        if seen == ["took"]:
            seen.append("failed")
            raise lost()
        claim = plain(database, *arguments)
        if claim.taken and not seen:
            seen.append("took")
            claim.over_share = {("an agent that holds its share", "1")}
        return claim

    monkeypatch.setattr(ClaimDatabase, "_claim_some", fails_in_going_on)
    monkeypatch.setattr(Placement, "_may_begin", lambda *_, **__: False)
    run = harness.start("adder", {"steps": 1})
    assert run.result() == 1
    assert seen == ["took", "failed"]
    assert run.get().execution == 1


def test_results_that_are_taken_at_once_are_each_recorded_and_told(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_record, plain_stow = PerdureSystemDatabase.record_get_result, Payloads.stow
    here, both = threading.local(), threading.Barrier(2)

    def record(*arguments: Any, **rest: Any) -> None:
        here.records = True
        try:
            plain_record(*arguments, **rest)
        finally:
            here.records = False

    def stow(*arguments: Any, **rest: Any) -> Any:
        if getattr(here, "records", False):
            both.wait(scaled(10))
        return plain_stow(*arguments, **rest)

    monkeypatch.setattr(PerdureSystemDatabase, "record_get_result", record)
    monkeypatch.setattr(Payloads, "stow", stow)
    run = harness.start("gatherer")
    assert run.result() == [0, 1]
    judge.assert_consistent(harness.harness._url, run.run.key.workflow_id)


def test_a_wait_that_is_woken_before_it_waits_goes_on_waiting(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, woken = SystemDatabase.recv_setup, threading.Event()

    def setup(*arguments: Any, **rest: Any) -> Any:
        found = plain(*arguments, **rest)
        found[1].set()  # as a late hint does, of a message that the wait before this one has taken
        woken.set()
        return found

    monkeypatch.setattr(SystemDatabase, "recv_setup", setup)
    run = harness.start("harness-listener")
    assert woken.wait(scaled(10))
    run.until("AWAITING_INPUT")
    harness.signal(run, "word", "hello")
    assert run.result() == "hello"


def test_a_start_that_fails_after_its_commit_tells_who_waits_and_its_run_is_given_back(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("cannot begin")

    command = StartCommand("default", "adder", "1", "", "fails to begin", {"steps": 1}, "test")
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "_begin", fails)
        with pytest.raises(RuntimeError, match="cannot begin"):
            harness.harness.wait(harness.harness.call(lambda service: service.start(command)))
    assert harness.start("adder", {"steps": 1}).result() == 1, "the writer's thread lives"


def test_a_run_that_could_not_be_begun_is_nobodys(harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no thread can be started")

    with monkeypatch.context() as patch:
        patch.setattr(_core, "execute_dequeued_workflow", fails)
        run = harness.start("adder", {"steps": 1})
        executions = _get_dbos_instance()._sys_db.executions
        eventually(lambda: not executions.of(run.run.key.workflow_id), what="so that `owners` gives it back")
