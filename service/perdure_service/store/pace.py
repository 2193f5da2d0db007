"""How large a batch of the checkpoint writer had better be; why is said there (`checkpoint_writer`)."""

from __future__ import annotations

import time
from collections.abc import Callable

FULL = 0.85
"""Of a core, that the process must use to have all the work that it can do: the interpreter's lock lets it use one."""
FULL_OF_MANY = 0.65
"""The same where batches of `MANY_ROWS` are to be had. Where others use the processors, too, whoever holds the lock is
often not running: with 128 clients 0.85 was hardly reached, the pace came and went, and that cost 2 to 9 % of the runs
a second. (With nothing else on the machine it made no difference, and with 2 and 4 clients 0.65 costs as much.)"""
MANY_ROWS = 16
"""If a batch had better have so many, it is the writer's threads that write: then batches are larger, and with 128
clients 5 to 10 % more runs a second; with 32 it is the same, with 8 it is the agents' loop that makes 5 % more."""
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
            used = (spent - self._spent) / (now - self._looked)
            self._looked, self._spent = now, spent
            wanted = SHARE * self._moving(MOVED_WITHIN_S) if used >= FULL_OF_MANY else 0.0
            full = used >= (FULL_OF_MANY if max(wanted, self._rows) >= MANY_ROWS else FULL)
            self._rows *= FADES_FULL if full else FADES
            if full:
                self._rows = max(self._rows, wanted)
        return self._rows

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.monotonic(), time.process_time()
