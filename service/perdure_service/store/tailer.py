"""The tailer: hands the news of watched runs to whoever watches, from this process's commits or by one query for all.

What this process has committed is handed on as it is: a pack that follows what was seen of its run is the truth, and
nobody has to read it. Anything else is a *hint*: it says that a run has news, and never carries them, so they are read.
Hints come from other processes (`store.hints`); whatever is watched is also looked at every `poll_s`, all of it in one
query, and less often while hints are known to arrive. So a missed hint costs a delay and nothing else, and ten thousand
idle watchers, of one run or of many, cost that one query.

**Dense and in order, whatever comes when.** A feed knows how far it has handed a run on. A pack is handed on only if it
begins with the next event, whether it was committed here or read; one that begins later makes the run be read, one that
begins earlier was handed on before. All of it happens on one loop, so no two can do it at once.

A subscription is one watcher's place in any number of runs, with one bounded mailbox. When it overflows, or meets a
pack which does not follow the last, the runs concerned are `behind`: the watcher reads their logs itself, at its own
pace, and then goes on with the mailbox. So a slow reader delays nobody and loses nothing.

Who only waits for the end of a run gets no packs, and causes no reads of them: it is told of ends that this process
commits; for those of others, one query tells which of the runs that were hinted at, or are looked at, have ended.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import structlog

from perdure_service.domain.events import Pack, decode_events, encode_events
from perdure_service.store.event_log import NEWS_PACKS, News
from perdure_service.telemetry.metrics import EVENT_LAG, METERS

MAILBOX_PACKS = 64
"""Packs that wait for a watcher at most; one that falls further behind reads the log itself."""

HINTED_POLL_FACTOR = 5
"""How much less often everything is looked at while hints are known to arrive: then it is only what foreign clients
and lost hints wait for."""

READ_RUNS = 10_000
"""Runs that one query looks at."""

ERROR_BACKOFF_S = 1.0
"""How long to wait after a failed read, so that a database that is away is not hammered."""

log = structlog.get_logger()


class Subscription:
    """One watcher's place in the runs it watches. Used on the tailer's loop only."""

    def __init__(self) -> None:
        self.behind: set[str] = set()
        """The runs whose log the watcher must read before it goes on with their packs in the mailbox."""
        self.packs: deque[News] = deque()
        self.changed = asyncio.Event()
        self.workflow_ids: set[str] = set()

    def deliver(self, pack: News) -> None:
        """Puts a pack into the mailbox."""
        if pack.workflow_id in self.behind:
            return
        if len(self.packs) >= MAILBOX_PACKS:
            self.behind |= self.workflow_ids & {waiting.workflow_id for waiting in (*self.packs, pack)}
            self.packs.clear()
        else:
            self.packs.append(pack)
        self.changed.set()

    def read_log(self, workflow_id: str) -> None:
        """Says that a run's log should be read."""
        self.behind.add(workflow_id)
        self.changed.set()

    def forget(self) -> None:
        """Empties the mailbox, for a watcher that is about to read everything anyway."""
        self.changed.clear()
        self.packs.clear()
        self.behind.clear()


class EndWait:
    """A wait for the end of a run. Used on the tailer's loop only.

    Attributes:
        workflow_id: The run.
        changed: Set when the run may have ended, or is gone.
    """

    __slots__ = ("changed", "told", "workflow_id")

    def __init__(self, workflow_id: str, told: Callable[[], bool]) -> None:
        self.workflow_id = workflow_id
        self.told = told
        self.changed = asyncio.Event()


class _Feed:
    """What is known of one watched run."""

    __slots__ = ("position", "subscriptions")

    def __init__(self) -> None:
        self.subscriptions: set[Subscription] = set()
        self.position = 0


