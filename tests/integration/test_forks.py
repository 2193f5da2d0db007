"""ForkRun: what is taken over, what runs again, what the fork's log tells, and what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from perdure.v1 import agent_run_service_pb2 as pb

from tests.helpers import judge
from tests.helpers.rpc import Rpc, in_seconds, kinds_of, new_id, only, refused, state_of
from tests.helpers.server import effects, sql


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
