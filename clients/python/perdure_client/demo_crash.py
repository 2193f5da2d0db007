"""The demonstration of a crash: a server is killed in the middle of a run, another one finishes it, and all is whole.

`python -m perdure_client.demo_crash`, from the repository: the agent is its example `payroll`, which pays people at a
bank of its own, a step each. The server is killed when the bank has paid and the step is not yet committed.

PERDURE_DATABASE_URL uses that database instead of a new PostgreSQL; its other servers are left alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

try:
    from rich.console import Console
except ImportError:
    sys.exit("The demonstration needs more packages. Install them with: pip install 'perdure[cli,service,embedded]'")

from perdure_client._client import Client
from perdure_client._demo_parts import (
    Bank,
    DemoFailed,
    Finding,
    Show,
    begin,
    database,
    free_port,
    heading,
    judge,
    migrate,
    object_of,
    play,
    repository,
    show_on,
    stop,
    wait_until_ready,
)
from perdure_client._errors import PerdureError
from perdure_client._events import Recovered, RunEvent, StateChanged, StepStarted, StepSucceeded
from perdure_client._types import Run, StepState
from perdure_client.cli._output import write_line
from perdure_client.cli._text import one_line

AGENT = "payroll"
STEP = "payroll.pay"
LEASE_TTL_S = 2.0
"""Shorter than a server's own default, so that nobody has to wait for it."""
SECONDS_EACH = 1.0
"""How long the bank takes for a payment: time enough to be killed in."""
FEWEST_PEOPLE = 8
KILL_AFTER_STEPS = 2
"""Steps that are committed before the kill, at least."""
BANK_PATIENCE_S = 30.0
POLL_S = 0.01


@dataclass(slots=True)
class _Server:
    """A server of the demonstration."""

    name: str
    address: str
    process: subprocess.Popen[str]
    log: Path


@dataclass(slots=True)
class _Seen:
    """What the watcher has seen, and what was done meanwhile.

    Attributes:
        killed_step: The step in whose body the server was killed; 0 before.
        gap_s: From the kill to the next committed step.
    """

    events: list[RunEvent] = field(default_factory=list[RunEvent])
    breaks: int = 0
    killed_step: int = 0
    killed_at_s: float = 0.0
    gap_s: float = 0.0


def main() -> int:
    """Runs the demonstration; returns 0 when everything is as it is promised to be, else 1; 130 after Ctrl-C."""
    return play(_demonstrate)


def _demonstrate(screen: Console, folder: Path) -> bool:
    root = repository()
    if root is None:
        raise DemoFailed("it needs the repository, whose example it runs; see `make demo-crash` there")
    bank = Bank(folder / "bank.sqlite")
    heading(screen, "A database, and server A")
    with ExitStack() as stack:
        environment = {
            "PERDURE_DATABASE_URL": os.environ.get("PERDURE_DATABASE_URL") or stack.enter_context(database(folder)),
            "PERDURE_LEASE_TTL": f"{LEASE_TTL_S:g}",
            "PERDURE_APPLICATION_VERSION": f"demo-crash-{os.getpid()}",  # nobody else's server takes the run
            "PERDURE_LOG_FORMAT": "json",
            "PYTHONPATH": str(root / "service" / "docs" / "examples" / "refunds"),
            "BANK_FILE": str(bank.file),
        }
        migrate(folder, environment)
        began = time.monotonic()
        a = stack.enter_context(_server("A", folder, environment, show=True))
        took_s = time.monotonic() - began
        other = f"127.0.0.1:{free_port()}"
        client = stack.enter_context(
            Client(
                f"ipv4:{a.address},{other}", token="", namespace="default", tls=False
            )  # as a name has both addresses
        )
        # So many that server B is there before the last one is paid.
        people = max(FEWEST_PEOPLE, KILL_AFTER_STEPS + 4 + int(4 * took_s / SECONDS_EACH))
        heading(screen, f"A run of the agent `{AGENT}` on server A: {people} people are paid, a step each")
        started = client.start(AGENT, {"people": people, "seconds": SECONDS_EACH})
        b = _Later(stack, folder, environment, other)
        show = show_on(screen, started.run_id)
        try:
            seen = _follow(client, started, show, a, b, bank)
        finally:
            show.close()
            b.join()
        run = client.get(started)
        show.end(run)
        heading(screen, "Is everything whole?")
        return _judge(client, run, seen, people, bank, screen)


# ---- the servers -----------------------------------------------------------------------------------------------------


@contextmanager
def _server(
    name: str, folder: Path, environment: dict[str, str], address: str = "127.0.0.1:0", *, show: bool = False
) -> Generator[_Server]:
    """Runs a server; it may be killed meanwhile."""
    log = folder / f"server-{name}.log"
    process = begin(["serve", "--address", address, "--agents", AGENT], log, **environment)
    try:
        where = wait_until_ready(process, log, show=False)
        if show:
            write_line(f"  server {name} (process {process.pid}) serves on {where}; its lease is {LEASE_TTL_S:g} s")
        yield _Server(name, where, process, log)
    finally:
        stop(process)


class _Later:
    """Server B: starts while the run goes on at server A, so that the watcher is connected to A."""

    def __init__(self, stack: ExitStack, folder: Path, environment: dict[str, str], address: str) -> None:
        self._stack = stack
        self._arguments = ("B", folder, environment, address)
        self._server: _Server | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._start, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        try:
            self._server = self._stack.enter_context(_server(*self._arguments))
        except Exception as error:  # noqa: BLE001 - told by `get`, on the thread that can
            self._error = error

    def get(self) -> _Server | None:
        """Returns the server once it serves.

        Raises:
            DemoFailed: It does not start.
        """
        if self._error is not None:
            raise self._error
        return self._server

    def join(self) -> None:
        """Waits until it is known whether it serves, so that it is stopped if it does."""
        self._thread.join()


