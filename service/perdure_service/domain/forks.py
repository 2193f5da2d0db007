"""Decides where a fork goes on: which recorded steps it takes over, and what its log tells of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from perdure_service.domain.events import STREAM_STEP, Event, EventKind
from perdure_service.domain.runs import RunKey
from perdure_service.errors import InvalidArgument

_WITH_TIMEOUT = frozenset({"DBOS.recv", "DBOS.getEvent"})
"""Operations that take the next number, too, for the timeout of their wait; it is recorded only if they waited."""

_TOLD = frozenset(
    {EventKind.STEP_SUCCEEDED, EventKind.STEP_FAILED, EventKind.CHILD_STARTED, EventKind.PUBLISHED}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recorded:
    """A checkpoint of the run that is forked.

    Attributes:
        step_id: The engine's number of the operation.
        step_name: Its name.
        failed: Whether an error is recorded.
        child_workflow_id: The run that it started, or whose result it read; empty for none.
        child_status: DBOS's status of that run; empty when it does not exist any more.
        completed_ms: When it was recorded, in milliseconds since 1970.
        duration_ms: How long it took.
    """

    step_id: int
    step_name: str
    failed: bool
    child_workflow_id: str = ""
    child_status: str = ""
    completed_ms: int = 0
    duration_ms: int = 0


@dataclass(frozen=True, slots=True)
class ForkPoint:
    """Where a fork begins.

    Attributes:
        from_step_id: The first step that it runs itself.
        taken_over: The recorded steps below it.
        awaited: The runs, by workflow id, that those have started, or read the results of. A replay reads the result
            from the run itself, whether or not it was read before, so they must stay while the fork goes on.
    """

    from_step_id: int
    taken_over: frozenset[int]
    awaited: tuple[str, ...]


def fork_point(recorded: Sequence[Recorded], from_step_id: int) -> ForkPoint:
    """Returns where a fork begins.

    Args:
        recorded: The checkpoints of the forked run, in the order of their numbers.
        from_step_id: What was asked for; 0 means the first step that did not succeed.

    Raises:
        InvalidArgument: There is no such step, or a child run that the fork would need has been deleted.
    """
    last = recorded[-1].step_id if recorded else 0
    if not 0 <= from_step_id <= last + 1:
        steps = f"steps up to {last} are recorded" if recorded else "no step is recorded"
        raise InvalidArgument("from_step_id", f"must be 1 to {last + 1}, or 0: {steps}")
    first = from_step_id or first_without_success(recorded)
    taken = [one for one in recorded if one.step_id < first]
    for one in taken:
        if one.child_workflow_id and not one.child_status:
            raise InvalidArgument(
                "from_step_id", f"must be at most {one.step_id}: the child run of that step has been deleted"
            )
    return ForkPoint(
        first,
        frozenset(one.step_id for one in taken),
        tuple(sorted({one.child_workflow_id for one in taken if one.child_workflow_id})),
    )


def first_without_success(recorded: Sequence[Recorded]) -> int:
    """Returns the first step that did not succeed, or the one after the last when all did.

    That is a step with an error, one that was begun and never recorded while a later one was, or the start of a child
    run that did not succeed: its result would be the same again, so the child must be started anew.
    """
    names = {one.step_id: one.step_name for one in recorded}
    last = recorded[-1].step_id if recorded else 0
    unsuccessful = {one.step_id for one in recorded if one.failed}
    unsuccessful |= {one.step_id for one in recorded if one.child_workflow_id and one.child_status in _WITHOUT_RESULT}
    unsuccessful |= {
        step_id for step_id in range(1, last) if step_id not in names and names.get(step_id - 1) not in _WITH_TIMEOUT
    }
    return min(unsuccessful, default=last + 1)


_WITHOUT_RESULT = frozenset({"", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"})
"""DBOS's statuses of a child run from which no result will ever come; empty: it has been deleted."""


def taken_over(events: Iterable[Event], point: ForkPoint) -> list[Event]:
    """Returns what the fork's log tells of the steps that it takes over, from the events of the forked run.

    Their times are those of the forked run, and their execution is 0, as no execution of the fork ran them. What its
    watchers cannot use is left out: attempts, streamed text, questions and decisions, progress, usage.
    """
    return [
        replace(event, execution=0, sequence=0)
        for event in events
        if event.step_id in point.taken_over
        and (event.kind in _TOLD or (event.kind is EventKind.OUTPUT_DELTA and event.step_name == STREAM_STEP))
    ]


_GET_RESULT = "DBOS.getResult"
_WITHOUT_EVENT = frozenset({"DBOS.sleep"})
"""Operations whose checkpoint a log does not tell of."""


def from_checkpoints(
    recorded: Iterable[Recorded], told: Iterable[Event], point: ForkPoint, namespace: str
) -> list[Event]:
    """Returns what `taken_over` would have said of the steps that the forked run's log does not tell of any more.

    The checkpoints are kept as long as the run: they say which step it was and how it ended, not what its error was,
    what it published or wrote to streams.
    """
    known = {event.step_id for event in told} | {one.step_id for one in recorded if one.step_name in _WITHOUT_EVENT}
    return [_of_checkpoint(one, namespace) for one in recorded if one.step_id in point.taken_over - known]


def _of_checkpoint(one: Recorded, namespace: str) -> Event:
    at, step = one.completed_ms, (one.step_id, one.step_name)
    if one.child_workflow_id and one.step_name != _GET_RESULT and not one.failed:
        child = RunKey.of_workflow(one.child_workflow_id, namespace)
        return Event(EventKind.CHILD_STARTED, at, {"child_run_id": child.run_id}, *step)
    kind = EventKind.STEP_FAILED if one.failed else EventKind.STEP_SUCCEEDED
    return Event(kind, at, {"duration_ms": one.duration_ms}, *step, 1)
