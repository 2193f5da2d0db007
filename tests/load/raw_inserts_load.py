"""Load of the article's first program: inserts of one row of three columns, each committed, each client a connection.

python -m tests.load.raw_inserts_load URL psycopg|psycopg2
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from typing import Any

import psycopg
import psycopg2
from perdure_service.store.engine import parse_url

from tests.load.loop import serve_blocking, threads_loop

VALUE = "x" * 64
TABLE = "CREATE TABLE IF NOT EXISTS public.raw_insert (id BIGSERIAL PRIMARY KEY, val TEXT, ts TIMESTAMPTZ)"
INSERT = "INSERT INTO public.raw_insert (val, ts) VALUES (%s, now())"


def main(url: str, driver: str) -> None:
    """Answers orders; the connections of an order are made before it begins."""
    url = parse_url(url).set(drivername="postgresql").render_as_string(hide_password=False)

    def connect() -> Any:
        connection: Any = psycopg.connect(url) if driver == "psycopg" else psycopg2.connect(url)
        connection.autocommit = True
        return connection

    def handle(order: dict[str, Any]) -> dict[str, Any]:
        with ExitStack() as stack:
            cursors = [stack.enter_context(closing(connect())).cursor() for _ in range(order["clients"])]
            cursors[0].execute(TABLE)
            works = [lambda cursor=cursor: cursor.execute(INSERT, (VALUE,)) for cursor in cursors]
            return threads_loop(works, order["seconds"])

    serve_blocking(handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
