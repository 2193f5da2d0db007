"""One trace a run: from the caller's span to the attempts of its steps, also through a kill -9 of the server."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from perdure.v1.agent_run_service_pb2 import StartAgentRequest
from perdure.v1.agent_run_service_pb2_grpc import AgentRunServiceStub
from perdure_client import Client, RunState

from tests.helpers.server import ServerProcess, create_effects_table
from tests.helpers.waiting import eventually
from tests.unit.telemetry.sink import Sink, attributes_of, grpc_sink

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_SPAN = "b7ad6b7169203331"


@pytest.fixture
def sink() -> Iterator[Sink]:
    with grpc_sink() as sink:
        yield sink


@pytest.fixture
def server(database_url: str, sink: Sink) -> Iterator[ServerProcess]:
    create_effects_table(database_url)
    server = ServerProcess(
        database_url,
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
        OTEL_EXPORTER_OTLP_INSECURE="true",
        OTEL_BSP_SCHEDULE_DELAY="100",
    )
    try:
        yield server
    finally:
        server.__exit__()


def _start(server: ServerProcess, agent: str, run_id: str, input_json: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        AgentRunServiceStub(channel).StartAgent(
            StartAgentRequest(agent=agent, run_id=run_id, request_id=run_id, input_json=input_json),
            metadata=(("traceparent", f"00-{TRACE_ID}-{CALLER_SPAN}-01"),),
        )


def _tree(sink: Sink, run_id: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Returns the run's spans: name, execution, step and attempt joined, with the name of the parent."""
    spans = [span for span in sink.spans if attributes_of(span).get("perdure.run_id") == run_id]
    assert all(span.trace_id.hex() == TRACE_ID for span in spans)

    def label(span: object) -> str:
        attributes = attributes_of(span)
        parts = [attributes.get(f"perdure.{name}") for name in ("execution", "step_id", "attempt")]
        name = span.name  # type: ignore[attr-defined]
        return name if name.startswith("agent_run") else " ".join([name, *(str(p) for p in parts if p is not None)])

    by_id = {span.span_id: label(span) for span in spans}
    return {
        label(span): (by_id.get(span.parent_span_id, span.parent_span_id.hex()), attributes_of(span)) for span in spans
    }


def test_the_trace_of_a_run_is_a_tree_under_the_callers_span(server: ServerProcess, sink: Sink) -> None:
    server.start()
    _start(server, "flaky", "traced", '{"failures": 2}')
    with Client(server.address) as client:
        run = client.wait("traced")
        assert run.trace_id == TRACE_ID
    server.stop()
    tree = {name: parent for name, (parent, _) in _tree(sink, "traced").items()}
    assert tree == {
        "agent_run flaky": CALLER_SPAN,
        "execution 1": "agent_run flaky",
        "step flaky_step 1 1": "execution 1",
        "attempt 1 1 1": "step flaky_step 1 1",
        "attempt 1 1 2": "step flaky_step 1 1",
        "attempt 1 1 3": "step flaky_step 1 1",
    }


def _once(spans: list[Span]) -> dict[str, Span]:
    """Returns spans by their ids; one that was sent twice must be the same."""
    known: dict[str, Span] = {}
    for span in spans:
        assert known.setdefault(span.span_id.hex(), span) == span, f"{span.name} has two contents"
    return known


