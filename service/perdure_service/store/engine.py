"""The one engine a process has: which URLs it takes, how its sessions are set, and what DBOS is told of its errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import Extract

from perdure_service.errors import ConfigurationError
from perdure_service.store import sqlstates
from perdure_service.store.silence import watch_for_silence

DRIVERS: Mapping[str, str] = {
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "cockroachdb": "cockroachdb+psycopg2",
    "cockroachdb+psycopg": "cockroachdb+psycopg",
    "cockroachdb+psycopg2": "cockroachdb+psycopg2",
}
"""What a URL may begin with, and the SQLAlchemy dialect and driver it gets."""

ALLOWED_FORMS = "postgresql://…, cockroachdb+psycopg://… or (psycopg2) cockroachdb://…"
CONNECT_TIMEOUT_S = 10
POOL_TIMEOUT_S = 10.0
"""How long a thread waits for a connection, unless somebody waits for it (`waits_for_a_connection`)."""
POOL_RECYCLE_S = 30 * 60
"""Connections are renewed this often, so that a cluster's new nodes get their share."""
IDLE_IN_TRANSACTION_TIMEOUT = timedelta(seconds=60)
"""The server ends a session that a frozen process left with locks in its hands. DBOS repeats on 25P03. Executors use
`idle_in_transaction_timeout`, as what they leave locked keeps others from continuing their runs."""
SHORTEST_IDLE_IN_TRANSACTION = timedelta(seconds=5)
PING_AFTER_IDLE_S = 5.0
KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
"""A peer that vanished without a word (a cut region) is noticed in half a minute, not in libpq's two hours. The
last is in milliseconds. https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES"""


