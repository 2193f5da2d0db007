"""Two application versions on one database: each continues its own runs; and what becomes of those of one that goes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from perdure_client import Client, StrandedReason
from perdure_service import app
from perdure_service.settings import load_settings

from tests.helpers import judge
from tests.helpers.rpc import Rpc, only, state_of
from tests.helpers.server import ROOT, ServerProcess, create_effects_table, effects
from tests.helpers.waiting import eventually, free_port, scaled

TTL_S = scaled(2)
STEPS = 20
TAKE_BACK_S = 12
"""A few times to live."""


@dataclass
class Versions:
    """A server of version 1 and one of version 2, on one database."""

    url: str
    one: ServerProcess
    two: ServerProcess
    at_1: Rpc
    at_2: Rpc
    admin: Client

    def executors_of(self, version: str) -> set[str]:
        """Returns the ids that executors of a version have, or had."""
        known = self.admin.executors(include_gone=True)
        return {executor.executor_id for executor in known if executor.application_version == version}

    def stranded(self) -> dict[str, Any]:
        """Returns the stranded runs by id."""
        return {run.run_id: run for run in self.admin.stranded()}

    def command(self, text: str) -> Any:
        """Runs a command as the advice has it, against the server of version 2; returns what it printed."""
        program, *arguments = shlex.split(text)
        assert program == "perdure"
        done = subprocess.run(
            [sys.executable, "-c", "from perdure_client.cli import main; main()", *arguments, "-o", "json"],
            env={**os.environ, "PERDURE_ADDRESS": self.two.address}, cwd=ROOT, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def versions(database_url: str) -> Iterator[Versions]:
    create_effects_table(database_url)
    admin_port = free_port()
    shared = {"PERDURE_LEASE_TTL": str(TTL_S), "PERDURE_PARK_AFTER": "0.2"}
    with ExitStack() as stack:
        one = ServerProcess(database_url, command="serve", PERDURE_APPLICATION_VERSION="1", **shared)
        two = ServerProcess(
            database_url, command="serve", PERDURE_APPLICATION_VERSION="2",
            PERDURE_ADMIN_ADDRESS=f"127.0.0.1:{admin_port}", **shared,
        )  # fmt: skip
        for server in (one, two):
            stack.callback(server.__exit__)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ServerProcess.start, (one, two)))
        stubs = [stack.enter_context(Rpc(server.address)) for server in (one, two)]
        admin = stack.enter_context(Client(f"127.0.0.1:{admin_port}"))
        yield Versions(database_url, one, two, *stubs, admin)


def took(rpc: Rpc, run_id: str) -> set[str]:
    """Returns the executors that took a run that has ended."""
    changes = [event.state_changed for event in only(rpc.events(run_id), "state_changed")]
    return {change.executor_id for change in changes if change.executor_id}


def test_each_version_runs_what_was_started_at_its_own_servers(versions: Versions) -> None:
    first = versions.at_1.start("listener")
    second = versions.at_2.start("listener")
    counted = [rpc.start("counter", {"steps": 2}) for rpc in (versions.at_1, versions.at_2)]
    for run_id in (first, second):
        versions.at_2.until(run_id, "AWAITING_INPUT")
    assert versions.stranded() == {}
    # Each is answered at the other one's server: the wake puts a parked run back for executors of its version.
    versions.at_2.signal(first, "hello")
    versions.at_1.signal(second, "hello")
    for version, runs in (("1", (first, counted[0])), ("2", (second, counted[1]))):
        for run_id in runs:
            assert state_of(versions.at_2.end_of(run_id)) == "SUCCEEDED"
            assert took(versions.at_2, run_id) <= versions.executors_of(version)


def test_runs_of_a_version_that_is_gone_are_stranded_until_it_is_back_or_they_are_forked(versions: Versions) -> None:
    working, moved = (versions.at_1.start("counter", {"steps": STEPS, "delay_s": 0.2}) for _ in range(2))
    waiting = versions.at_1.start("listener")
    versions.at_1.until(waiting, "AWAITING_INPUT")
    for run_id in (working, moved):
        eventually(lambda run_id=run_id: len(effects(versions.url, run_id)) >= 3)
    versions.one.kill()

    def listed() -> dict[str, Any]:
        found = versions.stranded()
        assert set(found) == {working, moved, waiting}
        assert {found[name].state for name in (working, moved)} == {"QUEUED"}
        return found

    stranded = eventually(listed, TAKE_BACK_S, what="they are given back, and nobody may take them")
    assert {run.reason for run in stranded.values()} == {StrandedReason.NO_EXECUTOR_OF_VERSION}
    assert {run.application_version for run in stranded.values()} == {"1"}
    assert state_of(versions.at_2.end_of(versions.at_2.start("counter", {"steps": 1}))) == "SUCCEEDED"
    assert set(versions.stranded()) == set(stranded), "the server of version 2 has slots, and leaves them alone"

    for version, expected in (("2", "3 runs are stranded"), ("1", "")):
        lines: list[str] = []
        settings = load_settings(database_url=versions.url, application_version=version)
        assert app.check(settings, lines.append), "it keeps no server from serving"
        assert any(expected and expected in line and "`perdure stranded`" in line for line in lines) is bool(expected)

    serve, cancel, fork = re.findall("`(.+?)`", stranded[moved].advice)[:3]
    versions.command(cancel)
    forked = versions.command(fork)["run_id"]
    assert versions.at_2.output_of(forked) == {"total": sum(range(STEPS))}
    assert took(versions.at_2, forked) <= versions.executors_of("2")
    done = effects(versions.url, moved) + effects(versions.url, forked)
    assert STEPS <= len(done) <= STEPS + 1, "what was recorded is not done again"
    assert set(versions.stranded()) == {working, waiting}

    setting, *rest = shlex.split(serve)
    assert rest == ["perdure-server", "serve"]
    name, _, value = setting.partition("=")
    versions.one.start(**{name: value})
    versions.at_2.signal(waiting, "hello")
    assert versions.at_2.output_of(waiting) == ["hello"]
    assert versions.at_2.output_of(working) == {"total": sum(range(STEPS))}
    for run_id in (working, waiting):
        assert took(versions.at_2, run_id) <= versions.executors_of("1")
        judge.assert_consistent(versions.url, f"default.{run_id}.r")
    assert versions.stranded() == {}
