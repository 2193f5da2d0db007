"""The checkpoint writer on a real database: each row as a whole or not at all, and none because of another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.store import checkpoint_writer, event_log, pace
from perdure_service.store.checkpoints import CheckpointRow, EventsRow, OutcomeRow, StepRow, Written

from tests.helpers.rpc import new_id
from tests.helpers.writing import (
    LOG,
    Writing,
    a_loop,
    a_start,
    a_step,
    an_end,
    behind,
    log_of,
    steps_of,
    the_end_with,
    writing_on,
)


@pytest.fixture(scope="module", params=["by threads", "on a loop"])
def writing(dialect_url: str, request: pytest.FixtureRequest) -> Iterator[Writing]:
    if request.param == "by threads":
        with writing_on(dialect_url) as writing:
            yield writing
    else:
        with a_loop() as loop, writing_on(dialect_url, loop) as writing:
            yield writing


def test_rows_of_all_kinds_share_a_commit_and_each_is_there_as_a_whole(writing: Writing) -> None:
    first, second, third = writing.started(), writing.started(), writing.started()
    rows = [a_start(), a_step(first), an_end(second), behind(third, EventsRow, [LOG, LOG])]
    start, step, end, alone = writing.submit(*rows)
    assert start is not None
    assert start["created_at"] is not None
    assert None not in (step, alone)
    assert end is not None
    assert (end["workflow_id"], end["execution"]) == (second.workflow_id, 1)
    assert steps_of(writing, first) == [1]
    assert [log_of(writing, row) for row in rows] == [[1], [1, 2], [1, 2], [1, 2, 3]]
    statement = (
        "SELECT s.status, s.owner_xid, o.output, r.output, r.ended_at IS NOT NULL FROM dbos.workflow_status AS s "
        "JOIN dbos.workflow_output AS o ON o.workflow_uuid = s.workflow_uuid "
        "JOIN perdure.run AS r ON r.workflow_id = s.workflow_uuid WHERE s.workflow_uuid = :id"
    )
    assert writing.all(statement, id=second.workflow_id) == [("SUCCESS", None, "1", "1", True)]


def test_a_step_and_the_end_behind_it_are_one_row(writing: Writing) -> None:
    first, second = writing.started(), writing.started()
    step = a_step(first, 7, output='"o"', serialization="portable_json", started_ms=3, completed_ms=5)
    with_step, alone = the_end_with(step), an_end(second)
    assert None not in writing.submit(with_step, alone)
    statement = (
        "SELECT function_id, function_name, output, error, serialization, started_at_epoch_ms, completed_at_epoch_ms, "
        "application_name, retention_timestamp IS NOT NULL, child_workflow_id FROM dbos.operation_outputs "
        "WHERE workflow_uuid = :id"
    )
    assert writing.all(statement, id=first.workflow_id) == [
        (7, "step", '"o"', None, "portable_json", 3, 5, "perdure", True, None)
    ]
    assert steps_of(writing, second) == []
    assert [log_of(writing, row) for row in (first, second)] == [[1, 2, 3], [1, 2]]
    statement = "SELECT status FROM dbos.workflow_status WHERE workflow_uuid = :id"
    assert writing.all(statement, id=first.workflow_id) == [("SUCCESS",)]


@pytest.mark.parametrize("spoil", ["owner", "log", "step"])
def test_neither_is_written_without_the_other(writing: Writing, spoil: str) -> None:
    run = writing.started()
    if spoil == "owner":
        _lose_owner(writing, run)
    elif spoil == "log":
        _append(writing, run)
    step = a_step(run, 1, **({"output": None, "function_name": None} if spoil == "step" else {}))
    other = a_start()
    assert [written is None for written in writing.submit(the_end_with(step), other)] == [True, False]
    assert steps_of(writing, run) == []
    statement = "SELECT status FROM dbos.workflow_status WHERE workflow_uuid = :id"
    assert writing.all(statement, id=run.workflow_id) == [("PENDING",)]


def test_a_row_goes_in_the_place_of_one_that_waits_and_of_no_other(writing: Writing) -> None:
    run, other = writing.started(), writing.started()
    step, told = a_step(run), list[str]()
    end = the_end_with(step)
    with writing.writer._changed:  # so that nobody takes it
        writing.give(step, a_step(other))
        assert writing.writer.replace(step, end, lambda: told.append("replaced"))
        assert not writing.writer.replace(step, the_end_with(step), lambda: told.append("again"))
    assert None not in writing.wait_for(end)
    assert id(step) not in writing.answers
    assert told == ["replaced"]
    assert steps_of(writing, run) == [1]
    assert not writing.writer.replace(end, end, lambda: told.append("too late"))
    assert told == ["replaced"]


def _lose_owner(writing: Writing, row: CheckpointRow) -> None:
    with writing.engine.begin() as conn:
        conn.execute(
            sa.text("UPDATE dbos.workflow_status SET owner_xid = 'other' WHERE workflow_uuid = :id"),
            {"id": row.workflow_id},
        )


def _append(writing: Writing, row: CheckpointRow) -> None:
    with writing.engine.begin() as conn:
        event_log.append(conn, Pack(row.workflow_id, [LOG]))


def _cut(writing: Writing, row: CheckpointRow) -> None:
    with writing.engine.begin() as conn:
        conn.execute(sa.text("DELETE FROM perdure.run_event WHERE workflow_id = :id"), {"id": row.workflow_id})


def _cancel(writing: Writing, row: CheckpointRow) -> None:
    with writing.engine.begin() as conn:
        conn.execute(
            sa.text("UPDATE dbos.workflow_status SET status = 'CANCELLED' WHERE workflow_uuid = :id"),
            {"id": row.workflow_id},
        )


@pytest.mark.parametrize("change", [_lose_owner, _append, _cut, _cancel])
def test_what_is_not_plainly_right_is_not_written_and_the_others_are(
    writing: Writing, change: Callable[[Writing, CheckpointRow], None]
) -> None:
    wrong, right = writing.started(), writing.started()
    change(writing, wrong)
    before = log_of(writing, wrong)
    for kind in (a_step, an_end, lambda row: behind(row, EventsRow)):
        other = kind(right)
        assert [written is not None for written in writing.submit(kind(wrong), other)] == [False, True]
        right = other if not isinstance(other, OutcomeRow) else writing.started()
    assert (log_of(writing, wrong), steps_of(writing, wrong)) == (before, [])


def test_a_locked_row_keeps_nobody_waiting(writing: Writing) -> None:
    locked, free = writing.started(), writing.started()
    with writing.engine.begin() as conn:
        conn.execute(
            sa.text("SELECT 1 FROM dbos.workflow_status WHERE workflow_uuid = :id FOR UPDATE"),
            {"id": locked.workflow_id},
        )
        answers = writing.submit(a_step(locked), a_step(free))
    assert [written is not None for written in answers] == [False, True]
    assert (steps_of(writing, locked), steps_of(writing, free)) == ([], [1])
    assert writing.submit(a_step(locked)) != [None]


def test_a_value_that_the_database_refuses_fails_alone(writing: Writing) -> None:
    runs = [writing.started() for _ in range(5)]
    rows = [a_step(row, output="a\0b" if number == 3 else "fine") for number, row in enumerate(runs)]
    assert [written is not None for written in writing.submit(*rows)] == [True, True, True, False, True]
    assert [steps_of(writing, row) for row in runs] == [[1], [1], [1], [], [1]]
    assert [len(log_of(writing, row)) for row in runs] == [2, 2, 2, 1, 2]


def test_a_step_that_is_recorded_already_fails_alone(writing: Writing) -> None:
    first, second = writing.started(), writing.started()
    step = a_step(first)
    assert writing.submit(step) != [None]
    assert [written is not None for written in writing.submit(a_step(step), a_step(second))] == [False, True]
    assert (log_of(writing, first), steps_of(writing, first)) == ([1, 2], [1])


def test_a_refused_row_leaves_nothing_open_in_which_the_next_batches_would_fail(writing: Writing) -> None:
    first, second, third = writing.started(), writing.started(), writing.started()
    step = a_step(first)
    assert writing.submit(step) != [None]
    for _ in range(3):  # of several kinds, so that it is a transaction of several statements
        refused, alone = a_step(step), behind(second, EventsRow)
        answers = writing.submit(a_start(), refused, alone, third_step := a_step(third, 7))
        assert [written is not None for written in answers] == [True, False, True, True]
        second, third = alone, writing.started()
        assert steps_of(writing, third_step) == [7]
    assert (log_of(writing, first), steps_of(writing, first)) == ([1, 2], [1])


def test_who_loses_and_regains_a_run_while_others_append_writes_only_while_it_has_it(writing: Writing) -> None:
    run = writing.started()
    ours, stop, turns, tried = run.owner_xid, threading.Event(), [0], threading.Event()

    def outside() -> None:
        """Takes the run away and gives it back, and says so in its log, as outside writers do; then lets one try."""
        while not stop.is_set():
            for owner, said in (("somebody else", "taken"), (ours, "given back")):
                with writing.engine.begin() as conn:
                    conn.execute(
                        sa.text("SELECT 1 FROM dbos.workflow_status WHERE workflow_uuid = :id FOR NO KEY UPDATE"),
                        {"id": run.workflow_id},
                    )
                    event_log.append(conn, Pack(run.workflow_id, [Event(EventKind.LOG, 1, {"message": said})]))
                    conn.execute(
                        sa.text("UPDATE dbos.workflow_status SET owner_xid = :owner WHERE workflow_uuid = :id"),
                        {"owner": owner, "id": run.workflow_id},
                    )
            turns[0] += 1
            tried.clear()
            tried.wait(1)

    def last() -> tuple[int, int]:
        statement = (
            "SELECT first_sequence, event_count FROM perdure.run_event WHERE workflow_id = :id ORDER BY 1 DESC LIMIT 1"
        )
        [(first, count)] = writing.all(statement, id=run.workflow_id)
        return first, count

    thread = threading.Thread(target=outside)
    thread.start()
    told: list[int] = []
    number = 0
    try:
        while (turns[0] < 60 or len(told) < 5) and number < 3_000:
            number += 1
            first, count = last()
            pack = Pack(run.workflow_id, [Event(EventKind.LOG, 1, {"message": "step"})], first_sequence=first + count)
            row = StepRow(
                run.workflow_id, ours, pack, first, function_id=number, function_name="s", completed_ms=2, output="1"
            )
            if writing.submit(row) != [None]:
                told.append(number)
            tried.set()
    finally:
        stop.set()
        tried.set()
        thread.join()
    assert len(told) >= 5
    assert turns[0] >= 60
    assert steps_of(writing, run) == told, "what was told to be written was, and nothing else"
    with writing.engine.begin() as conn:
        after, events = 0, []
        while page := event_log.read(conn, run.workflow_id, after):
            events += page
            after = events[-1].sequence
    assert [event.sequence for event in events] == list(range(1, len(events) + 1)), "dense, and nothing twice"
    said = [event.data["message"] for event in events]
    assert said.count("step") == len(told)
    held = True
    for word in said[1:]:
        held = {"taken": False, "given back": True}.get(word, held)
        assert held or word != "step", "a step was written while another one owned the run"


class Clocks:
    """The time, and the CPU time that was spent in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.spent = 0.0
        monkeypatch.setattr(pace.Pace, "_read", lambda _pace: (self.now, self.spent))
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)

    def pass_(self, looks: int, *, share: float) -> None:
        self.now += looks * pace.LOOK_EVERY_S
        self.spent += share * looks * pace.LOOK_EVERY_S


