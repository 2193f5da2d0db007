"""DBOS as this product runs it: configured, launched, given runs, and stopped.

Agents run on DBOS's own event loop in a thread of its own, gRPC on another, lease renewal in a third: blocking agent
code stops neither health nor streams nor renewal. DBOS is a process singleton, so there is one runtime a process.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import sqlalchemy as sa
import structlog
from dbos import DBOS, _core
from dbos._dbos import _get_dbos_instance, _get_or_create_dbos_registry
from dbos._error import DBOSConflictingWorkflowError, DBOSWorkflowCancelledError
from dbos._registrations import get_func_info
from dbos._serialization import DBOSPortableJSON, WorkflowSerializationFormat, serialize_args

from perdure_service.agents.catalogue import RegisteredAgent
from perdure_service.domain.events import Pack
from perdure_service.domain.ids import random_hex
from perdure_service.domain.queues import QueueLimits, Queues
from perdure_service.domain.regions import Place
from perdure_service.domain.runs import LOCAL_CELL, Run, RunStart, derive_state, epoch_ms
from perdure_service.domain.trace import TracedRun
from perdure_service.durable import hops, metering, parking, plain_runs, replay, retries, steps, system_database
from perdure_service.durable.cell_claim import CellClaim
from perdure_service.durable.checkpoints import Checkpoints, Presented
from perdure_service.durable.drain import CELL_MOVED, Drain
from perdure_service.durable.executions import Execution, Executions, Parked
from perdure_service.durable.hints import Hints, feed_of
from perdure_service.durable.leases import Lease, lease_statement_timeout, renewal_interval_s
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.operation import Operations
from perdure_service.durable.output_limit import OutputLimit
from perdure_service.durable.owners import OwnerWatch
from perdure_service.durable.payloads import Payloads
from perdure_service.durable.placement import Placement
from perdure_service.durable.promises import Promise
from perdure_service.durable.queue_threads import Bells
from perdure_service.durable.reaper import Reaper
from perdure_service.durable.spans import Spans, record, traced_run
from perdure_service.durable.substitutes import substitute
from perdure_service.durable.suspicion import Suspicion
from perdure_service.durable.system_database import PerdureSystemDatabase, RequestRepeated, WrittenStart
from perdure_service.durable.trace_writer import TraceWriter
from perdure_service.durable.waits import Waits
from perdure_service.durable.waking import Waker
from perdure_service.durable.writer import EventWriter
from perdure_service.store import queues as store_queues
from perdure_service.store import runs, traces
from perdure_service.store.checkpoint_writer import CONNECTIONS, MAX_ROWS, CheckpointWriter
from perdure_service.store.dbos_tables import APPLICATION
from perdure_service.store.engine import is_cockroach, reserve_connections, waits_for_a_connection
from perdure_service.store.objects import Objects
from perdure_service.store.sqlstates import reading, retrying
from perdure_service.telemetry import METERS, RunTracer
from perdure_service.telemetry import metrics as m

log = structlog.get_logger()

QUEUE_ATTEMPTS = 5
"""How often writing the queue's row is tried: many executors that start at once write the same one."""

OWNER_WATCH_S = 1.0
"""How often runs are looked for that were cancelled, or taken, by another server while they wait here."""

STOP_RESERVE = timedelta(seconds=2)
"""What is kept of the time that a stopping server has for what follows the last step body."""

DESTROY_TIMEOUT_S = 3.0
"""How long DBOS may take to end its threads; the process ends with them or without them."""

CALLER_POOL_PATIENCE_S = 2.0
"""How long a call waits for a connection to the database before its caller is told to come again (OVERLOADED): about
twice what it is told to wait. Ten such waits and more are behind each other at the threads, so it must not be long."""

STARTERS = 64
"""Threads for starts that the checkpoint writer did not write: repeats, and all while the database is away."""


