"""Limits of queues and agents: never exceeded, whoever dies, and as quick as they allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise

import grpc
import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import operator_service_pb2 as operators
from perdure.v1.operator_service_pb2_grpc import OperatorServiceStub
from perdure_service.store.engine import parse_url

from tests.helpers.rpc import Rpc, new_id, state_of
from tests.helpers.server import ServerProcess, sql
from tests.helpers.waiting import eventually, free_port, scaled

SLOTS = 4
AT_ONCE = 3
RATE, PERIOD_S = 4, 2.0
QUEUES = json.dumps(
    {
        "narrow": {"global_concurrency": AT_ONCE},
        "paced": {"rate_limit": RATE, "rate_period": PERIOD_S},
        "one-each": {"worker_concurrency": 1},
    }
)
# At each COMMIT that changes a status, one after the other, what the whole database has then: no moment is missed.
OBSERVER = """
    CREATE TABLE public.seen (
        number BIGSERIAL PRIMARY KEY, queue TEXT, agent TEXT, running INT, of_agent INT, total INT, began TIMESTAMPTZ
    );
    CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock(4711);
        INSERT INTO public.seen (queue, agent, running, of_agent, total) SELECT NEW.queue_name, NEW.name,
            (SELECT count(*) FROM dbos.workflow_status WHERE status = 'PENDING' AND queue_name = NEW.queue_name),
            (SELECT count(*) FROM dbos.workflow_status WHERE status = 'PENDING' AND name = NEW.name),
            (SELECT count(*) FROM dbos.workflow_status WHERE status = 'PENDING');
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER see AFTER INSERT OR UPDATE ON dbos.workflow_status DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION public.see();
    CREATE FUNCTION public.see_begin() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.seen (queue, began) VALUES (NEW.queue_name, clock_timestamp());
        RETURN NULL;
    END $$;
    CREATE TRIGGER see_begin AFTER UPDATE ON dbos.workflow_status FOR EACH ROW
        WHEN (NEW.status = 'PENDING' AND OLD.status = 'ENQUEUED') EXECUTE FUNCTION public.see_begin();
