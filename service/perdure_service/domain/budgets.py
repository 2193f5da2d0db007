"""Decides when a run has used up what its agent allows it: steps begun, and tokens of its model calls."""

from __future__ import annotations

from dataclasses import dataclass


class BudgetExceeded(Exception):
    """A step would begin beyond the run's budget. Whoever catches it gets it again from the next step."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one run may use; 0 is no limit.

    Attributes:
        max_steps: How many steps with a body it may begin. Sleeps, waits, approvals and starts of child runs are free.
        max_tokens: How many tokens its model calls may use, sent and received. Those of its child runs are theirs.
    """

    max_steps: int = 0
    max_tokens: int = 0

    def check(self, *, steps: int, tokens: int) -> None:
        """Refuses an attempt of a step.

        Args:
            steps: The steps that the run has come to, this one included.
            tokens: What it has used. How many a call will use is not known before, so a step may begin while any are
                left, and the last one may use more.

        Raises:
            BudgetExceeded: With what was used and what is allowed.
        """
        if self.max_steps and steps > self.max_steps:
            allowed = f"{self.max_steps} step{'s' if self.max_steps > 1 else ''}"
            raise BudgetExceeded(f"the run's budget is {allowed}; this would be step {steps}")
        if self.max_tokens and tokens >= self.max_tokens:
            raise BudgetExceeded(f"the run's budget is {self.max_tokens} tokens; it has used {tokens}")


UNLIMITED = Budget()
