"""The promise to users: which names there are, that both clients are the same, and what an import costs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import perdure_client
from perdure.v1 import agent_catalog_service_pb2, agent_run_service_pb2, approval_service_pb2, operator_service_pb2
from perdure_client import AsyncClient, Client

from tests.unit.client.scripted import EXCHANGES, METHODS, STREAMS

NAMES = """
AgentInfo AgentNotFound AgentStart Approval ApprovalClosed ApprovalDecided ApprovalNotFound ApprovalRequested
ApprovalState ArtifactInfo ArtifactNotFound ArtifactWritten OffsetOutOfRange
AsyncClient AsyncWatch AsyncWatching AttemptReset ChildStarted Client ClientClosed ConfigurationError ConflictPolicy
Contention CursorOutOfRange DeadlineExceeded Decision Deletion Draining EventData EventKind ExecutorInfo ExecutorState
FailedPrecondition Failure InputSchemaViolation InternalError InvalidArgument JsonValue KeysUnavailable LogLine
ModelUsage NamespaceNotFound NotFound OutputDelta Overloaded PayloadTooLarge PerdureError PermissionDenied Progress
ProtocolViolation Published QueueInfo QuotaExceeded Recovered ResourceExhausted RevisionConflict Run RunConflict
RunEvent RunFailed RunFinished RunForked RunInputMismatch RunNotFound RunState RunTrace ServerUnavailable SignalReceived
SpanKind SpanLink SpanStatus StartResult StartedRun StateChanged Step StepFailed StepRetrying StepStarted StepState
StepSucceeded StoreUnavailable StrandedReason StrandedRun
CellInfo CellNotServed IncompleteListing NamespacePaused NobodyStandsBy RegionUnavailable SurvivalGoal
TimeoutOutcome TokenExpired TokenMissing TooManyStreams TraceSpan Unauthenticated Unavailable
Unimplemented UnknownData Usage VersionUnavailable ViewTooLarge Violation WaitResult WaitTimeout Watch WatchUpdate
Watching __version__
"""

METHOD_NAMES = """
address agents approvals approve artifact cancel cells close decide delete_runs evacuate_cell events executors fork get
get_agent get_approval list namespace queues read_artifact reject return_cell run signal start start_many steps
stranded trace wait wait_many watch watch_approvals
"""


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


def test_the_public_names_are_these() -> None:
    assert sorted(perdure_client.__all__) == sorted(NAMES.split())
    assert all(hasattr(perdure_client, name) for name in perdure_client.__all__)


def test_both_clients_have_these_methods_with_the_same_parameters() -> None:
    assert public(AsyncClient) == public(Client) == set(METHOD_NAMES.split())
    for name in METHOD_NAMES.split():
        asynchronous, blocking = getattr(AsyncClient, name), getattr(Client, name)
        if not isinstance(asynchronous, property):
            assert inspect.signature(asynchronous).parameters == inspect.signature(blocking).parameters, name


def test_every_public_thing_says_what_it_is() -> None:
    for cls in (AsyncClient, Client):
        for name in METHOD_NAMES.split():
            assert inspect.getdoc(getattr(cls, name)), name
    assert all(getattr(perdure_client, name).__doc__ for name in perdure_client.__all__ if name != "JsonValue")


def test_the_blocking_client_is_written_from_the_asyncio_one() -> None:
    script = Path(perdure_client.__file__).parents[1] / "make_sync_client.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    blocking = inspect.getsource(Client)
    assert not re.search(r"\b(async|await|asyncio|Async\w+)\b", blocking)


def test_every_method_of_the_schema_can_be_called_by_its_path() -> None:
    schema = {
        f"/{service.full_name}/{method.name}": method.server_streaming
        for module in (agent_run_service_pb2, approval_service_pb2, agent_catalog_service_pb2, operator_service_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert {method.path for method in METHODS} == set(schema)
    assert {path for path, streams in schema.items() if streams} == STREAMS | EXCHANGES


def test_an_import_needs_neither_the_service_nor_the_extras() -> None:
    code = (
        "import sys, perdure_client; "
        "print(sorted(m for m in ('perdure_service', 'typer', 'rich', 'opentelemetry', 'dbos') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_client_works_without_opentelemetry() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None; "
        "from perdure_client._tracing import trace_metadata; print(trace_metadata())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "()"