"""


def observe(url: str) -> None:
    if parse_url(url).drivername.startswith("cockroachdb"):
        pytest.skip("the observer is a deferred trigger, which CockroachDB has not")
    with sql(url) as connection:
        connection.execute(OBSERVER)


def most_at_once(url: str, column: str, where: str, value: str) -> int:
    with sql(url) as connection:
        row = connection.execute(f"SELECT max({column}) FROM public.seen WHERE {where} = %s", (value,)).fetchone()
    assert row is not None
    return int(row[0])


def start(rpc: Rpc, agent: str, seconds: float, **fields: object) -> str:
    run_id = new_id()
    request = pb.StartAgentRequest(
        agent=agent, run_id=run_id, request_id=new_id(), input_json=json.dumps({"seconds": seconds}), **fields
    )
    rpc.runs.StartAgent(request)
    return run_id


def state(rpc: Rpc, run_id: str) -> str:
    return state_of(rpc.runs.GetRun(pb.GetRunRequest(run_id=run_id)).run)


def all_ended(rpc: Rpc, run_ids: list[str], timeout: float = 30) -> None:
    def done() -> bool:
        states = {state(rpc, run_id) for run_id in run_ids}
        assert states <= {"SUCCEEDED"}, states
        return True

    eventually(done, timeout, what="every run has succeeded")


class Served:
    """A server that polls so seldom that whatever goes on here goes on without polls."""

    def __init__(self, url: str, rpc: Rpc, admin: str) -> None:
        self.url, self.rpc, self.admin = url, rpc, admin


@pytest.fixture(scope="module")
def served(database_url: str) -> Iterator[Served]:
    observe(database_url)
    admin = f"127.0.0.1:{free_port()}"
    with (
        ServerProcess(
            database_url,
            "tests.helpers.queue_agents",
            PERDURE_QUEUES=QUEUES,
            PERDURE_MAX_RUNNING=str(SLOTS),
            PERDURE_QUEUE_POLL_INTERVAL="3600",
            PERDURE_ADMIN_ADDRESS=admin,
        ) as process,
        Rpc(process.address) as rpc,
    ):
        # DBOS looks for new queues once a second, and starts their threads.
        all_ended(rpc, [start(rpc, "narrow", 0.0), start(rpc, "quick", 0.0, queue="one-each")])
        yield Served(database_url, rpc, admin)


def test_a_freed_slot_is_refilled_at_once(served):
    runs = [start(served.rpc, "quick", 0.1) for _ in range(5 * SLOTS)]
    all_ended(served.rpc, runs, 15)
    assert most_at_once(served.url, "running", "queue", "perdure") == SLOTS


def test_slots_are_over_all_queues_together(served):
    queues = ["", "narrow", "one-each"]
    runs = [start(served.rpc, "quick", 0.1, queue=queues[number % 3]) for number in range(18)]
    all_ended(served.rpc, runs, 20)
    with sql(served.url) as connection:
        assert connection.execute("SELECT max(total) FROM public.seen").fetchone() == (SLOTS,)
    assert most_at_once(served.url, "running", "queue", "one-each") == 1
    assert most_at_once(served.url, "running", "queue", "narrow") <= AT_ONCE


def test_an_agent_at_its_limit_is_queued_while_others_go_on(served):
    singles = [start(served.rpc, "single", 0.3) for _ in range(4)]
    other = start(served.rpc, "quick", 0.0)
    all_ended(served.rpc, [other])
    assert [state(served.rpc, run_id) for run_id in singles].count("QUEUED") >= 1
    all_ended(served.rpc, singles)
    assert most_at_once(served.url, "of_agent", "agent", "single@1") == 1


def test_a_slow_agent_that_floods_does_not_starve_another(served):
    flood = [start(served.rpc, "slow", scaled(0.5)) for _ in range(6 * SLOTS)]
    other = start(served.rpc, "quick", 0.0)
    all_ended(served.rpc, [other])
    waiting = [state(served.rpc, run_id) for run_id in flood].count("QUEUED")
    assert waiting >= 2 * SLOTS, "it came after the flood"
    all_ended(served.rpc, flood)


def test_the_lower_priority_comes_first_among_those_that_wait(served):
    blockers = [start(served.rpc, "slow", scaled(0.5)) for _ in range(SLOTS)]
    late = [start(served.rpc, "single", 0.0, priority=9) for _ in range(2)]
    soon = start(served.rpc, "single", 0.0, priority=1)
    all_ended(served.rpc, [*blockers, *late, soon])

    def begun(run_id: str) -> float:
        run = served.rpc.runs.GetRun(pb.GetRunRequest(run_id=run_id)).run
        assert run.priority in (1, 9)
        return run.start_time.ToNanoseconds()

    assert begun(soon) < min(map(begun, late))


def test_children_are_of_their_own_agents_queue_and_keep_its_limits(served):
    run_id = start(served.rpc, "family", 0.1)
    all_ended(served.rpc, [run_id])
    children = served.rpc.runs.ListRuns(pb.ListRunsRequest(parent_run_id=run_id)).runs
    assert {child.agent: child.queue for child in children} == {"narrow": "narrow", "single": "perdure"}
    assert most_at_once(served.url, "running", "queue", "narrow") <= AT_ONCE
    fork = served.rpc.runs.ForkRun(
        pb.ForkRunRequest(run_id=children[0].run_id, request_id=new_id(), from_step_id=1)
    ).run
    assert fork.queue == children[0].queue


def test_an_undeclared_queue_is_refused_and_those_that_exist_are_named(served):
    with pytest.raises(grpc.RpcError) as refused:
        start(served.rpc, "quick", 0.0, queue="nowhere")
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "narrow, one-each, paced, perdure" in refused.value.details()
    with pytest.raises(grpc.RpcError) as refused:
        start(served.rpc, "quick", 0.0, priority=-1)
    assert "0 to 2147483647" in refused.value.details()


def test_operators_see_limits_and_what_waits(served):
    runs = [start(served.rpc, "narrow", scaled(0.5)) for _ in range(AT_ONCE + 2)]
    with grpc.insecure_channel(served.admin) as channel:
        stub = OperatorServiceStub(channel)

        def full() -> operators.Queue:
            found = {one.queue: one for one in stub.ListQueues(operators.ListQueuesRequest()).queues}
            assert list(found) == ["narrow", "one-each", "paced", "perdure"]
            assert (found["narrow"].running, found["narrow"].queued) == (AT_ONCE, 2)
            assert found["narrow"].HasField("oldest_queued_time")
            assert (found["paced"].rate_limit, found["paced"].rate_period.ToMilliseconds()) == (RATE, PERIOD_S * 1000)
            return found["narrow"]

        assert eventually(full).global_concurrency == AT_ONCE
        page = stub.ListQueues(operators.ListQueuesRequest(page_size=3))
        rest = stub.ListQueues(operators.ListQueuesRequest(page_size=3, page_token=page.next_page_token))
        assert [one.queue for one in rest.queues] == ["perdure"]
    all_ended(served.rpc, runs)


def test_limits_over_the_fleet_hold_while_executors_are_killed(own_database_url):
    observe(own_database_url)
    environment = {"PERDURE_QUEUES": QUEUES, "PERDURE_LEASE_TTL": str(scaled(1.0)), "PERDURE_MAX_RUNNING": "8"}
    with ExitStack() as stack:
        servers = [
            ServerProcess(own_database_url, "tests.helpers.queue_agents", command="serve", **environment)
            for _ in range(3)
        ]
        for server in servers:
            stack.callback(server.__exit__)
            server.start()
        stubs = [stack.enter_context(Rpc(server.address)) for server in servers]
        runs = [
            start(stubs[number % 3], agent, 0.2, queue=queue, priority=(7 * number) % 5)
            for number in range(15)
            for agent, queue in (("narrow", ""), ("quick", "paced"))
        ]
        for server in servers[:2]:
            eventually(lambda: most_at_once(own_database_url, "running", "queue", "narrow") >= AT_ONCE)
            server.kill()
        all_ended(stubs[2], runs, 60)
    assert most_at_once(own_database_url, "running", "queue", "narrow") == AT_ONCE
    with sql(own_database_url) as connection:
        began = [
            row[0].timestamp()
            for row in connection.execute("SELECT began FROM public.seen WHERE queue = 'paced' AND began IS NOT NULL")
        ]
    began.sort()
    assert len(began) >= 15
    windows = [last - first for first, last in zip(began, began[RATE:], strict=False)]
    assert min(windows) > PERIOD_S, list(pairwise(began))
