"""Turns the requests of AgentRunService into what the domain understands, or says what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from perdure.v1 import agent_run_service_pb2 as pb

from perdure_service.domain.events import EventKind
from perdure_service.domain.queues import MAX_PRIORITY
from perdure_service.domain.runs import DEFAULT_NAMESPACE, SIGNAL_NAME, TERMINAL_STATES
from perdure_service.durable.artifacts import ArtifactChoice
from perdure_service.durable.service import DeleteCommand, ForkCommand, RunFilter, StartCommand
from perdure_service.errors import InvalidArgument
from perdure_service.rpc import enums
from perdure_service.rpc.json_values import read_struct, read_text, read_value
from perdure_service.rpc.validation import MAX_AHEAD, MAX_RUN_ID, Violations

MAX_CANCEL_REASON = 1_000
"""Characters."""

MAX_DELETED_IDS = 1_000
"""Ids that one DeleteRuns may name."""


@dataclass(frozen=True, slots=True)
class RunLookup:
    """Which run, and whether with its input and output."""

    namespace: str
    run_id: str
    full: bool = False


@dataclass(frozen=True, slots=True)
class RunPage:
    """Which page of which runs."""

    namespace: str
    run_filter: RunFilter
    page_size: int
    page_token: str


@dataclass(frozen=True, slots=True)
class LogPage:
    """Which page of a run's events or steps; empty `kinds` means all."""

    namespace: str
    run_id: str
    page_size: int
    page_token: str
    kinds: frozenset[EventKind] = frozenset()


@dataclass(frozen=True, slots=True)
class ArtifactLookup:
    """What of which run, and from which byte on."""

    namespace: str
    run_id: str
    choice: ArtifactChoice
    offset: int


@dataclass(frozen=True, slots=True)
class TraceLookup:
    """Whose trace, and whether with those of the runs it has started."""

    namespace: str
    run_id: str
    include_children: bool


@dataclass(frozen=True, slots=True)
class Watch:
    """Where a stream begins and what it carries; empty `kinds` means all."""

    namespace: str
    run_id: str
    cursor: str | None = None
    after_sequence: int | None = None
    from_now: bool = False
    kinds: frozenset[EventKind] = frozenset()
    include_children: bool = False
    heartbeat_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Signal:
    """A named input to a run; `payload` is a JSON value."""

    namespace: str
    run_id: str
    name: str
    request_id: str
    payload: Any


@dataclass(frozen=True, slots=True)
class Cancel:
    """Which run to cancel, and why."""

    namespace: str
    run_id: str
    reason: str


def namespace_of(found: Violations, value: str) -> str:
    """Returns the namespace a request means; whether it exists is for others to say."""
    return found.name("namespace", value) or DEFAULT_NAMESPACE


def start_command(
    request: pb.StartAgentRequest, *, caller: str, trace_parent: str, now: datetime, max_input_bytes: int
) -> StartCommand:
    """Returns the start that a request asks for. The shape of a new run's id is left to the service.

    Args:
        request: As it came.
        caller: Who asks.
        trace_parent: The caller's W3C `traceparent`, or empty.
        now: The time, with a zone.
        max_input_bytes: The most an input may take.

    Raises:
        InvalidArgument: With every field that is wrong.
        PayloadTooLarge: The input is over the limit.
    """
    found = Violations()
    start_at, delay_s = _schedule(found, request, now)
    deadline_at = _deadline(found, request, now)
    if deadline_at is not None and start_at is not None and now < deadline_at <= start_at:
        found.add("deadline_time", "must be after start_time")
    if request.home_region and request.run_id:
        found.add("home_region", "excludes run_id: an id of one's own lives in the home of its namespace")
    wait_s = found.duration_s("wait", request.wait) if request.HasField("wait") else None
    if wait_s is not None and wait_s < 0:
        found.add("wait", "must not be negative")
    if request.priority < 0:
        found.add("priority", f"must be from 0 to {MAX_PRIORITY}; the lower the sooner")
    start = partial(
        StartCommand,
        namespace=namespace_of(found, request.namespace),
        agent=found.name("agent", request.agent, required=True),
        agent_version=found.name("agent_version", request.agent_version),
        run_id=request.run_id,
        request_id=found.request_id(request.request_id),
        caller=caller,
        refuse_existing=found.enum("conflict_policy", request.conflict_policy, enums.REFUSES_EXISTING, False),
        start_at=start_at,
        delay_s=delay_s,
        deadline_at=deadline_at,
        labels=found.labels(request.labels),
        context_id=found.name("context_id", request.context_id),
        validate_only=request.validate_only,
        trace_parent=trace_parent,
        queue=found.name("queue", request.queue),
        priority=request.priority,
        wait_s=wait_s or 0.0,
    )
    found.raise_any()
    return start(run_input=_read_input(request, max_input_bytes))


