"""Names what we touch of DBOS's schema, and nothing else does: table names, and the statuses' spelling.

A contract test compares these with DBOS's own metadata (dbos 3.4).
"""

from __future__ import annotations

SCHEMA = "dbos"

STATUS = f"{SCHEMA}.workflow_status"
INPUT = f"{SCHEMA}.workflow_input"
OUTPUT = f"{SCHEMA}.workflow_output"
OUTPUTS = f"{SCHEMA}.operation_outputs"
NOTIFICATIONS = f"{SCHEMA}.notifications"
QUEUES = f"{SCHEMA}.queues"
VERSIONS = f"{SCHEMA}.application_versions"

WORKFLOW_EVENTS = f"{SCHEMA}.workflow_events"
STREAMS = f"{SCHEMA}.streams"

NOTIFICATION_CHANNELS = ("dbos_notifications_channel", "dbos_workflow_events_channel", "dbos_streams_channel")
"""Where DBOS's triggers tell of messages, values that were set, and entries of streams (PostgreSQL only). The payload
is the workflow id, `::`, and the topic or key."""

NULL_TOPIC = "__null__topic__"
"""The topic of a message that was sent without one."""

APPLICATION = "perdure"
"""DBOS's application name: what every executor of the product shares."""

COLUMNS_USED: dict[str, tuple[str, ...]] = {
    "workflow_status": (
        "workflow_uuid", "status", "name", "owner_xid", "executor_id", "queue_name", "application_name",
        "application_version", "parent_workflow_id", "created_at", "updated_at", "completed_at", "started_at_epoch_ms",
        "delay_until_epoch_ms", "workflow_deadline_epoch_ms", "recovery_attempts", "serialization", "deduplication_id",
        "forked_from", "priority",
    ),
    "workflow_input": ("workflow_uuid", "inputs"),
    "operation_outputs": ("workflow_uuid", "function_id", "function_name", "error", "child_workflow_id"),
    "queues": (
        "name", "concurrency", "worker_concurrency", "rate_limit_max", "rate_limit_period_sec", "application_name",
    ),
    "application_versions": ("version_name", "version_timestamp", "application_name"),
    "workflow_events": ("workflow_uuid", "key"),
    "streams": ("workflow_uuid", "key", "offset"),
    "notifications": (
        "message_uuid", "destination_uuid", "topic", "message", "serialization", "consumed", "consumed_by_function_id",
    ),
}  # fmt: skip
"""What the contract test looks for."""
