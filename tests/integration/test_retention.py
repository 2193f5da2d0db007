"""Retention: what is no longer kept goes by itself, whole; what somebody may still read stays; a cut log says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1.agent_run_pb2 import AgentRun

from tests.helpers.rows import copy_runs, rows_of
from tests.helpers.rpc import Rpc, events_of, kinds_of, new_id, refusal_of, refused, state_of
from tests.helpers.server import ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually, scaled

SHORT_S, LOG_S, KEPT_S = scaled(40), scaled(60), scaled(120)
"""How long runs of the namespace `short` are kept, logs, and runs of the others. Tests make runs older than they are:
no run that they do not mean grows so old by itself."""
OLD_LOG_S = (LOG_S + KEPT_S) / 2
"""The age of a run whose log goes and which stays itself."""
SETTINGS = {
    "PERDURE_NAMESPACES": "default,short,forever",
    "PERDURE_RETENTION": f"{KEPT_S}",
    "PERDURE_NAMESPACE_RETENTION": f"short=PT{int(SHORT_S)}S, forever=never",
    "PERDURE_EVENT_RETENTION": f"{LOG_S}",
}


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[ServerProcess]:
    """A server that keeps nothing for long."""
    create_effects_table(database_url)
    with ServerProcess(database_url, "tests.helpers.agents", "tests.helpers.families", **SETTINGS) as process:
        yield process


def ended(rpc: Rpc, agent: str = "counter", run_input: Any = None, namespace: str = "", **fields: Any) -> str:
    """Returns a run that has ended."""
    run_id = rpc.start(agent, run_input, namespace=namespace, **fields)
    rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run_id, namespace=namespace), timeout=scaled(20))
    return run_id


def age(database_url: str, run_id: str, by_s: float, namespace: str = "default", *, family: bool = True) -> None:
    """Makes the end of a run, and those of its children, earlier than it was."""
    with sql(database_url) as connection:
        connection.execute(
            "UPDATE perdure.run SET ended_at = ended_at - %s * INTERVAL '1 second' WHERE workflow_id LIKE %s",
            (by_s, f"{namespace}.{run_id}.r{'%' if family else ''}"),
        )


def exists(rpc: Rpc, run_id: str, namespace: str = "") -> bool:
    request = pb.GetRunRequest(run_id=run_id, namespace=namespace)
    return refusal_of(lambda: rpc.runs.GetRun(request, timeout=scaled(20))) is None


def until_gone(rpc: Rpc, *run_ids: str, namespace: str = "") -> None:
    for run_id in run_ids:
        eventually(lambda run_id=run_id: not exists(rpc, run_id, namespace), 20, what=f"{run_id} is gone")


def packs_of(database_url: str, run_id: str) -> list[int]:
    """Returns the first sequences of the packs of a run's log."""
    with sql(database_url) as connection:
        rows = connection.execute(
            "SELECT first_sequence FROM perdure.run_event WHERE workflow_id = %s ORDER BY 1", (f"default.{run_id}.r",)
        ).fetchall()
    return [row[0] for row in rows]


def until_cut(database_url: str, run_id: str) -> int:
    """Waits until only the last pack of a run's log is there; returns its first sequence."""
    (first,) = eventually(
        lambda: (found := packs_of(database_url, run_id)) and len(found) == 1 and found,
        20,
        what=f"the log of {run_id} is cut",
    )
    return first


def round_of(rpc: Rpc, database_url: str) -> None:
    """Waits until the server has looked at all old runs once more: until it has removed one that has just grown old."""
    run_id = ended(rpc, run_input={"steps": 1})
    age(database_url, run_id, KEPT_S)
    until_gone(rpc, run_id)


def lines_about(server: ServerProcess, event: str) -> list[dict[str, Any]]:
    """Returns what a server has logged under a name."""
    return [json.loads(line) for line in server.log.splitlines() if f'"{event}"' in line]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_each_namespace_keeps_its_runs_as_long_as_it_is_told(rpc: Rpc, database_url: str) -> None:
    old = {name: ended(rpc, namespace=name) for name in ("default", "short", "forever")}
    young = ended(rpc)
    age(database_url, old["default"], SHORT_S, "default")
    age(database_url, old["short"], SHORT_S, "short")
    age(database_url, old["forever"], 10 * KEPT_S, "forever")
    until_gone(rpc, old["short"], namespace="short")
    round_of(rpc, database_url)
    assert exists(rpc, old["default"])
    age(database_url, old["default"], KEPT_S, "default")
    until_gone(rpc, old["default"])
    assert rows_of(database_url, old["default"]) == {}
    assert exists(rpc, young)
    assert exists(rpc, old["forever"], "forever")


