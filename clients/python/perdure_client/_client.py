"""The blocking client, written by make_sync_client.py from the asyncio one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from perdure_client import _requests
from perdure_client._artifacts import read_all
from perdure_client._bulk import StartResult
from perdure_client._bulk_waits import WaitResult
from perdure_client._config import (
    DEFAULT_CONNECT_TIMEOUT_S,
    DEFAULT_RECONNECT_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    TokenSource,
    make_config,
)
from perdure_client._core import Core
from perdure_client._events import EventKind, RunEvent
from perdure_client._iterators import (
    Starts,
    Watch,
    Watching,
    iterate,
    iterate_closing,
)
from perdure_client._listing import OnUnreachable
from perdure_client._transport_sync import SyncTransport, run_blocking
from perdure_client._types import (
    AgentInfo,
    Approval,
    ApprovalState,
    CellInfo,
    ConflictPolicy,
    Decision,
    Deletion,
    ExecutorInfo,
    JsonValue,
    QueueInfo,
    Run,
    RunState,
    RunTrace,
    StartedRun,
    Step,
    StrandedRun,
)
from perdure_client._watch import OnReconnect


class Client:
    """A client that blocks. Use one per process, from any number of threads; close it at the end.

        with Client() as client:
            run = client.start("research", {"question": "What survives a crash?"})
            for event in client.watch(run).events():
                print(event.sequence, event.kind, event.data)

    Every method repeats its call by itself while that is safe and promising (the server restarts, drains, or asks to
    wait), until its timeout. Every method may raise `PerdureError`; the subclasses say what to do.

    Args:
        address: `host:port`, or `https://host:port` for TLS. None: `PERDURE_ADDRESS`, else localhost:50051.
        token: Sent as a bearer token, over TLS or loopback only. A function is called for every attempt, and again
            when the server says that the token has expired; it must not block, so let it keep the token it has. None:
            `PERDURE_TOKEN`, else none.
        namespace: Of every call. None: `PERDURE_NAMESPACE`, else `default`.
        tls: Whether to speak TLS. None: as the address says, else if `PERDURE_TLS` or root certificates are given.
        root_certificates: PEM bytes of the authorities to trust. None: the file `PERDURE_CA_FILE`, else the usual
            public ones.
        client_certificate: PEM bytes of the client's certificate, where the server asks for one (mutual TLS). None:
            the file `PERDURE_CLIENT_CERTIFICATE_FILE`, else none.
        client_key: PEM bytes of its private key. None: the file `PERDURE_CLIENT_KEY_FILE`.
        server_name: The name that the server's certificate is for, where that is not the address. None:
            `PERDURE_SERVER_NAME`, else the address.
        timeout: Seconds for one call in all, repeats included.
        connect_timeout: Seconds a call goes on trying while no server can be reached.
        reconnect_timeout: Seconds a watch or a wait that has had answers goes on trying without any.

    Raises:
        ConfigurationError: The arguments contradict each other, or the token would travel in plaintext.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | TokenSource | None = None,
        namespace: str | None = None,
        tls: bool | None = None,
        root_certificates: bytes | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        connect_timeout: float = DEFAULT_CONNECT_TIMEOUT_S,
        reconnect_timeout: float = DEFAULT_RECONNECT_TIMEOUT_S,
        client_certificate: bytes | None = None,
        client_key: bytes | None = None,
        server_name: str | None = None,
    ) -> None:
        config = make_config(
            address,
            token=token,
            namespace=namespace,
            tls=tls,
            root_certificates=root_certificates,
            timeout=timeout,
            connect_timeout=connect_timeout,
            reconnect_timeout=reconnect_timeout,
            client_certificate=client_certificate,
            client_key=client_key,
            server_name=server_name,
        )
        self._core = Core(config, SyncTransport(config))

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._core.config.address

    @property
    def namespace(self) -> str:
        """The namespace of every call."""
        return self._core.config.namespace

    def start(
        self,
        agent: str,
        input: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        agent_version: str = "",
        labels: Mapping[str, str] | None = None,
        context_id: str = "",
        delay: float | timedelta | None = None,
        start_time: datetime | None = None,
        deadline: datetime | timedelta | None = None,
        conflict_policy: ConflictPolicy = ConflictPolicy.USE_EXISTING,
        validate_only: bool = False,
        queue: str = "",
        priority: int = 0,
        home_region: str = "",
    ) -> StartedRun:
        """Starts an agent, and returns when the start is committed: from then on the run survives every crash.

        Args:
            agent: The name of the agent.
            input: A JSON object; its JSON Schema is `get_agent(agent).input_schema`. None means `{}`.
            run_id: Your idempotency key, `[a-z0-9][a-z0-9-]{0,63}`: a start with the same id and input returns the
                existing run. None: the library makes one.
            agent_version: None but this version; empty means the current one.
            labels: At most 32, to find the run by; keys up to 63 characters, values up to 256.
            context_id: Your grouping of runs (a conversation, a case); at most 128 characters.
            delay: Begin after this many seconds.
            start_time: Begin at this time (timezone-aware). Not together with `delay`.
            deadline: End the run as EXPIRED at this time (timezone-aware), or this long from now by your clock.
            conflict_policy: What to do when the run_id exists.
            validate_only: Check everything and start nothing; the returned run has not been created.
            queue: The queue whose limits count for the run; empty means the agent's own, or else the default queue.
            priority: Which runs of a queue come first when they wait: the lower the sooner, from 0 to 2^31-1.
            home_region: The region where the run shall live; empty means the home of the namespace. Not together with
                `run_id`: the server makes the id there.

        Returns:
            The run; its `created` says whether this call made it.

        Raises:
            AgentNotFound: No such agent or version.
            InvalidArgument: A field is wrong, see `violations`; `InputSchemaViolation` for the input.
            RunInputMismatch: The run_id exists with another agent or input.
            RunConflict: The run_id exists, under `ConflictPolicy.FAIL`.
        """
        return run_blocking(
            self._core.start(
                _requests.start_agent(
                    self.namespace,
                    agent,
                    input,
                    run_id=run_id,
                    agent_version=agent_version,
                    labels=labels,
                    context_id=context_id,
                    delay=delay,
                    start_time=start_time,
                    deadline=deadline,
                    conflict_policy=conflict_policy,
                    validate_only=validate_only,
                    queue=queue,
                    priority=priority,
                    home_region=home_region,
                )
            )
        )

    def start_many(self, starts: Starts) -> Iterator[StartResult]:
        """Starts many agents over one stream, and iterates over what came of each, in their order.

        What `start` would raise for one of them is the `error` of its result, and the others go on. A stream that
        breaks is opened again, at another server where there is one, and what had no answer is sent once more: no run
        is started twice, and none is left out. The server bounds how many are at work at a time, and how many a
        namespace may start in a second; the iteration is then slower.

        Starts are taken ahead, up to 256 of them: what gives them must not wait for their results. Leaving the loop
        ends the stream; what had been taken may have been started. Give each start a `run_id` to be able to do the
        whole again.

        Args:
            starts: The starts; they may be endless, and are taken as fast as the server takes them.

        Raises:
            PermissionDenied: The token lacks the role `operator` (by the iteration, as everything from the server).
            PerdureError: There was no answer for too long. What came before stands; of what was given and did not come,
                nothing is known.
        """
        return iterate_closing(self._core.start_many(starts))

    def run(
        self,
        agent: str,
        input: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        agent_version: str = "",
        labels: Mapping[str, str] | None = None,
        context_id: str = "",
        deadline: datetime | timedelta | None = None,
        timeout: float | None = None,
        queue: str = "",
        priority: int = 0,
        home_region: str = "",
    ) -> JsonValue:
        """Starts an agent, waits for its end, and returns its output: one call to the server if it ends within 5 s.

        Args:
            agent: As in `start`.
            input: As in `start`.
            run_id: As in `start`. Give one to be able to come back: the same call again returns the same output.
            agent_version: As in `start`.
            labels: As in `start`.
            context_id: As in `start`.
            deadline: As in `start`.
            timeout: Seconds to wait for the end; None for as long as it takes. The run goes on afterwards.
            queue: As in `start`.
            priority: As in `start`.
            home_region: As in `start`.

        Returns:
            The output, as parsed JSON.

        Raises:
            RunFailed: The run ended as FAILED, CANCELLED or EXPIRED; the error's `run` says why.
            WaitTimeout: The run did not end in time.
        """
        request = _requests.start_agent(
            self.namespace,
            agent,
            input,
            run_id=run_id,
            agent_version=agent_version,
            labels=labels,
            context_id=context_id,
            deadline=deadline,
            queue=queue,
            priority=priority,
            home_region=home_region,
        )
        return run_blocking(self._core.run(request, timeout_s=timeout))

    def get(self, run: Run | str, *, full: bool = True) -> Run:
        """Returns a run.

        Args:
            run: The run, or its id.
            full: Whether with its input and output.

        Raises:
            RunNotFound: No such run in the namespace.
        """
        return run_blocking(self._core.get(run, full=full))

    def wait(self, run: Run | str, *, timeout: float | None = None) -> Run:
        """Waits for the end of a run, through restarts of the server, and returns it with its output.

        Args:
            run: The run, or its id.
            timeout: Seconds; None for as long as it takes.

        Raises:
            WaitTimeout: The run did not end in time. It goes on; the error's `run` is its last known state.
            RunNotFound: No such run in the namespace.
        """
        return run_blocking(self._core.wait(run, timeout_s=timeout))

    def wait_many(self, runs: Iterable[Run | str]) -> Iterator[WaitResult]:
        """Waits for the ends of many runs over one stream, and iterates over them in the order in which they end.

        For many short runs it costs much less than a `wait` each. A stream that breaks is opened again, and no run is
        told twice. A run that cannot be waited for has an `error`, and the others go on. Leaving the loop ends the
        stream; runs go on.

        Args:
            runs: The runs, or their ids; each is told once. The server waits for 10,000 of them at a time.

        Raises:
            PerdureError: There was no answer for too long. What came before stands.
        """
        return iterate_closing(self._core.wait_many(runs))

    def list(
        self,
        *,
        states: Iterable[RunState] = (),
        agent: str = "",
        labels: Mapping[str, str] | None = None,
        context_id: str = "",
        parent: Run | str | None = None,
        from_create_time: datetime | None = None,
        until_create_time: datetime | None = None,
        limit: int | None = None,
        on_unreachable: OnUnreachable | None = None,
    ) -> Iterator[Run]:
        """Iterates over runs, newest first, without input and output. Pages are fetched as they are needed.

        Runs that are created meanwhile change nothing: no run comes twice, and every run that is there at the
        beginning comes, if it still satisfies the conditions when its page is read.

        Args:
            states: Only runs in one of these states; empty for all.
            agent: Only runs of this agent; empty for all.
            labels: Only runs that have all of these labels.
            context_id: Only runs of this context; empty for all.
            parent: Only the children of this run, or of the run with this id.
            from_create_time: Only runs created at this time (timezone-aware) or later.
            until_create_time: Only runs created before this time (timezone-aware).
            limit: At most this many; None for all.
            on_unreachable: Called with the names of regions that could not be asked, whose runs are missing. None: it
                is warned of (`IncompleteListing`).
        """
        request = _requests.list_runs(
            self.namespace,
            states=states,
            agent=agent,
            labels=labels,
            context_id=context_id,
            parent=parent,
            from_create_time=from_create_time,
            until_create_time=until_create_time,
        )
        return iterate(self._core.list_runs(request, limit=limit, on_unreachable=on_unreachable))

    def watch(
        self,
        run: Run | str,
        *,
        after_sequence: int = 0,
        cursor: str = "",
        from_now: bool = False,
        kinds: Iterable[EventKind] = (),
        include_children: bool = False,
        heartbeat_interval: float | None = None,
        on_reconnect: OnReconnect | None = None,
    ) -> Watch:
        """Follows a run: everything from the beginning, or after a position, then live until its end.

        The watch reconnects by itself, and every event comes once and in order. It fails only with what repeating
        does not help, or after `reconnect_timeout` seconds without any answer. Leaving it does not touch the run.

        Args:
            run: The run, or its id.
            after_sequence: Begin after this event; 0 for the first.
            cursor: Begin after this cursor, from an update of the same run's watch.
            from_now: Begin with what happens from now on.
            kinds: Only events of these kinds; empty for all. The end of the run is always told.
            include_children: Have the events of the runs that it starts, and of theirs, in the same watch, each run's
                in its own order and after the event that it was started; see `RunEvent.run_id`. The watch then ends
                with the last of them. Continue it by its cursor, not by `after_sequence`.
            heartbeat_interval: Seconds between the server's signs of life, 5 to 60; after four missed ones the
                connection counts as dead. None for 15.
            on_reconnect: Called at every break with the error, and the seconds until the next attempt.

        Raises:
            RunNotFound: No such run in the namespace (by the iteration, as everything from the server).
            CursorOutOfRange: The events after the position are no longer kept.
            ViewTooLarge: More than about 1,000 of its children are active; watch them one by one.
        """
        return Watch(
            self._core.watch(
                run,
                after_sequence=after_sequence,
                cursor=cursor,
                from_now=from_now,
                kinds=kinds,
                include_children=include_children,
                heartbeat_s=heartbeat_interval,
                on_reconnect=on_reconnect,
            )
        )

    def events(self, run: Run | str, *, kinds: Iterable[EventKind] = ()) -> Iterator[RunEvent]:
        """Iterates over the log of a run as it is now. Pages are fetched as they are needed.

        Args:
            run: The run, or its id.
            kinds: Only events of these kinds; empty for all.
        """
        return iterate(self._core.list_events(run, kinds=kinds))

    def steps(self, run: Run | str) -> Iterator[Step]:
        """Iterates over the steps of a run, in the order in which they began.

        Args:
            run: The run, or its id.
        """
        return iterate(self._core.list_steps(run))

    def trace(self, run: Run | str, *, children: bool = True) -> RunTrace:
        """Returns the spans of a run's trace as its log tells of them now, whether or not they were exported anywhere.

        Args:
            run: The run, or its id.
            children: Whether with the spans of the runs that it has started.

        Raises:
            RunNotFound: No such run in the namespace.
        """
        return run_blocking(self._core.trace(run, children=children))

    def read_artifact(self, run: Run | str, name: str) -> bytes:
        """Returns an artifact that a run's agent wrote; see `artifact` for one that is large.

        Args:
            run: The run, or its id.
            name: The artifact's; of several of one name the last one is read.

        Raises:
            ArtifactNotFound: The run has none of this name.
            RunNotFound: No such run in the namespace.
        """
        return run_blocking(read_all(self._core.artifact(run, name)))

    def artifact(self, run: Run | str, name: str) -> Iterator[bytes]:
        """Iterates over an artifact's bytes in pieces; a broken stream goes on where it was.

        When the iteration ends, all bytes came and their hash is right.

        Args:
            run: The run, or its id.
            name: The artifact's; of several of one name the last one is read.

        Raises:
            ArtifactNotFound: The run has none of this name; in the first step of the iteration, as everything else.
            RunNotFound: No such run in the namespace.
        """
        return iterate_closing(self._core.artifact(run, name))

    def signal(self, run: Run | str, name: str, payload: JsonValue = None) -> bool:
        """Sends a named input to a run. It is kept until the run asks for it.

        Args:
            run: The run, or its id.
            name: What the agent waits for, `[A-Za-z0-9][A-Za-z0-9_.-]{0,63}`.
            payload: Any JSON; None means `{}`.

        Returns:
            Whether this attempt delivered it, and not an earlier one of the same call whose answer was lost.

        Raises:
            RunFinished: The run has ended.
        """
        return run_blocking(self._core.signal(_requests.signal_run(self.namespace, run, name, payload)))

    def cancel(self, run: Run | str, *, reason: str = "") -> Run:
        """Cancels a run and its children, and returns it. A run that has ended stays as it is.

        Args:
            run: The run, or its id.
            reason: Why, for people; at most 1,000 characters.
        """
        return run_blocking(self._core.cancel(run, reason=reason))

    def fork(
        self,
        run: Run | str,
        *,
        from_step: int | None = None,
        input: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        agent_version: str = "",
        labels: Mapping[str, str] | None = None,
        deadline: datetime | timedelta | None = None,
        validate_only: bool = False,
    ) -> StartedRun:
        """Starts a new run that takes over the recorded steps of another one, and goes on from there.

        Without anything else this is how a run that failed is tried again: from the first step that did not succeed.
        What was recorded below that step is taken over as it is, whatever the new input or version.

        Args:
            run: The run to fork, or its id; it may have ended or not, and stays as it is.
            from_step: The first step that the new run runs itself; 1 takes over nothing. None: the first one that did
                not succeed, or the one after the last when all did.
            input: The input of the new run, a JSON object; None means that of the forked one.
            run_id: The id of the new run, as in `start`. None: the library makes one.
            agent_version: The version of the agent that goes on; empty means that of the forked run.
            labels: The labels of the new run; None means those of the forked one.
            deadline: As in `start`; that of the forked run is not taken over.
            validate_only: Check everything and start nothing; the returned run has not been created.

        Returns:
            The new run; its `forked_from_step_id` says where it begins.

        Raises:
            RunNotFound: No such run in the namespace.
            InvalidArgument: There is no such step, or the input does not fit (`InputSchemaViolation`).
            VersionUnavailable: The server lacks the code of that version.
            RunConflict: The run_id exists, and is not this fork.
        """
        return run_blocking(
            self._core.fork(
                _requests.fork_run(
                    self.namespace,
                    run,
                    from_step=from_step,
                    input=input,
                    run_id=run_id,
                    agent_version=agent_version,
                    labels=labels,
                    deadline=deadline,
                    validate_only=validate_only,
                )
            )
        )

    def delete_runs(
        self,
        *runs: Run | str,
        states: Iterable[RunState] = (),
        agent: str = "",
        labels: Mapping[str, str] | None = None,
        context_id: str = "",
        until_end_time: datetime | None = None,
        validate_only: bool = False,
    ) -> Deletion:
        """Deletes runs that have ended, with their children, logs and approvals. What has not ended is left alone.

        Give runs, or conditions, which must all be satisfied. Many runs take several calls; the method makes them all.

        Args:
            runs: These runs, or those with these ids.
            states: Only runs in one of these states, which must be terminal; empty for all that have ended.
            agent: Only runs of this agent; empty for all.
            labels: Only runs that have all of these labels.
            context_id: Only runs of this context; empty for all.
            until_end_time: Only runs that ended before this time (timezone-aware).
            validate_only: Count what one call would delete, and delete nothing.

        Raises:
            InvalidArgument: There is no condition at all, or one beside the runs.
        """
        return run_blocking(
            self._core.delete_runs(
                _requests.delete_runs(
                    self.namespace,
                    runs,
                    states=states,
                    agent=agent,
                    labels=labels,
                    context_id=context_id,
                    until_end_time=until_end_time,
                    validate_only=validate_only,
                )
            )
        )

    def approvals(
        self,
        *,
        states: Iterable[ApprovalState] = (),
        run: Run | str | None = None,
        on_unreachable: OnUnreachable | None = None,
    ) -> Iterator[Approval]:
        """Iterates over approvals, oldest first. Pages are fetched as they are needed.

        Args:
            states: Only approvals in one of these states; empty means PENDING.
            run: Only approvals of this run; None for all.
            on_unreachable: As in `list`.
        """
        request = _requests.list_approvals(self.namespace, states=states, run=run)
        return iterate(self._core.list_approvals(request, on_unreachable=on_unreachable))

    def get_approval(self, approval: Approval | str) -> Approval:
        """Returns an approval as it is now.

        Args:
            approval: The approval, or its id.

        Raises:
            ApprovalNotFound: No such approval in the namespace.
        """
        return run_blocking(self._core.get_approval(approval))

    def decide(
        self,
        approval: Approval | str,
        decision: Decision,
        *,
        comment: str = "",
        answer: JsonValue = None,
        expected_revision: int | None = None,
    ) -> Approval:
        """Decides an approval, once, and returns it. The same decision again is fine.

        Args:
            approval: The approval, or its id.
            decision: Yes or no.
            comment: For the record and the agent; at most 4,000 characters.
            answer: JSON that satisfies the approval's `answer_schema`; None for none.
            expected_revision: Decide only if it is still at this revision; 0 for whatever it is. None: that of
                `approval`, if you give the approval itself, so that you decide what you saw.

        Raises:
            ApprovalClosed: It has been decided otherwise, has expired, or was withdrawn.
            RevisionConflict: It has changed; read it and decide again.
            InvalidArgument: The answer does not satisfy the schema.
        """
        return run_blocking(
            self._core.decide(
                _requests.decide_approval(
                    self.namespace,
                    approval,
                    decision,
                    comment=comment,
                    answer=answer,
                    expected_revision=expected_revision,
                )
            )
        )

    def approve(self, approval: Approval | str, *, comment: str = "", answer: JsonValue = None) -> Approval:
        """Says yes to an approval; see `decide`.

        Args:
            approval: The approval, or its id.
            comment: As in `decide`.
            answer: As in `decide`.
        """
        return self.decide(approval, Decision.APPROVE, comment=comment, answer=answer)

    def reject(self, approval: Approval | str, *, comment: str = "", answer: JsonValue = None) -> Approval:
        """Says no to an approval; see `decide`.

        Args:
            approval: The approval, or its id.
            comment: As in `decide`.
            answer: As in `decide`.
        """
        return self.decide(approval, Decision.REJECT, comment=comment, answer=answer)

    def watch_approvals(
        self, *, heartbeat_interval: float | None = None, on_reconnect: OnReconnect | None = None
    ) -> Watching[Approval]:
        """Follows the inbox without end: what is pending now, then every approval that is asked, decided or closed.

        Reconnects by itself, as `watch` does; what is decided meanwhile is told afterwards.

        Args:
            heartbeat_interval: As in `watch`.
            on_reconnect: As in `watch`.
        """
        return Watching(self._core.watch_approvals(heartbeat_s=heartbeat_interval, on_reconnect=on_reconnect))

    def agents(self) -> Iterator[AgentInfo]:
        """Iterates over the agents that can be started, by name and version."""
        return iterate(self._core.list_agents())

    def get_agent(self, agent: str, *, agent_version: str = "") -> AgentInfo:
        """Returns an agent.

        Args:
            agent: Its name.
            agent_version: Its version; empty means the current one.

        Raises:
            AgentNotFound: No such agent or version.
        """
        return run_blocking(self._core.get_agent(agent, agent_version=agent_version))

    def executors(self, *, include_gone: bool = False) -> Iterator[ExecutorInfo]:
        """Iterates over the executors of the server's database, the living first.

        Operators' calls are served at an address of their own: make a client for it, by default localhost:50053.

        Args:
            include_gone: Those that are gone, too.

        Raises:
            PermissionDenied: The token lacks the role `admin`.
            Unimplemented: This is not the admin address.
        """
        return iterate(self._core.list_executors(include_gone=include_gone))

    def queues(self) -> Iterator[QueueInfo]:
        """Iterates over the queues of the server's database, by name.

        Operators' calls are served at an address of their own: make a client for it, by default localhost:50053.

        Raises:
            PermissionDenied: The token lacks the role `admin`.
            Unimplemented: This is not the admin address.
        """
        return iterate(self._core.list_queues())

    def cells(self) -> Iterator[CellInfo]:
        """Iterates over the cells of the service; there are none where it has no regions.

        Operators' calls are served at an address of their own: make a client for it, by default localhost:50053.

        Raises:
            PermissionDenied: The token lacks the role `admin`.
            Unimplemented: This is not the admin address, or the server is older.
        """
        return iterate(self._core.list_cells())

    def evacuate_cell(self, cell: str) -> CellInfo:
        """Gives the runs of a cell to the servers that stand by in its secondary region; nothing if they have them.

        A step body that is in progress at home may end there, and nothing is repeated. Call the admin address of a
        server of the cell.

        Args:
            cell: Its name.

        Returns:
            The cell as it is now.

        Raises:
            InvalidArgument: The server that was asked does not serve the cell, or it has no secondary region.
            NobodyStandsBy: There is no server for it in its secondary region.
            PermissionDenied: The token lacks the role `admin`.
            Unimplemented: This is not the admin address, or the server is older.
        """
        return run_blocking(self._core.evacuate_cell(cell))

    def return_cell(self, cell: str) -> CellInfo:
        """Gives the runs of a cell back to the servers that stand by in its home region; nothing if they have them.

        Otherwise as `evacuate_cell`.

        Args:
            cell: Its name.

        Returns:
            The cell as it is now.

        Raises:
            InvalidArgument: The server that was asked does not serve the cell.
            NobodyStandsBy: There is no server for it at its home.
            PermissionDenied: The token lacks the role `admin`.
            Unimplemented: This is not the admin address, or the server is older.
        """
        return run_blocking(self._core.return_cell(cell))

    def stranded(self) -> Iterator[StrandedRun]:
        """Iterates over the runs that no living executor can continue, the oldest first, of all namespaces.

        Operators' calls are served at an address of their own: make a client for it, by default localhost:50053.

        Raises:
            PermissionDenied: The token lacks the role `admin`.
            Unimplemented: This is not the admin address.
        """
        return iterate(self._core.list_stranded())

    def close(self) -> None:
        """Ends all calls and the connections. Runs go on."""
        run_blocking(self._core.transport.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