def test_the_whole_tree_is_there_although_a_server_was_killed(server: ServerProcess, sink: Sink) -> None:
    server.start()
    _start(server, "storied", "told", '{"delay_s": 1}')
    with Client(server.address) as client:
        approval = eventually(lambda: next(client.approvals(run="told"), None))
        client.approve(approval)
        eventually(lambda: [one for one in client.steps("told") if one.step_name == "count_one"])
    server.kill()
    server.start()
    with Client(server.address) as client:
        eventually(lambda: client.get("told").state is RunState.AWAITING_INPUT, 30)
        client.signal("told", "more", "word")
        run = client.wait("told", timeout=30)
        assert run.output == ["after 2", True, 0, "child 1", "word"]
        answer = client.trace("told")
        alone = client.trace("told", children=False)
    server.stop()

    told = [span for span in sink.spans if str(attributes_of(span).get("perdure.run_id")).startswith("told")]
    assert {span.trace_id.hex() for span in told} == {TRACE_ID} == {answer.trace_id}
    spans = _once(told)
    for span in spans.values():
        assert span.parent_span_id.hex() in {*spans, CALLER_SPAN}, f"the parent of {span.name} is missing"

    [child] = [span.run_id for span in answer.spans if span.name == "agent_run plain_child"]
    assert sorted(_label(span) for span in spans.values()) == sorted(
        [
            "agent_run storied",
            "execution 1: ExecutionLost",
            "step flaky_step 1",
            "attempt flaky_step 1 1: FlakyError",
            "attempt flaky_step 1 2",
            "approval 1",
            "step count_one 1: ExecutionLost",
            "attempt count_one 1 1: ExecutionLost",
            "wait recovery",
            "wait queued",
            "execution 2",
            "step count_one 2",
            "attempt count_one 2 1",
            "step DBOS.getResult 2",
            "wait sleep 2",
            "wait signal more 2",
            *(_label(span) for span in spans.values() if attributes_of(span)["perdure.run_id"] == child),
        ]
    )
    run_of_child = next(span for span in spans.values() if span.name == "agent_run plain_child")
    assert _label(spans[run_of_child.parent_span_id.hex()]) == "execution 1: ExecutionLost"
    recovery = next(span for span in spans.values() if span.name == "wait recovery")
    lost = next(span for span in spans.values() if _label(span) == "execution 1: ExecutionLost")
    assert attributes_of(recovery)["perdure.from_executor_id"] == attributes_of(lost)["perdure.executor_id"]
    assert recovery.end_time_unix_nano == lost.end_time_unix_nano >= recovery.start_time_unix_nano

    # What the API answers from the database is what was exported.
    assert {span.span_id: (span.parent_span_id, span.name, dict(span.attributes)) for span in answer.spans} == {
        span_id: (span.parent_span_id.hex(), span.name, {k: str(v) for k, v in attributes_of(span).items()})
        for span_id, span in spans.items()
    }
    assert {span.run_id for span in answer.spans} == {"told", child}
    assert [span for span in answer.spans if span.run_id == "told"] == list(alone.spans)


def _label(span: Span) -> str:
    attributes = attributes_of(span)
    parts = [span.name]
    if span.name == "attempt":
        parts.append(str(attributes["perdure.step_name"]))
    if not span.name.startswith("agent_run"):
        parts += [str(attributes[key]) for key in ("perdure.execution", "perdure.attempt") if key in attributes]
    error = attributes.get("error.type")
    return " ".join(parts) + (f": {error}" if error else "")


def test_a_run_that_is_cancelled_while_no_executor_has_it_is_told_to_its_end(server: ServerProcess, sink: Sink) -> None:
    server.start()
    _start(server, "listener", "cut", "{}")
    with Client(server.address) as client:
        eventually(lambda: client.get("cut").state is RunState.AWAITING_INPUT)
    server.kill()
    # Another kind of server: it does not have the agent, so nobody takes the run again.
    other = ServerProcess(server.database_url, "perdure_service.agents.notes", **server.environment)
    with other, Client(other.address) as client:
        eventually(lambda: client.get("cut").state is RunState.QUEUED)
        client.cancel("cut", reason="enough")
        other.stop()
    spans = _once([span for span in sink.spans if attributes_of(span).get("perdure.run_id") == "cut"])
    assert sorted(_label(span) for span in spans.values()) == [
        "agent_run listener: CANCELLED",
        "execution 1: ExecutionLost",
        "wait queued",
        "wait recovery",
        "wait signal more 1",
    ]


def test_a_run_without_a_callers_span_has_a_trace_of_its_own(server: ServerProcess, sink: Sink) -> None:
    server.start()
    with Client(server.address) as client:
        client.start("counter", {"steps": 1}, run_id="own-trace")
        run = client.wait("own-trace")
    server.stop()
    roots = [span for span in sink.spans if span.name == "agent_run counter"]
    assert [(span.trace_id.hex(), span.parent_span_id) for span in roots] == [(run.trace_id, b"")]
