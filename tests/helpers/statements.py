"""Writes down what a server's calls ask the database; loaded into it by `--agents tests.helpers.statements`.

`PERDURE_TEST_STATEMENTS=path`  gets one line for each statement that a call causes, without its parameters.
`PERDURE_TEST_STATEMENTS_OF=all`  makes it each statement that the server's engines send, whatever it is for.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import sqlalchemy as sa

from tests.helpers import agents

__all__ = ["agents"]

_file = os.open(os.environ["PERDURE_TEST_STATEMENTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

_of_all = os.environ.get("PERDURE_TEST_STATEMENTS_OF") == "all"


@sa.event.listens_for(sa.Engine, "before_cursor_execute")
def _write_down(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
    # The threads in which RunService answers calls: what polls and renews is not in it.
    if _of_all or threading.current_thread().name.startswith("rpc-db-"):
        os.write(_file, (" ".join(statement.split()) + "\n").encode())
