"""What an agent's author imports: `agent` or `expose` to declare one, and `run` to talk to the run it is in.

Everything else in an agent is DBOS's own API: steps, sleep, messages, child workflows. `tool_loop` has a model work
with tools.
"""

from perdure_service.agents.context import run
from perdure_service.agents.declaration import agent, expose
from perdure_service.domain.approvals import ApprovalResult
from perdure_service.domain.authoring import ApprovalTimeout, OutputTooLarge, SignalTimeout
from perdure_service.domain.budgets import BudgetExceeded

__all__ = [
    "ApprovalResult",
    "ApprovalTimeout",
    "BudgetExceeded",
    "OutputTooLarge",
    "SignalTimeout",
    "agent",
    "expose",
    "run",
]
