"""DeleteRuns: what goes, what is left alone, and that nothing is ever left in halves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1.agent_run_pb2 import AGENT_RUN_STATE_FAILED, AGENT_RUN_STATE_RUNNING, AGENT_RUN_STATE_SUCCEEDED

from tests.helpers.rows import copy_runs, rows_of, tables
from tests.helpers.rpc import Reading, Rpc, in_seconds, new_id, refusal_of, refused, state_of
from tests.helpers.server import ServerProcess, sql
from tests.helpers.waiting import eventually, scaled


def delete(rpc: Rpc, *run_ids: str, **fields: Any) -> pb.DeleteRunsResponse:
    """DeleteRuns."""
    return rpc.runs.DeleteRuns(pb.DeleteRunsRequest(run_ids=run_ids, **fields), timeout=scaled(20))


def ended(rpc: Rpc, agent: str = "counter", run_input: Any = None, **fields: Any) -> str:
    """Returns a run that has ended."""
    run_id = rpc.start(agent, run_input, **fields)
    rpc.end_of(run_id)
    return run_id


# ---- what goes -------------------------------------------------------------------------------------------------------


def test_everything_about_a_run_and_its_children_goes(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("plain", {"name": "x", "wait": True})
    rpc.until(run_id, "AWAITING_INPUT")
    rpc.signal(run_id, 1, name="topic")
    rpc.end_of(run_id)
    asked = rpc.start("asker")
    rpc.decide(rpc.approval_of(asked).approval_id)
    rpc.end_of(asked)
    large = ended(rpc, "counter", {"steps": 1, "note": "x" * 100_000})
    before = rows_of(database_url, run_id) | rows_of(database_url, asked) | rows_of(database_url, large)
    with sql(database_url) as connection:
        everywhere = {f"{schema}.{table}" for schema, table, _ in tables(connection)} - {
            "perdure.report",
            "perdure.queue_start",
        }
    assert set(before) == everywhere, "the three runs have rows in every table there is"
    response = delete(rpc, run_id, asked, large)
    assert response.deleted_count == 5, "three runs, and two children of the first"
    assert set(response.sample_run_ids) >= {run_id, asked}
    assert not response.more
    assert (rows_of(database_url, run_id), rows_of(database_url, asked)) == ({}, {})
    for one in (run_id, asked):
        with refused("NOT_FOUND", "RUN_NOT_FOUND"):
            rpc.get(one)


def test_an_id_that_was_deleted_can_be_started_again(rpc: Rpc) -> None:
    run_id = ended(rpc, run_input={"steps": 1})
    delete(rpc, run_id)
    again = rpc.start_call("counter", {"steps": 2}, run_id=run_id)
    assert again.created
    assert rpc.output_of(run_id) == {"total": 1}


def test_ids_that_do_not_exist_are_told(rpc: Rpc) -> None:
    run_id, nothing = ended(rpc), new_id("nothing")
    response = delete(rpc, nothing, run_id, run_id)
    assert (response.deleted_count, list(response.missing_run_ids)) == (1, [nothing])
    again = delete(rpc, nothing, run_id)
    assert (again.deleted_count, list(again.missing_run_ids)) == (0, [nothing, run_id])


def test_a_filter_deletes_what_has_ended_and_satisfies_all_of_it(rpc: Rpc) -> None:
    batch = {"batch": new_id()}
    good = [ended(rpc, run_input={"steps": 1}, labels=batch) for _ in range(3)]
    bad = ended(rpc, "failing", labels=batch)
    other = ended(rpc, labels={"batch": "other"})
    going_on = rpc.start("listener", labels=batch)
    response = delete(rpc, labels=batch, states=[AGENT_RUN_STATE_SUCCEEDED], agent="counter")
    assert (response.deleted_count, list(response.sample_run_ids)) == (3, good), "the oldest first"
    assert not response.more
    assert state_of(rpc.get(bad)) == "FAILED"
    assert delete(rpc, labels=batch).deleted_count == 1
    assert state_of(rpc.get(other)) == "SUCCEEDED"
    assert state_of(rpc.until(going_on, "AWAITING_INPUT")) == "AWAITING_INPUT"
    rpc.cancel(going_on)


def test_a_filter_by_the_time_of_the_end_and_by_context(rpc: Rpc) -> None:
    context = new_id("context")
    early = ended(rpc, context_id=context)
    rpc.start("listener", run_id=(late := new_id()), context_id=context)
    until = rpc.get(early).end_time
    until.nanos += 1000
    assert delete(rpc, context_id=context, until_end_time=rpc.get(early).end_time).deleted_count == 0
    rpc.until(late, "AWAITING_INPUT")
    rpc.signal(late)
    rpc.end_of(late)
    response = delete(rpc, context_id=context, until_end_time=until)
    assert list(response.sample_run_ids) == [early], "not the one that was created before, and ended after"
    assert delete(rpc, context_id=context, until_end_time=in_seconds(60)).deleted_count == 1


def test_validate_only_counts_and_deletes_nothing(rpc: Rpc) -> None:
    context = new_id("context")
    runs = [ended(rpc, "parent", {"children": 2}, context_id=context) for _ in range(2)]
    asked = delete(rpc, context_id=context, validate_only=True)
    assert asked.deleted_count == 6, "children are counted once, though they have the context themselves"
    assert all(state_of(rpc.get(run_id)) == "SUCCEEDED" for run_id in runs)
    assert delete(rpc, context_id=context).deleted_count == 6


# ---- what is left alone ----------------------------------------------------------------------------------------------


def test_a_run_that_has_not_ended_is_left_alone_and_told(rpc: Rpc) -> None:
    run_id, other = rpc.start("listener"), ended(rpc)
    response = delete(rpc, run_id, other)
    assert (response.deleted_count, list(response.unfinished_run_ids)) == (1, [run_id])
    rpc.signal(run_id)
    assert rpc.output_of(run_id) == [1]
    assert delete(rpc, run_id).deleted_count == 1


def test_a_child_stays_while_its_parent_may_read_its_result(rpc: Rpc) -> None:
    parent = rpc.start("parent", {"children": 2, "seconds": 0.1, "apart": 2.0})
    eventually(lambda: refusal_of(lambda: rpc.get(f"{parent}.1")) is None, what="the first child is there")
    rpc.end_of(f"{parent}.1")
    if state_of(rpc.get(parent)) == "RUNNING":  # else the machine was too slow for the question
        assert list(delete(rpc, f"{parent}.1").unfinished_run_ids) == [f"{parent}.1"]
    assert rpc.output_of(parent) == ["child 0", "child 1"]
    assert delete(rpc, f"{parent}.1").deleted_count == 1, "a child alone, when its parent has ended"
    assert delete(rpc, parent).deleted_count == 2


def test_a_parent_stays_while_a_child_of_it_goes_on(rpc: Rpc, database_url: str) -> None:
    parent = rpc.start("leaver")
    rpc.end_of(parent)
    eventually(lambda: state_of(rpc.get(f"{parent}.1")) == "SLEEPING")
    assert list(delete(rpc, parent).unfinished_run_ids) == [parent]
    context = rpc.get(parent).context_id
    assert delete(rpc, agent="leaver").deleted_count == 0
    rpc.cancel(f"{parent}.1")
    response = delete(rpc, agent="leaver")
    assert (response.deleted_count, context) == (2, "")
    assert rows_of(database_url, parent) == {}


def test_what_a_fork_may_still_wait_for_stays(rpc: Rpc) -> None:
    origin = ended(rpc, "parent", {"children": 1})
    fork = rpc.runs.ForkRun(
        pb.ForkRunRequest(run_id=origin, request_id=new_id(), from_step_id=2, deadline_time=in_seconds(600))
    ).run.run_id
    rpc.end_of(fork)
    waiting = rpc.start("asker")
    rpc.approval_of(waiting)
    of_waiting = rpc.runs.ForkRun(pb.ForkRunRequest(run_id=waiting, request_id=new_id())).run.run_id
    rpc.decide(rpc.approval_of(waiting).approval_id)
    rpc.end_of(waiting)
    response = delete(rpc, waiting, origin)
    assert list(response.unfinished_run_ids) == [waiting], "its fork still waits"
    assert response.deleted_count == 2
    rpc.decide(rpc.approval_of(of_waiting).approval_id)
    rpc.end_of(of_waiting)
    assert delete(rpc, waiting).deleted_count == 1
    assert rpc.get(of_waiting).forked_from_run_id == waiting, "a fork stays when its origin goes"


def test_a_child_that_a_fork_needs_stays_when_a_fork_between_them_is_gone(rpc: Rpc) -> None:
    def fork(run_id: str) -> str:
        request = pb.ForkRunRequest(run_id=run_id, request_id=new_id(), from_step_id=2)
        return rpc.runs.ForkRun(request).run.run_id

    def end(run_id: str) -> str:
        rpc.until(run_id, "AWAITING_INPUT")
        rpc.signal(run_id)
        assert rpc.output_of(run_id) == "child 0"
        return run_id

    origin = end(rpc.start("late-reader"))
    between = end(fork(origin))
    third = end(fork(between))
    assert delete(rpc, between).deleted_count == 1
    last = fork(third)
    assert list(delete(rpc, origin).unfinished_run_ids) == [origin], "the last one still needs its child"
    assert list(delete(rpc, f"{origin}.1").unfinished_run_ids) == [f"{origin}.1"]
    end(last)
    assert delete(rpc, origin).deleted_count == 2


def test_a_fork_that_would_need_a_deleted_child_is_refused(rpc: Rpc) -> None:
    origin = ended(rpc, "parent", {"children": 1})
    delete(rpc, f"{origin}.1")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "from_step_id") as error:
        rpc.runs.ForkRun(pb.ForkRunRequest(run_id=origin, request_id=new_id(), from_step_id=2))
    assert "at most 1" in error.text
    fork = rpc.runs.ForkRun(pb.ForkRunRequest(run_id=origin, request_id=new_id(), from_step_id=1)).run
    assert rpc.output_of(fork.run_id) == ["child 0"]
    late = rpc.runs.ForkRun(pb.ForkRunRequest(run_id=origin, request_id=new_id()))
    assert late.from_step_id == 1, "without its child the step did not succeed"
    assert rpc.output_of(late.run.run_id) == ["child 0"]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, ""),
        ({"states": [AGENT_RUN_STATE_RUNNING]}, "states"),
        ({"states": [99]}, "states[0]"),
        ({"run_ids": ["a"], "agent": "counter"}, "run_ids"),
        ({"run_ids": ["a"], "states": [AGENT_RUN_STATE_FAILED]}, "run_ids"),
        ({"run_ids": ["a", ""]}, "run_ids[1]"),
        ({"run_ids": [f"a{n}" for n in range(1001)]}, "run_ids"),
        ({"labels": {"no key": ""}}, None),
    ],
)
def test_a_deletion_of_everything_or_of_nonsense_is_refused(rpc: Rpc, fields: dict[str, Any], path: str | None) -> None:
    run_id = ended(rpc)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", path):
        delete(rpc, *fields.pop("run_ids", ()), **fields)
    assert state_of(rpc.get(run_id)) == "SUCCEEDED"
    with refused("NOT_FOUND", "NAMESPACE_NOT_FOUND"):
        delete(rpc, "a", namespace="other")


# ---- with others -----------------------------------------------------------------------------------------------------


def test_many_runs_are_deleted_by_several_at_once_and_counted(rpc: Rpc, database_url: str) -> None:
    context = new_id("context")
    copy_runs(database_url, ended(rpc, run_input={"steps": 1}, context_id=context), 1199)

    def call(_number: int) -> pb.DeleteRunsResponse:
        return delete(rpc, context_id=context)

    first = call(0)
    assert first.more
    assert 200 <= first.deleted_count < 1200
    assert len(first.sample_run_ids) == 100
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    while call(0).more:
        pass
    assert not rpc.runs.ListRuns(pb.ListRunsRequest(context_id=context)).runs


def test_a_watcher_of_a_run_that_is_deleted_is_told_so(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("listener")
    rpc.until(run_id, "AWAITING_INPUT")
    reading = Reading(rpc.watch(run_id, timeout=60))
    eventually(lambda: any(response.caught_up for response in reading.responses))
    with sql(database_url) as connection:
        # As if its end and its deletion, both by another server, came between two looks of this one.
        for table, key in (("perdure.run_event", "workflow_id"), ("perdure.run", "workflow_id")):
            connection.execute(f"DELETE FROM {table} WHERE {key} = %s", (f"default.{run_id}.r",))
        connection.execute("DELETE FROM dbos.workflow_status WHERE workflow_uuid = %s", (f"default.{run_id}.r",))
    reading.join()
    assert reading.refusal is not None
    assert (reading.refusal.code.name, reading.refusal.reason) == ("NOT_FOUND", "RUN_NOT_FOUND")


def test_a_waiter_for_a_run_that_is_deleted_is_told_so(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("listener")
    rpc.until(run_id, "AWAITING_INPUT")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            refusal_of, lambda: rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run_id), timeout=scaled(30))
        )
        with sql(database_url) as connection:
            connection.execute("DELETE FROM perdure.run WHERE workflow_id = %s", (f"default.{run_id}.r",))
            connection.execute("DELETE FROM dbos.workflow_status WHERE workflow_uuid = %s", (f"default.{run_id}.r",))
        refusal = waiting.result(scaled(30))
    assert refusal is not None
    assert refusal.reason == "RUN_NOT_FOUND"


def test_pages_of_a_log_end_with_not_found_when_the_run_is_deleted(rpc: Rpc) -> None:
    run_id = ended(rpc, run_input={"steps": 3})
    page = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id, page_size=2))
    delete(rpc, run_id)
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id, page_size=2, page_token=page.next_page_token))


def test_forks_and_a_deletion_of_their_origin_at_once_leave_whole_runs(rpc: Rpc, database_url: str) -> None:
    for _ in range(5):
        origin = ended(rpc, run_input={"steps": 3})

        def fork(number: int, origin: str = origin) -> str:
            request = pb.ForkRunRequest(run_id=origin, request_id=new_id(), from_step_id=2 + number % 2)
            try:
                return str(rpc.runs.ForkRun(request, timeout=scaled(20)).run.run_id)
            except Exception as error:
                return f"! {error}"

        with ThreadPoolExecutor(5) as pool:
            forks = [pool.submit(fork, number) for number in range(4)]
            deleting = pool.submit(delete, rpc, origin)
        made = [future.result() for future in forks]
        deleting.result()
        for one in made:
            if one.startswith("!"):
                assert "RUN_NOT_FOUND" in one or "there is no run" in one or "deleted" in one, one
            else:
                assert rpc.output_of(one) == {"total": 3}
        response = delete(rpc, origin)
        assert response.deleted_count + len(response.missing_run_ids) == 1
        assert rows_of(database_url, origin) == {}


def test_the_log_of_the_server_says_who_deleted_how_many_and_by_what(rpc: Rpc, server: ServerProcess) -> None:
    run_id = ended(rpc, labels={"secret-label": "value"}, context_id=(context := new_id("context")))
    delete(rpc, labels={"secret-label": "value"}, context_id=context)
    line = eventually(lambda: [line for line in server.log.splitlines() if "runs.deleted" in line])[-1]
    assert "context_id" in line
    assert "labels" in line
    assert "secret-label" not in line
    assert context not in line
    assert run_id not in line
