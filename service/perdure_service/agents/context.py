"""Decides what `run` is: whatever run the calling code is in, as `durable` tells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

from perdure_service.domain.approvals import ApprovalResult
from perdure_service.domain.authoring import OutputStream, RunContext

Provider = Callable[[], RunContext | None]
"""Returns the context of the run that the calling code is in, None outside a run."""


class _CurrentRun:
    """`RunContext`, handing every call to the context of the moment. There is one, `run`."""

    def __init__(self) -> None:
        self.provider: Provider = lambda: None

    def _context(self, member: str) -> RunContext:
        context = self.provider()
        if context is None:
            raise RuntimeError(
                f"run.{member} is only available inside an agent's run; in a test, agents.context.bind gives it one"
            )
        return context

    @property
    def id(self) -> str:
        return self._context("id").id

    @property
    def namespace(self) -> str:
        return self._context("namespace").namespace

    def progress(self, message: str, completed: int = 0, total: int = 0) -> None:
        self._context("progress()").progress(message, completed, total)

    def output(self, stream: str = "output") -> OutputStream:
        return self._context("output()").output(stream)

    def log(self, message: str, level: Literal["debug", "info", "warning", "error"] = "info") -> None:
        self._context("log()").log(message, level)

    def usage(self, *, input_tokens: int, output_tokens: int, model: str = "") -> None:
        self._context("usage()").usage(input_tokens=input_tokens, output_tokens=output_tokens, model=model)

    async def approval(
        self,
        title: str,
        *,
        payload: Any = None,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - the run's deadline for people, days away and durable
        on_timeout: Literal["REJECT", "APPROVE", "FAIL_RUN"] = "REJECT",
        assignees: Sequence[str] = (),
        answer_schema: dict[str, Any] | None = None,
    ) -> ApprovalResult:
        return await self._context("approval()").approval(
            title,
            payload=payload,
            timeout=timeout,
            on_timeout=on_timeout,
            assignees=assignees,
            answer_schema=answer_schema,
        )

    async def signal(self, name: str, *, timeout: timedelta | None = None) -> Any:  # noqa: ASYNC109 - as above
        return await self._context("signal()").signal(name, timeout=timeout)

    def artifact(self, name: str, data: bytes | str, *, media_type: str = "") -> None:
        self._context("artifact()").artifact(name, data, media_type=media_type)

    async def artifact_async(self, name: str, data: bytes | str, *, media_type: str = "") -> None:
        await self._context("artifact_async()").artifact_async(name, data, media_type=media_type)

    def idempotency_key(self) -> str:
        return self._context("idempotency_key()").idempotency_key()


_current = _CurrentRun()

run: RunContext = _current
"""The run that the calling code is in. Outside a run everything it offers raises RuntimeError."""


def bind(provider: Provider) -> Provider:
    """Makes `run` ask `provider` from now on; returns the one it asked before. Called once, by what executes runs."""
    previous, _current.provider = _current.provider, provider
    return previous
