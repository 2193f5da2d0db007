"""Breaks a server from the inside; loaded into it by `--agents tests.helpers.chaos`, steered by the environment.

`PERDURE_CHAOS_KILL_AT=n`       dies, as by kill -9, at the nth point: each commit of the seam has two, "everything is
                                written but nothing committed" and "committed, but nobody knows it yet".
`PERDURE_CHAOS_AMBIGUOUS=1`     each commit of the seam but first claims happens, and its reply is lost, once; of the
                                claims of a run that was parked the first one, as each repeat is a claim of its own.
`PERDURE_CHAOS_SQLSTATE=40001`  every third transaction that writes events fails with this SQLSTATE, raised
                                by the database.
`PERDURE_CHAOS_LOSE_CLAIMS=1`   the first claim of each run is committed, and its reply is lost.
`PERDURE_CHAOS_CLOCK_SKEW_S=n`  its clock is n seconds ahead of the database's; the monotonic one stays.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from types import ModuleType
from typing import Any

import psycopg
import sqlalchemy as sa
from grpc._cython import cygrpc
from perdure_service.durable import executions, owners, service
from perdure_service.durable import operation as seam
from perdure_service.rpc import agent_runs, requests
from perdure_service.store import checkpoint_writer, checkpoints, hot_statements

from tests.helpers import agents, chaos_report
from tests.helpers.server import KILLED

KILL_AT = int(os.environ.get("PERDURE_CHAOS_KILL_AT", "0"))
AMBIGUOUS = bool(os.environ.get("PERDURE_CHAOS_AMBIGUOUS"))
SQLSTATE = os.environ.get("PERDURE_CHAOS_SQLSTATE", "")
LOSE_CLAIMS = bool(os.environ.get("PERDURE_CHAOS_LOSE_CLAIMS"))
CLOCK_SKEW_S = int(os.environ.get("PERDURE_CHAOS_CLOCK_SKEW_S", "0"))

_points = itertools.count(1)
_transactions = itertools.count(1)
_claims_lost: set[str] = set()
_write = seam.Operation.write
_run = seam.Operations._run


def _tells(operation: seam.Operation) -> bool:
    """Whether a transaction is one of those that are broken: it writes events, or deletes runs with theirs."""
    return bool(operation._events) or bool(operation.facts.get("deletes"))


def _point(name: str) -> None:
    number = next(_points)
    if number == KILL_AT:
        print(f"chaos: dies at point {number}, {name}", file=sys.stderr, flush=True)
        os._exit(KILLED)


def _broken_write(operation: seam.Operation, conn: sa.Connection) -> None:
    _write(operation, conn)
    if SQLSTATE and operation._events and next(_transactions) % 3 == 0:
        chaos_report.refused(SQLSTATE)
        conn.execute(sa.text("SELECT public.test_raise(:code)"), {"code": SQLSTATE})
    if _tells(operation):
        _point(f"written {sorted(operation._events)}")


@contextmanager
def _broken_run(operations: seam.Operations, operation: seam.Operation, begin: Any) -> Iterator[sa.Connection]:
    @contextmanager
    def begin_and_lose() -> Iterator[sa.Connection]:
        with begin() as conn:
            yield conn
        if _tells(operation):
            _point(f"committed {sorted(operation._events)}")
            if AMBIGUOUS and operation.attempts == 1 and not _is_spared(operation):
                chaos_report.fault("replies to COMMIT lost")
                lost = psycopg.OperationalError("server closed the connection unexpectedly")
                raise sa.exc.OperationalError("COMMIT", None, lost, connection_invalidated=True)
            if LOSE_CLAIMS and _claims_for_the_first_time(operation):
                chaos_report.fault("replies to COMMIT lost")
                raise sa.exc.OperationalError("COMMIT", None, psycopg.OperationalError("lost"))

    with _run(operations, operation, begin_and_lose) as conn:
        yield conn


_packs_lost: set[str] = set()


def _broken_commit(
    writer: checkpoint_writer.CheckpointWriter, conn: sa.Connection, rows: Sequence[checkpoints.CheckpointRow]
) -> dict[str, checkpoints.Written]:
    """Commits a batch in one transaction, whatever its kinds, so that there is a point before the COMMIT."""
    conn.exec_driver_sql("BEGIN")
    written = checkpoints.write_all(conn, rows)
    if SQLSTATE and next(_transactions) % 3 == 0:
        chaos_report.refused(SQLSTATE)
        conn.exec_driver_sql("SELECT public.test_raise(%(code)s)", {"code": SQLSTATE})
    _point(f"written {sorted(written)}")
    conn.exec_driver_sql("COMMIT")
    _point(f"committed {sorted(written)}")
    _lose_reply({row.pack_id for row in rows})
    return written


_plain_begin, _plain_written = checkpoint_writer.CheckpointWriter.begin, checkpoint_writer.written_by
_begun = itertools.count()


def _broken_begin(
    writer: checkpoint_writer.CheckpointWriter, conn: sa.Connection, rows: Sequence[checkpoints.CheckpointRow]
) -> hot_statements.Exchange | None:
    """Leaves each second batch to a thread, where there is a point before the COMMIT, or all, to be refused there."""
    by_thread = (next(_begun) + KILL_AT) % 2 or SQLSTATE
    exchange = None if by_thread else _plain_begin(writer, conn, rows)
    if exchange is not None:
        exchange.packs = {row.pack_id for row in rows}  # type: ignore[attr-defined]
    return exchange


def _broken_written(exchange: hot_statements.Exchange) -> dict[str, checkpoints.Written]:
    written = _plain_written(exchange)
    _point(f"committed {sorted(written)}")
    _lose_reply(exchange.packs)  # type: ignore[attr-defined]
    return written


def _lose_reply(packs: set[str]) -> None:
    if AMBIGUOUS and packs - _packs_lost:
        _packs_lost.update(packs)
        chaos_report.fault("replies to COMMIT lost")
        lost = psycopg.OperationalError("server closed the connection unexpectedly")
        raise sa.exc.OperationalError("COMMIT", None, lost, connection_invalidated=True)


def _is_spared(operation: seam.Operation) -> bool:
    """Whether it claims a run for the first time, or one of which a claim's reply was lost already."""
    if _claims_for_the_first_time(operation):
        return True
    claimed = {
        workflow_id
        for workflow_id, events in operation._events.items()
        for event in events
        if event.data.get("from") == "QUEUED" and event.data.get("to") == "RUNNING"
    }
    spared = bool(claimed & _claims_lost)
    _claims_lost.update(claimed)
    return spared


