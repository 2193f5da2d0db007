"""The view of a watch: a run, and if asked its descendants, each run's events in its own order, nothing after a hole.

A run is a *member* of the view until it has ended and everything of it was delivered. Members wait in one queue while
there is something to deliver of them; the rest costs one entry in the tailer's shared poll. A child joins when the
event that says it was started is delivered, and is served before everything else as far as its log went then. So what
has ended already is complete before its parent goes on, and a view of a run with thousands of finished children holds
a few members at a time.

**What if this server dies?** The cursor of the last response tells another one where each member stood, and that every
other descendant was either complete or has yet to be started by an event that was not delivered (see `domain.cursors`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import sqlalchemy as sa
import structlog

from perdure_service.domain.cursors import Cursor
from perdure_service.domain.events import Event, EventKind, in_pieces
from perdure_service.domain.runs import RunKey
from perdure_service.errors import CursorOutOfRange, RunNotFound
from perdure_service.store import event_log, run_heads
from perdure_service.store.run_heads import Head
from perdure_service.store.tailer import Tailer

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


@dataclass(frozen=True, slots=True)
class Piece:
    """Events of one run of the view; none when all that there is to say is that the view has caught up."""

    key: RunKey
    events: Sequence[Event]


@dataclass(slots=True, eq=False)
class _Member:
    """A run of the view that is not complete.

    Attributes:
        position: The last event that was delivered.
        head: How far its log went when it joined.
        resumed_at: Where an earlier stream had left off; its children up to there are known to that one.
        pieces: What has been read of it and not been delivered.
        queued: Whether it is in the queue.
        started: The children that the log up to `resumed_at` tells of; None while nobody has had to ask.
    """

    head: Head
    position: int
    resumed_at: int
    pieces: deque[list[Event]] = field(default_factory=deque)
    queued: bool = False
    started: frozenset[str] | None = None

    @property
    def key(self) -> RunKey:
        return self.head.key


class View:
    """See the module. Close it at the end."""

    def __init__(self, read: Read, tailer: Tailer, root: RunKey, *, include_children: bool) -> None:
        """Creates the view of a run; registered as a watcher from here on, so that nothing is missed.

        Args:
            read: Reads the database.
            tailer: Tells what is new.
            root: The watched run.
            include_children: Whether its descendants are in the view.
        """
        self._read = read
        self._tailer = tailer
        self._root = root
        self._include_children = include_children
        self._position = 0
        self._members: dict[str, _Member] = {}
        self._joined: set[str] = set()
        self._queue: deque[_Member] = deque()
        self._subscription = tailer.subscribe(root.workflow_id)

    def close(self) -> None:
        """Ends the registration."""
        self._tailer.unsubscribe(self._subscription)

    @property
    def cursor(self) -> Cursor:
        """Where the view stands."""
        if not self._include_children:
            return Cursor(self._root.workflow_id, self._position)
        members = self._members.items()
        children = {one: member.position for one, member in members if one != self._root.workflow_id}
        return Cursor(self._root.workflow_id, self._position, children)

    @property
    def caught_up(self) -> bool:
        """Whether everything that is known of is delivered."""
        return not (self._queue or self._subscription.behind or self._subscription.packs)

    @property
    def over(self) -> bool:
        """Whether every run of the view has ended and is complete: nothing follows."""
        return not self._members

    @property
    def way_out(self) -> str:
        """What is left to a watcher who wants what is no longer kept."""
        if self._include_children:
            return "watch from now on, or the runs one by one"
        return "watch again after {last_removed}"

    def begin(self, root: Head, position: int, children: Sequence[tuple[Head, int]] = ()) -> bool:
        """Places the view; returns whether it has caught up with what was known of its runs.

        Args:
            root: The watched run as it is.
            position: The last event of it that was delivered.
            children: The members below it, each with the last event that was delivered.
        """
        self._position = position
        places = [*children, (root, position)]  # in this order: what has ended is complete before its parent goes on
        for head, at in places:
            member = self._join(head, at)
            if member is not None:
                self._enqueue(member)
        return all(at >= head.last_sequence for head, at in places)

    async def next(self, heartbeat_s: float) -> Piece | None:
        """Returns what comes next; None when nothing came for so long.

        Raises:
            CursorOutOfRange: What follows is no longer kept.
            LookupError: An event that must be there is not; the log of this server tells more.
            RunNotFound: The watched run was deleted.
            ViewTooLarge: More children are active than one view can carry (by the cursor's encoding).
        """
        deadline = time.monotonic() + heartbeat_s
        while True:
            self._subscription.changed.clear()
            self._collect()
            if self._queue:
                piece = await self._advance(self._queue[0])
                if piece is not None:
                    return piece
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                async with asyncio.timeout(left):
                    await self._subscription.changed.wait()
            except TimeoutError:
                return None

    # ---- who is served -----------------------------------------------------------------------------------------------

    def _join(self, head: Head, position: int) -> _Member | None:
        """Adds a run to the view, unless it is complete already."""
        workflow_id = head.key.workflow_id
        self._joined.add(workflow_id)
        if head.ended and position >= head.last_sequence:
            self._tailer.leave(self._subscription, workflow_id)
            return None
        member = self._members[workflow_id] = _Member(head, position, position)
        self._tailer.join(self._subscription, workflow_id)
        return member

    def _leave(self, member: _Member) -> None:
        self._dequeue(member)
        del self._members[member.key.workflow_id]
        self._tailer.leave(self._subscription, member.key.workflow_id)

    def _enqueue(self, member: _Member, *, first: bool = False) -> None:
        member.queued = True
        if first:
            self._queue.appendleft(member)
        else:
            self._queue.append(member)

    def _dequeue(self, member: _Member) -> None:
        if member.queued:
            self._queue.remove(member)
            member.queued = False

    def _collect(self) -> None:
        """Puts into the queue whoever is behind, and, when nobody waits there, whoever has got something."""
        subscription = self._subscription
        for workflow_id in subscription.behind:
            if not self._members[workflow_id].queued:
                self._enqueue(self._members[workflow_id])
        while subscription.packs and not self._queue:
            pack = subscription.packs.popleft()
            member = self._members.get(pack.workflow_id)
            fresh = [event for event in pack.events if member and event.sequence > member.position]
            if member is None or not fresh:
                continue
            if fresh[0].sequence != member.position + 1:
                subscription.behind.add(pack.workflow_id)
            else:
                member.pieces.extend(self._cut(fresh))
            self._enqueue(member)

    # ---- what is delivered -------------------------------------------------------------------------------------------

    async def _advance(self, member: _Member) -> Piece | None:
        """Takes one step with the first of the queue; returns what there is to deliver."""
        workflow_id = member.key.workflow_id
        if not member.pieces:
            if workflow_id in self._subscription.behind:
                member.pieces.extend(self._cut(await self._read_log(member)))
            if not member.pieces:
                return await self._at_the_end(member)
        events = member.pieces.popleft()
        member.position = events[-1].sequence
        if workflow_id == self._root.workflow_id:
            self._position = member.position
        if not member.pieces:
            await self._after_page(member, ended=events[-1].ends_run)
        if self._include_children and events[-1].kind is EventKind.CHILD_STARTED:
            await self._child_started(member, events[-1])
        return Piece(member.key, events)

    def _cut(self, events: Sequence[Event]) -> list[list[Event]]:
        """Returns events in pieces; the start of a child is one of its own."""
        if not events:
            return []
        if not self._include_children:
            return in_pieces(events, MAX_BATCH_CHARS, MAX_EVENTS_PER_BATCH)
        groups: list[list[Event]] = [[]]
        for event in events:
            if event.kind is EventKind.CHILD_STARTED:
                groups += [[event], []]
            else:
                groups[-1].append(event)
        return [piece for group in groups if group for piece in in_pieces(group, MAX_BATCH_CHARS, MAX_EVENTS_PER_BATCH)]

    async def _after_page(self, member: _Member, *, ended: bool) -> None:
        """Lets a member whose page is delivered go on, leave, or queue up behind the others."""
        complete = member.head.ended and member.position >= member.head.last_sequence
        if complete or (ended and await self._is_over(member)):
            self._leave(member)
        elif member.key.workflow_id not in self._subscription.behind:
            self._dequeue(member)
        elif member.position >= member.head.last_sequence:
            self._queue.rotate(-1)  # it is the first

    async def _at_the_end(self, member: _Member) -> Piece | None:
        """Lets a member whose log has been read to its end wait, or leave."""
        self._dequeue(member)
        self._tailer.caught_up(self._subscription, member.key.workflow_id, member.position)
        if await self._is_over(member, deleted_root_is_an_error=True):
            self._leave(member)
        return Piece(self._root, []) if self.over or self.caught_up else None

    async def _is_over(self, member: _Member, *, deleted_root_is_an_error: bool = False) -> bool:
        """Returns whether nothing follows: a run has ended where its log was read (its end may be revived), or is gone.

        Raises:
            RunNotFound: It is the watched run, and was deleted before its end was seen.
        """
        workflow_id = member.key.workflow_id
        head = (await self._heads([workflow_id])).get(workflow_id)
        if head is not None:
            return head.ended and head.last_sequence <= member.position
        if deleted_root_is_an_error and workflow_id == self._root.workflow_id:
            raise RunNotFound(f"run {self._root.run_id!r} was deleted")
        return True

    async def _heads(self, workflow_ids: Sequence[str]) -> dict[str, Head]:
        return await self._read("runs.heads", lambda conn: run_heads.heads(conn, self._root.namespace, workflow_ids))

    async def _read_log(self, member: _Member) -> list[Event]:
        """Returns the next events of a member; none at the end of its log.

        Raises:
            CursorOutOfRange: They are no longer kept.
            LookupError: They should be there.
        """
        workflow_id, position = member.key.workflow_id, member.position
        events = await self._read("events.read", lambda conn: event_log.read(conn, workflow_id, position))
        if events and events[0].sequence != position + 1:
            await refuse_truncated(self._read, member.key, position, self.way_out)
            log.error("watch.hole", workflow_id=workflow_id, after=position, found=events[0].sequence)
            raise LookupError(f"{workflow_id} has no event {position + 1}")
        return events

    # ---- children ----------------------------------------------------------------------------------------------------

    async def _child_started(self, parent: _Member, event: Event) -> None:
        """Joins the child that an event tells of, before everything else that waits.

        A run is joined by its own parent only, and once: an agent may start the same workflow id twice, or one that
        another run had started.
        """
        run_id = str(event.data.get("child_run_id", ""))
        namespace = self._root.namespace
        ids = {RunKey.of_api(namespace, run_id).workflow_id, RunKey.foreign(namespace, run_id).workflow_id}
        heads = [
            head
            for head in (await self._heads(sorted(ids))).values()
            if head.parent_workflow_id == parent.key.workflow_id and head.key.run_id == run_id
        ]
        for head in heads:
            known = head.key.workflow_id in self._joined or await self._joined_before(parent, event, run_id)
            member = None if known else self._join(head, 0)
            if member is not None:
                self._enqueue(member, first=True)

    async def _joined_before(self, parent: _Member, event: Event, run_id: str) -> bool:
        """Returns whether the stream that this one continues had joined a child."""
        if parent.resumed_at == 0 or run_id == f"{parent.key.run_id}.{event.step_id}":
            return False  # the engine's own ids have the number of the step that started them
        if parent.started is None:
            parent.started = await self._started_until(parent.key.workflow_id, parent.resumed_at)
        return run_id in parent.started

    async def _started_until(self, workflow_id: str, last: int) -> frozenset[str]:
        """Returns the children that a run's log tells of up to an event."""
        found: set[str] = set()
        after = 0
        while after < last:
            events = await self._read(
                "events.read", partial(event_log.read, workflow_id=workflow_id, after_sequence=after)
            )
            if not events:
                break
            after = events[-1].sequence
            started = (e for e in events if e.kind is EventKind.CHILD_STARTED and e.sequence <= last)
            found.update(str(event.data.get("child_run_id", "")) for event in started)
        return frozenset(found)


async def refuse_truncated(read: Read, key: RunKey, position: int, way_out: str = "go on after {last_removed}") -> None:
    """Raises CursorOutOfRange when what follows a position in a run's log is no longer kept.

    Args:
        read: Reads the database.
        key: The run.
        position: The last event that was delivered of it.
        way_out: What the message tells the caller to do; `{last_removed}` is the last event that is gone.
    """
    earliest = await read("events.earliest", partial(event_log.earliest_sequence, workflow_id=key.workflow_id))
    if position + 1 < earliest:
        raise CursorOutOfRange(
            f"events of {key.run_id} before {earliest} are no longer kept; "
            + way_out.format(last_removed=earliest - 1),
            earliest_sequence=str(earliest),
            run_id=key.run_id,
        )
