"""Deletes runs that have ended, whole families of them at a time: DeleteRuns.

One transaction a batch: it locks the status rows in order of ids, looks again at what may be deleted (in a later
statement, so that it sees what whoever held the locks has committed), and deletes DBOS's rows and ours.

**Who may write these rows?** A run that has ended is written by nobody any more, and is never revived. A fork locks
the run that it is made from, and the children that it needs, before it copies: it comes before, and holds them back,
or after, and finds them gone. A start of the same id waits for the key, and is a new run.

**What if we die on the next line?** A batch is one commit: whole families are gone, the others are whole. A repeat of
the call deletes what is left.

**What if the reply to COMMIT is lost?** The transaction is repeated, finds nothing of the batch, and is done; what its
first attempt deleted is counted.

**What if two delete at once?** The second one waits for the locks, finds that there is less than it had planned, and
plans anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import sqlalchemy as sa
import structlog

from perdure_service.durable.operation import Operation
from perdure_service.durable.requests import DeleteCommand, Deleted
from perdure_service.durable.runtime import Runtime
from perdure_service.store import deletions
from perdure_service.store.deletions import Families, Member
from perdure_service.store.sqlstates import reading, retrying

BATCH_RUNS = 100
"""Runs of one transaction; a larger family is one by itself."""
PAGE_RUNS = 200
"""Runs that one statement looks for."""
CALL_RUNS = 1_000
"""Runs that one call deletes, about: it stops at the end of the page that reaches this."""
CALL_PATIENCE_S = 5.0
"""How long one call goes on; what is left is for the next one."""
SAMPLE_RUNS = 100
"""Ids that the answer names."""
PLANS = 5
"""How often a batch is planned while others change it; then it is left for another call."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

log = structlog.get_logger()


class Changed(Exception):
    """What may be deleted is not what was planned."""


Plan = Callable[[sa.Connection, Sequence[str]], Families]
"""Returns the families of some runs, and which of them must be left alone."""


class _Call:
    """What one call has deleted so far, or would delete."""

    def __init__(self, runtime: Runtime, *, validate_only: bool) -> None:
        self._runtime = runtime
        self._validate_only = validate_only
        self._deadline = time.monotonic() + CALL_PATIENCE_S
        self.members: dict[str, Member] = {}
        self.held: set[str] = set()

    @property
    def enough(self) -> bool:
        """Whether the rest is for another call."""
        return len(self.members) >= CALL_RUNS or time.monotonic() > self._deadline

    def take(self, roots: Sequence[str]) -> None:
        """Deletes the families of some runs, or notes which are left alone."""
        if not roots:
            return
        found = self._plan(roots)
        self.held |= found.held
        for batch in deletions.in_batches(found, BATCH_RUNS):
            done = batch if self._validate_only else self._delete(batch)
            for family in done.deletable.values():
                self.members.update((member.workflow_id, member) for member in family)

    def _plan(self, roots: Sequence[str]) -> Families:
        return retrying(self._runtime.engine, "runs.plan_deletion", lambda conn: deletions.families(conn, roots))

    def _delete(self, batch: Families) -> Families:
        """Deletes a batch and returns what was deleted: it, or what it has become meanwhile."""
        roots = list(batch.deletable)
        for _ in range(PLANS):
            try:
                delete_families(self._runtime, batch)
            except Changed:
                batch = self._plan(roots)
                self.held |= batch.held
                if not batch.deletable:
                    return batch
            else:
                return batch
        self.held |= set(roots)
        return Families({}, frozenset())

    def result(self, *, more: bool = False, unfinished: Sequence[str] = (), missing: Sequence[str] = ()) -> Deleted:
        oldest = sorted(self.members.values(), key=lambda one: (one.created_at or _EPOCH, one.workflow_id))
        sample = [one.run_id for one in oldest[:SAMPLE_RUNS]]
        return Deleted(len(oldest), sample, more, unfinished, missing)


def delete(runtime: Runtime, command: DeleteCommand) -> Deleted:
    """Deletes runs; returns what was deleted, and what of `run_ids` was not. Blocks.

    Raises:
        StoreUnavailable: The database went away; some batches may be deleted, and a repeat deletes the rest.
    """
    call = _Call(runtime, validate_only=command.validate_only)
    result = _by_ids(runtime, call, command) if command.run_ids else _by_filter(runtime, call, command)
    if result.count and not command.validate_only:
        log.info(
            "runs.deleted",
            namespace=command.namespace,
            caller=command.caller,
            count=result.count,
            conditions=["run_ids"] if command.run_ids else sorted(command.run_filter.members),
        )
    return result


def _by_ids(runtime: Runtime, call: _Call, command: DeleteCommand) -> Deleted:
    found = reading(
        runtime.engine, "runs.find_many", lambda conn: deletions.find(conn, command.namespace, command.run_ids)
    )
    roots = list(found.values())
    done = 0
    while done < len(roots) and not call.enough:
        call.take(roots[done : done + PAGE_RUNS])
        done += PAGE_RUNS
    unfinished = [run_id for run_id in command.run_ids if found.get(run_id) in call.held]
    missing = [run_id for run_id in command.run_ids if run_id not in found]
    return call.result(more=done < len(roots), unfinished=unfinished, missing=missing)


def _by_filter(runtime: Runtime, call: _Call, command: DeleteCommand) -> Deleted:
    after: tuple[datetime, str] | None = None
    while True:
        page = reading(
            runtime.engine,
            "runs.deletion_candidates",
            lambda conn, after=after: deletions.candidates(  # type: ignore[misc]
                conn, command.namespace, command.run_filter, after, PAGE_RUNS
            ),
        )
        call.take([workflow_id for _, workflow_id in page])
        if len(page) < PAGE_RUNS:
            return call.result()
        after = page[-1]
        if call.enough:
            # Without progress a caller that repeats while there is more would never end.
            return call.result(more=bool(call.members))


def delete_families(runtime: Runtime, batch: Families, plan: Plan = deletions.families) -> None:
    """Deletes families in one transaction.

    Args:
        runtime: The engine.
        batch: What was planned.
        plan: How: it is planned again under the locks.

    Raises:
        Changed: They are not as they were planned; nothing was deleted.
    """
    database, workflow_ids, roots = runtime.database, batch.workflow_ids, list(batch.deletable)

    def check(operation: Operation, conn: sa.Connection) -> None:
        locked = deletions.lock(conn, workflow_ids)
        if operation.repeated and not locked:
            return  # deleted by an attempt whose reply was lost
        if plan(conn, roots).workflow_ids != workflow_ids:
            raise Changed

    runtime.executions.forget_end(workflow_ids)
    with database.bounded():
        database.delete_checked(workflow_ids, check)
