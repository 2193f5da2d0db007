"""What an execution's run had recorded before it began: asked of the database in pages, or known to be nothing.

**Only the owner records.** Every row of a run's operations is written under its owner's token, checked in the same
transaction (`_check_owner_txn`); a fork's are copied in the transaction that makes the fork; a rewind, which takes some
away, takes the token, too. So what is recorded when an execution gets its token is what it will find for as long as it
has it, and what comes after is its own. That may be read at any time:

* What a page shows besides, of the execution itself, it never asks for: it has come to those numbers before.
* An execution that has lost its run may see what its successor records, or not see it. It is a zombie either way: it
  can commit nothing, and the gate of the lease keeps a late one from beginning a body (`leases`).

**Each number is answered once.** Whoever asks a second time may be the repeat of a transaction whose reply was lost,
and looks for its own doing; that is in the database, not here. For the same reason nobody is answered from here within
a transaction. It also lets go of the outputs as the replay passes them.

A run that this process has begun has nothing recorded, if its start was written once and by us. After a start whose
reply was lost another executor may have had the run for a while; then it is read, like one that was claimed.
"""

from __future__ import annotations

import threading
from enum import Enum

from perdure_service.store.recordings import Page, RecordedOperation


class Answer(Enum):
    """What a recording says of a number when it does not have the operation."""

    NOTHING = "nothing is recorded there"
    UNREAD = "the page of it must be read first"
    ASK = "it has been answered before: ask the database"


class Recording:
    """What one execution found. Thread-safe; reading a page is for the caller, who holds `reading` meanwhile."""

    __slots__ = ("_answered", "_lock", "_names", "_operations", "complete", "reading", "up_to")

    def __init__(self, *, nothing: bool = False) -> None:
        """Creates it.

        Args:
            nothing: Whether it is known that nothing is recorded; else that is to be read.
        """
        self.complete = nothing
        """Whether all is read."""
        self._operations: dict[int, RecordedOperation] = {}
        self._names: dict[int, str] = {}
        self._answered: set[int] = set()
        self._lock = threading.Lock()
        self.reading = threading.Lock()
        self.up_to = 0
        """The last number that was read; what is recorded up to here is known."""

    def take(self, function_id: int) -> RecordedOperation | Answer:
        """Returns what is recorded under a number, once."""
        with self._lock:
            if function_id in self._answered:
                return Answer.ASK
            if function_id > self.up_to and not self.complete:
                return Answer.UNREAD
            self._answered.add(function_id)
            return self._operations.pop(function_id, Answer.NOTHING)

    def extend(self, page: Page) -> None:
        """Adds the page after `up_to`."""
        with self._lock:
            for operation in page.operations:
                self._operations[operation.function_id] = operation
                self._names[operation.function_id] = operation.name
                self.up_to = operation.function_id
            self.complete = self.complete or page.last

    def next_after(self, function_id: int) -> tuple[int, str] | Answer:
        """Returns number and name of the first operation recorded after a number."""
        with self._lock:
            later = [number for number in self._names if number > function_id]
            if later:
                return min(later), self._names[min(later)]
            return Answer.NOTHING if self.complete else Answer.UNREAD
