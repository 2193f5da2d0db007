"""Runs the statements of the checkpoint writer on the driver itself: in one round trip, past SQLAlchemy and cursors.

What SQLAlchemy and psycopg's cursors do around a statement costs as much as a whole small batch, and a cursor in
pipeline mode waits for its socket at each statement, where it loses the interpreter's lock. So psycopg's own libpq
module is asked: statements are prepared the first time that a session has them, all go out as one message, and it is
waited for once. What it raises comes as SQLAlchemy would raise it, for whoever judges errors. psycopg2 has no such
module, and goes through SQLAlchemy. Who cannot wait sends, and looks when something has come: an `Exchange`.

**Committed or not.** What is sent up to a Sync message is one transaction, which the server commits at the Sync if all
of it succeeded (https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-PIPELINING); after an error it
skips what follows up to there. So all is committed when the Sync is answered and no error came before: also none of the
commit itself, which would come in front of that answer. CockroachDB gets one statement at a time, its Execute followed
by the Sync, as any driver sends it.
"""

from __future__ import annotations

import math
import re
import select
import time
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
from psycopg.pq.abc import PGresult

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
            it is as it was before. If it is, it still has its socket: drop it.
    """
    if is_direct(conn.engine):
        exchange = Exchange(conn, statements)
        exchange.wait()
        if exchange.lost_statements:  # nothing was committed, and this time all are prepared
            exchange = Exchange(conn, statements)
            exchange.wait()
        return exchange.rows()
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


def is_direct(engine: sa.Engine) -> bool:
    """Returns whether an engine's driver is one whose connections an `Exchange` can use."""
    return engine.dialect.driver == "psycopg"


