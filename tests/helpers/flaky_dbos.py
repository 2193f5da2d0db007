"""A process that runs DBOS workflows on a database that keeps failing: `python -m tests.helpers.flaky_dbos URL SEED`.

Plain DBOS on our engine, without our system database: what is tried is the engine's translation of errors. Of all
statements and of all commits a share is answered by the server with 40001; and a share of the commits succeeds but is
answered with 40003 ("result is ambiguous"), as if the reply had been lost.
"""

from __future__ import annotations

import collections
import json
import os
import random
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import dbos._sys_db
import sqlalchemy as sa
from dbos import DBOS, DBOSConfig
from perdure_service.store.engine import create_engine

WORKFLOWS = 24
STATEMENT_FAILURES = 0.1
COMMIT_FAILURES = 0.1
AMBIGUOUS_COMMITS = 0.08
BACKOFF_FACTOR = 0.01
"""DBOS waits for 0.5 to 1.5 s before it repeats; here only this share of that."""


class _Hurried:
    """`time` for DBOS's system database, with shorter sleeps."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds * BACKOFF_FACTOR)


def _raise(code: str) -> str:
    return f"DO $$ BEGIN RAISE EXCEPTION 'made to fail' USING ERRCODE = '{code}'; END $$"


class Faults:
    """Injects errors that the server raises, so that each driver makes its own exceptions of them."""

    def __init__(self, engine: sa.Engine, seed: int) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.enabled = False
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._commit = engine.dialect.do_commit
        sa.event.listen(engine, "before_cursor_execute", self._before_statement, retval=True)
        engine.dialect.do_commit = self._do_commit  # type: ignore[method-assign]

    def _happens(self, probability: float, what: str) -> bool:
        with self._lock:
            happens = self.enabled and self._rng.random() < probability
            self.counts[what] += happens
            return happens

    def _before_statement(
        self, _conn: sa.Connection, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool
    ) -> tuple[str, Any]:
        if self._happens(STATEMENT_FAILURES, "statements"):
            return _raise("40001"), {}
        return statement, parameters

    def _do_commit(self, connection: Any) -> None:
        if self._happens(COMMIT_FAILURES, "commits"):
            connection.cursor().execute(_raise("40001"))
        self._commit(connection)
        if self._happens(AMBIGUOUS_COMMITS, "ambiguous"):
            connection.cursor().execute(_raise("40003"))


effects: collections.Counter[str] = collections.Counter()


@DBOS.step()
def add(workflow: str, x: int) -> int:
    """A step whose body counts how often it ran."""
    effects[f"{workflow}:{x}"] += 1
    return x + 1


@DBOS.workflow()
def count_to_three(x: int) -> int:
    """Steps and an event."""
    workflow = str(DBOS.workflow_id)
    for _ in range(3):
        x = add(workflow, x)
    DBOS.set_event("reached", x)
    return x


def main(url: str, seed: int) -> None:
    """Runs the workflows with faults and prints what became of them as JSON."""
    engine = create_engine(url, pool_size=10, statement_timeout=timedelta(seconds=20))
    faults = Faults(engine, seed)
    config: DBOSConfig = {
        "name": "flaky",
        "system_database_url": url,
        "system_database_engine": engine,
        "use_listen_notify": False,
        "enable_otlp": False,
        "log_level": "ERROR",
    }
    DBOS(config=config)
    DBOS.launch()
    dbos._sys_db.time = _Hurried()  # type: ignore[assignment]
    faults.enabled = True
    handles = [DBOS.start_workflow(count_to_three, 0) for _ in range(WORKFLOWS)]
    results = [handle.get_result() for handle in handles]
    events = [DBOS.get_event(handle.workflow_id, "reached", timeout_seconds=10) for handle in handles]
    statuses = collections.Counter(handle.get_status().status for handle in handles)
    faults.enabled = False
    steps = [len(DBOS.list_workflow_steps(handle.workflow_id)) for handle in handles]
    report = {
        "results": results,
        "events": events,
        "statuses": statuses,
        "steps": steps,
        "most_effects": max(effects.values()),
        "faults": faults.counts,
    }
    print(json.dumps(report), flush=True)
    os._exit(0)  # DBOS's threads are not daemons


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
