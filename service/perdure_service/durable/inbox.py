"""The shared poll of the approval inbox: one query for all who watch, woken early by what this process commits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import structlog

from perdure_service.domain.approvals import Approval

MAILBOX = 100
"""Batches that wait for a watcher at most; each holds the whole of what changed lately, so the oldest may go."""

log = structlog.get_logger()


class Inbox:
    """Polls while somebody watches. Used on one asyncio loop; `wake` may be called from any thread."""

    def __init__(self, read: Callable[[Sequence[str]], Sequence[Approval]], poll_s: float) -> None:
        """Creates the inbox.

        Args:
            read: Returns what is pending, and what was decided lately, in some namespaces; blocks.
            poll_s: How often to look when nothing wakes it.
        """
        self._read = read
        self._poll_s = poll_s
        self._watchers: dict[asyncio.Queue[Sequence[Approval]], str] = {}
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()

    @property
    def watchers(self) -> int:
        """How many watchers there are."""
        return len(self._watchers)

    def wake(self) -> None:
        """Says that something may have changed."""
        loop = self._loop
        if loop is not None and self._watchers and not loop.is_closed():
            loop.call_soon_threadsafe(self._woken.set)

    @contextmanager
    def watching(self, namespace: str) -> Iterator[asyncio.Queue[Sequence[Approval]]]:
        """Registers a watcher; its queue gets the approvals of its namespace at every look."""
        queue: asyncio.Queue[Sequence[Approval]] = asyncio.Queue(MAILBOX)
        self._watchers[queue] = namespace
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = self._loop.create_task(self._run(), name="approval-inbox")
        try:
            yield queue
        finally:
            del self._watchers[queue]
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), timeout=self._poll_s)
            self._woken.clear()
            try:
                found = await asyncio.to_thread(self._read, sorted(set(self._watchers.values())))
            except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                log.warning("inbox.read_failed", error=type(error).__name__)
                await asyncio.sleep(self._poll_s)
                continue
            for queue, namespace in list(self._watchers.items()):
                batch = [one for one in found if one.key.namespace == namespace]
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(batch)
