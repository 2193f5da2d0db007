"""The composition root: builds the parts of a server, starts them, drains them, stops them. No logic of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
import structlog

from perdure_service import event_loop
from perdure_service.agents import catalogue, models, resources
from perdure_service.agents import context as agents_context
from perdure_service.agents.embedder import embedder_of
from perdure_service.domain.queues import Queues
from perdure_service.domain.regions import Place, describe
from perdure_service.durable import metering
from perdure_service.durable.context import current_run
from perdure_service.durable.leases import new_executor_id
from perdure_service.durable.migrate import migrate_all, migrate_cells, verify_dbos
from perdure_service.durable.migrate import plan as migration_plan
from perdure_service.durable.retention import Retention
from perdure_service.durable.runtime import Runtime
from perdure_service.durable.service import RunService
from perdure_service.errors import ConfigurationError
from perdure_service.rpc import security
from perdure_service.rpc.calls import ANONYMOUS
from perdure_service.rpc.peers import check_wire
from perdure_service.rpc.server import RpcServer
from perdure_service.settings import Settings, configured_database_url
from perdure_service.store import agents as agent_store
from perdure_service.store import (
    cells,
    diagnosis,
    document_vectors,
    documents,
    embedded,
    event_log,
    migrations,
    run_heads,
)
from perdure_service.store.engine import create_engine, idle_in_transaction_timeout
from perdure_service.store.regions_file import load_regions, locate
from perdure_service.store.s3 import S3Objects
from perdure_service.store.sqlstates import reading, retrying
from perdure_service.store.tailer import Tailer
from perdure_service.telemetry import METERS, QUEUE_AGE, RUNS, start_telemetry

GC_ALLOCATIONS = 50_000
"""Objects more than were freed before the collector looks; Python's 700 are the objects of two calls."""

log = structlog.get_logger()

LATE = timedelta(seconds=5)
"""What closing connections and flushing telemetry may take beyond the time for draining."""

Report = Callable[[str], None]


def database_url(settings: Settings) -> str:
    """Returns the configured database's URL.

    Raises:
        ConfigurationError: None is configured.
    """
    url = configured_database_url(settings)
    if url is None:
        raise ConfigurationError(
            "no database is configured: set PERDURE_DATABASE_URL, or use `perdure-server dev`, which brings its own"
        )
    return url


def migrate_database(
    settings: Settings, report: Report, *, cells_named: Sequence[str] = (), plan: bool = False
) -> None:
    """Brings the schema of the configured database up to date; with regions, makes and migrates those of the cells.

    Args:
        settings: The settings.
        report: Gets the progress, or the plan.
        cells_named: With regions, only these cells; empty for all.
        plan: Report the SQL, and do nothing.

    Raises:
        ConfigurationError: It cannot be done; in one sentence.
    """
    url = database_url(settings)
    regions = None if settings.regions_file is None else load_regions(settings.regions_file)
    known = () if regions is None else tuple(regions.cells)
    for name in cells_named:
        if name not in known:
            raise ConfigurationError(
                f"--cell {name}: there is no such cell" + (f"; there are {', '.join(known)}" if known else "")
            )
    names = tuple(cells_named) or known
    if plan:
        for piece in migration_plan(url, regions, names):
            report(piece)
    elif regions is None:
        migrate_all(url, report)
    else:
        migrate_cells(url, regions, names, report)


def check(settings: Settings, report: Report) -> bool:
    """Reports everything that would keep a server from serving; returns whether nothing would."""
    report(security.describe(settings))
    findings = security.diagnose(settings)
    try:
        settings, place = locate(settings)
        if place is not None:
            check_wire(settings, place)
        for line in describe(place):
            report(line)
        findings += diagnosis.diagnose(database_url(settings), _verify(place))
    except ConfigurationError as error:
        findings.append(diagnosis.Finding("error", error.message))
    findings += diagnosis.object_store(settings.payloads)
    if not any(finding.severity == "error" for finding in findings):
        findings += diagnosis.stranded_runs(database_url(settings), settings.application_version)
    for finding in findings:
        report(f"{finding.severity}: {finding.text}")
    return not any(finding.severity == "error" for finding in findings)


def _verify(place: Place | None) -> tuple[diagnosis.Verify, ...]:
    return (verify_dbos, migrations.verify, cells.verifier(place))


