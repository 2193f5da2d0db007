"""Statuses that are written by others than a run's own execution: from outside and by sweeps (claims: see `claims`).

`_changing` locks the rows, lets DBOS write, and logs what changed. The two sweeps (released delays, passed deadlines)
are ours, as DBOS's use the host's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import sqlalchemy as sa
from dbos._error import DBOSException
from dbos._sys_db_postgres import PostgresSystemDatabase

from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.runs import DEADLINE_PASSED, TERMINAL_STATUSES, RunState
from perdure_service.durable.claims import ClaimDatabase
from perdure_service.durable.executions import now_ms
from perdure_service.durable.operation import Operation
from perdure_service.durable.transactions import QUEUE
from perdure_service.store import deletions, parked, payloads, runs

SWEEPS = "background_jobs"
"""The name of DBOS's lock for its sweeps."""

SWEEP_LIMIT = 200
"""Rows that one sweep changes; the next one follows within a second."""

# Written into the statements: the sweeps live on partial indexes, which a plan that is made without the values of a
# prepared statement could not use. It would read all runs there are, every second.
_DELAYED: sa.ColumnElement[str] = sa.literal_column("'DELAYED'")
_UNFINISHED: list[sa.ColumnElement[str]] = [
    sa.literal_column(f"'{status}'") for status in ("ENQUEUED", "PENDING", "DELAYED")
]


