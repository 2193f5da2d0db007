"""What a run is that no living executor can continue, and what can be done about it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from perdure_service.domain.runs import DEFAULT_NAMESPACE, RunKey, RunState


class StrandedReason(StrEnum):
    """Why nobody continues a run; names as in the API without their prefix."""

    NO_EXECUTOR_OF_VERSION = "NO_EXECUTOR_OF_VERSION"
    NO_EXECUTOR_OF_AGENT = "NO_EXECUTOR_OF_AGENT"


@dataclass(frozen=True, slots=True)
class StrandedRun:
    """A run that nobody continues.

    Attributes:
        key: Which run.
        agent: Its agent; of a foreign workflow that nobody has claimed, the workflow's name.
        agent_version: The version of its agent; empty for such a workflow.
        application_version: The version that its executor must have.
        state: What it is doing, or would be.
        reason: Why nobody continues it.
        parent: The run that started it, if one did.
        code_elsewhere: Whether a living executor of another version has its agent in its version.
        create_time: When it was created.
    """

    key: RunKey
    agent: str
    agent_version: str
    application_version: str
    state: RunState
    reason: StrandedReason
    parent: RunKey | None
    code_elsewhere: bool
    create_time: datetime

    @property
    def advice(self) -> str:
        """The ways out, for people, each with its commands; see `service/docs/runs.md`, which tells them apart.

        The old run is cancelled before it is forked: so its children are, and the fork starts them anew. The fork of
        a run that still waits for a stranded child would wait for it, too.
        """
        if self.reason is StrandedReason.NO_EXECUTOR_OF_VERSION:
            setting = shlex.quote(f"PERDURE_APPLICATION_VERSION={self.application_version}")
            back = f"Start a server of its version: `{setting} perdure-server serve` with the code of that version."
        else:
            name = f"{self.agent}@{self.agent_version}" if self.agent_version else self.agent
            back = f"Serve {name} on a server of application version {self.application_version} (--agents MODULE)."
        return f"{back} {self._fork} Or end it: `{_command('cancel', self.key)}`."

    @property
    def _fork(self) -> str:
        if self.parent is not None:
            return f"Or see to the run that started it, {self.parent.run_id}: a fork of that starts this one anew."
        commands = f"`{_command('cancel', self.key)}`, then `{_command('fork', self.key)}"
        if self.code_elsewhere:
            return f"Or continue it in the code that is served now: {commands}`."
        return f"Or continue it in a version that is served now (`perdure agents`): {commands} --version VERSION`."


def _command(verb: str, key: RunKey) -> str:
    namespace = "" if key.namespace == DEFAULT_NAMESPACE else f"--namespace {key.namespace} "
    return f"perdure {namespace}{verb} {shlex.quote(key.run_id)}"
