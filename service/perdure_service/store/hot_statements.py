"""Runs the statements of the checkpoint writer on the driver itself: in one round trip, with SQLAlchemy out of the way.

What SQLAlchemy does around a statement costs as much as a whole small batch. psycopg 3 is asked directly, several
statements go out together as a transaction in pipeline mode, and whatever it raises comes as SQLAlchemy would raise
it, for whoever judges errors. psycopg2 has no pipelines, and goes through SQLAlchemy as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import psycopg
import sqlalchemy as sa

from perdure_service.store import silence

Statement = tuple[str, Mapping[str, Any]]
"""SQL with its parameters by name, `%(name)s`."""
Rows = list[dict[str, Any]]

_columns: dict[str, tuple[str, ...]] = {}
"""The names of what a statement returns, by its text."""


def run(conn: sa.Connection, statement: Statement) -> Rows:
    """Runs a statement in the transaction of a connection, or by itself on one in autocommit mode; returns its rows.

    Raises:
        sqlalchemy.exc.DBAPIError: What the driver raised.
    """
    driver = conn.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        result = conn.exec_driver_sql(*statement)
        names = tuple(result.keys())
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
    try:
        with silence.waiting(conn.engine, driver):
            cursor = driver.execute(*statement)
        return _rows(statement, cursor)
    except psycopg.Error as error:
        raise _as_sqlalchemy(error, driver) from error


def commit(conn: sa.Connection, statements: Sequence[Statement]) -> list[Rows]:
    """Runs statements on a connection in autocommit mode, in one transaction; returns the rows of each once committed.

    Raises:
        sqlalchemy.exc.DBAPIError: What the driver raised. Unless the connection is lost, nothing was committed, and
            it is as it was before.
    """
    if len(statements) == 1:
        return [run(conn, statements[0])]
    driver = conn.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        try:
            conn.exec_driver_sql("BEGIN")
            found = [run(conn, statement) for statement in statements]
            conn.exec_driver_sql("COMMIT")
        except BaseException:
            with suppress(sa.exc.SQLAlchemyError):  # the connection is lost, and its transaction with it
                conn.exec_driver_sql("ROLLBACK")  # of a transaction of ours, of which the driver knows nothing
            raise
        return found
    try:
        with silence.waiting(conn.engine, driver):
            return _commit_at_once(driver, statements)
    except psycopg.Error as error:
        raise _as_sqlalchemy(error, driver) from error


def _commit_at_once(driver: psycopg.Connection[Any], statements: Sequence[Statement]) -> list[Rows]:
    """Sends a transaction as a whole. The pipeline's end is when all of it is answered, so also its COMMIT.

    After an error the server skips what follows up to that end, the COMMIT with it.
    """
    try:
        with driver.pipeline():
            driver.execute("BEGIN")
            cursors = [driver.execute(*statement) for statement in statements]
            ended = driver.execute("COMMIT")
        if ended.statusmessage != "COMMIT":
            raise psycopg.InternalError(f"the answer to COMMIT was {ended.statusmessage}")
    except BaseException:
        with suppress(psycopg.Error):  # the connection is lost, and its transaction with it
            driver.rollback()
        raise
    return [_rows(statement, cursor) for statement, cursor in zip(statements, cursors, strict=True)]


def _rows(statement: Statement, cursor: psycopg.Cursor[Any]) -> Rows:
    names = _columns.get(statement[0])
    if names is None:
        names = _columns[statement[0]] = tuple(column.name for column in cursor.description or ())
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _as_sqlalchemy(error: psycopg.Error, driver: psycopg.Connection[Any]) -> Exception:
    """Returns an error as SQLAlchemy wraps it, with neither the statement nor its values."""
    wrapped: Exception = sa.exc.DBAPIError.instance(
        None, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=driver.closed
    )
    return wrapped
