"""Decides whom news wakes: what was committed here, and what other servers tell of.

A commit of this process hands its events to the watchers here as they are, and tells the other servers where to look.
What they tell of is looked at here: by the tailer for who watches, by the inbox, the queues' threads, the waits of
agents' code, and by `owners`, when a run that is executed here was changed by somebody else.

Nothing depends on a hint: each of these also looks by itself, every now and then while hints arrive, and as often as
without any when they do not (`arrives`). When the feed breaks, and when it is back, everything looks once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa

from perdure_service.domain.events import EventKind, Pack
from perdure_service.store.changefeed import Changefeed
from perdure_service.store.engine import dedicated_connection, is_cockroach
from perdure_service.store.hints import EVERYTHING, Feed, Heard, Hint, NotifyFeed
from perdure_service.store.tailer import Tailer

OF_APPROVALS = frozenset({EventKind.APPROVAL_REQUESTED, EventKind.APPROVAL_DECIDED})
OF_WAITS = frozenset({EventKind.SIGNAL_RECEIVED, EventKind.APPROVAL_DECIDED, EventKind.PUBLISHED})
"""Events that come with what agents' code may wait for."""

ANY_QUEUE = frozenset({"*"})
"""Names all queues: no queue can be called so."""

Ids = Collection[str] | None
"""Workflow ids; None for all."""


def feed_of(engine: sa.Engine, executor_id: str, heard: Heard) -> Feed:
    """Returns the feed that an engine's kind of database offers."""
    if is_cockroach(engine):
        return Changefeed(lambda: dedicated_connection(engine), heard)
    return NotifyFeed(lambda: dedicated_connection(engine), executor_id, heard)


class Hints:
    """See the module. Thread-safe.

    Attributes:
        ring: Makes this process look into queues in which others have changed something; None for all.
        ring_own: Makes it look into all of its queues now.
        owner_changed: Told of runs that others have changed.
        look_for: Told of runs for whose waits here something may have come.
        ended: Told of runs that have ended.
        wake: Wakes a wait of DBOS's by its channel and name.
    """

    def __init__(self, make_feed: Callable[[Heard], Feed]) -> None:
        """Creates it; `start` begins to listen.

        Args:
            make_feed: Makes the feed, given whom it tells.
        """
        self._feed = make_feed(self.heard)
        self._tailer: Tailer | None = None
        self._wake_inbox: Callable[[], None] = lambda: None
        self.ring: Callable[[Collection[str] | None], None] = lambda _queues: None
        self.ring_own: Callable[[], None] = lambda: None
        self.owner_changed: Callable[[Ids], None] = lambda _ids: None
        self.look_for: Callable[[Ids], None] = lambda _ids: None
        self.ended: Callable[[Ids], None] = lambda _ids: None
        self.wake: Callable[[str, str], None] = lambda _channel, _name: None

    def attach(self, tailer: Tailer, wake_inbox: Callable[[], None]) -> None:
        """Sets who feeds the watchers of runs and of approvals."""
        self._tailer, self._wake_inbox = tailer, wake_inbox

    def start(self) -> None:
        """Begins to listen to the other servers."""
        self._feed.start()

    def stop(self) -> None:
        """Ends."""
        self._feed.stop()

    @property
    def arrives(self) -> bool:
        """Whether the other servers' hints are known to arrive."""
        return self._feed.arrives

    @property
    def tells_queues(self) -> bool:
        """Whether what others queue is among them."""
        return self._feed.arrives and self._feed.tells_all

    # ---- what happens here -------------------------------------------------------------------------------------------

    def committed(self, packs: Sequence[Pack]) -> None:
        """Is told what this process has committed, each run's packs in the order of its log."""
        if self._tailer is not None:
            self._tailer.committed(packs)
        ended: set[str] = set()
        came: set[str] = set()
        approvals = False
        for pack in packs:
            for event in pack.events:
                if event.kind in OF_APPROVALS:
                    approvals = True
                if event.kind in OF_WAITS:
                    came.add(pack.workflow_id)
            if pack.events[-1].ends_run:
                ended.add(pack.workflow_id)
        if approvals:
            self._wake_inbox()
        if ended:
            if self._tailer is not None:
                self._tailer.ended(ended)
            self.ended(ended)
        if came:
            self.look_for(came)
        if not self._feed.alone:  # `send` asks, too; but this one would be made for every commit
            runs = frozenset(pack.workflow_id for pack in packs)
            self._feed.send(Hint(runs=runs, ended=frozenset(ended), approvals=approvals))

    def hint(self, workflow_ids: Sequence[str]) -> None:
        """Is told of runs that this process has changed by other means."""
        if not workflow_ids:
            return
        if self._tailer is not None:
            self._tailer.hint(workflow_ids)
        self._feed.send(Hint(runs=frozenset(workflow_ids)))

    def announce(self, queue: str) -> None:
        """Tells the others that something was queued, or that a place became free that servers share."""
        self._feed.send(Hint(queues=frozenset({queue})))

    def given_back(self, workflow_ids: Sequence[str]) -> None:
        """Is told of runs that this process has put back into their queues."""
        if workflow_ids:
            self.hint(workflow_ids)
            self.poke()

    def poke(self) -> None:
        """Is told that something was queued, nobody knows where."""
        self.ring_own()
        self._feed.send(Hint(queues=ANY_QUEUE))

    # ---- what others tell --------------------------------------------------------------------------------------------

    def heard(self, hint: Hint) -> None:
        """Wakes whoever a hint of the feed is for."""
        if hint.everything:
            hint = EVERYTHING
        if self._tailer is not None:
            if hint.everything:
                self._tailer.hint_all()
            elif hint.runs:
                self._tailer.hint(hint.runs)
        if hint.everything or hint.approvals:
            self._wake_inbox()
        if hint.everything or hint.queues:
            self.ring(None if hint.everything or hint.queues >= ANY_QUEUE else hint.queues)
        runs = None if hint.everything else hint.runs
        if runs is None or runs:
            self.owner_changed(runs)
            self.ended(runs if runs is None or not self._feed.tells_all else hint.ended)
        if hint.everything or hint.messages:
            self.look_for(None)
        for channel, name in hint.wakes:
            self.wake(channel, name)
