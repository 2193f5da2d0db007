"""What a run is: its ids, its states and how they are derived, and the hash that tells equal starts from others."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from perdure_service.domain.ids import random_hex
from perdure_service.domain.queues import DEFAULT_QUEUE
from perdure_service.errors import InvalidArgument

DEFAULT_NAMESPACE = "default"
LOCAL_CELL = "local"
"""The cell in ids that a server without regions makes."""

RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
NAMESPACE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
SIGNAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SERVER_MADE = re.compile(r"(?P<cell>[a-z0-9]+)-[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_API_WORKFLOW = re.compile(
    r"(?P<namespace>[a-z0-9][a-z0-9-]{0,31})\.(?P<root>[a-z0-9][a-z0-9-]{0,63})\.r(?P<path>(?:-\d+)*)"
)
_API_RUN = re.compile(r"(?P<root>[a-z0-9][a-z0-9-]{0,63})(?P<path>(?:\.\d+)*)")


class RunState(StrEnum):
    """What a run is doing; names as in the API without their prefix."""

    SCHEDULED = "SCHEDULED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    AWAITING_INPUT = "AWAITING_INPUT"
    SLEEPING = "SLEEPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"

    @property
    def terminal(self) -> bool:
        """Whether nothing follows."""
        return self in TERMINAL_STATES


TERMINAL_STATES = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.EXPIRED})

# DBOS's statuses (dbos/_sys_db.py, WorkflowStatusString) that nothing follows.
TERMINAL_STATUSES = frozenset({"SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"})

DEADLINE_PASSED = "DEADLINE_PASSED"
"""`run.end_reason` of a run that its deadline ended."""

NON_DETERMINISTIC = "NON_DETERMINISTIC"
"""The type of the failure of a run whose replay did not follow its recording."""

WAITING_SLEEP = "sleep"
WAITING_SIGNAL = "signal"
WAITING_APPROVAL = "approval"
"""`run.waiting_for` holds `sleep`, `approval` or `signal:<name>`: what the last state_changed of the log says."""


def derive_state(
    status: str, *, waiting_for: str | None, open_approvals: int, end_reason: str | None, execution: int
) -> RunState:
    """Returns the state of a run from DBOS's status and our facts (the table in the API's documentation).

    Args:
        status: DBOS's status of the workflow.
        waiting_for: What the run says it waits for, see `WAITING_SLEEP` and `WAITING_SIGNAL`.
        open_approvals: How many of its approvals are pending.
        end_reason: Why it ended, when that is not in DBOS's status.
        execution: How often it has begun.

    Raises:
        ValueError: DBOS has a status that this version does not know.
    """
    match status:
        case "DELAYED" if execution == 0:
            return RunState.SCHEDULED
        case "ENQUEUED":
            return RunState.QUEUED
        case "PENDING" | "DELAYED":  # parked: it waits for what it waited for in memory
            if open_approvals or (waiting_for or "").startswith(WAITING_SIGNAL):
                return RunState.AWAITING_INPUT
            return RunState.SLEEPING if waiting_for == WAITING_SLEEP else RunState.RUNNING
        case "SUCCESS":
            return RunState.SUCCEEDED
        case "ERROR" | "MAX_RECOVERY_ATTEMPTS_EXCEEDED":
            return RunState.FAILED
        case "CANCELLED":
            return RunState.EXPIRED if end_reason == DEADLINE_PASSED else RunState.CANCELLED
        case _:
            raise ValueError(f"unknown DBOS status {status!r}")


def logged_state(status: str, *, waiting_for: str | None, execution: int) -> RunState:
    """Returns the state that the last state_changed event in the log of a run that has not ended tells of.

    It differs from the derived one between the change of a fact and the event about it: an approval that was asked
    before a recovery is open while the new execution has not come to it yet.
    """
    waits_for_people = (waiting_for or "").startswith((WAITING_SIGNAL, WAITING_APPROVAL))
    return derive_state(
        status,
        waiting_for=waiting_for,
        open_approvals=int(waits_for_people),
        end_reason=None,
        execution=execution,
    )


@dataclass(frozen=True, slots=True)
class RunKey:
    """Which run: its namespace and id in the API, and its workflow id in DBOS."""

    namespace: str
    run_id: str
    workflow_id: str

    @classmethod
    def of_api(cls, namespace: str, run_id: str) -> RunKey:
        """Returns the key of a run named by a caller; ids that only a foreign workflow can have map to themselves."""
        match = _API_RUN.fullmatch(run_id)
        if match is None:
            return cls(namespace, run_id, run_id)
        path = match["path"].replace(".", "-")
        return cls(namespace, run_id, f"{namespace}.{match['root']}.r{path}")

    @classmethod
    def of_workflow(cls, workflow_id: str, parent_namespace: str = DEFAULT_NAMESPACE) -> RunKey:
        """Returns the key of a DBOS workflow. A foreign one keeps its id, in its parent's namespace."""
        match = _API_WORKFLOW.fullmatch(workflow_id)
        if match is None:
            return cls(parent_namespace, workflow_id, workflow_id)
        return cls(match["namespace"], match["root"] + match["path"].replace("-", "."), workflow_id)

    @classmethod
    def foreign(cls, namespace: str, run_id: str) -> RunKey:
        """Returns the key of a workflow that was not started here and so is named by its own id."""
        return cls(namespace, run_id, run_id)


