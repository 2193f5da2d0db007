"""Regions: how often a caller, a step and a watcher wait for something that is far away, counted and by distance.

Two regions on one machine (`tests.helpers.far_regions`). **Counted**, on the wire: the round trips to the databases of
the transactions that name a run, and the calls that one region's server sends on to the other's. **By distance**: one
thing after the other is made far away, and how much longer everything takes then, divided by how far that is, says how
often it was waited for, one time after the other. What is made far: the other region's server; the databases, each from
its server; and the quorum, for which PostgreSQL waits before each commit (`commit_delay`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter, time_ns

from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb

from tests.helpers.databases import DatabaseServer
from tests.helpers.far_regions import AT_HOME, AWAY, MOVED, Counts, FarRegions, far_regions
from tests.helpers.rpc import TIMEOUT_S, Rpc, duration, new_id, only, states_in
from tests.helpers.waiting import scaled
from tests.load.frame import Benchmark, load
from tests.load.grid import Grid, Measure
from tests.load.throughput import slow_commits

START, STEP, RUN, ONE_CALL, OPEN, EVENT = (
    "a start, until it is answered",
    "a step, until it is committed",
    "a run of two steps, until its end is known",
    "the same in one call, a start that waits",
    "a watch, until it is current",
    "an event, from its step's commit to a watcher",
)
KINDS = (START, STEP, RUN, ONE_CALL, OPEN, EVENT)
NEAR, SENT_ON, FORMER, OUT = "at home", "sent on", "a namespace that has moved", "away"
ROWS = {NEAR: (False, AT_HOME), SENT_ON: (True, AT_HOME), FORMER: (False, MOVED), OUT: (True, AWAY)}
"""Whether the standby's server is asked, and in which namespace."""
REGION, DATABASE, QUORUM = "waits for the other region", "waits for the database", "waits for the quorum"
MEASURES = (
    *(Measure(name, 0) for name in ("calls sent on", "commits", "reads")),
    *(Measure(name, 2) for name in (REGION, DATABASE, QUORUM)),
)
WARM_TRIALS = 8
"""A statement is prepared when it comes for the sixth time on its connection, once."""
STEPS = 16
PAUSE_S = 0.02
"""Between steps: less than an event waits for a checkpoint to ride on."""

Say = Callable[[str], None]
Place = tuple[str, str]
"""A row: what, and where."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options."""
    group = parser.add_argument_group("regions")
    group.add_argument("--trials", type=int, default=9, metavar="N", help="of each kind, whose median counts (9)")
    group.add_argument("--distance", type=float, default=60.0, metavar="MS", help="there and back; up to 100 (60)")


def run(options: argparse.Namespace, server: DatabaseServer, say: Say) -> Grid:
    """Measures; see the module."""
    settings = {"trials": options.trials, "far": f"{options.distance:g} ms there and back"}
    grid = Grid("what is waited for", "where", MEASURES, settings=settings)
    if server.cockroach:
        grid.notes.append("Not on CockroachDB: several databases of one PostgreSQL stand for the cells.")
        return grid
    before = load()
    with tempfile.TemporaryDirectory() as folder, far_regions(server, Path(folder), "tests.load.agents") as regions:
        quiet = {namespace: _quiet_run(regions, namespace) for namespace in (AT_HOME, AWAY, MOVED)}
        _measure(regions, quiet, min(WARM_TRIALS, options.trials))
        near = _measure(regions, quiet, options.trials)
        say(f"near: {_told(near)}")
        # Where the namespace was makes a difference to starts only.
        places = [(what, where) for what in KINDS for where in ROWS if where != FORMER or what in (START, RUN)]
        for what, where in places:
            counted = near[what, where].counted
            grid.row(what, where).add({name: statistics.median(values) for name, values in counted.items()})
        for name in (REGION, DATABASE, QUORUM):
            with _far(regions, server, name, options.distance / 1000):
                _measure(regions, quiet, options.trials // 4)  # more is under way at a time: new connections
                far = _measure(regions, quiet, options.trials)
            say(f"{name}: {_told(far)}")
            for place in places:
                longer_s = far[place].median_s - near[place].median_s
                grid.row(*place).add({name: round(1000 * longer_s / options.distance, 2) + 0.0})  # and no -0.00
    grid.load = (before, load())
    return grid


BENCHMARK = Benchmark("regions", add_options, run)


@dataclass
class _Seen:
    """What was seen of a row: how long it took each time, and what was counted."""

    seconds: list[float] = field(default_factory=list)
    counted: dict[str, list[float]] = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def add(self, seconds: Sequence[float], **counted: float) -> None:
        """Adds a trial; what was counted by the name of its column."""
        self.seconds += seconds
        for name, value in counted.items():
            self.counted.setdefault(name, []).append(value)


@contextmanager
def _far(regions: FarRegions, server: DatabaseServer, name: str, seconds: float) -> Iterator[None]:
    """Makes one thing far away, so many seconds there and back."""
    if name == QUORUM:
        with slow_commits(server, round(1e6 * seconds)):
            yield
        return
    ways = [one.to_server if name == REGION else one.to_database for one in regions.both]
    for way in ways:
        way.one_way_s = seconds / 2
    try:
        yield
    finally:
        for way in ways:
            way.one_way_s = 0.0


def _quiet_run(regions: FarRegions, namespace: str) -> str:
    """Starts a run that waits, and of which nothing new is to be seen."""
    rpc, run_id = regions.standby.rpc, new_id("listener")
    rpc.start("listener", run_id=run_id, namespace=namespace)
    for response in rpc.watch(run_id, namespace=namespace):
        if "AWAITING_INPUT" in states_in(response.events):
            break
    return run_id


def _measure(regions: FarRegions, quiet: Mapping[str, str], trials: int) -> Mapping[Place, _Seen]:
    """Returns what was seen of all rows, which take turns; `quiet` is a run in each namespace that waits."""
    seen: defaultdict[Place, _Seen] = defaultdict(_Seen)
    for _ in range(trials):
        for where, (elsewhere, namespace) in ROWS.items():
            rpc = (regions.standby if elsewhere else regions.home).rpc
            _run(seen, where, regions, rpc, namespace)
            _run_in_one_call(seen, where, regions, rpc, namespace)
            _open(seen, where, regions, rpc, namespace, quiet[namespace])
            _pulse(seen, where, regions, rpc, namespace)
    return seen


def _run(seen: Mapping[Place, _Seen], where: str, regions: FarRegions, rpc: Rpc, namespace: str) -> None:
    """Starts a run of two steps and waits for its end."""
    run_id = new_id("two-steps")
    with regions.counted() as counts:
        began = perf_counter()
        rpc.start("two-steps", {"number": 1}, run_id=run_id, namespace=namespace)
        answer = rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run_id, namespace=namespace), timeout=scaled(TIMEOUT_S))
        seen[RUN, where].add([perf_counter() - began], **_columns(counts(run_id)))
    assert not answer.timed_out


