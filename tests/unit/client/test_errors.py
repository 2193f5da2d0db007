"""Which error a caller gets for which status."""

from __future__ import annotations

import pickle

import grpc
import perdure_client
import pytest
from google.rpc import status_pb2
from perdure_client import (
    AgentNotFound,
    ApprovalClosed,
    ApprovalNotFound,
    ArtifactNotFound,
    AsyncClient,
    CellNotServed,
    Contention,
    CursorOutOfRange,
    Draining,
    FailedPrecondition,
    InputSchemaViolation,
    InternalError,
    InvalidArgument,
    KeysUnavailable,
    NamespaceNotFound,
    NamespacePaused,
    NotFound,
    OffsetOutOfRange,
    Overloaded,
    PayloadTooLarge,
    PerdureError,
    PermissionDenied,
    QuotaExceeded,
    RegionUnavailable,
    ResourceExhausted,
    RevisionConflict,
    Run,
    RunConflict,
    RunFailed,
    RunFinished,
    RunInputMismatch,
    RunNotFound,
    RunState,
    ServerUnavailable,
    StoreUnavailable,
    TokenExpired,
    TokenMissing,
    TooManyStreams,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    VersionUnavailable,
    ViewTooLarge,
    Violation,
    WaitTimeout,
)
from perdure_client._rpc_errors import from_rpc_error
from perdure_client._transport import GET_RUN

from tests.unit.client.scripted import Fail, ScriptedServer

C = grpc.StatusCode

