"""An execution that was killed is found dead by its own code, for as long as that runs."""

from __future__ import annotations

import gc

import pytest
from dbos._error import DBOSWorkflowConflictIDError
from perdure_service.domain.runs import RunKey
from perdure_service.durable.executions import Execution, Executions
from perdure_service.durable.system_database import PerdureSystemDatabase

KEY = RunKey.of_api("default", "run")


def begun(executions: Executions, token: str = "token") -> Execution:
    return executions.add(Execution(KEY, token, "agent", "1", 1, "0" * 32))


def test_the_code_of_a_killed_execution_finds_it_and_is_refused() -> None:
    executions = Executions()
    execution = begun(executions)
    executions.kill(execution, "its run was taken away")
    found = executions.find(KEY.workflow_id, "token")
    assert found is execution
    with pytest.raises(DBOSWorkflowConflictIDError):
        PerdureSystemDatabase.refuse_dead(found)


def test_a_killed_execution_is_not_counted_nor_owned_any_more() -> None:
    executions = Executions()
    execution = begun(executions)
    assert executions.has(KEY.workflow_id, "token")
    executions.kill(execution, "its run was taken away")
    assert (len(executions), list(executions), executions.of(KEY.workflow_id)) == (0, [], [])
    assert not executions.has(KEY.workflow_id, "token")


def test_a_killed_execution_is_forgotten_when_its_code_has_ended() -> None:
    executions = Executions()
    execution = begun(executions)
    executions.kill(execution, "its run was taken away")
    executions.remove(execution)
    assert executions.find(KEY.workflow_id, "token") is None
    execution = begun(executions, "another")
    executions.kill(execution, "its run was taken away")
    del execution
    gc.collect()
    assert executions.find(KEY.workflow_id, "another") is None, "nobody has it any more"
