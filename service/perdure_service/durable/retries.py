"""When DBOS's transactions are repeated: soon after a conflict, patiently while the database is away.

DBOS's own `db_retry` waits 0.5 to 1.5 s before it repeats anything, then twice as long, up to a minute. That is too
slow for a conflict, which is over when the other transaction is (60 runs of 4 steps, 16 at once, on a small PostgreSQL
at SERIALIZABLE: 7.5 to 7.9 s with its pauses, 4.7 s with these; 3 s at READ COMMITTED), and after an outage it leaves
runs waiting for a database that is back. What is repeated is DBOS's own decision (`retriable_postgres_exception`, with
the translation of `store.engine`); ours is only when, and how long.

* For a run: for ever. It must not fail because the database is away, nor because all connections are in use.
* For a caller (`TransactionalDatabase.bounded`): until its patience ends; and not at all when no connection became
  free, as the answer to overload is less load.

`install` puts `repeated` in the place of `db_retry`, both where DBOS decorates at import and where it does when called.
Every repeat begins its transaction anew inside the same `Operation`, which recognises what was committed before.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from dbos import _sys_db, _sys_db_postgres
from dbos._utils import retriable_postgres_exception

from perdure_service.durable.substitutes import substitute
from perdure_service.store.sqlstates import CONFLICTS, JITTER, QUERY_CANCELED, sqlstate_of

FIRST_CONFLICT_PAUSE_S = 0.005
MAX_CONFLICT_PAUSE_S = 0.25
"""Measured as above: 1 s made the slowest run slower, 0.1 s made more conflicts."""
FIRST_LOST_PAUSE_S = 0.1
MAX_LOST_PAUSE_S = 4.0
"""Between attempts to reach a database that is away: what a run waits at most when it is back, but for the jitter."""
POOL_PAUSE_S = 0.1
"""After a wait for a connection that was in vain: it has waited long enough, and only goes to the end of the line."""

_dbos_db_retry = _sys_db.db_retry

F = TypeVar("F", bound=Callable[..., Any])
log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Pauses:
    """The pauses between the attempts of one transaction; each cause has its own, so that one does not slow another."""

    conflicts: int = 0
    losses: int = 0

    def next_s(self, error: Exception) -> float | None:
        """Returns how long to wait before the next attempt, in seconds; None when a repeat is of no use."""
        if isinstance(error, sa.exc.TimeoutError):
            return POOL_PAUSE_S * JITTER.uniform(0.5, 1.5)
        if not retriable_postgres_exception(error):
            return None
        if sqlstate_of(error) in CONFLICTS | {QUERY_CANCELED}:
            pause_s = min(FIRST_CONFLICT_PAUSE_S * 2.0**self.conflicts, MAX_CONFLICT_PAUSE_S)
            self.conflicts = min(self.conflicts + 1, 16)
        else:
            pause_s = min(FIRST_LOST_PAUSE_S * 2.0**self.losses, MAX_LOST_PAUSE_S)
            self.losses = min(self.losses + 1, 16)
        return float(pause_s * JITTER.uniform(0.5, 1.5))


def repeated(*_backoffs: float, sys_db: Any = None) -> Callable[[F], F]:
    """Returns a decorator that repeats a transaction; takes what DBOS's `db_retry` takes, and uses pauses of ours.

    Args:
        sys_db: Whose patience counts: the system database, unless it is the function's first argument.
    """

    def decorator(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            database = sys_db if sys_db is not None else (args[0] if args else None)
            pauses = Pauses()
            attempt = 1
            while True:
                try:
                    return function(*args, **kwargs)
                except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
                    pause_s = _pause_s(pauses, error, database)
                    if pause_s is None:
                        raise
                    if attempt & (attempt - 1) == 0:  # 1, 2, 4 …: an outage must not fill the log
                        code, name = sqlstate_of(error), function.__qualname__
                        log.info("dbos.transaction_repeated", operation=name, sqlstate=code, attempt=attempt)
                attempt += 1
                time.sleep(pause_s)

        return wrapper  # type: ignore[return-value]

    return decorator


def _pause_s(pauses: Pauses, error: Exception, database: Any) -> float | None:
    """Returns the pause before the next attempt, None if there is none: nothing to gain, or no patience left."""
    pause_s = pauses.next_s(error)
    if pause_s is None or not getattr(database, "_retry_connection_errors", True):
        return None
    left_s: float | None = getattr(database, "patience_left_s", None)
    if left_s is None:
        return pause_s
    return None if isinstance(error, sa.exc.TimeoutError) else min(pause_s, left_s)


def decorated() -> Iterator[tuple[type, str, Any]]:
    """Yields the methods of DBOS's system databases that its `db_retry` decorates: class, name, undecorated."""
    wrapper_code = getattr(_dbos_db_retry()(lambda: None), "__code__")  # noqa: B009 - typed as a callable
    for owner in (_sys_db.SystemDatabase, _sys_db_postgres.PostgresSystemDatabase):
        for name, member in vars(owner).items():
            if getattr(member, "__code__", None) is wrapper_code:
                yield owner, name, member.__wrapped__


def install() -> None:
    """Makes DBOS repeat its transactions as we do. A second time it finds nothing to do."""
    if _sys_db.db_retry is repeated:
        return
    for owner, name, function in list(decorated()):
        substitute(owner, name, repeated()(function))
    substitute(_sys_db, "db_retry", repeated)
