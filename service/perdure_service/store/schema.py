"""Decides our tables (schema `perdure`, beside DBOS's `dbos`): the migrations, in order, one schema change each.

Keys: `run` is keyed by the workflow id, which holds namespace and run id (`<namespace>.<run_id>.r`), so that the log,
the approvals and DBOS's own rows join on one column (ADR 0003). `run_event` is keyed by (workflow_id, first_sequence):
a pack is the events of one commit, and two writers that read the same prefix of a log collide on that key.
"""

from __future__ import annotations

from perdure_service.store.documents import DOCUMENT_MIGRATION_STATEMENTS, REPORT_MIGRATION_STATEMENTS
from perdure_service.store.migrations import Migration

_DOCUMENT_STATEMENTS = (*DOCUMENT_MIGRATION_STATEMENTS, *REPORT_MIGRATION_STATEMENTS)
_AFTER_DOCUMENTS = 9 + len(_DOCUMENT_STATEMENTS)
_ADD_TO_RUN = "ALTER TABLE perdure.run ADD COLUMN IF NOT EXISTS "
_ADD_TO_AGENT = "ALTER TABLE perdure.agent ADD COLUMN IF NOT EXISTS "

MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        "run",
        (
            """CREATE TABLE IF NOT EXISTS perdure.run (
                 workflow_id TEXT PRIMARY KEY,
                 namespace TEXT NOT NULL,
                 run_id TEXT NOT NULL,
                 agent TEXT NOT NULL,
                 agent_version TEXT NOT NULL,
                 input_argument TEXT,
                 input_sha256 TEXT NOT NULL,
                 request_id TEXT NOT NULL,
                 unique_request_id TEXT,
                 caller TEXT NOT NULL,
                 labels JSONB NOT NULL,
                 context_id TEXT NOT NULL,
                 parent_workflow_id TEXT,
                 trace_id TEXT NOT NULL,
                 traceparent TEXT NOT NULL,
                 created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                 begun_at TIMESTAMPTZ,
                 ended_at TIMESTAMPTZ,
                 execution INT NOT NULL DEFAULT 0,
                 executor_id TEXT NOT NULL DEFAULT '',
                 progress TEXT,
                 waiting_for TEXT,
                 state_reason TEXT NOT NULL DEFAULT '',
                 end_reason TEXT,
                 failure TEXT,
                 output TEXT,
                 UNIQUE (namespace, unique_request_id)
               )""",
        ),
    ),
    Migration(
        2,
        "run_by_time",
        ("CREATE INDEX IF NOT EXISTS run_by_time ON perdure.run (namespace, created_at DESC, workflow_id DESC)",),
    ),
    Migration(
        3,
        "run_event",
        (
            """CREATE TABLE IF NOT EXISTS perdure.run_event (
                 workflow_id TEXT NOT NULL,
                 first_sequence BIGINT NOT NULL,
                 event_count INT NOT NULL,
                 pack_id TEXT NOT NULL,
                 previous_first BIGINT,
                 events TEXT NOT NULL,
                 committed_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                 PRIMARY KEY (workflow_id, first_sequence)
               )""",
        ),
    ),
    Migration(
        4,
        "approval",
        (
            """CREATE TABLE IF NOT EXISTS perdure.approval (
                 workflow_id TEXT NOT NULL,
                 step_id INT NOT NULL,
                 namespace TEXT NOT NULL,
                 approval_id TEXT NOT NULL,
                 agent TEXT NOT NULL,
                 title TEXT NOT NULL,
                 payload TEXT NOT NULL,
                 answer_schema TEXT NOT NULL,
                 assignees TEXT NOT NULL,
                 created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                 deadline_at TIMESTAMPTZ,
                 on_timeout TEXT NOT NULL,
                 state TEXT NOT NULL DEFAULT 'PENDING',
                 decided_by TEXT NOT NULL DEFAULT '',
                 decided_at TIMESTAMPTZ,
                 comment TEXT NOT NULL DEFAULT '',
                 answer TEXT NOT NULL DEFAULT '',
                 revision BIGINT NOT NULL DEFAULT 1,
                 PRIMARY KEY (workflow_id, step_id)
               )""",
        ),
    ),
    Migration(
        5,
        "approval_inbox",
        ("CREATE INDEX IF NOT EXISTS approval_inbox ON perdure.approval (namespace, state, created_at, workflow_id)",),
    ),
    Migration(
        6,
        "approval_changed",
        ("CREATE INDEX IF NOT EXISTS approval_changed ON perdure.approval (namespace, decided_at)",),
    ),
    Migration(
        7,
        "executor",
        (
            """CREATE TABLE IF NOT EXISTS perdure.executor (
                 executor_id TEXT PRIMARY KEY,
                 application_version TEXT NOT NULL,
                 address TEXT NOT NULL,
                 max_running INT NOT NULL,
                 started_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                 renewed_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                 expires_at TIMESTAMPTZ NOT NULL,
                 tombstoned_at TIMESTAMPTZ
               )""",
        ),
    ),
    Migration(
        8,
        "agent",
        (
            """CREATE TABLE IF NOT EXISTS perdure.agent (
                 name TEXT NOT NULL,
                 version TEXT NOT NULL,
                 description TEXT NOT NULL,
                 input_schema TEXT NOT NULL,
                 output_schema TEXT,
                 is_current BOOL NOT NULL,
                 registered_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                 PRIMARY KEY (name, version)
               )""",
        ),
    ),
    *(
        Migration(9 + index, f"documents_{index + 1}", (statement,))
        for index, statement in enumerate(_DOCUMENT_STATEMENTS)
    ),
    # Numbers go on behind those of the documents' statements above, which are never added to.
    Migration(_AFTER_DOCUMENTS, "run_usage_in", (_ADD_TO_RUN + "input_tokens BIGINT NOT NULL DEFAULT 0",)),
    Migration(_AFTER_DOCUMENTS + 1, "run_usage_out", (_ADD_TO_RUN + "output_tokens BIGINT NOT NULL DEFAULT 0",)),
    Migration(_AFTER_DOCUMENTS + 2, "run_forked_from", (_ADD_TO_RUN + "forked_from_workflow_id TEXT",)),
    Migration(_AFTER_DOCUMENTS + 3, "run_forked_step", (_ADD_TO_RUN + "forked_from_step INT NOT NULL DEFAULT 0",)),
    Migration(
        _AFTER_DOCUMENTS + 4,
        "run_by_parent",
        ("CREATE INDEX IF NOT EXISTS run_by_parent ON perdure.run (parent_workflow_id, created_at, workflow_id)",),
    ),
    Migration(_AFTER_DOCUMENTS + 5, "agent_max_steps", (_ADD_TO_AGENT + "max_steps BIGINT NOT NULL DEFAULT 0",)),
    Migration(_AFTER_DOCUMENTS + 6, "agent_max_tokens", (_ADD_TO_AGENT + "max_tokens BIGINT NOT NULL DEFAULT 0",)),
    # What a parked run is to be woken by; NULL while it is not parked.
    Migration(_AFTER_DOCUMENTS + 7, "run_parked_for", (_ADD_TO_RUN + "parked_for TEXT",)),
    Migration(
        _AFTER_DOCUMENTS + 8,
        "run_by_parked_for",
        (
            "CREATE INDEX IF NOT EXISTS run_by_parked_for ON perdure.run (parked_for, workflow_id) "
            "WHERE parked_for IS NOT NULL",
        ),
    ),
    Migration(_AFTER_DOCUMENTS + 9, "agent_queue", (_ADD_TO_AGENT + "queue TEXT NOT NULL DEFAULT ''",)),
    Migration(
        _AFTER_DOCUMENTS + 10,
        "executor_draining",
        ("ALTER TABLE perdure.executor ADD COLUMN IF NOT EXISTS draining BOOL NOT NULL DEFAULT false",),
    ),
    # Which agents an executor has, as a JSON list of workflow names: what it can continue.
    Migration(
        _AFTER_DOCUMENTS + 11,
        "executor_agents",
        ("ALTER TABLE perdure.executor ADD COLUMN IF NOT EXISTS agents TEXT NOT NULL DEFAULT '[]'",),
    ),
    # Finished runs by the time of their end, for retention.
    Migration(
        _AFTER_DOCUMENTS + 12,
        "run_by_end",
        (
            "CREATE INDEX IF NOT EXISTS run_by_end ON perdure.run (namespace, ended_at, workflow_id) "
            "WHERE ended_at IS NOT NULL",
        ),
    ),
    # A payload's bytes in pieces, as CockroachDB asks for rows under 1 MiB; written once, by the hash of the whole.
    Migration(
        _AFTER_DOCUMENTS + 13,
        "payload",
        (
            """CREATE TABLE IF NOT EXISTS perdure.payload (
                 sha256 TEXT NOT NULL,
                 piece INT NOT NULL,
                 data BYTEA NOT NULL,
                 PRIMARY KEY (sha256, piece)
               )""",
        ),
    ),
    # Who uses a payload: it goes with the last of them.
    Migration(
        _AFTER_DOCUMENTS + 14,
        "payload_use",
        (
            """CREATE TABLE IF NOT EXISTS perdure.payload_use (
                 workflow_id TEXT NOT NULL,
                 sha256 TEXT NOT NULL,
                 size_bytes BIGINT NOT NULL,
                 created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                 PRIMARY KEY (workflow_id, sha256)
               )""",
        ),
    ),
    Migration(
        _AFTER_DOCUMENTS + 15,
        "payload_use_by_sha256",
        ("CREATE INDEX IF NOT EXISTS payload_use_by_sha256 ON perdure.payload_use (sha256, workflow_id)",),
    ),
    Migration(_AFTER_DOCUMENTS + 16, "agent_max_running", (_ADD_TO_AGENT + "max_running INT NOT NULL DEFAULT 0",)),
    # When executions of a queue with a rate limit have begun, those of the last periods.
    Migration(
        _AFTER_DOCUMENTS + 17,
        "queue_start",
        (
            """CREATE TABLE IF NOT EXISTS perdure.queue_start (
                 queue TEXT NOT NULL,
                 started_at TIMESTAMPTZ NOT NULL,
                 workflow_id TEXT NOT NULL,
                 PRIMARY KEY (queue, started_at, workflow_id)
               )""",
        ),
    ),
    # Whose home this database is, in one row; none without regions.
    Migration(
        _AFTER_DOCUMENTS + 18,
        "cell",
        (
            """CREATE TABLE IF NOT EXISTS perdure.cell (
                 id INT PRIMARY KEY,
                 cell TEXT NOT NULL,
                 home_region TEXT NOT NULL,
                 region TEXT NOT NULL,
                 epoch BIGINT NOT NULL,
                 expires_at TIMESTAMPTZ
               )""",
        ),
    ),
    # Where an executor is, empty without regions; and whether it leaves the runs to the region that has the claim.
    Migration(
        _AFTER_DOCUMENTS + 19,
        "executor_region",
        ("ALTER TABLE perdure.executor ADD COLUMN IF NOT EXISTS region TEXT NOT NULL DEFAULT ''",),
    ),
    Migration(
        _AFTER_DOCUMENTS + 20,
        "executor_standing_by",
        ("ALTER TABLE perdure.executor ADD COLUMN IF NOT EXISTS standing_by BOOL NOT NULL DEFAULT false",),
    ),
    # When the region got its claim; NULL while the home has it since ever. The claim holds while its executors live.
    Migration(
        _AFTER_DOCUMENTS + 21,
        "cell_claimed_at",
        ("ALTER TABLE perdure.cell ADD COLUMN IF NOT EXISTS claimed_at TIMESTAMPTZ",),
    ),
    Migration(_AFTER_DOCUMENTS + 22, "cell_expires_at", ("ALTER TABLE perdure.cell DROP COLUMN IF EXISTS expires_at",)),
    # A conversation's runs are listed again and again, among all others. Runs without a context pay nothing for it.
    Migration(
        _AFTER_DOCUMENTS + 23,
        "run_by_context",
        (
            "CREATE INDEX IF NOT EXISTS run_by_context ON perdure.run "
            "(namespace, context_id, created_at DESC, workflow_id DESC) WHERE context_id <> ''",
        ),
    ),
)