class Exchange:
    """Statements that are sent on a connection, and what has come back: a `commit` that need not be waited for.

    Its maker has the connection to itself until it is over. Methods are for one thread at a time.

    Attributes:
        over: Whether all has come that will: `rows` tells.
        sent: Whether the socket has taken all of it. It may take the rest when it is ready to be written to.
        lost_statements: Once over, whether it failed only because the session has lost what was prepared, so that the
            same again would succeed.
    """

    def __init__(self, conn: sa.Connection, statements: Sequence[Statement]) -> None:
        """Sends statements, as far as the socket takes them at once.

        Args:
            conn: As of `commit`, with a driver that `is_direct`.
            statements: As of `commit`.

        Raises:
            sqlalchemy.exc.DBAPIError: A value was refused, and nothing was sent; or the connection is lost.
        """
        driver = conn.connection.driver_connection
        assert isinstance(driver, psycopg.Connection), "see is_direct"
        self.over = self.sent = self.lost_statements = False
        self._driver, self._connection, self._engine = driver, driver.pgconn, conn.engine
        self._session, self._transformer = _session_of(driver), Transformer(driver)
        self._expected: list[_Prepared | None] = []  # what is prepared; None for what is executed
        self._results: list[PGresult] = []
        self._failed: PGresult | None = None
        self._error: psycopg.Error | None = None
        self._lost = self._watched = False
        try:
            self._send(statements)
        except psycopg.Error as error:
            raise self._as_sqlalchemy(error) from error

    def _send(self, statements: Sequence[Statement]) -> None:
        prepared, connection = self._session.prepared, self._connection
        # Before anything is sent: a value may be refused here.
        self._statements = [prepared.get(text) or self._session.new(text) for text, _ in statements]
        dumped = [
            self._transformer.dump_sequence(
                [values[name] for name in one.parameters], [PyFormat.TEXT] * len(one.parameters)
            )
            for one, (_, values) in zip(self._statements, statements, strict=True)
        ]
        connection.enter_pipeline_mode()
        try:
            for one, values in zip(self._statements, dumped, strict=True):
                if one.text not in prepared:
                    connection.send_prepare(one.name, _numbered(one.text, one.parameters).encode())
                    self._expected.append(one)
                connection.send_query_prepared(one.name, values)
                self._expected.append(None)
            connection.pipeline_sync()
            self.sent = not connection.flush()
        except psycopg.Error:
            self._lost = True  # part of it may be on its way
            raise

    def advance(self) -> bool:
        """Takes what has come, and sends what has not been taken; waits for nothing. Returns whether it is over."""
        try:
            self._advance()
        except psycopg.Error as error:
            self._error, self._lost, self.over = error, True, True
        return self.over

    def _advance(self) -> None:
        connection = self._connection
        if not self.sent:
            self.sent = not connection.flush()
        connection.consume_input()  # also while sending: else it and we could each wait for the other to read
        while self.sent and not self.over and not connection.is_busy():
            result = connection.get_result()
            if connection.status != ConnStatus.OK:
                raise psycopg.OperationalError(connection.get_error_message())
            if result is None:  # the end of one statement's
                continue
            if result.status == ExecStatus.PIPELINE_SYNC:
                connection.exit_pipeline_mode()
                self._settle()
            elif self._failed is None:
                if result.status in _EXECUTED:
                    self._results.append(result)
                else:
                    self._failed = result

    def _settle(self) -> None:
        """Notes which statements are prepared now, and whether that was the trouble."""
        session = self._session
        for new, _ in zip(self._expected, self._results, strict=False):
            if new is not None:  # stays prepared, whatever came of what was sent behind it
                session.prepared[new.text] = new
        if self._failed is not None:
            self._error = psycopg.errors.error_from_result(self._failed)
            if self._failed.error_field(DiagnosticField.SQLSTATE) in _NOT_PREPARED_ANY_MORE:
                session.prepared.clear()
                self.lost_statements = any(old not in self._expected for old in self._statements)
        self.over = True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until it is over, or for so long; returns whether it is. Without a timeout it watches for silence."""
        if timeout_s is None:
            self.begin_waiting()
            try:
                while not self.over:
                    self._poll(None)
                    self.advance()
            finally:
                self.end_waiting()
            return True
        until = time.monotonic() + timeout_s
        while not self.over and (left := until - time.monotonic()) > 0:
            if self._poll(left):
                self.advance()
        return self.over

    def begin_waiting(self) -> None:
        """Makes the wait for it be watched for silence."""
        self._watched = True
        silence.begin(self._engine, self._driver, id(self))

    def end_waiting(self) -> None:
        """Ends that, if it was begun; before anybody closes the connection."""
        if self._watched:
            silence.finish(self._engine, id(self))

    def has_more(self) -> bool:
        """Returns whether something has come that nobody has taken, or the rest could be sent."""
        return self._poll(0)

    def _poll(self, timeout_s: float | None) -> bool:
        ready = select.poll()
        try:
            ready.register(self._connection.socket, select.POLLIN | (0 if self.sent else select.POLLOUT))
        except psycopg.Error:  # it is lost, and `advance` will tell
            return True
        return bool(ready.poll(None if timeout_s is None else math.ceil(timeout_s * 1_000)))

    def rows(self) -> list[Rows]:
        """Returns the rows of each statement, when it is over: they are committed.

        Raises:
            sqlalchemy.exc.DBAPIError: As of `commit`.
        """
        assert self.over, "wait for it"
        if self._error is not None:
            raise self._as_sqlalchemy(self._error) from self._error
        executed = [result for new, result in zip(self._expected, self._results, strict=True) if new is None]
        return [_rows(self._transformer, one, result) for one, result in zip(self._statements, executed, strict=True)]

    def _as_sqlalchemy(self, error: psycopg.Error) -> Exception:
        """Returns an error as SQLAlchemy wraps it, with neither the statement nor its values."""
        wrapped: Exception = sa.exc.DBAPIError.instance(
            None, None, error, psycopg.Error, hide_parameters=True,
            connection_invalidated=self._lost or self._driver.closed,
        )  # fmt: skip
        return wrapped


def _session_of(driver: psycopg.Connection[Any]) -> _Session:
    session = _sessions.get(driver)
    if session is None:
        session = _sessions[driver] = _Session()
    return session


def _numbered(text: str, parameters: Sequence[str]) -> str:
    """Returns SQL with its parameters by number, as the server has them."""
    numbers = {name: f"${number}" for number, name in enumerate(parameters, 1)}
    return _PARAMETER.sub(lambda found: numbers[found[1]], text)


def _rows(transformer: abc.Transformer, statement: _Prepared, result: PGresult) -> Rows:
    if not statement.columns:
        statement.columns.extend((result.fname(n) or b"").decode() for n in range(result.nfields))
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, lambda row: dict(zip(statement.columns, row, strict=True)))
