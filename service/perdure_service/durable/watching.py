"""WatchRun's stream contract: a snapshot, everything after a cursor, then live until the run ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
import structlog

from perdure_service.domain.events import Event, EventKind, decode_cursor, encode_cursor, in_pieces, of_kinds
from perdure_service.domain.runs import Run, RunKey
from perdure_service.durable.requests import WatchBatch
from perdure_service.errors import CursorOutOfRange, InvalidArgument, RunNotFound
from perdure_service.store import event_log, runs
from perdure_service.store.tailer import Subscription, Tailer

T = TypeVar("T")

log = structlog.get_logger()

MAX_EVENTS_PER_BATCH = 500
"""Events in one piece of a stream, so that a message stays far below the size limit."""

MAX_BATCH_CHARS = 512 * 1024
"""Text in one piece of a stream, for the same reason."""


class Read(Protocol):
    """Runs a reading transaction, named for the log, off the event loop."""

    def __call__(self, name: str, function: Callable[[sa.Connection], T], /) -> Awaitable[T]:
        """Returns what `function` returns."""


class Watching:
    """See the module."""

    def __init__(self, read: Read, get: Callable[[str, str], Awaitable[Run]], tailer: Tailer) -> None:
        """Creates it over what finds runs and what feeds watchers."""
        self._read = read
        self._get = get
        self._tailer = tailer

    async def watch(
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
        # Register, then read, then wait: what is committed after the read wakes us.
        snapshot = await self._get(namespace, run_id)
        workflow_id = snapshot.key.workflow_id
        subscription = self._tailer.subscribe(workflow_id)
        try:
            snapshot = await self._get(namespace, run_id)
            position = await self._position(snapshot, cursor, after_sequence, from_now)
            key = snapshot.key
            caught_up_at = snapshot.last_sequence

            def batch(events: Sequence[Event], last: int, **flags: Any) -> WatchBatch:
                return WatchBatch(key, list(of_kinds(events, kinds)), last, encode_cursor(workflow_id, last), **flags)

            ended = snapshot.state.terminal and position >= caught_up_at
            yield batch([], position, snapshot=snapshot, caught_up=position >= caught_up_at, end_of_run=ended)
            if ended:
                return
            while True:
                events, behind = await self._next(subscription, key, position, heartbeat_s)
                if not events:
                    run_over = behind and await self._over(key, position)
                    yield batch([], position, caught_up=True, end_of_run=run_over)
                    if run_over:
                        return
                    continue
                pieces = in_pieces(events, MAX_BATCH_CHARS, MAX_EVENTS_PER_BATCH)
                for index, piece in enumerate(pieces):
                    position = piece[-1].sequence
                    last_piece = index == len(pieces) - 1
                    over = last_piece and piece[-1].ends_run and await self._over(key, position)
                    yield batch(piece, position, caught_up=last_piece and not behind, end_of_run=over)
                    if over:
                        return
        finally:
            self._tailer.unsubscribe(subscription)

    async def _position(self, snapshot: Run, cursor: str | None, after_sequence: int | None, from_now: bool) -> int:
        """Returns the sequence after which a watch begins.

        Raises:
            InvalidArgument: It is from the future, or not of this run.
            CursorOutOfRange: What follows it is no longer kept.
        """
        if from_now:
            return snapshot.last_sequence
        field = "cursor" if cursor is not None else "after_sequence"
        position = decode_cursor(cursor, snapshot.key.workflow_id) if cursor is not None else after_sequence or 0
        if position < 0:
            raise InvalidArgument(field, "must not be negative")
        if position > snapshot.last_sequence:
            raise InvalidArgument(field, f"is from the future: the run has {snapshot.last_sequence} events")
        await self._refuse_truncated(snapshot.key.workflow_id, position)
        return position

    async def _next(
        self, subscription: Subscription, key: RunKey, position: int, heartbeat_s: float
    ) -> tuple[Sequence[Event], bool]:
        """Returns the next events after `position` and whether they were read from the log; none for a heartbeat.

        Raises:
            RunNotFound: The run was deleted meanwhile.
        """
        workflow_id = key.workflow_id
        deadline = time.monotonic() + heartbeat_s
        while True:
            if subscription.behind:
                subscription.changed.clear()
                events = await self._read("events.read", lambda conn: event_log.read(conn, workflow_id, position))
                if events and events[0].sequence != position + 1:
                    await self._alarm(workflow_id, position, events[0].sequence)
                if events:
                    return events, True
                self._tailer.caught_up(subscription, position)
                if subscription.behind:
                    # Others are further than the log reaches: unless it has grown since, it was deleted.
                    await self._over(key, position)
                    continue
                return [], True
            while subscription.packs:
                pack = subscription.packs.popleft()
                fresh = [event for event in pack.events if event.sequence > position]
                if fresh and fresh[0].sequence != position + 1:
                    subscription.behind = True
                    break
                if fresh:
                    return fresh, bool(subscription.packs)
            if subscription.behind:
                continue
            subscription.changed.clear()
            if subscription.packs:
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                return [], False
            try:
                await asyncio.wait_for(subscription.changed.wait(), timeout=left)
            except TimeoutError:
                return [], False

    async def _alarm(self, workflow_id: str, position: int, found: int) -> None:
        """Ends a watch that came to a hole in the log, for nothing may be delivered past it.

        Raises:
            CursorOutOfRange: What follows the watcher's position is no longer kept.
            LookupError: It should be there; the log of this server tells more.
        """
        await self._refuse_truncated(workflow_id, position)
        log.error("watch.hole", workflow_id=workflow_id, after=position, found=found)
        raise LookupError(f"{workflow_id} has no event {position + 1}")

    async def _refuse_truncated(self, workflow_id: str, position: int) -> None:
        """Raises CursorOutOfRange when what follows a position is no longer kept."""
        earliest = await self._read("events.earliest", partial(event_log.earliest_sequence, workflow_id=workflow_id))
        if position + 1 < earliest:
            raise CursorOutOfRange(
                f"events before {earliest} are no longer kept; watch again after {earliest - 1}",
                earliest_sequence=str(earliest),
            )

    async def _over(self, key: RunKey, position: int) -> bool:
        """Returns whether the run has ended and its log ends at `position`: a terminal event may be revived upon.

        Raises:
            RunNotFound: It was deleted meanwhile.
        """
        run = await self._read("runs.get", lambda conn: runs.get(conn, key.workflow_id))
        if run is None:
            raise RunNotFound(f"run {key.run_id!r} was deleted while it was watched")
        return run.state.terminal and run.end_time is not None and run.last_sequence <= position
