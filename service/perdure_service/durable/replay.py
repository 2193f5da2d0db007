"""Replays that do not follow their recording: noticed where DBOS compares the two, and made the run's end.

DBOS compares the name of each operation with the one recorded under its number, and raises an Exception into the
agent's code, which may catch it and go on. Here the execution is *diverged* from then on: the code gets a
BaseException, which `except Exception` does not catch; each further DBOS call raises it again; and however the code
ends, the run fails with `NON_DETERMINISTIC`. What DBOS does not look at, code that ends before it has come to all that
is recorded, is looked for at the end of each execution that may have met something recorded.

Nothing is written that was not before: the outcome goes through the owner's fence like any other, so an execution
that diverged because it is a zombie (its run went on elsewhere, and recorded more) can end nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import CodeType
from typing import Any, Protocol

from dbos import _core
from dbos._context import current_owner_xid, get_local_dbos_context
from dbos._error import DBOSUnexpectedStepError, DBOSWorkflowCancelledError, DBOSWorkflowConflictIDError

from perdure_service.domain.runs import NON_DETERMINISTIC, Failure
from perdure_service.durable.executions import Execution, Executions, Parked
from perdure_service.durable.hops import code_within
from perdure_service.durable.recording import Answer
from perdure_service.durable.substitutes import substitute
from perdure_service.durable.values import MESSAGE_CHARS

WAYS_OUT = (
    "The agent's code was changed under this run, or does not do the same each time. Let runs that are under way keep "
    "the old code (a new version for the new one), guard the change with DBOS.patch, or fork the run from a step "
    "before this one."
)

_plain_get_wf_invoke_func = _core._get_wf_invoke_func


class Recordings(Protocol):
    """Where recordings are read."""

    def read_recording(self, execution: Execution) -> None:
        """Reads the next page of an execution's recording. Blocks."""


class NonDeterministicError(Exception):
    """What a diverged run ends with. For callers of the run it is the failure type `NON_DETERMINISTIC`."""


class ReplayDiverged(BaseException):
    """Raised into the code of a diverged execution; not an Exception, so that it is not taken for a step's failure."""


def unexpected(executions: Executions, error: DBOSUnexpectedStepError) -> BaseException:
    """Marks the execution that met another operation than the recorded one; returns what to raise into its code."""
    workflow_id, step_id, met, recorded = error.inputs
    found = executions.of(workflow_id)
    if not found:
        return error
    return diverge(found[-1], step_id, recorded, f"the replay met {met!r}")


def diverge(execution: Execution, step_id: int, recorded: str, instead: str) -> ReplayDiverged:
    """Marks an execution as diverged, unless it is; returns what to raise into its code.

    Args:
        execution: The execution.
        step_id: Where it left the recording.
        recorded: The name of the operation that is recorded there.
        instead: What happened instead, as the end of a sentence.
    """
    if execution.diverged is None:
        text = f"Step {step_id} is recorded as {recorded!r}, but {instead}. {WAYS_OUT}"
        execution.diverged = Failure(NON_DETERMINISTIC, text, step_name=recorded)
    return ReplayDiverged(execution.diverged.message)


def refuse_diverged(execution: Execution) -> None:
    """Raises in an execution that has diverged."""
    if execution.diverged is not None:
        raise ReplayDiverged(execution.diverged.message)


def install(
    executions: Executions, database: Callable[[], Recordings], result_of_parked: Callable[[Execution], Any]
) -> None:
    """Makes every workflow function end as its replay says.

    Args:
        executions: Where to find the execution that ends.
        database: Returns the system database, once there is one.
        result_of_parked: Returns what stands for the result of an execution that was parked within its parent's code.
    """

    def get_wf_invoke_func(dbos: Any, status: Any, *rest: Any) -> Callable[[Callable[[], Any]], Any]:
        persist = _plain_get_wf_invoke_func(dbos, status, *rest)
        workflow_id = status["workflow_uuid"]

        def judged(function: Callable[[], Any]) -> Any:
            execution = executions.find(workflow_id, current_owner_xid(workflow_id))
            if execution is None:
                return function()
            return _judged(execution, function, database())

        def observed(function: Callable[[], Any]) -> Any:
            try:
                return persisted(function)
            except Parked as parked:
                if parked.execution.key.workflow_id != workflow_id or not parked.execution.inline:
                    raise
                executions.remove(parked.execution)
                return result_of_parked(parked.execution)

        def persisted(function: Callable[[], Any]) -> Any:
            if inspect.iscoroutinefunction(function):
                # An asynchronous workflow that blocking code started; DBOS would see no coroutine function in `judged`.
                return persist(lambda: judged(lambda: dbos._background_event_loop.submit_coroutine(function())))
            return persist(lambda: judged(function))

        return observed

    substitute(_core, "_get_wf_invoke_func", get_wf_invoke_func)


def stage() -> CodeType:
    """Returns the code of the stage of a workflow that `install` has DBOS run when its function has ended."""
    return code_within(install.__code__, "get_wf_invoke_func", "observed")


def _judged(execution: Execution, function: Callable[[], Any], database: Recordings) -> Any:
    """Returns or raises what a workflow function does, if its replay followed the recording."""
    cause: BaseException | None = None
    try:
        result = function()
    except (DBOSWorkflowConflictIDError, DBOSWorkflowCancelledError):
        if execution.parked:
            raise Parked(execution) from None
        raise  # it lost its run, and says nothing about it
    except BaseException as error:  # noqa: BLE001 - raised again below
        cause = error
    if execution.parked:
        raise Parked(execution) from cause  # however its code took it
    if execution.diverged is None and (cause is None or isinstance(cause, Exception)):
        _look_for_more(execution, database, cause)
    if execution.diverged is not None:
        if cause is not None and not isinstance(cause, ReplayDiverged):
            execution.diverged = replace(execution.diverged, cause=f"{type(cause).__name__}: {cause}"[:MESSAGE_CHARS])
        raise NonDeterministicError(execution.diverged.message) from cause
    if cause is not None:
        raise cause
    return result


def _look_for_more(execution: Execution, database: Recordings, cause: BaseException | None) -> None:
    """Marks an execution that ended before it came to all that is recorded."""
    context = get_local_dbos_context()
    replays = execution.number > 1 or execution.followed  # a fork has steps in its first execution
    if not replays or context is None or execution.dead:
        return
    beyond = _recorded_after(database, execution, context.function_id)
    if beyond is not None:
        ended = "ended before it" if cause is None else f"ended before it, with {type(cause).__name__}"
        diverge(execution, beyond[0], beyond[1], f"the agent's code {ended}")


def _recorded_after(database: Recordings, execution: Execution, function_id: int) -> tuple[int, str] | None:
    """Returns number and name of the first operation that is recorded after a number, None if there is none."""
    while (found := execution.recording.next_after(function_id)) is Answer.UNREAD:
        database.read_recording(execution)
    return None if isinstance(found, Answer) else found
