"""What a transport does: one attempt of one call. The blocking one blocks inside its coroutines and never suspends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

from google.protobuf.message import Message
from perdure.v1 import agent_catalog_service_pb2 as catalog
from perdure.v1 import agent_run_service_pb2 as runs
from perdure.v1 import approval_service_pb2 as approvals
from perdure.v1 import operator_service_pb2 as operators

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT", bound=Message)
_ReadT = TypeVar("_ReadT", bound=Message, covariant=True)
_SendT = TypeVar("_SendT", bound=Message, contravariant=True)


@dataclass(frozen=True, slots=True)
class Method(Generic[_RequestT, _ResponseT]):
    """One RPC: its path, and how its messages become bytes and back."""

    path: str
    encode: Callable[[_RequestT], bytes]
    decode: Callable[[bytes], _ResponseT]


def _method(service: str, request: type[_RequestT], response: type[_ResponseT]) -> Method[_RequestT, _ResponseT]:
    name = request.DESCRIPTOR.name.removesuffix("Request")
    return Method(f"/perdure.v1.{service}/{name}", request.SerializeToString, response.FromString)


START_AGENT = _method("AgentRunService", runs.StartAgentRequest, runs.StartAgentResponse)
START_AGENTS = _method("AgentRunService", runs.StartAgentsRequest, runs.StartAgentsResponse)
GET_RUN = _method("AgentRunService", runs.GetRunRequest, runs.GetRunResponse)
LIST_RUNS = _method("AgentRunService", runs.ListRunsRequest, runs.ListRunsResponse)
WATCH_RUN = _method("AgentRunService", runs.WatchRunRequest, runs.WatchRunResponse)
WAIT_RUN = _method("AgentRunService", runs.WaitRunRequest, runs.WaitRunResponse)
WAIT_RUNS = _method("AgentRunService", runs.WaitRunsRequest, runs.WaitRunsResponse)
LIST_RUN_EVENTS = _method("AgentRunService", runs.ListRunEventsRequest, runs.ListRunEventsResponse)
LIST_STEPS = _method("AgentRunService", runs.ListStepsRequest, runs.ListStepsResponse)
GET_RUN_TRACE = _method("AgentRunService", runs.GetRunTraceRequest, runs.GetRunTraceResponse)
READ_ARTIFACT = _method("AgentRunService", runs.ReadArtifactRequest, runs.ReadArtifactResponse)
SIGNAL_RUN = _method("AgentRunService", runs.SignalRunRequest, runs.SignalRunResponse)
CANCEL_RUN = _method("AgentRunService", runs.CancelRunRequest, runs.CancelRunResponse)
FORK_RUN = _method("AgentRunService", runs.ForkRunRequest, runs.ForkRunResponse)
DELETE_RUNS = _method("AgentRunService", runs.DeleteRunsRequest, runs.DeleteRunsResponse)
LIST_APPROVALS = _method("ApprovalService", approvals.ListApprovalsRequest, approvals.ListApprovalsResponse)
GET_APPROVAL = _method("ApprovalService", approvals.GetApprovalRequest, approvals.GetApprovalResponse)
DECIDE_APPROVAL = _method("ApprovalService", approvals.DecideApprovalRequest, approvals.DecideApprovalResponse)
WATCH_APPROVALS = _method("ApprovalService", approvals.WatchApprovalsRequest, approvals.WatchApprovalsResponse)
LIST_AGENTS = _method("AgentCatalogService", catalog.ListAgentsRequest, catalog.ListAgentsResponse)
GET_AGENT = _method("AgentCatalogService", catalog.GetAgentRequest, catalog.GetAgentResponse)
LIST_QUEUES = _method("OperatorService", operators.ListQueuesRequest, operators.ListQueuesResponse)
LIST_EXECUTORS = _method("OperatorService", operators.ListExecutorsRequest, operators.ListExecutorsResponse)
LIST_CELLS = _method("OperatorService", operators.ListCellsRequest, operators.ListCellsResponse)
EVACUATE_CELL = _method("OperatorService", operators.EvacuateCellRequest, operators.EvacuateCellResponse)
RETURN_CELL = _method("OperatorService", operators.ReturnCellRequest, operators.ReturnCellResponse)
LIST_STRANDED_RUNS = _method("OperatorService", operators.ListStrandedRunsRequest, operators.ListStrandedRunsResponse)


class Silence(Exception):
    """Nothing came on a stream for as long as the reader would wait; the stream has been cancelled."""


class Stream(Protocol[_ReadT]):
    """An open server stream."""

    async def read(self, timeout_s: float) -> _ReadT | None:
        """Returns the next message; None when the stream has ended with OK.

        Raises:
            grpc.RpcError: It ended otherwise.
            Silence: Nothing came in time.
            ClientClosed: The client was closed meanwhile.
        """
        ...

    def cancel(self) -> None:
        """Ends the stream; may be called at any time, and again."""
        ...


class Exchange(Protocol[_SendT, _ReadT]):
    """An open stream in both directions. The caller bounds what is on its way: it reads before it sends ever more."""

    @property
    def ready(self) -> bool:
        """Whether the next `read` returns, or raises, at once."""
        ...

    def send(self, request: _SendT) -> None:
        """Sends a message, soon; a failure shows in `read`."""
        ...

    def finish(self) -> None:
        """Says that nothing more will be sent."""
        ...

    async def read(self, timeout_s: float) -> _ReadT | None:
        """See `Stream.read`."""
        ...

    def cancel(self) -> None:
        """Ends the stream; may be called at any time, and again."""
        ...


class Transport(Protocol):
    """Makes single attempts."""

    async def unary(
        self, method: Method[_RequestT, _ResponseT], request: _RequestT, *, timeout_s: float, metadata: Metadata
    ) -> _ResponseT:
        """Returns the answer.

        Raises:
            grpc.RpcError: The call failed.
            ClientClosed: The client was closed before or meanwhile.
        """
        ...

    def stream(
        self, method: Method[_RequestT, _ResponseT], request: _RequestT, *, metadata: Metadata
    ) -> Stream[_ResponseT]:
        """Opens a stream; failures show in its first `read`.

        Raises:
            ClientClosed: The client was closed before.
        """
        ...

    def exchange(self, method: Method[_RequestT, _ResponseT], *, metadata: Metadata) -> Exchange[_RequestT, _ResponseT]:
        """Opens a stream in both directions; failures show in its first `read`.

        Raises:
            ClientClosed: The client was closed before.
        """
        ...

    async def sleep(self, delay_s: float) -> None:
        """Waits.

        Raises:
            ClientClosed: The client was closed before or meanwhile.
        """
        ...

    async def close(self) -> None:
        """Ends all calls and the connections; may be called again."""
        ...
