"""A run that a test has started: what it is, what it did, and how it ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from perdure_service.domain.approvals import Approval, ApprovalState
from perdure_service.domain.events import Event, EventKind, Step
from perdure_service.domain.runs import Failure, Run, RunKey, RunState
from perdure_service.durable.service import RunService

T = TypeVar("T")

POLL_S = 0.02
"""How often a condition of a test is looked at."""

MAX_STEPS = 1_000
"""Of one run, as `steps` returns them."""


class Caller(Protocol):
    """The harness, as its runs need it."""

    timeout_s: float

    async def call(self, call: Callable[[RunService], Awaitable[T]]) -> T:
        """Calls the service, again when the engine dies meanwhile."""

    def check_crashed(self, key: RunKey | None = None) -> None:
        """Raises CrashNeverHappened when a crash is still to come."""


class RunFailed(AssertionError):
    """A run did not end as its test wants. `run` is the run, `failure` why it failed, if it did."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.failure: Failure | None = run.failure
        why = f": {run.failure.type}: {run.failure.message}" if run.failure else f" {run.state_reason}".rstrip()
        super().__init__(f"run {run.key.run_id} of {run.agent} is {run.state.value}{why}")


class HarnessRun:
    """A run that a harness has started."""

    def __init__(self, harness: Caller, key: RunKey) -> None:
        self._harness = harness
        self._key = key

    @property
    def key(self) -> RunKey:
        """Its namespace and ids."""
        return self._key

    @property
    def id(self) -> str:
        """Its id, as in the API."""
        return self._key.run_id

    async def get(self) -> Run:
        """Returns the run as it is now."""
        return await self._harness.call(lambda service: service.get(self._key.namespace, self.id, full=True))

    async def result(self, timeout_s: float | None = None) -> Any:
        """Waits for its end and returns its output, as JSON has it.

        Raises:
            RunFailed: It failed, was cancelled or has expired.
            TimeoutError: It has not ended in time; the message says what it waits for.
            CrashNeverHappened: It was to crash at a step that it never came to.
        """
        run = await self.ended(timeout_s)
        if run.state is not RunState.SUCCEEDED:
            raise RunFailed(run)
        return None if run.output_json is None else json.loads(run.output_json)

    async def ended(self, timeout_s: float | None = None) -> Run:
        """Waits for its end, whichever it is, and returns it; raises as `result` does, but for `RunFailed`."""
        seconds = self._harness.timeout_s if timeout_s is None else timeout_s
        run, timed_out = await self._harness.call(
            lambda service: service.wait(self._key.namespace, self.id, full=True, timeout_s=seconds)
        )
        if timed_out:
            why = f" ({run.state_reason})" if run.state_reason else ""
            raise TimeoutError(f"run {self.id} of {run.agent} is {run.state.value}{why} after {seconds:g} s")
        self._harness.check_crashed(self._key)
        return run

    async def until(self, state: RunState | str, timeout_s: float | None = None) -> Run:
        """Waits until it is in a state, e.g. `"AWAITING_INPUT"`, and returns it.

        Raises:
            RunFailed: It ended in another one.
            TimeoutError: It did not come to that in time.
        """
        wanted = RunState(state)
        seconds = self._harness.timeout_s if timeout_s is None else timeout_s
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            run = await self.get()
            if run.state is wanted:
                return run
            if run.state.terminal:
                raise RunFailed(run)
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"run {self.id} is {run.state.value}, not {wanted.value}, after {seconds:g} s")
            await asyncio.sleep(POLL_S)

    async def events(self, *kinds: EventKind | str) -> list[Event]:
        """Returns its log, as a watcher sees it; only some kinds, if any are named."""
        chosen = frozenset(EventKind(kind) for kind in kinds)
        found: list[Event] = []
        token = ""
        while True:
            page = await self._harness.call(
                lambda service, token=token: service.list_events(  # type: ignore[misc]
                    self._key.namespace, self.id, chosen, page_size=MAX_STEPS, page_token=token
                )
            )
            found += page.items
            token = page.next_token
            if not token:
                return found

    async def steps(self) -> Sequence[Step]:
        """Returns its steps, in the order in which they began (`MAX_STEPS` at most)."""
        page = await self._harness.call(
            lambda service: service.list_steps(self._key.namespace, self.id, page_size=MAX_STEPS, page_token="")
        )
        return page.items

    async def output(self, stream: str = "output") -> str:
        """Returns the text that it streamed, without what attempts wrote that did not succeed."""
        text: dict[int, str] = {}
        for event in await self.events(EventKind.OUTPUT_DELTA, EventKind.ATTEMPT_RESET):
            if event.kind is EventKind.ATTEMPT_RESET:
                text.pop(event.step_id, None)
            elif event.data["stream"] == stream:
                text[event.step_id] = text.get(event.step_id, "") + str(event.data["text"])
        return "".join(text[step_id] for step_id in sorted(text))

    async def approvals(self) -> Sequence[Approval]:
        """Returns what it waits for a decision of."""
        page = await self._harness.call(
            lambda service: service.list_approvals(
                self._key.namespace, frozenset({ApprovalState.PENDING}), self.id, page_size=MAX_STEPS, page_token=""
            )
        )
        return page.items
