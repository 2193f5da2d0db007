"""The error taxonomy: what can go wrong for a caller, as classes that know their status but not gRPC.

`rpc.handlers` turns these into `google.rpc.Status`; nothing else reaches the wire. `message` is for the client;
the cause (`raise … from`) is for the server's log.
"""

from __future__ import annotations

from typing import ClassVar, Literal

DOMAIN = "perdure.dev"

Status = Literal[
    "INVALID_ARGUMENT",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNAVAILABLE",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "INTERNAL",
]


class PerdureError(Exception):
    """An error that a caller may see.

    Attributes:
        status: The name of the gRPC status code.
        reason: The machine's reason, `ErrorInfo.reason` on the wire.
        message: For the client: one sentence, with the way out where there is one.
        metadata: `ErrorInfo.metadata` on the wire.
        retry_delay_s: When set, the caller should wait this many seconds and repeat the call (`RetryInfo`).
    """

    status: ClassVar[Status] = "INTERNAL"
    reason: str = "INTERNAL"
    retry_delay_s: float | None = None

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class InvalidArgument(PerdureError):
    """A field of the request is wrong; fix the request.

    Attributes:
        violations: (field path, what is wrong with it), at least one.
    """

    status = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"

    def __init__(self, field: str, text: str, *more: tuple[str, str]) -> None:
        super().__init__(f"{field}: {text}" if field else text)
        self.violations: tuple[tuple[str, str], ...] = ((field, text), *more)


class InputSchemaViolation(InvalidArgument):
    """The input does not satisfy the agent's JSON Schema; fix the input."""

    reason = "INPUT_SCHEMA_VIOLATION"


class Unauthenticated(PerdureError):
    """The call carries no valid credentials; get a token."""

    status = "UNAUTHENTICATED"
    reason = "TOKEN_INVALID"


class TokenMissing(Unauthenticated):
    """The call carries no bearer token; send one in the metadata `authorization`."""

    reason = "TOKEN_MISSING"


class TokenExpired(Unauthenticated):
    """The token was good and is no longer; get a new one."""

    reason = "TOKEN_EXPIRED"


class PermissionDenied(PerdureError):
    """The caller may not do this."""

    status = "PERMISSION_DENIED"
    reason = "ROLE_REQUIRED"


class NotFound(PerdureError):
    """Base of what does not exist, or does not exist for this caller."""

    status = "NOT_FOUND"


class NamespaceNotFound(NotFound):
    """No such namespace."""

    reason = "NAMESPACE_NOT_FOUND"


class RunNotFound(NotFound):
    """No such run; check namespace and run_id."""

    reason = "RUN_NOT_FOUND"


class AgentNotFound(NotFound):
    """No such agent, or no such version of it; see ListAgents."""

    reason = "AGENT_NOT_FOUND"


class ApprovalNotFound(NotFound):
    """No such approval; check namespace and approval_id."""

    reason = "APPROVAL_NOT_FOUND"


class ArtifactNotFound(NotFound):
    """The run has no such artifact, or no output (yet)."""

    reason = "ARTIFACT_NOT_FOUND"


class RunConflict(PerdureError):
    """The run_id is taken by another start; choose another id."""

    status = "ALREADY_EXISTS"
    reason = "RUN_ID_IN_USE"


class RunInputMismatch(RunConflict):
    """The run_id exists with another agent or input; choose another id."""

    reason = "RUN_INPUT_MISMATCH"


class RunFinished(PerdureError):
    """The run has ended; read its result."""

    status = "FAILED_PRECONDITION"
    reason = "RUN_FINISHED"


class ApprovalClosed(PerdureError):
    """The approval has been decided otherwise, has expired or was withdrawn; read it."""

    status = "FAILED_PRECONDITION"
    reason = "APPROVAL_CLOSED"


class VersionUnavailable(PerdureError):
    """This server does not have the code of the agent's version; ask one that has, or tell the operator."""

    status = "FAILED_PRECONDITION"
    reason = "VERSION_UNAVAILABLE"


