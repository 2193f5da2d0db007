"""Where a run is to crash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """A commit of a run: that of a step, or (0) of its end; right before it, or right after it."""

    step_id: int
    before: bool = False

    def __str__(self) -> str:
        return f"{'before' if self.before else 'after'} " + (f"step {self.step_id}" if self.step_id else "its end")


class CrashNeverHappened(AssertionError):
    """The run ended, or the test did, before it came to the point at which it was to crash."""
