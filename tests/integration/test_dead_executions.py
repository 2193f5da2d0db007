"""A dead execution is stopped at its next call of the engine, whatever its code catches; nothing of it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from dbos._dbos import _get_dbos_instance
from perdure_service.durable.system_database import PerdureSystemDatabase
from perdure_service.testing import BlockingHarness

from tests.helpers import dead_agents, rows
from tests.helpers.databases import DatabaseServer
from tests.helpers.waiting import eventually, scaled

ROWS = {**rows.OF_CODE, "perdure.run_event": "workflow_id"}
"""Where an execution could leave something, and by which column."""


ENDED: list[str] = []
"""The workflows whose code has ended, and what it returned has been refused, or written."""


@pytest.fixture(scope="module")
def harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    write = PerdureSystemDatabase.update_workflow_outcome

    def noted(database: PerdureSystemDatabase, workflow_id: str, *arguments: Any, **rest: Any) -> bool:
        landed = write(database, workflow_id, *arguments, **rest)
        ENDED.append(workflow_id)
        return landed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerdureSystemDatabase, "update_workflow_outcome", noted)
        yield from _harness(database_server)


def _harness(database_server: DatabaseServer) -> Iterator[BlockingHarness]:
    with BlockingHarness(
        ["tests.helpers.dead_agents"], database_url=database_server.url, timeout_s=scaled(15)
    ) as harness:
        yield harness


@pytest.mark.parametrize("what", [*dead_agents.CALLS, "get_result"])
def test_a_dead_execution_cannot_go_on(harness: BlockingHarness, what: str) -> None:
    dead_agents.DONE.clear()
    run_id = f"dead-{what.replace(' ', '-').replace('_', '-')}"
    harness.start("dead-man", {"what": what}, run_id=run_id)
    refused = eventually(lambda: len(found := dead_agents.REFUSED.get(run_id, [])) == 3 and found, 10)
    workflow_id = f"default.{run_id}.r"
    eventually(lambda: workflow_id in ENDED, what="DBOS has been given the end of its code, and refused it")
    assert "nothing" not in refused, refused
    assert refused[-1] == "DBOSWorkflowConflictIDError", "each call of it is refused, also the last"
    assert dead_agents.DONE == [], "no body began"
    engine = harness.harness._engine.database  # type: ignore[union-attr]
    found = rows.counted(engine, workflow_id, ROWS)
    assert found == {
        **dict.fromkeys(ROWS, 0),
        "dbos.operation_outputs": 1 if what == "get_result" else 0,
        "perdure.run_event": 2 if what == "get_result" else 1,
    }


def test_a_step_that_a_dead_execution_has_left_behind_records_nothing(harness: BlockingHarness) -> None:
    workflow_id = "default.leaves-behind.r"
    harness.start("leaves-behind", run_id="leaves-behind")
    executions = _get_dbos_instance()._sys_db.executions
    eventually(lambda: workflow_id in ENDED and not executions.of(workflow_id), what="it has left")
    engine = harness.harness._engine.database  # type: ignore[union-attr]
    before = rows.counted(engine, workflow_id, ROWS)
    dead_agents.MAY_END.set()
    eventually(lambda: len(dead_agents.LEFT_BEHIND) == 1)
    assert dead_agents.LEFT_BEHIND == ["DBOSWorkflowConflictIDError"]
    assert rows.counted(engine, workflow_id, ROWS) == before, "although its token is still good"
