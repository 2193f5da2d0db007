"""The writer of events that reach no checkpoint: one run that is slow to commit keeps no other one waiting."""

from __future__ import annotations

from perdure_service.domain.events import EventKind
from perdure_service.domain.runs import RunKey
from perdure_service.durable.executions import Execution
from perdure_service.durable.writer import THREADS, EventWriter

from tests.helpers.waiting import eventually


def execution_of(name: str, writer: EventWriter) -> Execution:
    key = RunKey.of_api("default", name)
    execution = Execution(key, owner_xid="x", agent="a", agent_version="1", number=1, trace_id="1")
    execution._wake_writer = writer.wake
    return execution


def test_a_run_whose_commit_is_repeated_keeps_no_other_one_waiting() -> None:
    written: list[str] = []

    def write(execution: Execution) -> bool:
        if not execution.slot.acquire(blocking=False):
            return False
        written.extend(event.data["message"] for event in execution.take())
        execution.slot.release()
        return True

    writer = EventWriter(write)
    writer.start()
    slow = [execution_of(f"slow-{number}", writer) for number in range(THREADS)]
    try:
        for execution in slow:
            execution.slot.acquire()  # as a checkpoint does until it is committed
            execution.note(execution.event(EventKind.LOG, {"message": "slow"}))
        quick = execution_of("quick", writer)
        quick.note(quick.event(EventKind.LOG, {"message": "quick"}))
        eventually(lambda: written == ["quick"])
        for execution in slow:
            execution.slot.release()
        eventually(lambda: sorted(written) == ["quick"] + ["slow"] * THREADS)
    finally:
        writer.stop()
