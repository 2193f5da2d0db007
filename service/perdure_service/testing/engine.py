"""One life of the engine in a test: what a server has but for gRPC, launched, stopped, or left as a crash leaves it."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from perdure_service.agents import context as agents_context
from perdure_service.agents import resources
from perdure_service.domain.queues import Queues
from perdure_service.durable.context import current_run
from perdure_service.durable.crash import MortalRuntime, dispose_for_good
from perdure_service.durable.leases import new_executor_id
from perdure_service.durable.runtime import Runtime
from perdure_service.durable.service import RunService
from perdure_service.settings import Settings
from perdure_service.store import event_log, run_heads
from perdure_service.store.engine import create_engine
from perdure_service.store.sqlstates import reading
from perdure_service.store.tailer import Tailer
from perdure_service.telemetry import RunTracer


class Engine:
    """A launched engine. Used on one loop, that of the harness."""

    def __init__(self, settings: Settings, url: str, tracer: RunTracer) -> None:
        """Creates it; `launch` starts it."""
        loop = asyncio.get_running_loop()
        self.died: asyncio.Future[None] = loop.create_future()
        self._service: RunService | None = None

        def die() -> None:
            if not self.died.done():
                self.died.set_result(None)

        self._settings = settings
        self.database = create_engine(
            url, pool_size=settings.database_pool_size, statement_timeout=settings.statement_timeout
        )
        runtime = Runtime(
            self.database,
            new_executor_id(),
            application_version=settings.application_version,
            address="in-process",
            max_running=settings.max_running,
            max_threads=settings.max_threads,
            queue_poll=settings.queue_poll_interval,
            lease_ttl=settings.lease_ttl,
            tracer=tracer,
            lost=lambda: None,
            # The database is this engine's alone, so what a dead one left is taken back at once.
            owns_database=True,
            park_after=settings.park_after,
            queues=Queues.of_settings(settings.queues),
        )
        self.mortal = MortalRuntime(runtime, lambda: _tell(loop, die))
        self._tailer = Tailer(
            lambda seen: reading(self.database, "events.news", lambda conn: event_log.news(conn, seen)),
            lambda ids: runtime.database.close_ended_if_any(ids),
            lambda ids: reading(self.database, "runs.closed", lambda conn: run_heads.closed(conn, ids)),
            poll_s=settings.watch_poll_interval.total_seconds(),
            hinted=lambda: runtime.hints.arrives,
        )

    @property
    def service(self) -> RunService:
        """What the RPC layer of a server calls."""
        assert self._service is not None, "launched"
        return self._service

    async def launch(self) -> None:
        """Launches it, and takes back what an engine before it left."""
        settings, runtime = self._settings, self.mortal.runtime
        resources.bind(resources.Resources(self.database, settings))
        agents_context.bind(lambda: current_run(runtime.database))
        await asyncio.to_thread(self.mortal.launch)
        self._tailer.start()
        self._service = RunService(
            runtime,
            self._tailer,
            namespaces=settings.namespaces,
            max_threads=settings.max_threads,
            poll_s=settings.watch_poll_interval.total_seconds(),
        )

    async def stop(self) -> None:
        """Stops it as a server stops; a body that is in progress is not waited for."""
        await asyncio.to_thread(self.mortal.runtime.stop, timedelta(0))
        await self._end()
        await asyncio.to_thread(dispose_for_good, self.database)

    async def bury(self) -> None:
        """Clears away what a death has left, so that another engine can be launched."""
        await self._end()
        await asyncio.to_thread(self.mortal.bury)

    async def _end(self) -> None:
        await self._tailer.stop()
        self.service.close()


def _tell(loop: asyncio.AbstractEventLoop, function: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)  # type: ignore[arg-type]