def fork_run(
    request: pb.ForkRunRequest, *, caller: str, trace_parent: str, now: datetime, max_input_bytes: int
) -> ForkCommand:
    """Returns the fork that a request asks for; arguments as of `start_command`.

    Raises:
        InvalidArgument: With every field that is wrong.
        PayloadTooLarge: The input is over the limit.
    """
    found = Violations()
    if request.from_step_id < 0:
        found.add("from_step_id", "must not be negative")
    command = ForkCommand(
        namespace=namespace_of(found, request.namespace),
        run_id=found.run_id(request.run_id),
        request_id=found.request_id(request.request_id, required=True),
        caller=caller,
        new_run_id=request.new_run_id,
        from_step_id=request.from_step_id,
        agent_version=found.name("agent_version", request.agent_version),
        labels=found.labels(request.labels),
        deadline_at=_deadline(found, request, now),
        validate_only=request.validate_only,
        trace_parent=trace_parent,
    )
    found.raise_any()
    given = request.WhichOneof("input_format") == "input" or bool(request.input_json)
    return replace(command, run_input=_read_input(request, max_input_bytes)) if given else command


def get_run(request: pb.GetRunRequest | pb.WaitRunRequest) -> RunLookup:
    """Returns which run is asked for.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    lookup = RunLookup(
        namespace_of(found, request.namespace),
        found.run_id(request.run_id),
        found.enum("view", request.view, enums.IS_FULL_VIEW, False),
    )
    found.raise_any()
    return lookup


def get_run_trace(request: pb.GetRunTraceRequest) -> TraceLookup:
    """Returns whose trace is asked for.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    lookup = TraceLookup(
        namespace_of(found, request.namespace), found.run_id(request.run_id), not request.exclude_children
    )
    found.raise_any()
    return lookup


def read_artifact(request: pb.ReadArtifactRequest) -> ArtifactLookup:
    """Returns what is to be read, and from where.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    kind = request.WhichOneof("artifact")
    if kind is None or (kind != "name" and not getattr(request, kind)) or (kind == "name" and not request.name):
        found.add("artifact", "is required: a name, or `input` or `output` set to true")
    if request.offset < 0:
        found.add("offset", "must not be negative")
    choice = ArtifactChoice(request.name if kind == "name" else None, output=kind == "output")
    lookup = ArtifactLookup(
        namespace_of(found, request.namespace), found.run_id(request.run_id), choice, request.offset
    )
    found.raise_any()
    return lookup


def list_runs(request: pb.ListRunsRequest) -> RunPage:
    """Returns which runs are asked for.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    now = datetime.now(UTC)
    from_time = until_time = None
    if request.HasField("from_create_time"):
        from_time = found.timestamp("from_create_time", request.from_create_time, now)
    if request.HasField("until_create_time"):
        until_time = found.timestamp("until_create_time", request.until_create_time, now)
    if from_time is not None and until_time is not None and until_time <= from_time:
        found.add("until_create_time", "must be after from_create_time")
    run_filter = RunFilter(
        states=found.enums("states", request.states, enums.RUN_STATE_OF),
        agent=found.name("agent", request.agent),
        labels=found.labels(request.labels),
        context_id=found.name("context_id", request.context_id),
        parent_run_id=found.name("parent_run_id", request.parent_run_id, max_length=MAX_RUN_ID),
        from_create_time=from_time,
        until_create_time=until_time,
    )
    page = RunPage(
        namespace_of(found, request.namespace),
        run_filter,
        found.page_size(request.page_size),
        found.token("page_token", request.page_token),
    )
    found.raise_any()
    return page


def delete_runs(request: pb.DeleteRunsRequest, *, caller: str) -> DeleteCommand:
    """Returns which runs are to be deleted.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    if len(request.run_ids) > MAX_DELETED_IDS:
        found.add("run_ids", f"has {len(request.run_ids)} entries; at most {MAX_DELETED_IDS}")
    for index, run_id in enumerate(request.run_ids[:MAX_DELETED_IDS]):
        found.name(f"run_ids[{index}]", run_id, required=True, max_length=MAX_RUN_ID)
    states = found.enums("states", request.states, enums.RUN_STATE_OF)
    for state in sorted(states - TERMINAL_STATES):
        found.add("states", f"{state} is not terminal; only runs that have ended can be deleted")
    until_end_time = None
    if request.HasField("until_end_time"):
        until_end_time = found.timestamp("until_end_time", request.until_end_time, datetime.now(UTC))
    command = DeleteCommand(
        namespace=namespace_of(found, request.namespace),
        caller=caller,
        run_ids=tuple(dict.fromkeys(request.run_ids)),
        run_filter=RunFilter(
            states=states,
            agent=found.name("agent", request.agent),
            labels=found.labels(request.labels),
            context_id=found.name("context_id", request.context_id),
            until_end_time=until_end_time,
        ),
        validate_only=request.validate_only,
    )
    conditions = bool(command.run_filter.members) or request.HasField("until_end_time")
    if request.run_ids and conditions:
        found.add("run_ids", "no other condition may be set together with ids")
    elif not request.run_ids and not conditions:
        found.add("", "at least one condition is required: run_ids, states, agent, labels, context_id, until_end_time")
    found.raise_any()
    return command


def list_log(request: pb.ListRunEventsRequest | pb.ListStepsRequest) -> LogPage:
    """Returns which part of a run's log, or which of its steps, are asked for.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    kinds = request.kinds if isinstance(request, pb.ListRunEventsRequest) else ()
    page = LogPage(
        namespace_of(found, request.namespace),
        found.run_id(request.run_id),
        found.page_size(request.page_size),
        found.token("page_token", request.page_token),
        found.enums("kinds", kinds, enums.EVENT_KIND_OF),
    )
    found.raise_any()
    return page


