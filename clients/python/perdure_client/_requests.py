"""What is sent: requests built and checked once, with the ids that make every repeat of a call safe."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from perdure.v1 import agent_run_service_pb2, approval_service_pb2, run_event_pb2

from perdure_client._convert import APPROVAL_STATES, RUN_STATES
from perdure_client._errors import InvalidArgument, Violation
from perdure_client._events import EventKind
from perdure_client._types import Approval, ApprovalState, ConflictPolicy, Decision, JsonValue, Run, RunState

_M = TypeVar("_M", bound=Message)
_E = TypeVar("_E", bound=StrEnum)

_WIRE_RUN_STATES = {state: number for number, state in RUN_STATES.items()}
_WIRE_APPROVAL_STATES = {state: number for number, state in APPROVAL_STATES.items()}
_EXACT_INTEGER = 2**53
"""`google.protobuf.Value` holds numbers as doubles, which are exact up to here."""
_LONGEST = timedelta(days=365 * 100)
_MAX_PRIORITY = 2**31 - 1
_MAX_DELETED_IDS = 1_000
"""Ids that one DeleteRuns may name."""


def new_run_id() -> str:
    """Returns a run id of a client's shape: `run-` and 32 hex digits. Servers' own have a UUID with hyphens."""
    return f"run-{uuid.uuid4().hex}"


def new_request_id() -> str:
    """Returns an id for one call and all its repeats."""
    return uuid.uuid4().hex


def message(kind: type[_M], **fields: Any) -> _M:
    """Returns a message of the API.

    Raises:
        InvalidArgument: A field cannot be what is given; it is named.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError, AttributeError) as error:
        for field, value in fields.items():
            try:
                kind(**{field: value})
            except (TypeError, ValueError, AttributeError) as of_field:
                raise _invalid(field, _refused(of_field)) from None
        raise _invalid(kind.__name__, _refused(error)) from None


def _refused(error: Exception) -> str:
    """Returns why a field cannot be what was given, without it: it may be a payload."""
    if isinstance(error, UnicodeEncodeError):
        return "has half of a surrogate pair, which is no text"
    return "is out of range" if "out of range" in str(error) else "is of a wrong type"


def run_id_of(run: Run | str) -> str:
    """Returns the id of a run given as itself or by id."""
    return _id_of("run_id", run.run_id if isinstance(run, Run) else run)


def approval_id_of(approval: Approval | str) -> str:
    """Returns the id of an approval given as itself or by id."""
    return _id_of("approval_id", approval.approval_id if isinstance(approval, Approval) else approval)


