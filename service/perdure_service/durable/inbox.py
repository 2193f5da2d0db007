"""The shared poll of the approval inbox: one query for all who watch, woken early by what any server does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import structlog

from perdure_service.domain.approvals import Approval, ApprovalState
from perdure_service.store.tailer import HINTED_POLL_FACTOR

OVERLAP_S = 30.0
"""How far back a look goes for decisions: longer than a commit can take to become visible."""

log = structlog.get_logger()


class Mailbox:
    """What one watcher has not taken yet: each approval once, as it is now, however long the watcher takes."""

    def __init__(self, namespace: str) -> None:
        """Creates an empty one for the approvals of a namespace."""
        self.namespace = namespace
        self._revisions: dict[str, int] = {}
        self._news: dict[str, Approval] = {}
        self._filled = asyncio.Event()

    def begin(self, found: Sequence[Approval]) -> list[Approval]:
        """Returns what is pending of what was found, to be sent first; of the rest only what is newer is news."""
        for one in found:
            if one.revision >= self._revisions.get(one.approval_id, 0):
                self._revisions[one.approval_id] = one.revision
                self._news.pop(one.approval_id, None)
        return [one for one in found if one.state is ApprovalState.PENDING]

    def put(self, found: Sequence[Approval]) -> None:
        """Adds what is new of what was found."""
        for one in found:
            known = self._revisions.get(one.approval_id)
            if (one.state is ApprovalState.PENDING or _recent(one)) if known is None else one.revision > known:
                self._revisions[one.approval_id] = one.revision
                self._news[one.approval_id] = one
        if self._news:
            self._filled.set()

    async def take(self) -> list[Approval]:
        """Returns what is new, as soon as there is something."""
        while not self._news:
            self._filled.clear()
            await self._filled.wait()
        news, self._news = self._news, {}
        return list(news.values())


def _recent(approval: Approval) -> bool:
    """Whether an approval was pending so shortly that a watcher may have missed that; both times are the database's."""
    closed_at = approval.decide_time
    return closed_at is not None and closed_at - approval.create_time < timedelta(seconds=OVERLAP_S)


class Inbox:
    """Polls while somebody watches. Used on one asyncio loop; `wake` may be called from any thread."""

    def __init__(
        self,
        read: Callable[[Sequence[str]], Sequence[Approval]],
        poll_s: float,
        hinted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Creates the inbox.

        Args:
            read: Returns what is pending, and what was decided lately, in some namespaces; blocks.
            poll_s: How often to look when nothing wakes it, unless hints arrive.
            hinted: Whether hints of other servers are known to arrive.
        """
        self._hinted = hinted
        self._read = read
        self._poll_s = poll_s
        self._watchers: set[Mailbox] = set()
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
    def watching(self, namespace: str) -> Iterator[Mailbox]:
        """Registers a watcher; its mailbox gets what every look finds in its namespace."""
        mailbox = Mailbox(namespace)
        self._watchers.add(mailbox)
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = self._loop.create_task(self._run(), name="approval-inbox")
        try:
            yield mailbox
        finally:
            self._watchers.remove(mailbox)
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s * (HINTED_POLL_FACTOR if self._hinted() else 1)):
                    await self._woken.wait()
            self._woken.clear()
            try:
                found = await asyncio.to_thread(self._read, sorted({one.namespace for one in self._watchers}))
            except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                log.warning("inbox.read_failed", error=type(error).__name__)
                await asyncio.sleep(self._poll_s)
                continue
            for mailbox in self._watchers:
                mailbox.put([one for one in found if one.key.namespace == mailbox.namespace])
