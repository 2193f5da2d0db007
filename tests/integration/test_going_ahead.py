"""Code has what its step returned while that is committed; nothing comes of it before, and its end goes with it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from dbos._dbos import _get_dbos_instance
from perdure_service.domain.events import EventKind
from perdure_service.domain.runs import RunState
from perdure_service.durable import hops, plain_runs
from perdure_service.durable.checkpoints import Presented
from perdure_service.durable.executions import Execution
from perdure_service.durable.runtime import Runtime
from perdure_service.durable.system_database import PerdureSystemDatabase
from perdure_service.store.checkpoint_writer import CheckpointWriter
from perdure_service.store.checkpoints import CheckpointRow, OutcomeRow, StartRow, StepRow, Written
from perdure_service.testing import BlockingHarness, BlockingRun, RunFailed
from perdure_service.testing import engine as testing_engine

from tests.helpers import ahead_agents, judge, rows
from tests.helpers.databases import DatabaseServer
from tests.helpers.waiting import eventually, scaled

NEXT = [("ahead-then", what) for what in ahead_agents.NEXT] + [
    ("ahead-then-blocking", what) for what in ahead_agents.NEXT_BLOCKING
]

TRIES = 20
"""A writer may take a step before its code, in another thread, comes to its end; how often is the machine's."""

BEFORE = 1
"""The number of the first step."""


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    with pytest.MonkeyPatch.context() as patch:
        # As a server has it: checkpoints share commits.
        patch.setattr(
            testing_engine,
            "Runtime",
            partial(Runtime, checkpoint_timeout=timedelta(seconds=10), max_output_bytes=9_999),
        )
        with BlockingHarness(
            ["tests.helpers.ahead_agents"], database_url=database_server.url, timeout_s=scaled(15)
        ) as harness:
            yield harness


class Commits:
    """What the checkpoint writer commits; a test may hold it up, have it write nothing, or lose its reply."""

    def __init__(self) -> None:
        self.rows: list[CheckpointRow] = []
        self.holds: type[CheckpointRow] | None = None
        self.begun = threading.Event()
        """Set when there is a commit of what is held."""
        self.may_go_on = threading.Event()
        self.spoils: type[CheckpointRow] | None = None
        self.lost = False
        """Whether what is spoiled is committed, and its reply is lost; else nothing of it is written."""

    def commit(
        self,
        plain: Callable[..., dict[str, Written]],
        writer: CheckpointWriter,
        conn: Any,
        batch: Sequence[CheckpointRow],
    ) -> dict[str, Written]:
        self.rows += batch
        if self.holds is not None and any(type(row) is self.holds for row in batch):
            self.begun.set()
            assert self.may_go_on.wait(scaled(15))
        if self.spoils is not None and any(type(row) is self.spoils for row in batch):
            if not self.lost:
                return {}
            plain(writer, conn, batch)
            raise sa.exc.OperationalError(
                "COMMIT", None, psycopg.OperationalError("the reply is lost"), connection_invalidated=True
            )
        return plain(writer, conn, batch)

    def of(self, run: BlockingRun) -> list[type[CheckpointRow]]:
        """Returns the kinds of a run's rows that were to be committed."""
        return [type(row) for row in self.rows if row.workflow_id == run.run.key.workflow_id]


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Commits]:
    """All batches are committed by threads, where they are broken."""
    made = Commits()
    plain = CheckpointWriter.commit
    monkeypatch.setattr(CheckpointWriter, "begin", lambda *_: None)
    monkeypatch.setattr(CheckpointWriter, "commit", lambda *arguments: made.commit(plain, *arguments))
    yield made
    made.may_go_on.set()


@contextmanager
def held(commits: Commits, kind: type[CheckpointRow]) -> Iterator[None]:
    """Holds up the commit of a kind of rows until the end of the block."""
    commits.begun.clear()
    commits.may_go_on.clear()
    commits.holds = kind
    try:
        yield
    finally:
        commits.holds = None
        commits.may_go_on.set()


def bodies(run: BlockingRun, name: str) -> int:
    return ahead_agents.bodies[f"{run.run.key.workflow_id} {name}"]


def went_on(run: BlockingRun) -> int:
    return ahead_agents.went_on[run.run.key.workflow_id]


def left(run: BlockingRun) -> dict[str, int]:
    """Returns how many rows of each table in which its code leaves something a run has."""
    found = rows.counted(_get_dbos_instance()._sys_db.engine, run.run.key.workflow_id, rows.OF_CODE)
    return {table: count for table, count in found.items() if count}


