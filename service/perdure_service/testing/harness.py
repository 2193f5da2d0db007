"""The harness: runs agents to their end in a test, on a real database and the server's own engine, and crashes it.

The engine lives on threads of its own, so a harness can be used from any event loop, or from several. DBOS is a
process singleton: there is one harness at a time, and one after the other as often as you like.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import uuid4

from perdure_service.agents import catalogue, models, resources
from perdure_service.agents import context as agents_context
from perdure_service.domain.approvals import Approval, ApprovalState, Decision
from perdure_service.domain.runs import Run, RunKey
from perdure_service.durable import substitutes
from perdure_service.durable.crash import Condition, recorded_steps, step_recorded
from perdure_service.durable.requests import StartCommand
from perdure_service.durable.service import RunService
from perdure_service.errors import PerdureError
from perdure_service.settings import Settings, load_settings, test_database_url
from perdure_service.store.sqlstates import retrying
from perdure_service.telemetry import RunTracer
from perdure_service.testing import decisions as decided
from perdure_service.testing.databases import own_database
from perdure_service.testing.decisions import Decisions
from perdure_service.testing.engine import Engine
from perdure_service.testing.model import ScriptedModel
from perdure_service.testing.points import CrashNeverHappened, CrashPoint
from perdure_service.testing.replay import check_replay
from perdure_service.testing.runs import POLL_S, HarnessRun, RunFailed

T = TypeVar("T")

QUICK = {"queue_poll_interval": "0.05", "watch_poll_interval": "0.1", "max_running": 100}
"""Settings of a server that would make tests wait."""

_in_use = threading.Lock()


class AgentHarness:
    """Runs agents in a test; see the module. `async with AgentHarness(...) as harness`, or `BlockingHarness`."""

    def __init__(
        self,
        agents: Iterable[str] = (),
        *,
        decide: Decisions | None = None,
        model: ScriptedModel | None = None,
        database_url: str | None = None,
        data_dir: Path | None = None,
        timeout_s: float = 30.0,
        **settings: Any,
    ) -> None:
        """Creates a harness; `async with` launches its engine.

        Args:
            agents: Modules to load agents from; those that the test itself has declared or imported are there anyway.
            decide: Who decides approvals: True approves all, False rejects all, a mapping decides by title, and a
                function returns a decision or None. None: the test, by `approve` and `reject`.
            model: What answers the agents' model calls, instead of an endpoint.
            database_url: A PostgreSQL or CockroachDB server on which to create the harness's own database;
                PERDURE_TEST_DATABASE_URL by default, else an embedded PostgreSQL. Never PERDURE_DATABASE_URL.
            data_dir: Where the embedded PostgreSQL keeps its data; by default in the user's data folder.
            timeout_s: How long to wait for the end of a run when a call does not say it.
            **settings: Settings of the server, by name, e.g. `max_running=1`.
        """
        self.timeout_s = timeout_s
        self.model = model
        self.crashes = 0
        """How often the engine has died."""
        self._agents = tuple(agents)
        self._decide = None if decide is None else decided.decider(decide)
        self._server_url = database_url
        self._data_dir = data_dir
        self._given = settings
        self._plans: dict[str, CrashPoint] = {}
        self._armed: tuple[str, CrashPoint] | None = None
        self._stack = ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._alive = asyncio.Event()
        self._broken: Exception | None = None
        self._broke: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._settings: Settings | None = None
        self._url = ""

    # ---- life --------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.open)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await asyncio.to_thread(self.close)
        if kind is None:
            self.check_crashed()

    def open(self) -> None:
        """Makes the database and launches the engine. Blocks.

        Raises:
            RuntimeError: There is another harness in this process.
            ConfigurationError: An agent or the database cannot be used; in one sentence.
        """
        if not _in_use.acquire(blocking=False):
            raise RuntimeError(
                "there is a harness in this process already, and DBOS can run once in a process: close it first (is a "
                "fixture of a wider scope still open?)"
            )
        try:
            self._stack.callback(_in_use.release)
            if self.model is not None:
                self._stack.enter_context(self.model.serving())
            self._settings = load_settings(**{**QUICK, **self._given})
            catalogue.load(self._agents, entry_points=False)
            models.prepare(self._settings.model)
            self._url = self._stack.enter_context(own_database(self._server_url or test_database_url(), self._data_dir))
            self._stack.callback(resources.bind, None)
            self._stack.callback(agents_context.bind, agents_context.bind(lambda: None))
            self._start_loop()
            self._stack.callback(lambda: self._submit(self._shut_down()).result())
            self._submit(self._start_up()).result()
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """Stops the engine and drops the database. Blocks."""
        self._stack.close()

    def _start_loop(self) -> None:
        loop = self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="perdure-harness", daemon=True)
        thread.start()

        def stop() -> None:
            self._submit(loop.shutdown_default_executor()).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

        self._stack.callback(stop)

    async def _start_up(self) -> None:
        assert self._settings is not None, "opened"
        self._broke = asyncio.get_running_loop().create_future()
        await self._launch()
        self._tasks = [asyncio.create_task(self._rise_again())]
        if self._decide is not None:
            self._tasks.append(asyncio.create_task(self._decide_all()))

    async def _launch(self) -> None:
        assert self._settings is not None, "opened"
        self._engine = Engine(self._settings, self._url, RunTracer(None, None))
        await self._engine.launch()
        self._alive.set()

    async def _rise_again(self) -> None:
        """Launches a new engine whenever one has died."""
        try:
            while self._engine is not None:
                await self._engine.died
                self._alive.clear()
                self._armed = None
                await self._engine.bury()
                await self._launch()
                self.crashes += 1
        except Exception as error:  # noqa: BLE001 - whoever calls next is told
            self._break(error)

    def _break(self, error: Exception) -> None:
        self._broken = error
        self._alive.set()
        if self._broke is not None and not self._broke.done():
            self._broke.set_result(None)

    async def _living(self) -> Engine:
        """Returns the engine, once there is one that lives. On the harness's loop."""
        while True:
            await self._alive.wait()
            if self._broken is not None:
                raise RuntimeError(f"the harness broke: {self._broken!r}") from self._broken
            assert self._engine is not None, "alive"
            if not self._engine.mortal.dead:
                return self._engine
            await asyncio.sleep(POLL_S)

    async def _shut_down(self) -> None:
        with suppress(Exception):
            await self._living()  # one that rises again is not interrupted
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._engine is not None:
            await (self._engine.bury() if self._engine.mortal.dead else self._engine.stop())
        substitutes.restore()

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _submit(self, coroutine: Any) -> Future[Any]:
        assert self._loop is not None, "open the harness first: `async with AgentHarness(...) as harness`"
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def call(self, call: Callable[[RunService], Awaitable[T]]) -> T:
        """Calls the service on the harness's loop, again when the engine dies meanwhile: every call may be repeated."""
        result: T = await asyncio.wrap_future(self._submit(self._repeated(call)))
        return result

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns what a coroutine of this harness returns; blocks a thread that has no event loop."""
        result: T = self._submit(coroutine).result()
        return result

    async def _repeated(self, call: Callable[[RunService], Awaitable[T]]) -> T:
        while True:
            engine = await self._living()
            task: asyncio.Future[T] = asyncio.ensure_future(call(engine.service))
            assert self._broke is not None, "started"
            first: set[asyncio.Future[Any]] = {task, engine.died, self._broke}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not engine.mortal.dead and self._broken is None:
                return await task
            if task.done() and not task.cancelled() and task.exception() is None:
                return task.result()
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def start(
        self,
        agent: str,
        run_input: Any = None,
        *,
        run_id: str = "",
        version: str = "",
        labels: Mapping[str, str] | None = None,
        namespace: str = "default",
    ) -> HarnessRun:
        """Starts an agent; returns the run once its start is committed.

        Raises:
            PerdureError: As a server refuses it: no such agent, an input that does not fit, a taken `run_id` …
        """
        key = RunKey.of_api(namespace, run_id or f"{agent[:40].replace('_', '-')}-{uuid4().hex[:8]}")
        command = StartCommand(
            namespace=namespace,
            agent=agent,
            agent_version=version,
            run_id=key.run_id,
            request_id=uuid4().hex,
            run_input={} if run_input is None else run_input,
            caller="test",
            labels=labels,
        )
        plan = self._plans.pop(agent, None)
        if plan is not None:
            await self.arm(key, step_recorded(key.workflow_id, plan.step_id), plan)
        await self.call(lambda service: service.start(command))
        return HarnessRun(self, key)

    async def run(self, agent: str, run_input: Any = None, *, timeout_s: float | None = None, **options: Any) -> Any:
        """Starts an agent, waits for its end and returns its output; see `start` and `HarnessRun.result`."""
        return await (await self.start(agent, run_input, **options)).result(timeout_s)

    async def signal(self, run: HarnessRun, name: str, payload: Any, *, request_id: str = "") -> None:
        """Sends a signal; the run takes it when it asks for it."""
        chosen = request_id or uuid4().hex
        await self.call(
            lambda service: service.signal(
                run.key.namespace, run.id, name=name, payload=payload, request_id=chosen, sender="test"
            )
        )

    async def cancel(self, run: HarnessRun, reason: str = "cancelled by the test") -> Run:
        """Cancels a run; returns it as it is then."""
        return await self.call(lambda service: service.cancel(run.key.namespace, run.id, reason=reason, caller="test"))

    async def approve(self, run: HarnessRun, comment: str = "", *, answer: Any = None, title: str = "") -> Approval:
        """Approves what a run asks, and waits for the question if it has not come to it.

        Args:
            run: The run.
            comment: The decision's comment.
            answer: The answer, if the question has a schema for one.
            title: Which question, if it asks several at once.

        Raises:
            RunFailed: It ended without asking.
            TimeoutError: It did not ask in time.
        """
        return await self.decide(run, decided.approval(comment, answer=answer), title=title)

    async def reject(self, run: HarnessRun, comment: str = "", *, title: str = "") -> Approval:
        """Rejects what a run asks; see `approve`."""
        return await self.decide(run, decided.rejection(comment), title=title)

    async def decide(self, run: HarnessRun, decision: Decision, *, title: str = "") -> Approval:
        """Decides what a run asks; see `approve`."""
        approval_id = await self._asked(run, title)
        return await self.call(lambda service: service.decide_approval(run.key.namespace, approval_id, decision))

    async def _asked(self, run: HarnessRun, title: str) -> str:
        """Waits for a question of a run, and returns its id."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            for approval in await run.approvals():
                if title in ("", approval.title):
                    return approval.approval_id
            now = await run.get()
            if now.state.terminal:
                raise RunFailed(now)
            if time.monotonic() > deadline:
                raise TimeoutError(f"run {run.id} is {now.state.value} and asks nothing after {self.timeout_s:g} s")
            await asyncio.sleep(POLL_S)

    async def _decide_all(self) -> None:
        """Decides as the test wants, also what was asked before a crash."""
        assert self._decide is not None, "wanted"
        try:
            while True:
                with suppress(PerdureError):  # it ended, or was decided otherwise, in between
                    await self._repeated(self._decide_open)
                await asyncio.sleep(POLL_S)
        except Exception as error:  # noqa: BLE001 - of the test's own function; whoever calls next is told
            self._break(error)

    async def _decide_open(self, service: RunService) -> None:
        assert self._settings is not None, "opened"
        assert self._decide is not None, "wanted"
        for namespace in self._settings.namespaces:
            page = await service.list_approvals(
                namespace, frozenset({ApprovalState.PENDING}), "", page_size=100, page_token=""
            )
            for asked in page.items:
                decision = self._decide(asked)
                if decision is not None:
                    await service.decide_approval(namespace, asked.approval_id, decision)

    # ---- crashes -----------------------------------------------------------------------------------------------------

    async def crash(self) -> None:
        """Crashes the engine now, as `kill -9` would, and returns when another one has taken over.

        Raises:
            ValueError: Another crash is still to come.
        """
        engine = await self._alive_engine()
        self._refuse_second_crash(engine)
        engine.mortal.die()
        await self._alive_engine()

    async def _alive_engine(self) -> Engine:
        engine: Engine = await asyncio.wrap_future(self._submit(self._living()))
        return engine

    @staticmethod
    def _refuse_second_crash(engine: Engine) -> None:
        if engine.mortal.armed:
            raise ValueError("another crash is still to come; wait for it with `crashed`")

    async def crash_after_step(self, run: HarnessRun | str, step_id: int, *, before: bool = False) -> None:
        """Makes the engine crash right after it commits a step, once; another engine then continues the run.

        Everything that the engine runs dies with it. What survives is what is committed, and what is in modules.

        Args:
            run: A run, or the name of an agent: then the next run of it that is started.
            step_id: The number of the step, from 1, as `HarnessRun.steps` and `perdure steps` tell. Sleeps, signals,
                approvals and children are steps.
            before: Right before the commit instead: the step has done its work, and nobody knows.

        Raises:
            ValueError: The run has recorded the step already, or another crash is still to come.
        """
        point = CrashPoint(step_id, before)
        if isinstance(run, str):
            self._plans[run] = point
            return
        if step_id in [number for number, _ in await self.recorded(run)]:
            raise ValueError(f"run {run.id} has recorded step {step_id} already")
        await self.arm(run.key, step_recorded(run.key.workflow_id, step_id), point)

    async def crashed(self) -> None:
        """Waits until the crash that is to come has come, and another engine has taken over.

        Raises:
            TimeoutError: It has not in time.
        """
        deadline = time.monotonic() + self.timeout_s
        while self._armed is not None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the engine has not crashed within {self.timeout_s:g} s")
            await asyncio.sleep(POLL_S)
        await self._alive_engine()

    async def arm(self, key: RunKey, condition: Condition, point: CrashPoint) -> None:
        """Makes the engine crash at the first commit that a condition is true for.

        Raises:
            ValueError: Another crash is still to come.
        """
        engine = await self._alive_engine()
        self._refuse_second_crash(engine)
        self._armed = (key.run_id, point)
        engine.mortal.arm(condition, before=point.before)

    def known(self, run_id: str, namespace: str = "default") -> HarnessRun:
        """Returns the run of an id, whether or not it was started here, or at all yet."""
        return HarnessRun(self, RunKey.of_api(namespace, run_id))

    @staticmethod
    def mark() -> str:
        """Returns some characters that no id had before."""
        return uuid4().hex[:8]

    def disarm(self) -> None:
        """Calls off the crash that is still to come."""
        self._armed = None
        self._plans.clear()
        if self._engine is not None:
            self._engine.mortal.arm(None)

    def check_crashed(self, key: RunKey | None = None) -> None:
        """Raises CrashNeverHappened when a crash (of a run) is still to come."""
        if self._armed is not None and (key is None or key.run_id == self._armed[0]):
            run_id, point = self._armed
            raise CrashNeverHappened(f"run {run_id} was to crash {point}, and never came to it")
        if key is None and self._plans:
            raise CrashNeverHappened(f"no run of {', '.join(self._plans)} was started to crash")

    async def recorded(self, run: HarnessRun) -> list[tuple[int, str]]:
        """Returns number and name of every operation of a run that is recorded: what a replay must meet again."""

        async def read(_service: RunService) -> list[tuple[int, str]]:
            engine = self._engine
            assert engine is not None, "alive"
            return await asyncio.to_thread(
                retrying,
                engine.database,
                "steps.recorded",
                lambda conn: recorded_steps(conn, run.key.workflow_id),
            )

        return await self.call(read)

    async def check_replay(self, agent: str, run_input: Any = None, **options: Any) -> list[tuple[int, str]]:
        """Crashes runs of an agent after each of their steps in turn; see `replay.check_replay`."""
        return await check_replay(self, agent, run_input, **options)
