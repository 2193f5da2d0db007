"""Two servers in two regions, each with a database of its own: every run is one run, whoever is asked for it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb

from tests.helpers.cells import Cluster, cluster_of_copies
from tests.helpers.databases import DatabaseServer
from tests.helpers.regions import write_regions
from tests.helpers.rpc import Reading, Rpc, duration, events_of, new_id, only, refused, sequences, state_of
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, scaled

BEFORE = {"default": {"home": "nn1"}, "moved": {"home": "nn1"}}
HOMES: dict[str, dict[str, object]] = {
    "default": {"home": "nn1"},
    "moved": {"home": "ss1", "former_homes": ["nn1"]},
    "lost": {"home": "ww1"},
}
OLD = "from-before-the-move"


@dataclass
class Two:
    """The servers of two regions, and the stubs of each. Nobody is in the third one."""

    cluster: Cluster
    north: ServerProcess
    south: ServerProcess
    at_north: Rpc
    at_south: Rpc

    @property
    def both(self) -> tuple[Rpc, Rpc]:
        return self.at_north, self.at_south


@pytest.fixture(scope="module")
def two(database_server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Both servers, after the namespace `moved` got its home in the south."""
    with ExitStack() as stack:
        cluster = stack.enter_context(cluster_of_copies(database_server))
        cluster.migrate()
        servers = {}
        for cell, region in (("nn1", "north"), ("ss1", "south")):
            create_effects_table(cluster.url_of(cell))
            server = ServerProcess(
                cluster.url_of(cell), command="serve", PERDURE_REGION=region, PERDURE_LEASE_TTL=str(scaled(2))
            )
            stack.callback(server.__exit__)
            servers[cell] = server
        databases = {**cluster.databases, "ww1": "nowhere"}
        addresses = {cell: server.address for cell, server in servers.items()}
        old, new = (
            str(write_regions(tmp_path_factory.mktemp(name), databases, addresses=addresses, homes=homes))
            for name, homes in (("before", BEFORE), ("after", HOMES))
        )
        north, south = servers.values()
        north.start(PERDURE_REGIONS_FILE=old)
        with Rpc(north.address) as rpc:
            rpc.start("counter", {"steps": 1}, namespace="moved", run_id=OLD)
        north.stop()
        north.environment["PERDURE_REGIONS_FILE"] = south.environment["PERDURE_REGIONS_FILE"] = new
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ServerProcess.start, (north, south)))
        stubs = [stack.enter_context(Rpc(server.address)) for server in (north, south)]
        yield Two(cluster, north, south, *stubs)


def cells_with(two: Two, run_id: str) -> list[str]:
    """Returns the cells whose databases have a run."""
    found = []
    for cell in ("nn1", "ss1"):
        with sql(two.cluster.url_of(cell)) as connection:
            if connection.execute("SELECT 1 FROM perdure.run WHERE run_id = %s", (run_id,)).fetchone():
                found.append(cell)
    return found


def test_one_id_that_is_sent_to_both_regions_at_once_starts_one_run(two: Two) -> None:
    run_ids = [new_id("once") for _ in range(5)]
    with ThreadPoolExecutor(20) as pool:
        calls = [
            pool.submit(rpc.start_call, "counter", {"steps": 2}, run_id=run_id, request_id=new_id("r"))
            for run_id in run_ids
            for rpc in two.both * 2
        ]
        answers = [call.result() for call in calls]
    assert sum(answer.created for answer in answers) == len(run_ids)
    for run_id in run_ids:
        assert cells_with(two, run_id) == ["nn1"]
        for rpc in two.both:
            assert rpc.end_of(run_id).home_region == "north"
        assert effects(two.cluster.url_of("nn1"), run_id) == ["count 0", "count 1"]


def test_a_run_is_followed_and_steered_from_the_other_region(two: Two) -> None:
    run_id = two.at_south.start("listener", {"signals": 1})
    watch = Reading(two.at_south.watch(run_id))
    two.at_south.until(run_id, "AWAITING_INPUT")
    assert two.at_south.signal(run_id, {"n": 7})
    assert two.at_south.output_of(run_id) == two.at_north.output_of(run_id)
    assert sequences(events_of(watch.join())) == sequences(two.at_north.events(run_id))
    timeout = scaled(20)
    events = two.at_south.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id), timeout=timeout).events
    assert sequences(events) == sequences(watch.events)
    assert two.at_south.runs.ListSteps(pb.ListStepsRequest(run_id=run_id), timeout=timeout).steps
    trace = two.at_south.runs.GetRunTrace(pb.GetRunTraceRequest(run_id=run_id), timeout=timeout)
    assert trace.trace_id == two.at_north.get(run_id).trace_id


