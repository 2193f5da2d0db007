"""A checkpoint writer by itself, rows for it, and what it says of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from perdure_service.domain.events import Event, EventKind, Pack
from perdure_service.domain.runs import RunKey, RunStart
from perdure_service.store import checkpoint_writer, event_log
from perdure_service.store.checkpoint_writer import CheckpointWriter
from perdure_service.store.checkpoints import CheckpointRow, OutcomeRow, StartRow, StepRow, Written
from perdure_service.store.engine import create_engine, reserve_connections

from tests.helpers.rpc import new_id
from tests.helpers.waiting import scaled

LOG = Event(EventKind.LOG, 1, {"message": "x"})
TIMEOUT = timedelta(seconds=10)


class Writing:
    """A writer, and what it has answered.

    Attributes:
        batches: How many rows each batch had.
        threads: Which thread answered it.
        alone: Whether a run is said to move alone.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.answers: dict[int, Written | None] = {}
        self.batches: list[int] = []
        self.threads: list[str] = []
        self.alone = False
        self._answered = threading.Condition()
        reserved = reserve_connections(engine, TIMEOUT, checkpoint_writer.CONNECTIONS)
        self.writer = CheckpointWriter(reserved, self._answer, alone=lambda _within: self.alone)

    def _answer(self, batch: Sequence[tuple[CheckpointRow, Written | None]]) -> None:
        with self._answered:
            self.batches.append(len(batch))
            self.threads.append(threading.current_thread().name)
            self.answers.update({id(row): written for row, written in batch})
            self._answered.notify_all()

    def submit(self, *rows: CheckpointRow) -> list[Written | None]:
        """Has rows written together; returns what was answered of each."""
        self.give(*rows)
        return self.wait_for(*rows)

    def give(self, *rows: CheckpointRow) -> None:
        """Submits rows, so that one batch takes them all."""
        self.answers.clear()
        with self.writer._changed:
            for row in rows:
                assert self.writer.submit(row)

    def wait_for(self, *rows: CheckpointRow) -> list[Written | None]:
        """Returns what was answered of rows that were submitted, when it is."""
        with self._answered:
            assert self._answered.wait_for(lambda: all(id(row) in self.answers for row in rows), scaled(20))
            return [self.answers[id(row)] for row in rows]

    def started(self) -> StartRow:
        row = a_start()
        assert self.submit(row) != [None]
        return row

    def all(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        with self.engine.begin() as conn:
            return [tuple(row) for row in conn.execute(sa.text(statement), values)]


@contextmanager
def writing_on(url: str, loop: asyncio.AbstractEventLoop | None = None) -> Iterator[Writing]:
    """Begins to write in a database, by threads or by a loop and a thread; stops it."""
    engine = create_engine(url, pool_size=5, statement_timeout=TIMEOUT)
    writing = Writing(engine)
    writing.writer.start(loop)
    try:
        yield writing
    finally:
        writing.writer.stop()
        engine.dispose()


@contextmanager
def a_loop(name: str = "the loop") -> Iterator[asyncio.AbstractEventLoop]:
    """Runs a loop in a thread of its own, with a name."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=name, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def a_start(run_id: str = "", request: str | None = None, **columns: Any) -> StartRow:
    key = RunKey.of_api("default", run_id or new_id())
    start = RunStart(key, "x", "1", "hash", request or new_id(), "me", queue="perdure")
    values = {
        "status": "PENDING", "name": "x@1", "executor_id": "here", "inputs": "{}", "serialization": "portable_json",
        "execution": 1, "unique_request_id": request,
    }  # fmt: skip
    pack = Pack(key.workflow_id, [LOG], first_sequence=1)
    return StartRow(key.workflow_id, f"owner of {new_id()}", pack, None, start=start, **{**values, **columns})


def behind(row: CheckpointRow, kind: type[Any], events: Sequence[Event] = (LOG,), **columns: Any) -> Any:
    """Returns a row whose pack follows another row's."""
    first = (row.first_sequence or 0) + row.event_count
    pack = Pack(row.workflow_id, list(events), first_sequence=first)
    return kind(row.workflow_id, row.owner_xid, pack, row.first_sequence, **columns)


def a_step(row: CheckpointRow, number: int = 1, **columns: Any) -> StepRow:
    values = {"function_id": number, "function_name": "step", "started_ms": 1, "completed_ms": 2, "output": '"o"'}
    step: StepRow = behind(row, StepRow, **{**values, **columns})
    return step


def an_end(row: CheckpointRow) -> OutcomeRow:
    end: OutcomeRow = behind(row, OutcomeRow, status="SUCCESS", output="1", shown="1")
    return end


def the_end_with(step: StepRow, **columns: Any) -> OutcomeRow:
    """Returns an end that goes in the place of its run's last step."""
    pack = Pack(step.workflow_id, [*step.pack.events, LOG], first_sequence=step.first_sequence)
    values = {"status": "SUCCESS", "output": "1", "shown": "1", "last_step": step, **columns}
    return OutcomeRow(step.workflow_id, step.owner_xid, pack, step.previous_first, **values)


def log_of(writing: Writing, row: CheckpointRow) -> list[int]:
    with writing.engine.begin() as conn:
        return [event.sequence for event in event_log.read(conn, row.workflow_id, 0)]


def steps_of(writing: Writing, row: CheckpointRow) -> list[int]:
    found = writing.all(
        "SELECT function_id FROM dbos.operation_outputs WHERE workflow_uuid = :id ORDER BY 1", id=row.workflow_id
    )
    return [number for (number,) in found]