def test_a_family_goes_when_the_last_of_it_is_old_and_then_as_a_whole(rpc: Rpc, database_url: str) -> None:
    run_id = ended(rpc, "parent", {"children": 2})
    age(database_url, run_id, KEPT_S, family=False)
    round_of(rpc, database_url)
    assert all(exists(rpc, one) for one in (run_id, f"{run_id}.1", f"{run_id}.2")), "its children are young"
    age(database_url, run_id, KEPT_S)
    until_gone(rpc, run_id, f"{run_id}.1", f"{run_id}.2")
    assert rows_of(database_url, run_id) == {}


def test_what_somebody_who_goes_on_may_still_read_stays_however_old_it_is(rpc: Rpc, database_url: str) -> None:
    leaver = ended(rpc, "leaver")
    parent = rpc.start("parent", {"children": 2, "seconds": 600})
    eventually(lambda: exists(rpc, f"{parent}.2"), what="the children are there")
    rpc.cancel(f"{parent}.2")
    waiting = rpc.start("asker")
    rpc.approval_of(waiting)
    fork = rpc.runs.ForkRun(pb.ForkRunRequest(run_id=waiting, request_id=new_id())).run.run_id
    rpc.cancel(waiting)
    for one in (leaver, parent, waiting):  # the second child of the parent, too
        age(database_url, one, KEPT_S)
    round_of(rpc, database_url)
    assert all(exists(rpc, one) for one in (leaver, parent, f"{parent}.2", waiting))
    for one in (fork, parent, f"{leaver}.1"):
        rpc.cancel(one)
    for one in (leaver, parent, waiting):
        age(database_url, one, KEPT_S)
    until_gone(rpc, leaver, parent, waiting)
    assert exists(rpc, fork), "a fork is a run of its own"


def test_the_log_says_how_many_and_nothing_of_whom(rpc: Rpc, server: ServerProcess, database_url: str) -> None:
    run_id = ended(rpc)
    age(database_url, run_id, KEPT_S)
    until_gone(rpc, run_id)
    line = eventually(lambda: lines_about(server, "retention.deleted"))[-1]
    assert (line["namespace"], line["count"]) == ("default", 1)
    assert run_id not in json.dumps(line)


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_a_log_goes_before_its_run_and_what_is_asked_of_it_says_so(rpc: Rpc, database_url: str) -> None:
    run_id = ended(rpc, run_input={"steps": 60})
    responses = rpc.stream(run_id)
    events = events_of(responses)
    page = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id, page_size=2))
    whole = rpc.runs.GetRunTrace(pb.GetRunTraceRequest(run_id=run_id))
    assert not whole.truncated
    age(database_url, run_id, OLD_LOG_S)
    earliest = until_cut(database_url, run_id)
    assert 1 < earliest <= len(events)

    run: AgentRun = rpc.get(run_id)
    assert (state_of(run), json.loads(run.output_json), run.last_sequence) == (
        "SUCCEEDED", {"total": 1770}, len(events),
    )  # fmt: skip
    facts = {"earliest_sequence": str(earliest), "run_id": run_id}
    for how in ({}, {"after_sequence": 1}, {"cursor": responses[0].cursor}, {"include_children": True}):
        with refused("OUT_OF_RANGE", "EVENTS_TRUNCATED") as error:
            rpc.stream(run_id, **how)
        assert error.metadata == facts
    assert rpc.events(run_id, after_sequence=earliest - 1) == events[earliest - 1 :]
    for from_now in ({"from_now": True}, {"from_now": True, "include_children": True}):
        assert rpc.stream(run_id, **from_now)[-1].end_of_run

    listed = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id)).events
    assert list(listed) == events[earliest - 1 :]
    with refused("OUT_OF_RANGE", "EVENTS_TRUNCATED") as error:
        rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id, page_size=2, page_token=page.next_page_token))
    assert error.metadata == facts
    with refused("OUT_OF_RANGE", "EVENTS_TRUNCATED") as error:
        rpc.runs.ListSteps(pb.ListStepsRequest(run_id=run_id))
    assert "its steps are not known any more" in error.text
    trace = rpc.runs.GetRunTrace(pb.GetRunTraceRequest(run_id=run_id))
    assert trace.truncated
    assert trace.spans[0] == whole.spans[0], "the run itself"