def test_an_approval_is_asked_in_one_region_and_decided_in_the_other(two: Two) -> None:
    inbox = Reading(two.at_south.approvals.WatchApprovals(approval_pb.WatchApprovalsRequest(), timeout=scaled(30)))
    try:
        run_id = two.at_north.start("asker")
        approval = two.at_south.approval_of(run_id)
        eventually(lambda: any(one.run_id == run_id for answer in inbox.responses for one in answer.approvals))
        assert set(inbox.responses[-1].unreachable) == {"west"}
        two.at_south.decide(approval.approval_id)
        assert state_of(two.at_south.end_of(run_id)) == "SUCCEEDED"
    finally:
        inbox.close()


def test_a_run_is_cancelled_from_the_other_region(two: Two) -> None:
    run_id = two.at_north.start("sleeper", {"seconds": 300})
    assert state_of(two.at_south.cancel(run_id, "enough")) == "CANCELLED"


def test_the_server_makes_an_id_of_the_cell_in_which_the_run_shall_live(two: Two) -> None:
    request_id = new_id("request")
    first = two.at_north.start_call("counter", {"steps": 1}, home_region="south", request_id=request_id)
    again = two.at_south.start_call("counter", {"steps": 1}, home_region="south", request_id=request_id)
    assert first.run.run_id == again.run.run_id
    assert first.run.run_id.startswith("ss1-")
    assert cells_with(two, first.run.run_id) == ["ss1"]
    assert two.at_north.end_of(first.run.run_id).home_region == "south"
    at_home = two.at_south.start_call("counter", {"steps": 1}).run
    assert at_home.run_id.startswith("nn1-")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "run_id"):
        two.at_south.start("counter", {"steps": 1}, run_id=first.run.run_id)


def test_children_and_forks_live_where_their_run_does(two: Two) -> None:
    parent = two.at_north.start_call("parent", {"children": 2}, home_region="south").run.run_id
    two.at_north.end_of(parent)
    request = pb.ListRunsRequest(parent_run_id=parent)
    children = two.at_north.runs.ListRuns(request, timeout=scaled(20)).runs
    assert [child.home_region for child in children] == ["south"] * 2
    assert two.at_north.get(children[0].run_id).run_id == children[0].run_id
    origin = two.at_north.start_call("counter", {"steps": 2}, home_region="south").run.run_id
    two.at_north.end_of(origin)
    fork = pb.ForkRunRequest(run_id=origin, request_id=new_id("r"), from_step_id=2)
    made = two.at_north.runs.ForkRun(fork, timeout=scaled(20)).run
    assert (made.run_id.partition("-")[0], made.home_region) == ("ss1", "south")


def test_a_namespace_that_has_moved_keeps_its_old_runs_and_starts_new_ones_at_home(two: Two) -> None:
    for rpc in two.both:
        get = pb.GetRunRequest(namespace="moved", run_id=OLD)
        assert rpc.runs.GetRun(get, timeout=scaled(20)).run.home_region == "north"
        again = rpc.start_call("counter", {"steps": 1}, namespace="moved", run_id=OLD)
        assert (again.run.home_region, again.created) == ("north", False)
        with refused("ALREADY_EXISTS", "RUN_INPUT_MISMATCH"):
            rpc.start_call("counter", {"steps": 2}, namespace="moved", run_id=OLD)
    run_id = new_id("fresh")
    with ThreadPoolExecutor(8) as pool:
        calls = [
            pool.submit(rpc.start_call, "counter", {"steps": 1}, namespace="moved", run_id=run_id)
            for rpc in two.both * 4
        ]
        assert {call.result().run.home_region for call in calls} == {"south"}
    assert cells_with(two, run_id) == ["ss1"]


