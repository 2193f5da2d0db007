"""Hints between servers: what one has committed, the others are told of, so that they look at once and not in a while.

A hint never carries truth: it says where to look, and whoever looks reads what is committed. So a hint that is lost
costs a delay (everything that hints wake also looks by itself, slowly), one that comes twice a look, and one that comes
early nothing.

**PostgreSQL: NOTIFY beside the commits, not in them.** A transaction that notifies holds a lock of the whole server
from before its commit record is flushed until it is over, so commits that notify follow one another instead of sharing
a flush. So what was committed is told by one thread on a connection of its own, all that has gathered at once: its
transactions write nothing, so they flush nothing. A process that dies between the two has told nobody; the others' slow
looks find it.

The same connection listens. It hears itself, too: every server says from time to time that it is there, and one that
does not hear its own voice knows that its connection is half open, and makes a new one. It also tells who else listens.
Who has been listening for a while and has heard nobody else notifies nobody; who does not know notifies.

After each connection to the database everything may have changed unheard, so the first hint is that everything has.
"""

from __future__ import annotations

import json
import math
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import psycopg
import structlog

from perdure_service.store.dbos_tables import NOTIFICATION_CHANNELS
from perdure_service.store.silence import SilenceWatch, process_watch
from perdure_service.store.sqlstates import JITTER

CHANNEL = "perdure_hints"

MAX_PAYLOAD_BYTES = 7_900
"""PostgreSQL refuses 8,000 and more. https://www.postgresql.org/docs/current/sql-notify.html"""

MAX_RUNS = 20_000
"""Runs that wait to be told of at most; beyond that everything is said to have changed."""

PAUSE_S = 0.005
"""Between two notifications, in which more gathers: at most 200 a second, and the first one at once."""

VOICE_S = 5.0
"""How often a server says that it is there."""

DEAF_VOICES = 3
"""How many times as long it may not hear itself before its connection counts as broken; and others are remembered."""

ANSWER_S = 5.0
"""How long the database may take to answer a notification before the connection is ended."""