@dataclass(frozen=True, slots=True)
class Started:
    """What has become of a start: the workflow id of its run, and the run if this start has made it."""

    workflow_id: str
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class PreparedStart:
    """A start of which everything is decided."""

    agent: RegisteredAgent
    start: RunStart
    status: Any
    """DBOS's row."""
    owner_xid: str
    unique_request_id: str | None

    @property
    def columns(self) -> dict[str, Any]:
        """The arguments of the system database's `present_start` and `start_run`."""
        return {
            "status": self.status,
            "start": self.start,
            "creator_xid": self.owner_xid,
            "input_argument": self.agent.input_argument or None,
            "unique_request_id": self.unique_request_id,
        }


class Runtime:
    """The engine under the service."""

    def __init__(
        self,
        engine: sa.Engine,
        executor_id: str,
        *,
        application_version: str,
        address: str,
        max_running: int,
        max_threads: int,
        queue_poll: timedelta,
        lease_ttl: timedelta,
        tracer: RunTracer,
        lost: Callable[[], None],
        owns_database: bool = False,
        max_output_bytes: int = 2**20,
        park_after: timedelta = timedelta(seconds=5),
        suspicion: bool = False,
        max_recoveries: int = 20,
        queues: Queues | None = None,
        payload_threshold_bytes: int = 2**16,
        objects: Objects | None = None,
        checkpoint_timeout: timedelta | None = None,
        place: Place | None = None,
        claim_ttl: timedelta = timedelta(seconds=12),
    ) -> None:
        """Creates the runtime; `launch` starts it.

        Arguments as in `Settings` and `Lease`; `checkpoint_timeout` is the statement timeout of the checkpoint writer,
        without which every checkpoint is a transaction of its own.
        """
        self.engine = engine
        self.executor_id = executor_id
        self.cell = LOCAL_CELL if place is None else place.cell.name
        self.application_version = application_version
        self._max_running = max_running
        self._max_threads = max_threads
        self._queue_poll = queue_poll
        self._traces = TraceWriter(engine, _find_traced, lambda run, span: record(tracer, run, span))
        self.spans = Spans(tracer, executor_id, self._traces)
        self.ledger = Ledger(self.spans)
        self._writer = EventWriter(self._write_buffered, at_once=1 if checkpoint_timeout is None else MAX_ROWS)
        self.executions = Executions(self._writer.wake)
        self.queues = queues or Queues()
        self.placement = Placement(self.executions, max_running)
        self.hints = Hints(lambda heard: feed_of(engine, executor_id, heard))
        self._bells = Bells(queue_poll.total_seconds(), lambda: self.hints.tells_queues)
        self.placement.wake = self._bells.ring
        self.placement.announce = self.hints.announce
        self.operations = Operations(self.hints.committed, self._committed)
        self.checkpoints = Checkpoints(self.operations)
        self._waits = Waits(engine, lambda: self.hints.arrives)
        # Of its own: when all connections are in use this executor is busy, not dead, and must be able to say so.
        self._lease_engine = reserve_connections(engine, lease_statement_timeout(lease_ttl))

        self.lease = Lease(
            self._lease_engine,
            executor_id,
            application_version=application_version,
            address=address,
            max_running=max_running,
            ttl=lease_ttl,
            executions=self.executions,
            lost=lost,
            agents=_registered_names,
            region="" if place is None else place.region,
            standing_by=lambda: self.placement.standing_by,
        )
        self._reaper = Reaper(
            engine,
            executor_id,
            lease=self.lease,
            ttl=lease_ttl,
            ledger=self.ledger,
            hint=self.hints.given_back,
            gone=self.spans.executors_gone,
            owns_database=owns_database,
        )
        self._drain = Drain(engine, self.executions, self.ledger, self.hints.given_back)
        self._cell_claim = (
            None
            if place is None
            else CellClaim(
                engine,
                executor_id,
                place,
                ttl=claim_ttl,
                lease_ttl=lease_ttl,
                lease=self.lease,
                placement=self.placement,
                drain=Drain(engine, self.executions, self.ledger, self.hints.given_back, CELL_MOVED),
                look_for_runs=self.poke,
            )
        )
        self._suspicion = Suspicion(
            engine,
            executor_id,
            renew_s=renewal_interval_s(lease_ttl),
            take_back=self._reaper.take_back,
            gone=self.spans.executors_gone,
        )
        self._suspects = suspicion and not owns_database
        METERS.observe(m.EXECUTIONS, lambda: [(len(self.executions), {})])
        self._owners = OwnerWatch(
            engine,
            executor_id,
            self.executions,
            self.ledger,
            self.hints.given_back,
            OWNER_WATCH_S,
            lambda: self.hints.arrives,
        )
        self._wire_hints()
        self._database: PerdureSystemDatabase | None = None
        self._limit = OutputLimit(max_output_bytes)
        self._checkpoint_writer: CheckpointWriter | None = None
        if checkpoint_timeout is not None:
            reserved = reserve_connections(engine, checkpoint_timeout, CONNECTIONS)
            self._checkpoint_writer = CheckpointWriter(
                reserved, self.checkpoints.answer, self.executions.moving, self.executions.alone
            )
            self.checkpoints.write_with(self._checkpoint_writer)
        self._park_after = park_after
        self._max_recoveries = max_recoveries
        self._waker = Waker(engine, self.executions, lambda workflow_ids: self.database.wake(workflow_ids))
        self.ledger.nudge = self._waker.nudge
        self._templates: dict[str, Mapping[str, Any]] = {}
        self._starters = ThreadPoolExecutor(STARTERS, thread_name_prefix="starter-")
        self.payloads = Payloads(engine, payload_threshold_bytes, objects)

    def _wire_hints(self) -> None:
        self.hints.ring = self._bells.ring_for_others
        self.hints.ring_own = self._bells.ring_all
        self.hints.owner_changed = self._owners.changed
        self.hints.look_for = self._waits.look_for
        self.hints.ended = self._waits.ended
        self.hints.wake = self._waits.wake

    @property
    def database(self) -> PerdureSystemDatabase:
        """DBOS's system database, once launched."""
        assert self._database is not None, "launch first"
        return self._database

    # ---- life --------------------------------------------------------------------------------------------------------

    def launch(self) -> int:
        """Takes the lease and launches DBOS. Blocks.

        Call it from a thread without an event loop, so that DBOS's own loop runs the agents.

        Returns:
            How many runs were taken back from executors that are gone.
        """
        with suppress(RuntimeError):
            asyncio.get_running_loop()
            raise AssertionError("launch in a thread without an event loop")
        if self._cell_claim is not None:
            self._cell_claim.begin()
        self.lease.start()
        taken_back = self._reaper.start()
        self._writer.start()
        self.payloads.start()
        self._traces.start()
        system_database.install(self._build)
        retries.install()
        self._bells.install(self.executions, self.queues.names)
        steps.install(self.executions, self.spans, self.lease)
        self._limit.install()
        self.payloads.install()
        _observe_workflows(self.executions)
        replay.install(
            self.executions, lambda: self.database, lambda child: self.database.result_of_parked_child(child)
        )
        hops.install(replay.stage())
        parking.install(lambda: self.database)
        url = self.engine.url.render_as_string(hide_password=False)
        DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": url,
                "system_database_engine": self.engine,
                "executor_id": self.executor_id,
                "application_version": self.application_version,
                "run_migrations": False,
                "use_listen_notify": not is_cockroach(self.engine),
                # A blocking agent holds a thread while it runs or waits, its blocking children another; database calls
                # need some beside those, or who waits would keep from going on what it waits for.
                "max_executor_threads": self._max_threads + 2 * self._max_running,
                "enable_otlp": False,
                "log_level": "WARNING",
            }
        )
        _limit_recoveries(self._max_recoveries)
        for limits in self.queues.limits:
            self.placement.saw(limits)
        DBOS.listen_queues(self.queues.names)
        DBOS.launch()
        if self._checkpoint_writer is not None:  # until now each commit has gone its own way
            self._checkpoint_writer.start(_dbos_instance()._background_event_loop.target_loop())
        self._tell_differences()
        for limits in self.queues.limits:
            self._register_queue(limits)
        self._owners.start()
        self._waker.start()
        self.hints.start()
        if self._suspects:
            self._suspicion.start()
        if self._cell_claim is not None:
            self._cell_claim.start()
        return taken_back

    def poke(self) -> None:
        """Looks for queued runs now: something has been queued, or given back, that no queue was told of."""
        self.hints.poke()

    def _tell_differences(self) -> None:
        """Warns when a queue has other limits in the database: those of this executor count from now on, for all."""
        known = retrying(self.engine, "queues.limits", lambda conn: store_queues.limits_of(conn, self.queues.names))
        for mine in self.queues.limits:
            theirs = known.get(mine.name)
            if theirs is not None and theirs != mine:
                log.warning("queue.limits_replaced", queue=mine.name, before=str(theirs), now=str(mine))

    def _register_queue(self, limits: QueueLimits) -> None:
        """Writes a queue's row. DBOS does not repeat this one by itself."""
        for attempt in range(1, QUEUE_ATTEMPTS + 1):
            try:
                DBOS.register_queue(
                    limits.name,
                    worker_concurrency=limits.worker_concurrency or None,
                    global_concurrency=limits.global_concurrency or None,
                    limiter={"limit": limits.rate_limit, "period": limits.rate_period_s} if limits.rate_limit else None,
                    polling_interval_sec=self._queue_poll.total_seconds(),
                    on_conflict="always_update",
                )
                return
            except sa.exc.DBAPIError as error:
                if attempt == QUEUE_ATTEMPTS:
                    raise
                log.warning("queue.register_repeated", attempt=attempt, error=type(error.orig).__name__)
                time.sleep(0.2 * attempt)

    def stop(self, timeout: timedelta) -> None:
        """Takes no more runs, and hands over those it has, each as soon as it may be; see `drain`. Blocks.

        What has not ended goes back to the queue: another executor, or the next start of this one, continues it. It
        returns within `timeout` and a few seconds, whatever a step or the database does.
        """
        self.database.stopping = True
        if self._cell_claim is not None:
            self._cell_claim.stop()
        deadline = time.monotonic() + max(timeout - STOP_RESERVE, timeout / 2).total_seconds()
        self.lease.drain()
        self._drain.run(deadline)
        if self._checkpoint_writer is not None:
            self._checkpoint_writer.stop()
        self._end_threads(self._suspicion, self._reaper, self._owners, self._waker, self._writer, self.lease)
        self.payloads.close()
        with suppress(Exception):
            self._reaper.take_back()  # what this executor never knew it had been given
        self.hints.stop()
        self._end_dbos()
        self._lease_engine.dispose()
        self._traces.stop()

    @staticmethod
    def _end_threads(*parts: Any) -> None:
        """Stops parts of this runtime at the same time: each waits a little for its thread."""
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: part.stop(), parts))

    @staticmethod
    def _end_dbos() -> None:
        """Ends DBOS's threads, as far as they end: one may hang in the code of an agent."""

        def destroy() -> None:
            with suppress(Exception):
                DBOS.destroy(workflow_completion_timeout_sec=0)

        thread = threading.Thread(target=destroy, name="dbos-destroy", daemon=True)
        thread.start()
        thread.join(timeout=DESTROY_TIMEOUT_S)

    def forget(self) -> None:
        """Ends this runtime's own threads and hands nothing over, as if it had been killed. For `crash`. Blocks."""
        self._end_threads(
            self._suspicion, self._reaper, self._owners, self._waker, self._writer, self._traces, self.hints
        )
        self.payloads.close()
        self.lease.forget()
        self._lease_engine.dispose()

    def _build(self, **arguments: Any) -> PerdureSystemDatabase:
        database = PerdureSystemDatabase(
            executions=self.executions,
            operations=self.operations,
            ledger=self.ledger,
            placement=self.placement,
            registered=_registered_names,
            limit=self._limit,
            park_after_s=self._park_after.total_seconds(),
            waits=self._waits,
            payloads=self.payloads,
            checkpoints=self.checkpoints,
            **arguments,
        )
        database.nudge = self._waker.nudge
        database.poke = self.poke
        database.write_alone = partial(self._writer.wake, at_once=True)
        if self._database is None:
            self._database = database
        return database

    def _committed(self, execution: Execution | None, workflow_id: str, packs: Sequence[Pack]) -> None:
        """Tells of a commit."""
        if packs and packs[-1].events[-1].ends_run:
            # Before anybody else is told: who waits for the end registers, and then looks at this.
            execution_here = execution or self.executions.newest(workflow_id)
            if execution_here is not None:
                execution_here.ended = True
        with metering.telling(workflow_id):
            metering.committed(execution, packs)
            self.spans.committed(execution, workflow_id, packs)

    def _write_buffered(self, execution: Execution) -> bool:
        return self.database.write_buffered(execution)

    @staticmethod
    def has_code_of(workflow_name: str) -> bool:
        """Returns whether this process can run a workflow of this name in DBOS."""
        return workflow_name in _registered_names()

    # ---- starts ------------------------------------------------------------------------------------------------------

    def start(self, prepared: PreparedStart) -> Started:
        """Commits the start of a run and, when this executor has a free slot, begins it. Blocks.

        Returns:
            The run, if this call has made it. Else the workflow id of the one that exists: the one asked for, or, when
            the server makes ids, the one that this request was given before. Whether the existing run is the one
            meant is for the caller to compare.
        """
        if prepared.start.delay_s and prepared.start.start_at is None:
            prepared.status["delay_until_epoch_ms"] = self._after_ms(prepared.start.delay_s)
        with self._slot_for(prepared) as here:
            self._place(prepared, here=here)
            return self._write_start(prepared)

    def start_soon(self, prepared: PreparedStart) -> Promise[Started] | None:
        """Does what `start` does, but does not block: the run begins when the checkpoint writer has written it.

        Returns:
            A promise of what `start` returns or raises; whoever waits for it may leave. None when it takes a thread:
            `start` does it then.
        """
        if prepared.start.delay_s:
            return None  # by the database's clock, which must be asked
        with self._slot_for(prepared) as here:
            self._place(prepared, here=here)
            presented = self.database.present_start(**prepared.columns)  # its execution now counts for itself
        if presented is None:
            return None
        promise: Promise[Started] = Promise()

        def go_on() -> Started:
            with self.database.bounded(), waits_for_a_connection(CALLER_POOL_PATIENCE_S):
                return self._write_start(prepared, presented)

        def answered(written: Promise[bool]) -> None:
            # In the checkpoint writer's thread: nobody there would tell who waits of what goes wrong here.
            try:
                if written.result():
                    promise.set_result(self._started(prepared, presented))
                else:
                    hops.chain(self._starters.submit(go_on), promise)
            except Exception as error:  # noqa: BLE001 - raised to whom it belongs
                promise.set_exception(error)

        presented.written.add_done_callback(answered)
        return promise

    def prepare(
        self, agent: RegisteredAgent, start: RunStart, arguments: dict[str, Any], *, server_made_id: bool
    ) -> PreparedStart:
        """Returns a start of which everything is decided. Does not block.

        Args:
            agent: What to run.
            start: What was decided about the run.
            arguments: The workflow's, by name: plain JSON.
            server_made_id: Whether the request id alone tells of which run a repeat is.
        """
        status = dict(self._template(agent))
        status["workflow_uuid"], status["queue_name"] = start.key.workflow_id, start.queue
        status["priority"] = start.priority
        status["inputs"], status["serialization"] = portable_inputs(arguments)
        if start.deadline_at is not None:
            status["workflow_deadline_epoch_ms"] = epoch_ms(start.deadline_at)
        if start.start_at is not None or start.delay_s:
            status["status"] = "DELAYED"
        if start.start_at is not None:
            status["delay_until_epoch_ms"] = epoch_ms(start.start_at)
        unique = start.request_id if server_made_id and start.request_id else None
        return PreparedStart(agent, start, status, random_hex(), unique)

    def _template(self, agent: RegisteredAgent) -> Mapping[str, Any]:
        """Returns DBOS's row of an agent's run but for what is the run's own; a contract test says that this is all."""
        template = self._templates.get(agent.spec.workflow_name)
        if template is None:
            # Without arguments: DBOS would store them in the workflow's own format, and ours is JSON for all.
            template = self._templates[agent.spec.workflow_name] = _core.prepare_enqueued_workflow(
                _dbos_instance(), agent.workflow, (), {}, queue_name="its own", workflow_id="its own"
            )
        return template

    def _slot_for(self, prepared: PreparedStart) -> AbstractContextManager[bool]:
        """Holds a slot for a start, if there is one and it does not begin later; says whether."""
        if prepared.status["status"] == "DELAYED":
            return nullcontext(False)
        start = prepared.start
        return self.placement.start(start.queue, (start.agent, start.agent_version))

    def _place(self, prepared: PreparedStart, *, here: bool) -> None:
        """Has a start begin here, if there is a slot."""
        if here and not self.database.stopping:
            prepared.status["status"] = "PENDING"

    def _write_start(self, prepared: PreparedStart, presented: Presented | None = None) -> Started:
        """Writes a start in a transaction of its own, unless the checkpoint writer takes it, and has not yet had it."""
        database, start = self.database, prepared.start
        if presented is None:
            presented = database.present_start(**prepared.columns)
            if presented is not None and presented.written.result():
                return self._started(prepared, presented)
        try:
            with database.bounded():
                written = database.start_run(**prepared.columns, presented=presented)
        except DBOSConflictingWorkflowError:
            return Started(start.key.workflow_id)
        except RequestRepeated:
            find = partial(runs.find_request, namespace=start.key.namespace, request_id=start.request_id)
            found = reading(self.engine, "runs.find_request", find)
            return Started(found or start.key.workflow_id)
        return self._started(prepared, written)

    def _started(self, prepared: PreparedStart, written: WrittenStart | Presented) -> Started:
        """Begins what is to begin here; returns the run as it was made."""
        if isinstance(written, Presented):
            written = WrittenStart(written.execution is not None, written.returned["created_at"])
        run = self._as_written(prepared.agent, prepared.start, prepared.status["status"], written)  # before it moves on
        if written.runs_here:
            self._begin(prepared.status, prepared.owner_xid)
        return Started(prepared.start.key.workflow_id, run)

    def _as_written(self, agent: RegisteredAgent, start: RunStart, status: str, written: WrittenStart) -> Run | None:
        """Returns a run that a start has made, as a read would find it."""
        if written.created_at is None:
            return None
        here = status == "PENDING"
        return Run.of_start(
            start,
            derive_state(status, waiting_for=None, open_approvals=0, end_reason=None, execution=1 if here else 0),
            written.created_at,
            executor_id=self.executor_id if here else "",
            input_argument=agent.input_argument or None,
            last_sequence=1,
        )

    def _begin(self, status: Any, owner_xid: str) -> None:
        """Runs a run whose start is committed as ours. Does not block, so a loop may call it."""
        try:
            with hops.refusing():
                self._execute(status, owner_xid)
        except hops.NeedsThread:
            try:
                _dbos_instance()._executor.submit(self._execute, status, owner_xid)
            except RuntimeError as error:  # the engine has ended
                log.error("run.begin_failed", workflow_id=status["workflow_uuid"], error=type(error).__name__)
                self._forget_unbegun(status["workflow_uuid"], owner_xid)

    def _execute(self, status: Any, owner_xid: str) -> None:
        try:
            with self.database.unbounded():
                dbos = _dbos_instance()
                if not plain_runs.begin(dbos, status, owner_xid):
                    _core.execute_dequeued_workflow(dbos, status, owner_xid)
        except Exception as error:  # noqa: BLE001 - logged
            # The run's own failures are recorded by DBOS; what comes here has left it PENDING under a live lease.
            workflow_id = status["workflow_uuid"]
            log.error("run.begin_failed", workflow_id=workflow_id, error=type(error).__name__)
            self._forget_unbegun(workflow_id, owner_xid)

    def _forget_unbegun(self, workflow_id: str, owner_xid: str) -> None:
        """Gives up an execution without a task or thread: `owners` finds that nobody runs it, and gives it back."""
        execution = self.executions.find(workflow_id, owner_xid)
        if execution is not None and execution.inline:
            self.executions.remove(execution)

    def _after_ms(self, delay_s: float) -> int:
        """Returns when a delay from now is over, by the database's clock, in milliseconds since 1970."""
        now: datetime = reading(
            self.engine, "runtime.now", lambda conn: conn.execute(sa.text("SELECT now()")).scalar_one()
        )
        return int((now.astimezone(UTC) + timedelta(seconds=delay_s)).timestamp() * 1000)