def load_documents(engine: sa.Engine, settings: Settings, folder: Path, report: Report) -> bool:
    """Makes the documents of a folder searchable; returns whether every file could be read."""
    result = documents.load_folder(engine, folder, report)
    embedder = embedder_of(settings.embedder)
    if embedder is not None:
        document_vectors.create_vectors(engine, settings.embedder.dimensions)
        document_vectors.embed_passages(engine, embedder, report)
    report(
        f"{result.loaded} loaded, {result.unchanged} unchanged, {result.removed} removed, {len(result.failed)} failed, "
        f"{result.chunks} new passages"
    )
    return not result.failed


def _end_at_the_latest(after: timedelta, exit_status: int) -> None:
    """Ends this process when its own end takes too long: what hangs is not waited for, and what is lost is a farewell.

    Its runs are handed over long before; if even that was impossible, its lease expires.
    """

    def end() -> None:
        log.error("server.stop_cut_short", after_s=after.total_seconds())
        os._exit(exit_status)

    timer = threading.Timer(after.total_seconds(), end)
    timer.daemon = True
    timer.start()


async def serve(settings: Settings, url: str, *, dev: bool, ready: Report, place: Place | None = None) -> int:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends at once.

    Args:
        settings: The settings.
        url: The database, migrated.
        dev: Whether this process owns its database, and its callers are `dev`.
        ready: Told where it listens, once it does.
        place: Where it is; None without regions.

    Returns:
        The process's exit status.

    Raises:
        ConfigurationError: It cannot serve like this; in one sentence.
    """
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    status = 0

    def stop(reason: str, exit_status: int = 0) -> None:
        nonlocal status
        if stopping.is_set():
            os._exit(130)
        status = exit_status
        log.info("server.stopping", reason=reason)
        _end_at_the_latest(settings.drain_timeout + LATE, exit_status)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, signal.Signals(number).name)

    for finding in await asyncio.to_thread(diagnosis.diagnose, url, _verify(place)):
        if finding.severity == "error":
            raise ConfigurationError(finding.text)
        log.warning("database.finding", text=finding.text)
    engine = create_engine(
        url,
        pool_size=settings.database_pool_size,
        statement_timeout=settings.statement_timeout,
        idle_in_transaction_timeout=idle_in_transaction_timeout(settings.lease_ttl),
    )
    executor_id = new_executor_id()
    structlog.contextvars.bind_contextvars(executor_id=executor_id)
    telemetry = start_telemetry(
        instance_id=executor_id, version=settings.application_version, metrics_address=settings.metrics_address
    )
    telemetry.install()
    metering.observe_pool(engine)
    open_runs = metering.OpenRuns(engine)
    METERS.observe(RUNS, open_runs.runs)
    METERS.observe(QUEUE_AGE, open_runs.queue_age)
    resources.bind(resources.Resources(engine, settings))
    agents = catalogue.load(settings.agents, entry_points=True)
    models.prepare(settings.model)
    if not agents:
        raise ConfigurationError("there are no agents to serve: name modules with --agents, or install some")
    queues = Queues.of_settings(settings.queues)
    queues.check_agents({agent.spec.workflow_name: agent.spec.queue for agent in agents})

    def lost() -> None:
        loop.call_soon_threadsafe(stop, "its lease is lost", 1)

    runtime = Runtime(
        engine,
        executor_id,
        application_version=settings.application_version,
        address=_advertised(settings),
        max_running=settings.max_running,
        max_threads=settings.max_threads,
        queue_poll=settings.queue_poll_interval,
        lease_ttl=settings.lease_ttl,
        tracer=telemetry.tracer,
        lost=lost,
        owns_database=dev,
        max_output_bytes=settings.max_output_bytes,
        park_after=settings.park_after,
        suspicion=settings.suspicion,
        max_recoveries=settings.max_recoveries,
        queues=queues,
        payload_threshold_bytes=settings.payload_threshold_bytes,
        checkpoint_timeout=settings.statement_timeout if settings.batch_checkpoints else None,
        objects=S3Objects(settings.payloads) if settings.payloads.s3_bucket else None,
        place=place,
        claim_ttl=max(settings.claim_ttl, settings.lease_ttl),
    )
    # The catalogue before the lease: what this process takes must have a name that every server knows.
    await asyncio.to_thread(
        retrying,
        engine,
        "agents.publish",
        lambda conn: agent_store.publish(conn, [agent.spec for agent in agents], alone=dev),
    )
    # Before the launch: a run that is taken back begins while `launch` still works.
    agents_context.bind(lambda: current_run(runtime.database))
    taken_back = await asyncio.to_thread(runtime.launch)
    tailer = Tailer(
        lambda seen: reading(engine, "events.news", lambda conn: event_log.news(conn, seen)),
        runtime.database.close_ended_if_any,
        lambda ids: reading(engine, "runs.closed", lambda conn: run_heads.closed(conn, ids)),
        poll_s=settings.watch_poll_interval.total_seconds(),
        hinted=lambda: runtime.hints.arrives,
    )
    tailer.start()
    service = RunService(
        runtime,
        tailer,
        namespaces=settings.namespaces,
        max_threads=settings.max_threads,
        poll_s=settings.watch_poll_interval.total_seconds(),
        max_waiting_calls=settings.max_waiting_calls,
        max_starts_per_second=settings.max_starts_per_second,
    )
    retention = Retention(runtime, settings.retentions, settings.event_retention)
    retention.start()
    server = RpcServer(service, settings, tracer=telemetry.tracer, caller="dev" if dev else ANONYMOUS, place=place)
    try:
        ports = await server.start()
        _settle_garbage()
        host = settings.address.rpartition(":")[0]
        log.info(
            "server.ready",
            address=f"{host}:{ports.rpc}",
            admin_port=ports.admin,
            tls=settings.tls.enabled,
            authentication=settings.auth.enabled,
            taken_back=taken_back,
        )
        ready(f"{host}:{ports.rpc}")
        await stopping.wait()
    finally:
        # Streams first, so that clients look elsewhere; then the runs; then what they wrote about themselves.
        await server.drain()
        await asyncio.to_thread(retention.stop)
        await asyncio.to_thread(runtime.stop, settings.drain_timeout)
        await server.stop(2.0)
        await tailer.stop()
        service.close()
        await asyncio.to_thread(telemetry.shutdown)
        with suppress(Exception):
            engine.dispose()
    log.info("server.stopped")
    return status


def _settle_garbage() -> None:
    """Has the garbage collector leave alone what was loaded, and look less often at what comes and goes with calls."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 20, 20)