def packs(run: BlockingRun) -> list[list[str]]:
    """Returns what happened by each pack of a run's log."""
    url = str(_get_dbos_instance()._sys_db.engine.url.render_as_string(hide_password=False))
    log = judge.log_of(url, run.run.key.workflow_id)
    with _get_dbos_instance()._sys_db.engine.connect() as conn:
        firsts = conn.execute(
            sa.text("SELECT first_sequence FROM perdure.run_event WHERE workflow_id = :id ORDER BY 1"),
            {"id": run.run.key.workflow_id},
        ).scalars()
        places = [*firsts, len(log) + 1]
    return [[event.kind.value for event in log[first - 1 : after - 1]] for first, after in itertools.pairwise(places)]


def assert_ended_once(run: BlockingRun, steps: int = 1) -> None:
    """Fails unless each step is there once, in the rows and in the log, and its body has run once."""
    assert [step.step_id for step in run.steps()] == list(range(1, steps + 1))
    assert len(run.events(EventKind.STEP_SUCCEEDED)) == steps
    assert len([event for event in run.events() if event.ends_run]) == 1
    assert bodies(run, "before") == steps


# ---- what is committed together --------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["ahead-ends", "ahead-ends-blocking"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "fails"])
def test_the_last_step_and_the_end_are_one_commit(
    harness: BlockingHarness, commits: Commits, fails: bool, agent: str
) -> None:
    def is_one() -> bool:
        run = harness.start(agent, {"steps": 2, "fails": fails, "says": "nearly done"})
        ended = run.ended()
        assert ended.state is (RunState.FAILED if fails else RunState.SUCCEEDED)
        assert ended.progress is not None
        assert_ended_once(run, steps=2)
        if commits.of(run) != [StartRow, StepRow, OutcomeRow]:
            return False
        assert packs(run)[2:] == [["step_started", "step_succeeded", "progress", "state_changed"]]
        return True

    assert any(is_one() for _ in range(TRIES))


@pytest.mark.parametrize("agent", ["ahead-ends", "ahead-ends-blocking"])
def test_it_is_so_when_the_loop_writes(harness: BlockingHarness, agent: str) -> None:
    def is_one() -> bool:
        run = harness.start(agent, {"steps": 3})
        assert run.result() == 3
        assert_ended_once(run, steps=3)
        last = [kinds[-1] for kinds in packs(run)]
        return last == ["state_changed", "step_succeeded", "step_succeeded", "state_changed"]

    assert any(is_one() for _ in range(TRIES))


def test_a_step_is_committed_alone_when_the_code_waits_for_something_else(
    harness: BlockingHarness, commits: Commits
) -> None:
    run = harness.start("ahead-waits")
    assert run.result() == 1
    assert commits.of(run) == [StartRow, StepRow, OutcomeRow]
    assert [kinds[-1] for kinds in packs(run)] == ["state_changed", "step_succeeded", "state_changed"]
    assert_ended_once(run)


def test_a_step_is_committed_while_the_code_that_has_its_result_blocks_the_loop(harness: BlockingHarness) -> None:
    ahead_agents.go_on.clear()
    try:
        run = harness.start("ahead-blocks")
        eventually(lambda: left(run) == {"dbos.operation_outputs": 1}, what="the step is committed")
    finally:
        ahead_agents.go_on.set()
    assert run.result() == 1
    assert_ended_once(run)


# ---- nothing comes of it before --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agent", "what"), NEXT)
def test_nothing_that_is_durable_or_has_an_effect_happens_before_the_step_is_committed(
    harness: BlockingHarness, commits: Commits, agent: str, what: str
) -> None:
    with held(commits, StepRow):
        run = harness.start(agent, {"what": what})
        assert commits.begun.wait(scaled(15))
        eventually(lambda: went_on(run), what="the code goes on")
        settle = threading.Event()
        for _ in range(20):  # what must not happen is looked for while it could
            assert left(run) == {}
            assert not bodies(run, "after")
            settle.wait(0.01)
    assert run.result() == 1
    assert bodies(run, "before") == 1
    assert run.steps()[0].step_name == "before"
    log = [event.kind for event in run.events()]
    assert log.index(EventKind.STEP_SUCCEEDED) < len(log) - 1