def check_client_run_id(run_id: str, field_name: str = "run_id") -> None:
    """Refuses an id that a client may not give to a new run.

    Raises:
        InvalidArgument: It is malformed, or has the shape of the ids that servers make.
    """
    if not RUN_ID.fullmatch(run_id):
        raise InvalidArgument(
            field_name, "must match [a-z0-9][a-z0-9-]{0,63}: lower-case letters, digits and hyphens, at most 64"
        )
    if _SERVER_MADE.fullmatch(run_id):
        raise InvalidArgument(field_name, "has the shape of a server-made id (<cell>-<uuid7>); choose another")


def new_run_id(cell: str = LOCAL_CELL) -> str:
    """Returns a server-made id, `<cell>-<uuid7>`: ordered by time, so that new runs lie together."""
    return f"{cell}-{uuid7()}"


def cell_of(run_id: str) -> str | None:
    """Returns the cell that an id names, its own or that of the run it is a child of; None if no server made it."""
    match = _SERVER_MADE.fullmatch(run_id.partition(".")[0])
    return None if match is None else match["cell"]


def uuid7() -> str:
    """Returns a version 7 UUID (RFC 9562 section 5.7) as text."""
    value = (time.time_ns() // 1_000_000) << 80 | int(random_hex()[:20], 16)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def epoch_ms(time: datetime) -> int:
    """Returns a time as DBOS stores times: in whole milliseconds since 1970."""
    return int(time.timestamp() * 1000)


def of_epoch_ms(milliseconds: int) -> datetime:
    """Returns the time that DBOS stores as these milliseconds."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


def canonical_json(value: Any) -> str:
    """Returns the one JSON text of a value: sorted keys, no spaces, ASCII only.

    Raises:
        ValueError: It holds NaN or an infinity, which JSON does not have.
    """
    return _CANONICAL(value)


def input_sha256(agent: str, run_input: Any) -> str:
    """Returns the hash that two starts of one id must share: agent and input as sent, not version, labels or times."""
    return hashlib.sha256(canonical_json([agent, run_input]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RunStart:
    """Everything that is decided about a run before anything is written."""

    key: RunKey
    agent: str
    agent_version: str
    input_sha256: str
    request_id: str
    caller: str
    labels: Mapping[str, str] = field(default_factory=dict)
    context_id: str = ""
    trace_id: str = ""
    traceparent: str = ""
    start_at: datetime | None = None
    delay_s: float | None = None
    deadline_at: datetime | None = None
    forked_from_workflow_id: str | None = None
    forked_from_step: int = 0
    queue: str = DEFAULT_QUEUE
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run or an attempt failed."""

    type: str
    message: str
    step_name: str = ""
    retryable: bool = False
    cause: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the members that are not empty."""
        names = ("type", "message", "step_name", "retryable", "cause")
        return {name: value for name in names if (value := getattr(self, name))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Failure:
        """Returns the failure that `to_json` described."""
        return cls(
            type=str(value.get("type", "")),
            message=str(value.get("message", "")),
            step_name=str(value.get("step_name", "")),
            retryable=bool(value.get("retryable", False)),
            cause=str(value.get("cause", "")),
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """What an agent said it has done."""

    message: str
    completed: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What the model calls of a run used, failed attempts included, in tokens."""

    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """A run as a caller sees it.

    Attributes:
        input_json: JSON text; what the store reads of a large one is a pointer to it as DBOS stores it.
        input_argument: The workflow's parameter that holds the whole input, which such a pointer leads to.
        input_bytes: How many bytes the input has, also when it is left out as too large for a message.
        output_json: JSON text, or, as the store reads a large one, a pointer to it.
        output_bytes: As `input_bytes`.
    """

    key: RunKey
    agent: str
    agent_version: str
    input_sha256: str
    request_id: str
    state: RunState
    state_reason: str
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    deadline_time: datetime | None
    execution: int
    executor_id: str
    progress: Progress | None
    pending_approvals: int
    labels: Mapping[str, str]
    context_id: str
    parent_run_id: str
    trace_id: str
    last_sequence: int
    failure: Failure | None = None
    input_json: str | None = None
    output_json: str | None = None
    usage: Usage = Usage()
    caller: str = ""
    forked_from_run_id: str = ""
    forked_from_step_id: int = 0
    queue: str = ""
    priority: int = 0
    input_argument: str | None = None
    input_bytes: int = 0
    output_bytes: int = 0

    @classmethod
    def of_start(
        cls,
        start: RunStart,
        state: RunState,
        create_time: datetime,
        *,
        executor_id: str = "",
        input_argument: str | None = None,
        last_sequence: int = 0,
        state_reason: str = "",
    ) -> Run:
        """Returns the run that a start makes, as a read would that finds nothing but the start.

        Args:
            start: What was decided about the run.
            state: SCHEDULED, QUEUED, or RUNNING when it begins at once.
            create_time: By the database's clock.
            executor_id: The executor on which it begins at once; empty when it waits.
            input_argument: See `Run`.
            last_sequence: How many events it has.
            state_reason: Why it is in its state.
        """
        origin, deadline = start.forked_from_workflow_id, start.deadline_at
        return cls(
            key=start.key,
            agent=start.agent,
            agent_version=start.agent_version,
            input_sha256=start.input_sha256,
            request_id=start.request_id,
            state=state,
            state_reason=state_reason,
            create_time=create_time,
            start_time=create_time if executor_id else None,
            end_time=None,
            deadline_time=None if deadline is None else of_epoch_ms(epoch_ms(deadline)),
            execution=1 if executor_id else 0,
            executor_id=executor_id,
            progress=None,
            pending_approvals=0,
            labels=start.labels,
            context_id=start.context_id,
            parent_run_id="",
            trace_id=start.trace_id,
            last_sequence=last_sequence,
            caller=start.caller,
            forked_from_run_id="" if origin is None else RunKey.of_workflow(origin).run_id,
            forked_from_step_id=start.forked_from_step,
            queue=start.queue,
            priority=start.priority,
            input_argument=input_argument,
        )


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs are meant; empty members mean all.

    Attributes:
        labels: A run must have all of them.
        parent_run_id: Only the children of this run.
        from_create_time: Only runs created at this time or later.
        until_create_time: Only runs created before this time.
        until_end_time: Only runs that ended before this time.
    """

    states: frozenset[RunState] = frozenset()
    agent: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    context_id: str = ""
    parent_run_id: str = ""
    from_create_time: datetime | None = None
    until_create_time: datetime | None = None
    until_end_time: datetime | None = None

    @property
    def members(self) -> dict[str, Any]:
        """The members that are not empty, as JSON values in a fixed order: the identity of the filter."""
        found: dict[str, Any] = {}
        for name in sorted(self.__slots__):
            value = getattr(self, name)
            if isinstance(value, datetime):
                found[name] = value.isoformat()
            elif value:
                found[name] = value if isinstance(value, str) else sorted(value)
        if self.labels:
            found["labels"] = dict(sorted(self.labels.items()))
        return found
