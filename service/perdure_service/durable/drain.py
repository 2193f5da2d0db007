"""Hands over what a stopping executor runs: each run as soon as nothing of it is in progress, the rest at the end.

A step body that is in progress may finish and is recorded, as ever; nothing new begins (`Executions.retire_all`). A run
of which no body is in progress, and no commit, goes back to the queue at once, so what only waits, or is between two
steps, moves first. What is still in a body when the time is up goes back, too, and its step runs again elsewhere.

**Nothing is done twice:** an execution is marked dead before its run is given back, so its code begins nothing more,
and what it had in progress is refused by the owner's fence. **If we die on the next line**, or the database is away,
the run stays under this executor's lease, which is about to end. **If the reply to COMMIT is lost**, the repeat finds
rows that are not ours any more, and leaves them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import sqlalchemy as sa
import structlog

from perdure_service.durable.executions import Execution, Executions, now_ms
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.transactions import QUEUE
from perdure_service.store import executors
from perdure_service.store.sqlstates import retrying

POLL_S = 0.02
"""How often it looks whether something has come to a rest."""

BUDGET = timedelta(seconds=2)
"""How long one hand-over is tried again: a database that is away must not hold up the end."""

REASON = "handed over: its server stops"
CELL_MOVED = "handed over: another region has its cell"

log = structlog.get_logger()


class Drain:
    """See the module."""

    def __init__(
        self,
        engine: sa.Engine,
        executions: Executions,
        ledger: Ledger,
        hint: Callable[[Sequence[str]], None],
        reason: str = REASON,
    ) -> None:
        """Creates it.

        Args:
            engine: The database.
            executions: What is executed here.
            ledger: Adopts what foreign clients made.
            hint: Told of runs that have news.
            reason: What the logs of the runs tell, for people.
        """
        self._engine = engine
        self._executions = executions
        self._ledger = ledger
        self._hint = hint
        self._reason = reason
        self._begun = False
        self._left: dict[str, str | None] = {}
        """What has stopped here and is not given back yet, by workflow id: the token it was executed under."""

    def begin(self) -> None:
        """Lets nothing new begin; call `step` from time to time, until `end`."""
        if not self._begun:
            self._begun = True
            self._executions.retire_all()

    def end(self) -> None:
        """Lets what comes from now on be executed here; `step` goes on with what was to be handed over."""
        if self._begun:
            self._begun = False
            self._executions.retire_no_more()

    def step(self) -> bool:
        """Hands over what has come to a rest; returns whether something is left that has not. Blocks."""
        retired = self._executions.retired
        if self._left or retired:
            self._hand_over([one for one in retired if _rests(one)])
        return bool(self._left or self._executions.retired)

    def run(self, deadline: float) -> None:
        """Hands over everything by a time on the monotonic clock. Blocks."""
        self.begin()
        while (self._left or len(self._executions)) and time.monotonic() < deadline:
            if not self._hand_over([one for one in self._executions if _rests(one)]):
                time.sleep(POLL_S)
        self._hand_over(list(self._executions))
        latest = time.monotonic() + BUDGET.total_seconds()
        while self._left and time.monotonic() < latest:
            if not self._hand_over([]):
                time.sleep(POLL_S)

    def _hand_over(self, executions: Sequence[Execution]) -> bool:
        """Stops these executions and gives back what has been stopped; returns whether anything was given back."""
        for one in executions:
            self._left[one.key.workflow_id] = one.owner_xid
            self._executions.kill(one, "this executor stops")
        if not self._left:
            return False
        batch = dict(sorted(self._left.items())[: executors.BATCH])

        def hand_over(conn: sa.Connection) -> tuple[list[executors.Requeued], set[str]]:
            given_back = executors.give_back_own(conn, batch, QUEUE, now_ms(), self._ledger.adopt, self._reason)
            return given_back, executors.still_own(conn, batch)

        try:
            given_back, held = retrying(self._engine, "drain.hand_over", hand_over, budget=BUDGET)
        except Exception as error:  # noqa: BLE001 - logged; the end of the lease gives them back
            log.warning("drain.hand_over_failed", error=type(error).__name__, runs=len(batch))
            return False
        for workflow_id in batch.keys() - held:  # what somebody else holds, e.g. our own last commit, is tried again
            self._left.pop(workflow_id)
        ids = [one.workflow_id for one in given_back]
        if ids:
            self._hint(ids)
            log.info("drain.handed_over", runs=len(ids))
        return bool(ids)


def _rests(execution: Execution) -> bool:
    """Returns whether nothing of an execution is in progress, nor waits to be written."""
    return not (execution.bodies or execution.busy or execution.slot.held or execution.has_events)
