"""Asynchronous agents need no thread for what need not block, and read what is recorded once; replays stay right."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from perdure_service.domain.runs import RunKey, RunState
from perdure_service.durable import hops, plain_steps, replay, runtime, steps
from perdure_service.durable.requests import ForkCommand
from perdure_service.durable.service import RunService
from perdure_service.durable.system_database import PerdureSystemDatabase
from perdure_service.store import recordings
from perdure_service.store.engine import create_engine
from perdure_service.testing import BlockingHarness, BlockingRun, RunFailed

from tests.helpers import hop_agents
from tests.helpers.databases import DatabaseServer
from tests.helpers.waiting import scaled

WIDTH = 5
TOTAL = WIDTH**2 + sum(number**2 for number in range(WIDTH)) + 1 + 100**2
STEPS = 1 + WIDTH + 2

COMMITS = {"_record", "record_step_result", "observed"}
"""The stages that commit something: they need a thread when no batch takes it."""


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    with BlockingHarness(
        ["tests.helpers.hop_agents"], database_url=database_server.url, timeout_s=scaled(15)
    ) as harness:
        yield harness


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of DBOS's that are run in a thread."""
    names: list[str] = []
    known = {*hops.stages(), replay.stage(), plain_steps._record.__code__}
    plain = asyncio.to_thread

    async def to_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        if getattr(function, "__code__", None) in known:
            names.append(function.__name__)
        return await plain(function, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    return names


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The pages of recordings that are read: of which workflow, after which number."""
    read: list[tuple[str, int]] = []
    plain = PerdureSystemDatabase._read_page

    def noted(database: PerdureSystemDatabase, workflow_id: str, after: int) -> recordings.Page:
        read.append((workflow_id, after))
        return plain(database, workflow_id, after)

    monkeypatch.setattr(PerdureSystemDatabase, "_read_page", noted)
    return read


def bodies_of(run: BlockingRun) -> dict[str, int]:
    """Returns how often each body of a run ran."""
    prefix = f"{run.run.key.workflow_id} "
    return {key.removeprefix(prefix): n for key, n in hop_agents.bodies.items() if key.startswith(prefix)}


def test_a_plain_run_of_plain_steps_takes_nothing_of_dboss_way_and_another_one_does(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for module, name in ((steps, "_dbos_invoke_step"), (runtime, "_plain_execute_async")):
        plain = getattr(module, name)

        def noted(*arguments: Any, plain: Any = plain, name: str = name, **rest: Any) -> Any:
            taken.append(name)
            return plain(*arguments, **rest)

        monkeypatch.setattr(module, name, noted)
    assert harness.start("hop-pair").result() is not None
    assert taken == []
    harness.start("hop-retries").result()
    assert taken == ["_dbos_invoke_step"]


def test_a_run_that_begins_here_reads_nothing_and_checks_nothing_in_a_thread(
    harness: BlockingHarness, in_threads: list[str], pages: list[tuple[str, int]]
) -> None:
    run = harness.start("hop-pair")
    assert run.result() == 5
    assert not pages
    assert set(in_threads) <= COMMITS


def test_bodies_run_on_the_loop_and_so_do_failures(harness: BlockingHarness, in_threads: list[str]) -> None:
    hop_agents.threads.clear()
    with pytest.raises(RunFailed, match="has no square here"):
        harness.start("hop-failing").result()
    assert len(hop_agents.threads) == 1
    assert threading.get_ident() not in hop_agents.threads
    assert set(in_threads) <= COMMITS


def test_the_run_of_a_killed_engine_reads_its_recording_once_and_does_nothing_twice(
    harness: BlockingHarness, pages: list[tuple[str, int]]
) -> None:
    harness.crash_after_step("hop-gather", 1 + WIDTH + 1)
    run = harness.start("hop-gather", {"width": WIDTH})
    assert run.result() == TOTAL
    assert bodies_of(run) == {str(number): 1 for number in {WIDTH, *range(WIDTH), -1, 100}}
    assert pages == [(run.run.key.workflow_id, 0)]
    assert [step.step_id for step in run.steps()] == list(range(1, STEPS + 1))


def test_a_recording_of_many_pages_is_read_page_by_page(
    harness: BlockingHarness, monkeypatch: pytest.MonkeyPatch, pages: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(recordings, "PAGE_ROWS", 2)
    # After the step behind those at once: of those, some may have run and not be recorded when another one is.
    harness.crash_after_step("hop-gather", 1 + WIDTH + 1)
    run = harness.start("hop-gather", {"width": WIDTH})
    assert run.result() == TOTAL
    assert all(times == 1 for times in bodies_of(run).values())
    assert [after for _, after in pages] == sorted({after for _, after in pages}), "each page once, in order"
    assert len(pages) > 2


def test_a_fork_replays_what_it_took_over_from_one_page_and_runs_the_rest(
    harness: BlockingHarness, pages: list[tuple[str, int]]
) -> None:
    origin = harness.start("hop-gather", {"width": WIDTH})
    assert origin.result() == TOTAL
    command = ForkCommand("default", origin.id, "fork it", "test", from_step_id=1 + WIDTH + 1)

    async def fork_and_wait(service: RunService) -> tuple[str, str | None, RunState]:
        made, _ = await service.fork(command)
        ended, _ = await service.wait("default", made.key.run_id, full=True, timeout_s=scaled(15))
        return made.key.workflow_id, ended.output_json, ended.state

    workflow_id, output, state = harness.harness.wait(harness.harness.call(fork_and_wait))
    assert (output, state) == (str(TOTAL), RunState.SUCCEEDED)
    ran = {key.rpartition(" ")[2] for key in hop_agents.bodies if key.startswith(f"{workflow_id} ")}
    assert ran == {"-1", "100"}
    assert pages == [(workflow_id, 0)]


@pytest.fixture(scope="module")
def engine(dialect_url: str) -> Iterator[sa.Engine]:
    engine = create_engine(dialect_url, pool_size=5, statement_timeout=timedelta(seconds=10))
    yield engine
    engine.dispose()


def test_a_page_is_bounded_in_rows_and_bytes_and_says_whether_it_is_the_last(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = RunKey.of_api(f"pages-{engine.dialect.driver}-{engine.dialect.name}"[:32], "r").workflow_id

    def read(after: int) -> tuple[list[int], bool]:
        with engine.begin() as conn:
            page = recordings.read(conn, workflow_id, after)
        return [one.function_id for one in page.operations], page.last

    assert read(0) == ([], True)
    with engine.begin() as conn:
        conn.execute(
            sa.text("INSERT INTO dbos.workflow_status (workflow_uuid, status, name) VALUES (:id, 'PENDING', 'x')"),
            {"id": workflow_id},
        )
        conn.execute(
            sa.text(
                "INSERT INTO dbos.operation_outputs (workflow_uuid, function_id, function_name, output, error) "
                "SELECT :id, n, 'step', CASE WHEN n = 9 THEN NULL ELSE repeat('x', 100) END, "
                "CASE WHEN n = 9 THEN repeat('e', 1000) END FROM generate_series(1, 10) AS n"
            ),
            {"id": workflow_id},
        )
    assert read(0) == (list(range(1, 11)), True)
    monkeypatch.setattr(recordings, "PAGE_ROWS", 5)
    assert read(0) == ([1, 2, 3, 4, 5], False)
    assert read(5) == ([6, 7, 8, 9, 10], False), "nobody knows whether there are more"
    assert read(6) == ([7, 8, 9, 10], True)
    assert read(10) == ([], True)
    monkeypatch.setattr(recordings, "PAGE_BYTES", 250)
    assert read(0) == ([1, 2, 3], False)
    assert read(7) == ([8, 9], False), "the row that goes beyond is in, the next one is not"
    assert read(8) == ([9], False)
    assert read(9) == ([10], True)
