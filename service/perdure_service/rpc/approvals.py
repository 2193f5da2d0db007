"""Serves ApprovalService: request in, one call of the run service, response out."""

# ruff: noqa: ARG002 - gRPC gives every method a context, whether it needs one or not

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from perdure.v1 import approval_pb2 as approval_pb
from perdure.v1 import approval_service_pb2 as pb
from perdure.v1.approval_service_pb2_grpc import ApprovalServiceServicer

from perdure_service.domain.approvals import Approval
from perdure_service.durable.service import RunService
from perdure_service.rpc import approval_requests, convert
from perdure_service.rpc.calls import current_call
from perdure_service.rpc.handlers import RpcContext
from perdure_service.rpc.streams import RESPONSE_BYTES, closing
from perdure_service.settings import Settings


class Approvals(ApprovalServiceServicer):
    """The inbox of one server."""

    def __init__(self, service: RunService, settings: Settings) -> None:
        self._service = service
        self._settings = settings
        self._response_bytes = min(RESPONSE_BYTES, settings.max_message_bytes // 2)

    async def ListApprovals(self, request: pb.ListApprovalsRequest, context: RpcContext) -> pb.ListApprovalsResponse:
        """Returns a page of approvals."""
        which = approval_requests.list_approvals(request)
        page = await self._service.list_approvals(
            which.namespace, which.states, which.run_id, page_size=which.page_size, page_token=which.page_token
        )
        return pb.ListApprovalsResponse(approvals=map(convert.approval, page.items), next_page_token=page.next_token)

    async def GetApproval(self, request: pb.GetApprovalRequest, context: RpcContext) -> pb.GetApprovalResponse:
        """Returns an approval."""
        which = approval_requests.get_approval(request)
        approval = await self._service.get_approval(which.namespace, which.approval_id)
        return pb.GetApprovalResponse(approval=convert.approval(approval))

    async def DecideApproval(self, request: pb.DecideApprovalRequest, context: RpcContext) -> pb.DecideApprovalResponse:
        """Decides an approval, once."""
        which, decision = approval_requests.decide_approval(
            request, caller=current_call().caller, max_bytes=self._settings.max_signal_bytes
        )
        approval = await self._service.decide_approval(which.namespace, which.approval_id, decision)
        return pb.DecideApprovalResponse(approval=convert.approval(approval))

    async def WatchApprovals(
        self, request: pb.WatchApprovalsRequest, context: RpcContext
    ) -> AsyncIterator[pb.WatchApprovalsResponse]:
        """Streams the inbox; the interceptor ends it when the client goes away or the server drains."""
        which = approval_requests.watch_approvals(request)
        watch = self._service.watch_approvals(which.namespace, heartbeat_s=which.heartbeat_s)
        async with closing(watch) as batches:
            caught_up = False
            async for approvals, now_caught_up in batches:
                *pieces, last = _pieces(approvals, self._response_bytes)
                for piece in pieces:
                    yield pb.WatchApprovalsResponse(approvals=piece, caught_up=caught_up)
                caught_up = now_caught_up
                yield pb.WatchApprovalsResponse(approvals=last, caught_up=caught_up)


def _pieces(approvals: Sequence[Approval], max_bytes: int) -> list[list[approval_pb.Approval]]:
    """Returns approvals as messages, in pieces of about `max_bytes` at most: one, unless they are large."""
    pieces: list[list[approval_pb.Approval]] = [[]]
    size_bytes = 0
    for message in map(convert.approval, approvals):
        if pieces[-1] and size_bytes + message.ByteSize() > max_bytes:
            pieces.append([])
            size_bytes = 0
        pieces[-1].append(message)
        size_bytes += message.ByteSize()
    return pieces
