"""What a run's log holds: events, the packs they are committed in, and the steps that a log tells of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from perdure_service.domain.ids import random_hex
from perdure_service.domain.runs import TERMINAL_STATES, RunState


class EventKind(StrEnum):
    """The kinds of events; values as in the API's oneof."""

    STATE_CHANGED = "state_changed"
    STEP_STARTED = "step_started"
    STEP_RETRYING = "step_retrying"
    STEP_SUCCEEDED = "step_succeeded"
    STEP_FAILED = "step_failed"
    OUTPUT_DELTA = "output_delta"
    ATTEMPT_RESET = "attempt_reset"
    PROGRESS = "progress"
    PUBLISHED = "published"
    APPROVAL_REQUESTED = "approval_requested"
    APPROVAL_DECIDED = "approval_decided"
    SIGNAL_RECEIVED = "signal_received"
    CHILD_STARTED = "child_started"
    RECOVERED = "recovered"
    LOG = "log"
    USAGE = "usage"
    FORKED = "forked"
    ARTIFACT = "artifact"


@dataclass(frozen=True, slots=True)
class Event:
    """One change in a run.

    Attributes:
        kind: What happened.
        time_ms: When, in milliseconds since 1970, by the clock of the process that recorded it.
        data: The kind's own members, JSON values only. Absent members have the API's default.
        step_id: The engine's number of the operation; 0 for none.
        step_name: Its name.
        attempt: The try of the step from 1; 0 when it is not about a try.
        execution: The execution of the run; 0 before the first.
        sequence: Its number in the run; 0 while it is not in the log.
    """

    kind: EventKind
    time_ms: int
    data: Mapping[str, Any] = field(default_factory=dict)
    step_id: int = 0
    step_name: str = ""
    attempt: int = 0
    execution: int = 0
    sequence: int = 0

    @property
    def ends_run(self) -> bool:
        """Whether the run has ended with it."""
        return self.kind is EventKind.STATE_CHANGED and self.data.get("to") in TERMINAL_STATES


@dataclass(slots=True)
class Pack:
    """The events of one commit of one run. Mutable, as it remembers where it was written.

    A repeat of a commit whose reply was lost presents the same pack again: `pack_id` and `first_sequence` tell that
    it is there already.
    """

    workflow_id: str
    events: list[Event] = field(default_factory=list)
    pack_id: str = field(default_factory=random_hex)
    first_sequence: int | None = None


_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode


def encode_events(events: Sequence[Event]) -> str:
    """Returns the JSON text of a pack's events: an array of arrays, ASCII only (so NUL and surrogates are escaped)."""
    rows = [[e.kind, e.time_ms, e.step_id, e.step_name, e.attempt, e.execution, dict(e.data)] for e in events]
    return _encode(rows)


def decode_events(text: str, first_sequence: int) -> list[Event]:
    """Returns the events of a pack, numbered from `first_sequence`."""
    return [
        Event(EventKind(kind), time_ms, data, step_id, step_name, attempt, execution, first_sequence + index)
        for index, (kind, time_ms, step_id, step_name, attempt, execution, data) in enumerate(json.loads(text))
    ]


MAX_TEXT_CHARS = 16_384
"""The longest text of one event (a delta, a log line). Longer deltas become several events."""

MAX_VALUE_CHARS = 256 * 1024
"""The longest published value that an event carries; of longer ones it tells the size. A pack must stay below the
1 MiB that CockroachDB asks of a row, and a message below 4 MiB, gRPC's default for clients."""


MAX_PACK_CHARS = 512 * 1024
"""Where a commit's events are cut into another pack: far below the 1 MiB of a row."""


def text_pieces(text: str) -> list[str]:
    """Returns a text in pieces that fit into an event; one, perhaps empty, at least."""
    return [text[start : start + MAX_TEXT_CHARS] for start in range(0, len(text), MAX_TEXT_CHARS)] or [""]


def event_chars(event: Event) -> int:
    """Returns about how many characters an event takes in a message."""
    chars = 100
    for value in event.data.values():
        if isinstance(value, str):
            chars += len(value)
    return chars


def in_pieces(events: Sequence[Event], max_chars: int, max_events: int | None = None) -> list[list[Event]]:
    """Returns events in pieces of a bounded size, in order; an event that is longer alone has a piece of its own."""
    pieces: list[list[Event]] = [[]]
    chars = 0
    for event in events:
        size = event_chars(event)
        if pieces[-1] and (chars + size > max_chars or len(pieces[-1]) == max_events):
            pieces.append([])
            chars = 0
        pieces[-1].append(event)
        chars += size
    return pieces


# ---- steps -----------------------------------------------------------------------------------------------------------


PUBLISH_STEP = "DBOS.setEvent"
STREAM_STEP = "DBOS.writeStream"
"""The names of the operations by which the workflow's own code publishes a value, and writes an entry of one of DBOS's
streams. They are steps with a checkpoint; what a step's body publishes and writes is part of that step, and has its
name."""

