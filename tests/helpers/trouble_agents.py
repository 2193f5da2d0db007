"""Agents that use every operation of the engine, for the tests that break what lies between it and its database."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from dbos import DBOS
from perdure_service.agents import agent, run
from perdure_service.agents.resources import resources
from perdure_service.durable import operation as seam
from perdure_service.durable import owners
from perdure_service.store import checkpoint_writer, checkpoints, hot_statements

from tests.helpers import chaos_report
from tests.helpers.agents import FlakyError, count_one, effect, plain_child

FREEZE_AT = os.environ.get("PERDURE_TROUBLE_FREEZE", "")
"""Where a server stops itself with SIGSTOP, once: `body`, or `commit`, with a step's checkpoint written and locked."""

_frozen: list[bool] = []
_write = seam.Operation.write
_commit = checkpoint_writer.CheckpointWriter.commit
_begin = checkpoint_writer.CheckpointWriter.begin


def freeze() -> None:
    """Stops this process, as a machine that hangs does, until it gets SIGCONT; a second time it does nothing."""
    if not _frozen:
        _frozen.append(True)
        chaos_report.fault("servers frozen")
        os.kill(os.getpid(), signal.SIGSTOP)


def _freezing_write(operation: seam.Operation, conn: sa.Connection) -> None:
    _write(operation, conn)
    names = {event.step_name for events in operation._events.values() for event in events}
    if any("freezing_step" in name for name in names):
        freeze()


def _freezes(rows: Sequence[checkpoints.CheckpointRow]) -> bool:
    return any(isinstance(row, checkpoints.StepRow) and "freezing_step" in row.function_name for row in rows)


def _waiting_begin(
    writer: checkpoint_writer.CheckpointWriter, conn: sa.Connection, rows: Sequence[checkpoints.CheckpointRow]
) -> hot_statements.Exchange | None:
    return None if _freezes(rows) else _begin(writer, conn, rows)


def _freezing_commit(
    writer: checkpoint_writer.CheckpointWriter, conn: sa.Connection, rows: Sequence[checkpoints.CheckpointRow]
) -> dict[str, checkpoints.Written]:
    if not _freezes(rows):
        return _commit(writer, conn, rows)
    conn.exec_driver_sql("BEGIN")
    written = checkpoints.write_all(conn, rows)
    freeze()
    conn.exec_driver_sql("COMMIT")
    return written


# A claim whose reply was lost is found within seconds, as the tests wait for it.
owners.GRACE_S = 1.0
owners.SEARCH_S = 1.5

if FREEZE_AT == "commit":
    seam.Operation.write = _freezing_write  # type: ignore[method-assign]
    checkpoint_writer.CheckpointWriter.commit = _freezing_commit  # type: ignore[method-assign]
    checkpoint_writer.CheckpointWriter.begin = _waiting_begin  # type: ignore[method-assign]


@DBOS.step()
async def failing_step() -> None:
    await asyncio.to_thread(effect, "fails")
    raise FlakyError("as it should")


@DBOS.step()
def publishing_step() -> str:
    effect("published")
    DBOS.set_event("from a step", 1)
    DBOS.write_stream("lines", "from a step")
    return "published"


@DBOS.step()
def paying_step() -> str:
    """Pays once a key, as a bank does that knows idempotency keys."""
    key = run.idempotency_key()
    with resources().engine.begin() as conn:
        conn.execute(
            sa.text("INSERT INTO public.test_payment (key, tries) VALUES (:key, 1) "
                    "ON CONFLICT (key) DO UPDATE SET tries = test_payment.tries + 1"),
            {"key": key},
        )  # fmt: skip
    effect("paid")
    return key


@agent(name="all-of-it")
async def all_of_it() -> dict[str, Any]:
    """Uses each operation once, and waits for a decision and a signal."""
    told: dict[str, Any] = {}
    await DBOS.set_event_async("stage", "begun")
    await DBOS.write_stream_async("lines", "from the workflow")
    run.progress("counting")
    told["count"] = await count_one(0, 0, "words ")
    try:
        await failing_step()
    except FlakyError as error:
        told["failed"] = str(error)
    await DBOS.sleep_async(0.05)
    told["patched"] = await DBOS.patch_async("better")
    child: Any = await DBOS.start_workflow_async(plain_child, 1, 0.0)
    told["child"] = await child.get_result()
    told["published"] = await asyncio.to_thread(publishing_step)
    await asyncio.to_thread(paying_step)
    await DBOS.send_async(str(DBOS.workflow_id), "hello", topic="myself")
    told["heard"] = await DBOS.recv_async("myself", timeout_seconds=60)
    told["approved"] = (await run.approval("Go on?")).approved
    told["signal"] = await run.signal("more")
    told["last"] = await count_one(1, 0, "")
    return told


@DBOS.step()
async def freezing_step() -> str:
    await asyncio.to_thread(effect, "freezing")
    if FREEZE_AT == "body":
        freeze()
    return "thawed"


@agent(name="freezer")
async def freezer() -> list[Any]:
    """Works, works where its server may freeze, works."""
    return [await count_one(0, 0, "words "), await freezing_step(), await count_one(1, 0, "words ")]
