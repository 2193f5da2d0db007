"""The checkpoint writer's connections: a thread's, and the one that a loop writes on and watches.

**Who may close what.** A loop has in its selector a descriptor of the socket that is closed on the loop only: libpq
closes its own when the connection is lost, and its number is soon somebody else's. So a connection that is watched is
closed on the loop, and until then there is none left in the pool for another one.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import sqlalchemy as sa
import structlog

from perdure_service import event_loop
from perdure_service.store.engine import is_cockroach

CONNECT_EVERY_S = 1.0
"""How often it is tried to make the loop's connection."""

SESSION_SETTINGS = (
    # A plan made while the tables were empty would scan them for ever; these statements live on their keys.
    "SET plan_cache_mode = force_generic_plan", "SET enable_seqscan = off", "SET enable_hashjoin = off",
    "SET enable_mergejoin = off", "SET lock_timeout = '1s'",
)  # fmt: skip
"""Of PostgreSQL's sessions only; CockroachDB refuses most of them."""

log = structlog.get_logger()


class Session:
    """A connection that commits each statement by itself; made when it is needed, and anew when it is lost."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._conn: sa.Connection | None = None
        self._socket: int | None = None

    @property
    def connected(self) -> bool:
        """Whether there is one."""
        return self._conn is not None

    @property
    def connection(self) -> sa.Connection:
        """It."""
        if self._conn is None:
            self._conn = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            for statement in () if is_cockroach(self._engine) else SESSION_SETTINGS:
                self._conn.exec_driver_sql(statement)
        return self._conn

    def socket(self) -> int:
        """Returns a descriptor of the connection's socket that stays open until `drop`.

        Raises:
            OSError: There is no connection, or no descriptor left.
        """
        if self._socket is None:
            driver = None if self._conn is None else self._conn.connection.driver_connection
            if driver is None:
                raise OSError("not connected")
            self._socket = os.dup(driver.fileno())
        return self._socket

    def roll_back(self) -> None:
        """Ends what failed; drops the connection if it cannot."""
        try:
            self.connection.rollback()
        except sa.exc.SQLAlchemyError:
            self.drop()

    def drop(self) -> None:
        """Ends the connection."""
        conn, self._conn = self._conn, None
        descriptor, self._socket = self._socket, None
        if descriptor is not None:
            os.close(descriptor)
        if conn is not None:
            with suppress(sa.exc.SQLAlchemyError):
                conn.invalidate()
            with suppress(sa.exc.SQLAlchemyError):
                conn.close()


class LoopSession:
    """The session that a loop writes on, one after another as they are lost; without a loop it is never connected.

    Attributes:
        loop: Whose it is.
        watched_socket: What the loop has in its selector; the loop's own.
    """

    def __init__(self, engine: sa.Engine) -> None:
        """Creates it; `attach` gives it to a loop."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.watched_socket = -1
        self._engine = engine
        self._session = Session(engine)
        self._changing = threading.Lock()
        self._watches = False
        self._closing = False
        """Whether the loop has yet to close the last connection."""
        self._connect_from = 0.0

    @property
    def connected(self) -> bool:
        """Whether it can be written on."""
        return self._session.connected

    @property
    def connection(self) -> sa.Connection:
        """Its connection."""
        return self._session.connection

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Gives it to a loop, and connects, which blocks."""
        self.loop = loop
        self._connect()

    def connect_again(self) -> None:
        """Makes the connection anew, in a thread that may block, if it is lost and that was not tried a moment ago."""
        with self._changing:
            lost = self.loop is not None and not (self.connected or self._closing)
            if not lost or time.monotonic() < self._connect_from:
                return
            self._connect_from = math.inf  # one thread tries it
        self._connect()
        self._connect_from = time.monotonic() + CONNECT_EVERY_S

    def _connect(self) -> None:
        session = Session(self._engine)
        try:
            _ = session.connection
        except Exception as error:  # noqa: BLE001 - logged; the writer's thread, which tries it, must not end by it
            log.warning("checkpoints.not_connected", error=type(error).__name__)
            return
        with self._changing:
            self._session = session

    def retire(self) -> None:
        """Closes the connection, where it may be closed; `connect_again` makes another one."""
        with self._changing:
            session, self._session = self._session, Session(self._engine)
            elsewhere = self._watches and event_loop.running() is not self.loop
            self._closing = self._closing or elsewhere
        if not elsewhere:
            session.drop()
            return

        def close() -> None:
            self.unwatch()
            session.drop()
            self._closing = False

        assert self.loop is not None
        try:
            self.loop.call_soon_threadsafe(close)
        except RuntimeError:  # it is closed
            session.drop()

    # ---- on the loop -------------------------------------------------------------------------------------------------

    def watch(self, arrived: Callable[[], None], *, sending: bool) -> None:
        """Has the loop call when something has come, or while something is to be sent, when more can be; if it can."""
        assert self.loop is not None
        self.unwatch()
        try:
            self.watched_socket = self._session.socket()
            self.loop.add_reader(self.watched_socket, arrived)
            self._watches = True
            if sending:
                self.loop.add_writer(self.watched_socket, arrived)
        except (OSError, RuntimeError) as error:  # RuntimeError: the loop is closed
            log.warning("checkpoints.not_watched", error=type(error).__name__)

    def sent(self) -> None:
        """Is told that nothing is to be sent any more."""
        assert self.loop is not None
        self.loop.remove_writer(self.watched_socket)

    def unwatch(self) -> None:
        """Ends `watch`."""
        if self._watches:
            assert self.loop is not None
            self._watches = False
            self.loop.remove_reader(self.watched_socket)
            self.loop.remove_writer(self.watched_socket)
