"""Two servers of one database: each answers for every run, and each takes over what the other one leaves."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from google.protobuf.message import Message
from perdure.v1 import agent_catalog_service_pb2 as catalog_pb
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure.v1 import run_event_pb2 as event_pb

from tests.helpers import judge
from tests.helpers.rpc import Reading, Rpc, events_of, new_id, only, sequences, state_of, states_in
from tests.helpers.server import ServerProcess, create_effects_table, effects
from tests.helpers.waiting import eventually, scaled

TTL_S = scaled(2)
LONG_TTL_S = scaled(60)
"""So long that a hand-over which waits for it would be seen."""
WATCH_POLL_S = 0.3
"""As `ServerProcess` sets it."""
TAKE_OVER_S = 12
"""A few times to live, and a start of the agent's code."""
STEPS = 20
"""Of the run that works when its server goes."""
SLOTS = 5
STARTED_AT_ONCE = 30
"""Several times what one server runs at once."""


@dataclass
class Pair:
    """Two servers, and the stubs of each."""

    url: str
    a: ServerProcess
    b: ServerProcess
    at_a: Rpc
    at_b: Rpc


@contextmanager
def pair(url: str, ttl_s: float, **environment: str) -> Iterator[Pair]:
    """Serves a database with two servers until the end of the `with`."""
    environment |= {"PERDURE_LEASE_TTL": str(ttl_s)}
    with ExitStack() as stack:
        servers = [ServerProcess(url, command="serve", **environment) for _ in range(2)]
        for server in servers:
            stack.callback(server.__exit__)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ServerProcess.start, servers))
        stubs = [stack.enter_context(Rpc(server.address)) for server in servers]
        yield Pair(url, *servers, *stubs)


@pytest.fixture(scope="module")
def both(database_url: str) -> Iterator[Pair]:
    """Two servers that all tests here share; those that end one have their own."""
    create_effects_table(database_url)
    with pair(database_url, TTL_S, PERDURE_MAX_RUNNING=str(SLOTS)) as servers:
        yield servers


@pytest.fixture
def own(own_database_url: str) -> Iterator[Pair]:
    """Two servers of this test's own."""
    with pair(own_database_url, TTL_S) as servers:
        yield servers


def workflow_of(run_id: str) -> str:
    """Returns the engine's id of a run."""
    return f"default.{run_id}.r"


def counted(steps: int) -> list[str]:
    """Returns the effects of a counter."""
    return [f"count {number}" for number in range(steps)]


def executors_in(events: list[event_pb.RunEvent]) -> list[str]:
    """Returns the executors that took a run, in order."""
    changes = [event.state_changed for event in only(events, "state_changed")]
    return [change.executor_id for change in changes if change.executor_id]


def events_so_far(rpc: Rpc, run_id: str) -> list[event_pb.RunEvent]:
    """Returns the events of a run that goes on."""
    return list(rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id), timeout=scaled(20)).events)


# ---- each answers for every run --------------------------------------------------------------------------------------


def test_a_watch_at_the_other_server_is_live_and_sees_the_same(both: Pair) -> None:
    run_id = both.at_a.start("counter", {"steps": 20, "delay_s": 0.1, "text": "word "})
    arrivals: dict[int, float] = {}

    def follow(rpc: Rpc, times: dict[int, float]) -> list[event_pb.RunEvent]:
        events = []
        for response in rpc.watch(run_id):
            events += response.events
            times |= dict.fromkeys(sequences(response.events), time.monotonic())
        return events

    here: dict[int, float] = {}
    with ThreadPoolExecutor(2) as pool:
        at_a = pool.submit(follow, both.at_a, here)
        at_b = pool.submit(follow, both.at_b, arrivals)
        events = at_b.result()
        assert events == at_a.result()
    assert sequences(events) == list(range(1, len(events) + 1))
    assert states_in(events)[-1] == "SUCCEEDED"
    # Later by a poll, and what a busy machine adds; but not at the end of the run, which takes 2 s and more.
    assert max(arrivals[number] - here[number] for number in here) < scaled(WATCH_POLL_S + 1)
    assert len({round(moment, 2) for moment in arrivals.values()}) >= 4, "it came piece by piece"


