"""How an engine dies inside a process that lives on, as if the process had been killed: for tests of agents.

A killed process stops in the middle of whatever it does: no `finally` and no `except` runs, no buffered event is
written, no lease is given back. Python cannot end a thread like that, so here everything that the engine runs agents on
(DBOS's event loop and its threads) *stops for good* instead and is kept, blocked, until the test process ends; nothing
of it is ever resumed, and nothing of it is collected, as that would run the `finally` of a suspended coroutine. Every
thread of the engine, whatever it does, stops at its next use of the database. What the engine had in memory is lost
with it; what is left is what it had committed.

The difference from a real kill: a blocking body that is in progress in a thread runs on until it next comes to the
database, and what lives in modules (globals) survives.

Locks: a connection that stops in a transaction is closed first, so that the database rolls back as it would for a
process that is gone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
import structlog
from dbos import DBOS, _dbos

from perdure_service.durable.runtime import Runtime
from perdure_service.store.dbos_tables import OUTPUTS, STATUS

log = structlog.get_logger()

Condition = Callable[[sa.Connection], bool]
"""Whether the transaction under way is the one to die at; asked right before its COMMIT."""


class EngineDied(Exception):
    """The engine died while this call was under way; what it did or not, the database knows."""


class _AgentThread(threading.Thread):
    """A thread that may run agents' code, and so may stop for good; a daemon, or it would hold the process's end."""


class _AgentThreads(ThreadPoolExecutor):
    """What DBOS uses instead of its own pool, whose threads Python waits for at the process's end."""

    def __init__(self, alive: Callable[[], bool]) -> None:
        super().__init__(max_workers=1)  # which never starts its thread
        self._alive = alive

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if not self._alive():
            return future

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - it is the future's
                future.set_exception(error)
            else:
                future.set_result(result)

        _AgentThread(target=work, name="perdure-agent", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Does nothing: there is no pool."""


class MortalRuntime:
    """A runtime that can die; `launch` and `stop` are the runtime's own, for one that lives to its end."""

    def __init__(self, runtime: Runtime, died: Callable[[], None]) -> None:
        """Creates it over a runtime that is not launched yet.

        Args:
            runtime: The runtime, on an engine (and so on connections) of its own.
            died: Called once, from the thread in which it dies; it must not wait.
        """
        self.runtime = runtime
        self.dead = False
        self._died = died
        self._condition: Condition | None = None
        self._before = False
        self._lock = threading.Lock()
        self._local = threading.local()
        self._kept: list[Any] = []
        self._dbos: Any = None

    def launch(self) -> int:
        """Launches the runtime; see there."""
        plain = _dbos.ThreadPoolExecutor  # type: ignore[attr-defined]
        _dbos.ThreadPoolExecutor = self._agent_threads  # type: ignore[attr-defined,assignment]
        try:
            taken_back = self.runtime.launch()
        finally:
            _dbos.ThreadPoolExecutor = plain  # type: ignore[attr-defined]
        self._dbos = _dbos._get_dbos_instance()
        for name, listener in (
            ("checkout", self._on_checkout),
            ("checkin", self._on_checkin),
            ("commit", self._on_commit),
            ("rollback", self._on_rollback),
        ):
            sa.event.listen(self.runtime.engine, name, listener)
        return taken_back

    def _agent_threads(self, *_: Any, **__: Any) -> _AgentThreads:
        return _AgentThreads(lambda: not self.dead)

    def arm(self, condition: Condition | None, *, before: bool = False) -> None:
        """Makes it die at the first commit that a condition is true for: right after it, or right before."""
        with self._lock:
            self._condition, self._before = condition, before

    @property
    def armed(self) -> bool:
        """Whether it still waits for the commit to die at."""
        return self._condition is not None

    def die(self) -> None:
        """Dies now, with everything it runs."""
        with self._lock:
            if self.dead:
                return
            self.dead = True
            self._condition = None
        # What nothing can be done with any more: DBOS's own threads, which would try again and again.
        self.runtime.database.stopping = True
        self.runtime.database._run_background_processes = False
        for event in (*self._dbos.background_thread_stop_events, self._dbos._background_jobs_stop_event):
            event.set()
        loop = self._dbos._background_event_loop._loop
        self._kept += [self._dbos, loop, self.runtime]
        with suppress(RuntimeError):
            self._kept += asyncio.all_tasks(loop)
        loop.call_soon_threadsafe(self._stop_for_good)
        self._died()

    def bury(self) -> None:
        """Ends the threads that ran no agent's code, so that another runtime can be launched. Blocks."""
        self.runtime.forget()
        # Its loop and its agents' threads stand still, and would be waited for.
        self._dbos._background_event_loop._running = False
        self._dbos._executor_field = None
        DBOS.destroy(workflow_completion_timeout_sec=0)
        dispose_for_good(self.runtime.engine)

    # ---- what the database's connections tell ------------------------------------------------------------------------

    def _on_checkout(self, connection: Any, _record: Any, _proxy: Any) -> None:
        if self.dead:
            self._stop_agents(connection)
            raise EngineDied

    def _on_commit(self, conn: sa.Connection) -> None:
        if not self.dead and self._condition is not None and self._condition(conn):
            if not self._before:
                self._local.at_checkin = True
                return
            self.die()
        if self.dead:
            self._stop_agents(conn.connection.dbapi_connection)
            raise EngineDied

    def _on_rollback(self, _conn: sa.Connection) -> None:
        self._local.at_checkin = False

    def _on_checkin(self, connection: Any, _record: Any) -> None:
        if getattr(self._local, "at_checkin", False):
            # Committed: now is right after it.
            self._local.at_checkin = False
            self.die()
        if self.dead:
            self._stop_agents(connection)
            # Not back into a pool that nobody will dispose of any more.
            _close(connection)

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _stop_agents(self, connection: Any) -> None:
        """Never returns to agents' code, nor to the loop that runs it; does nothing in other threads."""
        thread = threading.current_thread()
        if isinstance(thread, _AgentThread) or thread is self._dbos._background_event_loop._thread:
            _close(connection)
            self._stop_for_good()

    def _stop_for_good(self) -> None:
        # The frame of this thread, which never ends, is what keeps all that stands still from being collected.
        kept = self._kept
        while kept is not None:
            threading.Event().wait()


def dispose_for_good(engine: sa.Engine) -> None:
    """Closes an engine that a blocking agent's thread may still come to: it gets no connection any more.

    After a plain `dispose` it would get a new one, or give back an old one, that nobody closes.
    """

    def refuse(*_: Any) -> Any:
        raise EngineDied

    sa.event.listen(engine, "do_connect", refuse)
    sa.event.listen(engine, "checkin", lambda connection, _record: _close(connection))
    engine.dispose()


def _close(connection: Any) -> None:
    """Ends a session of the database, and with it its transaction."""
    with suppress(Exception):
        connection.close()


# ---- where to die ----------------------------------------------------------------------------------------------------


def step_recorded(workflow_id: str, step_id: int) -> Condition:
    """Returns the condition that a step of a run is recorded."""

    def condition(conn: sa.Connection) -> bool:
        statement = sa.text(f"SELECT 1 FROM {OUTPUTS} WHERE workflow_uuid = :id AND function_id = :step")
        return conn.execute(statement, {"id": workflow_id, "step": step_id}).first() is not None

    return condition


def run_ended(workflow_id: str, tell: Callable[[Any], None]) -> Condition:
    """Returns the condition that a run has ended by itself, which tells its output (JSON text) and failure."""

    def condition(conn: sa.Connection) -> bool:
        statement = sa.text(
            f"SELECT r.output, r.failure FROM {STATUS} AS s JOIN perdure.run AS r "
            "ON r.workflow_id = s.workflow_uuid WHERE s.workflow_uuid = :id AND s.status IN ('SUCCESS', 'ERROR')"
        )
        found = conn.execute(statement, {"id": workflow_id}).first()
        if found is not None:
            tell(tuple(found))
        return found is not None

    return condition


def recorded_steps(conn: sa.Connection, workflow_id: str) -> list[tuple[int, str]]:
    """Returns number and name of every recorded operation of a run, in order."""
    statement = sa.text(
        f"SELECT function_id, function_name FROM {OUTPUTS} WHERE workflow_uuid = :id ORDER BY function_id"
    )
    return [(int(row[0]), str(row[1])) for row in conn.execute(statement, {"id": workflow_id})]
