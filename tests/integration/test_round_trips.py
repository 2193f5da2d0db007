"""What distance costs, as counts: commits, round trips to the database, and calls that are sent on to another region.

The numbers are those of the README's table. A run's are the fewest of some runs: what comes now and then (a statement
that is prepared, an event that a slow machine writes alone) is not what each one costs. Nothing here asserts a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple

import psycopg
import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.store.engine import parse_url

from tests.helpers.databases import DatabaseServer
from tests.helpers.far_regions import AT_HOME, AWAY, MOVED, Counts, FarRegions, Region, far_regions
from tests.helpers.proxy import DatabaseProxy
from tests.helpers.rpc import TIMEOUT_S, duration, new_id, only
from tests.helpers.waiting import scaled

RUNS = 12
"""More than it takes until all statements are prepared."""

STEPS = 8
"""Of a run that is watched."""


@pytest.fixture(scope="module")
def regions(database_server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarRegions]:
    if database_server.cockroach:
        pytest.skip("databases stand for cells on PostgreSQL only: this one's nodes have no such regions")
    with far_regions(database_server, tmp_path_factory.mktemp("regions"), "tests.load.agents") as made:
        yield made


def fewest(trial: Callable[[], Counts]) -> Counts:
    """Returns the fewest of each that some trials have counted."""
    return Counts(*map(min, zip(*(astuple(trial()) for _ in range(RUNS)), strict=True)))


def a_run(regions: FarRegions, caller: Region, namespace: str) -> Counts:
    """Returns what a run of two steps cost that was started and waited for."""
    run_id = new_id("two-steps")
    with regions.counted() as counts:
        caller.rpc.start("two-steps", {"number": 1}, run_id=run_id, namespace=namespace)
        request = pb.WaitRunRequest(run_id=run_id, namespace=namespace)
        assert not caller.rpc.runs.WaitRun(request, timeout=scaled(TIMEOUT_S)).timed_out
        return counts(run_id)


def without_hints(counts: Counts) -> tuple[int, ...]:
    """Returns calls, commits, and round trips that write and that read. Hints share some, so these are any number."""
    return astuple(counts)[:-1]


def test_a_run_of_two_steps_is_three_commits_of_one_round_trip_each_and_reads_nothing(regions: FarRegions) -> None:
    counts = fewest(lambda: a_run(regions, regions.home, AT_HOME))
    assert without_hints(counts) == (0, 3, 3, 0), "the last step and the end are one"
    assert counts.hints <= 3


def test_sent_on_it_costs_one_call_for_each_that_its_caller_makes_and_nothing_else(regions: FarRegions) -> None:
    assert without_hints(fewest(lambda: a_run(regions, regions.standby, AT_HOME))) == (2, 3, 3, 0)


def test_a_start_that_waits_is_one_call_and_reads_nothing(regions: FarRegions) -> None:
    def one_call(caller: Region) -> Counts:
        run_id = new_id("two-steps")
        with regions.counted() as counts:
            wait = duration(scaled(TIMEOUT_S))
            answer = caller.rpc.start_call("two-steps", {"number": 1}, run_id=run_id, namespace=AT_HOME, wait=wait)
            assert answer.run.output_json
            return counts(run_id)

    assert without_hints(fewest(lambda: one_call(regions.home))) == (0, 3, 3, 0)
    assert without_hints(fewest(lambda: one_call(regions.standby))) == (1, 3, 3, 0)


def test_away_from_its_database_a_run_makes_no_more_round_trips_than_at_home(regions: FarRegions) -> None:
    assert without_hints(fewest(lambda: a_run(regions, regions.standby, AWAY))) == (0, 3, 3, 0)


def test_an_id_of_ones_own_costs_one_look_at_each_former_home_and_an_id_of_the_server_none(regions: FarRegions) -> None:
    assert without_hints(fewest(lambda: a_run(regions, regions.home, MOVED))) == (1, 3, 3, 1)
    with regions.counted() as counts:
        made = regions.home.rpc.start_call("two-steps", {"number": 1}, namespace=MOVED).run.run_id
        assert counts(made).calls == 0


def test_a_start_is_one_commit_when_it_is_answered(regions: FarRegions) -> None:
    def a_start() -> Counts:
        run_id = new_id("pulse")
        with regions.counted() as counts:
            regions.home.rpc.start("pulse", {"steps": 1, "pause_s": 0.05}, run_id=run_id)
            found = counts(run_id)
        regions.home.rpc.end_of(run_id)
        return found

    assert without_hints(fewest(a_start)) == (0, 1, 1, 0)


def test_every_call_for_a_run_elsewhere_is_sent_on_once(regions: FarRegions) -> None:
    rpc, run_id = regions.standby.rpc, new_id("listener")
    calls: dict[str, Callable[[], object]] = {
        "StartAgent": lambda: rpc.start("listener", run_id=run_id),
        "StartAgent again": lambda: rpc.start("listener", run_id=run_id),
        "GetRun": lambda: rpc.get(run_id),
        "WatchRun": lambda: next(iter(rpc.watch(run_id))),
        "ListSteps": lambda: rpc.runs.ListSteps(pb.ListStepsRequest(run_id=run_id), timeout=scaled(TIMEOUT_S)),
        "SignalRun": lambda: rpc.signal(run_id, name="go"),
        "WaitRun": lambda: rpc.end_of(run_id),
        "WatchRun to its end": lambda: rpc.events(run_id),
    }
    sent_on = {}
    for name, call in calls.items():
        with regions.counted() as counts:
            call()
            sent_on[name] = counts(run_id).calls
    assert sent_on == dict.fromkeys(calls, 1)


def test_a_watch_reads_when_it_begins_and_then_nothing_for_each_event(regions: FarRegions) -> None:
    def a_watch() -> Counts:
        run_id = new_id("pulse")
        with regions.counted() as counts:
            regions.home.rpc.start("pulse", {"steps": STEPS, "pause_s": 0.02}, run_id=run_id)
            opened = latest = None
            for response in regions.home.rpc.watch(run_id):
                if opened is None and response.caught_up:
                    opened = counts(run_id)
                elif opened is not None and any(e.step_id < STEPS for e in only(response.events, "step_succeeded")):
                    latest = counts(run_id)  # the last one comes with the end, at which the watch reads the run
        assert opened is not None
        assert latest is not None
        opening.append(opened.reading)
        return latest - opened

    opening: list[int] = []
    assert fewest(a_watch).reading == 0
    assert min(opening) <= 6


# ---- what counts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(database_server: DatabaseServer) -> Iterator[DatabaseProxy]:
    if database_server.cockroach:
        pytest.skip("what is sent in one go is counted with PostgreSQL")
    made = DatabaseProxy(database_server.url)
    yield made
    made.close()


def test_a_round_trip_is_when_a_client_waits_and_a_commit_is_of_something_written(proxy: DatabaseProxy) -> None:
    url = parse_url(proxy.url).set(drivername="postgresql").render_as_string(hide_password=False)
    insert = "INSERT INTO one (name) VALUES (%s)"
    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
        connection.execute("CREATE TEMPORARY TABLE one (name TEXT)")
        with proxy.counted() as found:
            connection.execute(insert, ["alone"])
            with connection.transaction():
                connection.execute(insert, ["in-a-transaction"])
                connection.execute("SELECT name FROM one WHERE name = %s FOR UPDATE", ["in-a-transaction"])
            with connection.pipeline():
                connection.execute("BEGIN")
                for _ in range(3):
                    connection.execute(insert, ["at-once" * 1_000])
                connection.execute("COMMIT")
            with connection.transaction(force_rollback=True):
                connection.execute(insert, ["never"])
            connection.execute("SELECT name FROM one WHERE name = %s FOR UPDATE", ["locked"])
    counted = {
        name: [(one.round_trips, one.writes) for one in found if one.names(name)]
        for name in ("alone", "in-a-transaction", "at-once", "never", "locked")
    }
    assert counted == {
        "alone": [(1, True)],
        "in-a-transaction": [(4, True)],
        "at-once": [(1, True)],
        "never": [(3, False)],
        "locked": [(1, False)],
    }
    assert len(found) == len(counted)
