"""GetRunTrace: what is asked, what is answered, and that an answer is bounded in spans, runs, events and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.trace import RunLink, TraceSpan, TraceSpanKind
from perdure_service.durable import run_trace
from perdure_service.durable.requests import RunTrace
from perdure_service.rpc.convert_trace import run_trace as converted

from tests.unit.rpc.doubles import a_run, failing, serving

SPAN = TraceSpan(
    0xAB, 0xCD, "step x", TraceSpanKind.STEP, "foo", 1_000, 2_500, "error", "TimeoutError",
    {"perdure.step_id": 3}, (RunLink("1" * 32, "default.bar.r", "bar"),),
)  # fmt: skip


async def test_the_servicer_asks_for_children_unless_they_are_excluded(service):
    service.script["trace"] = lambda *args, **kwargs: RunTrace("ab" * 16, [SPAN], False)
    async with serving(service) as served:
        answer = await served.runs.GetRunTrace(pb.GetRunTraceRequest(run_id="foo"))
        await served.runs.GetRunTrace(pb.GetRunTraceRequest(namespace="lab", run_id="foo.5", exclude_children=True))
        refused = await failing(served.runs.GetRunTrace(pb.GetRunTraceRequest(run_id="x" * 999)))
    assert (answer.trace_id, len(answer.spans), answer.truncated) == ("ab" * 16, 1, False)
    assert service.calls == [
        ("trace", ("default", "foo"), {"include_children": True}),
        ("trace", ("lab", "foo.5"), {"include_children": False}),
    ]
    assert refused.info.reason == "INVALID_FIELD"
    assert "run_id" in refused.violations


def test_a_span_is_told_as_it_is_exported():
    [span] = converted(RunTrace("ab" * 16, [SPAN], False), 1_000_000).spans
    assert (span.span_id, span.parent_span_id) == ("00000000000000ab", "00000000000000cd")
    assert (span.kind, span.status) == (pb.SPAN_KIND_STEP, pb.SPAN_STATUS_ERROR)
    assert (span.start_time.ToMilliseconds(), span.end_time.ToMilliseconds()) == (1_000, 2_500)
    assert dict(span.attributes) == {"perdure.step_id": "3", "error.type": "TimeoutError"}
    assert [(link.run_id, len(link.span_id)) for link in span.links] == [("bar", 16)]
    [going] = converted(RunTrace("", [TraceSpan(1, None, "x", TraceSpanKind.RUN, "foo", 1)], False), 1_000_000).spans
    assert (going.parent_span_id, going.HasField("end_time")) == ("", False)


def test_an_answer_that_would_be_too_large_is_cut_and_says_so():
    answer = converted(RunTrace("ab" * 16, [SPAN] * 100, False), 2_000)
    assert answer.truncated
    assert 5 < len(answer.spans) < 100
    assert answer.ByteSize() < 2_300


# ---- what is read ----------------------------------------------------------------------------------------------------


class Database:
    """Answers the reads of a trace: runs with their parents, and a log of `steps` steps each."""

    def __init__(self, parents: dict[str, str | None], steps: int = 1) -> None:
        self.parents = parents
        self.steps = steps
        self.reads: list[str] = []

    async def read(self, name: str, function: Any) -> Any:
        self.reads.append(name)
        wanted = function.keywords
        match name:
            case "traces.find":
                return self.row(wanted["workflow_id"])
            case "traces.children":
                found = [one for one, parent in self.parents.items() if parent in wanted["workflow_ids"]]
                return [self.row(one) for one in found[: wanted["limit"]]]
            case _:
                log = self.log()
                return log[wanted["after_sequence"] : wanted["after_sequence"] + 64]

    def row(self, workflow_id: str) -> dict[str, Any]:
        parent = self.parents[workflow_id]
        traceparent = "" if parent is None else f"00-{'ab' * 16}-{run_trace_id(parent):016x}-01"
        return {
            "workflow_id": workflow_id, "namespace": "default", "run_id": workflow_id, "agent": "a",
            "agent_version": "1", "trace_id": "ab" * 16, "traceparent": traceparent,
            "created_at": datetime.fromtimestamp(0, UTC), "forked_from_workflow_id": None,
        }  # fmt: skip

    def log(self) -> Sequence[Event]:
        events = [Event(EventKind.STATE_CHANGED, 1, {"to": "RUNNING", "executor_id": "e"}, execution=1, sequence=1)]
        for n in range(self.steps):
            at = 10 * n
            events.append(Event(EventKind.STEP_STARTED, at, {}, n + 1, "s", 1, 1, len(events) + 1))
            events.append(Event(EventKind.STEP_SUCCEEDED, at + 5, {}, n + 1, "s", 1, 1, len(events) + 1))
        events.append(Event(EventKind.STATE_CHANGED, 10**6, {"to": "SUCCEEDED"}, execution=1, sequence=len(events) + 1))
        return events


def run_trace_id(workflow_id: str) -> int:
    from perdure_service.domain.trace import execution_span_id

    return execution_span_id(workflow_id, 1)


async def traced(database: Database, *, include_children: bool = True) -> RunTrace:
    key = a_run().key
    root = next(iter(database.parents))
    run = a_run(key=type(key)("default", root, root), trace_id="ab" * 16)
    return await run_trace.trace_of(database.read, run, include_children=include_children)


async def test_children_and_theirs_come_below_the_executions_that_started_them():
    database = Database({"r": None, "r-1": "r", "r-2": "r", "r-1-1": "r-1", "other": None})
    found = await traced(database)
    assert [span.run_id for span in found.spans if span.kind is TraceSpanKind.RUN] == ["r", "r-1", "r-1-1", "r-2"]
    assert not found.truncated
    alone = await traced(Database({"r": None, "r-1": "r"}), include_children=False)
    assert {span.run_id for span in alone.spans} == {"r"}


async def test_spans_runs_and_events_are_bounded_and_every_span_has_its_parent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_trace, "MAX_SPANS", 10)
    many = await traced(Database({"r": None}, steps=100))
    assert many.truncated
    assert len(many.spans) == 12, "ten, the run and its execution"
    assert [span.end_ms for span in many.spans[:2]] == [10**6, 10**6], "the frame is read to its end"
    monkeypatch.setattr(run_trace, "MAX_RUNS", 3)
    wide = await traced(Database({"r": None, **{f"r-{n}": "r" for n in range(9)}}, steps=0))
    assert wide.truncated
    assert len({span.run_id for span in wide.spans}) == 3
    monkeypatch.setattr(run_trace, "MAX_EVENTS", 64)
    long = await traced(Database({"r": None}, steps=100))
    assert long.truncated
    assert long.spans[0].end_ms is None, "what was not read is not told"
    for found in (many, wide, long):
        ids = {span.span_id for span in found.spans}
        assert all(span.parent_span_id in ids for span in found.spans if span.parent_span_id is not None)
