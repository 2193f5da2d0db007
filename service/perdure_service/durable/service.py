"""What can be asked about runs and approvals, for the RPC layer: async, checked, in domain terms."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa

from perdure_service.agents import catalogue
from perdure_service.domain.agents import AgentSpec, check_input, validator
from perdure_service.domain.approvals import Approval, ApprovalState, Decision
from perdure_service.domain.callers import check_namespace
from perdure_service.domain.events import (
    STREAM_STEP,
    Event,
    EventKind,
    Step,
    event_chars,
    fold_steps,
)
from perdure_service.domain.executors import Executor
from perdure_service.domain.payloads import parse
from perdure_service.domain.queues import Queue
from perdure_service.domain.quotas import StartQuota
from perdure_service.domain.runs import (
    SIGNAL_NAME,
    Run,
    RunFilter,
    RunKey,
    RunStart,
    RunState,
    check_client_run_id,
    input_sha256,
    new_run_id,
)
from perdure_service.domain.stranded import StrandedRun
from perdure_service.durable import artifacts, deletions, forks, hops, inbox, outside
from perdure_service.durable.artifacts import Artifact, ArtifactChoice
from perdure_service.durable.requests import (
    DeleteCommand,
    Deleted,
    ForkCommand,
    Page,
    RunTrace,
    StartCommand,
    WatchBatch,
)
from perdure_service.durable.run_trace import trace_of
from perdure_service.durable.runtime import CALLER_POOL_PATIENCE_S, Runtime, Started
from perdure_service.durable.view import refuse_truncated
from perdure_service.durable.waiting import Waiting
from perdure_service.durable.watching import Watching
from perdure_service.errors import (
    AgentNotFound,
    ApprovalNotFound,
    InvalidArgument,
    NobodyStandsBy,
    OffsetOutOfRange,
    Overloaded,
    QuotaExceeded,
    RunConflict,
    RunInputMismatch,
    RunNotFound,
    VersionUnavailable,
)
from perdure_service.store import agents as agent_store
from perdure_service.store import approvals as approval_store
from perdure_service.store import cells, event_log, executors, queues, runs, stranded
from perdure_service.store.cells import CellStatus
from perdure_service.store.engine import waits_for_a_connection
from perdure_service.store.run_reader import RunReader
from perdure_service.store.runs import MAX_PAGE_CHARS
from perdure_service.store.sqlstates import reading, retrying
from perdure_service.store.tailer import Tailer
from perdure_service.telemetry import METERS, derive_trace_id, parse_traceparent
from perdure_service.telemetry import metrics as m

T = TypeVar("T")

TOO_MANY_CALLS = "this server has more calls than it can serve; wait and repeat the call"


class RunService:
    """Runs and approvals. All methods raise `PerdureError`s; every id they take is a caller's."""

    def __init__(
        self,
        runtime: Runtime,
        tailer: Tailer,
        *,
        namespaces: Sequence[str],
        max_threads: int,
        poll_s: float,
        max_waiting_calls: int = 1_000,
        max_starts_per_second: float | None = None,
    ) -> None:
        """Creates the service over a launched runtime.

        Args:
            runtime: The engine.
            tailer: Feeds watchers.
            namespaces: Those that exist.
            max_threads: Threads for database calls.
            poll_s: How often the inbox is looked at while it is watched.
            max_waiting_calls: Calls that may wait for one of the threads.
            max_starts_per_second: See `StartQuota`.
        """
        self._runtime = runtime
        self._engine = runtime.engine
        self._tailer = tailer
        self._namespaces = frozenset(namespaces)
        self._pool = ThreadPoolExecutor(max_threads, thread_name_prefix="rpc-db-")
        self._max_calls = max_threads + max_waiting_calls
        self._calls = 0
        self._runs = RunReader(self._find_runs, max_waiting=self._max_calls, patience_s=CALLER_POOL_PATIENCE_S)
        self._quota = StartQuota(max_starts_per_second)
        self._inbox = inbox.Inbox(self._read_inbox, poll_s, lambda: runtime.hints.arrives)
        self._watching = Watching(self._read_for_stream, partial(self.get, full=False), tailer)
        self._waiting = Waiting(self.get, runtime.executions, tailer)
        runtime.hints.attach(tailer, self._inbox.wake)
        METERS.observe(
            m.WATCHERS,
            lambda: [(tailer.watchers, {m.WATCH: "run"}), (self._inbox.watchers, {m.WATCH: "approvals"})],
        )

    def close(self) -> None:
        """Ends the threads."""
        self._runs.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what blocks in a thread; a call that its caller has given up is not begun any more.

        Raises:
            Overloaded: As many calls wait for a thread as may: the database is slower than what is asked of it.
        """
        if self._calls >= self._max_calls:
            raise Overloaded(TOO_MANY_CALLS)
        return await self._run(self._for_a_caller, function, *arguments)

    def _for_a_caller(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls what somebody waits for: it gives up soon when no connection is free, or the database away."""
        with self._runtime.database.bounded(), waits_for_a_connection(CALLER_POOL_PATIENCE_S):
            return function(*arguments)

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        finally:
            self._calls -= 1

    async def _read_for_stream(self, name: str, function: Callable[[sa.Connection], T]) -> T:
        """Reads, by one statement, for a stream that is open: never refused, as streams are bounded themselves."""
        return await self._run(reading, self._engine, name, function)

    async def _read(self, name: str, function: Callable[[sa.Connection], T]) -> T:
        return await self._call(reading, self._engine, name, function)

    def _find_runs(self, workflow_ids: Sequence[str], full: bool) -> Mapping[str, Run]:
        return self._for_a_caller(
            reading, self._engine, "runs.find", partial(runs.find, workflow_ids=workflow_ids, full=full)
        )

    def _check_namespace(self, namespace: str) -> None:
        check_namespace(namespace, self._namespaces)

    # ---- starts ------------------------------------------------------------------------------------------------------

    async def start(self, command: StartCommand) -> tuple[Run, bool]:
        """Starts an agent; returns the run and whether this request created it."""
        self._check_namespace(command.namespace)
        if command.run_id:
            check_client_run_id(command.run_id)
        start, agent, arguments = await self._decide(command)
        if command.validate_only:
            return _not_created(start), False
        charged = await self._charge(start, server_made_id=not command.run_id)
        started = await self._start(start, agent, arguments, server_made_id=not command.run_id)
        if started.run is not None:
            return started.run, True
        run, created = await self._existing(start, started.workflow_id)
        if charged and not created:
            self._quota.give_back(start.key.namespace)
        if command.refuse_existing and not created:
            raise RunConflict(f"run {run.key.run_id!r} exists, started by another request; choose another run_id")
        return run, created

    async def _start(
        self, start: RunStart, agent: catalogue.RegisteredAgent, arguments: dict[str, Any], *, server_made_id: bool
    ) -> Started:
        """Starts a run, if it can be without a thread that waits."""
        if self._calls >= self._max_calls:
            raise Overloaded(TOO_MANY_CALLS)
        prepared = self._runtime.prepare(agent, start, arguments, server_made_id=server_made_id)
        promise = self._runtime.start_soon(prepared)
        if promise is None:
            return await self._call(self._runtime.start, prepared)
        self._calls += 1
        try:
            return await hops.result_of(promise)
        finally:
            self._calls -= 1

    async def _existing(self, start: RunStart, workflow_id: str) -> tuple[Run, bool]:
        """Returns the run that a start has found, and whether this request had created it.

        Raises:
            RunConflict: It is no run.
            RunInputMismatch: It is another one.
        """
        found = await self._runs.get(workflow_id)
        if not found:
            raise RunConflict(f"the id {start.key.run_id!r} is taken by something that is not a run")
        run = found[0]
        if (run.agent, run.input_sha256) != (start.agent, start.input_sha256):
            raise RunInputMismatch(
                f"run {run.key.run_id!r} exists with another agent or input; choose another run_id",
                existing_sha256=run.input_sha256,
                requested_sha256=start.input_sha256,
            )
        return run, run.request_id == start.request_id

    async def _charge(self, start: RunStart, *, server_made_id: bool) -> bool:
        """Takes a start from the namespace's quota; returns False for a repeat, whose run is there: it needs none.

        Raises:
            QuotaExceeded: None is left; it says how long to wait.
        """
        namespace = start.key.namespace
        wait_s = self._quota.take(namespace)
        if not wait_s:
            return True

        if server_made_id:
            find = partial(runs.find_request, namespace=namespace, request_id=start.request_id)
            exists = await self._read("runs.find_request", find) is not None
        else:
            exists = bool(await self._runs.get(start.key.workflow_id))
        if exists:
            return False
        limit = f"{self._quota.per_second:g}"
        raise QuotaExceeded(
            f"namespace {namespace!r} may start {limit} runs a second on this server; wait {wait_s:.3g} s and repeat",
            wait_s,
            limit_per_second=limit,
        )

    async def _decide(self, command: StartCommand) -> tuple[RunStart, catalogue.RegisteredAgent, dict[str, Any]]:
        """Fixes everything about a run before anything is written: the start, the agent, the workflow's arguments."""
        agent = catalogue.find(command.agent, command.agent_version)
        if agent is None:
            known = await self._read(
                "agents.find", lambda conn: agent_store.find(conn, command.agent, command.agent_version)
            )
            name = command.agent + (f"@{command.agent_version}" if command.agent_version else "")
            if known is None:
                raise AgentNotFound(f"there is no agent {name!r}; ListAgents tells which there are")
            raise VersionUnavailable(
                f"no executor here has the code of {name!r}; ask for another version, or deploy it"
            )
        check_input(agent.spec, command.run_input)
        if command.deadline_at is not None and command.start_at is not None and command.deadline_at <= command.start_at:
            raise InvalidArgument("deadline_time", "must be after start_time")
        arguments = agent.arguments(command.run_input)  # refuses what the schema allows but the types do not
        run_id = command.run_id or new_run_id(self._runtime.cell)
        key = RunKey.of_api(command.namespace, run_id)
        caller_span = parse_traceparent(command.trace_parent)
        start = RunStart(
            key=key,
            agent=command.agent,
            agent_version=agent.spec.version,
            input_sha256=input_sha256(command.agent, command.run_input),
            request_id=command.request_id or f"server-{new_run_id()}",
            caller=command.caller,
            labels=dict(command.labels or {}),
            context_id=command.context_id,
            trace_id=f"{caller_span.trace_id if caller_span else derive_trace_id(key.workflow_id):032x}",
            traceparent=command.trace_parent if caller_span else "",
            start_at=command.start_at,
            delay_s=command.delay_s,
            deadline_at=command.deadline_at,
            queue=self._runtime.queues.of_start(command.queue, agent.spec.queue),
            priority=command.priority,
        )
        return start, agent, arguments

    async def fork(self, command: ForkCommand) -> tuple[Run, bool]:
        """Starts a run from the recorded steps of another one; returns it and whether this request created it."""
        self._check_namespace(command.namespace)
        try:
            origin = await self._find(command.namespace, command.run_id, full=True)
        except RunNotFound:
            origin = None  # a repeat is answered whatever became of it
        forked, created = await self._call(forks.fork, self._runtime, origin, command)
        return (_not_created(forked) if isinstance(forked, RunStart) else forked), created

    # ---- reads -------------------------------------------------------------------------------------------------------

    async def get(self, namespace: str, run_id: str, *, full: bool) -> Run:
        """Returns a run; an input or output that is too large for a message is left out."""
        self._check_namespace(namespace)
        run = await self._find(namespace, run_id, full=full)
        return await self._fitted(run) if full else run

    async def _fitted(self, run: Run) -> Run:
        if artifacts.fits_by_itself(run):
            return artifacts.fit(self._runtime.payloads, run)
        return await self._call(artifacts.fit, self._runtime.payloads, run)

    async def _find(self, namespace: str, run_id: str, *, full: bool = False) -> Run:
        """Returns a run, closing its log if a foreign client ended it, and adopting it if one made it.

        Raises:
            RunNotFound: There is none.
        """
        run = await self._look(namespace, run_id, full=full)
        if run is None and await self._call(outside.adopt_foreign, self._runtime, namespace, run_id):
            run = await self._look(namespace, run_id, full=full)
        if run is None:
            raise RunNotFound(f"there is no run {run_id!r} in namespace {namespace!r}")
        if run.state.terminal and run.end_time is None:
            await self._call(self._runtime.database.close_ended, [run.key.workflow_id])
            run = await self._look(namespace, run_id, full=full) or run
        if parse(run.input_json) is None:
            return run
        return await self._call(artifacts.with_input, self._runtime.payloads, run)

    async def _look(self, namespace: str, run_id: str, *, full: bool) -> Run | None:
        """Returns a run as the database has it, under either of the workflow ids that it may have; None without one."""
        own, foreign = RunKey.of_api(namespace, run_id), RunKey.foreign(namespace, run_id)
        for run in await self._runs.get(own.workflow_id, foreign.workflow_id, full=full):
            # Not by the workflow id that the engine has for a run with an id of its own.
            if (run.key.namespace, run.key.run_id) == (namespace, run_id):
                return run
        return None

    async def read_artifact(
        self, namespace: str, run_id: str, which: ArtifactChoice, offset: int
    ) -> AsyncIterator[Artifact | bytes]:
        """Yields what an artifact is, then its bytes from an offset, in pieces of at most 256 KiB."""
        run = await self.get(namespace, run_id, full=False)
        if which.name is None:
            run = await self._find(namespace, run_id, full=True)
        opened = await self._call(artifacts.open_artifact, self._runtime.payloads, self._engine, run, which)
        if offset > opened.artifact.size_bytes:
            raise OffsetOutOfRange(
                f"the artifact has {opened.artifact.size_bytes} bytes", size_bytes=str(opened.artifact.size_bytes)
            )
        yield opened.artifact
        pieces = opened.pieces(offset)
        # As streams are bounded themselves, their reads are never refused.
        while (data := await self._run(next, pieces, None)) is not None:
            for start in range(0, len(data), artifacts.SENT_BYTES):
                yield data[start : start + artifacts.SENT_BYTES]

    async def list(self, namespace: str, run_filter: RunFilter, *, page_size: int, page_token: str) -> Page[Run]:
        """Returns a page of runs, newest first. `page_size` is already bounded to 1..1,000."""
        self._check_namespace(namespace)
        found, token = await self._read(
            "runs.list",
            lambda conn: runs.list_page(conn, namespace, run_filter, page_size=page_size, page_token=page_token),
        )
        return Page(found, token)

    async def wait(self, namespace: str, run_id: str, *, full: bool, timeout_s: float) -> tuple[Run, bool]:
        """Waits for a run's end; returns the run and whether the time was up first."""
        self._check_namespace(namespace)
        return await self._waiting.wait(namespace, run_id, full=full, timeout_s=timeout_s)

    async def outcome(self, run: Run, *, timeout_s: float) -> Run:
        """Waits for the end of a run, and returns it with its output; or as it is when the time is up.

        Of a run that ends in this process nothing is read.

        Args:
            run: As it was.
            timeout_s: How long to wait.

        Raises:
            RunNotFound: It was deleted meanwhile.
        """
        namespace, run_id = run.key.namespace, run.key.run_id
        run, _ = await self._waiting.wait(namespace, run_id, full=False, timeout_s=timeout_s)
        if run.state is RunState.SUCCEEDED and run.output_json is None:
            run = await self._find(namespace, run_id, full=True)
        return await self._fitted(run)

    async def list_events(
        self, namespace: str, run_id: str, kinds: frozenset[EventKind], *, page_size: int, page_token: str
    ) -> Page[Event]:
        """Returns a page of a run's log, the first one from the earliest event that is kept.

        Raises:
            CursorOutOfRange: What follows the page before is no longer kept.
        """
        run = await self.get(namespace, run_id, full=False)
        filter_key = ["events", run.key.workflow_id, sorted(kinds)]
        after = runs.decode_token(page_token, filter_key, int)[0] if page_token else 0
        chosen: list[Event] = []
        chars = 0
        more = True
        while more and len(chosen) <= page_size and chars <= MAX_PAGE_CHARS:
            events = await self._read(
                "events.read", partial(event_log.read, workflow_id=run.key.workflow_id, after_sequence=after)
            )
            more = bool(events)
            if after and events and events[0].sequence != after + 1:
                await refuse_truncated(self._read, run.key, after)
            for event in events:
                after = event.sequence
                if not kinds or event.kind in kinds:
                    chosen.append(event)
                    chars += event_chars(event)
                if len(chosen) > page_size or chars > MAX_PAGE_CHARS:
                    break
        page = chosen[:page_size]
        token = runs.encode_token([page[-1].sequence], filter_key) if more and page else ""
        return Page(page, token)

    async def list_steps(self, namespace: str, run_id: str, *, page_size: int, page_token: str) -> Page[Step]:
        """Returns a page of a run's steps.

        Raises:
            CursorOutOfRange: They are no longer known, as the beginning of the log is no longer kept.
        """
        run = await self.get(namespace, run_id, full=False)
        filter_key = ["steps", run.key.workflow_id]
        skip = runs.decode_token(page_token, filter_key, int)[0] if page_token else 0
        steps = fold_steps(await self._all_events(run.key))
        page: list[Step] = []
        chars = 0
        for step in steps[skip : skip + page_size]:
            page.append(step)
            chars += 200 + len(step.output_preview) + len(json.dumps(dict(step.error or {})))
            if chars > MAX_PAGE_CHARS:
                break
        end = skip + len(page)
        return Page(page, runs.encode_token([end], filter_key) if end < len(steps) else "")

    async def _all_events(self, key: RunKey) -> Sequence[Event]:
        """Returns all events of a run but its streamed text.

        Raises:
            CursorOutOfRange: Not all are kept.
        """
        found: list[Event] = []
        after = 0
        while events := await self._read(
            "events.read", partial(event_log.read, workflow_id=key.workflow_id, after_sequence=after)
        ):
            if events[0].sequence != after + 1:
                await refuse_truncated(self._read, key, after, "its steps are not known any more, its result is")
            after = events[-1].sequence
            # The text of steps may be long, and says nothing of them; an entry of DBOS's streams is a step of its own.
            found.extend(e for e in events if e.kind is not EventKind.OUTPUT_DELTA or e.step_name == STREAM_STEP)
        return found

    async def trace(self, namespace: str, run_id: str, *, include_children: bool) -> RunTrace:
        """Returns the spans of a run's trace, with those of the runs it has started if they are wanted."""
        run = await self.get(namespace, run_id, full=False)
        return await trace_of(self._read, run, include_children=include_children)

    # ---- watching ----------------------------------------------------------------------------------------------------

    def watch(
        self,
        namespace: str,
        run_id: str,
        *,
        cursor: str | None = None,
        after_sequence: int | None = None,
        from_now: bool = False,
        kinds: frozenset[EventKind] = frozenset(),
        include_children: bool = False,
        heartbeat_s: float = 15.0,
    ) -> AsyncIterator[WatchBatch]:
        """Yields a run's stream as WatchRun's contract says, heartbeats included, and ends with the run."""
        return self._watching.watch(
            namespace,
            run_id,
            cursor=cursor,
            after_sequence=after_sequence,
            from_now=from_now,
            kinds=kinds,
            include_children=include_children,
            heartbeat_s=heartbeat_s,
        )

    # ---- steering ----------------------------------------------------------------------------------------------------

    async def signal(
        self, namespace: str, run_id: str, *, name: str, payload: Any, request_id: str, sender: str
    ) -> bool:
        """Delivers a signal; returns False when this request_id had delivered it before."""
        if not SIGNAL_NAME.fullmatch(name):
            raise InvalidArgument("name", "must match [A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
        if payload is None:
            raise InvalidArgument("payload", "must not be null: an agent takes that for a signal that did not come")
        run = await self.get(namespace, run_id, full=False)
        return await self._call(
            lambda: outside.signal(
                self._runtime, run.key, name=name, payload=payload, request_id=request_id, sender=sender
            )
        )

    async def cancel(self, namespace: str, run_id: str, *, reason: str, caller: str) -> Run:
        """Cancels a run and its children; returns the run as it is then."""
        run = await self.get(namespace, run_id, full=False)
        if run.state.terminal:
            return run
        why = f"cancelled by {caller}" if caller else "cancelled"
        why += f": {reason}" if reason else ""
        await self._call(lambda: outside.cancel(self._runtime, run.key, why))
        return await self.get(namespace, run_id, full=False)

    async def delete(self, command: DeleteCommand) -> Deleted:
        """Deletes runs that have ended; returns what was deleted, and what was not."""
        self._check_namespace(command.namespace)
        return await self._call(deletions.delete, self._runtime, command)

    # ---- approvals ---------------------------------------------------------------------------------------------------

    async def list_approvals(
        self, namespace: str, states: frozenset[ApprovalState], run_id: str, *, page_size: int, page_token: str
    ) -> Page[Approval]:
        """Returns a page of approvals, oldest first. Empty `states` means PENDING."""
        self._check_namespace(namespace)
        found, token = await self._read(
            "approvals.list",
            lambda conn: approval_store.list_page(
                conn,
                namespace,
                states=states or frozenset({ApprovalState.PENDING}),
                run_id=run_id,
                page_size=page_size,
                page_token=page_token,
            ),
        )
        return Page(found, token)

    async def get_approval(self, namespace: str, approval_id: str) -> Approval:
        """Returns an approval."""
        self._check_namespace(namespace)
        found = await self._read("approvals.find", lambda conn: approval_store.find(conn, namespace, approval_id))
        if found is None:
            raise ApprovalNotFound(f"there is no approval {approval_id!r} in namespace {namespace!r}")
        return found

    async def decide_approval(self, namespace: str, approval_id: str, decision: Decision) -> Approval:
        """Decides an approval, once; returns it as it is then."""
        approval = await self.get_approval(namespace, approval_id)
        if approval.answer_schema_json and decision.approve:
            answer = json.loads(decision.answer_json) if decision.answer_json else None
            problems = [e.message for e in validator(json.loads(approval.answer_schema_json)).iter_errors(answer)]
            if problems:
                raise InvalidArgument("answer", problems[0][:300])
        decided = await self._call(lambda: outside.decide(self._runtime, approval, decision))
        self._inbox.wake()
        return decided

    async def watch_approvals(
        self, namespace: str, *, heartbeat_s: float = 15.0
    ) -> AsyncIterator[tuple[Sequence[Approval], bool]]:
        """Yields (changed approvals, caught up): first what is pending, then changes; empty ones are heartbeats."""
        self._check_namespace(namespace)
        with self._inbox.watching(namespace) as mailbox:
            yield mailbox.begin(await self._call(self._read_inbox, [namespace])), True
            while True:
                news: Sequence[Approval] = ()
                with suppress(TimeoutError):
                    async with asyncio.timeout(heartbeat_s):
                        news = await mailbox.take()
                yield news, True

    def _read_inbox(self, namespaces: Sequence[str]) -> Sequence[Approval]:
        return reading(
            self._engine,
            "approvals.inbox",
            lambda conn: approval_store.inbox(conn, namespaces, inbox.OVERLAP_S),
        )

    # ---- catalogue ---------------------------------------------------------------------------------------------------

    async def list_agents(self, *, page_size: int, page_token: str) -> Page[AgentSpec]:
        """Returns a page of the catalogue by name and version."""
        found, token = await self._read(
            "agents.list", lambda conn: agent_store.list_page(conn, page_size=page_size, page_token=page_token)
        )
        return Page(found, token)

    async def get_agent(self, name: str, version: str) -> AgentSpec:
        """Returns a catalogue entry; the current version when `version` is empty."""
        found = await self._read("agents.find", lambda conn: agent_store.find(conn, name, version))
        if found is None:
            raise AgentNotFound(f"there is no agent {name + ('@' + version if version else '')!r}")
        return found

    # ---- operators ---------------------------------------------------------------------------------------------------

    async def list_executors(self, *, include_gone: bool, page_size: int, page_token: str) -> Page[Executor]:
        """Returns a page of executors, the living first."""
        found, token = await self._read(
            "executors.list",
            lambda conn: executors.list_page(
                conn, include_gone=include_gone, page_size=page_size, page_token=page_token
            ),
        )
        return Page(found, token)

    async def list_queues(self, *, page_size: int, page_token: str) -> Page[Queue]:
        """Returns a page of the queues, by name."""
        found, token = await self._read(
            "queues.list", lambda conn: queues.list_page(conn, page_size=page_size, page_token=page_token)
        )
        return Page(found, token)

    async def list_stranded(self, *, page_size: int, page_token: str) -> Page[StrandedRun]:
        """Returns a page of the runs that no living executor can continue, the oldest first."""
        found, token = await self._read(
            "stranded.list", lambda conn: stranded.list_page(conn, page_size=page_size, page_token=page_token)
        )
        return Page(found, token)

    async def cell_status(self) -> CellStatus | None:
        """Returns who serves the cell of this server's database; None without regions."""
        return await self._read("cell.status", cells.status)

    async def move_cell(self, region: str) -> None:
        """Gives the runs of this server's cell to the executors that stand by in a region; nothing if they have them.

        Raises:
            NobodyStandsBy: There are none.
        """

        def move(conn: sa.Connection) -> bool:
            row = cells.read(conn)
            return row is not None and (row.region == region or cells.give(conn, row, region))

        if not await self._call(retrying, self._engine, "cell.move", move):
            raise NobodyStandsBy(f"no server stands by in {region}: start one there that serves this cell, and repeat")


def _not_created(start: RunStart) -> Run:
    """Returns what `validate_only` shows: the run as it would be."""
    later = start.start_at is not None or bool(start.delay_s)
    state = RunState.SCHEDULED if later else RunState.QUEUED
    return Run.of_start(start, state, datetime.now(UTC), state_reason="validated only; not created")


__all__ = [
    "DeleteCommand",
    "Deleted",
    "ForkCommand",
    "Page",
    "RunFilter",
    "RunService",
    "StartCommand",
    "WatchBatch",
]
