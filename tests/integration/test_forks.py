"""ForkRun: what is taken over, what runs again, what the fork's log tells, and what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from perdure.v1 import agent_run_service_pb2 as pb

from tests.helpers import judge
from tests.helpers.rpc import Rpc, in_seconds, kinds_of, new_id, only, refused, state_of, states_in
from tests.helpers.server import effects, sql
from tests.helpers.waiting import eventually


def fork(rpc: Rpc, run_id: str, run_input: Any = None, **fields: Any) -> pb.ForkRunResponse:
    """ForkRun, with a request id of its own unless one is given."""
    fields.setdefault("request_id", new_id("request"))
    if run_input is not None:
        fields["input_json"] = json.dumps(run_input)
    return rpc.runs.ForkRun(pb.ForkRunRequest(run_id=run_id, **fields), timeout=60)


def counted(rpc: Rpc, steps: int = 3) -> str:
    """Returns a run that has ended with this many steps."""
    run_id = rpc.start("counter", {"steps": steps}, labels={"team": "blue"}, context_id="case 7")
    rpc.end_of(run_id)
    return run_id


def test_a_fork_takes_over_the_steps_below_and_runs_the_others(rpc: Rpc, database_url: str) -> None:
    origin = counted(rpc)
    new_run_id = new_id("fork")
    response = fork(rpc, origin, new_run_id=new_run_id, from_step_id=3)
    assert response.created
    assert (response.run.run_id, response.from_step_id) == (new_run_id, 3)
    assert (response.run.forked_from_run_id, response.run.forked_from_step_id) == (origin, 3)
    run = rpc.end_of(new_run_id)
    assert json.loads(run.output_json) == {"total": 3}
    assert effects(database_url, new_run_id) == ["count 2"]
    assert (dict(run.labels), run.context_id, run.agent) == ({"team": "blue"}, "case 7", "counter")
    assert run.input_sha256 == rpc.get(origin).input_sha256
    assert run.trace_id != rpc.get(origin).trace_id
    assert run.parent_run_id == ""


def test_the_log_of_a_fork_tells_where_it_comes_from_and_what_it_took_over(rpc: Rpc, database_url: str) -> None:
    origin = counted(rpc)
    run_id = fork(rpc, origin, new_run_id=new_id("fork"), from_step_id=3).run.run_id
    events = rpc.events(run_id)
    assert kinds_of(events)[:4] == ["state_changed", "forked", "step_succeeded", "step_succeeded"]
    forked = events[1].forked
    assert (forked.from_run_id, forked.from_step_id) == (origin, 3)
    taken = events[2:4]
    assert [(event.step_id, event.step_name, event.execution) for event in taken] == [
        (1, "count_one", 0),
        (2, "count_one", 0),
    ]
    originals = only(rpc.events(origin), "step_succeeded")[:2]
    assert [event.event_time for event in taken] == [event.event_time for event in originals]
    assert [event.step_succeeded for event in taken] == [event.step_succeeded for event in originals]
    steps = rpc.runs.ListSteps(pb.ListStepsRequest(run_id=run_id)).steps
    assert [(step.step_id, pb.StepState.Name(step.state), step.execution) for step in steps] == [
        (1, "STEP_STATE_SUCCEEDED", 0),
        (2, "STEP_STATE_SUCCEEDED", 0),
        (3, "STEP_STATE_SUCCEEDED", 1),
    ]
    judge.assert_consistent(database_url, f"default.{run_id}.r")


# ---- where it goes on ------------------------------------------------------------------------------------------------


def mend(database_url: str, key: str) -> None:
    """Makes the step `needs` of the test agents succeed from now on."""
    with sql(database_url) as connection:
        connection.execute("INSERT INTO public.test_effect (run_id, what) VALUES ('mended', %s)", (key,))


def test_a_run_that_failed_is_retried_from_the_step_that_failed(rpc: Rpc, database_url: str) -> None:
    key = new_id("key")
    origin = rpc.start("mendable", {"key": key})
    assert state_of(rpc.end_of(origin)) == "FAILED"
    mend(database_url, key)
    response = fork(rpc, origin, new_run_id=new_id("fork"))
    assert response.from_step_id == 2
    assert rpc.output_of(response.run.run_id) == f"{key} works"
    assert effects(database_url, response.run.run_id) == [f"needs {key}", "count 1"]
    log = judge.assert_consistent(database_url, f"default.{response.run.run_id}.r")
    assert [event.step_id for event in log if event.kind == "step_succeeded"] == [1, 2, 3]
    assert state_of(rpc.get(origin)) == "FAILED", "the origin stays as it was"


def test_a_run_of_which_all_steps_succeeded_goes_on_behind_the_last_one(rpc: Rpc, database_url: str) -> None:
    origin = counted(rpc, 2)
    response = fork(rpc, origin)
    assert response.from_step_id == 3
    assert rpc.output_of(response.run.run_id) == {"total": 1}
    assert effects(database_url, response.run.run_id) == []


def test_a_child_that_failed_is_started_anew_and_the_result_of_the_other_one_is_kept(
    rpc: Rpc, database_url: str
) -> None:
    key = new_id("key")
    origin = rpc.start("mendable-parent", {"key": key})
    assert state_of(rpc.end_of(origin)) == "FAILED"
    mend(database_url, key)
    response = fork(rpc, origin, new_run_id=new_id("fork"))
    assert response.from_step_id == 2, "the step that starts the child that failed"
    assert rpc.output_of(response.run.run_id) == f"child 7, {key} works"
    children = rpc.runs.ListRuns(pb.ListRunsRequest(parent_run_id=response.run.run_id)).runs
    assert [child.run_id for child in children] == [f"{response.run.run_id}.2"]


def test_a_run_that_was_cancelled_in_a_wait_waits_again(rpc: Rpc) -> None:
    origin = rpc.start("listener", {"signals": 2, "timeout_s": 600})
    rpc.until(origin, "AWAITING_INPUT")
    rpc.signal(origin, "first")

    def waits_again() -> bool:
        log = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=origin)).events
        return states_in(log).count("AWAITING_INPUT") == 2

    eventually(waits_again)
    rpc.cancel(origin)
    response = fork(rpc, origin)
    assert response.from_step_id == 3, "the first message is taken over, with the number that its timeout has"
    rpc.until(response.run.run_id, "AWAITING_INPUT")
    rpc.signal(response.run.run_id, "second")
    assert rpc.output_of(response.run.run_id) == ["first", "second"]


def test_a_run_that_goes_on_can_be_forked_at_what_it_has_recorded(rpc: Rpc, database_url: str) -> None:
    origin = rpc.start("asker", {})
    asked = rpc.approval_of(origin)
    response = fork(rpc, origin, new_run_id=new_id("fork"))
    assert response.from_step_id == 2
    again = rpc.approval_of(response.run.run_id)
    assert again.approval_id == f"{response.run.run_id}/2" != asked.approval_id
    rpc.decide(again.approval_id, comment="the fork's")
    assert rpc.output_of(response.run.run_id)["comment"] == "the fork's"
    assert effects(database_url, response.run.run_id) == ["count 1"]
    assert state_of(rpc.get(origin)) == "AWAITING_INPUT", "the forked run is not touched"
    rpc.decide(asked.approval_id, comment="the origin's")
    assert rpc.output_of(origin)["comment"] == "the origin's"
    later = fork(rpc, origin, from_step_id=3)
    assert rpc.output_of(later.run.run_id)["comment"] == "the origin's", "a decision below the step is taken over"


def test_published_values_streams_and_children_below_the_step_are_taken_over(rpc: Rpc, database_url: str) -> None:
    origin = rpc.start("plain", {"name": "x"})
    rpc.end_of(origin)
    recorded = judge.checkpoints_of(database_url, f"default.{origin}.r")
    last = max(recorded)
    run_id = fork(rpc, origin, new_run_id=new_id("fork"), from_step_id=last).run.run_id
    assert rpc.output_of(run_id) == rpc.output_of(origin)
    log = judge.assert_consistent(database_url, f"default.{run_id}.r")
    assert judge.text_of(log, "log") == "a line"
    assert [event.data["value_json"] for event in log if event.kind == "published"] == ['{"name":"x"}']
    assert {event.data["child_run_id"] for event in log if event.kind == "child_started"} == {
        event.data["child_run_id"] for event in judge.log_of(database_url, f"default.{origin}.r")
        if event.kind == "child_started"
    }  # fmt: skip
    with sql(database_url) as connection:
        for table in ("workflow_events", "streams"):
            row = connection.execute(
                f"SELECT count(*) FROM dbos.{table} WHERE workflow_uuid = %s", (f"default.{run_id}.r",)
            ).fetchone()
            assert row == (1,), table


def test_a_fork_of_a_fork_takes_over_what_that_took_over(rpc: Rpc, database_url: str) -> None:
    first = fork(rpc, counted(rpc, 4), from_step_id=3).run.run_id
    rpc.end_of(first)
    second = fork(rpc, first, new_run_id=new_id("fork"), from_step_id=4).run.run_id
    assert rpc.output_of(second) == {"total": 6}
    assert effects(database_url, second) == ["count 3"]
    judge.assert_consistent(database_url, f"default.{second}.r")
    assert rpc.get(second).forked_from_run_id == first


# ---- other input, version, labels ------------------------------------------------------------------------------------


def test_another_input_goes_to_the_code_and_not_to_the_steps_that_are_taken_over(rpc: Rpc, database_url: str) -> None:
    origin = counted(rpc, 2)
    run = fork(rpc, origin, {"steps": 4}, new_run_id=new_id("fork"), from_step_id=2).run
    assert rpc.output_of(run.run_id) == {"total": 6}
    assert effects(database_url, run.run_id) == ["count 1", "count 2", "count 3"]
    assert json.loads(rpc.get(run.run_id).input_json) == {"steps": 4}
    same = rpc.start_call("counter", {"steps": 4}, run_id=new_id(), validate_only=True).run
    assert run.input_sha256 == same.input_sha256 != rpc.get(origin).input_sha256


def test_another_version_goes_on_from_the_recorded_steps(rpc: Rpc, database_url: str) -> None:
    key = new_id("key")
    mend(database_url, key)
    origin = rpc.start("mendable", {"key": key, "text": "a"})
    rpc.end_of(origin)
    run = fork(rpc, origin, new_run_id=new_id("fork"), from_step_id=3, agent_version="2").run
    assert (run.agent, run.agent_version) == ("mendable", "2")
    assert rpc.output_of(run.run_id) == f"{key} works".upper()
    assert effects(database_url, run.run_id) == []
    assert run.input_sha256 == rpc.get(origin).input_sha256
    quiet = fork(rpc, origin, {"key": key, "loud": False}, from_step_id=3, agent_version="2").run
    assert rpc.output_of(quiet.run_id) == f"{key} works"


def test_labels_and_deadline_are_the_forks_own(rpc: Rpc) -> None:
    origin = rpc.start("sleeper", {"seconds": 600}, labels={"team": "blue"}, deadline_time=in_seconds(600))
    rpc.until(origin, "SLEEPING")
    run_id = fork(rpc, origin, labels={"why": "test"}, deadline_time=in_seconds(1), from_step_id=1).run.run_id
    run = rpc.end_of(run_id)
    assert (state_of(run), dict(run.labels)) == ("EXPIRED", {"why": "test"})
    plain = fork(rpc, origin, from_step_id=1).run
    assert not plain.HasField("deadline_time")
    assert dict(plain.labels) == {"team": "blue"}
    for one in (origin, plain.run_id):
        rpc.cancel(one)


# ---- the same fork again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_id", [True, False], ids=["own id", "id made by the server"])
def test_concurrent_repeats_of_a_request_make_one_fork(rpc: Rpc, database_url: str, own_id: bool) -> None:
    origin, request_id = counted(rpc), new_id("request")
    fields = {"new_run_id": new_id("fork")} if own_id else {}

    def call(_number: int) -> pb.ForkRunResponse:
        return fork(rpc, origin, request_id=request_id, from_step_id=2, **fields)

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(call, range(12)))
    assert len({response.run.run_id for response in responses}) == 1
    assert all(response.created for response in responses)
    run_id = responses[0].run.run_id
    rpc.end_of(run_id)
    assert fork(rpc, origin, request_id=request_id, **fields).created, "where to begin is as it was decided"
    assert effects(database_url, run_id) == ["count 1", "count 2"]
    judge.assert_consistent(database_url, f"default.{run_id}.r")


def test_another_request_for_the_same_fork_finds_it_and_did_not_create_it(rpc: Rpc) -> None:
    origin, new_run_id = counted(rpc), new_id("fork")
    first = fork(rpc, origin, new_run_id=new_run_id, from_step_id=2)
    second = fork(rpc, origin, new_run_id=new_run_id, from_step_id=2)
    assert (first.created, second.created) == (True, False)
    assert second.run.create_time == first.run.create_time


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"from_step_id": 1}, "RUN_ID_IN_USE"),
        ({"agent_version": "7"}, "RUN_ID_IN_USE"),
        ({"input_json": '{"steps": 1}'}, "RUN_INPUT_MISMATCH"),
    ],
    ids=["step", "version", "input"],
)
def test_one_id_or_request_for_two_different_forks_is_refused(rpc: Rpc, other: dict[str, Any], reason: str) -> None:
    origin, request_id, new_run_id = counted(rpc), new_id("request"), new_id("fork")
    fork(rpc, origin, request_id=request_id, from_step_id=2)
    fork(rpc, origin, new_run_id=new_run_id, from_step_id=2)
    fields = {"from_step_id": 2, **other}
    with refused("ALREADY_EXISTS", reason):
        fork(rpc, origin, request_id=request_id, **fields)
    with refused("ALREADY_EXISTS", reason):
        fork(rpc, origin, new_run_id=new_run_id, **fields)


def test_the_id_of_a_run_that_is_no_fork_is_refused(rpc: Rpc) -> None:
    origin = counted(rpc)
    with refused("ALREADY_EXISTS", "RUN_ID_IN_USE"):
        fork(rpc, origin, new_run_id=counted(rpc))
    with refused("ALREADY_EXISTS", "RUN_ID_IN_USE"):
        fork(rpc, origin, new_run_id=origin)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "reason", "path"),
    [
        ({"from_step_id": 5}, "INVALID_ARGUMENT", "INVALID_FIELD", "from_step_id"),
        ({"from_step_id": -1}, "INVALID_ARGUMENT", "INVALID_FIELD", "from_step_id"),
        ({"agent_version": "no"}, "FAILED_PRECONDITION", "VERSION_UNAVAILABLE", None),
        ({"input_json": '{"steps": "many"}'}, "INVALID_ARGUMENT", "INPUT_SCHEMA_VIOLATION", "input.steps"),
        ({"input_json": "[]"}, "INVALID_ARGUMENT", "INVALID_FIELD", "input"),
        ({"request_id": ""}, "INVALID_ARGUMENT", "INVALID_FIELD", "request_id"),
        ({"new_run_id": "UPPER"}, "INVALID_ARGUMENT", "INVALID_FIELD", "new_run_id"),
        ({"deadline_time": in_seconds(-60)}, "INVALID_ARGUMENT", "INVALID_FIELD", "deadline_time"),
        ({"labels": {"no key": ""}}, "INVALID_ARGUMENT", "INVALID_FIELD", None),
    ],
)
def test_a_fork_that_cannot_be_is_refused_and_nothing_is_written(
    rpc: Rpc, database_url: str, fields: dict[str, Any], code: str, reason: str, path: str | None
) -> None:
    origin = counted(rpc)
    with refused(code, reason, path) as error:
        fork(rpc, origin, **fields)
    if fields.get("from_step_id") == 5:
        assert "1 to 4" in error.text
    with sql(database_url) as connection:
        query = "SELECT count(*) FROM perdure.run WHERE forked_from_workflow_id = %s"
        assert connection.execute(query, (f"default.{origin}.r",)).fetchone() == (0,)


def test_a_run_that_does_not_exist_cannot_be_forked(rpc: Rpc) -> None:
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        fork(rpc, new_id("nothing"))
    with refused("NOT_FOUND", "NAMESPACE_NOT_FOUND"):
        fork(rpc, new_id("nothing"), namespace="other")


def test_validate_only_says_where_a_fork_would_begin_and_writes_nothing(rpc: Rpc) -> None:
    origin, new_run_id = counted(rpc), new_id("fork")
    response = fork(rpc, origin, new_run_id=new_run_id, validate_only=True)
    assert (response.created, response.from_step_id, response.run.run_id) == (False, 4, new_run_id)
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        rpc.get(new_run_id)