def test_a_cursor_of_one_server_is_good_at_the_other(both: Pair) -> None:
    run_id = both.at_a.start("counter", {"steps": 12, "delay_s": 0.05})
    seen: list[event_pb.RunEvent] = []
    cursor, over, turn = "", False, 0
    while not over:
        turn += 1
        call = (both.at_a, both.at_b)[turn % 2].watch(run_id, **({"cursor": cursor} if cursor else {}))
        for response in call:
            seen += response.events
            cursor, over = response.cursor, response.end_of_run
            if response.events:
                break
        call.cancel()
    assert turn > 3
    assert seen == both.at_a.events(run_id)


def test_the_end_of_a_run_is_waited_for_at_the_other_server(both: Pair) -> None:
    run_id = both.at_a.start("counter", {"steps": 8, "delay_s": 0.05})
    run = both.at_b.end_of(run_id)
    assert json.loads(run.output_json) == {"total": 28}
    assert both.at_b.get(run_id) == both.at_a.get(run_id) == run


def test_an_approval_is_seen_and_decided_at_the_other_server(both: Pair) -> None:
    request = approval_pb.WatchApprovalsRequest()
    inbox = Reading(both.at_b.approvals.WatchApprovals(request, timeout=scaled(30)))
    run_id = both.at_a.start("asker", {})
    approval = both.at_b.approval_of(run_id)
    eventually(lambda: any(run_id in str(response) for response in inbox.responses), what="it is in the inbox")
    inbox.close()
    executor = both.at_b.get(run_id).executor_id
    both.at_b.decide(approval.approval_id, comment="from the other one")
    output = both.at_b.output_of(run_id)
    assert (output["approved"], output["comment"]) == (True, "from the other one")
    run = both.at_a.get(run_id)
    assert (run.execution, run.executor_id or executor) == (1, executor), "it went on where it was"
    assert effects(both.url, run_id) == counted(2)
    judge.assert_consistent(both.url, workflow_of(run_id))


def test_a_decision_at_one_server_is_refused_at_the_other_when_it_is_another(both: Pair) -> None:
    run_id = both.at_a.start("asker", {})
    approval_id = both.at_a.approval_of(run_id).approval_id
    with ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(lambda rpc=rpc, yes=yes: rpc.decide(approval_id, yes))
            for rpc, yes in ((both.at_a, True), (both.at_b, False))
        ]
        errors = [answer.exception() for answer in answers]
    assert [error is None for error in errors].count(True) == 1, errors
    assert both.at_b.output_of(run_id)["approved"] is (errors[0] is None)
    log = judge.assert_consistent(both.url, workflow_of(run_id))
    assert [event.kind for event in log].count("approval_decided") == 1


def test_signals_sent_to_both_servers_arrive_once_and_in_order(both: Pair) -> None:
    run_id = both.at_a.start("listener", {"signals": 4})
    both.at_a.until(run_id, "AWAITING_INPUT")
    for number in range(4):
        rpc = (both.at_b, both.at_a)[number % 2]
        assert rpc.signal(run_id, number, request_id=f"signal-{number}")
        other = (both.at_a, both.at_b)[number % 2]
        assert not other.signal(run_id, number, request_id=f"signal-{number}"), "it has it already"
    assert both.at_b.output_of(run_id) == [0, 1, 2, 3]


def test_a_run_that_is_cancelled_at_the_other_server_stops_where_it_executes(both: Pair) -> None:
    run_id = both.at_a.start("counter", {"steps": 1000, "delay_s": 0.05})
    eventually(lambda: len(effects(both.url, run_id)) >= 5)
    waits = [
        rpc.runs.WaitRun.future(pb.WaitRunRequest(run_id=run_id), timeout=scaled(20)) for rpc in (both.at_a, both.at_b)
    ]
    assert state_of(both.at_b.cancel(run_id, "enough")) == "CANCELLED"
    assert [state_of(wait.result().run) for wait in waits] == ["CANCELLED"] * 2
    known = len(effects(both.url, run_id))
    # Ten steps of the same length are the time that is waited.
    other = both.at_a.start("counter", {"steps": 10, "delay_s": 0.05})
    assert both.at_a.output_of(other) == {"total": 45}
    assert len(effects(both.url, run_id)) - known <= 1, "at most the body in progress, or about to begin"
    judge.assert_consistent(both.url, workflow_of(run_id), end="CANCELLED")
    for rpc in (both.at_a, both.at_b):
        assert state_of(rpc.get(run_id)) == "CANCELLED"


