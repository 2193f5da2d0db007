"""The writer of events that reach no checkpoint: one run that is slow to commit keeps no other one waiting."""

from __future__ import annotations

import pytest
from perdure_service.domain.events import EventKind
from perdure_service.domain.runs import RunKey
from perdure_service.durable import writer as writer_module
from perdure_service.durable.executions import AT_ONCE_CHARS, Execution
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


def test_long_text_is_written_before_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "LINGER_S", 3600.0)
    written: list[str] = []

    def write(execution: Execution) -> None:
        written.extend(event.data["text"] for event in execution.take())

    writer = EventWriter(write)
    writer.start()
    try:
        execution = execution_of("talker", writer)

        def say(text: str) -> None:
            execution.note(execution.event(EventKind.OUTPUT_DELTA, {"stream": "text", "text": text}))

        for _ in range(2):
            for _ in range(AT_ONCE_CHARS // 512):
                say("x" * 512)
            eventually(lambda: not execution.has_events)
        assert written == ["x" * AT_ONCE_CHARS] * 2
        say("the rest")
        assert execution.has_events
    finally:
        writer.stop()
    assert written[-1] == "the rest", "the end does not wait for it"
