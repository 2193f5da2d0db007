"""WaitRun's contract: the run as it is at its end, or when the time is up; read once, whatever happens meanwhile.

**A run that executes here** has not ended, so nothing is looked at first: the commit that ends it marks the execution
and then tells the tailer. If it went through the checkpoint writer it has returned the run as well, and nothing is
read. **Any other run** is looked at first, and again when the tailer says that it has ended, or is gone.

Register, then look, then wait: whoever ends the run after the look wakes the wait. For a run that executes here the
mark is the look: as it is set before anybody is told, a wait that has registered and does not find it will be told.
What nobody tells (an execution that is taken away, a commit of a foreign client) is found by the tailer's slow poll,
and, should that fail, by a look every `RECHECK_S`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from typing import Protocol

from perdure_service.domain.runs import Run, RunKey
from perdure_service.durable.executions import Execution, Executions, JustEnded
from perdure_service.store.tailer import Tailer

RECHECK_S = 5.0
"""How often a wait looks at the run although nothing woke it."""


class Get(Protocol):
    """Returns a run as it is now, or raises RunNotFound."""

    def __call__(self, namespace: str, run_id: str, *, full: bool) -> Awaitable[Run]:
        """See the class."""


class Waiting:
    """See the module."""

    def __init__(self, get: Get, executions: Executions, tailer: Tailer) -> None:
        """Creates it over what finds runs, what executes here, and what tells of ends."""
        self._get = get
        self._executions = executions
        self._tailer = tailer

    async def wait(self, namespace: str, run_id: str, *, full: bool, timeout_s: float) -> tuple[Run, bool]:
        """Waits for a run's end; returns the run and whether the time was up first.

        Raises:
            RunNotFound: There is no such run, or it was deleted meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        workflow_id = RunKey.of_api(namespace, run_id).workflow_id
        wait = self._tailer.await_end(workflow_id, partial(self._executes, workflow_id))
        try:
            execution: Execution | JustEnded | None = self._going_on(namespace, run_id, workflow_id)
            goes_on = execution is not None
            execution = execution or self._just_ended(namespace, run_id, workflow_id)
            while True:
                left = deadline - time.monotonic()
                if execution is not None and execution.end is not None and not full:
                    return execution.end(), False
                if not goes_on or left <= 0:
                    wait.changed.clear()
                    run = await self._get(namespace, run_id, full=full)
                    if run.state.terminal or left <= 0:
                        return run, not run.state.terminal
                    if run.key.workflow_id != wait.workflow_id:
                        # Not started through the API, so its id is another one. Registered anew, so looked at anew.
                        self._tailer.leave_end(wait)
                        wait = self._tailer.await_end(run.key.workflow_id)
                        continue
                goes_on = False
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, RECHECK_S)):
                        await wait.changed.wait()
        finally:
            self._tailer.leave_end(wait)

    def _executes(self, workflow_id: str) -> bool:
        """Returns whether a run executes in this process; from any thread."""
        return self._executions.newest(workflow_id) is not None

    def _just_ended(self, namespace: str, run_id: str, workflow_id: str) -> JustEnded | None:
        ended = self._executions.just_ended(workflow_id)
        if ended is None or (ended.key.namespace, ended.key.run_id) != (namespace, run_id):
            return None
        return ended

    def _going_on(self, namespace: str, run_id: str, workflow_id: str) -> Execution | None:
        """Returns the execution of a run in this process, of whose end nobody has been told yet."""
        execution = self._executions.newest(workflow_id)
        if execution is None or execution.ended:
            return None
        return execution if (execution.key.namespace, execution.key.run_id) == (namespace, run_id) else None