# ---- what was not written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StepRow, OutcomeRow])
@pytest.mark.parametrize("lost", [False, True], ids=["not-written", "reply-lost"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "fails"])
@pytest.mark.parametrize("agent", ["ahead-ends", "ahead-ends-blocking"])
def test_what_is_not_known_to_be_written_is_there_once(
    harness: BlockingHarness, commits: Commits, kind: type[CheckpointRow], lost: bool, fails: bool, agent: str
) -> None:
    commits.spoils, commits.lost = kind, lost
    run = harness.start(agent, {"steps": 3, "fails": fails})
    assert run.ended().state is (RunState.FAILED if fails else RunState.SUCCEEDED)
    assert kind in commits.of(run)
    assert_ended_once(run, steps=3)


def test_an_end_that_a_batch_does_not_know_takes_its_step_with_it(harness: BlockingHarness, commits: Commits) -> None:
    run = harness.start("ahead-asks")
    eventually(lambda: len(run.approvals()) == 1, what="it has asked")
    ahead_agents.bodies[f"{run.run.key.workflow_id} asked"] = 1
    assert run.result() == 1
    assert commits.of(run)[-1] is OutcomeRow, "it was tried together"
    assert [step.step_name for step in run.steps() if step.step_name == "before"] == ["before"]
    with _get_dbos_instance()._sys_db.engine.connect() as conn:
        found = sa.text("SELECT state FROM perdure.approval WHERE workflow_id = :id")
        assert conn.execute(found, {"id": run.run.key.workflow_id}).scalars().all() == ["WITHDRAWN"]


def test_an_end_that_is_refused_fails_the_run_and_keeps_the_step(harness: BlockingHarness) -> None:
    run = harness.start("ahead-ends-large", {"chars": 20_000})
    with pytest.raises(RunFailed, match="takes 20002 bytes"):
        run.result()
    assert_ended_once(run)