def test_runs_of_all_regions_are_listed_once_page_by_page(two: Two) -> None:
    label = {"list": new_id("label")}
    started = [
        rpc.start_call("counter", {"steps": 1}, home_region=region, labels=label).run.run_id
        for _ in range(4)
        for rpc, region in ((two.at_north, "north"), (two.at_north, "south"))
    ]
    for rpc in two.both:
        found: list[str] = []
        token = ""
        while True:
            request = pb.ListRunsRequest(labels=label, page_size=3, page_token=token)
            page = rpc.runs.ListRuns(request, timeout=scaled(20))
            assert list(page.unreachable) == ["west"]
            found += [run.run_id for run in page.runs]
            token = page.next_page_token
            if not token:
                break
        assert found == started[::-1]


def test_a_region_that_nobody_is_in_is_named_in_time(two: Two) -> None:
    began = time.monotonic()
    with refused("UNAVAILABLE", "REGION_UNAVAILABLE") as told:
        two.at_south.start("counter", {"steps": 1}, namespace="lost")
    assert told.metadata["region"] == "west"
    assert "the region west" in told.text
    assert time.monotonic() - began < scaled(10)


def test_a_forwarded_wait_answers_before_its_callers_deadline(two: Two) -> None:
    run_id = two.at_north.start("sleeper", {"seconds": 300})
    answer = two.at_south.runs.WaitRun(pb.WaitRunRequest(run_id=run_id), timeout=scaled(1.5))
    assert answer.timed_out
    two.at_north.cancel(run_id)


def test_a_start_from_afar_that_waits_has_the_output(two: Two) -> None:
    run = two.at_south.start_call("counter", {"steps": 2}, wait=duration(scaled(20))).run
    assert (run.output_json, run.home_region) == ('{"total":1}', "north")


def test_a_run_that_was_started_from_afar_has_the_callers_trace(two: Two) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    parent = (("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),)
    run = two.at_south.start_call("counter", {"steps": 1}, run_id=new_id("traced"), metadata=parent).run
    assert (run.trace_id, run.home_region) == (trace_id, "north")


def test_a_watcher_in_the_other_region_outlives_the_homes_servers_and_misses_nothing(two: Two) -> None:
    """The home's only server is killed and comes back; the watcher stays in the south and continues by its cursor."""
    run_id = two.at_south.start("counter", {"steps": 12, "delay_s": 0.1})
    watch = Reading(two.at_south.watch(run_id))
    eventually(lambda: len(effects(two.cluster.url_of("nn1"), run_id)) >= 3)
    two.north.kill()
    responses = watch.join()
    assert watch.refusal is not None
    assert (watch.refusal.code, watch.refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "REGION_UNAVAILABLE")
    assert watch.refusal.metadata["region"] == "north"
    with refused("UNAVAILABLE", "REGION_UNAVAILABLE"):
        two.at_south.get(run_id)
    listed = two.at_south.runs.ListRuns(pb.ListRunsRequest(), timeout=scaled(20))
    assert list(listed.unreachable) == ["north", "west"]
    two.north.start()

    def back() -> bool:
        try:
            return bool(two.at_south.get(run_id).run_id)
        except grpc.RpcError:
            return False

    eventually(back, 20, what="the south finds the north again")
    rest = list(two.at_south.watch(run_id, cursor=responses[-1].cursor, timeout=40))
    assert sequences([*events_of(responses), *events_of(rest)]) == list(range(1, rest[-1].last_sequence + 1))
    assert state_of(two.at_south.end_of(run_id)) == "SUCCEEDED"
    assert only(events_of(rest), "recovered")
    assert json.loads(two.at_south.get(run_id).output_json)


def test_a_server_does_not_start_on_the_database_of_another_cell(two: Two, tmp_path: Path) -> None:
    homes = {"default": {"home": "nn1"}}
    swapped = {"nn1": two.cluster.databases["ss1"], "ss1": two.cluster.databases["nn1"]}
    for file, complaint in (
        (two.north.environment["PERDURE_REGIONS_FILE"], "PERDURE_DATABASE_URL names the database"),
        (str(write_regions(tmp_path, swapped, homes=homes)), "is the home of the cell ss1, not of nn1"),
    ):
        server = ServerProcess(
            two.cluster.url_of("ss1"), command="serve", PERDURE_REGION="north", PERDURE_REGIONS_FILE=file
        )
        try:
            with pytest.raises(RuntimeError, match=complaint):
                server.start()
            assert "Traceback" not in server.log
        finally:
            server.__exit__()