def test_a_batch_waits_for_the_runs_that_move_while_the_process_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, moving = Clocks(monkeypatch), [100]
    asked = pace.Pace(lambda within: moving[0] if within == pace.MOVED_WITHIN_S else -1)
    assert asked.rows() == 0
    clocks.pass_(1, share=0.7)
    assert asked.rows() == 0, "it has time to spare"
    clocks.pass_(1, share=1.0)
    assert asked.rows() == pace.SHARE * 100
    moving[0] = 3
    clocks.pass_(1, share=1.0)
    assert 10 < asked.rows() < 100, "for a moment few seem to move"
    for _ in range(10):
        clocks.pass_(1, share=0.2)
        asked.rows()
    assert asked.rows() < 1
    clocks.pass_(1000, share=0.1)
    clocks.pass_(1, share=1.0)
    assert asked.rows() < 1, "what it did on the average since it was last asked"
    moving[0] = 1
    clocks.pass_(1, share=1.0)
    assert asked.rows() < 1, "a run that moves alone does not wait"


def test_a_batch_that_is_not_large_enough_begins_all_the_same(
    writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace.Pace, "rows", lambda _pace: 1000.0)
    runs = [writing.started() for _ in range(3)]
    writing.batches.clear()
    answers: list[Written | None] = []
    for run in runs:  # one after the other, each alone
        answers += writing.submit(a_step(run))
    assert None not in answers
    assert writing.batches == [1, 1, 1]


