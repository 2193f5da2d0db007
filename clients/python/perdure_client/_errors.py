"""What can go wrong: one tree of errors, by the server's reason and not by the status code.

`grpc.RpcError` never leaves the library; it is the `__cause__` of what does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from perdure_client._types import Run


@dataclass(frozen=True, slots=True)
class Violation:
    """What is wrong with one field of a request.

    Attributes:
        field: The path of the field, e.g. `input.question`.
        description: What is wrong with it.
    """

    field: str
    description: str


class PerdureError(Exception):
    """Base of every error that the library raises.

    Attributes:
        code: The name of the gRPC status, e.g. `NOT_FOUND`; `OK` where no call failed (`RunFailed`, `WaitTimeout`).
        reason: The machine's reason, e.g. `RUN_NOT_FOUND`. Decide by the class or by this, never by the message.
        message: One sentence for people.
        metadata: More facts from the server, by name.
        violations: What is wrong with which field of the request.
        error_id: What to tell the operator; the server's log has the cause under it. Empty for none.
        retry_delay_s: Seconds after which the server wants the call repeated; None when it did not say.
        retryable: Whether the same call may succeed later. The library has repeated it already, until its timeout.
        hint: The way out, for people; empty when the message says it all.
    """

    code: str = "UNKNOWN"
    reason: str = "UNKNOWN"
    retryable: bool = False
    hint: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        error_id: str = "",
        retry_delay_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.code if code is None else code
        self.reason = self.reason if reason is None else reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.error_id = error_id
        self.retry_delay_s = retry_delay_s


class ConfigurationError(PerdureError, ValueError):
    """The client cannot be set up as it is told; nothing was sent."""

    code = "INVALID_ARGUMENT"
    reason = "CLIENT_CONFIGURATION"


class ClientClosed(PerdureError):
    """The client was closed before, or during, the call; make a new one."""

    code = "CANCELLED"
    reason = "CLIENT_CLOSED"


class InvalidArgument(PerdureError, ValueError):
    """A field of the request is wrong, see `violations`; fix the request. May be raised before anything is sent."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"


class InputSchemaViolation(InvalidArgument):
    """The input does not satisfy the agent's JSON Schema, see `violations`; fix the input."""

    reason = "INPUT_SCHEMA_VIOLATION"
    hint = "`perdure agents NAME` shows the schema of its input."


class Unauthenticated(PerdureError):
    """The call carries no valid credentials; get a token."""

    code = "UNAUTHENTICATED"
    reason = "TOKEN_INVALID"
    hint = "Set PERDURE_TOKEN, or pass token=…"


class TokenMissing(Unauthenticated):
    """The call carries no token, and the server wants one."""

    reason = "TOKEN_MISSING"


class TokenExpired(Unauthenticated):
    """The token was good and is no longer; get a new one. A client whose token is a function does so by itself."""

    reason = "TOKEN_EXPIRED"


class PermissionDenied(PerdureError):
    """The caller may not do this; ask for the role."""

    code = "PERMISSION_DENIED"
    reason = "ROLE_REQUIRED"


class NotFound(PerdureError):
    """Base of what does not exist, or does not exist for this caller."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class NamespaceNotFound(NotFound):
    """No such namespace."""

    reason = "NAMESPACE_NOT_FOUND"
    hint = "Namespaces are declared at the server (PERDURE_NAMESPACES)."


class RunNotFound(NotFound):
    """No such run; check namespace and run_id."""

    reason = "RUN_NOT_FOUND"
    hint = "`perdure list` shows the runs of the namespace."


class AgentNotFound(NotFound):
    """No such agent, or no such version of it; see `agents`."""

    reason = "AGENT_NOT_FOUND"
    hint = "`perdure agents` shows what can be started."


class ApprovalNotFound(NotFound):
    """No such approval; check namespace and approval_id."""

    reason = "APPROVAL_NOT_FOUND"
    hint = "`perdure approvals` shows what waits."


class ArtifactNotFound(NotFound):
    """The run has no artifact of this name, or no output (yet)."""

    reason = "ARTIFACT_NOT_FOUND"
    hint = "`perdure artifacts RUN` shows which there are."


class RunConflict(PerdureError):
    """The run_id is taken by another start; choose another id."""

    code = "ALREADY_EXISTS"
    reason = "RUN_ID_IN_USE"


class RunInputMismatch(RunConflict):
    """The run_id exists with another agent or input; choose another id."""

    reason = "RUN_INPUT_MISMATCH"


class FailedPrecondition(PerdureError):
    """Base of what cannot be done in the present state."""

    code = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class RunFinished(FailedPrecondition):
    """The run has ended; read its result."""

    reason = "RUN_FINISHED"
    hint = "`perdure get RUN` shows its result."


class ApprovalClosed(FailedPrecondition):
    """The approval has been decided otherwise, has expired or was withdrawn; read it."""

    reason = "APPROVAL_CLOSED"
    hint = "`perdure approvals ID` shows how it was decided."


class VersionUnavailable(FailedPrecondition):
    """No live executor has this version of the agent; tell the operator."""

    reason = "VERSION_UNAVAILABLE"
    hint = "`perdure agents` shows the versions there are."


class RevisionConflict(PerdureError):
    """It has changed since you read it; read it again and decide again."""

    code = "ABORTED"
    reason = "REVISION_CONFLICT"
    hint = "Read it again, and decide again."


class Contention(PerdureError):
    """Concurrent transactions conflicted beyond the server's retries; repeat the whole call."""

    code = "ABORTED"
    reason = "CONTENTION"
    retryable = True