def _run_in_one_call(seen: Mapping[Place, _Seen], where: str, regions: FarRegions, rpc: Rpc, namespace: str) -> None:
    """Starts a run of two steps, which is answered at its end."""
    run_id = new_id("two-steps")
    with regions.counted() as counts:
        began = perf_counter()
        wait = duration(scaled(TIMEOUT_S))
        answer = rpc.start_call("two-steps", {"number": 1}, run_id=run_id, namespace=namespace, wait=wait)
        seen[ONE_CALL, where].add([perf_counter() - began], **_columns(counts(run_id)))
    assert answer.run.output_json


def _open(seen: Mapping[Place, _Seen], where: str, regions: FarRegions, rpc: Rpc, namespace: str, run_id: str) -> None:
    """Opens a watch."""
    with regions.counted() as counts:
        began = perf_counter()
        watch = rpc.watch(run_id, namespace=namespace)
        next(response for response in watch if response.caught_up)
        seen[OPEN, where].add([perf_counter() - began], **_columns(counts(run_id)))
        watch.cancel()


def _pulse(seen: Mapping[Place, _Seen], where: str, regions: FarRegions, rpc: Rpc, namespace: str) -> None:
    """Starts a run that makes steps with pauses between them, and watches it."""
    run_id = new_id("pulse")
    with regions.counted() as counts:
        began = perf_counter()
        rpc.start("pulse", {"steps": STEPS, "pause_s": PAUSE_S}, run_id=run_id, namespace=namespace)
        took_s, started = perf_counter() - began, counts(run_id)
        seen[START, where].add([took_s], **_columns(started))
        opened = None
        arrived_ns: dict[int, int] = {}
        for response in rpc.watch(run_id, namespace=namespace):
            at_ns = time_ns()
            steps = [event.step_id for event in only(response.events, "step_succeeded")]
            if opened is not None and steps:
                arrived_ns |= dict.fromkeys(steps, at_ns)
                latest = counts(run_id)
            elif opened is None and response.caught_up:
                opened = counts(run_id)
        assert opened is not None
        assert arrived_ns, "the run had ended before it was watched"
        made = counts(run_id) - started
    request = pb.WaitRunRequest(run_id=run_id, namespace=namespace, view=run_pb.AGENT_RUN_VIEW_FULL)
    committed_ns = json.loads(rpc.runs.WaitRun(request, timeout=scaled(TIMEOUT_S)).run.output_json)
    step_s = [(after - before) / 1e9 - PAUSE_S for before, after in pairwise(committed_ns)]
    seen[STEP, where].add(step_s, commits=made.writing / (STEPS + 1))  # and the run's end
    late_s = [(at_ns - committed_ns[step - 1]) / 1e9 for step, at_ns in arrived_ns.items()]
    each = replace(latest - opened, writing=0)  # the commits are the run's own
    seen[EVENT, where].add(late_s, **{name: value / len(late_s) for name, value in _columns(each).items()})


def _columns(counts: Counts) -> dict[str, float]:
    """Returns what was counted by the names of the columns. A commit is one round trip, else it shows here."""
    return {"calls sent on": counts.calls, "commits": counts.writing, "reads": counts.reading}


def _told(seen: Mapping[Place, _Seen]) -> str:
    """Returns the medians, for whoever waits."""
    told = {f"{what.partition(',')[0]} {where}": 1000 * one.median_s for (what, where), one in seen.items()}
    return ", ".join(f"{name} {ms:.1f} ms" for name, ms in told.items())