def watch_run(request: pb.WatchRunRequest) -> Watch:
    """Returns the stream that is asked for. Whether a cursor is one of ours is for the log to say.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    position = request.WhichOneof("position")
    after_sequence = request.after_sequence if position == "after_sequence" else None
    if after_sequence is not None and after_sequence < 0:
        found.add("after_sequence", "must not be negative")
    if after_sequence is not None and request.include_children:
        found.add("after_sequence", "is of a single run; continue a watch with children by its cursor")
    watch = Watch(
        namespace=namespace_of(found, request.namespace),
        run_id=found.run_id(request.run_id),
        # An empty cursor is what a client has that saw nothing yet: from the first event.
        cursor=found.token("cursor", request.cursor) or None,
        after_sequence=after_sequence,
        from_now=request.from_now,
        kinds=found.enums("kinds", request.kinds, enums.EVENT_KIND_OF),
        include_children=request.include_children,
        heartbeat_s=found.heartbeat_s(request.heartbeat_interval if request.HasField("heartbeat_interval") else None),
    )
    found.raise_any()
    return watch


def signal_run(request: pb.SignalRunRequest, *, max_bytes: int) -> Signal:
    """Returns the signal that is sent.

    Raises:
        InvalidArgument: With every field that is wrong.
        PayloadTooLarge: The payload takes more than `max_bytes`.
    """
    found = Violations()
    if not request.name:
        found.add("name", "is required")
    elif not SIGNAL_NAME.fullmatch(request.name):
        found.add("name", f"must match {SIGNAL_NAME.pattern}")
    namespace = namespace_of(found, request.namespace)
    run_id = found.run_id(request.run_id)
    request_id = found.request_id(request.request_id, required=True)
    found.raise_any()
    payload: Any = {}
    if request.WhichOneof("payload_format") == "payload":
        payload = read_value(request.payload, root="payload", max_bytes=max_bytes)
    elif request.payload_json:
        payload = read_text(request.payload_json, field="payload_json", root="payload", max_bytes=max_bytes)
    return Signal(namespace, run_id, request.name, request_id, payload)


def cancel_run(request: pb.CancelRunRequest) -> Cancel:
    """Returns what is to be cancelled.

    Raises:
        InvalidArgument: With every field that is wrong.
    """
    found = Violations()
    cancel = Cancel(
        namespace_of(found, request.namespace),
        found.run_id(request.run_id),
        found.prose("reason", request.reason, MAX_CANCEL_REASON),
    )
    found.raise_any()
    return cancel


def _schedule(found: Violations, request: pb.StartAgentRequest, now: datetime) -> tuple[datetime | None, float | None]:
    """Returns when to start: a time, or a delay in seconds, or neither. A time in the past means now."""
    match request.WhichOneof("schedule"):
        case "start_time":
            return found.timestamp("start_time", request.start_time, now), None
        case "delay":
            delay_s = found.duration_s("delay", request.delay)
            if delay_s is not None and not 0 <= delay_s <= MAX_AHEAD.total_seconds():
                found.add("delay", "must not be negative, nor more than a century")
            return None, delay_s
        case _:
            return None, None


def _deadline(found: Violations, request: pb.StartAgentRequest | pb.ForkRunRequest, now: datetime) -> datetime | None:
    """Returns when the run ends as EXPIRED; None for never."""
    if not request.HasField("deadline_time"):
        return None
    deadline_at = found.timestamp("deadline_time", request.deadline_time, now)
    if deadline_at is not None and deadline_at <= now:
        found.add("deadline_time", "is in the past")
    return deadline_at


def _read_input(request: pb.StartAgentRequest | pb.ForkRunRequest, max_bytes: int) -> Mapping[str, Any]:
    if request.WhichOneof("input_format") == "input":
        return read_struct(request.input, root="input", max_bytes=max_bytes)
    if not request.input_json:
        return {}
    value = read_text(request.input_json, field="input_json", root="input", max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise InvalidArgument("input", "must be an object")
    return value