REASONS: list[tuple[grpc.StatusCode, str, type[PerdureError]]] = [
    (C.INVALID_ARGUMENT, "INVALID_FIELD", InvalidArgument),
    (C.INVALID_ARGUMENT, "INPUT_SCHEMA_VIOLATION", InputSchemaViolation),
    (C.UNAUTHENTICATED, "TOKEN_EXPIRED", TokenExpired),
    (C.UNAUTHENTICATED, "TOKEN_MISSING", TokenMissing),
    (C.UNAUTHENTICATED, "TOKEN_INVALID", Unauthenticated),
    (C.UNAVAILABLE, "KEYS_UNAVAILABLE", KeysUnavailable),
    (C.PERMISSION_DENIED, "ROLE_REQUIRED", PermissionDenied),
    (C.NOT_FOUND, "NAMESPACE_NOT_FOUND", NamespaceNotFound),
    (C.NOT_FOUND, "RUN_NOT_FOUND", RunNotFound),
    (C.NOT_FOUND, "AGENT_NOT_FOUND", AgentNotFound),
    (C.NOT_FOUND, "ARTIFACT_NOT_FOUND", ArtifactNotFound),
    (C.OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE", OffsetOutOfRange),
    (C.NOT_FOUND, "APPROVAL_NOT_FOUND", ApprovalNotFound),
    (C.ALREADY_EXISTS, "RUN_ID_IN_USE", RunConflict),
    (C.ALREADY_EXISTS, "RUN_INPUT_MISMATCH", RunInputMismatch),
    (C.FAILED_PRECONDITION, "RUN_FINISHED", RunFinished),
    (C.FAILED_PRECONDITION, "APPROVAL_CLOSED", ApprovalClosed),
    (C.FAILED_PRECONDITION, "VERSION_UNAVAILABLE", VersionUnavailable),
    (C.FAILED_PRECONDITION, "VIEW_TOO_LARGE", ViewTooLarge),
    (C.ABORTED, "REVISION_CONFLICT", RevisionConflict),
    (C.ABORTED, "CONTENTION", Contention),
    (C.OUT_OF_RANGE, "EVENTS_TRUNCATED", CursorOutOfRange),
    (C.UNAVAILABLE, "STORE_UNAVAILABLE", StoreUnavailable),
    (C.UNAVAILABLE, "DRAINING", Draining),
    (C.UNAVAILABLE, "REGION_UNAVAILABLE", RegionUnavailable),
    (C.UNAVAILABLE, "CELL_NOT_SERVED", CellNotServed),
    (C.UNAVAILABLE, "NAMESPACE_PAUSED", NamespacePaused),
    (C.UNAVAILABLE, "SOMETHING_NEW", Unavailable),
    (C.RESOURCE_EXHAUSTED, "OVERLOADED", Overloaded),
    (C.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", QuotaExceeded),
    (C.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", TooManyStreams),
    (C.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE", PayloadTooLarge),
    (C.INTERNAL, "INTERNAL", InternalError),
    (C.NOT_FOUND, "SOMETHING_NEW_NOT_FOUND", NotFound),
    (C.FAILED_PRECONDITION, "SOMETHING_NEW", FailedPrecondition),
    (C.RESOURCE_EXHAUSTED, "SOMETHING_NEW", ResourceExhausted),
    (C.ABORTED, "SOMETHING_NEW", PerdureError),
]


class Raised(grpc.RpcError):
    """A failed call, as either flavour of gRPC shows it."""

    def __init__(self, code: grpc.StatusCode, text: str, status: bytes | None = None) -> None:
        self._code, self._text, self._status = code, text, status

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...] | None:  # type: ignore[override]
        return None if self._status is None else (("grpc-status-details-bin", self._status),)


@pytest.mark.parametrize(("code", "reason", "error_class"), REASONS, ids=[f"{c.name}-{r}" for c, r, _ in REASONS])
def test_the_reason_decides_and_the_code_for_reasons_that_are_new(
    code: grpc.StatusCode, reason: str, error_class: type[PerdureError]
) -> None:
    error = from_rpc_error(Raised(code, "text", Fail(code, reason).status()), "there:1")
    assert type(error) is error_class
    assert (error.code, error.reason, error.message, str(error)) == (code.name, reason, "text", "text")


async def test_all_that_the_server_says_is_there(server: ScriptedServer, client: AsyncClient) -> None:
    fail = Fail(
        C.INVALID_ARGUMENT,
        "INPUT_SCHEMA_VIOLATION",
        "input.question: is missing",
        {"agent": "research", "error_id": "abc"},
        retry_delay_s=1.25,
        violations=(("input.question", "is missing"),),
    )
    server.script(GET_RUN, fail)
    with pytest.raises(InputSchemaViolation) as raised:
        await client.get("r")
    error = raised.value
    assert error.violations == (Violation("input.question", "is missing"),)
    assert error.metadata == {"agent": "research", "error_id": "abc"}
    assert (error.error_id, error.retry_delay_s) == ("abc", 1.25)
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, grpc.RpcError)


@pytest.mark.parametrize(
    ("code", "text", "error_class", "retryable"),
    [
        (C.UNAVAILABLE, "failed to connect", ServerUnavailable, True),
        (C.INTERNAL, "Received RST_STREAM with error code 2", ServerUnavailable, True),
        (C.UNKNOWN, "Stream removed", ServerUnavailable, True),
        (C.CANCELLED, "RST_STREAM with error code 8", ServerUnavailable, True),
        (C.CANCELLED, "CANCELLED", ServerUnavailable, True),
        (C.CANCELLED, "Locally cancelled by application!", PerdureError, False),
        (C.UNKNOWN, "Unexpected <class 'ValueError'>: x", PerdureError, False),
        (C.INTERNAL, "something of a proxy", InternalError, False),
        (C.RESOURCE_EXHAUSTED, "Bandwidth exhausted", ResourceExhausted, False),
        (C.UNIMPLEMENTED, "Method not found!", Unimplemented, False),
        (C.PERMISSION_DENIED, "a proxy's", PermissionDenied, False),
    ],
)
def test_a_status_without_our_reason_is_the_transports(
    code: grpc.StatusCode, text: str, error_class: type[PerdureError], retryable: bool
) -> None:
    error = from_rpc_error(Raised(code, text), "there:1")
    assert type(error) is error_class
    assert error.retryable is retryable
    assert "there:1" in str(error)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("SERVER: Received message larger than max (9 vs. 8)", "request"),
        ("Received message larger than max (9 vs. 8)", "request"),
        ("CLIENT: Sent message larger than max (9 vs. 8)", "request"),
        ("CLIENT: Received message larger than max (9 vs. 8)", "answer"),
        ("SERVER: Sent message larger than max (9 vs. 8)", "answer"),
    ],
)
def test_a_message_that_grpc_refuses_for_its_size_is_a_payload_that_is_too_large(text: str, field: str) -> None:
    error = from_rpc_error(Raised(C.RESOURCE_EXHAUSTED, text), "there:1")
    assert type(error) is PayloadTooLarge
    assert error.retryable is False
    assert error.metadata == {"field": field, "limit_bytes": "8"}
    assert str(error).startswith(f"the {field} takes 9 bytes, more than the 8 of one message; ")


