"""How large a batch of the checkpoint writer had better be; why is said there (`checkpoint_writer`)."""

from __future__ import annotations

import time
from collections.abc import Callable

FULL = 0.85
"""Of a core, that the process must use to have all the work that it can do: the interpreter's lock lets it use one."""
LOOK_EVERY_S = 0.05
MOVED_WITHIN_S = 0.25
"""A run moves when its code has called within this time: who waits for people or models brings no rows."""
SHARE = 0.7
"""Of the runs that move, whose rows make a batch large enough. 0.35 gained half as much; 1 waits for the slowest."""
FADES_FULL, FADES = 0.9, 0.5
"""What is left, at the next look, of how many moved: runs that began together also end together, and for a moment few
seem to move. When the process is not full any more, it should soon be forgotten."""


class Pace:
    """How many rows a batch had better have. For one thread at a time.

    It is asked under the writer's lock, and `moving` may take a lock under which nobody submits a row.
    """

    def __init__(self, moving: Callable[[float], int]) -> None:
        self._moving = moving
        self._looked, self._spent = self._read()
        self._rows = 0.0

    def rows(self) -> float:
        """Returns the number; any is enough when the process has time to spare."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            now, spent = self._read()
            full = spent - self._spent >= FULL * (now - self._looked)
            self._looked, self._spent = now, spent
            self._rows *= FADES_FULL if full else FADES
            if full:
                self._rows = max(self._rows, SHARE * self._moving(MOVED_WITHIN_S))
        return self._rows

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.monotonic(), time.process_time()
