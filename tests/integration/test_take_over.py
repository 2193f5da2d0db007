"""A region is lost, and another one goes on: servers at home, servers that stand by elsewhere, and clients of a third.

On PostgreSQL databases stand for the cells' databases; what is lost here are the home's servers, by kill -9.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from perdure.v1 import operator_service_pb2 as operator_pb
from perdure.v1.operator_service_pb2_grpc import OperatorServiceStub

from tests.helpers.cells import Cluster, cluster_of_copies
from tests.helpers.databases import DatabaseServer
from tests.helpers.regions import write_regions
from tests.helpers.rpc import Reading, Rpc, events_of, only, refused, sequences, state_of
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, free_port, scaled

LEASE_TTL_S = scaled(2)
CLAIM_TTL_S = scaled(3)
HOMES = {"default": {"home": "nn1"}}


@dataclass
class Servers:
    """Two servers of the cell nn1, and one of another cell, whose clients do not care where anything runs."""

    cluster: Cluster
    home: ServerProcess
    standby: ServerProcess
    elsewhere: ServerProcess
    rpc: Rpc
    admin_ports: dict[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.cluster.url_of("nn1")

    def operators(self, server: ServerProcess) -> Any:
        channel = grpc.insecure_channel(f"127.0.0.1:{self.admin_ports[server.address]}")
        return OperatorServiceStub(channel)

    def cell(self, server: ServerProcess) -> operator_pb.Cell:
        """Returns what a server says of nn1."""
        answer = self.operators(server).ListCells(operator_pb.ListCellsRequest(), timeout=scaled(20))
        (cell,) = [one for one in answer.cells if one.cell == "nn1"]
        return cell

    def states(self, server: ServerProcess) -> dict[str, str]:
        """Returns the states of the living executors of nn1 by address."""
        answer = self.operators(server).ListExecutors(operator_pb.ListExecutorsRequest(), timeout=scaled(20))
        return {
            one.address: operator_pb.ExecutorState.Name(one.state).removeprefix("EXECUTOR_STATE_")
            for one in answer.executors
        }

    def served_by(self, server: ServerProcess, region: str) -> operator_pb.Cell:
        """Waits until a region's executor takes the runs of nn1."""

        def served() -> operator_pb.Cell | None:
            cell = self.cell(server)
            return cell if cell.serving_region == region and cell.executors else None

        found = eventually(served, 30, what=f"{region} serves nn1")
        assert found is not None
        return found

    def at_home(self) -> None:
        """Brings everything back to how it begins."""
        for server in (self.home, self.standby):
            if server.has_ended:
                server.start()
        if self.cell(self.home).serving_region != "north":
            give_back(self)
        self.served_by(self.home, "north")
        eventually(lambda: self.states(self.home).get(self.standby.address) == "STANDING_BY", what="it stands by")


