"""Has PostgreSQL explain all statements that it runs (auto_explain): what each reads with and without an index.

What is explained is what a server really sends, with the plan that was chosen for its values, or without them for a
prepared one: no list of statements that could go stale. Only sessions that begin afterwards are explained.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from perdure_service.store.engine import parse_url
from psycopg import sql as statements

from tests.helpers.server import sql

LOG = "server.log"
"""Of the embedded PostgreSQL, in its data directory; see `perdure_service.store.embedded`."""
SETTINGS = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_format": "json",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_timing": "off",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_parameter_max_length": "0",
}
_BEGIN = re.compile(rb"^(?=[^\t\n])", re.MULTILINE)
_ENTRY = re.compile(rb"LOG:  duration: [\d.]+ ms  plan:\n((?:\t.*\n)+)")


@dataclass(frozen=True)
class Plan:
    """How a statement was run.

    Attributes:
        text: The statement, its white space made even.
        indexes: Those it read by, each behind its table.
        scanned: The tables of which it read every row.
        discarded: By table, the rows that it read and that a condition then threw away: what no index has kept from it.
    """

    text: str
    indexes: frozenset[tuple[str, str]]
    scanned: frozenset[str]
    discarded: Mapping[str, int]


class ExplainedDatabase:
    """A database on an embedded PostgreSQL, that explains all statements of new sessions, until it is dropped."""

    def __init__(self, url: str) -> None:
        """Has it explained from here on.

        Raises:
            psycopg.Error: It is not PostgreSQL, has no auto_explain, or does not let us read its log.
        """
        self._url = url
        database = parse_url(url).database
        assert database is not None
        with sql(url) as connection:
            self._read_to = _size(connection)
            connection.execute("LOAD 'auto_explain'")
            for name, value in SETTINGS.items():
                setting = statements.SQL(".").join(map(statements.Identifier, name.split(".")))
                connection.execute(
                    statements.SQL("ALTER DATABASE {} SET {} = {}").format(
                        statements.Identifier(database), setting, statements.Literal(value)
                    )
                )

    def plans(self) -> list[Plan]:
        """Returns the plans of what had been run since the last call, and of some that run at this moment."""
        with sql(self._url) as connection:
            connection.execute("SELECT 1")  # explained behind what was run before, so that this has an end in the log
            row = connection.execute(
                "SELECT pg_read_binary_file(%s, %s, %s)", (LOG, self._read_to, _size(connection) - self._read_to)
            ).fetchone()
        assert row is not None
        # The last one may be half written, by a server process that goes on.
        whole = row[0][: _last_begin(row[0])]
        self._read_to += len(whole)
        return list(plans_in(whole))


def _last_begin(log: bytes) -> int:
    """Returns where the last message of a piece of a log begins: lines that go on with one begin with a tab."""
    return max((found.start() for found in _BEGIN.finditer(log)), default=0)


def plans_in(log: bytes) -> Iterator[Plan]:
    """Yields the plans in a piece of PostgreSQL's log."""
    for entry in _ENTRY.findall(log):
        told = json.loads(entry.replace(b"\n\t", b"\n"))
        nodes = [each for each in _nodes(told["Plan"], "") if each[0].get("Actual Loops", 1)]
        discarded: Counter[str] = Counter()
        for node, _ in nodes:
            lost = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
            if lost and "Relation Name" in node:
                discarded[node["Relation Name"]] += round(lost * node.get("Actual Loops", 1))
        yield Plan(
            " ".join(told["Query Text"].split()),
            frozenset((table, node["Index Name"]) for node, table in nodes if "Index Name" in node),
            frozenset(table for node, table in nodes if node["Node Type"] == "Seq Scan"),
            discarded,
        )


def _nodes(node: Mapping[str, Any], table: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields a node and those below it, each with its table: a scan of an index may name it in the node above only."""
    table = node.get("Relation Name", table)
    yield node, table
    for below in node.get("Plans", ()):
        yield from _nodes(below, table)


def _size(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT size FROM pg_stat_file(%s)", (LOG,)).fetchone()
    assert row is not None
    return int(row[0])
