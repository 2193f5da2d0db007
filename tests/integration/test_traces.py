"""One trace a run: from the caller's span to the attempts of its steps, also through a kill -9 of the server."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from perdure.v1.agent_run_service_pb2 import StartAgentRequest
from perdure.v1.agent_run_service_pb2_grpc import AgentRunServiceStub
from perdure_client import Client

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


def test_the_trace_goes_on_where_another_process_ended_it(server: ServerProcess, sink: Sink) -> None:
    server.start()
    _start(server, "counter", "killed", '{"steps": 3, "delay_s": 0.8}')
    eventually(lambda: any(name.startswith("step count_one 1 1") for name in _tree(sink, "killed")))
    server.kill()
    server.start()
    with Client(server.address) as client:
        client.wait("killed", timeout=30)
    server.stop()
    tree = {name: parent for name, (parent, _) in _tree(sink, "killed").items()}
    assert tree["agent_run counter"] == CALLER_SPAN
    assert tree["execution 2"] == "agent_run counter"
    steps = {name: parent for name, parent in tree.items() if name.startswith("step ")}
    assert {name.split()[-1] for name in steps} == {"1", "2", "3"}, "each finished step has one span"
    assert len(steps) == 3
    assert steps["step count_one 2 3"] == "execution 2"


def test_a_run_without_a_callers_span_has_a_trace_of_its_own(server: ServerProcess, sink: Sink) -> None:
    server.start()
    with Client(server.address) as client:
        client.start("counter", {"steps": 1}, run_id="own-trace")
        run = client.wait("own-trace")
    server.stop()
    roots = [span for span in sink.spans if span.name == "agent_run counter"]
    assert [(span.trace_id.hex(), span.parent_span_id) for span in roots] == [(run.trace_id, b"")]
