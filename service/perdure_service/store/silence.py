"""Ends connections whose peer says nothing any more: what the server's own timeouts and TCP's cannot notice.

`statement_timeout` is the server's: it helps when the server is slow, not when it is out of reach. `tcp_user_timeout`
and keepalives are the kernel's: they help when the other host is gone, not when something between us and the database
(a proxy, a balancer, a frozen process) still acknowledges what we send. A statement that gets no answer for longer than
the server would have let it run gets none any more, so the connection's socket is shut down. The driver finds a lost
connection, and whoever waits does what it does then.

What is watched is every wait of a statement, COMMIT, ROLLBACK and ping; connecting has a timeout of the driver.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
import structlog

WAITS = ("do_execute", "do_executemany", "do_execute_no_params", "do_commit", "do_rollback", "do_ping")
"""The methods of a dialect in which a thread waits for the server. The first argument is a cursor or a connection."""

MAX_GRACE_S = 5.0
"""How much longer than its statement timeout a statement may take: the way there and back."""

LOOK_EVERY_S = 0.5

log = structlog.get_logger(__name__)


class SilenceWatch:
    """Knows who waits for an answer and until when, and ends what has waited too long; from one thread a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[float, Any]] = {}
        self._anybody = threading.Event()
        self._thread: threading.Thread | None = None

    def watched(self, wait: Callable[..., Any], limit_s: float) -> Callable[..., Any]:
        """Returns a dialect's method that is watched while it waits.

        Args:
            wait: The method.
            limit_s: The longest that an answer may take, seconds.
        """

        @functools.wraps(wait)
        def watched(subject: Any, *arguments: Any, **rest: Any) -> Any:
            with self.waiting(_driver_connection(subject), limit_s):
                return wait(subject, *arguments, **rest)

        return watched

    @contextmanager
    def waiting(self, connection: Any, limit_s: float) -> Iterator[None]:
        """Surrounds this thread's wait for an answer; one at a time.

        Args:
            connection: The driver's.
            limit_s: As of `watched`.
        """
        key = threading.get_ident()
        self.begin(key, connection, limit_s)
        try:
            yield
        finally:
            self.finish(key)

    def begin(self, key: int, connection: Any, limit_s: float) -> None:
        """Begins a wait that is no thread's, under a key of its own; arguments as of `waiting`."""
        with self._lock:
            self._waiting[key] = time.monotonic() + limit_s, connection
            self._begin_to_look()

    def finish(self, key: int) -> None:
        """Ends it; the connection must not be closed before."""
        with self._lock:
            self._waiting.pop(key, None)

    @staticmethod
    def end(connection: Any) -> None:
        """Ends a connection at once, whoever waits for it."""
        with suppress(Exception):  # closed in the meantime
            _shut_down(connection)

    def look(self) -> int:
        """Ends every connection that is silent; returns how many.

        Under the lock: while it is held, no waiter can return and close its socket, so that the descriptor is its own.
        """
        ended = 0
        with self._lock:
            now = time.monotonic()
            for key, (deadline, connection) in list(self._waiting.items()):
                if now < deadline:
                    continue
                del self._waiting[key]
                with suppress(Exception):  # closed in the meantime
                    _shut_down(connection)
                    ended += 1
        if ended:
            log.warning("database.silent", connections=ended)
        return ended

    def _begin_to_look(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_looking, name="database-silence", daemon=True)
            self._thread.start()
        if not self._anybody.is_set():
            self._anybody.set()

    def _keep_looking(self) -> None:
        while True:
            self._anybody.wait()
            time.sleep(LOOK_EVERY_S)
            self.look()
            with self._lock:
                if not self._waiting:
                    self._anybody.clear()


_WATCH = SilenceWatch()


def process_watch() -> SilenceWatch:
    """Returns the process's own, for connections that are no engine's."""
    return _WATCH


def _driver_connection(subject: Any) -> Any:
    """Returns the driver's connection of a cursor or a pool's proxy; of a connection, itself."""
    if isinstance(subject, sa.PoolProxiedConnection):
        return subject.driver_connection
    return getattr(subject, "connection", subject)


def _shut_down(connection: Any) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def watch_for_silence(engine: sa.Engine, statement_timeout_s: float, watch: SilenceWatch = _WATCH) -> None:
    """Makes an engine's connections end when an answer takes longer than the statement timeout allows.

    Args:
        engine: The engine.
        statement_timeout_s: What its sessions have been told; not zero.
        watch: Who looks: the process's own, but for tests.
    """
    limit_s = statement_timeout_s + min(statement_timeout_s, MAX_GRACE_S)
    _limits[engine] = watch, limit_s
    for name in WAITS:
        setattr(engine.dialect, name, watch.watched(getattr(engine.dialect, name), limit_s))


_limits: WeakKeyDictionary[sa.Engine, tuple[SilenceWatch, float]] = WeakKeyDictionary()


def begin(engine: sa.Engine, connection: Any, key: int) -> None:
    """Begins a wait on an engine's connection that goes to the driver past its dialect; watched as the dialect's.

    Args:
        engine: Whose connection it is.
        connection: The driver's.
        key: The wait's own, for `finish`: an `id` of an object, which is no thread's identity either.
    """
    found = _limits.get(engine)
    if found is not None:
        found[0].begin(key, connection, found[1])


def finish(engine: sa.Engine, key: int) -> None:
    """Ends it; call it before the connection may be closed."""
    found = _limits.get(engine)
    if found is not None:
        found[0].finish(key)
