"""Runs the statements of the checkpoint writer on the driver itself: in one round trip, past SQLAlchemy and cursors.

What SQLAlchemy and psycopg's cursors do around a statement costs as much as a whole small batch, and a cursor in
pipeline mode waits for its socket at each statement, where it loses the interpreter's lock. So psycopg's own libpq
module is asked: statements are prepared the first time that a session has them, all go out as one message, and it is
waited for once. What it raises comes as SQLAlchemy would raise it, for whoever judges errors. psycopg2 has no such
module, and goes through SQLAlchemy.

**Committed or not.** What is sent up to a Sync message is one transaction, which the server commits at the Sync if all
of it succeeded (https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-PIPELINING); after an error it
skips what follows up to there. So all is committed when the Sync is answered and no error came before: also none of the
commit itself, which would come in front of that answer. CockroachDB gets one statement at a time, its Execute followed
by the Sync, as any driver sends it.
"""

from __future__ import annotations

import re
import select
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import psycopg
import sqlalchemy as sa
from psycopg import abc
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus
from psycopg.pq.abc import PGconn, PGresult

from perdure_service.store import silence

Statement = tuple[str, Mapping[str, Any]]
"""SQL with its parameters by name, `%(name)s`; each has its type in the SQL. No other percent signs."""
Rows = list[dict[str, Any]]

_PARAMETER = re.compile(r"%\((\w+)\)s")
_EXECUTED = (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK)
_NOT_PREPARED_ANY_MORE = (b"26000", b"0A000")
"""The session has lost its statements (DEALLOCATE ALL, a pooler between us); the schema has changed under a plan."""


class _Prepared(NamedTuple):
    """A statement as a session knows it.

    Attributes:
        parameters: Their names, in the order of their numbers.
        columns: Their names, once it has returned something.
    """

    text: str
    name: bytes
    parameters: tuple[str, ...]
    columns: list[str]


class _Session:
    """What one session has been told to prepare. A name is never given twice: one that failed may have come to be."""

    def __init__(self) -> None:
        self.prepared: dict[str, _Prepared] = {}
        self._numbers = count()

    def new(self, text: str) -> _Prepared:
        """Returns a statement with a new name."""
        return _Prepared(text, b"hot_%d" % next(self._numbers), tuple(dict.fromkeys(_PARAMETER.findall(text))), [])


_sessions: WeakKeyDictionary[psycopg.Connection[Any], _Session] = WeakKeyDictionary()


def run(conn: sa.Connection, statement: Statement) -> Rows:
    """Runs a statement in the transaction of a connection; returns its rows.

    Raises:
        sqlalchemy.exc.DBAPIError: What the driver raised.
    """
    result = conn.exec_driver_sql(*statement)
    names = tuple(result.keys())
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def commit(conn: sa.Connection, statements: Sequence[Statement]) -> list[Rows]:
    """Runs statements on a connection in autocommit mode, in one transaction; returns the rows of each once committed.

    Args:
        conn: Of one thread, which does nothing else with it meanwhile.
        statements: As said above.

    Raises:
        sqlalchemy.exc.DBAPIError: What the driver raised. Unless the connection is lost, nothing was committed, and
            it is as it was before.
    """
    driver = conn.connection.driver_connection
    if isinstance(driver, psycopg.Connection):
        try:
            with silence.waiting(conn.engine, driver):
                return _commit_at_once(driver, _session_of(driver), statements)
        except psycopg.Error as error:
            raise _as_sqlalchemy(error, driver) from error
    if len(statements) == 1:
        return [run(conn, statements[0])]
    try:
        conn.exec_driver_sql("BEGIN")
        found = [run(conn, statement) for statement in statements]
        conn.exec_driver_sql("COMMIT")
    except BaseException:
        with suppress(sa.exc.SQLAlchemyError):  # the connection is lost, and its transaction with it
            conn.exec_driver_sql("ROLLBACK")  # of a transaction of ours, of which the driver knows nothing
        raise
    return found