def test_a_message_that_is_too_large_once_it_is_decompressed_is_a_payload_that_is_too_large() -> None:
    error = from_rpc_error(Raised(C.RESOURCE_EXHAUSTED, "Decompressed message larger than max"), "there:1")
    assert type(error) is PayloadTooLarge
    assert error.metadata == {"field": "request"}


def test_a_reason_of_another_domain_is_not_ours() -> None:
    status = status_pb2.Status()
    status.ParseFromString(Fail(C.NOT_FOUND, "RUN_NOT_FOUND").status())
    status.details[0].value = status.details[0].value.replace(b"perdure.dev", b"another.dev")
    assert type(from_rpc_error(Raised(C.NOT_FOUND, "x", status.SerializeToString()), "there:1")) is NotFound


def test_a_status_that_is_garbage_is_the_transports() -> None:
    assert type(from_rpc_error(Raised(C.NOT_FOUND, "x", b"\xff\xff"), "there:1")) is NotFound


@pytest.mark.parametrize(
    ("address", "text", "way_out"),
    [
        ("localhost:50051", "failed to connect", "Start one with `perdure-server dev`, or set PERDURE_ADDRESS."),
        ("agents.example:443", "DNS resolution failed", "Check the address (PERDURE_ADDRESS) and the network."),
        ("agents.example:443", "last error: UNKNOWN: Ssl handshake failed", "Check the TLS settings of both sides."),
        ("localhost:1", "Custom verification check failed with error: x", "Check the TLS settings of both sides."),
        ("localhost:1", "last error: UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed", "or PERDURE_TLS=1."),
    ],
)
def test_an_unreachable_server_has_a_way_out(address: str, text: str, way_out: str) -> None:
    error = from_rpc_error(Raised(C.UNAVAILABLE, text), address)
    assert str(error).startswith(f"no perdure server answers at {address} (")
    assert str(error).endswith(way_out)
    assert "last error" not in str(error)
    assert "ipv4" not in str(error)


def test_the_earliest_sequence_of_a_truncated_log_is_a_number() -> None:
    assert CursorOutOfRange("x", metadata={"earliest_sequence": "12"}).earliest_sequence == 12
    assert CursorOutOfRange("x").earliest_sequence == 0


def test_every_error_is_a_perdure_error_with_a_sentence_about_the_way_out() -> None:
    for name in perdure_client.__all__:
        value = getattr(perdure_client, name)
        if isinstance(value, type) and issubclass(value, Exception) and not issubclass(value, Warning):
            assert issubclass(value, PerdureError)
            assert value.__doc__


def test_errors_survive_pickling() -> None:
    run = Run(namespace="n", run_id="r", agent="a", state=RunState.FAILED)
    for error in (RunFailed(run), WaitTimeout("late", run), InvalidArgument("x", violations=(Violation("a", "b"),))):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (str(copy), copy.__dict__) == (str(error), error.__dict__)