class StatusDatabase(ClaimDatabase):
    """See the module."""

    def close_ended(self, workflow_ids: Sequence[str]) -> None:
        """Appends the terminal event of runs that ended without one: a foreign client cancelled them."""
        operation = Operation(None)

        def finish(conn: sa.Connection) -> None:
            self._lock(conn, workflow_ids)
            for ended in self.ledger.ended(conn, workflow_ids):
                events, after = self.ledger.close(conn, ended)
                operation.add(ended.key.workflow_id, *events)
                operation.after(after)

        operation.finish = finish
        self.run_operation(operation)

    def close_ended_if_any(self, workflow_ids: Sequence[str]) -> list[str]:
        """Does what `close_ended` does when one of the runs needs it, else it only reads; returns those deleted."""
        with self._plain_begin() as conn:
            ended = [one.key.workflow_id for one in self.ledger.ended(conn, workflow_ids)]
            gone = deletions.gone(conn, workflow_ids)
        if ended:
            self.close_ended(ended)
        return gone

    # ---- statuses that are changed from outside ----------------------------------------------------------------------

    @contextmanager
    def _changing(self, workflow_ids: Sequence[str], reason: str = "", end_reason: str | None = None) -> Iterator[None]:
        """Lets DBOS change the statuses of these runs and logs each change in the same transaction."""
        operation = Operation(None)

        def begin(conn: sa.Connection) -> None:
            self._lock(conn, workflow_ids)
            self.ledger.adopt(conn, workflow_ids)
            operation.facts["before"] = self.ledger.states(conn, workflow_ids)
            operation.facts["logged"] = runs.logged_states(conn, workflow_ids)

        def finish(conn: sa.Connection) -> None:
            before = operation.facts["before"]
            changed: list[str] = []
            for workflow_id, (status, state) in self.ledger.states(conn, workflow_ids).items():
                old = before.get(workflow_id)
                if old is None or old == (status, state):
                    continue
                changed.append(workflow_id)
                told = operation.facts["logged"].get(workflow_id, (old[1], 0))[0]
                if status in TERMINAL_STATUSES:
                    for ended in self.ledger.ended(conn, [workflow_id]):
                        events, after = self.ledger.close(conn, ended, told, reason=reason, end_reason=end_reason)
                        operation.add(workflow_id, *events)
                        operation.after(after)
                else:
                    data = {"from": told, "to": state, "reason": reason}
                    operation.add(workflow_id, Event(EventKind.STATE_CHANGED, now_ms(), data))
            operation.facts["changed"] = changed
            self._wake_queues(conn, operation, changed)

        def done() -> None:
            for workflow_id in operation.facts["changed"]:
                for execution in self.executions.of(workflow_id):
                    self.executions.kill(execution, reason or "its run was taken away")

        operation.begin, operation.finish, operation.done = begin, finish, done
        with self.operations.open(operation):
            yield

    def cancel_workflows(
        self, workflow_ids: list[str], cancel_children: bool = False, *, reason: str = "cancelled"
    ) -> None:
        seen: set[str] = set()
        frontier = list(workflow_ids)
        while frontier:
            seen.update(frontier)
            # What has ended stays ended: DBOS would cancel a dead-lettered run once more.
            statuses = self.ledger.statuses(self.engine, frontier)
            open_ids = [workflow_id for workflow_id, status in statuses.items() if status not in TERMINAL_STATUSES]
            if open_ids:
                with self._changing(open_ids, reason):
                    super().cancel_workflows(open_ids)
            if not cancel_children:
                return
            frontier = [child for child in self._get_direct_children(frontier) if child not in seen]
            reason = "its parent was cancelled"

    def resume_workflows(self, workflow_ids: list[str], **rest: Any) -> None:
        statuses = self.ledger.statuses(self.engine, workflow_ids)
        ended = [workflow_id for workflow_id, status in statuses.items() if status in TERMINAL_STATUSES]
        if ended:
            raise DBOSException(f"{', '.join(ended)} has ended, and a run that ended is not revived; fork it")
        for queue, ids in self._by_queue(workflow_ids).items():
            with self._changing(ids, "resumed"):
                super().resume_workflows(ids, **{**rest, "queue_name": rest.get("queue_name") or queue})

    def rewind_workflow(self, workflow_id: str, start_step: int, **_rest: Any) -> None:
        raise DBOSException(f"{workflow_id}: a run that ended is not revived in place; fork it from step {start_step}")

    def fork_workflow(
        self, original_workflow_ids: list[str], forked_workflow_ids: list[str], start_steps: list[int], **rest: Any
    ) -> list[str]:
        operation = Operation(None)

        def finish(conn: sa.Connection) -> None:
            self.ledger.adopt(conn, forked_workflow_ids, operation.add)
            payloads.copy_uses(conn, dict(zip(forked_workflow_ids, original_workflow_ids, strict=True)))

        operation.finish = finish
        queue_of = self._queues_of(original_workflow_ids)
        rest["queue_name"] = rest.get("queue_name") or queue_of.get(original_workflow_ids[0], QUEUE)
        with self.operations.open(operation):
            return super().fork_workflow(original_workflow_ids, forked_workflow_ids, start_steps, **rest)

    def _queues_of(self, workflow_ids: Sequence[str]) -> dict[str, str]:
        """Returns the queue of each workflow that exists."""
        ws = self.tables.workflow_status
        with self._plain_begin() as conn:
            query = sa.select(ws.c.workflow_uuid, ws.c.queue_name).where(ws.c.workflow_uuid.in_(workflow_ids))
            return {row[0]: row[1] or QUEUE for row in conn.execute(query)}

    def _by_queue(self, workflow_ids: Sequence[str]) -> dict[str, list[str]]:
        """Returns workflows by their queues; those that do not exist are in the first, for DBOS to refuse."""
        queue_of = self._queues_of(workflow_ids)
        found: dict[str, list[str]] = {QUEUE: []}
        for workflow_id in workflow_ids:
            found.setdefault(queue_of.get(workflow_id, QUEUE), []).append(workflow_id)
        return {queue: ids for queue, ids in found.items() if ids}

    def _wake_queues(self, conn: sa.Connection, operation: Operation, workflow_ids: Sequence[str]) -> None:
        """Has the queues looked into, once this commits, in which some of these runs wait now."""
        ws = self.tables.workflow_status
        query = (
            sa.select(ws.c.queue_name).where(ws.c.workflow_uuid.in_(workflow_ids), ws.c.status == "ENQUEUED").distinct()
        )
        for queue in [row[0] for row in conn.execute(query)] if workflow_ids else ():
            operation.after(partial(self.placement.queued, queue))

    def delete_checked(
        self, workflow_ids: Sequence[str], check: Callable[[Operation, sa.Connection], None] | None = None
    ) -> None:
        """Deletes everything about these workflows, DBOS's rows and ours, in one transaction.

        Args:
            workflow_ids: Those that `check` allows.
            check: Called first in the transaction; it locks the status rows, and may raise.
        """
        ids = sorted(workflow_ids)
        unused: list[str] = []

        def finish(conn: sa.Connection) -> None:
            unused[:] = deletions.delete_ours(conn, ids)

        operation = Operation(None, finish=finish, done=lambda: self.payloads.forget_objects(unused), deletes=ids)
        operation.begin = partial(check, operation) if check else partial(deletions.lock, workflow_ids=ids)
        with self.operations.open(operation):
            super()._delete_workflows(ids)

    def _delete_workflows(self, workflow_ids: list[str]) -> None:
        self.delete_checked(workflow_ids)

    def set_workflow_delay(self, workflow_id: str, **rest: Any) -> None:
        with self._changing([workflow_id], "its delay was changed"):
            super().set_workflow_delay(workflow_id, **rest)

    def dead_letter_workflows(self, workflow_ids: list[str], *, min_recovery_attempts: int) -> None:
        with self._changing(workflow_ids, "recovered too often"):
            super().dead_letter_workflows(workflow_ids, min_recovery_attempts=min_recovery_attempts)

    def reenqueue_for_recovery(self, workflow_id: str, executor_ids: list[str], recovery_queue_name: str) -> bool:
        del recovery_queue_name  # the unlimited internal queue
        with self._changing([workflow_id], "given back to the queue"):
            return super().reenqueue_for_recovery(workflow_id, executor_ids, QUEUE)

    # ---- parked runs ---------------------------------------------------------------------------------------------

    def release(
        self,
        conn: sa.Connection,
        workflow_ids: Sequence[str],
        operation: Operation,
        reason: str,
        states: dict[str, tuple[RunState, int]] | None = None,
    ) -> list[str]:
        """Puts parked runs, whose locks the caller holds, back into their queues, with their events; returns them.

        Args:
            conn: The operation's transaction.
            workflow_ids: Runs that were seen, under the lock, to be parked for what has come.
            operation: Takes the events.
            reason: What has come, for people.
            states: The state that the log of each tells of, and its execution; None to look them up.
        """
        if not workflow_ids:
            return []
        before = runs.logged_states(conn, workflow_ids) if states is None else states
        released = parked.release(conn, workflow_ids)
        for workflow_id in released:
            state, number = before[workflow_id]
            data = {"from": state.value, "to": RunState.QUEUED.value, "reason": reason}
            operation.add(workflow_id, Event(EventKind.STATE_CHANGED, now_ms(), data, execution=number))
        if released:
            operation.after(self.poke)
        return released

    def wake(self, workflow_ids: Sequence[str]) -> list[str]:
        """Puts those of the runs back into their queues that are parked and for which something has come.

        The rows are locked by a statement of their own, first: so either this sees the mark of a run that is just
        being parked, or who parks it sees what has come.
        """
        operation = Operation(None)

        def finish(conn: sa.Connection) -> None:
            self._lock(conn, sorted(set(workflow_ids)))
            come = parked.has_come(conn, workflow_ids)
            operation.facts["woken"] = self.release(conn, come, operation, "what it waited for is there")

        operation.finish = finish
        self.run_operation(operation)
        woken: list[str] = operation.facts["woken"]
        return woken

    # ---- sweeps, on the database's clock -------------------------------------------------------------------------

    @contextmanager
    def background_job_lock(self, job_name: str) -> Iterator[bool]:
        """Takes the lock of DBOS's background jobs, the sweeps, only when there is something to sweep.

        Every server asks every second, so what it asks is one statement, and no transaction.
        """
        if job_name == SWEEPS and not self._anything_due():
            yield False
            return
        with super().background_job_lock(job_name) as acquired:
            yield acquired

    def _anything_due(self) -> bool:
        ws = self.tables.workflow_status
        ours = self._name_filter(ws.c.application_name, self.app_name)
        delayed = sa.exists().where(ws.c.status == _DELAYED, ws.c.delay_until_epoch_ms <= self._now_ms_sql(), ours)
        expired = sa.exists().where(
            ws.c.status.in_(_UNFINISHED),
            ws.c.workflow_deadline_epoch_ms <= self._now_ms_sql(),
            ours,
        )
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            return bool(conn.execute(sa.select(sa.or_(delayed, expired))).scalar())

    def transition_delayed_workflows(self) -> None:
        """Releases what was delayed until now."""
        ws = self.tables.workflow_status
        operation = Operation(None)
        with self.operations.open(operation), self.engine.begin() as conn:
            due = (
                sa.select(ws.c.workflow_uuid)
                .where(ws.c.status == _DELAYED, ws.c.delay_until_epoch_ms <= self._now_ms_sql())
                .where(self._name_filter(ws.c.application_name, self.app_name))
                .order_by(ws.c.workflow_uuid)
                .limit(SWEEP_LIMIT)
                .with_for_update(skip_locked=True, key_share=True)
            )
            ids = [row[0] for row in conn.execute(due)]
            if not ids:
                return
            self.ledger.adopt(conn, ids)
            released = {
                "status": "ENQUEUED",
                "deduplication_id": sa.case((ws.c.is_debounced.is_(True), None), else_=ws.c.deduplication_id),
            }
            waited = parked.parked_of(conn, ids)
            self.release(conn, waited, operation, "its wait is over")
            ids = [workflow_id for workflow_id in ids if workflow_id not in waited]
            conn.execute(sa.update(ws).where(ws.c.workflow_uuid.in_(ids), ws.c.status == _DELAYED).values(**released))
            for workflow_id in ids:
                data = {"from": RunState.SCHEDULED.value, "to": RunState.QUEUED.value, "reason": "its time has come"}
                operation.add(workflow_id, Event(EventKind.STATE_CHANGED, now_ms(), data))
            self._wake_queues(conn, operation, ids)

    def cancel_timed_out_workflows(self, limit: int) -> list[str]:
        """Ends runs whose deadline has passed, as EXPIRED."""
        ws = self.tables.workflow_status
        with self.operations.open(Operation(None)), self.engine.begin() as conn:
            due = (
                sa.select(ws.c.workflow_uuid)
                .where(
                    ws.c.status.in_(_UNFINISHED),
                    ws.c.workflow_deadline_epoch_ms <= self._now_ms_sql(),
                    self._name_filter(ws.c.application_name, self.app_name),
                )
                .order_by(ws.c.workflow_deadline_epoch_ms)
                .limit(min(limit, SWEEP_LIMIT))
            )
            ids = [row[0] for row in conn.execute(due)]
        if ids:
            # Not one transaction with the search: each row is looked at again under its lock.
            with self._changing(ids, "its deadline has passed", DEADLINE_PASSED):
                PostgresSystemDatabase.cancel_workflows(self, ids)
        return ids