def _id_of(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _invalid(field, "is of a wrong type")
    if not value:
        raise _invalid(field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _invalid(field, _refused(error)) from None
    return value


def start_agent(
    namespace: str,
    agent: str,
    input: Mapping[str, Any] | None,
    *,
    run_id: str | None,
    agent_version: str,
    labels: Mapping[str, str] | None,
    context_id: str,
    delay: float | timedelta | None = None,
    start_time: datetime | None = None,
    deadline: datetime | timedelta | None,
    conflict_policy: ConflictPolicy = ConflictPolicy.USE_EXISTING,
    validate_only: bool = False,
    queue: str = "",
    priority: int = 0,
    home_region: str = "",
) -> agent_run_service_pb2.StartAgentRequest:
    """Returns the request of a start; see `AsyncClient.start` for the arguments.

    Raises:
        InvalidArgument: The input is no JSON object, a time is naive, both delay and start_time, or both run_id and
            home_region are given, or the priority is out of range.
    """
    if home_region and run_id is not None:
        raise _invalid("home_region", "cannot be given together with run_id: the server makes the id there")
    if not isinstance(priority, int):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
        raise _invalid("priority", "is of a wrong type")
    if not 0 <= priority <= _MAX_PRIORITY:
        raise _invalid("priority", f"must be from 0 to {_MAX_PRIORITY}, not {priority}")
    if delay is not None and start_time is not None:
        raise _invalid("delay", "cannot be given together with start_time")
    return message(
        agent_run_service_pb2.StartAgentRequest,
        namespace=namespace,
        agent=agent,
        agent_version=agent_version,
        run_id=("" if home_region else new_run_id()) if run_id is None else run_id,
        request_id=new_request_id(),
        input_json=_object_text("input", {} if input is None else input),
        conflict_policy=agent_run_service_pb2.ConflictPolicy.Value(
            f"CONFLICT_POLICY_{_one_of('conflict_policy', ConflictPolicy, conflict_policy)}"
        ),
        start_time=_timestamp("start_time", start_time) if start_time is not None else None,
        delay=_duration("delay", delay) if delay is not None else None,
        deadline_time=_deadline(deadline),
        labels=labels,
        context_id=context_id,
        validate_only=validate_only,
        queue=queue,
        priority=priority,
        home_region=home_region,
    )


def fork_run(
    namespace: str,
    run: Run | str,
    *,
    from_step: int | None,
    input: Mapping[str, Any] | None,
    run_id: str | None,
    agent_version: str,
    labels: Mapping[str, str] | None,
    deadline: datetime | timedelta | None,
    validate_only: bool,
) -> agent_run_service_pb2.ForkRunRequest:
    """Returns the request of a fork; see `AsyncClient.fork` for the arguments.

    Raises:
        InvalidArgument: The step is below 1, the input is no JSON object, or the deadline is naive.
    """
    if from_step is not None and from_step < 1:
        raise _invalid("from_step_id", f"must be 1 or more, not {from_step}")
    return message(
        agent_run_service_pb2.ForkRunRequest,
        namespace=namespace,
        run_id=run_id_of(run),
        request_id=new_request_id(),
        new_run_id=new_run_id() if run_id is None else run_id,
        from_step_id=from_step or 0,
        agent_version=agent_version,
        deadline_time=_deadline(deadline),
        labels=labels,
        validate_only=validate_only,
        input_json=None if input is None else _object_text("input", input),
    )


def delete_runs(
    namespace: str,
    runs: Sequence[Run | str],
    *,
    states: Iterable[RunState],
    agent: str,
    labels: Mapping[str, str] | None,
    context_id: str,
    until_end_time: datetime | None,
    validate_only: bool,
) -> list[agent_run_service_pb2.DeleteRunsRequest]:
    """Returns the requests of a deletion: one, unless there are more ids than one may name.

    Raises:
        InvalidArgument: There is no condition, or another one beside the runs.
    """
    request = message(
        agent_run_service_pb2.DeleteRunsRequest,
        namespace=namespace,
        states=_states(_WIRE_RUN_STATES, RunState, states),
        agent=agent,
        labels=labels,
        context_id=context_id,
        until_end_time=_timestamp("until_end_time", until_end_time) if until_end_time is not None else None,
        validate_only=validate_only,
    )
    conditions = [field.name for field, _ in request.ListFields() if field.name not in ("namespace", "validate_only")]
    if runs and conditions:
        raise _invalid("run_ids", f"cannot be given together with {', '.join(conditions)}")
    if not runs and not conditions:
        raise _invalid("run_ids", "give runs, or at least one condition")
    run_ids = list(dict.fromkeys(run_id_of(run) for run in runs))
    requests: list[agent_run_service_pb2.DeleteRunsRequest] = []
    for first in range(0, max(1, len(run_ids)), _MAX_DELETED_IDS):
        part = message(agent_run_service_pb2.DeleteRunsRequest, run_ids=run_ids[first : first + _MAX_DELETED_IDS])
        part.MergeFrom(request)
        requests.append(part)
    return requests


def list_runs(
    namespace: str,
    *,
    states: Iterable[RunState],
    agent: str,
    labels: Mapping[str, str] | None,
    context_id: str,
    parent: Run | str | None,
    from_create_time: datetime | None,
    until_create_time: datetime | None,
) -> agent_run_service_pb2.ListRunsRequest:
    """Returns the request of a first page of runs.

    Raises:
        InvalidArgument: A time is naive.
    """
    return message(
        agent_run_service_pb2.ListRunsRequest,
        namespace=namespace,
        states=_states(_WIRE_RUN_STATES, RunState, states),
        agent=agent,
        labels=labels,
        context_id=context_id,
        parent_run_id="" if parent is None else run_id_of(parent),
        from_create_time=None if from_create_time is None else _timestamp("from_create_time", from_create_time),
        until_create_time=None if until_create_time is None else _timestamp("until_create_time", until_create_time),
    )


def list_approvals(
    namespace: str, *, states: Iterable[ApprovalState], run: Run | str | None
) -> approval_service_pb2.ListApprovalsRequest:
    """Returns the request of a first page of approvals."""
    return message(
        approval_service_pb2.ListApprovalsRequest,
        namespace=namespace,
        states=_states(_WIRE_APPROVAL_STATES, ApprovalState, states),
        run_id="" if run is None else run_id_of(run),
    )


def event_kinds(kinds: Iterable[EventKind]) -> Sequence[run_event_pb2.RunEventKind.ValueType]:
    """Returns the wire's kinds."""
    wanted = [_one_of("kinds", EventKind, kind) for kind in kinds]
    if EventKind.UNKNOWN in wanted:
        raise _invalid("kinds", "UNKNOWN cannot be asked for")
    return [run_event_pb2.RunEventKind.Value(f"RUN_EVENT_KIND_{kind.name}") for kind in wanted]


def watch_run(
    namespace: str,
    run: Run | str,
    *,
    after_sequence: int,
    cursor: str,
    from_now: bool,
    kinds: Iterable[EventKind],
    include_children: bool,
    heartbeat_s: float | None,
) -> agent_run_service_pb2.WatchRunRequest:
    """Returns the request of a watch.

    Raises:
        InvalidArgument: More than one position is given, or one that is of a single run.
    """
    if bool(after_sequence) + bool(cursor) + from_now > 1:
        raise _invalid("cursor", "only one of after_sequence, cursor and from_now can be given")
    if after_sequence < 0:
        raise _invalid("after_sequence", "is negative")
    if after_sequence and include_children:
        raise _invalid("after_sequence", "is of a single run; continue a watch with children by its cursor")
    return message(
        agent_run_service_pb2.WatchRunRequest,
        namespace=namespace,
        run_id=run_id_of(run),
        kinds=event_kinds(kinds),
        heartbeat_interval=None if heartbeat_s is None else _duration("heartbeat_interval", heartbeat_s),
        include_children=include_children,
        cursor=cursor or None,  # of these three one at most is set
        from_now=from_now or None,
        after_sequence=after_sequence or None,
    )


def watch_approvals(namespace: str, *, heartbeat_s: float | None) -> approval_service_pb2.WatchApprovalsRequest:
    """Returns the request of the live inbox."""
    return message(
        approval_service_pb2.WatchApprovalsRequest,
        namespace=namespace,
        heartbeat_interval=None if heartbeat_s is None else _duration("heartbeat_interval", heartbeat_s),
    )


def signal_run(namespace: str, run: Run | str, name: str, payload: JsonValue) -> agent_run_service_pb2.SignalRunRequest:
    """Returns the request of a signal."""
    return message(
        agent_run_service_pb2.SignalRunRequest,
        namespace=namespace,
        run_id=run_id_of(run),
        name=name,
        request_id=new_request_id(),
        payload_json=_json_text("payload", {} if payload is None else payload),
    )


def decide_approval(
    namespace: str,
    approval: Approval | str,
    decision: Decision,
    *,
    comment: str,
    answer: JsonValue,
    expected_revision: int | None,
) -> approval_service_pb2.DecideApprovalRequest:
    """Returns the request of a decision; without an expected revision, that of the approval that was given."""
    if expected_revision is None:
        expected_revision = approval.revision if isinstance(approval, Approval) else 0
    return message(
        approval_service_pb2.DecideApprovalRequest,
        namespace=namespace,
        approval_id=approval_id_of(approval),
        decision=approval_service_pb2.Decision.Value(f"DECISION_{_one_of('decision', Decision, decision)}"),
        expected_revision=expected_revision,
        comment=comment,
        answer=None if answer is None else _value("answer", answer),
    )


def _duration(field: str, value: float | timedelta) -> Duration:
    """Returns seconds, or a timedelta, as the wire's duration.

    Raises:
        InvalidArgument: It is negative, not finite, or absurdly long.
    """
    try:
        delta = value if isinstance(value, timedelta) else timedelta(seconds=value)
    except (OverflowError, ValueError, TypeError):
        raise _invalid(field, f"is not a number of seconds: {value}") from None
    if not timedelta(0) <= delta <= _LONGEST:
        raise _invalid(field, f"must be between 0 and 100 years, not {value}")
    made = Duration()
    made.FromTimedelta(delta)
    return made


def _deadline(deadline: datetime | timedelta | None) -> Timestamp | None:
    """Returns a deadline, given as a time or from now, as the wire's time."""
    if isinstance(deadline, timedelta):
        try:
            deadline = datetime.now(UTC) + deadline
        except OverflowError:
            raise _invalid("deadline", "is later than there are times") from None
    return None if deadline is None else _timestamp("deadline", deadline)


def _timestamp(field: str, value: datetime) -> Timestamp:
    if not isinstance(value, datetime):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
        raise _invalid(field, f"must be a datetime, not {type(value).__name__}")
    if value.tzinfo is None:
        raise _invalid(field, "needs a timezone, e.g. datetime.now(timezone.utc)")
    made = Timestamp()
    try:
        made.FromDatetime(value)
    except (OverflowError, ValueError):
        raise _invalid(field, "is outside of the years 1 to 9999 in UTC") from None
    return made


def _object_text(field: str, value: Mapping[str, Any]) -> str:
    if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
        raise _invalid(field, f"must be a JSON object, not {type(value).__name__}")
    return _json_text(field, dict(value))


def _json_text(field: str, value: JsonValue) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise _invalid(field, f"is not JSON: {error}") from error
    except RecursionError:
        raise _invalid(field, "is nested too deeply") from None


def _value(field: str, value: JsonValue) -> Value:
    """Returns JSON as a Value, or refuses what a Value cannot hold exactly."""
    text = _json_text(field, value)
    json.loads(text, parse_int=lambda digits: _exact(field, int(digits)))
    made = Value()
    try:
        json_format.Parse(text, made)
    except (json_format.ParseError, ValueError) as error:
        raise _invalid(field, f"cannot be sent: {_refused(error)}") from None
    return made


def _exact(field: str, number: int) -> int:
    if abs(number) > _EXACT_INTEGER:
        raise _invalid(field, f"the integer {number} is above 2^53 and would lose digits; send it as a string")
    return number


def _states(numbers: Mapping[Any, Any], kind: type[RunState] | type[ApprovalState], states: Iterable[Any]) -> list[Any]:
    """Returns the wire's numbers of states."""
    wanted = [_one_of("states", kind, state) for state in ((states,) if isinstance(states, str) else states)]
    for state in wanted:
        if state not in numbers:
            raise _invalid("states", f"{state} cannot be asked for")
    return [numbers[state] for state in wanted]


def _one_of(field: str, kind: type[_E], value: str) -> _E:
    """Returns the member of an enumeration that is given as itself or by its value."""
    try:
        return kind(value)
    except ValueError:
        raise _invalid(field, f"{value!r} is none of {', '.join(str(one) for one in kind)}") from None


def _invalid(field: str, text: str) -> InvalidArgument:
    return InvalidArgument(f"{field}: {text}", violations=(Violation(field, text),))