def _claims_for_the_first_time(operation: seam.Operation) -> bool:
    return any(
        event.data.get("from") == "QUEUED" and event.data.get("to") == "RUNNING" and event.execution == 1
        for events in operation._events.values()
        for event in events
    )


_time, _time_ns = time.time, time.time_ns
_begin = executions.Execution.__init__


class _SkewedDatetime(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.fromtimestamp(time.time(), tz)


def _begin_skewed(execution: executions.Execution, *arguments: Any, **rest: Any) -> None:
    _begin(execution, *arguments, **rest)
    execution.begun_ns = time.time_ns()  # the default was bound before the clock was set


if CLOCK_SKEW_S:
    chaos_report.fault("clocks an hour wrong")
    # gRPC is told of a call's deadline as a time to live, and adds that to the clock of its C core.
    cygrpc.time = ModuleType("time")
    cygrpc.time.__dict__.update(time.__dict__)
    time.time = lambda: _time() + CLOCK_SKEW_S
    time.time_ns = lambda: _time_ns() + CLOCK_SKEW_S * 1_000_000_000
    executions.Execution.__init__ = _begin_skewed  # type: ignore[method-assign]
    for module in (agent_runs, requests, service):
        module.datetime = _SkewedDatetime  # type: ignore[attr-defined]

if LOSE_CLAIMS or AMBIGUOUS:
    owners.GRACE_S = 1.0
    owners.SEARCH_S = 1.5

seam.Operation.write = _broken_write  # type: ignore[method-assign]
seam.Operations._run = _broken_run  # type: ignore[method-assign]
checkpoint_writer.CheckpointWriter.commit = _broken_commit  # type: ignore[method-assign]
checkpoint_writer.CheckpointWriter.begin = _broken_begin  # type: ignore[method-assign]
checkpoint_writer.written_by = _broken_written

counter = agents.counter
"""So that this module, too, declares an agent."""
