"""The beginning and the end of an asynchronous agent's run, done by us as DBOS does them: without its stages between.

DBOS finds a workflow's code and input by its row, makes a context, and runs the code as stages (`dbos._outcome`), each
of which is a coroutine around the next one. Of a row as the service writes it (`_is_plain_row`), and of code that
declares nothing unusual to DBOS (`_is_plain_code`), nearly nothing of that has anything to do. `run` runs such code;
what comes after it, the outcome's serialization, its record, and who adopts another one's outcome, stays DBOS's own
stage. `begin` makes its task. All other workflows go DBOS's way. Contract tests compare with what DBOS does.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dbos import _core, _workflow_commands
from dbos._context import DBOSContext, EnterDBOSWorkflow, SetWorkflowID
from dbos._event_loop import retrieve_future_exception
from dbos._outcome import DeferredResult
from dbos._registrations import get_class_info_for_func, get_dbos_func_name, get_func_info
from dbos._serialization import DBOSPortableJSON, WorkflowSerializationFormat, deserialize_args
from dbos._tracer import dbos_tracer

from perdure_service.durable import hops
from perdure_service.durable.executions import Execution

NOT_PLAIN = ("class_name", "config_name", "authenticated_user", "authenticated_roles", "attributes", "shard_key",
             "queue_partition_key")  # fmt: skip
"""What a plain row has none of."""

FIRST_ATTEMPTS = 1
"""Attempts of a run that has just begun; DBOS compares more of them with its limit."""


def begin(dbos: Any, status: Mapping[str, Any], owner_xid: str) -> bool:
    """Begins a run that is committed as ours, on the agents' loop; returns False when DBOS must begin it.

    Args:
        dbos: DBOS's instance.
        status: DBOS's row.
        owner_xid: The token of its execution.

    Raises:
        RuntimeError: There is no loop to begin on.
    """
    workflow = dbos._registry.workflow_info_map.get(status["name"])
    if workflow is None or status["status"] != "PENDING" or not _is_plain_row(status) or not _begins_plainly(workflow):
        return False
    if (status["recovery_attempts"] or 0) > FIRST_ATTEMPTS:
        return False
    inputs = deserialize_args(status["inputs"], status["serialization"], dbos._serializer)
    with SetWorkflowID(status["workflow_uuid"]):
        context = DBOSContext.create_start_workflow_child(None)
    context.owner_xid = owner_xid
    context.serialization_type = WorkflowSerializationFormat.PORTABLE
    context.workflow_deadline_epoch_ms = status["workflow_deadline_epoch_ms"]
    loop = dbos._background_event_loop.target_loop()
    if loop is None:
        raise RuntimeError("there is no loop to begin on")
    code, args, kwargs = workflow.__orig_func, inputs["args"], inputs["kwargs"]

    def create_task() -> None:
        task = loop.create_task(
            _core._execute_workflow_async(dbos, status, code, context, args, kwargs)  # type: ignore[arg-type]
        )
        dbos._workflow_tasks.add(task)
        task.add_done_callback(dbos._workflow_tasks.discard)
        task.add_done_callback(retrieve_future_exception)

    hops.calls_into(loop).post(functools.partial(contextvars.copy_context().run, create_task))
    return True


def is_plain(status: Mapping[str, Any], code: Callable[..., Any]) -> bool:
    """Returns whether an asynchronous workflow is one that `run` runs."""
    return _is_plain_row(status) and _is_plain_code(code)


async def run(
    dbos: Any,
    status: Mapping[str, Any],
    code: Callable[..., Any],
    context: DBOSContext,
    args: Any,
    kwargs: Any,
    execution: Execution | None,
) -> Any:
    """Returns or raises what a workflow does. Arguments as of DBOS's `_execute_workflow_async`, and its execution."""
    workflow_id, queue = status["workflow_uuid"], status["queue_name"]
    told: Any = {"name": get_dbos_func_name(code), "operationType": "workflow", "queueName": queue}
    with EnterDBOSWorkflow(told, context):
        entry = dbos._active_workflows_set.add(workflow_id, queue, None)
        try:
            persist = _core._get_wf_invoke_func(dbos, status, entry.release)  # type: ignore[arg-type]
            result = await _ended(dbos, context, persist, functools.partial(code, *args, **kwargs), execution)
            if isinstance(result, DeferredResult):
                result = await result.resolve_async()
            return result
        except Exception as error:
            dbos.logger.error("Exception encountered in asynchronous workflow:", exc_info=error)
            raise
        finally:
            entry.release()


async def _ended(
    dbos: Any,
    context: DBOSContext,
    persist: Callable[[Callable[[], Any]], Any],
    call: Callable[[], Any],
    execution: Execution | None = None,
) -> Any:
    """Runs the code, and DBOS's last stage with what it did; as in DBOS, also with what the stage itself raises."""
    try:
        try:
            output = await _without_checkpoints(dbos, context, call)
        except asyncio.CancelledError:
            raise
        except BaseException:
            await _catch_up(dbos, execution)
            raise
        await _catch_up(dbos, execution)
        return await hops.answer(persist, lambda: output)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - raised by the stage
        failed = error

    try:
        # By itself, not by this frame: the stage may run again when nobody waits for it any more.
        return await hops.answer(persist, functools.partial(_fail, failed))
    finally:
        del failed  # or its traceback would keep it, and this frame, until the collector comes


async def _catch_up(dbos: Any, execution: Execution | None) -> None:
    """Waits for the commit that code which has ended was ahead of, unless its end can go with that."""
    if execution is not None and execution.ahead is not None and not dbos._sys_db.checkpoints.may_join(execution):
        await execution.settled()


def _fail(error: BaseException) -> Any:
    raise error


async def _without_checkpoints(dbos: Any, context: DBOSContext, call: Callable[[], Any]) -> Any:
    """Runs the code, and drops the checkpoints of its data sources when it is over, if it used some."""
    try:
        output = await call()
    except Exception:
        if context.used_datasources:
            await _workflow_commands.delete_completed_datasource_checkpoints_async(dbos, context)
        raise
    if context.used_datasources:
        await _workflow_commands.delete_completed_datasource_checkpoints_async(dbos, context)
    return output


def _is_plain_row(status: Mapping[str, Any]) -> bool:
    return (
        dbos_tracer.disable_otlp
        and status["serialization"] == DBOSPortableJSON.name()
        and not any(map(status.get, NOT_PLAIN))
    )


@functools.lru_cache(maxsize=1_024)  # code is registered once, and stays
def _is_plain_code(code: Callable[..., Any]) -> bool:
    """Returns whether a workflow's function needs no role, belongs to no class, and is asynchronous."""
    info = get_func_info(code)
    return (
        inspect.iscoroutinefunction(code)
        and info is not None
        and not info.required_roles
        and get_class_info_for_func(info) is None
    )


@functools.lru_cache(maxsize=1_024)
def _begins_plainly(workflow: Callable[..., Any]) -> bool:
    """Returns whether DBOS would give a registered workflow's code its arguments as they are stored."""
    info = get_func_info(workflow)
    return (
        info is not None
        and info.validate_args is None
        and not getattr(workflow, "__annotations__", None)
        and _is_plain_code(workflow.__orig_func)  # type: ignore[attr-defined]
    )