def test_both_servers_list_the_same(both: Pair) -> None:
    runs = [both.at_a.start("counter", {"steps": 1}, labels={"test": "lists"}) for _ in range(3)]
    runs += [both.at_b.start("counter", {"steps": 1}, labels={"test": "lists"}) for _ in range(3)]
    for run_id in runs:
        both.at_a.end_of(run_id)

    def same(call: str, request: Message) -> Message:
        first, second = (getattr(rpc.runs, call)(request, timeout=scaled(20)) for rpc in (both.at_a, both.at_b))
        assert first == second
        return first

    listed = same("ListRuns", pb.ListRunsRequest(labels={"test": "lists"}))
    assert [run.run_id for run in listed.runs] == runs[::-1]
    same("ListRuns", pb.ListRunsRequest())
    page = pb.ListRunsRequest(labels={"test": "lists"}, page_size=2)
    page.page_token = both.at_a.runs.ListRuns(page).next_page_token
    assert [run.run_id for run in same("ListRuns", page).runs] == runs[::-1][2:4]
    same("ListSteps", pb.ListStepsRequest(run_id=runs[0]))
    same("ListRunEvents", pb.ListRunEventsRequest(run_id=runs[0]))
    request = catalog_pb.ListAgentsRequest()
    agents = both.at_a.agents.ListAgents(request)
    assert agents == both.at_b.agents.ListAgents(request)
    assert {"counter", "research", "plain"} <= {agent.agent for agent in agents.agents}


def test_the_same_request_at_both_servers_is_one_run_though_the_server_makes_its_id(both: Pair) -> None:
    request_id = new_id("request")
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda rpc: rpc.start_call("counter", {"steps": 2}, request_id=request_id),
                [both.at_a, both.at_b] * 4,
            )
        )
    assert all(answer.created for answer in answers), "by this call, or by an earlier repeat of it"
    (run_id,) = {answer.run.run_id for answer in answers}
    assert both.at_b.output_of(run_id) == {"total": 1}
    assert effects(both.url, run_id) == counted(2)


def test_the_same_start_at_both_servers_is_one_run(both: Pair) -> None:
    run_id = new_id()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda rpc: rpc.start_call("counter", {"steps": 2}, run_id=run_id, request_id=new_id("request")),
                [both.at_a, both.at_b] * 4,
            )
        )
    assert [answer.created for answer in answers].count(True) == 1
    assert both.at_b.output_of(run_id) == {"total": 1}
    assert effects(both.url, run_id) == counted(2)


def test_queued_runs_are_shared_and_each_step_runs_once(both: Pair) -> None:
    runs = [both.at_a.start("counter", {"steps": 3, "delay_s": 0.05}) for _ in range(STARTED_AT_ONCE)]
    executors = set()
    for run_id in runs:
        assert both.at_b.output_of(run_id) == {"total": 3}
        events = both.at_b.events(run_id)
        executors |= set(executors_in(events))
        assert effects(both.url, run_id) == counted(3)
        judge.assert_consistent(both.url, workflow_of(run_id))
    assert len(executors) == 2, "both have worked"


# ---- each takes over what the other one leaves -----------------------------------------------------------------------


def _start_some(rpc: Rpc) -> tuple[str, str, str]:
    """Starts a run that works, one that waits for a signal, and one that asks."""
    working = rpc.start("counter", {"steps": STEPS, "delay_s": 0.1, "text": "word "})
    listening = rpc.start("listener", {})
    asking = rpc.start("asker", {})
    rpc.until(listening, "AWAITING_INPUT")
    rpc.until(asking, "AWAITING_INPUT")
    return working, listening, asking


def _finish(own: Pair, runs: tuple[str, str, str], *, deaths: int) -> None:
    """Has the second server finish what the first one began, and judges."""
    working, listening, asking = runs
    own.at_b.signal(listening, "hello")
    own.at_b.decide(own.at_b.approval_of(asking).approval_id)
    assert own.at_b.output_of(working) == {"total": sum(range(STEPS))}
    assert own.at_b.output_of(listening) == ["hello"]
    assert own.at_b.output_of(asking)["approved"]
    for run_id in runs:
        events = own.at_b.events(run_id)
        first, second = executors_in(events)
        assert first != second
        recovered = [event.recovered.from_executor_id for event in only(events, "recovered")]
        assert recovered == ([first] if deaths else []), "a hand-over is no recovery"
        assert own.at_b.get(run_id).execution == 2
        log = judge.assert_consistent(own.url, workflow_of(run_id))
        expected = {working: counted(STEPS), listening: [], asking: counted(2)}[run_id]
        judge.assert_effects(own.url, run_id, log, *expected, deaths=deaths if run_id == working else 0)
        if run_id == working:
            assert judge.text_of(log) == "word " * STEPS


