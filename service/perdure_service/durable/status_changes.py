"""Statuses that are written by others than a run's own execution: from outside, by claims and by sweeps.

`_changing` locks the rows, lets DBOS write, and logs what changed. A claim is logged, and known to be executed here,
before it commits. The two sweeps (released delays, passed deadlines) are ours, as DBOS's use the host's clock.
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
from perdure_service.durable import metering
from perdure_service.durable.executions import Execution, now_ms
from perdure_service.durable.operation import Operation
from perdure_service.durable.transactions import QUEUE, Claim, TransactionalDatabase
from perdure_service.store import deletions, payloads, runs

SWEEP_LIMIT = 200
"""Rows that one sweep changes; the next one follows within a second."""


class StatusDatabase(TransactionalDatabase):
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
        with self._changing(workflow_ids, "resumed"):
            super().resume_workflows(workflow_ids, **{**rest, "queue_name": rest.get("queue_name") or QUEUE})

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
        rest["queue_name"] = rest.get("queue_name") or QUEUE
        with self.operations.open(operation):
            return super().fork_workflow(original_workflow_ids, forked_workflow_ids, start_steps, **rest)

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

    # ---- claims ------------------------------------------------------------------------------------------------------

    def _claim_gate(self, queue_name: str, partition_key: str | None) -> list[Any]:
        """Only what is registered here is taken: DBOS would take a run and then find that it has no code for it."""
        return [
            *super()._claim_gate(queue_name, partition_key),
            self.tables.workflow_status.c.name.in_(self._registered()),
        ]

    def start_queued_workflows(self, *arguments: Any, **rest: Any) -> Any:
        if self.stopping:
            return [], "worker_concurrency"
        with self._claiming(rest.get("owner_xid")):
            return super().start_queued_workflows(*arguments, **rest)

    def start_queued_partitioned_workflows(self, *arguments: Any, **rest: Any) -> Any:
        if self.stopping:
            return []
        with self._claiming(rest.get("owner_xid")):
            return super().start_queued_partitioned_workflows(*arguments, **rest)

    @contextmanager
    def _claiming(self, owner_xid: str | None) -> Iterator[None]:
        self._local.claim = Claim(owner_xid) if owner_xid else None
        try:
            yield
        finally:
            self._local.claim = None

    def _wf_in(self, table: Any, workflow_ids: Sequence[str], *arguments: Any, **rest: Any) -> Any:
        """Sees which rows a claim is about to take, so that an idle poll costs no statement of ours."""
        claim: Claim | None = getattr(self._local, "claim", None)
        if claim is not None:
            claim.workflow_ids.update(workflow_ids)
        return super()._wf_in(table, workflow_ids, *arguments, **rest)

    @contextmanager
    def _begin(self, isolation: str | None) -> Iterator[sa.Connection]:
        """Begins a claim: what it takes is logged, and is known to be executed here, before it commits."""
        operation = Operation(None)
        taken: list[Execution] = []

        claim: Claim | None = getattr(self._local, "claim", None)

        def finish(conn: sa.Connection) -> None:
            if claim is None or not claim.workflow_ids:
                return
            taken[:] = self.ledger.claimed(
                conn, sorted(claim.workflow_ids), claim.owner_xid, self.executor_id or "", operation.add
            )
            for execution in taken:
                self.executions.add(execution)
            operation.after(lambda: metering.begun(taken))

        operation.finish = finish
        with self.operations.open(operation):
            try:
                with self.operations.transaction(
                    lambda: super(StatusDatabase, self)._begin(isolation), lambda: None
                ) as conn:
                    yield conn
            except BaseException:
                for execution in taken:
                    self.executions.remove(execution)
                raise

    # ---- sweeps, on the database's clock -------------------------------------------------------------------------

    def transition_delayed_workflows(self) -> None:
        """Releases what was delayed until now."""
        ws = self.tables.workflow_status
        operation = Operation(None)
        with self.operations.open(operation), self.engine.begin() as conn:
            due = (
                sa.select(ws.c.workflow_uuid)
                .where(ws.c.status == "DELAYED", ws.c.delay_until_epoch_ms <= self._now_ms_sql())
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
            conn.execute(sa.update(ws).where(ws.c.workflow_uuid.in_(ids), ws.c.status == "DELAYED").values(**released))
            for workflow_id in ids:
                data = {"from": RunState.SCHEDULED.value, "to": RunState.QUEUED.value, "reason": "its time has come"}
                operation.add(workflow_id, Event(EventKind.STATE_CHANGED, now_ms(), data))

    def cancel_timed_out_workflows(self, limit: int) -> list[str]:
        """Ends runs whose deadline has passed, as EXPIRED."""
        ws = self.tables.workflow_status
        with self.operations.open(Operation(None)), self.engine.begin() as conn:
            due = (
                sa.select(ws.c.workflow_uuid)
                .where(
                    ws.c.status.in_(["ENQUEUED", "PENDING", "DELAYED"]),
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