def test_a_fork_of_a_run_without_its_log_tells_of_the_steps_that_it_takes_over(rpc: Rpc, database_url: str) -> None:
    run_id = ended(rpc, "parent", {"children": 1})
    before = rpc.runs.ForkRun(pb.ForkRunRequest(run_id=run_id, request_id=new_id(), from_step_id=3)).run.run_id
    age(database_url, run_id, OLD_LOG_S)
    until_cut(database_url, run_id)
    after = rpc.runs.ForkRun(pb.ForkRunRequest(run_id=run_id, request_id=new_id(), from_step_id=3)).run.run_id
    told = [[event for event in rpc.events(fork) if event.execution == 0 and event.step_id] for fork in (before, after)]
    assert kinds_of(told[0]) == kinds_of(told[1]) == ["child_started", "step_succeeded"]
    for was, now in zip(*told, strict=True):
        assert (was.step_id, was.step_name, was.child_started) == (now.step_id, now.step_name, now.child_started)
    steps = [rpc.runs.ListSteps(pb.ListStepsRequest(run_id=fork)).steps for fork in (before, after)]
    assert [[(step.step_name, step.state) for step in one] for one in steps][1] == [
        (step.step_name, step.state) for step in steps[0]
    ]
    assert rpc.output_of(after) == rpc.output_of(before) == ["child 0"]


def test_the_log_of_a_child_is_kept_as_long_as_that_of_its_parent(rpc: Rpc, database_url: str) -> None:
    other = ended(rpc)
    parent = rpc.start("family", {"depth": 1, "children": 2, "how": "call", "wait": True})
    rpc.until(parent, "AWAITING_INPUT")
    rpc.signal(parent)
    rpc.end_of(parent)
    children = [event.child_started.child_run_id for event in rpc.events(parent) if event.HasField("child_started")]
    assert len(children) == 2
    whole = rpc.events(parent, include_children=True)
    with sql(database_url) as connection:
        # The children without their parent; and the other one, which ended before them, no later than they: logs are
        # looked at in the order of the ends.
        connection.execute(
            "UPDATE perdure.run SET ended_at = ended_at - %s * INTERVAL '1 second' WHERE run_id = ANY(%s)",
            (OLD_LOG_S, [*children, other]),
        )
    until_cut(database_url, other)
    assert rpc.events(parent, include_children=True) == whole
    age(database_url, parent, OLD_LOG_S, family=False)
    until_cut(database_url, parent)
    for child in children:
        eventually(lambda child=child: refusal_of(lambda: rpc.stream(child)), what=f"the log of {child} is cut")


# ---- with others, and crashes ----------------------------------------------------------------------------------------


def deleted_by(server: ServerProcess) -> int:
    """Returns how many runs a server says it has deleted."""
    return sum(line["count"] for line in lines_about(server, "retention.deleted"))


def counts(database_url: str) -> tuple[int, int, int]:
    """Returns how many runs there are, engine's rows, and runs without the one or the other or without a log."""
    with sql(database_url) as connection:
        row = connection.execute(
            "SELECT (SELECT count(*) FROM perdure.run), (SELECT count(*) FROM dbos.workflow_status), "
            "(SELECT count(*) FROM perdure.run AS r FULL JOIN dbos.workflow_status AS s "
            " ON s.workflow_uuid = r.workflow_id WHERE r.workflow_id IS NULL OR s.workflow_uuid IS NULL "
            " OR NOT EXISTS (SELECT 1 FROM perdure.run_event AS e WHERE e.workflow_id = r.workflow_id))"
        ).fetchone()
    assert row is not None
    return row


def test_two_servers_at_once_and_a_kill_between_two_batches_leave_whole_runs(own_database_url: str) -> None:
    with ServerProcess(own_database_url) as plain, Rpc(plain.address) as rpc:
        run_id = ended(rpc, run_input={"steps": 3})
        copy_runs(own_database_url, run_id, 1499)
        with sql(own_database_url) as connection:
            connection.execute("UPDATE perdure.run SET ended_at = ended_at - INTERVAL '1 day'")
    servers = [ServerProcess(own_database_url, command="serve", **SETTINGS) for _ in range(2)]
    try:
        servers[0].start()
        eventually(lambda: 0 < counts(own_database_url)[0] < 1500, 20, what="some are gone")
        servers[0].kill()
        left, _, torn = counts(own_database_url)
        assert torn == 0, "every run is whole or gone"
        killed_after = deleted_by(servers[0])
        assert killed_after <= 1500 - left
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ServerProcess.start, servers))
        eventually(lambda: counts(own_database_url)[0] == 0, 30, what="all are gone")
        assert counts(own_database_url) == (0, 0, 0)
        assert eventually(lambda: sum(map(deleted_by, servers)) - killed_after == left), "each is counted once"
        assert "retention.failed" not in "".join(server.log for server in servers)
    finally:
        for server in servers:
            server.__exit__()
