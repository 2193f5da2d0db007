"""Claims: which of a queue's runs this executor takes, in transactions that keep the limits of queues and agents.

DBOS's own claim finds rows, locks them and makes them this executor's. Around it:

* it is asked for no more than `Placement` has room for, over all queues of the executor together;
* it finds only what is registered here (DBOS would take a run and then see that it has no code for it) and whose agent
  has room; of what it has found and locked, it takes what the agents' limits and shares allow;
* where executors share a limit, it locks the queue's row first, in a statement of its own, and everything it counts it
  reads after that, at READ COMMITTED. DBOS's REPEATABLE READ lets two executors count from one snapshot and take
  different rows, as when one with priority arrives between: five ran where four may. On CockroachDB, at SERIALIZABLE,
  the lock only spares the conflicts.

A run counts for a shared limit while its row says PENDING, whoever runs it, so the runs of an executor that was killed
count until they are given back. How often runs of a queue with a rate limit have begun is kept beside them
(`perdure.queue_start`): a row that is given back no longer tells when it had begun.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sqlalchemy as sa
import structlog

from perdure_service.domain.queues import QueueLimits
from perdure_service.durable import metering
from perdure_service.durable.executions import AgentKey, Execution
from perdure_service.durable.operation import Operation
from perdure_service.durable.placement import Room
from perdure_service.durable.transactions import TransactionalDatabase, agent_of
from perdure_service.store import queues

log = structlog.get_logger()


@dataclass
class Claim:
    """A transaction of a claim.

    Attributes:
        owner_xid: The ownership token of what it takes.
        limits: The queue's.
        room: What may be taken, shared by all transactions of the claim; None for a partitioned queue, not ours.
        queue: DBOS's object, a copy: what its limit on this executor says is what this transaction may take.
        version: The application version whose runs it takes.
        others_first: Agents that must let others of the same priority go first.
        fair: Whether agents that hold their share must.
        workflow_ids: The rows it is about to take.
        taken: The rows it has taken, in the order of the queue.
        over_share: Agents of which it let runs go, as they hold their share.
        conn: Its connection, once it has begun.
    """

    owner_xid: str
    limits: QueueLimits
    room: Room | None = None
    queue: Any = None
    version: str = ""
    others_first: frozenset[AgentKey] = frozenset()
    fair: bool = False
    workflow_ids: set[str] = field(default_factory=set)
    taken: list[str] = field(default_factory=list)
    over_share: set[AgentKey] = field(default_factory=set)
    conn: sa.Connection | None = None


def limits_of(queue: Any) -> QueueLimits:
    """Returns the limits of DBOS's queue, as its row has them."""
    limiter = queue._limiter
    return QueueLimits(
        queue.name,
        worker_concurrency=queue._worker_concurrency or 0,
        global_concurrency=queue._concurrency or 0,
        rate_limit=limiter["limit"] if limiter else 0,
        rate_period_s=float(limiter["period"]) if limiter else 0.0,
    )


