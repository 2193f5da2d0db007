"""Decides when a run that waits leaves memory, and makes every durable wait one that it can be parked on.

A run is parked when nothing of it has moved for `park_after` and all that its code does is rest in durable waits: for
a signal, an approval, the result of another run, the time (a sleep, at once if it is longer than that). Its execution
is marked dead, its code ends with `Parked`, and whoever wakes the run has it replayed to where it was. Several waits at
once are parked on together; any of them wakes it.

**Nothing is lost between the two.** The mark in memory comes first (`Execution.park`): from then on nothing of the
execution begins, and nothing of it was in progress. Then one transaction of the run's owner locks the status row,
writes DELAYED and the marks, and in a later statement looks whether what it waits for has come: if so, the same
transaction puts the run back into its queue. A waker makes its fact durable first (the message, the decision, the end
of the child), then locks the row, then looks for the marks. So whoever locks later sees what the other has written.
If we die before the COMMIT, the run is an orphan like any other. If the reply to COMMIT is lost, the repeat finds a row
that is not ours any more, and leaves it. If the transaction fails for good, the row says that it runs here, which it
does not: `owners` gives it back.

**`Parked` never crosses a handle.** Where a child runs within its parent's task or thread, it becomes a wait for the
child's row; where it runs in its own, the handle gets DBOS's `DBOSWorkflowCancelledError`, by which it turns to the
row, too.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import sqlalchemy as sa
import structlog
from dbos import DBOS, _core, _dbos
from dbos._context import get_local_dbos_context, snapshot_step_context
from dbos._outcome import DeferredResult, NoResult
from dbos._utils import LoopAwareEvent

from perdure_service.domain.events import EventKind
from perdure_service.domain.runs import WAITING_APPROVAL, WAITING_SIGNAL, RunState
from perdure_service.durable.executions import Execution, Wait
from perdure_service.durable.hops import in_few_threads
from perdure_service.durable.operation import Operation
from perdure_service.durable.status_changes import StatusDatabase
from perdure_service.durable.substitutes import substitute
from perdure_service.durable.waits import STOP_POLL_S, Waits
from perdure_service.store import parked, runs
from perdure_service.store.dbos_tables import NULL_TOPIC
from perdure_service.store.tailer import HINTED_POLL_FACTOR

log = structlog.get_logger()

LEAST_LOOK_S = 0.05
MOST_LOOK_S = 1.0
"""How often a wait looks whether its run may be parked: a quarter of `park_after`, in these bounds."""

RESULT_RECHECK_S = 60.0
"""How often a wait for a child that runs here looks by itself; the child's end wakes it."""


