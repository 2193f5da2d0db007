"""Serves AgentCatalogService: request in, one call of the run service, response out."""

# ruff: noqa: ARG002 - gRPC gives every method a context, whether it needs one or not

from __future__ import annotations

from perdure.v1 import agent_catalog_service_pb2 as pb
from perdure.v1.agent_catalog_service_pb2_grpc import AgentCatalogServiceServicer

from perdure_service.durable.service import RunService
from perdure_service.rpc import convert
from perdure_service.rpc.handlers import RpcContext
from perdure_service.rpc.validation import Violations


class Catalog(AgentCatalogServiceServicer):
    """The agents that can be started."""

    def __init__(self, service: RunService) -> None:
        self._service = service

    async def ListAgents(self, request: pb.ListAgentsRequest, context: RpcContext) -> pb.ListAgentsResponse:
        """Returns a page of agents."""
        found = Violations()
        page_size = found.page_size(request.page_size)
        page_token = found.token("page_token", request.page_token)
        found.raise_any()
        page = await self._service.list_agents(page_size=page_size, page_token=page_token)
        return pb.ListAgentsResponse(agents=map(convert.agent, page.items), next_page_token=page.next_token)

    async def GetAgent(self, request: pb.GetAgentRequest, context: RpcContext) -> pb.GetAgentResponse:
        """Returns an agent."""
        found = Violations()
        name = found.name("agent", request.agent, required=True)
        version = found.name("agent_version", request.agent_version)
        found.raise_any()
        return pb.GetAgentResponse(agent=convert.agent(await self._service.get_agent(name, version)))