def _find_traced(conn: sa.Connection, workflow_id: str) -> TracedRun | None:
    row = traces.find(conn, workflow_id)
    return None if row is None else traced_run(row)


def portable_inputs(arguments: dict[str, Any]) -> tuple[str, str]:
    """Returns a workflow's arguments as DBOS stores them, plain JSON, and the name of that format."""
    text, name = serialize_args((), arguments, WorkflowSerializationFormat.PORTABLE, DBOSPortableJSON)
    return str(text), str(name)


def _dbos_instance() -> Any:
    return _get_dbos_instance()


def _limit_recoveries(most: int) -> None:
    """Has DBOS end runs whose executor died more often: it counts dispatches, and we take off those that were no crash.

    What a workflow of its own has declared stays, if that is less.
    """
    for workflow in _dbos_instance()._registry.workflow_info_map.values():
        info = get_func_info(workflow)
        if info is not None and (info.max_recovery_attempts is None or info.max_recovery_attempts > most):
            info.max_recovery_attempts = most


def _registered_names() -> list[str]:
    return list(_get_or_create_dbos_registry().workflow_info_map)  # it is there before DBOS is launched


_plain_execute_async = _core._execute_workflow_async
_plain_execute_thread = _core._execute_workflow_wthread


def _observe_workflows(executions: Executions) -> None:
    """Makes DBOS tell which task runs which execution, and its logs which run they are about."""

    async def execute_async(dbos: Any, status: Any, func: Any, ctx: Any, args: Any, kwargs: Any) -> Any:
        execution = executions.find(status["workflow_uuid"], ctx.owner_xid)
        if execution is not None:
            execution.task, execution.loop = asyncio.current_task(), asyncio.get_running_loop()
            _stands_alone(dbos, execution)
        try:
            if plain_runs.is_plain(status, func):
                return await plain_runs.run(dbos, status, func, ctx, args, kwargs, execution)
            return await _plain_execute_async(dbos, status, func, ctx, args, kwargs)
        except Parked as parked:
            raise DBOSWorkflowCancelledError(str(parked)) from None  # whoever waits for this task turns to the row
        except asyncio.CancelledError:
            if execution is None or not execution.dead:
                raise
            # A parent waits for this very task: it must learn that its child ended, not that it was cancelled itself.
            raise DBOSWorkflowCancelledError(execution.dead) from None
        finally:
            if execution is not None:
                executions.remove(execution)

    def execute_thread(dbos: Any, status: Any, func: Any, ctx: Any, *rest: Any) -> Any:
        execution = executions.find(status["workflow_uuid"], ctx.owner_xid)
        if execution is not None:
            execution.thread = threading.get_ident()
            _stands_alone(dbos, execution)
        try:
            return _plain_execute_thread(dbos, status, func, ctx, *rest)
        except Parked as parked:
            raise DBOSWorkflowCancelledError(str(parked)) from None
        finally:
            structlog.contextvars.clear_contextvars()
            if execution is not None:
                executions.remove(execution)

    substitute(_core, "_execute_workflow_async", execute_async)
    substitute(_core, "_execute_workflow_wthread", execute_thread)


def _stands_alone(dbos: Any, execution: Execution) -> None:
    """Notes that an execution has a task or thread of its own, whose logs are about it."""
    execution.inline = False
    execution.goes_ahead = not dbos._registry.datasources
    execution.leave_parent()
    structlog.contextvars.bind_contextvars(
        run_id=execution.key.run_id, execution=execution.number, trace_id=execution.trace_id
    )
