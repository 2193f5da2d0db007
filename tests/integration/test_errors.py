"""Each row of the table of errors, provoked over the wire: what any gRPC client gets, and what the library raises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import perdure_client
import pytest
from perdure.v1 import agent_catalog_service_pb2 as catalog_pb
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure_client._rpc_errors import from_rpc_error
from perdure_service import errors

from tests.helpers.rpc import Reading, Refusal, Rpc, new_id
from tests.helpers.server import ServerProcess, sql
from tests.helpers.waiting import eventually
from tests.unit.test_docs import ERRORS

HERE = Path(__file__).parent
ELSEWHERE = {
    "Unauthenticated": "../helpers/security.py",
    "TokenMissing": "../unit/rpc/test_security.py",
    "TokenExpired": "../unit/rpc/test_security.py",
    "KeysUnavailable": "../unit/rpc/test_security.py",
    "PermissionDenied": "../unit/rpc/test_security.py",
    "ViewTooLarge": "../unit/rpc/test_errors.py",
    "NobodyStandsBy": "test_take_over.py",
    "ConfigurationError": "never reaches a caller",
    "Overloaded": "test_limits.py",
    "QuotaExceeded": "test_limits.py",
    "TooManyStreams": "test_limits.py",
    "ArtifactNotFound": "test_payloads.py",
    "OffsetOutOfRange": "test_payloads.py",
    "RegionUnavailable": "test_regions.py",
    "CellNotServed": "../unit/rpc/test_forwarding.py",
    "NamespacePaused": "../unit/rpc/test_forwarding.py",
}
"""Rows that this module does not provoke: where they are, or why there is nothing to provoke."""
BREAK = """
    CREATE OR REPLACE FUNCTION public.break_signal() RETURNS trigger AS $$
    BEGIN
        IF NEW.topic LIKE 'sqlstate-%' THEN
            RAISE EXCEPTION 'secret-of-the-database' USING ERRCODE = substr(NEW.topic, 10);
        END IF;
        RETURN NEW;
    END $$ LANGUAGE plpgsql;
    CREATE TRIGGER break_signal BEFORE INSERT ON dbos.notifications FOR EACH ROW EXECUTE FUNCTION public.break_signal();
