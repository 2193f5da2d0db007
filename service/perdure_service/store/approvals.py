"""Approvals as rows: asked by the run's owner, decided by anyone who may, expired by the database's clock.

Who may write a row: the owner of the run inserts it and, when the deadline has passed, expires it, both in a
transaction that holds the run's status row; a decision and the end of the run write it under the same lock. So of two
who come at once, one waits for the lock and then sees what the other did: an approval is decided once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa

from perdure_service.domain.approvals import Approval, ApprovalState, Decision, TimeoutOutcome
from perdure_service.domain.runs import RunKey
from perdure_service.store.runs import MAX_PAGE_CHARS, decode_token, encode_token

_COLUMNS = (
    "a.workflow_id, a.step_id, a.namespace, a.approval_id, a.agent, a.title, a.payload, a.answer_schema, a.assignees, "
    "a.created_at, a.deadline_at, a.on_timeout, a.state, a.decided_by, a.decided_at, a.comment, a.answer, a.revision"
)
_BYTES = " + ".join(f"octet_length(a.{name})" for name in ("title", "payload", "answer_schema", "comment", "answer"))
"""What takes room in a message."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a run asks. `timeout_s` None means no deadline."""

    key: RunKey
    agent: str
    step_id: int
    title: str
    payload_json: str
    answer_schema_json: str
    assignees: Sequence[str]
    timeout_s: float | None
    on_timeout: TimeoutOutcome

    @property
    def approval_id(self) -> str:
        """The approval's id in the API."""
        return f"{self.key.run_id}/{self.step_id}"


def ask(conn: sa.Connection, question: Question) -> datetime | Literal[False] | None:
    """Inserts an approval; returns its deadline (None for none), or False when it had been asked before."""
    row = conn.execute(
        sa.text("""
            INSERT INTO perdure.approval (workflow_id, step_id, namespace, approval_id, agent, title, payload,
                answer_schema, assignees, deadline_at, on_timeout)
            VALUES (:workflow_id, :step_id, :namespace, :approval_id, :agent, :title, :payload, :answer_schema,
                :assignees, now() + CAST(:timeout_s AS FLOAT8) * INTERVAL '1 second', :on_timeout)
            ON CONFLICT (workflow_id, step_id) DO NOTHING RETURNING deadline_at
        """),
        {
            "workflow_id": question.key.workflow_id,
            "step_id": question.step_id,
            "namespace": question.key.namespace,
            "approval_id": question.approval_id,
            "agent": question.agent,
            "title": question.title,
            "payload": question.payload_json,
            "answer_schema": question.answer_schema_json,
            "assignees": json.dumps(list(question.assignees)),
            "timeout_s": question.timeout_s,
            "on_timeout": question.on_timeout.value,
        },
    ).first()
    if row is None:
        return False
    deadline: datetime | None = row[0]
    return deadline


@dataclass(frozen=True, slots=True)
class Standing:
    """An approval as its run's owner finds it: how long its deadline is away (None for none; negative: passed)."""

    approval: Approval
    remaining_s: float | None


def stand(conn: sa.Connection, workflow_id: str, step_id: int, *, lock: bool) -> Standing | None:
    """Returns where an approval stands, by the database's clock; with `lock`, nobody changes it until commit."""
    row = (
        conn.execute(
            sa.text(
                f"SELECT {_COLUMNS}, CAST(extract(epoch FROM (a.deadline_at - now())) AS FLOAT8) AS remaining_s "
                "FROM perdure.approval AS a WHERE a.workflow_id = :workflow_id AND a.step_id = :step_id"
                + (" FOR UPDATE" if lock else "")
            ),
            {"workflow_id": workflow_id, "step_id": step_id},
        )
        .mappings()
        .first()
    )
    return None if row is None else Standing(_approval(row), row["remaining_s"])


def find(conn: sa.Connection, namespace: str, approval_id: str) -> Approval | None:
    """Returns an approval by its id in the API; None when there is none."""
    run_id, _, step = approval_id.rpartition("/")
    if not run_id or not step.isascii() or not step.isdigit() or len(step) > 9:
        return None
    for key in (RunKey.of_api(namespace, run_id), RunKey.foreign(namespace, run_id)):
        found = stand(conn, key.workflow_id, int(step), lock=False)
        if found is None or found.approval.key.namespace != namespace:
            continue
        # Not by the workflow id that the engine has for a run with an id of its own, nor by `01` for step 1.
        if found.approval.approval_id == approval_id:
            return found.approval
    return None


def close(
    conn: sa.Connection, workflow_id: str, step_id: int, state: ApprovalState, decision: Decision | None = None
) -> Approval:
    """Writes the end of an approval whose lock the caller holds, and returns it."""
    conn.execute(
        sa.text("""
            UPDATE perdure.approval SET state = :state, decided_by = :decided_by, comment = :comment, answer = :answer,
                decided_at = now(), revision = revision + 1
            WHERE workflow_id = :workflow_id AND step_id = :step_id
        """),
        {
            "workflow_id": workflow_id,
            "step_id": step_id,
            "state": state.value,
            "decided_by": decision.decided_by if decision else "",
            "comment": decision.comment if decision else "",
            "answer": decision.answer_json if decision else "",
        },
    )
    standing = stand(conn, workflow_id, step_id, lock=False)
    assert standing is not None, "the caller holds the row"
    return standing.approval