def give_back(servers: Servers) -> operator_pb.Cell:
    """Returns nn1 to its home once somebody stands by there."""

    def returned() -> operator_pb.Cell | None:
        try:
            request = operator_pb.ReturnCellRequest(cell="nn1")
            return servers.operators(servers.home).ReturnCell(request, timeout=scaled(20)).cell
        except grpc.RpcError:
            return None

    found = eventually(returned, 20, what="nn1 is returned")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def fleet(database_server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as stack:
        cluster = stack.enter_context(cluster_of_copies(database_server))
        cluster.migrate()
        create_effects_table(cluster.url_of("nn1"))
        admin_ports = {}
        made = []
        for cell, region in (("nn1", "north"), ("nn1", "south"), ("ss1", "south")):
            admin_port = free_port()
            server = ServerProcess(
                cluster.url_of(cell),
                command="serve",
                PERDURE_REGION=region,
                PERDURE_CELL=cell,
                PERDURE_LEASE_TTL=str(LEASE_TTL_S),
                PERDURE_CLAIM_TTL=str(CLAIM_TTL_S),
                PERDURE_ADMIN_ADDRESS=f"127.0.0.1:{admin_port}",
                PERDURE_PARK_AFTER="0.2",
            )
            stack.callback(server.__exit__)
            admin_ports[server.address] = admin_port
            made.append(server)
        home, standby, elsewhere = made
        file = write_regions(
            Path(tmp_path_factory.mktemp("regions")),
            cluster.databases,
            addresses={"nn1": home.address, "ss1": elsewhere.address},
            standbys={"nn1": standby.address},
            homes=HOMES,
        )
        for server in made:
            server.environment["PERDURE_REGIONS_FILE"] = str(file)
            server.start()
        rpc = stack.enter_context(Rpc(elsewhere.address))
        yield Servers(cluster, home, standby, elsewhere, rpc, admin_ports)


@pytest.fixture
def servers(fleet: Servers) -> Servers:
    """Everybody is there, the home serves, and the standby stands by."""
    fleet.at_home()
    return fleet


def counted(servers: Servers, run_id: str, steps: int) -> list[str]:
    """Returns what the steps of a run have done, which must be all that they do."""
    written = effects(servers.url, run_id)
    assert sorted(set(written)) == sorted(f"count {number}" for number in range(steps))
    return written


def test_who_stands_by_answers_every_call_and_runs_nothing(servers: Servers) -> None:
    with Rpc(servers.standby.address) as rpc:
        run_id = rpc.start("counter", {"steps": 3})
        events = rpc.events(run_id)
        assert state_of(rpc.end_of(run_id)) == "SUCCEEDED"
        waiting = rpc.start("listener", {"signals": 1})
        servers.rpc.until(waiting, "AWAITING_INPUT")
        rpc.signal(waiting, {"n": 1})
        assert state_of(servers.rpc.end_of(waiting)) == "SUCCEEDED"
    home = {address: state for address, state in servers.states(servers.home).items() if state == "ALIVE"}
    assert list(home) == [servers.home.address]
    with sql(servers.url) as connection:
        ran_on = connection.execute(
            "SELECT DISTINCT e.region FROM dbos.workflow_status s JOIN perdure.executor e USING (executor_id) "
            "WHERE s.workflow_uuid LIKE %s OR s.workflow_uuid LIKE %s",
            (f"%{run_id}%", f"%{waiting}%"),
        ).fetchall()
    assert ran_on == [("north",)]
    assert sequences(events) == list(range(1, len(events) + 1))
    cell = servers.cell(servers.standby)
    assert (cell.serving_region, cell.executors, cell.standing_by) == ("north", 1, 1)


def test_a_lost_home_is_taken_over_and_a_watcher_elsewhere_misses_nothing(servers: Servers) -> None:
    steps = 12
    before = servers.cell(servers.home)
    run_id = servers.rpc.start("counter", {"steps": steps, "delay_s": 0.1})
    parked = servers.rpc.start("listener", {"signals": 1})
    servers.rpc.until(parked, "AWAITING_INPUT")
    watch = Reading(servers.rpc.watch(run_id, timeout=scaled(60)))
    eventually(lambda: len(effects(servers.url, run_id)) >= 3, what="some steps are done")
    servers.home.kill()
    seen = watch.join()
    cell = servers.served_by(servers.standby, "south")
    assert cell.epoch == before.epoch + 1
    assert cell.HasField("claim_time")
    rest = list(servers.rpc.watch(run_id, cursor=seen[-1].cursor, timeout=scaled(60)))
    events = [*events_of(seen), *events_of(rest)]
    assert sequences(events) == list(range(1, rest[-1].last_sequence + 1))
    assert state_of(servers.rpc.end_of(run_id)) == "SUCCEEDED"
    assert only(events, "recovered")
    assert len(counted(servers, run_id, steps)) <= steps + 1, "at most the step in progress ran twice"
    servers.rpc.signal(parked, {"n": 2})
    assert state_of(servers.rpc.end_of(parked)) == "SUCCEEDED"
    made = servers.rpc.start_call("counter", {"steps": 1}).run.run_id
    assert made.startswith("nn1-")
    assert state_of(servers.rpc.end_of(made)) == "SUCCEEDED"


def test_a_home_that_is_back_stands_by_until_the_cell_is_returned_and_no_step_runs_twice(servers: Servers) -> None:
    servers.home.kill()
    servers.served_by(servers.standby, "south")
    servers.home.start()
    eventually(lambda: servers.states(servers.home).get(servers.home.address) == "STANDING_BY", what="it stands by")
    steps = 30
    with Rpc(servers.home.address) as rpc:  # its clients are answered all the same
        run_id = rpc.start("counter", {"steps": steps, "delay_s": 0.1})
        watch = Reading(rpc.watch(run_id, timeout=scaled(60)))
        eventually(lambda: len(effects(servers.url, run_id)) >= 3, what="it runs, in the south")
        assert give_back(servers).serving_region == "north"
        servers.served_by(servers.home, "north")
        assert state_of(rpc.end_of(run_id)) == "SUCCEEDED"
        events = events_of(watch.join())
    assert sequences(events) == list(range(1, len(events) + 1))
    assert not [one for one in events if one.HasField("recovered")], "it was handed over"
    assert len(counted(servers, run_id, steps)) == steps
    again = give_back(servers)
    assert again.epoch == servers.cell(servers.home).epoch, "what is there already is not moved again"


def test_a_cell_is_evacuated_under_load_and_nothing_is_repeated(servers: Servers) -> None:
    steps = 15
    run_ids = [servers.rpc.start("counter", {"steps": steps, "delay_s": 0.1}) for _ in range(5)]
    eventually(lambda: all(effects(servers.url, run_id) for run_id in run_ids), what="all have begun")
    request = operator_pb.EvacuateCellRequest(cell="nn1")
    cell = servers.operators(servers.home).EvacuateCell(request, timeout=scaled(20)).cell
    assert cell.serving_region == "south"
    assert servers.operators(servers.standby).EvacuateCell(request, timeout=scaled(20)).cell.epoch == cell.epoch
    servers.served_by(servers.standby, "south")
    for run_id in run_ids:
        assert state_of(servers.rpc.end_of(run_id)) == "SUCCEEDED"
        assert len(counted(servers, run_id, steps)) == steps
    assert servers.home.stop() == 0, "it has nothing any more"


def test_two_regions_that_both_believe_they_have_the_cell_do_nothing_twice(servers: Servers) -> None:
    """The claim goes to and fro faster than anybody looks: both take runs, both hand over, at all moments."""
    steps = 12
    run_ids = [servers.rpc.start("counter", {"steps": steps, "delay_s": 0.1}) for _ in range(8)]

    def flipped() -> bool:
        with sql(servers.url) as connection:
            connection.execute(
                "UPDATE perdure.cell SET region = CASE region WHEN 'north' THEN 'south' ELSE 'north' END, "
                "epoch = epoch + 1, claimed_at = now()"
            )
        return all(servers.rpc.get(run_id).HasField("end_time") for run_id in run_ids)

    eventually(flipped, 60, what="all have ended")
    for run_id in run_ids:
        assert state_of(servers.rpc.get(run_id)) == "SUCCEEDED"
        assert len(counted(servers, run_id, steps)) == steps
        events = servers.rpc.events(run_id)
        assert sequences(events) == list(range(1, len(events) + 1))
    with sql(servers.url) as connection:
        connection.execute("UPDATE perdure.cell SET region = 'north', epoch = epoch + 1, claimed_at = now()")


def test_a_home_that_was_frozen_is_a_zombie_that_writes_nothing_and_stands_by_after_its_restart(
    servers: Servers,
) -> None:
    steps = 10
    run_id = servers.rpc.start("counter", {"steps": steps, "delay_s": 0.1})
    eventually(lambda: len(effects(servers.url, run_id)) >= 2, what="some steps are done")
    process = servers.home._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        servers.served_by(servers.standby, "south")
        with Rpc(servers.standby.address) as rpc:
            assert state_of(rpc.end_of(run_id)) == "SUCCEEDED"
    finally:
        process.send_signal(signal.SIGCONT)
    assert servers.home.wait_for_end() == 1, "its lease is lost"
    assert len(counted(servers, run_id, steps)) <= steps + 1
    events = servers.rpc.events(run_id)
    assert sequences(events) == list(range(1, len(events) + 1))
    servers.home.start()
    eventually(lambda: servers.states(servers.home).get(servers.home.address) == "STANDING_BY", what="it stands by")


def test_bad_commands_are_refused_and_change_nothing(servers: Servers) -> None:
    before = servers.cell(servers.home)
    for server, cell, text in (
        (servers.home, "ss1", "is served by others"),
        (servers.elsewhere, "nn1", "is served by others"),
        (servers.home, "xx1", "must be one of nn1, ss1"),
        (servers.home, "", "must be one of nn1, ss1"),
    ):
        for verb in ("Evacuate", "Return"):
            request = getattr(operator_pb, f"{verb}CellRequest")(cell=cell)
            with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cell") as refusal:
                getattr(servers.operators(server), f"{verb}Cell")(request, timeout=scaled(20))
            assert text in refusal.text
    assert servers.standby.stop() == 0
    with refused("FAILED_PRECONDITION", "NOBODY_STANDS_BY"):
        servers.operators(servers.home).EvacuateCell(operator_pb.EvacuateCellRequest(cell="nn1"), timeout=scaled(20))
    after = servers.cell(servers.home)
    assert (after.serving_region, after.epoch) == (before.serving_region, before.epoch)