def test_an_end_that_cannot_be_stored_takes_its_step_into_the_failure(
    harness: BlockingHarness, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits.spoils = OutcomeRow
    plain = PerdureSystemDatabase._update_workflow_outcome_in_transaction

    def refuses_success(database: Any, workflow_id: str, status: str, **rest: Any) -> bool:
        if status == "SUCCESS":
            raise ValueError("the database does not take it")
        return plain(database, workflow_id, status, **rest)

    monkeypatch.setattr(PerdureSystemDatabase, "_update_workflow_outcome_in_transaction", refuses_success)
    run = harness.start("ahead-ends")
    with pytest.raises(RunFailed, match="does not take it"):
        run.result()
    assert_ended_once(run)


@pytest.mark.parametrize("dboss_way", [False, True], ids=["plain", "DBOS's way"])
@pytest.mark.parametrize("agent", ["ahead-waits", "ahead-ends"])
def test_a_step_that_cannot_be_stored_fails_the_run_whose_code_went_ahead(
    harness: BlockingHarness, commits: Commits, monkeypatch: pytest.MonkeyPatch, agent: str, dboss_way: bool
) -> None:
    if dboss_way:
        monkeypatch.setattr(plain_runs, "is_plain", lambda *_: False)

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("the database does not take it")

    if agent == "ahead-ends":
        monkeypatch.setattr("perdure_service.durable.system_database.record_last_step", refuses)
        commits.spoils = OutcomeRow
    else:
        monkeypatch.setattr(PerdureSystemDatabase, "_record_operation_result_txn", refuses)
        commits.spoils = StepRow
    run = harness.start(agent)
    if agent == "ahead-waits":
        with pytest.raises(RunFailed, match="does not take it"):
            run.result()
        assert not run.events(EventKind.STEP_SUCCEEDED)
        return
    # Neither its end nor its failure can be stored: it stays as it is, for the next execution.
    eventually(lambda: commits.of(run).count(OutcomeRow) >= 2, what="its end, and then its failure, were tried")
    assert not left(run)
    assert run.get().state is RunState.RUNNING
    monkeypatch.undo()


@pytest.mark.parametrize(("agent", "what"), NEXT)
def test_nothing_is_done_after_a_step_that_cannot_be_stored(
    harness: BlockingHarness, commits: Commits, monkeypatch: pytest.MonkeyPatch, agent: str, what: str
) -> None:
    plain = PerdureSystemDatabase._record_operation_result_txn

    def refuses_it(database: Any, result: Any, *arguments: Any, **rest: Any) -> None:
        if result["function_name"] == "before":
            raise ValueError("the database does not take it")
        plain(database, result, *arguments, **rest)

    monkeypatch.setattr(PerdureSystemDatabase, "_record_operation_result_txn", refuses_it)
    commits.spoils = StepRow
    run = harness.start(agent, {"what": what})
    with pytest.raises(RunFailed, match="does not take it"):
        run.result()
    assert left(run) == {}
    assert not bodies(run, "after")
    assert not run.events(EventKind.STEP_SUCCEEDED)


def test_a_step_that_failed_is_never_ahead(harness: BlockingHarness, commits: Commits) -> None:
    for agent in ("ahead-after-a-failure", "ahead-after-a-failure-blocking"):
        run = harness.start(agent)
        assert run.result() == "it fails"
        assert commits.of(run) == [StartRow, StepRow, OutcomeRow]
        assert [step.state.value for step in run.steps()] == ["FAILED"]
        with _get_dbos_instance()._sys_db.engine.connect() as conn:
            found = sa.text("SELECT error IS NOT NULL FROM dbos.operation_outputs WHERE workflow_uuid = :id")
            assert conn.execute(found, {"id": run.run.key.workflow_id}).scalars().all() == [True]


def test_an_execution_that_has_lost_its_run_leaves_nothing(harness: BlockingHarness, commits: Commits) -> None:
    engine = _get_dbos_instance()._sys_db.engine
    status = sa.text("UPDATE dbos.workflow_status SET owner_xid = :owner, status = :status WHERE workflow_uuid = :id")
    with held(commits, OutcomeRow):
        run = harness.start("ahead-ends")
        assert commits.begun.wait(scaled(15))
        with engine.begin() as conn:
            found = {"id": run.run.key.workflow_id, "owner": None, "status": "ENQUEUED"}
            conn.execute(status, found)
    assert run.result() == 1, "the next execution has ended it"
    assert bodies(run, "before") == 2
    assert len(run.events(EventKind.STEP_SUCCEEDED)) == 1
    assert [step.step_id for step in run.steps()] == [BEFORE]


def test_a_run_leaves_nothing_that_only_the_collector_finds(harness: BlockingHarness) -> None:
    ids: set[str] = set()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:

        def some_ended_with_their_last_step() -> bool:
            run = harness.start("ahead-ends", {"steps": 3})
            assert run.result() == 3
            if len(packs(run)) == 1 + 3:
                ids.add(run.run.key.workflow_id)
            return len(ids) == TRIES

        eventually(some_ended_with_their_last_step)
        gc.collect()
        # What earlier tests have left may be found only now.
        found = [
            type(one)
            for one in gc.garbage
            if (isinstance(one, Execution) and one.key.workflow_id in ids)
            or (isinstance(one, Presented) and one.pack.workflow_id in ids)
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    # A run whose row a thread took sooner may be in the frames of an exception.
    assert len(found) < TRIES / 4, found


def test_nobody_needs_a_thread(harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    plain = asyncio.to_thread

    async def to_thread(function: Callable[..., Any], *arguments: Any, **rest: Any) -> Any:
        names.append(getattr(function, "__name__", ""))
        return await plain(function, *arguments, **rest)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)

    def needed(agent: str) -> int:
        names.clear()
        harness.start(agent).result()
        return len(names)

    for agent in ("ahead-ends", "ahead-waits", "ahead-twice"):
        assert min(needed(agent) for _ in range(5)) == 0, "a writer's thread may be sooner now and then"


def test_code_in_a_task_of_its_own_goes_on_when_its_step_is_committed(
    harness: BlockingHarness, commits: Commits
) -> None:
    with held(commits, StepRow):
        run = harness.start("ahead-beside")
        assert commits.begun.wait(scaled(15))
        assert not went_on(run)
    assert run.result() == 1
    assert went_on(run) == 1
    assert_ended_once(run)


def test_a_step_that_is_cancelled_in_the_turn_in_which_it_is_told_that_it_is_not_written_holds_nothing_up(
    harness: BlockingHarness, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Presented.done
    told: list[Presented] = []

    def done(presented: Presented, written: Written | None) -> None:
        plain(presented, written)
        if written is None and not told:
            told.append(presented)
            task = ahead_agents.cancelled[-1]
            hops.calls_into(task.get_loop()).post(task.cancel)  # behind the answer, and before the task has its turn

    monkeypatch.setattr(Presented, "done", done)
    commits.spoils = StepRow
    run = harness.start("ahead-cancelled")
    assert run.result() == 2
    assert [type(one.row) for one in told] == [StepRow]
    assert ahead_agents.cancelled[-1].cancelled()
    assert bodies(run, "before") == bodies(run, "after") == 1
    assert [step.step_name for step in run.steps()] == ["before", "after"], "what was not written then is written"
