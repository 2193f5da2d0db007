"""A fleet against a model: whatever callers do, and whatever is killed, frozen or stopped, runs end as planned.

Hypothesis chooses what happens, from the seed of the session; each step is printed, so that a failure shows what led to
it. Nothing is shrunk: an example takes seconds, and its servers are real.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure.v1.agent_run_pb2 import AgentRun
from perdure.v1.approval_pb2 import Approval
from perdure_service.domain.events import EventKind

from tests.helpers import chaos_report, judge
from tests.helpers.ledger import Task, assert_ledger, create_ledger
from tests.helpers.rpc import TERMINAL, Rpc, new_id, refusal_of, state_of
from tests.helpers.server import ServerProcess, sql
from tests.helpers.waiting import eventually, scaled

SEED = int(os.environ["PERDURE_TEST_SEED"])
EXAMPLES = 12 if os.environ.get("PERDURE_TEST_ALL_POINTS") else 4
STEPS = 12
RUNS_AT_FIRST = 3
TTL_S = scaled(1)
SETTINGS = {"PERDURE_LEASE_TTL": str(TTL_S), "PERDURE_PARK_AFTER": "0.2", "PERDURE_DRAIN_TIMEOUT": "5"}
ENDS_S = 40

CALLS = ("start", "signal", "decide", "wait", "signal", "decide", "cancel")
FAULTS = ("crash", "", "crash_in_a_call", "", "stop", "", "freeze", "", "crash_both", "")
"""What follows a call; half of the time nothing."""
PLANS = st.lists(st.sampled_from(["child", "enter", "hear", "ask", "sleep"]), min_size=1, max_size=4)
SIDES = st.integers(0, 1)
CHOICES = st.integers(0, 99)


@dataclass
class Model:
    """What is known of a run: all of it follows from what its callers did, and nothing from what was broken.

    Attributes:
        plan: What it does.
        heard: The payloads that were sent to it, in order.
        decided: The decisions on its approvals, by the task that asked.
        cancelled: Whether it was cancelled before its end.
        over: The state in which it was seen to have ended.
    """

    run_id: str
    plan: list[Task]
    heard: list[int] = field(default_factory=list)
    decided: dict[int, bool] = field(default_factory=dict)
    cancelled: bool = False
    over: str = ""

    @property
    def workflow_id(self) -> str:
        return f"default.{self.run_id}.r"

    @property
    def reached(self) -> int:
        """How many of its tasks can be done by what it was told so far."""
        heard = 0
        for number, task in enumerate(self.plan):
            heard += task == "hear"
            if heard > len(self.heard) or (task == "ask" and number not in self.decided):
                return number
        return len(self.plan)

    @property
    def complete(self) -> bool:
        """Whether it needs nothing more to end."""
        return self.reached == len(self.plan)

    @property
    def output(self) -> list[object]:
        """What it returns."""
        payloads = iter(self.heard)
        return [
            next(payloads) if task == "hear" else self.decided[number] if task == "ask" else _told(number, task)
            for number, task in enumerate(self.plan)
        ]

    @property
    def entries(self) -> list[str]:
        """The entries that it makes in the ledger, when nobody cancels it."""
        return [f"entry {number}" for number, task in enumerate(self.plan) if task == "enter"]


def _told(number: int, task: Task) -> str:
    return "slept" if task == "sleep" else f"{'entry' if task == 'enter' else task} {number}"


@dataclass
class Fleet:
    """Two servers of one database, and the stubs of each."""

    url: str
    servers: list[ServerProcess]
    stubs: list[Rpc]
    _seen: list[int] = field(default_factory=lambda: [0, 0])
    """How much was in the log of each when it was started last."""

    def restart(self, *sides: int) -> None:
        """Starts servers that have ended."""
        for side in sides:
            self._seen[side] = len(self.servers[side].log)
        with ThreadPoolExecutor(len(sides)) as pool:
            list(pool.map(lambda side: self.servers[side].start(), sides))

    def freeze(self, side: int) -> None:
        """Stops a process until it was declared gone, and lets it go on: it finds that out, and ends."""
        process = self.servers[side]._process
        assert process is not None
        executor_id = re.findall('"executor_id": "([^"]+)"', self.servers[side].log[self._seen[side] :])[0]
        chaos_report.fault("servers frozen")
        os.kill(process.pid, signal.SIGSTOP)
        try:
            eventually(lambda: self._is_gone(executor_id), 20, what="the frozen server is declared gone")
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert self.servers[side].wait_for_end() == 1, "it was declared gone, and knows it"

    def _is_gone(self, executor_id: str) -> bool:
        query = "SELECT tombstoned_at IS NOT NULL FROM perdure.executor WHERE executor_id = %s"
        with sql(self.url) as connection:
            return connection.execute(query, (executor_id,)).fetchall() == [(True,)]


@pytest.fixture(scope="module")
def fleet(database_url: str) -> Iterator[Fleet]:
    create_ledger(database_url)
    agents = "tests.helpers.ledger"
    servers = [ServerProcess(database_url, agents, command="serve", **SETTINGS) for _ in range(2)]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.__exit__)
        fleet = Fleet(database_url, servers, [stack.enter_context(Rpc(server.address)) for server in servers])
        fleet.restart(0, 1)
        yield fleet


class Story(RuleBasedStateMachine):
    """What happens to the fleet, and what must be true of its runs at every moment."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        self.fleet = fleet
        self.runs: list[Model] = []
        self._began = time.monotonic()
        self._say("a new story")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.2f} {text}")

    def _choose(self, choice: int) -> Model:
        return self.runs[choice % len(self.runs)]

    def _pending(self, side: int, run: Model) -> list[Approval]:
        request = approval_pb.ListApprovalsRequest(run_id=run.run_id)
        return list(self.fleet.stubs[side].approvals.ListApprovals(request, timeout=scaled(20)).approvals)

    # ---- what callers do ---------------------------------------------------------------------------------------------

    @initialize(plans=st.lists(PLANS, min_size=RUNS_AT_FIRST, max_size=RUNS_AT_FIRST))
    def begin(self, plans: list[list[Task]]) -> None:
        for number, plan in enumerate(plans):
            self.start(number % 2, plan)

    @rule(call=st.sampled_from(CALLS), fault=st.sampled_from(FAULTS), side=SIDES, choice=CHOICES, plan=PLANS)
    def go_on(self, call: str, fault: str, side: int, choice: int, plan: list[Task]) -> None:
        """Makes a call, and breaks something: one rule, so that each story is of both."""
        if call == "start":
            self.start(side, plan)
        else:
            getattr(self, call)(side, choice)
        if fault == "crash_in_a_call":
            self.crash_in_a_call(side, choice)
        elif fault:
            getattr(self, fault)(side)

    def start(self, side: int, plan: list[Task]) -> None:
        """A start is acknowledged once, and a repeat at the other server is the same run."""
        run = Model(new_id("story"), plan)
        self._say(f"{run.run_id} starts at {side}: {plan}")
        fields = {"run_id": run.run_id, "request_id": run.run_id}
        for at in (side, 1 - side):
            answer = self.fleet.stubs[at].start_call(
                "planned", {"plan": plan, "delay_s": 0.05, "sleep_s": 0.3}, **fields
            )
            assert answer.created
            assert answer.run.run_id == run.run_id
        self.runs.append(run)

    def signal(self, side: int, choice: int) -> None:
        """A signal is delivered once, however often and wherever it is sent; only a run that has ended refuses it."""
        run = self._choose(choice)
        payload, request_id = len(run.heard), new_id("signal")
        ended = run.complete or run.cancelled
        refusal = refusal_of(lambda: self.fleet.stubs[side].signal(run.run_id, payload, request_id=request_id))
        self._say(f"{run.run_id} is sent {payload} at {side}: {refusal.reason if refusal else 'delivered'}")
        if refusal is not None:
            assert refusal.reason == "RUN_FINISHED", refusal
            assert ended, "it waits yet"
            return
        assert not run.cancelled, "a run that was cancelled takes nothing more"
        run.heard.append(payload)
        again = refusal_of(lambda: self._repeat(1 - side, run, payload, request_id))
        assert again is None or (run.complete and again.reason == "RUN_FINISHED"), again

    def _repeat(self, side: int, run: Model, payload: int, request_id: str) -> None:
        assert not self.fleet.stubs[side].signal(run.run_id, payload, request_id=request_id), "it was delivered before"

    def decide(self, side: int, choice: int) -> None:
        """What a run asks is decided once: the other answer is refused from then on."""
        run, approve = self._choose(choice), choice % 3 > 0
        for approval in self._pending(side, run):
            number = int(approval.title.split()[1])
            assert number == run.reached, "it asks what is next, and nothing else"
            self.fleet.stubs[side].decide(approval.approval_id, approve)
            self._say(f"{run.run_id} is told {approve} on {number} at {side}")
            run.decided[number] = approve
            other = refusal_of(lambda one=approval: self.fleet.stubs[1 - side].decide(one.approval_id, not approve))  # type: ignore[misc]
            assert other is not None
            assert other.reason == "APPROVAL_CLOSED", other

    def cancel(self, side: int, choice: int) -> None:
        """A run that has not ended is cancelled by this call; one that has stays as it is."""
        run = self._choose(choice)
        state = state_of(self.fleet.stubs[side].cancel(run.run_id))
        self._say(f"{run.run_id} is cancelled at {side}: {state}")
        run.cancelled |= state == "CANCELLED"
        assert state in ("CANCELLED", "SUCCEEDED"), state
        assert state == "CANCELLED" or run.complete, "it could not have ended yet"

    def wait(self, side: int, choice: int) -> None:
        """A run comes to rest: at its end when it needs nothing more, else where it waits for somebody."""
        run = self._choose(choice)
        self._say(f"{run.run_id} is waited for at {side}")
        states = ["SUCCEEDED", "CANCELLED"] if run.complete or run.cancelled else ["AWAITING_INPUT"]
        found = self.fleet.stubs[side].until(run.run_id, *states, timeout=ENDS_S)
        self._look(run, found)

    # ---- what is broken ----------------------------------------------------------------------------------------------

    def crash(self, side: int) -> None:
        self._say(f"server {side} is killed")
        self.fleet.servers[side].kill()
        self.fleet.restart(side)

    def crash_both(self, _: int) -> None:
        self._say("both servers are killed")
        for server in self.fleet.servers:
            server.kill()
        self.fleet.restart(0, 1)

    def crash_in_a_call(self, side: int, choice: int) -> None:
        """Killed at the moment of a signal: it was delivered or not, and the repeat at the other server tells."""
        run, request_id = self._choose(choice), new_id("signal")
        if run.complete or run.cancelled:
            return
        payload = len(run.heard)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(
                refusal_of, lambda: self.fleet.stubs[side].signal(run.run_id, payload, request_id=request_id)
            )
            self.fleet.servers[side].kill()
            refusal = call.result()
        created = self.fleet.stubs[1 - side].signal(run.run_id, payload, request_id=request_id)
        told = refusal.code.name if refusal else "delivered"
        self._say(f"{run.run_id} is sent {payload} at {side}, which is killed: {told}, and {created=}")
        assert not (created and refusal is None), "what was acknowledged is there"
        run.heard.append(payload)
        self.fleet.restart(side)

    def freeze(self, side: int) -> None:
        self._say(f"server {side} is frozen")
        self.fleet.freeze(side)
        self.fleet.restart(side)

    def stop(self, side: int) -> None:
        self._say(f"server {side} is stopped")
        assert self.fleet.servers[side].stop() == 0
        self.fleet.restart(side)

    # ---- what must be true -------------------------------------------------------------------------------------------

    def _look(self, run: Model, found: AgentRun) -> None:
        state = state_of(found)
        assert not run.over or state == run.over, f"it was {run.over}, and is {state}"
        assert run.cancelled == (state == "CANCELLED"), f"{run} is {state}"
        if state in TERMINAL:
            assert run.cancelled or state == "SUCCEEDED", found
            assert run.cancelled or run.complete, f"{run} has ended without what it waits for"
            run.over = state
        if state == "SUCCEEDED":
            assert json.loads(found.output_json) == run.output

    @invariant()
    def every_run_is_in_a_state_that_the_model_allows(self) -> None:
        for number, run in enumerate(self.runs):
            self._look(run, self.fleet.stubs[number % 2].get(run.run_id))

    def teardown(self) -> None:
        """Gives every run what it waits for, waits for its end, and judges it."""
        self._say("the end")
        for number, run in enumerate(self.runs):
            while not (run.complete or run.cancelled):
                if run.plan[run.reached] == "hear":
                    self.signal(0, number)
                else:
                    eventually(lambda run=run: self._pending(0, run), ENDS_S, what=f"{run} asks")  # type: ignore[misc]
                    self.decide(0, number)
        for number, run in enumerate(self.runs):
            self.wait(0, number)
            self._judge(run)

    def _judge(self, run: Model) -> None:
        log = judge.assert_consistent(self.fleet.url, run.workflow_id, end=run.over)
        assert [event.kind for event in log].count(EventKind.SIGNAL_RECEIVED) == len(run.heard)
        decided = [event.data["state"] for event in log if event.kind is EventKind.APPROVAL_DECIDED]
        if run.cancelled and decided[len(run.decided) :]:
            assert decided.pop() == "WITHDRAWN", "it was open when the run was cancelled"
        assert decided == ["APPROVED" if run.decided[number] else "REJECTED" for number in sorted(run.decided)]
        if not run.cancelled:
            assert_ledger(self.fleet.url, run.workflow_id, log, run.entries)
            assert judge.text_of(log) == "".join(f"{entry}\n" for entry in run.entries)
        for event in log:
            if event.kind is EventKind.CHILD_STARTED:
                child = f"{run.workflow_id}-{event.data['child_run_id'].rpartition('.')[2]}"
                told = judge.assert_consistent(self.fleet.url, child, end=state_of_child(self.fleet.url, child, run))
                if told[-1].data["to"] == "SUCCEEDED":
                    assert_ledger(self.fleet.url, child, told, [judge.output_of(self.fleet.url, child)])


def state_of_child(url: str, workflow_id: str, parent: Model) -> str:
    """Returns how a child must have ended: well, unless its parent was cancelled before."""
    if not parent.cancelled:
        return "SUCCEEDED"
    return str(judge.log_of(url, workflow_id)[-1].data["to"])


@pytest.mark.timeout(600)
def test_a_fleet_does_what_the_model_says(fleet: Fleet) -> None:
    def story() -> Story:
        return Story(fleet)

    run_state_machine_as_test(
        hypothesis.seed(SEED)(story),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
