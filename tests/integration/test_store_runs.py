"""The run index: states in SQL and in Python agree, and the log's statements do what they say, on every dialect."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.domain.runs import (
    DEADLINE_PASSED,
    TERMINAL_STATUSES,
    Run,
    RunFilter,
    RunKey,
    RunStart,
    RunState,
)
from perdure_service.store import deletions, event_log, run_heads, runs
from perdure_service.store.engine import create_engine
from perdure_service.store.sqlstates import reading


@pytest.fixture(scope="module")
def engine(dialect_url: str) -> Iterator[sa.Engine]:
    engine = create_engine(dialect_url, pool_size=5, statement_timeout=timedelta(seconds=10))
    yield engine
    engine.dispose()


def _event(number: int) -> Event:
    return Event(EventKind.LOG, number, {"message": f"event {number}\0"})


def test_a_state_filter_finds_exactly_the_runs_in_that_state(engine: sa.Engine) -> None:
    namespace = f"states-{engine.dialect.driver}-{engine.dialect.name}"[:32]
    combinations = list(
        itertools.product(
            ["DELAYED", "ENQUEUED", "PENDING", *sorted(TERMINAL_STATUSES)],
            [None, "sleep", "signal:x", "approval"],
            [False, True],
            [None, DEADLINE_PASSED],
            [0, 1],
        )
    )
    with engine.begin() as conn:
        for number, (status, waiting_for, approval, end_reason, execution) in enumerate(combinations):
            key = RunKey.of_api(namespace, f"r{number}")
            conn.execute(
                sa.text("INSERT INTO dbos.workflow_status (workflow_uuid, status, name) VALUES (:id, :status, 'x')"),
                {"id": key.workflow_id, "status": status},
            )
            start = RunStart(key, "x", "1", "hash", "request", "me")
            assert runs.insert(
                conn, start, input_argument=None, parent_workflow_id=None, unique_request_id=None, executor_id=""
            )
            conn.execute(
                sa.text(
                    "UPDATE perdure.run SET waiting_for = :w, end_reason = :e, execution = :x WHERE workflow_id = :id"
                ),
                {"w": waiting_for, "e": end_reason, "x": execution, "id": key.workflow_id},
            )
            if approval:
                conn.execute(
                    sa.text(
                        "INSERT INTO perdure.approval (workflow_id, step_id, namespace, approval_id, agent, title, "
                        "payload, answer_schema, assignees, on_timeout) "
                        "VALUES (:id, 1, :n, :a, 'x', 't', 'null', '', '[]', 'REJECT')"
                    ),
                    {"id": key.workflow_id, "n": namespace, "a": f"r{number}/1"},
                )

    def listed(*states: RunState) -> dict[str, RunState]:
        found: dict[str, RunState] = {}
        token = ""
        while True:
            with engine.begin() as conn:
                wanted = RunFilter(states=frozenset(states))
                page, token = runs.list_page(conn, namespace, wanted, page_size=37, page_token=token)
            assert not found.keys() & {run.key.run_id for run in page}, "a page repeats a run"
            found |= {run.key.run_id: run.state for run in page}
            if not token:
                return found

    everything = listed()
    assert len(everything) == len(combinations)
    for state in RunState:
        assert listed(state) == {run_id: one for run_id, one in everything.items() if one is state}


def test_packs_follow_each_other_and_are_found_from_any_sequence(engine: sa.Engine) -> None:
    workflow_id = f"log-{engine.dialect.name}-{engine.dialect.driver}"
    sizes = [1, 3, 2, 5]
    with engine.begin() as conn:
        for size in sizes:
            pack = Pack(workflow_id, [_event(n) for n in range(size)])
            assert event_log.append(conn, pack)
    total = sum(sizes)
    with engine.begin() as conn:
        assert event_log.last_sequence(conn, workflow_id) == total
        for after in range(total + 2):
            assert [e.sequence for e in event_log.read(conn, workflow_id, after)] == list(range(after + 1, total + 1))
            found = [e.sequence for e in event_log.read(conn, workflow_id, after, packs=1)]
            assert found == [] if after >= total else found[0] == after + 1
        news = event_log.news(conn, {workflow_id: 4, "nobody": 0})
        assert [(one.first_sequence, len(one.events)) for one in news] == [(5, 2), (7, 5)]


def test_a_pack_that_is_presented_again_is_written_once_and_one_that_was_rolled_back_is_written(
    engine: sa.Engine,
) -> None:
    workflow_id = f"again-{engine.dialect.name}-{engine.dialect.driver}"
    pack = Pack(workflow_id, [_event(1)])
    with engine.connect() as conn:
        assert event_log.append(conn, pack)
        conn.rollback()
    with engine.begin() as conn:
        assert event_log.append(conn, pack), "it was rolled back"
    with engine.begin() as conn:
        assert not event_log.append(conn, pack), "it was committed"
        event_log.append(conn, Pack(workflow_id, [_event(2)]))
    with engine.begin() as conn:
        assert not event_log.append(conn, pack), "it was committed before another"
        assert event_log.last_sequence(conn, workflow_id) == 2


def test_the_key_refuses_a_writer_that_read_the_same_end(engine: sa.Engine) -> None:
    workflow_id = f"race-{engine.dialect.name}-{engine.dialect.driver}"
    with engine.connect() as one:
        event_log.append(one, Pack(workflow_id, [_event(1)]))
        with engine.connect() as other:
            other.execute(sa.text("SET LOCAL statement_timeout = '500ms'"))
            with pytest.raises(sa.exc.DBAPIError):  # waits for the key that the first one holds
                event_log.append(other, Pack(workflow_id, [_event(2)]))
        one.commit()
    with engine.begin() as conn:
        assert [e.data["message"] for e in event_log.read(conn, workflow_id, 0)] == ["event 1\0"]


def test_a_family_may_be_deleted_when_nobody_may_still_read_a_result_of_it(engine: sa.Engine) -> None:
    namespace = f"fam-{engine.dialect.driver}-{engine.dialect.name}"[:32]

    def add(run_id: str, status: str = "SUCCESS", parent: str = "", forked_from: str = "") -> None:
        def workflow_id(one: str) -> str | None:
            return RunKey.of_api(namespace, one).workflow_id if one else None

        conn.execute(
            sa.text(
                "INSERT INTO dbos.workflow_status (workflow_uuid, status, name, parent_workflow_id, forked_from) "
                "VALUES (:id, :status, 'x', :parent, :forked_from)"
            ),
            {
                "id": workflow_id(run_id),
                "status": status,
                "parent": workflow_id(parent),
                "forked_from": workflow_id(forked_from),
            },
        )
        start = RunStart(RunKey.of_api(namespace, run_id), "x", "1", "hash", "request", "me")
        runs.insert(
            conn, start, input_argument=None, parent_workflow_id=workflow_id(parent), unique_request_id=None,
            executor_id="",
        )  # fmt: skip

    with engine.begin() as conn:
        add("alone")
        add("open", "PENDING")
        for root in ("done", "left", "forked", "far"):
            add(root)
            add(f"{root}.1", parent=root)
            add(f"{root}.1.2", "PENDING" if root == "left" else "ERROR", parent=f"{root}.1")
        add("open.1", parent="open")
        add("fork", "ENQUEUED", forked_from="forked")
        add("far-1", "CANCELLED", forked_from="far")
        add("far-2", "DELAYED", forked_from="far-1")
        roots = ["alone", "open", "open.1", "done", "left", "left.1", "forked", "forked.1", "far", "far-1", "far-2"]
        ids = {RunKey.of_api(namespace, root).workflow_id: root for root in [*roots, "nothing"]}
        found = deletions.families(conn, list(ids))
        assert {ids[root] for root in found.held} == {
            "open", "open.1", "left", "left.1", "forked", "forked.1", "far", "far-1", "far-2",
        }  # fmt: skip
        assert {ids[root]: sorted(one.run_id for one in family) for root, family in found.deletable.items()} == {
            "alone": ["alone"],
            "done": ["done", "done.1", "done.1.2"],
        }
        assert deletions.families(conn, []).workflow_ids == []
        known = deletions.find(conn, namespace, ["alone", "far.1", "nothing", "FOREIGN"])
        assert sorted(known) == ["alone", "far.1"]
        assert deletions.gone(conn, [*known.values(), "nothing"]) == ["nothing"]
        everything = found.workflow_ids
        assert list(deletions.lock(conn, [*everything, "nothing"])) == everything
        deletions.delete_ours(conn, everything)
        assert sorted(deletions.gone(conn, everything)) == everything
        batches = list(deletions.in_batches(found, 2))
        assert [sorted(map(ids.get, batch.deletable)) for batch in batches] in (  # type: ignore[type-var]
            [["alone"], ["done"]],
            [["done"], ["alone"]],
        )


def test_runs_are_found_in_one_statement_each_as_it_is(engine: sa.Engine) -> None:
    namespace = f"found-{engine.dialect.driver}-{engine.dialect.name}"[:32]
    keys = [RunKey.of_api(namespace, f"r{number}") for number in range(5)]
    with engine.begin() as conn:
        for key in keys:
            conn.execute(
                sa.text(
                    "INSERT INTO dbos.workflow_status (workflow_uuid, status, name, queue_name, priority) "
                    "VALUES (:id, 'ENQUEUED', 'x', 'q', 2)"
                ),
                {"id": key.workflow_id},
            )
            start = RunStart(key, "x", "1", "hash", "request", "me", labels={"a": "ü"}, queue="q", priority=2)
            created = runs.insert(
                conn, start, input_argument=None, parent_workflow_id=None, unique_request_id=None, executor_id=""
            )
            assert created is not None
            assert runs.get(conn, key.workflow_id) == Run.of_start(start, RunState.QUEUED, created)
            assert (
                runs.insert(
                    conn, start, input_argument=None, parent_workflow_id=None, unique_request_id=None, executor_id=""
                )
                is None
            ), "it exists"
    wanted = [keys[3].workflow_id, "missing", keys[0].workflow_id, keys[3].workflow_id]
    basic = reading(engine, "find", lambda conn: runs.find(conn, wanted))
    full = reading(engine, "find", lambda conn: runs.find(conn, wanted, full=True))
    assert {one: run.key for one, run in basic.items()} == {key.workflow_id: key for key in (keys[0], keys[3])}
    assert basic == full, "there is neither input nor output"
    assert reading(engine, "closed", lambda conn: run_heads.closed(conn, wanted)) == []
    with engine.begin() as conn:
        assert runs.end(conn, keys[3].workflow_id) is not None
    assert reading(engine, "closed", lambda conn: run_heads.closed(conn, wanted)) == [keys[3].workflow_id]
