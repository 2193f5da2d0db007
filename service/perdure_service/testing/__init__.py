"""What an agent's author imports in tests: a harness that runs agents without a server, and crashes them."""

from perdure_service.errors import PerdureError
from perdure_service.testing.blocking import BlockingHarness, BlockingRun
from perdure_service.testing.decisions import approval, rejection
from perdure_service.testing.harness import AgentHarness
from perdure_service.testing.model import Breaks, Calls, Fails, ModelCall, ScriptedModel
from perdure_service.testing.points import CrashNeverHappened
from perdure_service.testing.replay import ReplayDiffers
from perdure_service.testing.runs import HarnessRun, RunFailed

__all__ = [
    "AgentHarness",
    "BlockingHarness",
    "BlockingRun",
    "Breaks",
    "Calls",
    "CrashNeverHappened",
    "Fails",
    "HarnessRun",
    "ModelCall",
    "PerdureError",
    "ReplayDiffers",
    "RunFailed",
    "ScriptedModel",
    "approval",
    "rejection",
]
