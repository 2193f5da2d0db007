"""Writes spans from the log, for what no living execution saw whole; in a thread of its own, off every path.

Who asks: whoever has committed a claim, a decision, or the end of a run from outside (`Spans.committed`), or has
declared an executor gone. What is asked is looked up in the log after that commit, so a claim neither waits for it nor
fails with it.

**Which spans.** After a death, all that ended within a minute before the executor's last sign of life, or later: older
ones have been sent (the exporter's queue is five seconds long, an export takes ten at most). Some of these had been
sent, too. That is harmless: the same events give the same ids, times and attributes, so a collector gets the same span
twice, which it keeps once or shows once. The same holds when two servers write them, or when we die on the next line
and the next claim writes them again.

A run that an executor ended just before it died is claimed by nobody again, and its last spans may have died in the
exporter's queue; so whoever declares an executor gone has those of its last minute written, too.

**What is lost all the same:** spans of the calls of libraries inside a body (they are in no log), and what a dying
server was asked for and had not begun; the next claim asks again. `GetRunTrace` reads the log, and misses nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Flag, auto

import sqlalchemy as sa
import structlog

from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.trace import TracedRun, TraceSpan, TraceSpanKind
from perdure_service.domain.trace_fold import RunFold
from perdure_service.store import event_log, traces
from perdure_service.store.sqlstates import reading

EXPORT_HORIZON_MS = 60_000
"""How long before an executor's last sign of life its spans have certainly been sent."""

MAX_PENDING = 10_000
"""Runs that wait to be written at most; traces of more at once are left to `GetRunTrace`."""

STOP_TIMEOUT_S = 3.0
"""How long a stopping server goes on with what waits."""

log = structlog.get_logger()


class What(Flag):
    """Which spans of a run are asked for."""

    LOST = auto()
    """All that an execution which died, or the end of the run from outside, may have left unwritten."""
    APPROVALS = auto()
    """Approvals that have been closed."""
    RUN = auto()
    """The run's own."""


class TraceWriter:
    """See the module."""

    def __init__(
        self,
        engine: sa.Engine,
        find: Callable[[sa.Connection, str], TracedRun | None],
        write: Callable[[TracedRun, TraceSpan], None],
    ) -> None:
        """Creates the writer; `start` starts its thread.

        Args:
            engine: The database.
            find: Returns what is known of a run.
            write: Sends a span.
        """
        self._engine = engine
        self._find = find
        self._write = write
        self._pending: dict[str, tuple[What, int]] = {}
        self._gone: list[str] = []
        self._full = False
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def ask(self, workflow_id: str, what: What, since_ms: int) -> None:
        """Asks for spans of a run. Returns at once; from any thread.

        Args:
            workflow_id: The run.
            what: Which spans.
            since_ms: Approvals that ended before are left out.
        """
        with self._changed:
            known = self._pending.get(workflow_id)
            if known is None and len(self._pending) >= MAX_PENDING:
                if not self._full:
                    log.warning("trace_writer.full", workflow_id=workflow_id)
                self._full = True
                return
            self._full = False
            before, earliest_ms = known or (what, since_ms)
            self._pending[workflow_id] = (before | what, min(earliest_ms, since_ms))
            self._changed.notify()

    def ask_of(self, executor_ids: Sequence[str]) -> None:
        """Asks for the spans of the runs that executors which are gone had ended last. Returns at once."""
        with self._changed:
            self._gone += executor_ids
            self._changed.notify()

    def stop(self) -> None:
        """Writes what waits, for a moment, and ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._pending and not self._gone and not self._stopping:
                    self._changed.wait()
                if not self._pending and not self._gone:
                    return
                gone, self._gone = self._gone, []
                workflow_id = next(iter(self._pending), "")
                what, since_ms = self._pending.pop(workflow_id, (What.LOST, 0))
            try:
                if gone:
                    self._ask_for_ended(gone)
                if workflow_id:
                    self._write_run(workflow_id, what, since_ms)
            except Exception as error:  # noqa: BLE001 - logged; a trace is never worth more than that
                log.warning("trace_writer.failed", workflow_id=workflow_id, error=type(error).__name__)

    def _ask_for_ended(self, executor_ids: Sequence[str]) -> None:
        for workflow_id in reading(
            self._engine,
            "traces.ended_last",
            lambda conn: traces.ended_last(conn, executor_ids, EXPORT_HORIZON_MS / 1000, MAX_PENDING // 2),
        ):
            self.ask(workflow_id, What.LOST, 0)

    def _write_run(self, workflow_id: str, what: What, since_ms: int) -> None:
        run = reading(self._engine, "traces.find", lambda conn: self._find(conn, workflow_id))
        if run is None or not run.sampled:
            return
        fold = RunFold(run)
        ended = {span.span_id: span for event in self._log(workflow_id) for span in fold.apply(event)}
        horizon_ms = 0 if fold.cut_ms is None else fold.cut_ms - EXPORT_HORIZON_MS
        for span in ended.values():
            assert span.end_ms is not None, "the fold returns what has ended"
            asked = (
                (What.LOST in what and span.end_ms >= horizon_ms)
                or (What.APPROVALS in what and span.kind is TraceSpanKind.APPROVAL and span.end_ms >= since_ms)
                or (What.RUN in what and span.kind is TraceSpanKind.RUN)
            )
            if asked:
                self._write(run, span)

    def _log(self, workflow_id: str) -> Iterator[Event]:
        """Yields a run's log but for its streamed text, of which no span tells."""
        after = 0
        while events := reading(
            self._engine,
            "events.read",
            lambda conn: event_log.read(conn, workflow_id, after),  # noqa: B023 - at once
        ):
            after = events[-1].sequence
            yield from (event for event in events if event.kind is not EventKind.OUTPUT_DELTA)
