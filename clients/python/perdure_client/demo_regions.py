"""The demonstration of a lost region: its servers are killed, those that stand by go on, and all is whole.

`python -m perdure_client.demo_regions`, from the repository: the agent is its example `payroll`, which pays people at a
bank of its own, a step each. Three regions on this machine, each with a cell of its own: a database of one PostgreSQL,
in the place of a multi-region one, and a server. What is shown is what servers and clients do; how fast a real database
moves its leases is not.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

try:
    from rich.console import Console
except ImportError:
    sys.exit("The demonstration needs more packages. Install them with: pip install 'perdure[cli,service,embedded]'")

from perdure_client._client import Client
from perdure_client._demo_parts import (
    Bank,
    DemoFailed,
    Show,
    begin,
    database,
    free_port,
    heading,
    judge,
    migrate,
    play,
    repository,
    show_on,
    stop,
    wait_until_ready,
)
from perdure_client._errors import PerdureError
from perdure_client._events import Recovered, RunEvent, StateChanged, StepStarted, StepSucceeded
from perdure_client._types import ExecutorState, Run
from perdure_client.cli._output import write_line

AGENT = "payroll"
STEP = "payroll.pay"
HOME, SECONDARY, FAR = "us-east1", "us-west1", "europe-west1"
CELL = "use1"
CELLS = {HOME: CELL, SECONDARY: "usw1", FAR: "euw1"}
LEASE_TTL_S = 2.0
CLAIM_TTL_S = 3.0
"""Both shorter than a server's own defaults, so that nobody has to wait for them."""
RUNS = 3
PEOPLE = 10
SECONDS_EACH = 0.8
"""How long the bank takes for a payment: time enough to be killed in."""
KILL_AFTER_STEPS = 2
PATIENCE_S = 60.0
POLL_S = 0.02


@dataclass(slots=True)
class _Server:
    """A server of the demonstration."""

    region: str
    cell: str
    process: Popen[str]
    address: str
    admin_address: str


@dataclass(slots=True)
class _Watched:
    """A run and what its watcher has seen, with the time of each event here."""

    run_id: str
    events: list[RunEvent] = field(default_factory=list[RunEvent])
    seen_s: list[float] = field(default_factory=list[float])
    breaks: int = 0
    error: BaseException | None = None

    def take(self, event: RunEvent) -> None:
        self.events.append(event)
        self.seen_s.append(time.monotonic())

    def broken(self, _error: PerdureError, _delay_s: float) -> None:
        self.breaks += 1

    @property
    def done(self) -> int:
        """How many steps are committed, as far as was seen."""
        return sum(isinstance(event.data, StepSucceeded) for event in self.events)

    @property
    def executors(self) -> list[str]:
        """Who executed it, in order."""
        changes = [event.data for event in self.events if isinstance(event.data, StateChanged)]
        return list(dict.fromkeys(change.executor_id for change in changes if change.executor_id))

    def gap_after_s(self, moment: float) -> float:
        """Returns the seconds from a moment to the next committed step that was begun after it."""
        begun = {
            event.step_id
            for event, at in zip(self.events, self.seen_s, strict=True)
            if isinstance(event.data, StepStarted) and at > moment
        }
        return next(
            at - moment
            for event, at in zip(self.events, self.seen_s, strict=True)
            if isinstance(event.data, StepSucceeded) and at > moment and event.step_id in begun
        )


def main() -> int:
    """Runs the demonstration; returns 0 when everything is as it is promised to be, else 1; 130 after Ctrl-C."""
    return play(_demonstrate)


def _demonstrate(screen: Console, folder: Path) -> bool:
    root = repository()
    if root is None:
        raise DemoFailed("it needs the repository, whose example it runs; see `make demo-regions` there")
    bank = Bank(folder / "bank.sqlite")
    heading(screen, "Three regions")
    with ExitStack() as stack:
        url = stack.enter_context(database(folder))
        fleet = _Fleet(stack, folder, url, bank, root / "service" / "docs" / "examples" / "refunds")
        fleet.start()
        client = stack.enter_context(Client(fleet.far.address, token="", namespace="default", tls=False))
        heading(screen, f"{RUNS} runs that live in {HOME}, started and watched through {FAR}")
        runs = [client.start(AGENT, {"people": PEOPLE, "seconds": SECONDS_EACH}, home_region=HOME) for _ in range(RUNS)]
        watched = [_Watched(run.run_id) for run in runs]
        others = [_Watcher(client, one) for one in watched[1:]]
        show = show_on(screen, watched[0].run_id)
        try:
            killed_s = _follow(client, watched, show, fleet, bank)
        finally:
            show.close()
        for other in others:
            other.join()
        ended = [client.get(one.run_id) for one in watched]
        show.end(ended[0])
        heading(screen, f"{HOME} is back, and gets its runs back")
        moved = _return_home(fleet, screen)
        heading(screen, "Is everything whole?")
        return _judge(screen, client, watched, ended, moved, bank, killed_s)


