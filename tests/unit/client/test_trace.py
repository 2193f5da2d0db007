"""How a trace is drawn: a tree beside bars, at any width, and what the command and the client make of the answer."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import run_event_pb2
from perdure_client import AsyncClient, RunTrace, SpanKind, SpanLink, SpanStatus, TraceSpan
from perdure_client._transport import GET_RUN_TRACE, LIST_RUN_EVENTS
from perdure_client.cli._app import app
from perdure_client.cli._trace import ASCII, FINE, drawn
from rich.cells import cell_len
from typer.testing import CliRunner

from tests.unit.client.scripted import ScriptedServer

BEGAN = datetime(2030, 1, 1, 12, tzinfo=UTC)
AGENT = {"perdure.agent": "research"}


def span(
    span_id: str, parent: str, kind: SpanKind, begin: float, end: float | None, name: str = "", **fields: Any
) -> TraceSpan:
    return TraceSpan(
        span_id=span_id,
        parent_span_id=parent,
        name=name or str(kind),
        kind=kind,
        run_id=fields.pop("run_id", "r"),
        start_time=BEGAN + timedelta(seconds=begin),
        end_time=None if end is None else BEGAN + timedelta(seconds=end),
        **fields,
    )


def step(span_id: str, begin: float, end: float | None, name: str, **fields: Any) -> TraceSpan:
    return span(span_id, "e", SpanKind.STEP, begin, end, attributes={"perdure.step_name": name}, **fields)


def attempt(number: int, of: str, begin: float, end: float | None, **fields: Any) -> TraceSpan:
    more = fields.pop("attributes", {})
    attributes = {"perdure.attempt": str(number), **more}
    return span(f"{of}/{number}", of, SpanKind.ATTEMPT, begin, end, attributes=attributes, **fields)


FAILED = {"status": SpanStatus.ERROR, "error_type": "TimeoutError"}
TRACE = RunTrace(
    trace_id="4bf9",
    spans=(
        span("run", "caller", SpanKind.RUN, 0, 10, attributes=AGENT, status=SpanStatus.OK),
        span("w", "run", SpanKind.WAIT, 0, 2, "wait queued"),
        span("e", "run", SpanKind.EXECUTION, 2, 10, attributes={"perdure.execution": "1"}),
        step("s1", 2, 4, "retrieve"),
        attempt(1, "s1", 2, 4, attributes={"perdure.input_tokens": "1200", "perdure.output_tokens": "80"}),
        step("s2", 4, 7, "ask_model"),
        attempt(1, "s2", 4, 5, **FAILED),
        attempt(2, "s2", 6, 7),
        span(
            "a", "e", SpanKind.APPROVAL, 7, 9, "approval",
            attributes={"perdure.approval_state": "REJECTED", "perdure.decided_by": "ann"},
        ),
        span("c", "e", SpanKind.RUN, 7, 8, attributes={"perdure.agent": "child"}, run_id="r.4"),
    ),
)  # fmt: skip


def lines(found: RunTrace, width: int = 80, now: datetime = BEGAN, **options: Any) -> list[str]:
    return [line.plain.rstrip() for line in drawn(found, width, now=now, **options)]


def test_the_waterfall() -> None:
    assert lines(TRACE, 96, signs=ASCII)[1:] == [
        "                   0                     5.0 s            10.0 s",
        "research  r        =============================================       10.0 s",
        "|- wait queued     .........                                            2.0 s",
        "`- execution 1              ====================================        8.0 s",
        "   |- retrieve              =========                                   2.0 s  1200 -> 80 tokens",
        "   |- ask_model                      =============                      3.0 s",
        "   |  |- attempt 1                   ====                               1.0 s  TimeoutError",
        "   |  `- attempt 2                            ====                      1.0 s",
        "   |- approval                                    ?????????             2.0 s  REJECTED by ann",
        "   `- child  r.4                                  =====                 1.0 s",
        "10.0 s, 4.0 s of it with something waiting, 1 failed attempt, 1 child run, 1200 -> 80 tokens",
    ]


@pytest.mark.parametrize("width", [40, 60, 71, 72, 100, 200])
@pytest.mark.parametrize("signs", [FINE, ASCII])
def test_a_drawing_fits(width: int, signs: Any) -> None:
    *drawing, summary = lines(TRACE, width, signs=signs)
    assert max(cell_len(line) for line in drawing[1:]) <= width
    assert "TimeoutError" in "\n".join(drawing) or width < 100
    assert summary.startswith("10.0 s")


def test_what_goes_on_reaches_to_now_and_says_so() -> None:
    spans = (span("run", "", SpanKind.RUN, 0, None, attributes=AGENT), span("w", "run", SpanKind.WAIT, 0, 1, "wait x"))
    drawing = lines(RunTrace(trace_id="t", spans=spans), 60, now=BEGAN + timedelta(seconds=4), signs=FINE)
    assert drawing[2].endswith("▸      4.0 s …")
    assert "┄" in drawing[3]
    assert "…" not in drawing[3]


def test_text_of_others_does_not_steer_the_terminal() -> None:
    bad = step("s", 0, 1, "evil\x1b[2J\nname", status=SpanStatus.ERROR, error_type="E\x07r")
    text = "\n".join(lines(RunTrace(trace_id="\x1bt", spans=(bad,))))
    assert "\x1b" not in text
    assert "\x07" not in text


def test_nothing_is_drawn_of_nothing() -> None:
    assert lines(RunTrace(trace_id="t", spans=())) == []


def test_all_in_one_moment() -> None:
    assert len(lines(RunTrace(trace_id="t", spans=(span("run", "", SpanKind.RUN, 0, 0, attributes=AGENT),)))) == 4


def test_a_fork_says_where_it_comes_from() -> None:
    link = SpanLink(trace_id="1", span_id="2", run_id="origin")
    found = RunTrace(trace_id="t", spans=(span("run", "", SpanKind.RUN, 0, 1, attributes=AGENT, links=(link,)),))
    assert "forked from origin" in lines(found, 120)[2]


async def test_the_client_returns_typed_spans(server: ScriptedServer, client: AsyncClient) -> None:
    message = pb.TraceSpan(
        span_id="1", parent_span_id="0", name="step x", kind=pb.SPAN_KIND_STEP, run_id="r",
        start_time=Timestamp(seconds=1), end_time=Timestamp(seconds=3), status=pb.SPAN_STATUS_ERROR, error_type="E",
        attributes={"b": "2", "a": "1"}, links=[pb.SpanLink(trace_id="9", span_id="8", run_id="o")],
    )  # fmt: skip
    newer = pb.TraceSpan(kind=99)  # type: ignore[arg-type]
    server.script(GET_RUN_TRACE, pb.GetRunTraceResponse(trace_id="t", spans=[message, newer], truncated=True))
    found = await client.trace("r", children=False)
    assert (found.trace_id, found.truncated) == ("t", True)
    first, second = found.spans
    assert (first.kind, first.status, first.duration) == (SpanKind.STEP, SpanStatus.ERROR, timedelta(seconds=2))
    assert list(first.attributes) == ["a", "b"]
    assert first.links == (SpanLink(trace_id="9", span_id="8", run_id="o"),)
    assert (second.kind, second.status, second.end_time) == (SpanKind.UNKNOWN, SpanStatus.UNSET, None)
    [request] = server.asked(GET_RUN_TRACE)
    assert (request.run_id, request.exclude_children) == ("r", True)


def test_what_errors_say_stands_beside_the_attempts_and_never_breaks_the_lines() -> None:
    drawing = lines(TRACE, 100, messages={"s2/1": "no answer\nwithin 30 s\x1b[2J", "s1/1": "unused: it succeeded"})
    [line] = [line for line in drawing if "attempt 1" in line]
    assert "TimeoutError: no answer within" in line
    assert "\x1b" not in line
    assert "unused" not in "\n".join(drawing)
    narrow = lines(TRACE, 40, messages={"s2/1": "x" * 200})
    assert max(cell_len(line) for line in narrow[1:-1]) <= 40


async def test_the_command_reads_what_the_errors_of_the_runs_own_attempts_say(server: ScriptedServer) -> None:
    def failed(run_id: str, step_id: int, attempt: int) -> pb.TraceSpan:
        numbers = {"perdure.execution": "1", "perdure.step_id": str(step_id), "perdure.attempt": str(attempt)}
        return pb.TraceSpan(
            span_id=f"{run_id}/{step_id}/{attempt}", name="attempt", kind=pb.SPAN_KIND_ATTEMPT, run_id=run_id,
            status=pb.SPAN_STATUS_ERROR, error_type="E", attributes=numbers,
            start_time=Timestamp(seconds=1), end_time=Timestamp(seconds=3),
        )  # fmt: skip

    def event(attempt: int, **data: Any) -> run_event_pb2.RunEvent:
        return run_event_pb2.RunEvent(sequence=attempt, execution=1, step_id=4, attempt=attempt, **data)

    retrying = run_event_pb2.StepRetrying(error={"type": "E", "message": "try one"})
    gave_up = run_event_pb2.StepFailed(error={"type": "Max", "message": "too often", "cause": "E: try two"})
    spans = [failed("r", 4, 1), failed("r", 4, 2), failed("r.5", 4, 1)]
    server.script(GET_RUN_TRACE, pb.GetRunTraceResponse(spans=spans))
    events = [event(1, step_retrying=retrying), event(2, step_failed=gave_up)]
    server.script(LIST_RUN_EVENTS, pb.ListRunEventsResponse(events=events))
    result = await asyncio.to_thread(CliRunner().invoke, app, ["--address", server.address, "trace", "r"])
    assert result.exit_code == 0, result.output
    remarks = [line.rpartition("  ")[2] for line in result.stdout.splitlines() if "attempt " in line]
    assert remarks[:3] == ["E: try one", "E: try two", "E"], "those of children are in their own events"


async def test_the_command_draws_also_into_a_pipe_and_gives_json_when_asked(server: ScriptedServer) -> None:
    message = pb.TraceSpan(
        span_id="1", name="agent_run a", kind=pb.SPAN_KIND_RUN, run_id="r", attributes={"perdure.agent": "a"},
        start_time=Timestamp(seconds=1), end_time=Timestamp(seconds=3),
    )  # fmt: skip
    answer = pb.GetRunTraceResponse(trace_id="t", spans=[message], truncated=True)
    server.script(GET_RUN_TRACE, answer, answer)

    async def perdure(*arguments: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, ["--address", server.address, "trace", *arguments])

    result = await perdure("r", "--no-children")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[2].startswith("a  r ")
    assert "Spans are missing" in result.stderr
    result = await perdure("r", "-o", "json")
    value = json.loads(result.stdout)
    assert value["truncated"]
    assert value["spans"][0]["kind"] == "RUN"
    assert [request.exclude_children for request in server.asked(GET_RUN_TRACE)] == [True, False]
