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

    def artifact(self, name: str, data: bytes | str, *, media_type: str = "") -> None:
        """Keeps bytes, or a text as UTF-8, for the run's callers; waits until they are stored.

        In the workflow's own code it is written once, whatever is replayed. Inside a step it is written as often as
        the step is tried; of several of one name callers get the last one.

        Args:
            name: 1 to 256 characters, none of them a control character.
            data: What to keep.
            media_type: Its media type; empty for `text/plain; charset=utf-8` of a text, and otherwise
                `application/octet-stream`.

        Raises:
            OutputTooLarge: It is over the server's limit; nothing was kept.
            ValueError: The name or media type is malformed.
        """

    async def artifact_async(self, name: str, data: bytes | str, *, media_type: str = "") -> None:
        """Does what `artifact` does, for code that must not block the event loop."""

    def idempotency_key(self) -> str:
        """Returns the key of this step of this run for side effects: the same in every attempt and execution."""


class ApprovalTimeout(Exception):
    """Nobody decided before the deadline, and the agent asked to fail then."""


class OutputTooLarge(ValueError):
    """An output, a step's result, an artifact, an approval's payload or a published value is over the server's limit.

    Keep what is large elsewhere, and return a reference to it. Of a step it is the step's error: recorded, and not
    retried, as the step has done its work.
    """


class SignalTimeout(TimeoutError):
    """No signal of the name came in time."""