# ---- the regions -----------------------------------------------------------------------------------------------------


class _Fleet:
    """A server in each region, and one in the second that stands by for the first."""

    def __init__(self, stack: ExitStack, folder: Path, url: str, bank: Bank, agents: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._url = url
        self._ports = {name: free_port() for name in (*CELLS, "standby")}
        self._environment = {
            "PERDURE_REGIONS_FILE": str(folder / "regions.yaml"),
            "PERDURE_LEASE_TTL": f"{LEASE_TTL_S:g}",
            "PERDURE_CLAIM_TTL": f"{CLAIM_TTL_S:g}",
            "PERDURE_LOG_FORMAT": "json",
            "PYTHONPATH": str(agents),
            "BANK_FILE": str(bank.file),
        }
        self._write_regions()

    def _write_regions(self) -> None:
        names = list(CELLS)
        cells = {
            region: {
                cell: {"database": f"perdure_{cell}", "address": f"127.0.0.1:{self._ports[region]}"}
            } for region, cell in CELLS.items()
        }  # fmt: skip
        cells[HOME][CELL]["standby_address"] = f"127.0.0.1:{self._ports['standby']}"
        document = {
            "regions": {
                name: {"neighbours": [one for one in names if one != name], "cells": cells[name]} for name in names
            },
            "namespaces": {"default": {"home": CELL}},
            "service_role": "perdure_demo",
        }
        # JSON is YAML.
        (self._folder / "regions.yaml").write_text(json.dumps(document, indent=2), encoding="utf-8")

    def start(self) -> None:
        """Makes the databases and starts the servers, all at once."""
        migrate(self._folder, {**self._environment, "PERDURE_DATABASE_URL": self._url})
        regions, cells, names = (*CELLS, SECONDARY), (*CELLS.values(), CELL), (*CELLS, "standby")
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(self._server, regions, cells, names))
        self.home, _, self.far, self.standby = found
        for server in found:
            role = f", and stands by for {HOME}" if server is self.standby else ""
            write_line(
                f"  {server.region:12} {server.address:15} serves the cell {server.cell} (process "
                f"{server.process.pid}){role}"
            )
        write_line(f"  leases are of {LEASE_TTL_S:g} s; a cell is taken over after {CLAIM_TTL_S:g} s")

    def restart_home(self) -> _Server:
        """Starts the server of the first region again, where it was."""
        self.home = self._server(HOME, CELL, HOME)
        return self.home

    def _server(self, region: str, cell: str, name: str) -> _Server:
        log = self._folder / f"server-{name}.log"
        admin_address = f"127.0.0.1:{free_port()}"
        process = begin(
            ["serve", "--address", f"127.0.0.1:{self._ports[name]}", "--agents", AGENT],
            log,
            **self._environment,
            PERDURE_REGION=region,
            PERDURE_CELL=cell,
            PERDURE_ADMIN_ADDRESS=admin_address,
            PERDURE_DATABASE_URL=_database_of(self._url, f"perdure_{cell}"),
        )
        self._stack.callback(stop, process)
        return _Server(region, cell, process, wait_until_ready(process, log, show=False), admin_address)


def _database_of(url: str, name: str) -> str:
    """Returns the URL of another database of the same server: its path is the name, before the parameters."""
    base, question, parameters = url.partition("?")
    return f"{base.rpartition('/')[0]}/{name}{question}{parameters}"


# ---- the runs --------------------------------------------------------------------------------------------------------


class _Watcher:
    """Watches a run in a thread of its own."""

    def __init__(self, client: Client, watched: _Watched) -> None:
        self._client = client
        self._watched = watched
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        try:
            for update in self._client.watch(self._watched.run_id, on_reconnect=self._watched.broken):
                for event in update.events:
                    self._watched.take(event)
        except BaseException as error:  # noqa: BLE001 - raised by `join`
            self._watched.error = error

    def join(self) -> None:
        """Waits until the run has ended."""
        self._thread.join()
        if self._watched.error is not None:
            raise self._watched.error


def _follow(client: Client, watched: list[_Watched], show: Show, fleet: _Fleet, bank: Bank) -> float:
    """Follows the first run to its end, and kills its region in the middle of a step; returns when, monotonic."""
    first, killed_s = watched[0], 0.0

    def broken(error: PerdureError, delay_s: float) -> None:
        first.broken(error, delay_s)
        if first.breaks == 1:
            with show.paused():
                write_line("  The watchers' streams broke; they reconnect with their cursors, until somebody answers")

    for update in client.watch(first.run_id, on_reconnect=broken):
        show.update(update)
        for event in update.events:
            first.take(event)
            if isinstance(event.data, Recovered):
                with show.paused():
                    write_line(f"  Seen {_since(killed_s)}: taken back from {event.data.from_executor_id}")
            elif isinstance(event.data, StateChanged) and event.data.executor_id and killed_s:
                with show.paused():
                    write_line(f"  Seen {_since(killed_s)}: {SECONDARY} goes on with the run")
        last = update.events[-1] if update.events else None
        ready = min(one.done for one in watched) >= KILL_AFTER_STEPS
        if last is not None and isinstance(last.data, StepStarted) and ready and not killed_s:
            _until(lambda: len(bank.payments(first.run_id)) > first.done, "the bank was not asked to pay")
            with show.paused():
                write_line(
                    f"  Killing all servers of {HOME} (process {fleet.home.process.pid}) with SIGKILL during step "
                    f"{last.step_id} of {first.run_id}"
                )
            fleet.home.process.send_signal(signal.SIGKILL)
            fleet.home.process.wait()
            killed_s = time.monotonic()
    if not killed_s:
        raise DemoFailed("the runs had ended before the region could be lost; the machine is too slow for this")
    return killed_s


