"""Writes down every statement that is sent to a database through a CockroachDB dialect, and where it was sent.

`PERDURE_TEST_RECORDED_SQL=path`  gets a line of JSON for each statement: its place and its text, without its values.

Set for the tests, it holds for all servers that they start. With `PERDURE_TEST_DATABASE_FORM=cockroachdb+psycopg` they
speak to PostgreSQL as they would to CockroachDB, DBOS included; `make test-sql` reads what was recorded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import sqlalchemy as sa

from tests.helpers.sql_source import PACKAGE, Statement, numbered

VARIABLE = "PERDURE_TEST_RECORDED_SQL"
_SENDERS = (f"{os.sep}{PACKAGE}{os.sep}", f"{os.sep}dbos{os.sep}")
_TESTS = str(Path(__file__).parents[1]) + os.sep
_seen: set[str] = set()


def start() -> None:
    """Records from here on, in this process and in those forked from it, if the environment asks for it."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def record(connection: sa.Connection, _cursor: Any, text: str, *_: Any) -> None:
        if text in _seen or connection.dialect.name != "cockroachdb":
            return
        place = _place(sys._getframe(1))
        if place is not None:
            _seen.add(text)
            line = json.dumps({"place": place, "text": numbered(text)}) + "\n"
            os.write(file, line.encode())  # one write: the lines of other processes stay whole

    sa.event.listen(sa.Engine, "before_cursor_execute", record)


def recorded(path: Path) -> list[Statement]:
    """Returns what was recorded, each text once, in order of its places."""
    by_text: dict[str, Statement] = {}
    for line in path.read_text().splitlines():
        statement = Statement(**json.loads(line))
        by_text.setdefault(statement.text, statement)
    return sorted(by_text.values())


def _place(frame: FrameType | None) -> str | None:
    """Returns which line of the product or of DBOS sends something, None if it is a test."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_TESTS):
            return None
        for sender in _SENDERS:
            if sender in path:
                return f"{sender[1:]}{path.rpartition(sender)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return None