def _session_of(driver: psycopg.Connection[Any]) -> _Session:
    session = _sessions.get(driver)
    if session is None:
        session = _sessions[driver] = _Session()
    return session


def _commit_at_once(driver: psycopg.Connection[Any], session: _Session, statements: Sequence[Statement]) -> list[Rows]:
    connection, transformer = driver.pgconn, Transformer(driver)
    # Before anything is sent: a value may be refused here.
    prepared = [session.prepared.get(text) for text, _ in statements]
    known = [one or session.new(text) for one, (text, _) in zip(prepared, statements, strict=True)]
    dumped = [
        transformer.dump_sequence([values[name] for name in one.parameters], [PyFormat.TEXT] * len(one.parameters))
        for one, (_, values) in zip(known, statements, strict=True)
    ]
    sent: list[_Prepared | None] = []  # what is prepared; None for what is executed
    connection.enter_pipeline_mode()
    try:
        for one, old, values in zip(known, prepared, dumped, strict=True):
            if old is None:
                connection.send_prepare(one.name, _numbered(one.text, one.parameters).encode())
                sent.append(one)
            connection.send_query_prepared(one.name, values)
            sent.append(None)
        connection.pipeline_sync()
        results, failed = _answers(connection)
    finally:
        try:
            connection.exit_pipeline_mode()
        except psycopg.Error:  # it is lost, or not all of it is answered
            driver.close()
    for new, _ in zip(sent, results, strict=False):
        if new is not None:  # stays prepared, whatever came of what was sent behind it
            session.prepared[new.text] = new
    if failed is not None:
        if failed.error_field(DiagnosticField.SQLSTATE) in _NOT_PREPARED_ANY_MORE and any(prepared):
            session.prepared.clear()  # nothing was committed, and the next time all are prepared
            return _commit_at_once(driver, session, statements)
        raise psycopg.errors.error_from_result(failed)
    executed = [result for new, result in zip(sent, results, strict=True) if new is None]
    return [_rows(transformer, one, result) for one, result in zip(known, executed, strict=True)]


def _numbered(text: str, parameters: Sequence[str]) -> str:
    """Returns SQL with its parameters by number, as the server has them."""
    numbers = {name: f"${number}" for number, name in enumerate(parameters, 1)}
    return _PARAMETER.sub(lambda found: numbers[found[1]], text)


def _answers(connection: PGconn) -> tuple[list[PGresult], PGresult | None]:
    """Waits for what was sent up to the Sync; returns the results before the first error, and that.

    Raises:
        psycopg.OperationalError: The connection is lost.
    """
    ready = select.poll()
    ready.register(connection.socket, select.POLLIN | select.POLLOUT)
    while connection.flush():
        ready.poll()
        connection.consume_input()  # else it and we could each wait for the other to read
    ready.modify(connection.socket, select.POLLIN)
    results: list[PGresult] = []
    failed: PGresult | None = None
    while True:
        while connection.is_busy():
            ready.poll()
            connection.consume_input()
        result = connection.get_result()
        if connection.status != ConnStatus.OK:
            raise psycopg.OperationalError(connection.get_error_message())
        if result is None:  # the end of one statement's
            continue
        if result.status == ExecStatus.PIPELINE_SYNC:
            return results, failed
        if failed is None:
            if result.status in _EXECUTED:
                results.append(result)
            else:
                failed = result


def _rows(transformer: abc.Transformer, statement: _Prepared, result: PGresult) -> Rows:
    if not statement.columns:
        statement.columns.extend((result.fname(n) or b"").decode() for n in range(result.nfields))
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, lambda row: dict(zip(statement.columns, row, strict=True)))


def _as_sqlalchemy(error: psycopg.Error, driver: psycopg.Connection[Any]) -> Exception:
    """Returns an error as SQLAlchemy wraps it, with neither the statement nor its values."""
    wrapped: Exception = sa.exc.DBAPIError.instance(
        None, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=driver.closed
    )
    return wrapped
