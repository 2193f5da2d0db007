"""Who writes to a run without owning it: signals, decisions, cancellations, and finding what foreign clients made.

Each is one operation: lock the run's status row in a statement of its own, refuse a run that has ended, and only then,
in later statements, read and append. So a signal and the end of the run, or two decisions, come one after the other.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from dbos._serialization import DBOSPortableJSON

from perdure_service.domain.approvals import Approval, ApprovalState, Decision, must_decide
from perdure_service.domain.events import APPROVAL_STEP, Event, EventKind
from perdure_service.domain.runs import DEFAULT_NAMESPACE, TERMINAL_STATUSES, WAITING_APPROVAL, RunKey, RunState
from perdure_service.durable.context import approval_topic
from perdure_service.durable.executions import now_ms
from perdure_service.durable.operation import Operation
from perdure_service.durable.runtime import Runtime
from perdure_service.errors import ApprovalClosed, ApprovalNotFound, RunFinished, RunNotFound
from perdure_service.store import approvals, parked, runs
from perdure_service.store.dbos_tables import NOTIFICATIONS, STATUS

_SEND = sa.text(
    f"INSERT INTO {NOTIFICATIONS} (message_uuid, destination_uuid, topic, message, serialization) "
    "VALUES (:message_uuid, :destination, :topic, :message, :serialization) "
    "ON CONFLICT (message_uuid) DO NOTHING"
)


def _locked_status(conn: sa.Connection, workflow_id: str) -> str | None:
    """Locks a run's status row and returns the status."""
    found = conn.execute(
        sa.text(f"SELECT status FROM {STATUS} WHERE workflow_uuid = :id FOR NO KEY UPDATE"),
        {"id": workflow_id},
    ).scalar()
    return None if found is None else str(found)


def _send(conn: sa.Connection, workflow_id: str, topic: str, payload: Any, key: str) -> None:
    """Leaves a message for a run as DBOS's `send` does, unless it lies there already."""
    conn.execute(
        _SEND,
        {
            "message_uuid": f"{key}::{workflow_id}",
            "destination": workflow_id,
            "topic": topic,
            "message": DBOSPortableJSON.serialize(payload),
            "serialization": DBOSPortableJSON.name(),
        },
    )


def signal(runtime: Runtime, key: RunKey, *, name: str, payload: Any, request_id: str, sender: str) -> bool:
    """Delivers a signal and its event in one transaction; returns False when this request delivered it before.

    Raises:
        RunFinished: The run has ended.
    """
    message = DBOSPortableJSON.serialize(payload)
    operation = Operation(None)

    def finish(conn: sa.Connection) -> None:
        status = _locked_status(conn, key.workflow_id)
        if status is None:
            raise RunNotFound(f"there is no run {key.run_id!r}")
        known = conn.execute(
            sa.text(f"SELECT 1 FROM {NOTIFICATIONS} WHERE message_uuid = :id"),
            {"id": f"{request_id}::{key.workflow_id}"},
        ).first()
        # Delivered before is answered before "has ended": a repeat must be told the same as the first.
        operation.facts["created"] = known is None or "sent" in operation.facts
        if known is not None:
            return
        if status in TERMINAL_STATUSES:
            raise RunFinished(f"run {key.run_id!r} has ended and takes no signals; read its result")
        _send(conn, key.workflow_id, name, payload, request_id)
        operation.facts["sent"] = True  # found again by this very call, when the reply to its COMMIT is lost
        data = {"name": name, "payload_bytes": len(message.encode()), "sender": sender}
        _, number = runs.waits_for(conn, key.workflow_id)
        operation.add(key.workflow_id, Event(EventKind.SIGNAL_RECEIVED, now_ms(), data, execution=number))
        if parked.is_parked_for(conn, key.workflow_id, parked.SIGNAL + name):
            runtime.database.release(conn, [key.workflow_id], operation, f"signal {name} came")

    operation.finish = finish
    with runtime.database.bounded():
        runtime.database.run_operation(operation)
    return bool(operation.facts["created"])


def decide(runtime: Runtime, approval: Approval, decision: Decision) -> Approval:
    """Decides an approval, its event and the message that wakes the run, in one transaction.

    Raises:
        ApprovalClosed: It is decided otherwise, expired, or withdrawn.
        RevisionConflict: It is not as the caller saw it.
    """
    workflow_id, step_id = approval.key.workflow_id, approval.step_id
    operation = Operation(None)

    def finish(conn: sa.Connection) -> None:
        status = _locked_status(conn, workflow_id)
        standing = approvals.stand(conn, workflow_id, step_id, lock=True)
        if standing is None:
            raise ApprovalNotFound(f"there is no approval {approval.approval_id!r}")
        past = standing.remaining_s is not None and standing.remaining_s <= 0
        operation.facts["approval"] = standing.approval
        if not must_decide(standing.approval, decision, past_deadline=past):
            return
        if status in TERMINAL_STATUSES:
            raise ApprovalClosed("its run has ended", state=ApprovalState.WITHDRAWN)
        decided = approvals.close(conn, workflow_id, step_id, decision.state, decision)
        operation.facts["approval"] = decided
        _send(conn, workflow_id, approval_topic(step_id), {"revision": decided.revision}, approval.approval_id)
        data = {
            "approval_id": approval.approval_id,
            "state": decision.state.value,
            "decided_by": decision.decided_by,
            "comment": decision.comment,
        }
        waiting_for, number = runs.waits_for(conn, workflow_id)
        operation.add(workflow_id, Event(EventKind.APPROVAL_DECIDED, now_ms(), data, step_id, APPROVAL_STEP, 0, number))
        if parked.is_parked_for(conn, workflow_id, f"{parked.APPROVAL}{step_id}") and runtime.database.release(
            conn, [workflow_id], operation, "its approval was decided"
        ):
            return
        if waiting_for == WAITING_APPROVAL and approvals.count_open(conn, workflow_id) == 0:
            # The state follows the open approvals, so whoever closes the last one tells of it, not who owns the run.
            moved = {"from": RunState.AWAITING_INPUT.value, "to": RunState.RUNNING.value}
            operation.add(workflow_id, Event(EventKind.STATE_CHANGED, now_ms(), moved, execution=number))

    operation.finish = finish
    with runtime.database.bounded():
        runtime.database.run_operation(operation)
    result: Approval = operation.facts["approval"]
    return result


def cancel(runtime: Runtime, key: RunKey, reason: str) -> None:
    """Cancels a run and its children. What has ended stays as it is."""
    with runtime.database.bounded():
        runtime.database.cancel_workflows([key.workflow_id], cancel_children=True, reason=reason)


def adopt_foreign(runtime: Runtime, namespace: str, run_id: str) -> bool:
    """Gives a run to a workflow that a foreign client enqueued under this id, if there is one; returns whether.

    A workflow that has a run, perhaps another tenant's, is not touched, and takes no other statements to refuse than
    one that does not exist.
    """
    if namespace != DEFAULT_NAMESPACE:
        return False
    operation = Operation(None)
    operation.facts["adopted"] = []

    def finish(conn: sa.Connection) -> None:
        if not runtime.ledger.is_foreign(conn, run_id):
            return
        _locked_status(conn, run_id)
        operation.facts["adopted"] = runtime.ledger.adopt(conn, [run_id], operation.add)

    operation.finish = finish
    with runtime.database.bounded():
        runtime.database.run_operation(operation)
    return bool(operation.facts["adopted"])
