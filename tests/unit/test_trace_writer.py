"""The writer of spans from the log: what it writes when, and that it never gets in anybody's way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa
from perdure_service.domain.events import APPROVAL_STEP, Event, EventKind
from perdure_service.domain.runs import RunKey
from perdure_service.domain.trace import TracedRun, TraceSpan
from perdure_service.durable import trace_writer
from perdure_service.durable.trace_writer import EXPORT_HORIZON_MS, TraceWriter, What
from structlog.testing import capture_logs

RUN = TracedRun(RunKey.of_api("default", "foo"), "research", "1", "ab" * 16, create_ms=1_000)
LATE_MS = 10 * EXPORT_HORIZON_MS


def _log() -> list[Event]:
    """A run whose first step ended long before its executor's death, and the second just before."""
    rows: list[tuple[EventKind, int, dict[str, Any], int, str]] = [
        (EventKind.STATE_CHANGED, 1_000, {"to": "RUNNING", "executor_id": "e-1"}, 0, ""),
        (EventKind.STEP_STARTED, 2_000, {}, 1, "early"),
        (EventKind.STEP_SUCCEEDED, 3_000, {}, 1, "early"),
        (EventKind.APPROVAL_REQUESTED, 4_000, {"approval_id": "foo/2"}, 2, APPROVAL_STEP),
        (EventKind.APPROVAL_DECIDED, 5_000, {"approval_id": "foo/2", "state": "APPROVED"}, 2, APPROVAL_STEP),
        (EventKind.STEP_STARTED, LATE_MS, {}, 3, "late"),
        (EventKind.STEP_SUCCEEDED, LATE_MS + 1, {}, 3, "late"),
        (EventKind.STEP_STARTED, LATE_MS + 2, {}, 4, "lost"),
        (EventKind.OUTPUT_DELTA, LATE_MS + 3, {"stream": "s", "text": "x"}, 4, "lost"),
        (EventKind.RECOVERED, LATE_MS + 50, {"from_executor_id": "e-1", "gap_ms": 40}, 0, ""),
        (EventKind.STATE_CHANGED, LATE_MS + 50, {"to": "QUEUED", "from": "RUNNING"}, 0, ""),
    ]
    return [
        Event(kind, at, data, step_id, name, 1 if step_id else 0, 1, number)
        for number, (kind, at, data, step_id, name) in enumerate(rows, start=1)
    ]


@dataclass
class Bench:
    """A writer on a scripted database."""

    written: list[TraceSpan] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    run: TracedRun | None = RUN
    writer: TraceWriter = field(init=False)

    def retrying(self, _engine: Any, name: str, fn: Any) -> Any:
        self.reads.append(name)
        match name:
            case "traces.find":
                if self.run is None:
                    raise ConnectionError("gone")
                return self.run
            case "traces.ended_last":
                return self.ended
            case _:
                fn(self)  # asks for the page after what it has seen
                return self.page

    def execute(self, _statement: Any, values: dict[str, Any]) -> Any:
        self.page = _log()[values["next_sequence"] - 1 :][:5]
        return self

    def fetchall(self) -> list[Any]:
        return []

    def names(self) -> list[str]:
        return [span.name for span in self.written]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench()
    engine = sa.create_engine("sqlite://")
    bench.writer = TraceWriter(engine, lambda _conn, _id: bench.run, lambda _run, span: bench.written.append(span))
    monkeypatch.setattr(trace_writer, "reading", bench.retrying)
    yield bench
    bench.writer.stop()
    engine.dispose()


def finish(bench: Bench) -> None:
    """Lets it work and end: what was asked for before the end is written."""
    bench.writer.start()
    bench.writer.stop()


def test_after_a_death_all_that_may_have_been_unsent_is_written(bench: Bench) -> None:
    bench.writer.ask("w", What.LOST, LATE_MS)
    finish(bench)
    assert bench.names() == ["attempt", "step late", "attempt", "step lost", "execution", "wait recovery"]


def test_a_decision_writes_its_approval_only(bench: Bench) -> None:
    bench.writer.ask("w", What.APPROVALS, 5_000)
    finish(bench)
    assert bench.names() == ["approval"]
    assert bench.written[0].end_ms == 5_000


def test_an_approval_that_was_closed_before_is_not_written_again(bench: Bench) -> None:
    bench.writer.ask("w", What.APPROVALS, 5_001)
    finish(bench)
    assert bench.written == []


def test_a_run_that_is_asked_for_twice_is_read_once(bench: Bench) -> None:
    bench.writer.ask("w", What.APPROVALS, 5_000)
    bench.writer.ask("w", What.LOST, LATE_MS)
    finish(bench)
    assert bench.reads.count("traces.find") == 1
    assert set(bench.names()) >= {"approval", "step lost"}


def test_runs_that_a_dead_executor_had_ended_last_are_written_too(bench: Bench) -> None:
    bench.ended = ["w-1", "w-2"]
    bench.writer.ask_of(["e-1"])
    finish(bench)
    assert bench.names().count("step lost") == 2


def test_what_the_caller_did_not_want_traced_is_not_written(bench: Bench) -> None:
    bench.run = TracedRun(RUN.key, "a", "1", "ab" * 16, f"00-{'ab' * 16}-{'cd' * 8}-00")
    bench.writer.ask("w", What.LOST, 0)
    finish(bench)
    assert bench.written == []
    assert "events.read" not in bench.reads


def test_a_failure_is_logged_and_the_next_run_is_written(bench: Bench) -> None:
    def find(_engine: Any, name: str, fn: Any) -> Any:
        if name == "traces.find" and not bench.reads:
            bench.reads.append(name)
            raise ConnectionError("gone")
        return bench.retrying(_engine, name, fn)

    trace_writer.reading = find  # type: ignore[attr-defined]
    bench.writer.ask("w-1", What.LOST, 0)
    bench.writer.ask("w-2", What.LOST, 0)
    with capture_logs() as lines:
        finish(bench)
    assert [line["event"] for line in lines] == ["trace_writer.failed"]
    assert bench.names().count("step lost") == 1


def test_it_takes_no_more_than_it_can_hold(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_writer, "MAX_PENDING", 2)
    with capture_logs() as lines:
        for name in ("w-1", "w-2", "w-3", "w-1"):
            bench.writer.ask(name, What.LOST, 0)
    assert [line["workflow_id"] for line in lines] == ["w-3"]
    finish(bench)
    assert bench.names().count("step lost") == 2
