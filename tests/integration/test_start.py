"""StartAgent: what is the same run, what is refused, and when a run begins."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from google.protobuf.struct_pb2 import Struct
from perdure.v1 import agent_run_service_pb2 as pb

from tests.helpers.rpc import (
    Rpc,
    duration,
    in_seconds,
    kinds_of,
    new_id,
    only,
    refusal_of,
    refused,
    state_name,
    state_of,
    states_in,
)
from tests.helpers.server import ServerProcess, effects, sql
from tests.helpers.waiting import eventually

SERVER_MADE = re.compile(r"[a-z0-9]+-[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def rows(database_url: str) -> tuple[int, ...]:
    with sql(database_url) as connection:
        return tuple(
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # type: ignore[index]
            for table in ("perdure.run", "dbos.workflow_status", "perdure.run_event")
        )


# ---- the same start again --------------------------------------------------------------------------------------------


def test_a_start_answers_with_the_run_and_created(rpc: Rpc) -> None:
    run_id = new_id()
    response = rpc.start_call("counter", {"steps": 1}, run_id=run_id, labels={"team": "blue"}, context_id="case 7")
    assert response.created
    assert (response.run.namespace, response.run.run_id) == ("default", run_id)
    assert (response.run.agent, response.run.agent_version) == ("counter", "1")
    assert dict(response.run.labels) == {"team": "blue"}
    assert response.run.context_id == "case 7"
    assert response.run.last_sequence >= 1
    run = rpc.end_of(run_id)
    assert json.loads(run.output_json) == {"total": 0}
    assert json.loads(run.input_json) == {"steps": 1}
    assert dict(run.labels) == {"team": "blue"}
    assert run.context_id == "case 7"
    assert run.create_time.ToDatetime() <= run.start_time.ToDatetime() <= run.end_time.ToDatetime()


def test_the_same_start_by_another_request_finds_the_run_and_did_not_create_it(rpc: Rpc, database_url: str) -> None:
    run_id = new_id()
    first = rpc.start_call("counter", {"steps": 2}, run_id=run_id, request_id=new_id())
    second = rpc.start_call("counter", {"steps": 2}, run_id=run_id, request_id=new_id())
    assert (first.created, second.created) == (True, False)
    assert first.run.create_time == second.run.create_time
    rpc.end_of(run_id)
    third = rpc.start_call("counter", {"steps": 2}, run_id=run_id, request_id=new_id())
    assert (third.created, state_of(third.run)) == (False, "SUCCEEDED")
    assert effects(database_url, run_id) == ["count 0", "count 1"]


def test_the_same_request_again_is_told_that_it_created_the_run(rpc: Rpc, database_url: str) -> None:
    run_id, request_id = new_id(), new_id()
    first = rpc.start_call("counter", {"steps": 1}, run_id=run_id, request_id=request_id)
    second = rpc.start_call("counter", {"steps": 1}, run_id=run_id, request_id=request_id)
    assert first.created
    assert second.created
    rpc.end_of(run_id)
    assert rpc.start_call("counter", {"steps": 1}, run_id=run_id, request_id=request_id).created
    assert effects(database_url, run_id) == ["count 0"]


def test_a_start_without_request_ids_is_not_repeated_by_chance(rpc: Rpc) -> None:
    run_id = new_id()
    assert rpc.start_call("counter", {"steps": 1}, run_id=run_id).created
    assert not rpc.start_call("counter", {"steps": 1}, run_id=run_id).created


def test_the_order_of_members_and_the_form_of_the_input_do_not_matter(rpc: Rpc) -> None:
    run_id = new_id()
    rpc.start_call("counter", {"steps": 1, "delay_s": 0.5, "text": ""}, run_id=run_id)
    again = rpc.start_call("counter", {"text": "", "delay_s": 0.5, "steps": 1}, run_id=run_id)
    assert not again.created
    struct = Struct()
    struct.update({"steps": 1, "delay_s": 0.5, "text": ""})
    same = rpc.runs.StartAgent(pb.StartAgentRequest(agent="counter", run_id=run_id, input=struct))
    assert not same.created


def test_another_input_for_an_existing_id_is_refused_with_both_hashes(rpc: Rpc) -> None:
    run_id = new_id()
    first = rpc.start_call("counter", {"steps": 1}, run_id=run_id)
    with refused("ALREADY_EXISTS", "RUN_INPUT_MISMATCH") as error:
        rpc.start_call("counter", {"steps": 2}, run_id=run_id)
    canonical = json.dumps(["counter", {"steps": 2}], sort_keys=True, separators=(",", ":"))
    assert error.metadata["existing_sha256"] == first.run.input_sha256
    assert error.metadata["requested_sha256"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert json.loads(rpc.get(run_id).input_json) == {"steps": 1}


def test_another_input_is_refused_even_to_the_request_that_created_the_run(rpc: Rpc) -> None:
    run_id, request_id = new_id(), new_id()
    rpc.start_call("counter", {"steps": 1}, run_id=run_id, request_id=request_id)
    with refused("ALREADY_EXISTS", "RUN_INPUT_MISMATCH"):
        rpc.start_call("counter", {"steps": 2}, run_id=run_id, request_id=request_id)


def test_another_agent_for_an_existing_id_is_refused(rpc: Rpc) -> None:
    run_id = new_id()
    rpc.start_call("counter", {}, run_id=run_id)
    with refused("ALREADY_EXISTS", "RUN_INPUT_MISMATCH") as error:
        rpc.start_call("sync-counter", {}, run_id=run_id)
    assert error.metadata["existing_sha256"] != error.metadata["requested_sha256"]


def test_labels_and_deadline_are_not_part_of_what_makes_starts_equal(rpc: Rpc) -> None:
    run_id = new_id()
    rpc.start_call("counter", {"steps": 1}, run_id=run_id, labels={"a": "1"})
    again = rpc.start_call("counter", {"steps": 1}, run_id=run_id, labels={"a": "2"}, deadline_time=in_seconds(60))
    assert not again.created
    assert dict(again.run.labels) == {"a": "1"}
    assert not again.run.HasField("deadline_time")


def test_a_hundred_concurrent_equal_starts_are_one_run(rpc: Rpc, database_url: str) -> None:
    run_id = new_id()

    def start(_number: int) -> pb.StartAgentResponse:
        return rpc.start_call("counter", {"steps": 3}, run_id=run_id, request_id=new_id())

    with ThreadPoolExecutor(32) as pool:
        responses = list(pool.map(start, range(100)))
    assert sum(response.created for response in responses) == 1
    assert {response.run.run_id for response in responses} == {run_id}
    assert rpc.output_of(run_id) == {"total": 3}
    assert effects(database_url, run_id) == ["count 0", "count 1", "count 2"]
    assert rpc.get(run_id).execution == 1
    with sql(database_url) as connection:
        found = connection.execute(
            "SELECT count(*) FROM dbos.workflow_status WHERE workflow_uuid LIKE %s", (f"%{run_id}%",)
        ).fetchone()
    assert found == (1,)


def test_of_concurrent_different_starts_of_one_id_one_wins(rpc: Rpc) -> None:
    run_id = new_id()

    def start(steps: int) -> str:
        refusal = refusal_of(lambda: rpc.start_call("counter", {"steps": steps}, run_id=run_id))
        return "created" if refusal is None else refusal.reason

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(start, range(1, 11)))
    assert sorted(answers) == ["RUN_INPUT_MISMATCH"] * 9 + ["created"]


def test_policy_fail_refuses_a_run_of_another_request(rpc: Rpc) -> None:
    run_id = new_id()
    rpc.start_call("counter", {"steps": 1}, run_id=run_id, request_id=new_id())
    with refused("ALREADY_EXISTS", "RUN_ID_IN_USE"):
        rpc.start_call(
            "counter", {"steps": 1}, run_id=run_id, request_id=new_id(), conflict_policy=pb.CONFLICT_POLICY_FAIL
        )


def test_policy_fail_lets_the_same_request_repeat_itself(rpc: Rpc) -> None:
    run_id, request_id = new_id(), new_id()
    for _ in range(3):
        response = rpc.start_call(
            "counter", {"steps": 1}, run_id=run_id, request_id=request_id, conflict_policy=pb.CONFLICT_POLICY_FAIL
        )
        assert response.created


def test_policy_fail_lets_one_of_many_concurrent_requests_through(rpc: Rpc, database_url: str) -> None:
    run_id = new_id()

    def start(_number: int) -> str:
        refusal = refusal_of(
            lambda: rpc.start_call(
                "counter",
                {"steps": 1},
                run_id=run_id,
                request_id=new_id(),
                conflict_policy=pb.CONFLICT_POLICY_FAIL,
            )
        )
        return "created" if refusal is None else refusal.reason

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(start, range(16)))
    assert sorted(answers) == ["RUN_ID_IN_USE"] * 15 + ["created"]
    rpc.end_of(run_id)
    assert effects(database_url, run_id) == ["count 0"]


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_a_start_without_an_id_gets_one_made_by_the_server(rpc: Rpc) -> None:
    run = rpc.start_call("counter", {"steps": 0}).run
    assert SERVER_MADE.fullmatch(run.run_id)
    assert rpc.output_of(run.run_id) == {"total": 0}


def test_a_start_without_an_id_repeated_by_its_request_finds_its_run(rpc: Rpc, database_url: str) -> None:
    request_id = new_id()
    first = rpc.start_call("counter", {"steps": 1}, request_id=request_id)
    second = rpc.start_call("counter", {"steps": 1}, request_id=request_id)
    other = rpc.start_call("counter", {"steps": 1}, request_id=new_id())
    assert first.run.run_id == second.run.run_id != other.run.run_id
    assert first.created
    assert second.created
    rpc.end_of(first.run.run_id)
    assert effects(database_url, first.run.run_id) == ["count 0"]


def test_concurrent_starts_without_an_id_by_one_request_are_one_run(rpc: Rpc) -> None:
    request_id = new_id()
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda _: rpc.start_call("counter", {}, request_id=request_id), range(16)))
    assert len({response.run.run_id for response in responses}) == 1
    assert all(response.created for response in responses)


def test_one_request_id_for_two_different_starts_without_an_id_is_refused(rpc: Rpc) -> None:
    request_id = new_id()
    rpc.start_call("counter", {"steps": 1}, request_id=request_id)
    with refused("ALREADY_EXISTS", "RUN_INPUT_MISMATCH"):
        rpc.start_call("counter", {"steps": 2}, request_id=request_id)


def test_one_request_id_may_be_used_with_different_run_ids(rpc: Rpc) -> None:
    request_id = new_id()
    ids = [rpc.start("counter", {"steps": 0}, run_id=new_id(), request_id=request_id) for _ in range(2)]
    assert ids[0] != ids[1]
    for run_id in ids:
        rpc.end_of(run_id)


def test_an_id_of_the_shape_that_servers_make_is_refused(rpc: Rpc) -> None:
    made = rpc.start_call("counter", {"steps": 0}).run.run_id
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "run_id"):
        rpc.start_call("counter", {"steps": 0}, run_id=made)


# ---- nothing is written ----------------------------------------------------------------------------------------------


def test_validate_only_checks_all_and_writes_nothing(rpc: Rpc, database_url: str) -> None:
    run_id = new_id()
    before = rows(database_url)
    response = rpc.start_call("counter", {"steps": 1}, run_id=run_id, validate_only=True)
    assert not response.created
    assert (response.run.run_id, response.run.agent, response.run.last_sequence) == (run_id, "counter", 0)
    later = rpc.start_call("counter", {"steps": 1}, validate_only=True, delay=duration(60))
    assert state_of(later.run) == "SCHEDULED"
    with refused("INVALID_ARGUMENT", "INPUT_SCHEMA_VIOLATION", "input.steps"):
        rpc.start_call("counter", {"steps": "many"}, run_id=run_id, validate_only=True)
    assert rows(database_url)[:2] == before[:2]  # not the events: runs of the tests before may go on
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        rpc.get(run_id)


# ---- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["delay", "start_time"])
def test_a_delayed_run_is_scheduled_then_runs(rpc: Rpc, how: str) -> None:
    when = {"delay": duration(0.7)} if how == "delay" else {"start_time": in_seconds(0.7)}
    response = rpc.start_call("counter", {"steps": 1}, run_id=new_id(), **when)
    run_id = response.run.run_id
    assert state_of(response.run) == "SCHEDULED"
    assert response.run.execution == 0
    assert not response.run.HasField("start_time")
    events = rpc.events(run_id)
    states = states_in(events)
    assert (states[0], states[-2:]) == ("SCHEDULED", ["RUNNING", "SUCCEEDED"])
    until = events[0].state_changed.until_time.ToDatetime(UTC)
    created = response.run.create_time.ToDatetime(UTC)
    assert timedelta(seconds=0.3) < until - created < timedelta(seconds=1.2)
    run = rpc.get(run_id)
    assert run.start_time.ToDatetime(UTC) >= until - timedelta(milliseconds=5)


def test_a_start_time_in_the_past_means_now(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 1}, start_time=in_seconds(-3600))
    assert rpc.output_of(run_id) == {"total": 0}


def test_a_delay_of_zero_means_now(rpc: Rpc) -> None:
    response = rpc.start_call("counter", {"steps": 1}, run_id=new_id(), delay=duration(0))
    assert state_of(response.run) in ("RUNNING", "SUCCEEDED")
    assert rpc.output_of(response.run.run_id) == {"total": 0}


def test_every_event_of_a_state_says_the_state_before(rpc: Rpc) -> None:
    run_id = rpc.start("sleeper", {"seconds": 0.1}, delay=duration(0.2))
    changes = [event.state_changed for event in only(rpc.events(run_id), "state_changed")]
    assert state_name(changes[0].from_state) == "UNSPECIFIED"
    for before, after in pairwise(changes):
        assert after.from_state == before.to_state


@pytest.mark.parametrize(
    ("agent", "run_input", "more"),
    [
        ("sleeper", {"seconds": 600}, {}),
        ("listener", {}, {}),
        ("asker", {}, {}),
        ("counter", {"steps": 1000, "delay_s": 0.05}, {}),
        ("counter", {"steps": 1}, {"delay": 600}),
    ],
    ids=["sleeping", "waiting for a signal", "waiting for approval", "in a step", "scheduled"],
)
def test_a_deadline_ends_a_run_as_expired_whatever_it_does(
    rpc: Rpc, agent: str, run_input: dict[str, object], more: dict[str, float]
) -> None:
    fields = {"delay": duration(more["delay"])} if more else {}
    run_id = rpc.start(agent, run_input, deadline_time=in_seconds(0.8), **fields)
    assert rpc.get(run_id).HasField("deadline_time")
    events = rpc.events(run_id)
    assert kinds_of(events)[-1] == "state_changed"
    last = events[-1].state_changed
    assert state_name(last.to_state) == "EXPIRED"
    assert last.reason
    run = rpc.get(run_id)
    assert state_of(run) == "EXPIRED"
    assert run.state_reason == last.reason
    assert run.end_time.ToDatetime() >= run.deadline_time.ToDatetime()
    assert run.end_time.ToDatetime() - run.deadline_time.ToDatetime() < timedelta(seconds=3)


def test_a_deadline_ends_a_run_that_waits_in_the_queue(own_server: ServerProcess) -> None:
    own_server.start(PERDURE_MAX_RUNNING="1")
    with Rpc(own_server.address) as rpc:
        busy = rpc.start("listener", {})
        rpc.until(busy, "AWAITING_INPUT")
        run_id = rpc.start("counter", {"steps": 1}, deadline_time=in_seconds(0.8))
        assert state_of(rpc.get(run_id)) == "QUEUED"
        assert states_in(rpc.events(run_id)) == ["QUEUED", "EXPIRED"]
        assert state_of(rpc.get(busy)) == "AWAITING_INPUT"


def test_a_run_that_ends_before_its_deadline_is_not_touched_by_it(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 1}, deadline_time=in_seconds(0.7))
    assert rpc.output_of(run_id) == {"total": 0}
    deadline = rpc.get(run_id).deadline_time.ToDatetime(UTC)
    eventually(lambda: datetime.now(UTC) > deadline + timedelta(seconds=0.3))
    assert state_of(rpc.get(run_id)) == "SUCCEEDED"


# ---- who asked -------------------------------------------------------------------------------------------------------


def test_the_trace_of_the_caller_is_the_trace_of_the_run(rpc: Rpc) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    response = rpc.start_call(
        "counter", {"steps": 1}, run_id=new_id(), metadata=[("traceparent", f"00-{trace_id}-b7ad6b7169203331-01")]
    )
    assert response.run.trace_id == trace_id
    assert rpc.get(response.run.run_id).trace_id == trace_id


@pytest.mark.parametrize("parent", [None, "nonsense", "00-00000000000000000000000000000000-b7ad6b7169203331-01"])
def test_a_run_without_a_good_trace_of_its_caller_gets_its_own(rpc: Rpc, parent: str | None) -> None:
    metadata = [("traceparent", parent)] if parent else None
    run = rpc.start_call("counter", {"steps": 1}, run_id=new_id(), metadata=metadata).run
    assert re.fullmatch("(?!0{32})[0-9a-f]{32}", run.trace_id)


def test_a_blocking_synchronous_agent_does_not_delay_others(rpc: Rpc) -> None:
    run_id = rpc.start("blocking", {"seconds": 1.0})
    began = datetime.now(UTC)
    quick = rpc.start("counter", {"steps": 3})
    assert rpc.output_of(quick) == {"total": 3}
    assert datetime.now(UTC) - began < timedelta(seconds=0.9)
    assert rpc.output_of(run_id) == "done"
