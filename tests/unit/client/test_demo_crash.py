"""The verdict of the demonstration of a crash: it says no to everything that is not as promised."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from perdure_client import Recovered, Run, RunEvent, RunState, StateChanged, Step, StepStarted, StepState, StepSucceeded
from perdure_client import demo_crash as demo
from rich.console import Console

PEOPLE = 3
KILLED = 2


def story() -> list[RunEvent]:
    """The events of a run whose second step was cut off."""
    data: list[tuple[int, Any]] = [
        (0, StateChanged(to_state=RunState.RUNNING, executor_id="a")),
        (1, StepStarted()), (1, StepSucceeded()), (2, StepStarted()),
        (0, Recovered(from_executor_id="a", gap=timedelta(seconds=2))),
        (0, StateChanged(to_state=RunState.RUNNING, executor_id="b")),
        (2, StepStarted()), (2, StepSucceeded()), (3, StepStarted()), (3, StepSucceeded()),
        (0, StateChanged(to_state=RunState.SUCCEEDED)),
    ]  # fmt: skip
    return [
        RunEvent(run_id="r", sequence=number, step_id=step_id, step_name=demo.STEP if step_id else "", data=one)
        for number, (step_id, one) in enumerate(data, 1)
    ]


class World:
    """What the verdict is about; stands for the client, too."""

    def __init__(self, folder: Path) -> None:
        self.seen = demo._Seen(story(), breaks=1, killed_step=KILLED, gap_s=2.5)
        self.log = story()
        self.run = Run(
            namespace="default", run_id="r", agent=demo.AGENT, state=RunState.SUCCEEDED, output={"people": PEOPLE},
            last_sequence=len(self.log),
        )  # fmt: skip
        self.states = [StepState.SUCCEEDED] * PEOPLE
        self.bank = folder / "bank.sqlite"
        self.pay("1", "2", "2", "3")

    def pay(self, *keys: str) -> None:
        with closing(sqlite3.connect(self.bank)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS request (key TEXT)")
            connection.execute("CREATE TABLE IF NOT EXISTS payment (key TEXT)")
            for key in keys:
                connection.execute("INSERT INTO request VALUES (?)", [key])
                connection.execute(
                    "INSERT INTO payment SELECT ? WHERE NOT EXISTS (SELECT 1 FROM payment WHERE key = ?)", [key, key]
                )

    def events(self, _run: Run) -> list[RunEvent]:
        return self.log

    def steps(self, _run: Run) -> list[Step]:
        return [Step(step_id=number, step_name=demo.STEP, state=one) for number, one in enumerate(self.states, 1)]

    def verdict(self) -> tuple[bool, str]:
        screen = io.StringIO()
        good = demo._judge(
            self,  # type: ignore[arg-type]
            self.run, self.seen, PEOPLE, demo.Bank(self.bank), Console(file=screen, width=200),
        )  # fmt: skip
        return good, screen.getvalue()


def test_a_whole_run_is_called_whole(tmp_path: Path) -> None:
    good, said = World(tmp_path).verdict()
    assert good
    assert said.count("  yes  ") == 7
    assert "Nothing is lost, and nothing was done twice." in said


def drop(world: World) -> None:
    del world.seen.events[3]


def twice(world: World) -> None:
    world.seen.events.insert(3, world.seen.events[2])


def unbroken(world: World) -> None:
    world.seen.breaks = 0


def other_log(world: World) -> None:
    world.log[0] = replace(world.log[0], data=StateChanged(to_state=RunState.RUNNING, executor_id="c"))


def failed(world: World) -> None:
    world.run = replace(world.run, state=RunState.FAILED, output=None)


def one_server(world: World) -> None:
    for events in (world.log, world.seen.events):
        events[5] = replace(events[5], data=StateChanged(to_state=RunState.RUNNING, executor_id="a"))


def committed_twice(world: World) -> None:
    for events in (world.log, world.seen.events):
        events[6] = replace(events[6], data=StepSucceeded())


def not_done(world: World) -> None:
    world.states[1] = StepState.INTERRUPTED


def another_step(world: World) -> None:
    world.seen.killed_step = 3


def paid_twice(world: World) -> None:
    with closing(sqlite3.connect(world.bank)) as connection, connection:
        connection.execute("INSERT INTO payment VALUES ('2')")


def asked_again(world: World) -> None:
    world.pay("3")


@pytest.mark.parametrize(
    "spoil",
    [
        drop, twice, unbroken, other_log, failed, one_server, committed_twice, not_done, another_step, paid_twice,
        asked_again,
    ],
    ids=lambda spoil: spoil.__name__,
)  # fmt: skip
def test_what_is_not_as_promised_is_said_and_is_a_failure(tmp_path: Path, spoil: Callable[[World], None]) -> None:
    world = World(tmp_path)
    spoil(world)
    good, said = world.verdict()
    assert not good
    assert "  NO   " in said
    assert "not as it is promised" in said


def test_outside_of_the_repository_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "repository", lambda: None)
    assert demo.main() == 1
    assert "it needs the repository" in capsys.readouterr().out