FIRST_RETRY_S, LAST_RETRY_S = 0.2, 10.0
"""Pauses between attempts to connect, doubled each time."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Hint:
    """Where to look.

    Attributes:
        runs: The workflow ids of runs that have news.
        ended: Those that have ended; any of `runs` may have, if whoever tells does not know.
        queues: Queues in which something waits, or a place became free.
        approvals: Whether an approval was asked, decided or withdrawn.
        messages: Whether a message came for some run, nobody knows which.
        wakes: What DBOS's own waits are woken by: a channel of DBOS's and the name of the wait in it.
        everything: Whether anything may have changed.
    """

    runs: frozenset[str] = frozenset()
    ended: frozenset[str] = frozenset()
    queues: frozenset[str] = frozenset()
    approvals: bool = False
    messages: bool = False
    wakes: frozenset[tuple[str, str]] = frozenset()
    everything: bool = False

    def __or__(self, other: Hint) -> Hint:
        """Returns a hint at both."""
        return Hint(
            self.runs | other.runs,
            self.ended | other.ended,
            self.queues | other.queues,
            self.approvals or other.approvals,
            self.messages or other.messages,
            self.wakes | other.wakes,
            self.everything or other.everything,
        )

    @property
    def bounded(self) -> Hint:
        """This one, or one at everything if it has become too long."""
        too_long = len(self.runs) + len(self.ended) > MAX_RUNS
        return Hint(queues=self.queues, approvals=True, messages=True, everything=True) if too_long else self


NOTHING = Hint()
EVERYTHING = Hint(everything=True)

Heard = Callable[[Hint], None]


class Feed(Protocol):
    """Where hints of other servers come from."""

    @property
    def arrives(self) -> bool:
        """Whether hints are known to arrive: then what they wake needs to look by itself only seldom."""
        ...

    @property
    def tells_all(self) -> bool:
        """Whether it tells of queues, too, and of each run whether it has ended."""
        ...

    def start(self) -> None:
        """Begins to listen."""
        ...

    def stop(self) -> None:
        """Ends."""
        ...

    @property
    def alone(self) -> bool:
        """Whether nobody hears what is sent, as far as is known: then it need not be."""
        ...

    def send(self, hint: Hint) -> None:
        """Tells the other servers, if it is by this that they hear; from any thread, and returns at once."""
        ...


# ---- what is sent ----------------------------------------------------------------------------------------------------


def encode(sender: str, hint: Hint) -> list[str]:
    """Returns a hint as payloads of NOTIFY, each short enough: JSON in ASCII. Without a hint, a sign of life.

    An id that is too long for any payload is left out; who waits for it finds out by looking.
    """
    flags = {"a": 1} if hint.approvals else {}
    whole = {"*": 1} if hint.everything else {}
    names = [
        (key, name)
        for key, kind in (("r", hint.runs - hint.ended), ("e", hint.ended), ("q", hint.queues))
        for name in sorted(kind)
    ]
    payloads: list[str] = []
    message: dict[str, Any] = {"f": sender, **flags, **whole}
    size = len(json.dumps(message))
    empty = size
    for key, name in names:
        more = len(json.dumps(name)) + 8
        if size + more > MAX_PAYLOAD_BYTES:
            if empty + more > MAX_PAYLOAD_BYTES:
                continue
            payloads.append(json.dumps(message, separators=(",", ":")))
            message, size = {"f": sender}, empty
        message.setdefault(key, []).append(name)
        size += more
    return [*payloads, json.dumps(message, separators=(",", ":"))]


def decode(payload: str) -> tuple[str, Hint]:
    """Returns who sent a payload, and the hint; of one that is not ours, nobody and nothing."""
    try:
        message = json.loads(payload)
        ended = frozenset(map(str, message.get("e", ())))
        return str(message["f"]), Hint(
            runs=ended.union(map(str, message.get("r", ()))),
            ended=ended,
            queues=frozenset(map(str, message.get("q", ()))),
            approvals="a" in message,
            everything="*" in message,
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", NOTHING


# ---- PostgreSQL ------------------------------------------------------------------------------------------------------


class NotifyFeed:
    """LISTEN and NOTIFY on one connection, by one thread; see the module."""

    tells_all = True

    def __init__(
        self,
        connect: Callable[[], psycopg.Connection],
        sender: str,
        heard: Heard,
        watch: SilenceWatch | None = None,
        voice_s: float = VOICE_S,
    ) -> None:
        """Creates it.

        Args:
            connect: Makes a connection in autocommit mode; blocks.
            sender: Who tells: this executor's id.
            heard: Told of each hint, from the feed's thread.
            watch: Ends the connection when the database does not answer; by default the process's own.
            voice_s: How often it says that it is there, as everybody does.
        """
        self._voice_s = voice_s
        self._deaf_s = DEAF_VOICES * voice_s
        self._connect = connect
        self._sender = sender
        self._heard = heard
        self._watch = watch or process_watch()
        self._lock = threading.Lock()
        self._pending = NOTHING
        self._stop = threading.Event()
        self._wake_reader = self._wake_writer = -1
        self._listening_since: float | None = None
        self._heard_myself = self._heard_others = -math.inf
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)

    @property
    def arrives(self) -> bool:
        """Whether it is connected, and has heard itself lately."""
        return self._listening_since is not None and time.monotonic() - self._heard_myself < self._deaf_s

    @property
    def alone(self) -> bool:
        """Whether nobody else listens, as far as is known: it has listened for a while, and heard itself only."""
        now = time.monotonic()
        since = self._listening_since
        return self.arrives and since is not None and min(now - since, now - self._heard_others) > self._deaf_s

    def start(self) -> None:
        """Begins to listen."""
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._thread.start()

    def stop(self) -> None:
        """Tells what is to be told, and ends."""
        self._stop.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def send(self, hint: Hint) -> None:
        """Tells the others, if there are any."""
        if self.alone:
            return
        with self._lock:
            quiet = self._pending == NOTHING
            self._pending = (self._pending | hint).bounded
        if quiet:
            self._wake()

    def _wake(self) -> None:
        with self._lock, suppress(BlockingIOError):  # it is awake
            if self._wake_writer >= 0:
                os.write(self._wake_writer, b"x")

    def _run(self) -> None:
        pause_s = FIRST_RETRY_S
        while not self._stop.is_set():
            try:
                with self._connect() as conn:
                    self._listen(conn)
                    pause_s = FIRST_RETRY_S
                    self._keep_listening(conn)
            except Exception as error:  # noqa: BLE001 - logged; it connects again
                log.warning("hints.connection_lost", error=type(error).__name__)
            was_listening, self._listening_since = self._listening_since is not None, None
            if was_listening and not self._stop.is_set():
                self._heard(EVERYTHING)  # whoever waits must look by himself again
            # Not on the pipe: what is to be sent meanwhile stays in it, and would end every pause at once.
            self._stop.wait(pause_s * JITTER.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, LAST_RETRY_S)
        with self._lock:
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            self._wake_writer = -1

    def _listen(self, conn: psycopg.Connection) -> None:
        for channel in (CHANNEL, *NOTIFICATION_CHANNELS):
            conn.execute(f"LISTEN {channel}")
        self._listening_since = time.monotonic()
        self._notify(conn, encode(self._sender, NOTHING))
        self._heard(EVERYTHING)

    def _keep_listening(self, conn: psycopg.Connection) -> None:
        since = time.monotonic()
        next_voice = since + self._voice_s * JITTER.uniform(0.5, 1)
        next_send = 0.0
        while True:
            now = time.monotonic()
            if not self.arrives and now - since > self._deaf_s:
                raise TimeoutError("the database does not send what it was told to send")
            waiting = self._pending != NOTHING
            if waiting and (now >= next_send or self._stop.is_set()):
                self._send_pending(conn)
                next_send, next_voice = time.monotonic() + PAUSE_S, time.monotonic() + self._voice_s
            elif now >= next_voice:
                self._notify(conn, encode(self._sender, NOTHING))
                next_voice = now + self._voice_s
            elif self._stop.is_set():
                return
            wait_s = max(0.0, min(next_send, next_voice) - now) if waiting else max(0.0, next_voice - now)
            # What came with the answer to a notification is not in the socket any more.
            hints = list(self._received(conn))
            if hints:
                self._tell(hints)
                continue
            watched = [conn.fileno()] if waiting else [conn.fileno(), self._wake_reader]
            readable = select.select(watched, [], [], wait_s)[0]
            if self._wake_reader in readable:
                os.read(self._wake_reader, 4096)

    def _send_pending(self, conn: psycopg.Connection) -> None:
        with self._lock:
            hint, self._pending = self._pending, NOTHING
        try:
            self._notify(conn, encode(self._sender, hint))
        except BaseException:
            with self._lock:
                self._pending = (self._pending | hint).bounded  # for the next connection
            raise

    def _notify(self, conn: psycopg.Connection, payloads: Sequence[str]) -> None:
        def notify(conn: psycopg.Connection) -> None:
            conn.execute("SELECT pg_notify(%s, told) FROM unnest(%s::text[]) AS told", (CHANNEL, list(payloads)))

        self._watch.watched(notify, min(ANSWER_S, self._deaf_s))(conn)

    def _received(self, conn: psycopg.Connection) -> Iterator[Hint]:
        for notice in conn.notifies(timeout=0):
            if notice.channel != CHANNEL:
                yield Hint(wakes=frozenset({(notice.channel, notice.payload)}))
                continue
            sender, hint = decode(notice.payload)
            if sender == self._sender:
                self._heard_myself = time.monotonic()
            elif sender:
                self._heard_others = time.monotonic()
                yield hint

    def _tell(self, hints: Sequence[Hint]) -> None:
        told = NOTHING
        for hint in hints:
            told |= hint
        if told != NOTHING:
            self._heard(told)