# ---- the run ---------------------------------------------------------------------------------------------------------


def _follow(client: Client, started: Run, show: Show, a: _Server, b: _Later, bank: Bank) -> _Seen:
    """Follows the run to its end, and kills server A in the middle of a step."""
    seen = _Seen()

    def broken(error: PerdureError, _delay_s: float) -> None:
        seen.breaks += 1
        if seen.breaks == 1:
            with show.paused():
                why = one_line(error.metadata.get("cause") or error.message)
                write_line(f"  The watcher's connection broke ({why}); it reconnects with its cursor")

    for update in client.watch(started, on_reconnect=broken):
        show.update(update)
        for event in update.events:
            _take(event, seen, show)
        last = update.events[-1] if update.events else None
        if last is not None and isinstance(last.data, StepStarted) and not seen.killed_step:
            _kill_perhaps(last, seen, show, a, b, bank)
    if not seen.killed_step:
        raise DemoFailed("server B was not there before the run had ended; the machine is too slow for this")
    return seen


def _take(event: RunEvent, seen: _Seen, show: Show) -> None:
    seen.events.append(event)
    if isinstance(event.data, Recovered):
        with show.paused():
            write_line(
                f"  The run was taken back from {event.data.from_executor_id}, "
                f"{event.data.gap.total_seconds():.1f} s after that server's last sign of life"
            )
    elif isinstance(event.data, StepSucceeded) and seen.killed_step and not seen.gap_s:
        seen.gap_s = time.monotonic() - seen.killed_at_s


def _kill_perhaps(event: RunEvent, seen: _Seen, show: Show, a: _Server, b: _Later, bank: Bank) -> None:
    """Kills server A in the body of the step that an event begins, if server B is there and enough is committed."""
    other = b.get()
    done = sum(isinstance(one.data, StepSucceeded) for one in seen.events)
    if other is None or done < KILL_AFTER_STEPS or event.step_name != STEP:
        return
    deadline = time.monotonic() + BANK_PATIENCE_S
    while len(bank.payments()) <= done:
        if time.monotonic() > deadline:
            raise DemoFailed("the bank was not asked to pay")
        time.sleep(POLL_S)
    with show.paused():
        write_line(f"  server B (process {other.process.pid}) serves on {other.address}")
        write_line(
            f"  Killing server A (process {a.process.pid}) with SIGKILL during step {event.step_id} ({STEP}): "
            "the bank has paid, and the step is not committed"
        )
    a.process.send_signal(signal.SIGKILL)
    a.process.wait()
    seen.killed_step, seen.killed_at_s = event.step_id, time.monotonic()


# ---- the verdict -----------------------------------------------------------------------------------------------------


def _judge(client: Client, run: Run, seen: _Seen, people: int, bank: Bank, screen: Console) -> bool:
    """Says what was promised and whether it is so; returns whether all of it is."""
    findings = [
        *_about_the_watch(seen, run, list(client.events(run))),
        *_about_the_steps(seen, run, people, all(step.state is StepState.SUCCEEDED for step in client.steps(run))),
        _about_the_bank(bank, people),
    ]
    return judge(
        screen,
        findings,
        f"  From the kill to the next committed step: {seen.gap_s:.1f} s; the lease is {LEASE_TTL_S:g} s",
    )


def _about_the_watch(seen: _Seen, run: Run, log: list[RunEvent]) -> list[Finding]:
    numbers = [event.sequence for event in seen.events]
    dense = numbers == list(range(1, run.last_sequence + 1))
    through = "a broken connection" if seen.breaks else "NO broken connection"
    return [
        (
            dense and seen.breaks > 0,
            f"The watcher saw, through {through}, {len(numbers)} events of {run.last_sequence}, each once, in order",
        ),
        (seen.events == log, "The log has the very events that the watcher saw"),
    ]


def _about_the_steps(seen: _Seen, run: Run, people: int, all_succeeded: bool) -> list[Finding]:
    output = object_of(run.output)
    committed = Counter(event.step_id for event in seen.events if isinstance(event.data, StepSucceeded))
    begun = Counter(event.step_id for event in seen.events if isinstance(event.data, StepStarted))
    again = sorted(step_id for step_id, times in begun.items() if times > 1)
    recoveries = sum(isinstance(event.data, Recovered) for event in seen.events)
    changes = [event.data for event in seen.events if isinstance(event.data, StateChanged)]
    executors = {change.executor_id for change in changes if change.executor_id}
    once = len(committed) == people and set(committed.values()) == {1}
    return [
        (run.succeeded and output.get("people") == people, f"The run ended as {run.state}: {output}"),
        (recoveries == 1 and len(executors) == 2, f"{len(executors)} servers executed it, with {recoveries} recovery"),
        (once and all_succeeded, f"{len(committed)} steps of {people} are committed, {committed.total()} times in all"),
        (again == [seen.killed_step], f"Begun again, as it was cut off: step {', '.join(map(str, again)) or 'none'}"),
    ]


def _about_the_bank(bank: Bank, people: int) -> Finding:
    payments, requests = bank.payments(), bank.requests()
    return (
        len(payments) == len(set(payments)) == people and requests == people + 1,
        f"The bank was asked {requests} times and has paid {len(payments)} times: it knew the step that was cut off "
        "by its idempotency key",
    )


if __name__ == "__main__":
    sys.exit(main())