class Tailer:
    """See the module. Runs on one asyncio loop; `hint` and `committed` may be called from any thread."""

    def __init__(
        self,
        read_news: Callable[[Mapping[str, int]], Sequence[News]],
        close_ended: Callable[[Sequence[str]], Sequence[str]],
        read_closed: Callable[[Sequence[str]], Sequence[str]] = lambda workflow_ids: workflow_ids,
        *,
        poll_s: float,
        hinted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Creates the tailer.

        Args:
            read_news: Returns the packs after the given position of each run; blocks.
            close_ended: Ends the logs of those runs that ended without a terminal event, and returns those that have
                been deleted; blocks.
            read_closed: Returns those of these runs that have ended, or may have; blocks.
            poll_s: How often everything watched is looked at, unless hints arrive.
            hinted: Whether hints of other processes are known to arrive.
        """
        self._hints_arrive = hinted
        self._read_news = read_news
        self._close_ended = close_ended
        self._read_closed = read_closed
        self._poll_s = poll_s
        self._feeds: dict[str, _Feed] = {}
        self._end_waits: dict[str, set[EndWait]] = {}
        self._ended: set[str] = set()
        self._hinted: set[str] = set()
        self._committed: list[Pack] = []
        self._lock = threading.Lock()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="tailer")

    async def stop(self) -> None:
        """Stops; subscriptions get nothing more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def hint(self, workflow_ids: Iterable[str]) -> None:
        """Says that these runs may have news. From any thread, after the commit."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        with self._lock:
            watched = [one for one in workflow_ids if one in self._feeds or self._must_look(one)]
            if not watched:
                return
            quiet = not self._hinted
            self._hinted.update(watched)
        if quiet:
            loop.call_soon_threadsafe(self._wake.set)

    def _must_look(self, workflow_id: str) -> bool:
        """Returns whether somebody waits for the end of a run who would not be told of it."""
        return any(not one.told() for one in self._end_waits.get(workflow_id, ()))

    def hint_all(self) -> None:
        """Says that everything watched may have news: hints may have been lost. From any thread."""
        with self._lock:
            watched = [*self._feeds, *self._end_waits]
        self.hint(watched)

    def ended(self, workflow_ids: Iterable[str]) -> None:
        """Says that a commit of this process has ended these runs. From any thread, after the commit."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        with self._lock:
            waited_for = [one for one in workflow_ids if one in self._end_waits]
            if not waited_for:
                return
            quiet = not self._ended
            self._ended.update(waited_for)
        if quiet:
            loop.call_soon_threadsafe(self._tell_ended)

    def committed(self, packs: Iterable[Pack]) -> None:
        """Hands on what this process has just committed; from any thread, many packs of many runs at once.

        Of a run that nobody watches here nothing is kept. One callback of the loop for all that come together.
        """
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        with self._lock:
            watched = [pack for pack in packs if pack.workflow_id in self._feeds]
            if not watched:
                return
            quiet = not self._committed
            self._committed += watched
        if quiet:
            loop.call_soon_threadsafe(self._hand_on_committed)

    @property
    def watchers(self) -> int:
        """How many subscriptions and waits there are."""
        with self._lock:
            subscriptions = {one for feed in self._feeds.values() for one in feed.subscriptions}
            return len(subscriptions) + sum(map(len, self._end_waits.values()))

    def await_end(self, workflow_id: str, told: Callable[[], bool] = lambda: False) -> EndWait:
        """Registers who waits for a run's end and wants nothing else of it. Register, then look, then wait.

        Args:
            workflow_id: The run.
            told: Whether its end will come through `ended`, so that other news need no look; from any thread.
        """
        wait = EndWait(workflow_id, told)
        with self._lock:
            self._end_waits.setdefault(workflow_id, set()).add(wait)
        return wait

    def leave_end(self, wait: EndWait) -> None:
        """Ends a wait's registration."""
        with self._lock:
            waits = self._end_waits.get(wait.workflow_id)
            if waits is None:
                return
            waits.discard(wait)
            if not waits:
                del self._end_waits[wait.workflow_id]

    def subscribe(self, *workflow_ids: str) -> Subscription:
        """Registers a watcher; it reads the logs first, then waits. Register, then read, then wait: no gap."""
        subscription = Subscription()
        for workflow_id in workflow_ids:
            self.join(subscription, workflow_id)
        return subscription

    def join(self, subscription: Subscription, workflow_id: str) -> None:
        """Adds a run to what a watcher watches; it is behind in it."""
        with self._lock:
            self._feeds.setdefault(workflow_id, _Feed()).subscriptions.add(subscription)
        subscription.workflow_ids.add(workflow_id)
        subscription.read_log(workflow_id)

    def leave(self, subscription: Subscription, workflow_id: str) -> None:
        """Takes a run from what a watcher watches; packs of it may still lie in the mailbox."""
        subscription.workflow_ids.discard(workflow_id)
        subscription.behind.discard(workflow_id)
        with self._lock:
            feed = self._feeds.get(workflow_id)
            if feed is None:
                return
            feed.subscriptions.discard(subscription)
            if not feed.subscriptions:
                del self._feeds[workflow_id]

    def unsubscribe(self, subscription: Subscription) -> None:
        """Ends a watcher's registration."""
        for workflow_id in tuple(subscription.workflow_ids):
            self.leave(subscription, workflow_id)

    def caught_up(self, subscription: Subscription, workflow_id: str, position: int) -> None:
        """Says that a watcher has read a run's log up to `position` and goes on with its mailbox.

        Packs of the run that lie there from before are older than `position`, or do not follow it; the watcher looks.
        """
        feed = self._feeds[workflow_id]
        if feed.position > position:
            # The feed went past while this watcher read: what it got in between went to others only.
            subscription.read_log(workflow_id)
            return
        subscription.behind.discard(workflow_id)
        # A feed that lies back does so for others, who have not got what comes between; this watcher drops it.
        feed.position = feed.position or position
        # What was committed since the watcher's last read may have been hinted at before this feed had a position.
        self.hint([workflow_id])

    def _hand_on_committed(self) -> None:
        with self._lock:
            packs, self._committed = self._committed, []
        for pack in packs:
            feed, first = self._feeds.get(pack.workflow_id), pack.first_sequence or 0
            if feed is None or not feed.position or first <= feed.position:
                continue  # without a position its watchers are about to read the log
            if first != feed.position + 1:
                self.hint([pack.workflow_id])  # what comes before was committed elsewhere, or is on its way here
                continue
            # Through the log's own form, so that who is handed it sees what a reader of the log sees.
            events = tuple(decode_events(encode_events(pack.events), first))
            self._hand_on(feed, News(pack.workflow_id, first, events))

    @staticmethod
    def _hand_on(feed: _Feed, pack: News) -> None:
        feed.position = pack.first_sequence + len(pack.events) - 1
        METERS.record(EVENT_LAG, time.time() - pack.events[-1].time_ms / 1000, {})
        for subscription in feed.subscriptions:
            subscription.deliver(pack)

    @property
    def _interval_s(self) -> float:
        return self._poll_s * (HINTED_POLL_FACTOR if self._hints_arrive() else 1)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        last_poll = loop.time()
        while True:
            # Not wait_for, which in Python 3.11 loses a cancellation that comes together with what it waits for.
            with suppress(TimeoutError):
                async with asyncio.timeout_at(last_poll + self._interval_s):
                    await self._wake.wait()
            self._wake.clear()
            with self._lock:
                hinted, self._hinted = self._hinted, set()
                everything = loop.time() >= last_poll + self._interval_s
                all_ids = list(self._feeds) if everything else []
                awaited = [one for one in (self._end_waits if everything else hinted) if one in self._end_waits]
            if everything:
                last_poll = loop.time()
            try:
                await self._read(all_ids if everything else list(hinted))
                for page in _pages(awaited):
                    self._tell_awaited(await asyncio.to_thread(self._read_closed, page))
                for page in _pages([*all_ids, *(one for one in awaited if everything and one not in self._feeds)]):
                    gone = await asyncio.to_thread(self._close_ended, page)
                    for workflow_id in gone:
                        self._tell_to_read(workflow_id)
                    self._tell_awaited(gone)
            except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                log.warning("tailer.read_failed", error=type(error).__name__)
                await asyncio.sleep(ERROR_BACKOFF_S)
                with self._lock:
                    self._hinted |= hinted.union(all_ids, awaited)
                self._wake.set()

    async def _read(self, workflow_ids: Sequence[str]) -> None:
        """Hands on what is new of these runs, as far as it follows what was handed on."""
        for page in _pages(workflow_ids):
            full = True
            while full:
                chosen = {one: feed.position for one in page if (feed := self._feeds.get(one)) and feed.position}
                packs = await asyncio.to_thread(self._read_news, chosen) if chosen else ()
                moved = [self._read_pack(pack) for pack in packs]
                full = len(packs) >= NEWS_PACKS and any(moved)

    def _read_pack(self, pack: News) -> bool:
        """Hands a pack on that was read; returns whether it was news."""
        feed = self._feeds.get(pack.workflow_id)
        if feed is None or pack.first_sequence <= feed.position:
            return False
        if pack.first_sequence != feed.position + 1:
            # The first statement's order and the key forbid it; if it happens, readers of the log will see.
            log.error("tailer.hole", workflow_id=pack.workflow_id, after=feed.position, found=pack.first_sequence)
            self._tell_to_read(pack.workflow_id)
            return False
        self._hand_on(feed, pack)
        return True

    def _tell_to_read(self, workflow_id: str) -> None:
        """Makes the watchers of a run read its log: there they see what is wrong with it, or that it is gone."""
        feed = self._feeds.get(workflow_id)
        for subscription in feed.subscriptions if feed else ():
            subscription.read_log(workflow_id)

    def _tell_ended(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, set()
        self._tell_awaited(ended)

    def _tell_awaited(self, workflow_ids: Iterable[str]) -> None:
        """Wakes who waits for the end of these runs."""
        for workflow_id in workflow_ids:
            for wait in self._end_waits.get(workflow_id, ()):
                wait.changed.set()


def _pages(workflow_ids: Sequence[str]) -> list[Sequence[str]]:
    return [workflow_ids[first : first + READ_RUNS] for first in range(0, len(workflow_ids), READ_RUNS)]