def _advertised(settings: Settings) -> str:
    """Returns where other servers reach this one."""
    host, _, port = settings.address.rpartition(":")
    everywhere = host.strip("[]") in ("", "0.0.0.0", "::", "*")  # noqa: S104 - compared, not listened on
    return settings.advertise_address or f"{socket.gethostname() if everywhere else host}:{port}"


def run_database(settings: Settings, report: Report) -> None:
    """Runs the embedded PostgreSQL alone until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: It cannot run; in one sentence.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with embedded.start(settings.data_dir) as server:
        report(f"the database is at {server.url()}")
        stopping.wait()


def run_server(settings: Settings, *, dev: bool, documents_folder: Path | None, report: Report) -> int:
    """Runs a server in this process until it is told to stop; returns the exit status.

    Raises:
        ConfigurationError: It cannot serve like this; in one sentence.
    """
    settings, place = locate(settings)
    if dev and place is not None:
        raise ConfigurationError("`dev` has a database of its own and no regions; use `perdure-server serve`")
    for finding in security.findings(settings, dev=dev):
        if finding.severity == "error":
            raise ConfigurationError(finding.text)
        log.warning("security.finding", text=finding.text)
    if dev:
        report("dev listens on this machine only" + ("" if settings.auth.enabled else "; its users may do everything"))
    server: embedded.EmbeddedPostgres | None = None
    if dev and configured_database_url(settings) is None:
        report("starting the embedded PostgreSQL …")
        server = embedded.start(settings.data_dir)
        url = server.url()
    else:
        url = database_url(settings)
    with ExitStack() as stack:
        if server is not None:
            stack.callback(server.stop)
            stack.enter_context(embedded.served_alone(server.data_dir))
        if dev:
            migrate_all(url, report)
        if documents_folder is not None:
            engine = create_engine(url, pool_size=4, statement_timeout=settings.statement_timeout)
            try:
                load_documents(engine, settings, documents_folder, report)
            finally:
                engine.dispose()
        return event_loop.run(
            serve(settings, url, dev=dev, ready=lambda where: report(f"perdure serves on {where}"), place=place)
        )
