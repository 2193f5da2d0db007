"""What the database's error codes mean to us, and how a transaction of ours is repeated.

Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html and, for retries on CockroachDB,
https://www.cockroachlabs.com/docs/stable/transaction-retry-error-reference and
https://www.cockroachlabs.com/docs/stable/common-errors#result-is-ambiguous (40003).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import sqlalchemy as sa
import structlog

from perdure_service.errors import Contention, Overloaded, PerdureError, StoreUnavailable
from perdure_service.telemetry.metrics import DB_RETRIES, METERS, SQLSTATE

SERIALIZATION_FAILURE = "40001"
STATEMENT_COMPLETION_UNKNOWN = "40003"
DEADLOCK_DETECTED = "40P01"
UNIQUE_VIOLATION = "23505"
FOREIGN_KEY_VIOLATION = "23503"
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"
ADMIN_SHUTDOWN = "57P01"
CRASH_SHUTDOWN = "57P02"
CANNOT_CONNECT_NOW = "57P03"
DATABASE_DROPPED = "57P04"
IDLE_SESSION_TIMEOUT = "57P05"
IDLE_IN_TRANSACTION_SESSION_TIMEOUT = "25P03"
CONNECTION_EXCEPTION = "08000"
CONNECTION_FAILURE = "08006"
TOO_MANY_CONNECTIONS = "53300"
INSUFFICIENT_PRIVILEGE = "42501"
UNDEFINED_TABLE = "42P01"
INVALID_SCHEMA_NAME = "3F000"
INVALID_CATALOG_NAME = "3D000"
AUTHENTICATION_FAILED = "28P01"
INVALID_AUTHORIZATION = "28000"
# CockroachDB's own (pkg/sql/pgwire/pgcode): a range has lost its quorum; one node cannot reach another.
COCKROACH_RANGE_UNAVAILABLE = "58C00"
COCKROACH_INTERNAL_CONNECTION_FAILURE = "58C01"
# Without a licence, or cut off from telemetry, several nodes refuse all but five open transactions (pgcode "XXC02").
COCKROACH_LICENCE = "XXC02"

CONFLICTS = frozenset({SERIALIZATION_FAILURE, STATEMENT_COMPLETION_UNKNOWN, DEADLOCK_DETECTED})
"""The whole transaction was undone, or (40003) may have been: repeat it from its beginning."""

SESSION_ENDED = frozenset(
    {
        ADMIN_SHUTDOWN,
        CRASH_SHUTDOWN,
        CANNOT_CONNECT_NOW,
        DATABASE_DROPPED,
        IDLE_SESSION_TIMEOUT,
        IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
    }
)
"""The server ended the session, or would not begin one."""

STORE_GONE = frozenset({COCKROACH_RANGE_UNAVAILABLE, COCKROACH_INTERNAL_CONNECTION_FAILURE, COCKROACH_LICENCE})
"""Connected, but the data is out of reach for now."""

MAX_ATTEMPTS = 6
RETRY_BUDGET = timedelta(seconds=5)
FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 1.0

T = TypeVar("T")
JITTER = random.Random()
"""What pauses are spread by. Not the global one: threads that draw from that disturb whoever has seeded it."""

log = structlog.get_logger(__name__)


def sqlstate_of(error: BaseException) -> str | None:
    """Returns the SQLSTATE the database gave, None when it gave none (a lost or refused connection).

    Sees through SQLAlchemy's wrapper, either driver's own attribute, and the translation of `store.engine`.
    """
    driver_error = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    for attribute in ("original_sqlstate", "sqlstate", "pgcode"):
        code = getattr(driver_error, attribute, None)
        if isinstance(code, str):
            return code
    return None


def is_connection_lost(error: BaseException) -> bool:
    """Returns whether the connection was refused, broken or ended, so that nothing is known of what it was doing."""
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    code = sqlstate_of(error)
    if code is None:
        return error.connection_invalidated or isinstance(error, sa.exc.OperationalError)
    return error.connection_invalidated or code.startswith("08") or code in SESSION_ENDED or code in STORE_GONE


def translate(error: BaseException) -> PerdureError | None:
    """Returns what a caller should be told when a store call failed with `error`, None if it is not of that kind."""
    if isinstance(error, sa.exc.TimeoutError):
        return Overloaded("all connections to the database are in use; wait and repeat the call")
    if not isinstance(error, sa.exc.DBAPIError):
        return None
    code = sqlstate_of(error)
    if code in (SERIALIZATION_FAILURE, DEADLOCK_DETECTED):
        return Contention("Concurrent transactions kept conflicting; repeat the call.")
    if code == LOCK_NOT_AVAILABLE:
        return Contention("Another transaction holds what this one needs; repeat the call.")
    if code == STATEMENT_COMPLETION_UNKNOWN:
        return StoreUnavailable("The database could not say whether it committed; repeat the call, which is safe.")
    if code == QUERY_CANCELED:
        return StoreUnavailable("The database took longer than the statement timeout; wait and repeat the call.")
    if code is not None and code.startswith("53"):
        return StoreUnavailable("The database is out of resources; wait and repeat the call.")
    if is_connection_lost(error):
        return StoreUnavailable("The database cannot be reached; wait and repeat the call, which is safe.")
    return None


def retrying(engine: sa.Engine, name: str, fn: Callable[[sa.Connection], T], *, budget: timedelta = RETRY_BUDGET) -> T:
    """Runs the transaction `fn` and returns its result, repeating all of it on conflicts and lost connections.

    A commit whose reply was lost may have happened, so **`fn` must be idempotent**: run after itself, it leaves the
    same rows and returns the same result. It must not do anything but SQL on the connection it is given.

    Args:
        engine: Where to run it. Each attempt is one `engine.begin()`.
        name: The transaction's name, for the log.
        fn: The transaction.
        budget: No attempt begins later than this after the first; at most `MAX_ATTEMPTS`.

    Raises:
        Contention: It kept conflicting, or (55P03, not repeated) a lock was held. The caller may repeat its call.
        StoreUnavailable: The database is not there, or too slow. The caller may repeat its call later.
        Overloaded: No connection of the pool became free in time. The caller may repeat its call later.
        Exception: Whatever else `fn` raises, unchanged.
    """
    return _repeating(engine.begin, name, fn, budget)


def reading(engine: sa.Engine, name: str, fn: Callable[[sa.Connection], T]) -> T:
    """Runs a read of **one statement** as `retrying` does, without a transaction around it.

    BEGIN and COMMIT are two of three round trips to the database. A single statement needs neither: it sees one
    snapshot by itself. What reads twice, or locks, or writes, is a transaction.

    Args:
        engine: Where to run it.
        name: The statement's name, for the log.
        fn: Executes the statement.

    Raises:
        PerdureError: As `retrying`.
    """
    return _repeating(partial(_without_transaction, engine), name, fn, RETRY_BUDGET)


@contextmanager
def _without_transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        # A switch in the driver; the pool gets the connection back as it was.
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


def _repeating(
    begin: Callable[[], AbstractContextManager[sa.Connection]],
    name: str,
    fn: Callable[[sa.Connection], T],
    budget: timedelta,
) -> T:
    """Runs `fn` on the connection of a new `begin()` until it succeeds or is given up."""
    started = time.monotonic()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            with begin() as connection:
                return fn(connection)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            code = sqlstate_of(error)
            repeatable = code in CONFLICTS or is_connection_lost(error)
            backoff_s = min(FIRST_BACKOFF_S * 4 ** (attempt - 1), MAX_BACKOFF_S) * JITTER.uniform(0.5, 1.5)
            late = time.monotonic() + backoff_s - started > budget.total_seconds()
            if not repeatable or late or attempt == MAX_ATTEMPTS:
                told = translate(error)
                if told is None:
                    raise
                log.warning("store.transaction_failed", transaction=name, sqlstate=code, attempt=attempt)
                raise told from error
            log.info("store.transaction_repeated", transaction=name, sqlstate=code, attempt=attempt)
            METERS.add(DB_RETRIES, {SQLSTATE: code or "none"})
        time.sleep(backoff_s)
    raise AssertionError("unreachable: the last attempt returns or raises")