"""
"""A signal named `sqlstate-XXXXX` fails in the database with that code."""


@dataclass(frozen=True)
class World:
    """What the calls are about."""

    rpc: Rpc
    done: str
    waiting: str
    truncated: str
    decided: str
    open_approval: str


@dataclass(frozen=True)
class Row:
    """A row of the table: a call that provokes it, and what is told."""

    error: str
    code: str
    reason: str
    provoke: Callable[[World], Any]
    metadata: frozenset[str] = frozenset()
    fields: tuple[str, ...] = ()
    retry_delay_s: float | None = None
    library: str = field(default="")


def start(world: World, **fields: Any) -> Any:
    return world.rpc.start_call(fields.pop("agent", "counter"), fields.pop("run_input", {"steps": 1}), **fields)


def decide(world: World, approval_id: str, **fields: Any) -> Any:
    return world.rpc.decide(approval_id, **fields)


ROWS = [
    Row("InvalidArgument", "INVALID_ARGUMENT", "INVALID_FIELD", lambda w: start(w, run_id="A"), fields=("run_id",)),
    Row(
        "InputSchemaViolation", "INVALID_ARGUMENT", "INPUT_SCHEMA_VIOLATION",
        lambda w: start(w, run_input={"steps": "x"}), fields=("input.steps",),
    ),
    Row("NamespaceNotFound", "NOT_FOUND", "NAMESPACE_NOT_FOUND", lambda w: start(w, namespace="elsewhere")),
    Row("RunNotFound", "NOT_FOUND", "RUN_NOT_FOUND", lambda w: w.rpc.get(new_id())),
    Row(
        "AgentNotFound", "NOT_FOUND", "AGENT_NOT_FOUND",
        lambda w: w.rpc.agents.GetAgent(catalog_pb.GetAgentRequest(agent="nobody")),
    ),
    Row(
        "ApprovalNotFound", "NOT_FOUND", "APPROVAL_NOT_FOUND",
        lambda w: w.rpc.approvals.GetApproval(approval_pb.GetApprovalRequest(approval_id="nothing/1")),
    ),
    Row(
        "RunConflict", "ALREADY_EXISTS", "RUN_ID_IN_USE",
        lambda w: start(w, run_id=w.done, request_id=new_id(), conflict_policy=pb.CONFLICT_POLICY_FAIL),
    ),
    Row(
        "RunInputMismatch", "ALREADY_EXISTS", "RUN_INPUT_MISMATCH",
        lambda w: start(w, run_id=w.done, run_input={"steps": 2}),
        metadata=frozenset({"existing_sha256", "requested_sha256"}),
    ),
    Row("RunFinished", "FAILED_PRECONDITION", "RUN_FINISHED", lambda w: w.rpc.signal(w.done)),
    Row(
        "ApprovalClosed", "FAILED_PRECONDITION", "APPROVAL_CLOSED", lambda w: decide(w, w.decided, approve=False),
        metadata=frozenset({"state", "revision"}),
    ),
    Row(
        "VersionUnavailable", "FAILED_PRECONDITION", "VERSION_UNAVAILABLE",
        lambda w: start(w, agent="elsewhere", run_input={}),
    ),
    Row(
        "RevisionConflict", "ABORTED", "REVISION_CONFLICT", lambda w: decide(w, w.open_approval, expected_revision=99),
        metadata=frozenset({"revision"}),
    ),
    Row(
        "Contention", "ABORTED", "CONTENTION", lambda w: w.rpc.signal(w.waiting, name="sqlstate-55P03"),
        retry_delay_s=0.2,
    ),
    Row(
        "CursorOutOfRange", "OUT_OF_RANGE", "EVENTS_TRUNCATED", lambda w: w.rpc.stream(w.truncated),
        metadata=frozenset({"earliest_sequence", "run_id"}),
    ),
    Row(
        "StoreUnavailable", "UNAVAILABLE", "STORE_UNAVAILABLE",
        lambda w: w.rpc.signal(w.waiting, name="sqlstate-57014"), retry_delay_s=1.0,
    ),
    Row(
        "PayloadTooLarge", "RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE", lambda w: w.rpc.signal(w.waiting, "x" * 2**17),
        metadata=frozenset({"field", "limit_bytes"}),
    ),
    Row(
        "PerdureError", "INTERNAL", "INTERNAL", lambda w: w.rpc.signal(w.waiting, name="sqlstate-P0001"),
        metadata=frozenset({"error_id"}), library="InternalError",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(rpc: Rpc, database_url: str) -> World:
    """Runs and approvals in every state that an error is about."""
    done, truncated, waiting = new_id(), new_id(), rpc.start("listener", {"signals": 99})
    for run_id in (done, truncated):
        rpc.start("counter", {"steps": 1}, run_id=run_id)
    asked = [rpc.start("asker"), rpc.start("asker")]
    approvals = [rpc.approval_of(run_id).approval_id for run_id in asked]
    rpc.decide(approvals[0])
    for run_id in (done, truncated, asked[0]):
        rpc.end_of(run_id)
    rpc.until(waiting, "AWAITING_INPUT")
    with sql(database_url) as connection:
        connection.execute(BREAK)
        connection.execute(
            "DELETE FROM perdure.run_event WHERE workflow_id = %s AND first_sequence = 1", (f"default.{truncated}.r",)
        )
        connection.execute(
            "INSERT INTO perdure.agent (name, version, description, input_schema, output_schema, is_current) "
            "SELECT 'elsewhere', version, description, input_schema, output_schema, is_current FROM perdure.agent "
            "WHERE name = 'counter'"
        )
    return World(rpc, done, waiting, truncated, *approvals)


def test_every_row_of_the_table_is_provoked_somewhere() -> None:
    told = {row.error for row in ROWS} | {"Draining"} | set(ELSEWHERE)
    assert told >= {kind.__name__ for kind in ERRORS}
    for name, where in ELSEWHERE.items():
        if where.endswith(".py"):
            assert f'"{getattr(errors, name).reason}"' in (HERE / where).read_text()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.error)
def test_a_row_of_the_table_arrives_as_the_table_says(world: World, server: ServerProcess, row: Row) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        row.provoke(world)
    told = Refusal.of(raised.value)  # which checks the domain, and that the two codes are the same
    assert (told.code.name, told.reason) == (row.code, row.reason)
    assert set(told.metadata) == row.metadata
    assert told.fields == row.fields
    assert told.retry_delay_s == row.retry_delay_s
    assert "secret-of-the-database" not in str(raised.value)
    assert "secret-of-the-database" not in str(raised.value.trailing_metadata())

    error = from_rpc_error(raised.value, server.address)
    assert type(error) is getattr(perdure_client, row.library or row.error)
    assert (error.code, error.reason, error.metadata) == (row.code, row.reason, told.metadata)
    assert tuple(violation.field for violation in error.violations) == row.fields
    assert error.retry_delay_s == row.retry_delay_s
    assert error.error_id == told.metadata.get("error_id", "")
    assert str(error) == told.text


def test_the_cause_of_a_stray_error_is_in_the_log_under_the_id_that_the_caller_got(
    world: World, server: ServerProcess
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        world.rpc.signal(world.waiting, name="sqlstate-P0001")
    told = Refusal.of(raised.value)
    assert told.text == "internal error; report this error id"
    (line,) = [line for line in server.log.splitlines() if told.metadata["error_id"] in line]
    assert "secret-of-the-database" in line
    assert '"level": "error"' in line


def test_a_server_that_stops_tells_its_streams_to_go_elsewhere(world: World, server: ServerProcess) -> None:
    call = world.rpc.watch(world.waiting)
    reading = Reading(call)
    eventually(lambda: reading.responses)
    assert server.stop() == 0
    reading.join()
    told = reading.refusal
    assert told is not None
    assert (told.code.name, told.reason, told.retry_delay_s) == ("UNAVAILABLE", "DRAINING", 0.5)
    error = from_rpc_error(call, server.address)
    assert type(error) is perdure_client.Draining
    assert error.retryable