class WaitingDatabase(StatusDatabase):
    """See the module."""

    def __init__(self, *, park_after_s: float, waits: Waits, **arguments: Any) -> None:
        """Creates it; `park_after_s` as in the settings, seconds."""
        super().__init__(**arguments)
        self.waits = waits
        waits.bind(self.notifications_map, self.workflow_events_map, self.streams_map)
        self._park_after_s = park_after_s
        self._look_s = min(MOST_LOOK_S, max(LEAST_LOOK_S, park_after_s / 4))
        self._signalled = threading.Event()

    # ---- parking -----------------------------------------------------------------------------------------------------

    def _leave(self, execution: Execution, waits: list[Wait]) -> None:
        """Parks the run of an execution that has been marked. Blocks, and raises nothing: its code ends either way."""
        workflow_id = execution.key.workflow_id
        marks = sorted({mark for wait in waits for mark in wait.marks})
        deadlines = [wait.deadline for wait in waits if wait.deadline is not None]
        operation = Operation(execution)

        def finish(conn: sa.Connection) -> None:
            row = parked.lock(conn, workflow_id)
            if row != parked.Row("PENDING", execution.owner_xid):
                return  # taken away; or an attempt whose reply was lost has parked it
            remaining_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            parked.park(conn, workflow_id, marks, remaining_s)
            state, told = execution.state, execution.told
            if told.get("waiting_for") == WAITING_APPROVAL and runs.waits_for(conn, workflow_id)[0] is None:
                state, told = RunState.RUNNING, {}  # whoever has just decided has told of it
            data = {"from": state.value, "to": state.value, **told, "parked": True}
            operation.add(workflow_id, execution.event(EventKind.STATE_CHANGED, data))
            if parked.has_come(conn, [workflow_id]):
                before = {workflow_id: (state, execution.number)}
                self.release(conn, [workflow_id], operation, "what it waited for is there", before)

        operation.finish = finish
        try:
            self.run_operation(operation)
        except Exception as error:  # noqa: BLE001 - logged; whoever looks for runs that nobody executes finds it
            log.error("run.park_failed", workflow_id=workflow_id, error=type(error).__name__)
        finally:
            self.executions.end_waits(execution)

    def _next_look_s(self, execution: Execution) -> tuple[float, list[Wait]]:
        """Returns when to look again, and on what to park the run: nothing, if it is not to be parked now."""
        due_s = execution.parkable_in(self._park_after_s)
        if due_s is None:
            return self._look_s, []
        return max(due_s, 0.01), execution.park(self._park_after_s)

    def nap(self, execution: Execution | None, wait: Wait, seconds: float) -> None:
        """Waits until the wait's event is set, for some seconds at most, and parks the run when it may. Blocks.

        Raises:
            Parked: The run was parked.
        """
        if execution is None:
            wait.event.wait(max(0.0, seconds))
            return
        until = time.monotonic() + seconds
        with execution.resting(wait):
            while not wait.event.is_set() and (left_s := until - time.monotonic()) > 0:
                look_s, waits = self._next_look_s(execution)
                if waits:
                    self._leave(execution, waits)
                else:
                    wait.event.wait(min(left_s, look_s))

    async def nap_async(self, execution: Execution | None, wait: Wait, seconds: float) -> None:
        """Does the same without a thread."""
        until = time.monotonic() + seconds
        if execution is None:
            while not wait.event.is_set() and (left_s := until - time.monotonic()) > 0:
                await wait.event.wait_async(timeout=left_s)
            return
        with execution.resting(wait):
            while not wait.event.is_set() and (left_s := until - time.monotonic()) > 0:
                look_s, waits = self._next_look_s(execution)
                if waits:
                    await in_few_threads(self._leave, execution, waits)
                else:
                    await wait.event.wait_async(timeout=min(left_s, look_s))

    # ---- the waits ---------------------------------------------------------------------------------------------------

    def _notification_listener(self) -> None:
        self.waits.run(lambda: self._run_background_processes)

    def _signal_notification(self, channel: str, payload: str) -> None:
        super()._signal_notification(channel, payload)
        self._signalled.set()

    def run_notifier(self) -> None:
        """Tells DBOS's clients elsewhere of events and streams, soon after there is something to tell.

        DBOS looks a hundred times a second whether there is: a third of the CPU of a server that has nothing to do.
        """
        if not self.use_listen_notify:
            return
        while self._run_background_processes:
            if self._signalled.wait(STOP_POLL_S):
                self._signalled.clear()  # first: what is signalled from here on is for the next round, or for this one
                time.sleep(self._notification_coalesce_sec)
                self._flush_notifications()  # raises nothing: what cannot be sent it logs and drops
        self._flush_notifications()

    def _result_look_s(self, polling_interval: float) -> float:
        """Returns how often a wait for a result looks by itself, seconds: its end wakes it while hints arrive."""
        return polling_interval * (HINTED_POLL_FACTOR if self.waits.hinted else 1)

    def recv(
        self,
        workflow_uuid: str,
        function_id: int,
        timeout_function_id: int,
        topic: str | None,
        timeout_seconds: float = 60,
    ) -> Any:
        execution = self._execution_here()
        with _working(execution):
            setup = self.recv_setup(workflow_uuid, function_id, timeout_function_id, topic, timeout_seconds)
            if setup[0]:
                return setup[1]
            _, event, left_s, payload, start_time = setup
            deadline = time.monotonic() + left_s
            wait = Wait(_signal_marks(topic), deadline, event=event)
            look, told = event.is_set(), False
            try:
                while not (look and self._has_come(execution, workflow_uuid, topic, event)):
                    if (left_s := deadline - time.monotonic()) <= 0:
                        break
                    told = told or _tell_of_wait(execution, topic)
                    self.nap(execution, wait, min(left_s, self._event_recheck_interval()))
                    look = True
                return self.recv_consume(workflow_uuid, function_id, topic, start_time)
            finally:
                self.notifications_map.pop(payload, event)

    async def recv_async(
        self,
        workflow_uuid: str,
        function_id: int,
        timeout_function_id: int,
        topic: str | None,
        timeout_seconds: float = 60,
    ) -> Any:
        execution = self._execution_here()
        with _working(execution):
            setup = await self._run_event_setup_async(
                self.notifications_map,
                self.recv_setup,
                workflow_uuid,
                function_id,
                timeout_function_id,
                topic,
                timeout_seconds,
            )
            if setup[0]:
                return setup[1]
            _, event, left_s, payload, start_time = setup
            deadline = time.monotonic() + left_s
            wait = Wait(_signal_marks(topic), deadline, event=event)
            look, told = event.is_set(), False
            try:
                while not (look and await in_few_threads(self._has_come, execution, workflow_uuid, topic, event)):
                    if (left_s := deadline - time.monotonic()) <= 0:
                        break
                    told = told or _tell_of_wait(execution, topic)
                    await self.nap_async(execution, wait, min(left_s, self._event_recheck_interval()))
                    look = True
                return await in_few_threads(self.recv_consume, workflow_uuid, function_id, topic, start_time)
            finally:
                self.notifications_map.pop(payload, event)

    def _has_come(
        self, execution: Execution | None, workflow_uuid: str, topic: str | None, event: LoopAwareEvent
    ) -> bool:
        """Returns whether there is the message that a wait was woken for; else it may be woken again.

        What woke it may have been a late hint of a message that the wait before it has taken, or the end of an older
        execution of the run.
        """
        event.clear()  # before it looks: what comes from here on wakes it again
        if execution is not None and execution.dead:
            self.refuse_dead(execution)
        found = LoopAwareEvent()
        self.recv_check(workflow_uuid, topic, found)
        return found.is_set()

    def sleep(self, execution: Execution | None, seconds: float) -> None:
        """Sleeps what is left of a sleep that is recorded. Blocks."""
        wait = Wait((parked.SLEEP,), time.monotonic() + seconds, at_once=True)
        with _working(execution):
            self.nap(execution, wait, seconds)
            if execution is not None and execution.dead:
                self.refuse_dead(execution)

    async def sleep_async(self, execution: Execution | None, seconds: float) -> None:
        """Does the same without a thread."""
        wait = Wait((parked.SLEEP,), time.monotonic() + seconds, at_once=True)
        with _working(execution):
            await self.nap_async(execution, wait, seconds)
            if execution is not None and execution.dead:
                self.refuse_dead(execution)

    def await_workflow_result(self, workflow_id: str, polling_interval: float, *, fail_if_missing: bool = False) -> Any:
        execution = self._who_waits_for(workflow_id)
        if execution is None:
            return super().await_workflow_result(workflow_id, polling_interval, fail_if_missing=fail_if_missing)
        return self._result_for(execution, workflow_id, polling_interval)

    async def await_workflow_result_async(
        self, workflow_id: str, polling_interval: float, *, fail_if_missing: bool = False
    ) -> Any:
        execution = self._who_waits_for(workflow_id)
        if execution is None:
            return await super().await_workflow_result_async(
                workflow_id, polling_interval, fail_if_missing=fail_if_missing
            )
        return await self._result_for_async(execution, workflow_id, polling_interval)

    def await_first_workflow_id(self, workflow_ids: list[str], polling_interval: float) -> str:
        execution = self._execution_here()
        wait = Wait(tuple(parked.RESULT + one for one in workflow_ids))
        with self.waits.for_results(workflow_ids, wait), _working(execution):
            while isinstance(found := self.check_first_workflow_id(workflow_ids), NoResult):
                self.nap(execution, wait, self._result_look_s(polling_interval))
                self._go_on_waiting(execution, wait)
        return found

    async def await_first_workflow_id_async(self, workflow_ids: list[str], polling_interval: float) -> str:
        execution = self._execution_here()
        wait = Wait(tuple(parked.RESULT + one for one in workflow_ids))
        with self.waits.for_results(workflow_ids, wait), _working(execution):
            while isinstance(found := await in_few_threads(self.check_first_workflow_id, workflow_ids), NoResult):
                await self.nap_async(execution, wait, self._result_look_s(polling_interval))
                self._go_on_waiting(execution, wait)
        return found

    def get_event(self, *arguments: Any, **rest: Any) -> Any:
        with _in_memory(self._execution_here()):  # nothing tells of an event that was set, so nothing would wake it
            return super().get_event(*arguments, **rest)

    async def get_event_async(self, *arguments: Any, **rest: Any) -> Any:
        with _in_memory(self._execution_here()):
            return await super().get_event_async(*arguments, **rest)

    def _who_waits_for(self, workflow_id: str) -> Execution | None:
        """Returns the execution whose code asks for the result of a workflow; None if none does."""
        context = get_local_dbos_context()
        if context is None or context.workflow_id != workflow_id:
            return self._execution_here()
        if context.owner_xid is not None:
            return None  # not its code: an execution that lost its own run waits for the owner's outcome
        # A replay that called a child which has begun before; this is in the child's context already.
        found = self.executions.of(context.parent_workflow_id)
        return found[-1] if found else None

    def _result_for(self, execution: Execution, workflow_id: str, polling_interval: float) -> Any:
        wait = Wait((parked.RESULT + workflow_id,))
        with self.waits.for_results([workflow_id], wait), execution.working():
            while isinstance(result := self.check_workflow_result(workflow_id), NoResult):
                self.nap(execution, wait, self._result_look_s(polling_interval))
                self._go_on_waiting(execution, wait)
        return result

    async def _result_for_async(self, execution: Execution, workflow_id: str, polling_interval: float) -> Any:
        wait = Wait((parked.RESULT + workflow_id,))
        with self.waits.for_results([workflow_id], wait), execution.working():
            while isinstance(result := await in_few_threads(self.check_workflow_result, workflow_id), NoResult):
                await self.nap_async(execution, wait, self._result_look_s(polling_interval))
                self._go_on_waiting(execution, wait)
        return result

    def _go_on_waiting(self, execution: Execution | None, wait: Wait) -> None:
        wait.event.clear()
        if execution is not None:
            self.refuse_dead(execution)

    def result_of_parked_child(self, child: Execution) -> Any:
        """Returns, for the Outcome that ran a child within its parent, the parent's wait for the child's row."""
        parent, workflow_id, interval = child.parent, child.key.workflow_id, _core.DEFAULT_POLLING_INTERVAL
        if parent is None:
            return _core._deferred_workflow_result(_dbos._get_dbos_instance(), workflow_id)
        return DeferredResult(
            lambda: self._result_for(parent, workflow_id, interval),
            lambda: self._result_for_async(parent, workflow_id, interval),
        )

    # ---- children that run here ----------------------------------------------------------------------------------

    def wait_for_future(self, workflow_id: str, future: Any) -> None:
        """Waits until a child that runs in a thread here is done, as the result of its handle would. Blocks."""
        execution = self._execution_here()
        if execution is None or future.done():
            return
        wait = Wait((parked.RESULT + workflow_id,))
        future.add_done_callback(lambda _future: wait.event.set())
        with execution.working():
            while not future.done():
                self.nap(execution, wait, RESULT_RECHECK_S)
                if not future.done():
                    self._go_on_waiting(execution, wait)

    async def wait_for_task(self, workflow_id: str, task: Any) -> None:
        """Waits until a child that runs in a task here is done, as the result of its handle would."""
        execution = self._execution_here()
        if execution is None or task.done():
            return
        wait = Wait((parked.RESULT + workflow_id,))
        task.add_done_callback(lambda _task: wait.event.set())
        with execution.working():
            while not task.done():
                await self.nap_async(execution, wait, RESULT_RECHECK_S)
                if not task.done():
                    self._go_on_waiting(execution, wait)


