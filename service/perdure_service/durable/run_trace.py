"""Puts the trace of a run together from the database: its spans, and those of the runs that it has started.

It is bounded: `MAX_SPANS` spans, `MAX_RUNS` runs and `MAX_EVENTS` events are looked at, and an answer that would need
more says that it is truncated; so does one of a run whose log is no longer kept from its beginning. Runs and executions
are always there, so every span has its parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from perdure_service.domain.events import Event
from perdure_service.domain.runs import Run
from perdure_service.domain.trace import TraceSpan, TraceSpanKind, in_tree_order
from perdure_service.domain.trace_fold import RunFold
from perdure_service.durable.executions import now_ms
from perdure_service.durable.requests import RunTrace
from perdure_service.durable.spans import traced_run
from perdure_service.durable.view import Read
from perdure_service.store import event_log, traces

MAX_SPANS = 5_000
"""Spans in one answer: about 3 MiB, below the 4 MiB that clients take by default."""

MAX_RUNS = 500
"""Runs of one answer: the run, its children, theirs, and so on."""

MAX_EVENTS = 200_000
"""Events that are read for one answer, pieces of streamed text among them: some seconds."""

_FRAME = frozenset({TraceSpanKind.RUN, TraceSpanKind.EXECUTION})


async def trace_of(read: Read, run: Run, *, include_children: bool) -> RunTrace:
    """Returns the trace of a run as its log tells of it now.

    Args:
        read: Runs a reading transaction.
        run: The run.
        include_children: Whether with the runs it has started, and theirs.
    """
    gathering = _Gathering(read)
    row = await read("traces.find", partial(traces.find, workflow_id=run.key.workflow_id))
    level: list[Mapping[str, Any]] = [] if row is None else [row]
    while level:
        for one in level:
            await gathering.add(one)
        level = await gathering.children(level) if include_children else []
    spans = list(in_tree_order(gathering.spans))
    return RunTrace(run.trace_id, spans, gathering.truncated)


class _Gathering:
    """The spans so far."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self.spans: list[TraceSpan] = []
        self.truncated = False
        self._runs = 0
        self._events = 0

    async def add(self, row: Mapping[str, Any]) -> None:
        """Adds the spans of a run."""
        self._runs += 1
        fold = RunFold(traced_run(row))
        ended: dict[int, TraceSpan] = {}
        after = 0
        while events := await self._page(row["workflow_id"], after):
            self.truncated |= events[0].sequence != after + 1
            after = events[-1].sequence
            for event in events:
                for span in fold.apply(event):
                    self._keep(ended, span)
        for span in fold.open_spans(now_ms()):
            self._keep(ended, span)
        self.spans += ended.values()

    async def children(self, level: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Returns the runs that those of a level have started."""
        room = MAX_RUNS - self._runs
        ids = [row["workflow_id"] for row in level]
        namespace = level[0]["namespace"]  # of all: that of the run whose trace it is
        found = await self._read(
            "traces.children", partial(traces.children, namespace=namespace, workflow_ids=ids, limit=room + 1)
        )
        if len(found) > room:
            self.truncated = True
        return found[:room]

    async def _page(self, workflow_id: str, after: int) -> list[Event]:
        if self._events >= MAX_EVENTS:
            self.truncated = True
            return []
        events = await self._read("events.read", partial(event_log.read, workflow_id=workflow_id, after_sequence=after))
        self._events += len(events)
        return events

    def _keep(self, ended: dict[int, TraceSpan], span: TraceSpan) -> None:
        if span.kind in _FRAME or len(self.spans) + len(ended) < MAX_SPANS:
            ended[span.span_id] = span
        else:
            self.truncated = True
