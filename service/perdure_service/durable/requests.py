"""What the RPC layer asks for and gets, as values: starts, filters, pages and pieces of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from perdure_service.domain.cursors import Cursor
from perdure_service.domain.events import Event
from perdure_service.domain.runs import Run, RunFilter, RunKey
from perdure_service.domain.trace import TraceSpan

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StartCommand:
    """A start as a caller asks for it; shapes of single fields are checked, nothing is decided yet.

    Attributes:
        run_input: The input as parsed JSON, exactly as sent.
        trace_parent: The caller's W3C `traceparent`, or empty.
        queue: Empty means that of the agent.
        wait_s: How long the caller would wait for the end as well; 0 for not at all.
    """

    namespace: str
    agent: str
    agent_version: str
    run_id: str
    request_id: str
    run_input: Any
    caller: str
    refuse_existing: bool = False
    start_at: datetime | None = None
    delay_s: float | None = None
    deadline_at: datetime | None = None
    labels: Mapping[str, str] | None = None
    context_id: str = ""
    validate_only: bool = False
    trace_parent: str = ""
    queue: str = ""
    priority: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ForkCommand:
    """A fork as a caller asks for it; shapes of single fields are checked, nothing is decided yet.

    Attributes:
        run_id: The run to fork.
        new_run_id: The id of the fork; empty lets the server make one.
        from_step_id: The first step that the fork runs itself; 0 means the first one that did not succeed.
        agent_version: The version that goes on; empty means that of the forked run.
        run_input: The input as parsed JSON, exactly as sent; None means that of the forked run.
        labels: Empty means those of the forked run.
        trace_parent: The caller's W3C `traceparent`, or empty.
    """

    namespace: str
    run_id: str
    request_id: str
    caller: str
    new_run_id: str = ""
    from_step_id: int = 0
    agent_version: str = ""
    run_input: Mapping[str, Any] | None = None
    labels: Mapping[str, str] | None = None
    deadline_at: datetime | None = None
    validate_only: bool = False
    trace_parent: str = ""


@dataclass(frozen=True, slots=True)
class DeleteCommand:
    """Which runs to delete: those of `run_ids`, or else those that have ended and satisfy `run_filter`.

    Attributes:
        validate_only: Count, and delete nothing.
    """

    namespace: str
    caller: str
    run_ids: Sequence[str] = ()
    run_filter: RunFilter = field(default_factory=RunFilter)
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class Deleted:
    """What was deleted, or would be; see DeleteRunsResponse."""

    count: int
    sample_run_ids: Sequence[str]
    more: bool = False
    unfinished_run_ids: Sequence[str] = ()
    missing_run_ids: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list. `next_token` is empty at the end, and only there."""

    items: Sequence[T]
    next_token: str


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """A piece of a watch, as WatchRunResponse has it.

    Attributes:
        key: The run that the events are of: the watched one, or with children in the view one of them.
        events: In order. One that says that a child was started is alone, so that no cursor lies between that event
            and the child's joining.
        cursor: Where the watch stands after them.
    """

    key: RunKey
    events: Sequence[Event]
    cursor: Cursor
    snapshot: Run | None = None
    caught_up: bool = False
    end_of_run: bool = False


@dataclass(frozen=True, slots=True)
class RunTrace:
    """A run's trace: its spans in the order of the tree, and whether some are missing."""

    trace_id: str
    spans: Sequence[TraceSpan]
    truncated: bool