def count_open(conn: sa.Connection, workflow_id: str) -> int:
    """Returns how many approvals of a run are pending."""
    return int(
        conn.execute(
            sa.text("SELECT count(*) FROM perdure.approval WHERE workflow_id = :w AND state = 'PENDING'"),
            {"w": workflow_id},
        ).scalar_one()
    )


def withdraw_all(conn: sa.Connection, workflow_id: str) -> list[Approval]:
    """Withdraws what a run still asks, in the transaction that ends it; returns what was withdrawn."""
    rows = conn.execute(
        sa.text("""
            UPDATE perdure.approval SET state = 'WITHDRAWN', decided_at = now(), revision = revision + 1
            WHERE workflow_id = :workflow_id AND state = 'PENDING' RETURNING step_id
        """),
        {"workflow_id": workflow_id},
    ).scalars()
    found = [stand(conn, workflow_id, step_id, lock=False) for step_id in sorted(rows)]
    return [standing.approval for standing in found if standing is not None]


def list_page(
    conn: sa.Connection,
    namespace: str,
    *,
    states: frozenset[ApprovalState],
    run_id: str,
    page_size: int,
    page_token: str,
) -> tuple[list[Approval], str]:
    """Returns a page of approvals, oldest first, and the token of the next page (empty at the end).

    A page ends after the approval with which it has `MAX_PAGE_CHARS`: more would fit no message, and fill the memory.

    Raises:
        InvalidArgument: The token is not from this list.
    """
    filter_key = ["approvals", namespace, sorted(states), run_id]
    conditions = ["a.namespace = :namespace", "a.state = ANY(:states)"]
    values: dict[str, Any] = {"namespace": namespace, "states": sorted(states), "limit": page_size + 1}
    if run_id:
        conditions.append("a.workflow_id = ANY(:workflow_ids)")
        values["workflow_ids"] = [RunKey.of_api(namespace, run_id).workflow_id, run_id]
    if page_token:
        at, workflow_id, step_id = decode_token(page_token, filter_key, datetime, str, int)
        conditions.append(
            "(a.created_at, a.workflow_id, a.step_id) > (CAST(:at AS TIMESTAMPTZ), CAST(:workflow_id AS TEXT), "
            "CAST(:step_id AS INT))"
        )
        values |= {"at": at, "workflow_id": workflow_id, "step_id": step_id}
    query = sa.text(f"""
        SELECT * FROM (
          SELECT page.*, count(*) OVER () AS found,
            sum(page.bytes) OVER (ORDER BY page.created_at, page.workflow_id, page.step_id) - page.bytes AS before
          FROM (SELECT {_COLUMNS}, {_BYTES} AS bytes FROM perdure.approval AS a WHERE {" AND ".join(conditions)}
                ORDER BY a.created_at, a.workflow_id, a.step_id LIMIT :limit) AS page
        ) AS sized WHERE before < :max_bytes ORDER BY created_at, workflow_id, step_id
    """)
    rows = conn.execute(query, {**values, "max_bytes": MAX_PAGE_CHARS}).mappings().fetchall()
    page = rows[:page_size]
    token = ""
    if page and page[0]["found"] > len(page):
        last = page[-1]
        token = encode_token((last["created_at"].isoformat(), last["workflow_id"], last["step_id"]), filter_key)
    return [_approval(row) for row in page], token


def token_after(
    run: RunKey, step_id: int, created_at: datetime, *, states: frozenset[ApprovalState], run_id: str
) -> str:
    """Returns the token of the page that follows an approval, in any database that the list is of.

    Args:
        run: Whose approval was the last one that was returned.
        step_id: Of which step.
        created_at: When it was created.
        states: As of `list_page`.
        run_id: As of `list_page`.
    """
    filter_key = ["approvals", run.namespace, sorted(states), run_id]
    return encode_token((created_at.isoformat(), run.workflow_id, step_id), filter_key)


def inbox(
    conn: sa.Connection, namespaces: Sequence[str], changed_within_s: float, limit: int = 10_000
) -> list[Approval]:
    """Returns what is pending in these namespaces, and what was decided in the last seconds, oldest first."""
    rows = conn.execute(
        sa.text(f"""
            SELECT {_COLUMNS} FROM perdure.approval AS a WHERE a.namespace = ANY(:namespaces) AND (a.state = 'PENDING'
                OR a.decided_at > now() - CAST(:within_s AS FLOAT8) * INTERVAL '1 second')
            ORDER BY a.created_at, a.workflow_id, a.step_id LIMIT :limit
        """),
        {"namespaces": list(namespaces), "within_s": changed_within_s, "limit": limit},
    ).mappings()
    return [_approval(row) for row in rows]


def _approval(row: sa.RowMapping) -> Approval:
    return Approval(
        approval_id=row["approval_id"],
        key=RunKey(row["namespace"], row["approval_id"].rpartition("/")[0], row["workflow_id"]),
        agent=row["agent"],
        step_id=row["step_id"],
        title=row["title"],
        payload_json=row["payload"],
        answer_schema_json=row["answer_schema"],
        assignees=tuple(json.loads(row["assignees"])),
        create_time=row["created_at"],
        deadline_time=row["deadline_at"],
        on_timeout=TimeoutOutcome(row["on_timeout"]),
        state=ApprovalState(row["state"]),
        decided_by=row["decided_by"],
        decide_time=row["decided_at"],
        comment=row["comment"],
        answer_json=row["answer"],
        revision=row["revision"],
    )