class RevisionConflict(PerdureError):
    """It has changed since it was read; read it again and decide again."""

    status = "ABORTED"
    reason = "REVISION_CONFLICT"


class NobodyStandsBy(PerdureError):
    """No executor stands by for the cell in the region that it is to go to; start one there, and repeat."""

    status = "FAILED_PRECONDITION"
    reason = "NOBODY_STANDS_BY"


class Contention(PerdureError):
    """Concurrent transactions conflicted beyond the retry budget; repeat the whole call."""

    status = "ABORTED"
    reason = "CONTENTION"
    retry_delay_s = 0.2


class CursorOutOfRange(PerdureError):
    """Events after this cursor are no longer kept; start from metadata `earliest_sequence` of `run_id`."""

    status = "OUT_OF_RANGE"
    reason = "EVENTS_TRUNCATED"


class OffsetOutOfRange(PerdureError):
    """The offset is behind the artifact's end; the metadata has its size."""

    status = "OUT_OF_RANGE"
    reason = "OFFSET_OUT_OF_RANGE"


class ViewTooLarge(PerdureError):
    """More children of the watched run are active than one watch can carry; watch them one by one."""

    status = "FAILED_PRECONDITION"
    reason = "VIEW_TOO_LARGE"


class StoreUnavailable(PerdureError):
    """The database cannot be reached; wait and repeat, which is safe."""

    status = "UNAVAILABLE"
    reason = "STORE_UNAVAILABLE"
    retry_delay_s = 1.0


class KeysUnavailable(PerdureError):
    """The keys that tokens are checked with have never been read; wait and repeat, which is safe."""

    status = "UNAVAILABLE"
    reason = "KEYS_UNAVAILABLE"
    retry_delay_s = 2.0


class Draining(PerdureError):
    """This server is stopping; repeat the call, and another one will take it."""

    status = "UNAVAILABLE"
    reason = "DRAINING"
    retry_delay_s = 0.5


class RegionUnavailable(PerdureError):
    """The region where the run lives cannot be reached; wait and repeat, which is safe."""

    status = "UNAVAILABLE"
    reason = "REGION_UNAVAILABLE"
    retry_delay_s = 2.0


class CellNotServed(PerdureError):
    """The call came to a server that does not serve the cell it was sent to; repeat it, and it finds another way."""

    status = "UNAVAILABLE"
    reason = "CELL_NOT_SERVED"
    retry_delay_s = 1.0


class NamespacePaused(PerdureError):
    """The namespace is being moved to another home, and nothing is started in it meanwhile; wait and repeat."""

    status = "UNAVAILABLE"
    reason = "NAMESPACE_PAUSED"
    retry_delay_s = 5.0


class Overloaded(PerdureError):
    """Too much at once; slow down."""

    status = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"
    retry_delay_s = 1.0


class QuotaExceeded(PerdureError):
    """The namespace starts more runs a second than it may; wait as long as the error says, and repeat."""

    status = "RESOURCE_EXHAUSTED"
    reason = "QUOTA_EXCEEDED"
    retry_delay_s = 1.0

    def __init__(self, message: str, retry_delay_s: float, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.retry_delay_s = retry_delay_s


class PayloadTooLarge(PerdureError):
    """The payload is over a limit; send less, or a reference to it. Repeating does not help."""

    status = "RESOURCE_EXHAUSTED"
    reason = "PAYLOAD_TOO_LARGE"


class TooManyStreams(PerdureError):
    """This server has as many open streams as it takes, at all or of this caller; wait, or close some."""

    status = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_STREAMS"
    retry_delay_s = 5.0


class ConfigurationError(PerdureError):
    """The server cannot start as it is configured. Never reaches a caller; `check` and `serve` print it and exit."""

    status = "FAILED_PRECONDITION"
    reason = "CONFIGURATION"