class OffsetOutOfRange(PerdureError):
    """The offset is behind the end of what is read."""

    reason = "OFFSET_OUT_OF_RANGE"


class CursorOutOfRange(PerdureError):
    """Events after this cursor are no longer kept; watch from `earliest_sequence`.

    Metadata `run_id` says of which run: in a watch with children it may be a child, and then only a watch from now on,
    or one without children, helps.
    """

    code = "OUT_OF_RANGE"
    reason = "EVENTS_TRUNCATED"
    hint = "`perdure get RUN` shows its result, `perdure watch RUN` what is left of its events."

    @property
    def earliest_sequence(self) -> int:
        """The first sequence that is kept; 0 when the server did not say. `after_sequence` is one less."""
        text = self.metadata.get("earliest_sequence", "")
        return int(text) if text.isdigit() else 0


class ViewTooLarge(FailedPrecondition):
    """More children of the watched run are active than one watch can carry; watch them one by one."""

    reason = "VIEW_TOO_LARGE"


class NobodyStandsBy(FailedPrecondition):
    """No executor stands by for the cell in the region that it is to go to; start one there, and repeat."""

    reason = "NOBODY_STANDS_BY"


class Unavailable(PerdureError):
    """Base of what goes away by itself: wait and repeat, which is safe."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"
    retryable = True


class ServerUnavailable(Unavailable):
    """The server cannot be reached, or the connection broke; `message` says what to do, metadata `cause` why."""

    reason = "SERVER_UNAVAILABLE"


class StoreUnavailable(Unavailable):
    """The server cannot reach its database; wait and repeat, which is safe."""

    reason = "STORE_UNAVAILABLE"


class KeysUnavailable(Unavailable):
    """The server has never reached its identity provider, so it cannot check tokens; wait and repeat."""

    reason = "KEYS_UNAVAILABLE"


class RegionUnavailable(Unavailable):
    """The region where the run lives cannot be reached; wait and repeat, which is safe."""

    reason = "REGION_UNAVAILABLE"


class CellNotServed(Unavailable):
    """The call came to a server of another cell than it was sent to; repeat it, and it finds another way."""

    reason = "CELL_NOT_SERVED"


class NamespacePaused(Unavailable):
    """The namespace is being moved to another home, and nothing is started in it meanwhile; wait and repeat."""

    reason = "NAMESPACE_PAUSED"


class Draining(Unavailable):
    """This server is stopping; repeat the call, and another one will take it."""

    reason = "DRAINING"


class ResourceExhausted(PerdureError):
    """Base of what is too much, at once or at all."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class Overloaded(ResourceExhausted):
    """Too much at once; slow down."""

    reason = "OVERLOADED"
    retryable = True


class QuotaExceeded(ResourceExhausted):
    """The namespace starts more runs a second than it may; wait `retry_delay_s`, and repeat."""

    reason = "QUOTA_EXCEEDED"
    retryable = True


class TooManyStreams(ResourceExhausted):
    """The server has as many open streams as it takes, at all or of one caller; wait, or close some."""

    reason = "TOO_MANY_STREAMS"
    retryable = True


class PayloadTooLarge(ResourceExhausted):
    """The payload is over a limit; send less, or a reference to it. Repeating does not help."""

    reason = "PAYLOAD_TOO_LARGE"


class DeadlineExceeded(PerdureError, TimeoutError):
    """No answer within the call's timeout. What was asked may have been done; repeating it is safe."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Unimplemented(PerdureError):
    """The server does not know this call: it is older than this library, or no perdure server."""

    code = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class InternalError(PerdureError):
    """The server failed; report `error_id` to its operator, whose log has the cause."""

    code = "INTERNAL"
    reason = "INTERNAL"


class ProtocolViolation(PerdureError):
    """The server broke the stream's contract twice in the same place (a hole in the log); report it."""

    code = "DATA_LOSS"
    reason = "PROTOCOL_VIOLATION"


class WaitTimeout(PerdureError, TimeoutError):
    """The run had not ended when the caller's timeout for the wait did. The run goes on; wait again.

    Attributes:
        run: The run as it was last seen; None when no answer came in time.
    """

    code = "OK"
    reason = "WAIT_TIMEOUT"

    def __init__(self, message: str, run: Run | None) -> None:
        super().__init__(message)
        self.run = run

    def __reduce__(self) -> tuple[type[WaitTimeout], tuple[str, Run | None]]:
        return type(self), (self.message, self.run)


class RunFailed(PerdureError):
    """The run ended without an output: it FAILED, was CANCELLED, or EXPIRED. No call failed.

    Attributes:
        run: The run; `run.state` and `run.failure` say what happened.
    """

    code = "OK"

    def __init__(self, run: Run) -> None:
        why = str(run.failure) if run.failure else run.state_reason
        super().__init__(
            f"run {run.run_id} ended as {run.state}" + (f": {why}" if why else ""), reason=f"RUN_{run.state}"
        )
        self.run = run

    def __reduce__(self) -> tuple[type[RunFailed], tuple[Run]]:
        return type(self), (self.run,)
