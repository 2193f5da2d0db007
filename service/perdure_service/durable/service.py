"""What can be asked about runs and approvals, for the RPC layer: async, checked, in domain terms."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from perdure_service.domain.agents import AgentSpec
from perdure_service.domain.approvals import Approval, ApprovalState, Decision
from perdure_service.domain.events import Event, EventKind, Step
from perdure_service.domain.runs import Run, RunKey, RunState

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StartCommand:
    """A start as a caller asks for it; shapes of single fields are checked, nothing is decided yet.

    Attributes:
        run_input: The input as parsed JSON, exactly as sent.
        trace_parent: The caller's W3C `traceparent`, or empty.
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


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list. `next_token` is empty at the end, and only there."""

    items: Sequence[T]
    next_token: str


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs a list returns; empty members mean all."""

    states: frozenset[RunState] = frozenset()
    agent: str = ""
    labels: Mapping[str, str] | None = None
    context_id: str = ""


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """A piece of a watch, as WatchRunResponse has it."""

    key: RunKey
    events: Sequence[Event]
    last_sequence: int
    cursor: str
    snapshot: Run | None = None
    caught_up: bool = False
    end_of_run: bool = False


class RunService:
    """Runs and approvals. All methods raise `PerdureError`s; every id they take is a caller's."""

    async def start(self, command: StartCommand) -> tuple[Run, bool]:
        """Starts an agent; returns the run and whether this request created it."""
        raise NotImplementedError

    async def get(self, namespace: str, run_id: str, *, full: bool) -> Run:
        """Returns a run."""
        raise NotImplementedError

    async def list(self, namespace: str, run_filter: RunFilter, *, page_size: int, page_token: str) -> Page[Run]:
        """Returns a page of runs, newest first. `page_size` is already bounded to 1..1,000."""
        raise NotImplementedError

    async def wait(self, namespace: str, run_id: str, *, full: bool, timeout_s: float) -> tuple[Run, bool]:
        """Waits for a run's end; returns the run and whether the time was up first."""
        raise NotImplementedError

    def watch(
        self,
        namespace: str,
        run_id: str,
        *,
        cursor: str | None = None,
        after_sequence: int | None = None,
        from_now: bool = False,
        kinds: frozenset[EventKind] = frozenset(),
        heartbeat_s: float = 15.0,
    ) -> AsyncIterator[WatchBatch]:
        """Yields a run's stream as WatchRun's contract says, heartbeats included, and ends with the run."""
        raise NotImplementedError

    async def list_events(
        self, namespace: str, run_id: str, kinds: frozenset[EventKind], *, page_size: int, page_token: str
    ) -> Page[Event]:
        """Returns a page of a run's log."""
        raise NotImplementedError

    async def list_steps(self, namespace: str, run_id: str, *, page_size: int, page_token: str) -> Page[Step]:
        """Returns a page of a run's steps."""
        raise NotImplementedError

    async def signal(
        self, namespace: str, run_id: str, *, name: str, payload: Any, request_id: str, sender: str
    ) -> bool:
        """Delivers a signal; returns False when this request_id had delivered it before."""
        raise NotImplementedError

    async def cancel(self, namespace: str, run_id: str, *, reason: str, caller: str) -> Run:
        """Cancels a run and its children; returns the run as it is then."""
        raise NotImplementedError

    async def list_approvals(
        self, namespace: str, states: frozenset[ApprovalState], run_id: str, *, page_size: int, page_token: str
    ) -> Page[Approval]:
        """Returns a page of approvals, oldest first. Empty `states` means PENDING."""
        raise NotImplementedError

    async def get_approval(self, namespace: str, approval_id: str) -> Approval:
        """Returns an approval."""
        raise NotImplementedError

    async def decide_approval(self, namespace: str, approval_id: str, decision: Decision) -> Approval:
        """Decides an approval, once; returns it as it is then."""
        raise NotImplementedError

    def watch_approvals(
        self, namespace: str, *, heartbeat_s: float = 15.0
    ) -> AsyncIterator[tuple[Sequence[Approval], bool]]:
        """Yields (changed approvals, caught up): first what is pending, then changes; empty ones are heartbeats."""
        raise NotImplementedError

    async def list_agents(self, *, page_size: int, page_token: str) -> Page[AgentSpec]:
        """Returns a page of the catalogue by name and version."""
        raise NotImplementedError

    async def get_agent(self, name: str, version: str) -> AgentSpec:
        """Returns a catalogue entry; the current version when `version` is empty."""
        raise NotImplementedError
