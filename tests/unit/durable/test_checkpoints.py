"""A slot that a commit holds is always given up, whatever goes wrong, and nobody waits for an answer in vain."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.domain.runs import RunKey
from perdure_service.durable.checkpoints import Checkpoints, Commit, Presented, adopted
from perdure_service.durable.drain import _rests
from perdure_service.durable.executions import Execution, Executions, LogEnd, slot_of
from perdure_service.durable.operation import Operations
from perdure_service.store import checkpoint_writer
from perdure_service.store.checkpoint_writer import CheckpointWriter
from perdure_service.store.checkpoints import CheckpointRow, EventsRow

from tests.helpers.waiting import eventually, scaled

CALL = ("step", 1)
WRITTEN: Mapping[str, Any] = {}


class Writer(CheckpointWriter):
    """A checkpoint writer whose batches end as a test says."""

    def __init__(self, checkpoints: Checkpoints, answer: Callable[[Any], None] | None = None) -> None:
        super().__init__(sa.create_engine("postgresql+psycopg://nowhere"), answer or checkpoints.answer)
        self.ends: Callable[[CheckpointRow], bool] = lambda _row: True
        self.may_end = threading.Event()
        checkpoints.write_with(self)

    def _write(self, session: Any, rows: Any) -> dict[str, Any]:
        self.may_end.wait(scaled(10))
        return {row.workflow_id: WRITTEN for row in rows if self.ends(row)}


class Fast:
    """The fast way, with one execution."""

    def __init__(self, committed: Callable[[list[Pack]], None] = lambda _packs: None) -> None:
        self.executions = Executions()
        self.checkpoints = Checkpoints(Operations(committed))
        self.execution = self.another("run")
        self.writer = Writer(self.checkpoints)
        self.writer.start()

    def another(self, name: str) -> Execution:
        execution = Execution(RunKey.of_api("default", name), "token", "agent", "1", 1, "0" * 32)
        execution.log_end = LogEnd(1, 1)
        return self.executions.add(execution)

    def present(
        self, execution: Execution | None = None, after: Callable[[Any], None] = lambda _: None, *, ahead: bool = False
    ) -> Presented:
        one = execution or self.execution
        event = one.event(EventKind.LOG, {"message": "x"})
        presented = self.checkpoints.present(Commit(CALL, one, [event], row_of(one), after), ahead=ahead)
        assert presented is not None
        return presented

    def end(self, *presented: Presented, written: bool = True) -> list[bool]:
        self.writer.ends = lambda _row: written
        self.writer.may_end.set()
        eventually(lambda: all(one.written.done() for one in presented), what="they are answered")
        return [one.written.result() for one in presented]


def row_of(execution: Execution) -> Callable[[Pack, int | None], CheckpointRow]:
    return lambda pack, previous: EventsRow(pack.workflow_id, execution.owner_xid, pack, previous)


@pytest.fixture
def fast() -> Any:
    fast = Fast()
    yield fast
    fast.writer.may_end.set()
    fast.writer.stop()


def test_what_is_written_gives_up_the_slot_and_what_is_not_keeps_it_for_its_call(fast: Fast) -> None:
    assert fast.end(fast.present()) == [True]
    assert not fast.execution.slot.held
    presented = fast.present()
    assert fast.end(presented, written=False) == [False]
    assert fast.execution.slot.held
    assert adopted(fast.execution, CALL) is presented
    with slot_of(fast.execution, presented):
        assert adopted(fast.execution, CALL) is None
    assert not fast.execution.slot.held


@pytest.mark.parametrize("leaves_first", [True, False])
def test_an_execution_whose_code_has_gone_leaves_no_slot_held(fast: Fast, *, leaves_first: bool) -> None:
    presented = fast.present()
    fast.executions.kill(fast.execution, "its run was taken away")
    if leaves_first:  # its task was cancelled while it waited for the answer
        fast.executions.remove(fast.execution)
    assert fast.end(presented, written=False) == [False]
    if not leaves_first:
        fast.executions.remove(fast.execution)
    assert not fast.execution.slot.held
    with slot_of(fast.execution, presented):  # a thread that has found it before takes the slot as anybody does
        assert fast.execution.slot.held


@pytest.fixture
def step(fast: Fast, monkeypatch: pytest.MonkeyPatch) -> Presented:
    """A step whose code has gone ahead, and has said something since; its row waits for another batch's end."""
    monkeypatch.setattr(checkpoint_writer, "JOIN_AFTER_S", scaled(60))
    under_way = fast.present(fast.another("other"))
    eventually(lambda: not under_way.row.waits, what="another batch is under way")
    step = fast.present(ahead=True)
    assert fast.checkpoints.may_join(fast.execution)
    fast.execution.note(fast.execution.event(EventKind.LOG, {"message": "between"}))
    return step


def end_of(fast: Fast) -> Presented | None:
    event = fast.execution.event(EventKind.LOG, {"message": "the end"})
    commit = Commit(("outcome", 0), fast.execution, [event], row_of(fast.execution), lambda _: None)
    return fast.checkpoints.join(commit)


@pytest.mark.parametrize("written", [True, False])
def test_an_end_takes_the_step_that_waits_with_it(fast: Fast, step: Presented, *, written: bool) -> None:
    end = end_of(fast)
    assert end is not None
    assert [event.data["message"] for event in end.pack.events] == ["x", "between", "the end"]
    assert end.pack.first_sequence == step.pack.first_sequence
    assert fast.execution.last_step is step.row
    assert fast.execution.slot.holder is end
    assert fast.end(end, written=written) == [written]
    assert step.written.cancelled(), "the end decides"
    assert fast.execution.slot.held is not written
    assert adopted(fast.execution, ("outcome", 0)) is (None if written else end)
    assert [event.data["message"] for event in end.riding] == ["x", "between"], "what is not written is kept"


