"""No log holds a payload or a secret, whatever agents and callers do, at any level; and the search would find one."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.struct_pb2 import Value
from perdure.v1 import agent_run_service_pb2 as pb

from tests.helpers import marks
from tests.helpers.rpc import Rpc, new_id, refusal_of, refused, state_of
from tests.helpers.server import ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually

FAILING = [
    "in a step", "unpicklable result", "unpicklable value", "in a child", "in a child nobody waits for",
    "in a task nobody waits for", "in a group", "in its publication", "itself",
]  # fmt: skip
BREAK = """
    CREATE OR REPLACE FUNCTION public.break_signal() RETURNS trigger AS $$
    BEGIN
        IF NEW.topic = 'broken' THEN
            RAISE EXCEPTION 'this row is broken' USING DETAIL = 'Failing row contains (' || NEW.message || ').';
        END IF;
        RETURN NEW;
    END $$ LANGUAGE plpgsql;
    CREATE TRIGGER break_signal BEFORE INSERT ON dbos.notifications FOR EACH ROW EXECUTE FUNCTION public.break_signal();
"""


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[ServerProcess]:
    """A server that logs all there is to log. Its log is searched whenever a process of it ends."""
    create_effects_table(database_url)
    agents = ("tests.helpers.agents", "tests.helpers.quoting_agents")
    with ServerProcess(database_url, *agents, PERDURE_LOG_LEVEL="debug") as process:
        yield process


def test_what_agents_raise_return_and_publish_is_not_logged(rpc: Rpc, server: ServerProcess) -> None:
    runs = [rpc.start("quoting", {"how": how, "text": marks.PAYLOAD}) for how in FAILING]
    runs.append(rpc.start("blocking-quoting", {"text": marks.PAYLOAD}))
    runs.append(rpc.start("flaky", {"failures": 9}))
    states = {state_of(rpc.end_of(run_id)) for run_id in runs}
    assert states == {"FAILED", "SUCCEEDED"}
    log = server.log
    assert "Exception encountered in" in log, "DBOS logs what workflows raise, else this test shows nothing"
    assert "Step being automatically retried" in log
    assert "Error serializing object" in log
    assert "QuotingError" in log
    assert "quoting_agents.py:" in log
    server.check_log()


def test_what_callers_send_is_not_logged_when_it_is_served_nor_when_it_is_refused(
    rpc: Rpc, server: ServerProcess
) -> None:
    metadata = (("authorization", f"Bearer {marks.SECRET}"), ("x-api-key", marks.SECRET))
    rpc.start_call("counter", {"steps": 1}, run_id=new_id(), labels={"team": marks.PAYLOAD}, metadata=metadata)
    for text in (f'{{"steps": "{marks.PAYLOAD}"}}', marks.PAYLOAD, f'{{"a": "{marks.PAYLOAD}", "a": 1}}'):
        assert refusal_of(lambda text=text: rpc.runs.StartAgent(pb.StartAgentRequest(agent="counter", input_json=text)))
    large = f'{{"text": "{marks.PAYLOAD * 2**16}"}}'
    assert refusal_of(lambda: rpc.runs.StartAgent(pb.StartAgentRequest(agent="counter", input_json=large)))
    assert refusal_of(lambda: rpc.channel.unary_unary("/perdure.v1.AgentRunService/GetRun")(marks.PAYLOAD.encode()))

    run_id = rpc.start("listener")
    rpc.signal(run_id, marks.PAYLOAD)
    assert rpc.output_of(run_id) == [marks.PAYLOAD]
    assert refusal_of(lambda: rpc.signal(run_id, marks.PAYLOAD))

    asking = rpc.start("asker", {"answer_schema": {"type": "integer", "description": marks.PAYLOAD}})
    approval = rpc.approval_of(asking)
    wrong = Value(string_value=marks.PAYLOAD)
    assert refusal_of(lambda: rpc.decide(approval.approval_id, answer=wrong, comment=marks.PAYLOAD))
    rpc.decide(approval.approval_id, answer=Value(number_value=1), comment=marks.PAYLOAD)
    rpc.output_of(asking)
    assert refusal_of(lambda: rpc.decide(approval.approval_id, False, comment=marks.PAYLOAD))
    server.check_log()


def test_a_stray_error_is_in_the_log_under_its_id_with_its_cause_and_without_the_row_it_is_about(
    rpc: Rpc, server: ServerProcess, database_url: str
) -> None:
    with sql(database_url) as connection:
        connection.execute(BREAK)
    run_id = rpc.start("listener")
    with refused("INTERNAL", "INTERNAL") as error:
        rpc.signal(run_id, marks.PAYLOAD, name="broken")
    assert error.text == "internal error; report this error id"
    assert set(error.metadata) == {"error_id"}
    (line,) = [line for line in server.log.splitlines() if error.metadata["error_id"] in line]
    assert "this row is broken" in line
    assert "DETAIL:***" in line
    server.check_log()
    rpc.cancel(run_id, marks.PAYLOAD)


def test_a_killed_server_and_the_one_that_takes_over_have_logged_nothing(rpc: Rpc, server: ServerProcess) -> None:
    run_id = rpc.start("counter", {"steps": 3, "delay_s": 0.2, "text": marks.PAYLOAD})
    eventually(lambda: rpc.get(run_id).last_sequence > 2)
    server.kill()
    server.start()
    eventually(lambda: grpc.channel_ready_future(rpc.channel).result(timeout=1) is None)
    rpc.output_of(run_id)
    assert "run.taken_back" in server.log
    server.check_log()


def test_a_payload_that_is_logged_is_found(database_url: str) -> None:
    server = ServerProcess(database_url, "tests.helpers.quoting_agents")
    with (
        pytest.raises(AssertionError, match="hold a payload or a secret"),
        server,
        Rpc(server.address) as rpc,
    ):
        rpc.end_of(rpc.start("leaking", {"text": marks.PAYLOAD}))
    assert not server.log_path.exists()