def test_a_server_that_is_killed_loses_its_runs_to_the_other_which_finishes_them(own: Pair) -> None:
    runs = _start_some(own.at_a)
    watch = Reading(own.at_b.watch(runs[0], timeout=60))
    wait = own.at_b.runs.WaitRun.future(pb.WaitRunRequest(run_id=runs[0]), timeout=60)
    eventually(lambda: len(effects(own.url, runs[0])) >= 4)
    own.a.kill()
    for run_id in runs:
        eventually(lambda run_id=run_id: own.at_b.get(run_id).execution == 2, TAKE_OVER_S, what="it is taken over")
    _finish(own, runs, deaths=1)
    assert (state_of(wait.result().run), wait.result().run.execution) == ("SUCCEEDED", 2)
    events = events_of(watch.join())
    assert watch.refusal is None, "the watch at the living one held"
    assert events == own.at_b.events(runs[0])
    assert states_in(events) == ["RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]


def test_a_server_that_stops_hands_over_at_once(own_database_url: str) -> None:
    with pair(own_database_url, LONG_TTL_S, PERDURE_DRAIN_TIMEOUT="5") as own:
        runs = _start_some(own.at_a)
        eventually(lambda: len(effects(own.url, runs[0])) >= 4)
        began = time.monotonic()
        assert own.a.stop() == 0
        for run_id in runs:
            eventually(lambda run_id=run_id: own.at_b.get(run_id).execution == 2, what="it is taken over")
        assert time.monotonic() - began < LONG_TTL_S / 4
        _finish(own, runs, deaths=0)


def test_a_server_that_was_frozen_past_its_lease_ends_and_repeats_nothing(own: Pair) -> None:
    runs = _start_some(own.at_a)
    eventually(lambda: len(effects(own.url, runs[0])) >= 4)
    process = own.a._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for run_id in runs:
            eventually(lambda run_id=run_id: own.at_b.get(run_id).execution == 2, TAKE_OVER_S, what="it is taken over")
        eventually(lambda: len(effects(own.url, runs[0])) >= 8)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert own.a.wait_for_end() == 1, "it was declared gone, and knows it"
    _finish(own, runs, deaths=1)


def test_both_servers_at_once_are_killed_and_one_of_them_comes_back(own: Pair) -> None:
    runs = _start_some(own.at_a)
    eventually(lambda: len(effects(own.url, runs[0])) >= 4)
    own.a.kill()
    own.b.kill()
    own.b.start()
    for run_id in runs:
        eventually(lambda run_id=run_id: own.at_b.get(run_id).execution == 2, TAKE_OVER_S, what="it is taken over")
    _finish(own, runs, deaths=1)


def test_runs_that_only_wait_and_are_cancelled_at_the_other_server_give_back_their_slots(
    own_database_url: str,
) -> None:
    with pair(own_database_url, TTL_S, PERDURE_MAX_RUNNING=str(SLOTS)) as own:
        parent = own.at_a.start("parent", {"children": 1, "seconds": 300})
        (begun,) = eventually(lambda: only(events_so_far(own.at_b, parent), "child_started"))
        child = begun.child_started.child_run_id
        eventually(lambda: executors_in(events_so_far(own.at_b, child)))
        others = [own.at_a.start("listener"), own.at_a.start("asker"), own.at_a.start("sleeper", {"seconds": 300})]
        for run_id in others:
            own.at_a.until(run_id, "AWAITING_INPUT", "SLEEPING")
        (executor,) = executors_in(events_so_far(own.at_b, others[0]))
        for run_id in (parent, *others):
            assert state_of(own.at_b.cancel(run_id)) == "CANCELLED"
        for run_id in (parent, child, *others):
            assert state_of(own.at_a.end_of(run_id)) == "CANCELLED"

        def all_free() -> bool:
            runs = [own.at_a.start("counter", {"steps": 1, "delay_s": 0.3}) for _ in range(SLOTS)]
            for run_id in runs:
                own.at_a.end_of(run_id)
            taken = [executors_in(own.at_a.events(run_id))[0] for run_id in runs]
            assert taken == [executor] * SLOTS
            return True

        eventually(all_free, 3 * TTL_S, what="the server on which they waited has all of its slots")
