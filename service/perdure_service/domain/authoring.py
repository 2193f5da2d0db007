"""What a running agent may ask for: the protocol behind `perdure_service.agents.run`, bound by `durable`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol

from perdure_service.domain.approvals import ApprovalResult


class OutputStream(Protocol):
    """A named stream of text that watchers see as it is written."""

    def write(self, text: str) -> None:
        """Appends text. Never waits; it reaches watchers within about 100 ms, or with the next checkpoint."""


class RunContext(Protocol):
    """What an agent can ask of the run it is in."""

    @property
    def id(self) -> str:
        """The run's id in the API."""

    @property
    def namespace(self) -> str:
        """The run's namespace."""

    def progress(self, message: str, completed: int = 0, total: int = 0) -> None:
        """Tells watchers how far the run is; kept in the run until the next one. Does not wait."""

    def output(self, stream: str = "output") -> OutputStream:
        """Returns a stream of text bound to this step and attempt; when they end, writing raises RuntimeError."""

    def log(self, message: str, level: Literal["debug", "info", "warning", "error"] = "info") -> None:
        """Writes a line to the run's log. Does not wait."""

    def usage(self, *, input_tokens: int, output_tokens: int, model: str = "") -> None:
        """Says what a model call used, whatever becomes of the step: it is paid for. Does not wait.

        Call it once a call, inside the step that made it: a replay does not run finished steps, so it counts once.

        Raises:
            RuntimeError: It is called outside of a step.
            ValueError: A number is negative.
        """

    async def approval(
        self,
        title: str,
        *,
        payload: Any = None,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - durable, for people
        on_timeout: Literal["REJECT", "APPROVE", "FAIL_RUN"] = "REJECT",
        assignees: Sequence[str] = (),
        answer_schema: dict[str, Any] | None = None,
    ) -> ApprovalResult:
        """Asks a person and waits for the decision, through restarts, until `timeout` (None: as long as it takes).

        Raises:
            ApprovalTimeout: Nobody decided in time and `on_timeout` is FAIL_RUN.
            OutputTooLarge: The payload is over the server's limit; nothing was asked.
        """

    async def signal(self, name: str, *, timeout: timedelta | None = None) -> Any:  # noqa: ASYNC109 - as above
        """Waits for the next signal of this name and returns its payload.

        Raises:
            SignalTimeout: None came in time.
        """

    def idempotency_key(self) -> str:
        """Returns the key of this step of this run for side effects: the same in every attempt and execution."""


class ApprovalTimeout(Exception):
    """Nobody decided before the deadline, and the agent asked to fail then."""


class OutputTooLarge(ValueError):
    """An output, a step's result, an approval's payload or a published value is over the server's limit.

    Keep what is large elsewhere, and return a reference to it. Of a step it is the step's error: recorded, and not
    retried, as the step has done its work.
    """


class SignalTimeout(TimeoutError):
    """No signal of the name came in time."""