def test_rows_gather_until_they_are_enough(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [writing.started() for _ in range(4)]
    monkeypatch.setattr(checkpoint_writer, "JOIN_AFTER_S", 3600.0)
    monkeypatch.setattr(pace.Pace, "rows", lambda _pace: 4.0)
    writing.batches.clear()
    writing.answers.clear()
    rows = [a_step(run) for run in runs]
    for row in rows[:3]:
        assert writing.writer.submit(row)
    assert not writing.answers
    assert None not in writing.submit(rows[3])
    assert writing.batches == [4]


def test_a_row_that_is_presented_again_is_not_written_twice(writing: Writing) -> None:
    run = writing.started()
    used = Event(EventKind.USAGE, 1, {"input_tokens": 3, "output_tokens": 4})
    row: EventsRow = behind(run, EventsRow, [used])
    assert writing.submit(row) != [None]
    again = EventsRow(row.workflow_id, row.owner_xid, row.pack, row.previous_first)
    assert writing.submit(again) == [None]
    tokens = writing.all(
        "SELECT input_tokens, output_tokens FROM perdure.run WHERE workflow_id = :id", id=run.workflow_id
    )
    assert (tokens, log_of(writing, run)) == ([(3, 4)], [1, 2])


def test_of_equal_starts_one_is_written(writing: Writing) -> None:
    run_id, request = new_id(), new_id()
    same_id = [a_start(run_id) for _ in range(10)]
    same_request = [a_start(request=request) for _ in range(10)]
    answers = writing.submit(*same_id, *same_request)
    assert sum(written is not None for written in answers[:10]) == 1
    assert sum(written is not None for written in answers[10:]) == 1
    for row in (*same_id, *same_request):
        found = writing.all(
            "SELECT (SELECT count(*) FROM dbos.workflow_status WHERE workflow_uuid = :id), "
            "(SELECT count(*) FROM perdure.run WHERE workflow_id = :id)",
            id=row.workflow_id,
        )
        assert found in ([(1, 1)], [(0, 0)])


def test_a_run_with_an_open_approval_is_not_ended_here(writing: Writing) -> None:
    run = writing.started()
    with writing.engine.begin() as conn:
        conn.execute(
            sa.text(
                "INSERT INTO perdure.approval (workflow_id, step_id, namespace, approval_id, agent, title, payload, "
                "answer_schema, assignees, on_timeout) "
                "VALUES (:id, 1, 'default', :id, 'x', 't', '', '', '[]', 'REJECT')"
            ),
            {"id": run.workflow_id},
        )
    assert writing.submit(an_end(run)) == [None]
    assert log_of(writing, run) == [1]


def test_more_rows_than_a_batch_holds_are_all_written(writing: Writing) -> None:
    writing.batches.clear()
    rows = [a_start() for _ in range(3 * checkpoint_writer.MAX_ROWS)]
    assert None not in writing.submit(*rows)
    assert max(writing.batches) == checkpoint_writer.MAX_ROWS


def test_a_lost_connection_costs_no_row(writing: Writing) -> None:
    if "CockroachDB" in writing.all("SELECT version()")[0][0]:
        pytest.skip("CockroachDB has no pg_terminate_backend")
    runs = [writing.started() for _ in range(4)]
    sessions = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND datname = current_database() AND query LIKE 'WITH i AS%'"
    )
    assert writing.all(sessions)[0][0] >= 1
    assert None not in writing.submit(*(a_step(row) for row in runs))
    assert [steps_of(writing, row) for row in runs] == [[1]] * 4