def _working(execution: Execution | None) -> AbstractContextManager[None]:
    return nullcontext() if execution is None else execution.working()


@contextmanager
def _in_memory(execution: Execution | None) -> Iterator[None]:
    """Surrounds a call of DBOS's that waits, and on which its run is not parked.

    It rests all the same, so that a server that stops hands it over at once. What the call still records after that,
    the owner's fence refuses.
    """
    if execution is None:
        yield
        return
    with execution.working(), execution.resting(Wait(())):
        yield


def _tell_of_wait(execution: Execution | None, topic: str | None) -> bool:
    """Tells that a run waits for a signal, which has been looked for; returns True.

    Not before, and not instead if something has woken the wait by then: that may have been the signal before this one.
    """
    if execution is not None:
        waiting, reason = f"{WAITING_SIGNAL}:{topic or ''}", f"waits for signal {topic or ''}".strip()
        execution.note(execution.moved(RunState.AWAITING_INPUT, reason=reason, waiting_for=waiting))
    return True


def _signal_marks(topic: str | None) -> tuple[str, ...]:
    """Returns the mark of a topic; none for one that a mark cannot hold, whose wait stays in memory."""
    name = NULL_TOPIC if topic is None else topic
    return () if "\n" in name else (parked.SIGNAL + name,)