class SerializationConflict(psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
    """40001 as DBOS can bear it: `db_retry` repeats 40P01 only, DBOS's queue poller backs off from 40001 only.

    So it is both. `sqlstate` says 40P01 (it comes first), `original_sqlstate` the truth.
    """

    original_sqlstate: ClassVar[str] = sqlstates.SERIALIZATION_FAILURE


class AmbiguousResult(psycopg.errors.DeadlockDetected, psycopg.errors.StatementCompletionUnknown):
    """40003 for DBOS's `db_retry`: a commit that may have happened. DBOS's retried operations are idempotent."""

    original_sqlstate: ClassVar[str] = sqlstates.STATEMENT_COMPLETION_UNKNOWN


class CheckpointTooSlow(psycopg.errors.DeadlockDetected):
    """57014 at a checkpoint, for DBOS's `db_retry`: a stalled database must delay a run, never fail it."""

    original_sqlstate: ClassVar[str] = sqlstates.QUERY_CANCELED


class DataOutOfReach(psycopg.errors.ConnectionFailure):
    """A CockroachDB range without quorum, or a node that cannot reach another: like a lost connection, wait."""

    def __init__(self, message: str, original_sqlstate: str) -> None:
        super().__init__(message)
        self.original_sqlstate = original_sqlstate


def is_cockroach(engine: sa.Engine) -> bool:
    """Returns whether `engine` was made for CockroachDB. Where the SQL must differ, this is what it asks."""
    return engine.dialect.name == "cockroachdb"


def parse_url(url: str) -> URL:
    """Returns the URL with its SQLAlchemy driver.

    Raises:
        ConfigurationError: It is malformed or of another database. The message does not repeat it.
    """
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        # Neither the message nor the cause: both may repeat a part of a password.
        raise ConfigurationError(f"The database URL is malformed; it should be {ALLOWED_FORMS}") from None
    driver = DRIVERS.get(parsed.drivername)
    if driver is None:
        raise ConfigurationError(
            f"The database URL begins with {parsed.drivername}://, which is not supported; use {ALLOWED_FORMS}"
        )
    return parsed.set(drivername=driver)


_local = threading.local()


@contextmanager
def waits_for_a_connection(seconds: float) -> Iterator[None]:
    """Makes this thread wait for a connection at most so long, or fail with `sqlalchemy.exc.TimeoutError`."""
    _local.patience_s = seconds
    try:
        yield
    finally:
        _local.patience_s = None


class PatientPool(sa.pool.QueuePool):
    """A pool in which each thread has a patience of its own: a run waits, a caller is told soon to come again."""

    _sqla_logger_namespace = "sqlalchemy.pool.QueuePool"  # not ours, whose level is another

    @property
    def _timeout(self) -> float:
        patience_s: float | None = getattr(_local, "patience_s", None)
        return self._own_timeout_s if patience_s is None else patience_s

    @_timeout.setter
    def _timeout(self, seconds: float) -> None:
        self._own_timeout_s = seconds


def idle_in_transaction_timeout(lease_ttl: timedelta) -> timedelta:
    """Returns how long an executor's session may be idle in a transaction.

    A frozen process may have locked rows of its runs; whoever gives them back skips what is locked. When its lease has
    expired, its locks should go, too. A process that is only slow is not idle for so long between two statements.
    """
    return max(lease_ttl, SHORTEST_IDLE_IN_TRANSACTION)


def create_engine(
    url: str,
    *,
    pool_size: int,
    statement_timeout: timedelta,
    idle_in_transaction_timeout: timedelta = IDLE_IN_TRANSACTION_TIMEOUT,
) -> sa.Engine:
    """Returns the engine for `url`; it connects when first used.

    Isolation is the database's own: READ COMMITTED on PostgreSQL, SERIALIZABLE on CockroachDB. There is no
    `lock_timeout`: DBOS does not repeat on 55P03, which would turn a wait into a run's failure; `statement_timeout`
    bounds the wait. Connections are not tested at every checkout, which would cost each step two round trips, only
    after `PING_AFTER_IDLE_S`; everything on the way repeats when a connection turns out to be dead.

    Args:
        url: One of the forms in `DRIVERS`. What its query sets (`application_name`, `options` …) wins over ours.
        pool_size: Connections at most; a caller waits for one up to `POOL_TIMEOUT_S`.
        statement_timeout: The longest a statement may take; zero for no limit. A little later the connection is ended
            from this side (`silence`), unless the URL brings `options` of its own.
        idle_in_transaction_timeout: How long a session may hold a transaction open and do nothing.

    Raises:
        ConfigurationError: The URL is not usable.
    """
    parsed = parse_url(url)
    engine = sa.create_engine(
        parsed,
        poolclass=PatientPool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_S,
        pool_recycle=POOL_RECYCLE_S,
        pool_use_lifo=True,
        hide_parameters=True,
        connect_args=_connect_arguments(parsed, statement_timeout, idle_in_transaction_timeout),
    )
    sa.event.listen(engine, "checkin", _note_return)
    sa.event.listen(engine, "checkout", _ping_after_idleness(engine))
    sa.event.listen(engine, "handle_error", _translate, retval=True)
    if statement_timeout and "options" not in parsed.query:
        watch_for_silence(engine, statement_timeout.total_seconds())
    return engine


def reserve_connections(engine: sa.Engine, statement_timeout: timedelta, connections: int = 1) -> sa.Engine:
    """Returns an engine for what must not stand in line behind everything else: the lease, the checkpoints.

    Args:
        engine: Of whose database and settings.
        statement_timeout: As of `create_engine`.
        connections: How many it may have.
    """
    return create_engine(
        engine.url.render_as_string(hide_password=False),
        pool_size=connections,
        statement_timeout=statement_timeout,
        idle_in_transaction_timeout=SHORTEST_IDLE_IN_TRANSACTION,
    )


def dedicated_connection(engine: sa.Engine) -> psycopg.Connection:
    """Connects to an engine's database for a statement that never ends, or a session that only listens.

    By psycopg 3, whatever the engine's driver, in autocommit mode and without a statement timeout: whoever has it must
    notice by other means that nothing comes any more.
    """
    positional, arguments = engine.dialect.create_connect_args(engine.url)
    settings = _connect_arguments(engine.url, timedelta(0), IDLE_IN_TRANSACTION_TIMEOUT)
    return psycopg.connect(*positional, autocommit=True, **{**arguments, **settings})


def _connect_arguments(url: URL, statement_timeout: timedelta, idle_in_transaction: timedelta) -> dict[str, Any]:
    """Returns libpq parameters. Session settings are startup options: no round trip, and no rollback undoes them."""
    options = (
        f"-c statement_timeout={_milliseconds(statement_timeout)} "
        f"-c idle_in_transaction_session_timeout={_milliseconds(idle_in_transaction)}"
    )
    given = url.query.get("options", ())
    arguments: dict[str, Any] = {"application_name": "perdure", "connect_timeout": CONNECT_TIMEOUT_S, **KEEPALIVE}
    if url.drivername.startswith("postgresql"):
        # After a failover a name may still point to the old primary, now a read-only standby.
        arguments["target_session_attrs"] = "read-write"
    arguments = {name: value for name, value in arguments.items() if name not in url.query}
    # The server takes the last of two equal settings, so the user's come last.
    arguments["options"] = " ".join([options, *((given,) if isinstance(given, str) else given)])
    return arguments


def _milliseconds(duration: timedelta) -> int:
    return int(duration.total_seconds() * 1000)


def _note_return(_connection: Any, entry: ConnectionPoolEntry) -> None:
    entry.info["returned_at"] = time.monotonic()


def _ping_after_idleness(engine: sa.Engine) -> Any:
    """Returns the pool's checkout hook. SQLAlchemy's own `pool_pre_ping` would ping at every checkout."""

    def ping(connection: Any, entry: ConnectionPoolEntry, _proxy: Any) -> None:
        returned_at = entry.info.get("returned_at")
        if returned_at is None or time.monotonic() - returned_at < PING_AFTER_IDLE_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            # As `pool_pre_ping` does: the others are likely as dead; the pool connects anew and tries again.
            raise InvalidatePoolError() from error

    return ping


def _translate(context: ExceptionContext) -> DBAPIError | None:
    """Gives DBOS an error it handles rightly: its `db_retry` and its queries know psycopg 3's classes and few codes.

    See `dbos/_utils.py: retriable_postgres_exception` and the uses of `.orig.sqlstate` in `dbos/_sys_db*.py`. What
    the database said stays readable in `original_sqlstate`, and the driver's error is the cause.
    """
    wrapped, original = context.sqlalchemy_exception, context.original_exception
    if not isinstance(wrapped, DBAPIError):
        return None
    code = sqlstates.sqlstate_of(original)
    if code in sqlstates.SESSION_ENDED and context.connection is not None:
        # psycopg 3 notices only with the next statement that the session is gone; the pool should know now.
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = code in (sqlstates.ADMIN_SHUTDOWN, sqlstates.CRASH_SHUTDOWN)
    error = _as_psycopg(wrapped, original, code, disconnected=context.is_disconnect)
    if error is None:
        return None
    return type(wrapped)(
        wrapped.statement,
        wrapped.params,
        error,
        hide_parameters=True,
        connection_invalidated=context.is_disconnect,
        ismulti=wrapped.ismulti,
    )


def _as_psycopg(
    wrapped: DBAPIError, original: BaseException, code: str | None, *, disconnected: bool
) -> psycopg.Error | None:
    """Returns the error to show instead of `original`, None to leave it."""
    text = str(original)
    if code == sqlstates.SERIALIZATION_FAILURE:
        return SerializationConflict(text)
    if code == sqlstates.STATEMENT_COMPLETION_UNKNOWN:
        return AmbiguousResult(text)
    if code in sqlstates.STORE_GONE:
        return DataOutOfReach(text, code)
    if isinstance(original, psycopg.Error):
        return None
    # From here on psycopg2, whose errors know `pgcode` instead of `sqlstate`.
    if code is None:
        lost = disconnected or isinstance(wrapped, sa.exc.OperationalError)
        return psycopg.errors.ConnectionException(text) if lost else None
    try:
        return psycopg.errors.lookup(code)(text)
    except KeyError:
        # SQLAlchemy's wrappers and psycopg's base classes bear the same names (PEP 249).
        error: psycopg.Error = getattr(psycopg, type(wrapped).__name__, psycopg.DatabaseError)(text)
        error.sqlstate = code
        return error


@compiles(Extract, "cockroachdb")
def _extract_as_decimal(element: Extract, compiler: SQLCompiler, **kw: Any) -> str:
    """Renders EXTRACT as DECIMAL, which it is on PostgreSQL; on CockroachDB it is FLOAT.

    psycopg 3's typed parameters make FLOAT * INT of DBOS's `extract(epoch …) * 1000`, an operator that is not there.
    """
    return f"{compiler.visit_extract(element, **kw)}::DECIMAL"  # type: ignore[no-untyped-call]
