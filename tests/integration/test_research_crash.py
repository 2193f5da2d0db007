"""The research agent killed between its steps: what was finished, a model's call above all, is not done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from perdure_service.store import documents
from perdure_service.store.engine import create_engine

from tests.helpers import eventually, scaled
from tests.integration.test_research_endpoint import ModelEndpoint, serving

ROOT = Path(__file__).parents[2]
QUESTION = "When do leases expire?"
PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
from datetime import timedelta
from dbos import DBOS, SetWorkflowID
from perdure_service.agents import context, resources
from perdure_service.agents.research import research
from perdure_service.settings import ModelSettings, Settings
from perdure_service.store import documents
from perdure_service.store.engine import create_engine
from tests.integration.test_research import RunDouble

url, endpoint, run_id, die_at, model = sys.argv[1:]
engine = create_engine(url, pool_size=8, statement_timeout=timedelta(seconds=30))
double = RunDouble()
context.bind(lambda: double if DBOS.workflow_id else None)
settings = Settings(model=ModelSettings(base_url=endpoint)) if model else Settings()
resources.bind(resources.Resources(engine, settings))
if die_at == "publish":
    save = documents.save_report
    documents.save_report = lambda *a, **k: (save(*a, **k), os._exit(9))
DBOS(config={{
    "name": "crash-tests", "system_database_engine": engine, "system_database_url": url,
    "application_version": "1", "executor_id": "crash", "log_level": "ERROR",
}})
DBOS.launch()
with SetWorkflowID(run_id):
    handle = DBOS.start_workflow(research, request={{"question": {question!r}}})
print(handle.get_result()["report_id"], flush=True)
DBOS.destroy()
"""


@pytest.fixture
def engine(database_url: str, tmp_path: Path) -> Iterator[sa.Engine]:
    engine = create_engine(database_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    (tmp_path / "leases.md").write_text("# Leases\n\nLeases expire after fifteen seconds.", encoding="utf-8")
    documents.load_folder(engine, tmp_path, lambda _: None)
    yield engine
    engine.dispose()


@pytest.fixture
def endpoint() -> Iterator[ModelEndpoint]:
    with serving() as endpoint:
        yield endpoint


@contextmanager
def executor(url: str, endpoint: ModelEndpoint, run_id: str, die_at: str = "", model: str = "yes") -> Iterator[
    subprocess.Popen[str]
]:  # fmt: skip
    program = PROGRAM.format(root=str(ROOT), question=QUESTION)
    process = subprocess.Popen(
        [sys.executable, "-c", program, url, endpoint.url, run_id, die_at, model],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def recorded(engine: sa.Engine, run_id: str) -> set[str]:
    query = sa.text("SELECT function_name FROM dbos.operation_outputs WHERE workflow_uuid = :id")
    with engine.connect() as connection:
        return set(connection.execute(query, {"id": run_id}).scalars())


def approve(engine: sa.Engine, database_url: str, run_id: str) -> None:
    from dbos import DBOSClient

    client = DBOSClient(system_database_url=database_url, system_database_engine=engine)
    client.send(run_id, {"approve": True, "by": "ann"}, topic="approval")
    client.destroy()


def published(engine: sa.Engine, run_id: str) -> list[str]:
    query = sa.text("SELECT report_id FROM perdure.report WHERE workflow_id = :id")
    with engine.connect() as connection:
        return list(connection.execute(query, {"id": run_id}).scalars())


@pytest.mark.parametrize("model_afterwards", ["yes", ""], ids=["same settings", "no model any more"])
def test_a_finished_model_call_is_not_repeated_after_a_kill(
    engine: sa.Engine, database_url: str, endpoint: ModelEndpoint, model_afterwards: str
) -> None:
    run_id = f"killed-{model_afterwards or 'no'}"
    with executor(database_url, endpoint, run_id) as first:
        eventually(lambda: "research.write" in recorded(engine, run_id), timeout=30)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert len(endpoint.calls) == 1
    approve(engine, database_url, run_id)
    with executor(database_url, endpoint, run_id, model=model_afterwards) as second:
        said, _ = second.communicate(timeout=scaled(60))
    assert said.split() == published(engine, run_id)
    assert len(endpoint.calls) == 1


def test_a_kill_between_saving_and_its_checkpoint_leaves_one_report(
    engine: sa.Engine, database_url: str, endpoint: ModelEndpoint
) -> None:
    run_id = "killed-publishing"
    with executor(database_url, endpoint, run_id, die_at="publish") as first:
        eventually(lambda: "research.write" in recorded(engine, run_id), timeout=30)
        approve(engine, database_url, run_id)
        assert first.wait(timeout=scaled(30)) == 9
    assert "research.publish" not in recorded(engine, run_id)
    before = published(engine, run_id)
    assert len(before) == 1
    with executor(database_url, endpoint, run_id) as second:
        said, _ = second.communicate(timeout=scaled(60))
    assert said.split() == published(engine, run_id) == before
    assert len(endpoint.calls) == 1