ARTIFACT_STEP = "perdure.artifact"
"""The name of the operation by which the workflow's own code writes an artifact."""

APPROVAL_STEP = "perdure.approval"
"""The name of the operation that asks a person and waits."""


class StepState(StrEnum):
    """Where a step stands; names as in the API without their prefix."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"


@dataclass(frozen=True, slots=True)
class Step:
    """A step as its run's log tells of it. Times in milliseconds since 1970."""

    step_id: int
    step_name: str
    state: StepState
    attempts: int
    execution: int
    start_ms: int
    end_ms: int | None = None
    error: Mapping[str, Any] | None = None
    output_preview: str = ""
    child_run_id: str = ""


def fold_steps(events: Iterable[Event]) -> list[Step]:
    """Returns the steps of a run in the order in which they began, from its events in order."""
    steps: dict[int, Step] = {}
    execution = 0
    for event in events:
        if event.kind is EventKind.STATE_CHANGED:
            moved_on = event.execution > execution
            execution = max(execution, event.execution)
            if moved_on or event.ends_run or event.data.get("to") == RunState.QUEUED:
                _interrupt(steps)
        elif event.step_id:
            _apply(steps, event)
    return list(steps.values())


def _interrupt(steps: dict[int, Step]) -> None:
    for step_id, step in steps.items():
        # An approval is a row, and stays asked whatever becomes of the execution that asked it.
        if step.state is StepState.RUNNING and step.step_name != APPROVAL_STEP:
            steps[step_id] = replace(step, state=StepState.INTERRUPTED)


def _apply(steps: dict[int, Step], event: Event) -> None:
    """Lets one event about a step change what is known of it."""
    known = steps.get(event.step_id)
    begin_ms = event.time_ms - int(event.data.get("duration_ms", 0))
    step = known or Step(
        event.step_id, event.step_name, StepState.RUNNING, max(1, event.attempt), event.execution, begin_ms
    )
    attempts = max(step.attempts, event.attempt)
    match event.kind:
        case EventKind.STEP_STARTED:
            start_ms = step.start_ms if known else event.time_ms
            step = replace(
                step, state=StepState.RUNNING, attempts=max(1, event.attempt), execution=event.execution,
                start_ms=start_ms, end_ms=None, error=None,
            )  # fmt: skip
        case EventKind.STEP_RETRYING:
            step = replace(step, attempts=attempts + 1, error=event.data.get("error"))
        case EventKind.STEP_SUCCEEDED:
            step = replace(
                step, state=StepState.SUCCEEDED, attempts=attempts, execution=event.execution, end_ms=event.time_ms,
                error=None, output_preview=str(event.data.get("preview", "")),
            )  # fmt: skip
        case EventKind.STEP_FAILED:
            step = replace(
                step, state=StepState.FAILED, attempts=attempts, execution=event.execution, end_ms=event.time_ms,
                error=event.data.get("error"),
            )  # fmt: skip
        case EventKind.OUTPUT_DELTA | EventKind.PUBLISHED if event.step_name in (STREAM_STEP, PUBLISH_STEP):
            step = replace(step, state=StepState.SUCCEEDED, execution=event.execution, end_ms=event.time_ms)
        case EventKind.CHILD_STARTED:
            step = replace(
                step, state=StepState.SUCCEEDED, execution=event.execution, end_ms=event.time_ms,
                child_run_id=str(event.data.get("child_run_id", "")),
            )  # fmt: skip
        case EventKind.APPROVAL_REQUESTED:
            pass
        case _:
            if known is None:
                return
    steps[event.step_id] = step


def half_written(events: Iterable[Event]) -> list[tuple[int, str]]:
    """Returns the steps (id, name) whose text an execution that died has left half written, from a run's events.

    Of a step that finished, and of one whose earlier text is void already, nothing is half written; an entry that the
    workflow's own code wrote to one of DBOS's streams is a finished step. Other text of that code (step 0) is written
    again by every replay, so it is half written, too.
    """
    open_steps: dict[int, str] = {}
    for event in events:
        if event.kind is EventKind.OUTPUT_DELTA and event.step_name != STREAM_STEP:
            open_steps[event.step_id] = event.step_name
        elif event.kind in (EventKind.STEP_SUCCEEDED, EventKind.STEP_FAILED, EventKind.ATTEMPT_RESET):
            open_steps.pop(event.step_id, None)
    return sorted(open_steps.items())


def of_kinds(events: Iterable[Event], kinds: frozenset[EventKind]) -> Iterator[Event]:
    """Yields the events that a watcher of these kinds gets; an empty set means all, and the end is always sent."""
    for event in events:
        if not kinds or event.kind in kinds or event.ends_run:
            yield event