@pytest.mark.parametrize("why", ["it is taken", "they are too long"])
def test_an_end_that_cannot_take_the_step_with_it_changes_nothing(
    fast: Fast, step: Presented, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "it is taken":
        monkeypatch.setattr(fast.writer, "replace", lambda *_: False)
    else:
        monkeypatch.setattr("perdure_service.durable.checkpoints.MAX_PACK_CHARS", 10)
    assert end_of(fast) is None
    assert fast.execution.last_step is None
    assert fast.execution.slot.holder is step
    assert fast.end(step) == [True]
    assert [event.data["message"] for event in fast.execution.take()] == ["between"]
    assert end_of(fast) is None, "there is no step any more"


def test_an_end_whose_row_cannot_be_made_leaves_the_step_and_what_was_said_in_order(
    fast: Fast, step: Presented
) -> None:
    said_meanwhile: list[Event] = []

    def fails(*_: Any) -> CheckpointRow:
        fast.execution.note(fast.execution.event(EventKind.LOG, {"message": "later"}))
        said_meanwhile.extend(fast.execution.take())
        raise TypeError("no JSON")

    with pytest.raises(TypeError, match="no JSON"):
        fast.checkpoints.join(Commit(("outcome", 0), fast.execution, [], fails, lambda _: None))
    assert not said_meanwhile, "it would come before what was said sooner"
    assert fast.execution.last_step is None
    assert fast.execution.slot.holder is step
    assert fast.end(step) == [True]
    assert [event.data["message"] for event in fast.execution.take()] == ["between", "later"]


def test_an_execution_that_is_dead_keeps_the_slot_for_its_call_while_its_code_is_there(fast: Fast) -> None:
    presented = fast.present()
    fast.executions.kill(fast.execution, "its run was taken away")
    assert fast.end(presented, written=False) == [False]
    assert adopted(fast.executions.find(fast.execution.key.workflow_id, "token"), CALL) is presented


def test_a_row_that_cannot_be_made_costs_neither_the_slot_nor_the_events_that_wait(fast: Fast) -> None:
    fast.execution.note(fast.execution.event(EventKind.LOG, {"message": "waits"}))

    def fails(*_: Any) -> CheckpointRow:
        raise TypeError("no JSON")

    event = fast.execution.event(EventKind.LOG, {"message": "x"})
    with pytest.raises(TypeError, match="no JSON"):
        fast.checkpoints.present(Commit(CALL, fast.execution, [event], fails, lambda _: None))
    assert not fast.execution.slot.held
    assert [event.data["message"] for event in fast.execution.take()] == ["waits"]


def test_what_goes_wrong_in_telling_of_one_row_is_not_another_ones_trouble() -> None:
    def fails(_packs: list[Pack]) -> None:
        raise RuntimeError("the loop is closed")

    def fails_after(_written: Any) -> None:
        raise ValueError("no meter")

    fast = Fast(committed=fails)
    other = fast.another("other")
    try:
        one, two = fast.present(after=fails_after), fast.present(other)
        assert fast.end(one, two) == [True, True]
        assert not fast.execution.slot.held
        assert not other.slot.held
        assert fast.end(fast.present()) == [True], "its thread lives"
    finally:
        fast.writer.stop()


def test_an_answer_that_fails_does_not_end_the_writer(fast: Fast) -> None:
    answered: list[int] = []

    def fails(batch: Any) -> None:
        answered.append(len(batch))
        raise ValueError("no answer")

    writer = Writer(fast.checkpoints, fails)
    writer.may_end.set()
    writer.start()
    try:
        for count in range(1, 6):
            key = RunKey.of_api("default", f"run-{count}")
            pack = Pack(key.workflow_id, [Event(EventKind.LOG, 1, {"message": "x"})], first_sequence=1)
            assert writer.submit(EventsRow(key.workflow_id, "x", pack, None))
            eventually(lambda count=count: len(answered) == count)
    finally:
        writer.stop()


def test_what_waits_is_answered_when_the_writer_stops_and_it_takes_nothing_more(fast: Fast) -> None:
    others = [fast.another(f"run-{number}") for number in range(5)]
    presented = [fast.present(one) for one in others]
    fast.writer.may_end.set()
    fast.writer.stop()
    assert [one.written.done() and one.written.result() for one in presented] == [True] * 5
    event = fast.execution.event(EventKind.LOG, {"message": "x"})
    commit = Commit(CALL, fast.execution, [event], row_of(fast.execution), lambda _: None)
    assert fast.checkpoints.present(commit) is None
    assert not fast.execution.slot.held


def test_a_run_is_not_handed_over_while_it_is_being_committed(fast: Fast) -> None:
    assert _rests(fast.execution)
    presented = fast.present()
    assert not _rests(fast.execution)
    fast.end(presented)
    assert _rests(fast.execution)


def test_a_start_that_is_being_committed_is_not_handed_over(fast: Fast) -> None:
    begins = fast.executions.add(Execution(RunKey.of_api("default", "new"), "x", "a", "1", 1, "0" * 32), perhaps=True)
    pack = Pack(begins.key.workflow_id, [begins.event(EventKind.LOG, {"message": "x"})], first_sequence=1)
    presented = fast.checkpoints.present_start(row_of(begins)(pack, None), begins, lambda _: None)
    assert presented is not None
    assert not _rests(begins)
    fast.end(presented)
    assert _rests(begins)


def test_what_begins_while_a_server_stops_begins_no_step(fast: Fast) -> None:
    fast.executions.retire_all()
    assert not fast.another("late").may_go_on