_plain_future_result = _core.WorkflowHandleFuture._get_result
_plain_task_result = _core.WorkflowHandleAsyncTask._get_result
_plain_asyncio_wait = vars(DBOS)["asyncio_wait"].__func__


def install(database: Callable[[], WaitingDatabase]) -> None:
    """Makes DBOS's sleeps, and its handles of what runs here, wait as this module says.

    Args:
        database: Returns the system database, once there is one.
    """

    def execution_of(context: Any) -> Execution | None:
        return database().executions.find(context.workflow_id, context.owner_xid) if context is not None else None

    def sleep(_cls: Any, seconds: float) -> None:
        _dbos.check_async("sleep")
        if seconds <= 0:
            return
        context = snapshot_step_context()
        left_s = _core.record_sleep(_dbos._get_dbos_instance(), context, seconds)
        database().sleep(execution_of(context), left_s)

    async def sleep_async(cls: Any, seconds: float) -> None:
        if seconds <= 0:
            return
        context = snapshot_step_context()
        await cls._configure_asyncio_thread_pool()
        left_s = await in_few_threads(_core.record_sleep, _dbos._get_dbos_instance(), context, seconds)
        await database().sleep_async(execution_of(context), left_s)

    async def asyncio_wait(cls: Any, fs: Any, **options: Any) -> Any:
        # Its timeout is known to nobody but to this task, so a run that was parked would wait without one.
        limited = options.get("timeout") is not None
        with _in_memory(execution_of(get_local_dbos_context()) if limited else None):
            return await _plain_asyncio_wait(cls, fs, **options)

    def future_result(handle: Any, polling_interval_sec: float) -> Any:
        database().wait_for_future(handle.workflow_id, handle.future)
        return _plain_future_result(handle, polling_interval_sec)

    async def task_result(handle: Any, polling_interval_sec: float) -> Any:
        await database().wait_for_task(handle.workflow_id, handle.task)
        return await _plain_task_result(handle, polling_interval_sec)

    substitute(DBOS, "sleep", classmethod(sleep))
    substitute(DBOS, "sleep_async", classmethod(sleep_async))
    substitute(DBOS, "asyncio_wait", classmethod(asyncio_wait))  # type: ignore[arg-type]
    substitute(_core.WorkflowHandleFuture, "_get_result", future_result)
    substitute(_core.WorkflowHandleAsyncTask, "_get_result", task_result)


def while_working(execution: Execution, call: Callable[[], Any]) -> Any:
    """Makes a call of DBOS's that may be one for a coroutine, with its execution at work until it is over."""
    with execution.working():
        result = call()
    if not inspect.isawaitable(result):
        return result

    async def awaited() -> Any:
        with execution.working():
            return await result

    return awaited()