class ClaimDatabase(TransactionalDatabase):
    """See the module."""

    # ---- what DBOS's queue threads call ------------------------------------------------------------------------------

    def get_queue(self, name: str, **rest: Any) -> Any:
        queue = super().get_queue(name, **rest)
        if queue is not None:
            self.placement.saw(limits_of(queue))
        return queue

    def dequeue_scopes(self, queue_name: str) -> Any:
        self.placement.polls(queue_name)
        return super().dequeue_scopes(queue_name)

    def start_queued_workflows(
        self, queue: Any, executor_id: str, app_version: str, queue_partition_key: str | None, *counts: Any, **rest: Any
    ) -> Any:
        if self.stopping:
            return [], "worker_concurrency"
        if queue_partition_key is not None:  # no queue of ours
            with self._claiming(Claim(rest["owner_xid"], limits_of(queue))):
                return super().start_queued_workflows(
                    queue, executor_id, app_version, queue_partition_key, *counts, **rest
                )
        ids: list[str] = []
        with self.placement.claim(limits_of(queue)) as room:
            claim_more = partial(self._claim_some, room, queue, executor_id, app_version, rest)
            others_first: frozenset[AgentKey] = frozenset()
            fair = room.share is not None
            while room.left > 0:
                try:
                    claim = claim_more(others_first, fair)
                except Exception as error:
                    if not ids:
                        raise
                    # What is committed is this executor's, and nobody would begin it, or miss it, if DBOS never knew.
                    log.info("queue.claim_cut_short", queue=queue.name, taken=len(ids), error=type(error).__name__)
                    room.cut_short = True
                    break
                ids += claim.taken
                if room.limit_reached:
                    break
                if claim.over_share:
                    others_first |= claim.over_share
                elif others_first:
                    others_first, fair = frozenset(), False  # nobody else waits: no slot stays free
                else:
                    break
        return ids, None

    def _claim_some(
        self,
        room: Room,
        queue: Any,
        executor_id: str,
        app_version: str,
        rest: dict[str, Any],
        others_first: frozenset[AgentKey],
        fair: bool,
    ) -> Claim:
        limits = limits_of(queue)
        bounded = copy.copy(queue)
        bounded._worker_concurrency = room.left
        claim = Claim(rest["owner_xid"], limits, room, bounded, app_version, others_first, fair)
        with self._claiming(claim):
            ids, stopped_by = super().start_queued_workflows(bounded, executor_id, app_version, None, 0, **rest)
        claim.taken = ids
        # What bounds a claim by a limit that is shared is not told when it leaves room for some.
        room.limit_reached = stopped_by is not None or (limits.shared and bool(ids))
        return claim

    def start_queued_partitioned_workflows(self, queue: Any, *arguments: Any, **rest: Any) -> Any:
        if self.stopping:
            return []
        with self._claiming(Claim(rest["owner_xid"], limits_of(queue))):
            return super().start_queued_partitioned_workflows(queue, *arguments, **rest)

    @contextmanager
    def _claiming(self, claim: Claim) -> Iterator[None]:
        self._local.claim = claim
        try:
            yield
        finally:
            self._local.claim = None

    @property
    def _claim(self) -> Claim | None:
        claim: Claim | None = getattr(self._local, "claim", None)
        return claim

    # ---- inside DBOS's claim -----------------------------------------------------------------------------------------

    def _claim_gate(self, queue_name: str, partition_key: str | None) -> list[Any]:
        ws = self.tables.workflow_status
        gates = [*super()._claim_gate(queue_name, partition_key), ws.c.name.in_(self._registered())]
        claim = self._claim
        if claim is None or claim.room is None:
            return gates
        full = [name for name in self._registered() if agent_of(name) in claim.room.full_agents]
        if full:
            gates.append(ws.c.name.notin_(full))
        if claim.others_first:
            behind = [name for name in self._registered() if agent_of(name) in claim.others_first]
            waiting = ws.alias("waiting")
            first = (
                sa.select(sa.func.min(waiting.c.priority))
                .where(waiting.c.queue_name == queue_name, waiting.c.status == "ENQUEUED")
                .where(waiting.c.name.in_(self._registered()), waiting.c.name.notin_(full))
                .where(waiting.c.application_version == claim.version)
                .scalar_subquery()
            )
            # Among equal priorities only: an agent's share is no reason to let what is less urgent go first.
            gates += [ws.c.name.notin_(behind), ws.c.priority <= first]
        return gates

    def _wf_in(self, table: Any, workflow_ids: Sequence[str], *arguments: Any, **rest: Any) -> Any:
        """Sees which rows a claim has found and locked, and leaves it those that it may take.

        An idle poll comes not here, so it costs no statement of ours.
        """
        claim = self._claim
        if claim is not None:
            workflow_ids = self._chosen(claim, workflow_ids)
            claim.workflow_ids.update(workflow_ids)
        return super()._wf_in(table, workflow_ids, *arguments, **rest)

    def _chosen(self, claim: Claim, workflow_ids: Sequence[str]) -> Sequence[str]:
        room = claim.room
        if room is None or claim.conn is None:
            return workflow_ids
        limit = claim.queue._worker_concurrency
        if not room.agents and not (claim.fair and len(workflow_ids) >= limit):
            room.taken += len(workflow_ids)
            return workflow_ids
        names = queues.workflow_names(claim.conn, workflow_ids)
        found = [agent_of(names.get(workflow_id, "")) for workflow_id in workflow_ids]
        places, claim.over_share = self.placement.choose(room, found, limit, fair=claim.fair)
        return [workflow_ids[place] for place in places]

    @contextmanager
    def _begin(self, isolation: str | None) -> Iterator[sa.Connection]:
        """Begins a claim: what it takes is logged, and is known to be executed here, before it commits."""
        claim = self._claim
        operation = Operation(None)
        taken: list[Execution] = []
        rates = claim is not None and claim.room is not None and bool(claim.limits.rate_limit)

        def begin(conn: sa.Connection) -> None:
            if claim is None or claim.room is None:
                return
            claim.conn = conn
            if claim.limits.shared:
                queues.lock(conn, claim.limits.name)
            if rates:
                left = claim.limits.rate_limit - queues.starts(conn, claim.limits)
                claim.queue._worker_concurrency = max(0, min(claim.room.left, left))

        def finish(conn: sa.Connection) -> None:
            if claim is None or not claim.workflow_ids:
                return
            ids = sorted(claim.workflow_ids)
            taken[:] = self.ledger.claimed(conn, ids, claim.owner_xid, self.executor_id or "", operation.add)
            if rates:
                queues.add_starts(conn, claim.limits, [one.key.workflow_id for one in taken])
            for execution in taken:
                self.executions.add(execution)
                operation.begins(execution)
            operation.after(lambda: metering.begun(taken))

        operation.begin, operation.finish = begin, finish
        shared = claim is not None and claim.room is not None and claim.limits.shared
        with self.operations.open(operation):
            try:
                with self.operations.transaction(
                    lambda: super(ClaimDatabase, self)._begin(None if shared else isolation), lambda: None
                ) as conn:
                    yield conn
            except BaseException:
                for execution in taken:
                    self.executions.remove(execution)
                raise
