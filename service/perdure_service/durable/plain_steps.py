"""An asynchronous step with none of DBOS's options, run by us as DBOS runs it: the same rows, numbers, errors, replays.

DBOS composes a step of stages, each of which is a coroutine around the next one and a hop to a thread
(`dbos._outcome`). For a step that is not repeated, not preempted and has no timeout they come to three things: look
whether it is recorded, run the body, record what it did. `run` does these one after the other, on the loop as long as
nothing blocks (`hops`). All other steps go DBOS's way. What DBOS does with an error is kept as it is, and contract
tests compare:

* What the body raises is recorded as the step's failure, if it is an Exception; a cancellation says nothing about it.
* So is what recording raises: an output that cannot be serialized, or is too large, is the step's failure. That the
  execution lost its run is raised by the second attempt to record as by the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from dbos._context import DBOSContext, EnterDBOSStepCtx
from dbos._error import DBOSWorkflowCancelledError
from dbos._serialization import deserialize_exception, deserialize_value, serialize_exception, serialize_value
from dbos._sys_db import OperationResultInternal, RecordedResult

from perdure_service.durable import hops
from perdure_service.durable.executions import Execution


def is_plain(options: Mapping[str, Any]) -> bool:
    """Returns whether an asynchronous step is one that `run` runs, by the options that DBOS's `invoke_step` gets."""
    return not options["retries_allowed"] and not options.get("preemptible") and options.get("timeout_seconds") is None


async def run(
    dbos: Any, context: DBOSContext, execution: Execution, name: str, body: Callable[[], Any], began_ms: int
) -> Any:
    """Returns or raises what a step does, or has done before.

    Args:
        dbos: DBOS's instance.
        context: The step's, as DBOS made it when the step was called.
        execution: Whose step it is.
        name: The step's.
        body: Runs it, and returns an awaitable.
        began_ms: When it was called.
    """
    if execution.ahead is not None:
        await execution.settled()
    execution.work()  # from before its check until after its checkpoint: in between its run is not parked
    try:
        with EnterDBOSStepCtx({"name": name, "operationType": "step"}, context):
            recorded = await _recorded(dbos, context, name)
            if recorded is not None:
                return _again(dbos, recorded)
            try:
                output = await body()
                own = asyncio.current_task() is execution.task
                return await hops.answer(_record, dbos, context, name, began_ms, output, None, ahead=own)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # noqa: BLE001 - raised by what records it
                failed = error
            try:
                return await hops.answer(_record, dbos, context, name, began_ms, None, failed)
            finally:
                del failed  # or its traceback would keep it, and this frame, until the collector comes
    finally:
        execution.rest()


async def _recorded(dbos: Any, context: DBOSContext, name: str) -> RecordedResult | None:
    """Returns what is recorded of the step; None if nothing is."""
    check = dbos._sys_db.check_operation_execution
    try:
        with hops.refusing():
            found: RecordedResult | None = check(context.workflow_id, context.function_id, name)
    except hops.NeedsThread:
        found = await asyncio.to_thread(check, context.workflow_id, context.function_id, name)
    return found


def _again(dbos: Any, recorded: RecordedResult) -> Any:
    """Returns or raises what a step has done before."""
    error, output, serialization = recorded["error"], recorded["output"], recorded["serialization"]
    if error is not None:
        raise deserialize_exception(error, serialization, dbos._serializer)
    if output is not None:
        return deserialize_value(output, serialization, dbos._serializer)
    raise Exception("Output and error are both None")  # DBOS's words


def _record(dbos: Any, context: DBOSContext, name: str, began_ms: int, output: Any, error: BaseException | None) -> Any:
    """Records what a step's body did, and returns or raises it. A stage, as `hops.answer` has it."""
    result: OperationResultInternal = {
        "workflow_uuid": context.workflow_id,
        "function_id": context.function_id,
        "function_name": name,
        "output": None,
        "error": None,
        "serialization": None,
        "started_at_epoch_ms": began_ms,
        "child_workflow_id": None,
    }
    if error is None:
        result["output"], result["serialization"] = serialize_value(output, None, dbos._serializer)
    elif isinstance(error, Exception) and not isinstance(error, DBOSWorkflowCancelledError):
        result["error"], result["serialization"] = serialize_exception(error, None, dbos._serializer)
    else:
        raise error  # it says nothing about the step, which the next execution begins again
    dbos._sys_db.record_operation_result(result)
    if error is not None:
        raise error
    return output
