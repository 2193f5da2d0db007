"""WatchRun's stream contract: a snapshot, everything after a cursor, then live until the run ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from perdure_service.domain.cursors import Cursor
from perdure_service.domain.events import Event, EventKind, of_kinds
from perdure_service.domain.runs import Run, RunKey
from perdure_service.durable.requests import WatchBatch
from perdure_service.durable.view import Read, View, refuse_truncated
from perdure_service.errors import InvalidArgument
from perdure_service.store import run_heads
from perdure_service.store.run_heads import Head
from perdure_service.store.tailer import Tailer


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
        include_children: bool = False,
        heartbeat_s: float = 15.0,
    ) -> AsyncIterator[WatchBatch]:
        """Yields a run's stream as WatchRun's contract says, heartbeats included, and ends with the run.

        With `include_children` it has the events of all descendants, too, and ends when the last of them has ended.
        """
        view, snapshot = await self._open(namespace, run_id, include_children=include_children)
        root = snapshot.key
        try:
            children: Sequence[tuple[Head, int]] = ()
            position = after_sequence
            if from_now and include_children:
                # The places of all at one moment; what comes before the snapshot is sent after it.
                heads = await self._read("runs.open_heads", lambda conn: run_heads.open_heads(conn, root))
                position = heads[root.workflow_id].last_sequence if root.workflow_id in heads else 0
                children = [(one, one.last_sequence) for one in heads.values() if one.key != root]
                snapshot = await self._get(namespace, run_id)
            if cursor is not None:
                place = Cursor.decode(cursor, root.workflow_id, include_children=include_children)
                position = place.sequence
                children = await self._children(root, place)
            elif from_now and not include_children:
                position = snapshot.last_sequence
            position = position or 0
            if not from_now:
                await self._check(snapshot, position, "after_sequence" if cursor is None else "cursor", view.way_out)

            def batch(key: RunKey, events: Sequence[Event], **flags: Any) -> WatchBatch:
                return WatchBatch(key, list(of_kinds(events, kinds)), view.cursor, end_of_run=view.over, **flags)

            ended = snapshot.state.terminal and snapshot.end_time is not None
            head = Head(root, None, snapshot.last_sequence, ended)
            caught_up = view.begin(head, position, children)
            yield batch(root, [], snapshot=snapshot, caught_up=caught_up)
            while not view.over:
                piece = await view.next(heartbeat_s)
                if piece is None:
                    yield batch(root, [], caught_up=True)
                else:
                    yield batch(piece.key, piece.events, caught_up=view.caught_up)
        finally:
            view.close()

    async def _open(self, namespace: str, run_id: str, *, include_children: bool) -> tuple[View, Run]:
        """Returns the view of a run, to be closed, and the run itself.

        Registered, then read, then waited for: what is committed after the read wakes us. The key follows from the id
        but for the workflow of a foreign client, of which only the read tells.
        """
        root = RunKey.of_api(namespace, run_id)
        while True:
            view = View(self._read, self._tailer, root, include_children=include_children)
            try:
                snapshot = await self._get(namespace, run_id)
            except BaseException:
                view.close()
                raise
            if snapshot.key == root:
                return view, snapshot
            view.close()
            root = snapshot.key

    async def _check(self, snapshot: Run, position: int, field: str, way_out: str) -> None:
        """Refuses a position in the watched run that is from the future, or of what is no longer kept.

        Raises:
            InvalidArgument: It is from the future.
            CursorOutOfRange: What follows it is no longer kept.
        """
        if position < 0:
            raise InvalidArgument(field, "must not be negative")
        if position > snapshot.last_sequence:
            raise InvalidArgument(field, f"is from the future: the run has {snapshot.last_sequence} events")
        await refuse_truncated(self._read, snapshot.key, position, way_out)

    async def _children(self, root: RunKey, place: Cursor) -> list[tuple[Head, int]]:
        """Returns the members below the root that a cursor tells of; those that were deleted are over.

        Raises:
            InvalidArgument: It is from the future of one.
        """
        positions = place.children or {}
        heads = await self._read("runs.heads", lambda conn: run_heads.heads(conn, root.namespace, list(positions)))
        for workflow_id, head in heads.items():
            if positions[workflow_id] > head.last_sequence:
                known = f"{head.key.run_id} has {head.last_sequence} events"
                raise InvalidArgument("cursor", f"is from the future: {known}")
        return [(head, positions[workflow_id]) for workflow_id, head in heads.items()]