def _since(moment: float) -> str:
    return f"{time.monotonic() - moment:.1f} s after the kill"


def _return_home(fleet: _Fleet, screen: Console) -> _Watched:
    """Starts the lost server again and returns the cell to it, in the middle of a run; returns what was seen of it."""
    home = fleet.restart_home()
    with (
        Client(home.address, token="", namespace="default", tls=False) as client,
        Client(home.admin_address, token="", namespace="default", tls=False) as admin,
    ):
        states = {one.address: one.state for one in admin.executors()}
        write_line(f"  {HOME}'s server answers again, and is {states.get(home.address, 'missing')}")
        run = client.start(AGENT, {"people": PEOPLE // 2, "seconds": SECONDS_EACH})
        watched, returned = _Watched(run.run_id), False
        show = show_on(screen, run.run_id)
        try:
            for update in client.watch(run.run_id, on_reconnect=watched.broken):
                show.update(update)
                for event in update.events:
                    watched.take(event)
                if watched.done and not returned:
                    returned = True
                    cell = admin.return_cell(CELL)
                    with show.paused():
                        write_line(f"  perdure return {CELL}: {cell.serving_region} has the claim, epoch {cell.epoch}")
        finally:
            show.close()
        show.end(client.get(run.run_id))
        _until(lambda: _at_home(admin, home.address), f"{HOME} did not take its runs back")
    return watched


def _at_home(admin: Client, address: str) -> bool:
    states = {one.address: one.state for one in admin.executors()}
    return states.pop(address, None) is ExecutorState.ALIVE and ExecutorState.ALIVE not in states.values()


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise DemoFailed(what)
        time.sleep(POLL_S)


# ---- the verdict -----------------------------------------------------------------------------------------------------


def _judge(
    screen: Console,
    client: Client,
    watched: list[_Watched],
    ended: list[Run],
    moved: _Watched,
    bank: Bank,
    killed_s: float,
) -> bool:
    """Says what was promised and whether it is so; returns whether all of it is."""
    everything = [*watched, moved]
    logs_agree = all(one.events == list(client.events(one.run_id)) for one in everything)
    dense = all(
        [event.sequence for event in one.events] == list(range(1, client.get(one.run_id).last_sequence + 1))
        for one in everything
    )
    begun = [_begun_again(one) for one in watched]
    payments = bank.payments()
    expected = RUNS * PEOPLE + PEOPLE // 2
    findings = [
        (all(run.succeeded for run in ended), f"The {RUNS} runs ended as {', '.join(run.state for run in ended)}"),
        (
            all(len(one.executors) == 2 for one in watched) and all(run.home_region == HOME for run in ended),
            f"Each was executed by {HOME}, then by {SECONDARY}; its home is {HOME} as before",
        ),
        (dense and logs_agree, f"{sum(len(one.events) for one in everything)} events were seen through {FAR} and "
         f"{HOME}, each once, in order, and are those of the logs"),
        (
            all(one.breaks for one in watched),
            f"The streams broke {sum(one.breaks for one in watched)} times, and continued by their cursors",
        ),
        (max(begun) <= 1, f"Steps begun again, as they were cut off: {sum(begun)} in {RUNS} runs"),
        (
            _begun_again(moved) == 0 and len(moved.executors) == 2,
            f"The run that was moved home had {len(moved.executors)} servers, and no step of it was begun again",
        ),
        (
            len(payments) == len(set(payments)) == expected,
            f"The bank was asked {bank.requests()} times and has paid {len(payments)} times of {expected}",
        ),
    ]  # fmt: skip
    gaps_s = sorted(one.gap_after_s(killed_s) for one in watched)
    return judge(
        screen,
        findings,
        f"  From the loss to the next committed step: {statistics.median(gaps_s):.1f} s in the middle, "
        f"{gaps_s[-1]:.1f} s at most, {SECONDS_EACH:g} s of it the step itself; {os.cpu_count()} cores",
    )


def _begun_again(watched: _Watched) -> int:
    """Returns how many steps of a run were begun more than once."""
    times = Counter(event.step_id for event in watched.events if isinstance(event.data, StepStarted))
    return sum(count > 1 for count in times.values())


if __name__ == "__main__":
    sys.exit(main())
