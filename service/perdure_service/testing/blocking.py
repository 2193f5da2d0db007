"""The harness for tests without an event loop: the same, blocking."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar

from perdure_service.domain.approvals import Approval
from perdure_service.domain.events import Event, EventKind, Step
from perdure_service.domain.runs import Run, RunState
from perdure_service.testing.harness import AgentHarness
from perdure_service.testing.runs import HarnessRun

T = TypeVar("T")


class BlockingRun:
    """See `HarnessRun`."""

    def __init__(self, harness: BlockingHarness, run: HarnessRun) -> None:
        self._wait = harness.wait
        self.run = run

    @property
    def id(self) -> str:
        """See `HarnessRun.id`."""
        return self.run.id

    def get(self) -> Run:
        """See `HarnessRun.get`."""
        return self._wait(self.run.get())

    def result(self, timeout_s: float | None = None) -> Any:
        """See `HarnessRun.result`."""
        return self._wait(self.run.result(timeout_s))

    def ended(self, timeout_s: float | None = None) -> Run:
        """See `HarnessRun.ended`."""
        return self._wait(self.run.ended(timeout_s))

    def until(self, state: RunState | str, timeout_s: float | None = None) -> Run:
        """See `HarnessRun.until`."""
        return self._wait(self.run.until(state, timeout_s))

    def events(self, *kinds: EventKind | str) -> list[Event]:
        """See `HarnessRun.events`."""
        return self._wait(self.run.events(*kinds))

    def steps(self) -> Sequence[Step]:
        """See `HarnessRun.steps`."""
        return self._wait(self.run.steps())

    def output(self, stream: str = "output") -> str:
        """See `HarnessRun.output`."""
        return self._wait(self.run.output(stream))

    def approvals(self) -> Sequence[Approval]:
        """See `HarnessRun.approvals`."""
        return self._wait(self.run.approvals())


class BlockingHarness:
    """`AgentHarness` in blocking calls: `with BlockingHarness(...) as harness`. Arguments and errors are the same."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See `AgentHarness`."""
        self.harness = AgentHarness(*arguments, **options)

    def __enter__(self) -> Self:
        self.harness.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.harness.close()
        if kind is None:
            self.harness.check_crashed()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns what a coroutine of the harness returns."""
        return self.harness.wait(coroutine)

    @property
    def crashes(self) -> int:
        """See `AgentHarness.crashes`."""
        return self.harness.crashes

    def start(self, agent: str, run_input: Any = None, **options: Any) -> BlockingRun:
        """See `AgentHarness.start`."""
        return BlockingRun(self, self.wait(self.harness.start(agent, run_input, **options)))

    def run(self, agent: str, run_input: Any = None, **options: Any) -> Any:
        """See `AgentHarness.run`."""
        return self.wait(self.harness.run(agent, run_input, **options))

    def signal(self, run: BlockingRun, name: str, payload: Any) -> None:
        """See `AgentHarness.signal`."""
        self.wait(self.harness.signal(run.run, name, payload))

    def cancel(self, run: BlockingRun, reason: str = "cancelled by the test") -> Run:
        """See `AgentHarness.cancel`."""
        return self.wait(self.harness.cancel(run.run, reason))

    def approve(self, run: BlockingRun, comment: str = "", *, answer: Any = None, title: str = "") -> Approval:
        """See `AgentHarness.approve`."""
        return self.wait(self.harness.approve(run.run, comment, answer=answer, title=title))

    def reject(self, run: BlockingRun, comment: str = "", *, title: str = "") -> Approval:
        """See `AgentHarness.reject`."""
        return self.wait(self.harness.reject(run.run, comment, title=title))

    def crash(self) -> None:
        """See `AgentHarness.crash`."""
        self.wait(self.harness.crash())

    def crash_after_step(self, run: BlockingRun | str, step_id: int, *, before: bool = False) -> None:
        """See `AgentHarness.crash_after_step`."""
        which = run if isinstance(run, str) else run.run
        self.wait(self.harness.crash_after_step(which, step_id, before=before))

    def disarm(self) -> None:
        """See `AgentHarness.disarm`."""
        self.harness.disarm()

    def check_replay(self, agent: str, run_input: Any = None, **options: Any) -> list[tuple[int, str]]:
        """See `AgentHarness.check_replay`."""
        return self.wait(self.harness.check_replay(agent, run_input, **options))
