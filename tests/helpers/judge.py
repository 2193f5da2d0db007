"""Judges a run from behind the scenes: whether its log, its checkpoints and its side effects agree."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from perdure_service.domain.events import PUBLISH_STEP, Event, EventKind, decode_events

from tests.helpers import chaos_report
from tests.helpers.server import effects, sql

DONE = {EventKind.STEP_SUCCEEDED, EventKind.STEP_FAILED, EventKind.PUBLISHED, EventKind.CHILD_STARTED}


def log_of(database_url: str, workflow_id: str) -> list[Event]:
    """Returns a run's whole log, and fails unless the packs follow each other without a gap."""
    with sql(database_url) as connection:
        rows = connection.execute(
            "SELECT first_sequence, event_count, previous_first, events FROM perdure.run_event "
            "WHERE workflow_id = %s ORDER BY first_sequence",
            (workflow_id,),
        ).fetchall()
    _count_gaps(workflow_id, rows)
    log: list[Event] = []
    previous: int | None = None
    for first, count, previous_first, text in rows:
        events = decode_events(text, first)
        assert first == len(log) + 1, f"a gap before {first}"
        assert len(events) == count
        assert previous_first == previous
        previous = first
        log += events
    return log


def _count_gaps(workflow_id: str, rows: list[Any]) -> None:
    """Counts the events that are missing, or there twice, in packs that do not follow each other."""
    expected, lost, doubled = 1, 0, 0
    for first, count, *_ in rows:
        lost += max(0, first - expected)
        doubled += max(0, expected - first)
        expected = max(expected, first + count)
    if lost or doubled:
        chaos_report.judged(workflow_id, lost=lost, doubled=doubled)


def checkpoints_of(database_url: str, workflow_id: str) -> dict[int, str]:
    """Returns DBOS's recorded operations of a run: number and name."""
    with sql(database_url) as connection:
        rows = connection.execute(
            "SELECT function_id, function_name FROM dbos.operation_outputs WHERE workflow_uuid = %s", (workflow_id,)
        ).fetchall()
    return dict(rows)


def assert_consistent(database_url: str, workflow_id: str, end: str = "SUCCEEDED") -> list[Event]:
    """Fails unless log and checkpoints tell the same story, which ends once, with `end`. Returns the log."""
    log = log_of(database_url, workflow_id)
    ends = [
        e
        for e in log
        if e.kind is EventKind.STATE_CHANGED and e.data["to"] in ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED")
    ]
    done = [e for e in log if e.kind in DONE and (e.kind is not EventKind.PUBLISHED or e.step_name == PUBLISH_STEP)]
    told = Counter(e.step_id for e in done)
    recorded = {n: name for n, name in checkpoints_of(database_url, workflow_id).items() if name != "DBOS.sleep"}
    told_names = {e.step_id: e.step_name for e in done if e.step_name != "DBOS.sleep"}
    streamed = {
        e.step_id: e.step_name for e in log if e.kind is EventKind.OUTPUT_DELTA and e.step_name == "DBOS.writeStream"
    }
    again = _begun_after_the_end(log)
    chaos_report.judged(
        workflow_id,
        finished=len(ends) > 0,
        repeated=_begun_again(log),
        checkpoints=len(recorded),
        events=len(log),
        lost=len(recorded.items() ^ (told_names | streamed).items()) + (not ends),
        doubled=sum(told.values()) - len(told) + max(0, len(ends) - 1) + len(again),
    )
    assert [e.data["to"] for e in ends] == [end]
    assert log[-1] is ends[0], "the terminal event is the last"
    assert set(told.values()) <= {1}, f"a step was told of twice: {told}"
    assert not again, f"steps that were done began again: {again}"
    assert recorded == told_names | streamed
    assert _usage_of(database_url, workflow_id) == tuple(
        sum(event.data[name] for event in log if event.kind is EventKind.USAGE)
        for name in ("input_tokens", "output_tokens")
    ), "the run's usage is what its log adds up to"
    _assert_states_follow(log)
    return log


def _begun_again(log: list[Event]) -> int:
    """Returns how many steps began again in a later execution, as far as the log tells: their process had died."""
    began = {(e.step_id, e.execution) for e in log if e.kind is EventKind.STEP_STARTED}
    return len(began) - len({step_id for step_id, _ in began})


def _begun_after_the_end(log: list[Event]) -> list[int]:
    done: set[int] = set()
    again = []
    for event in log:
        if event.kind is EventKind.STEP_STARTED and event.step_id in done:
            again.append(event.step_id)
        elif event.kind in (EventKind.STEP_SUCCEEDED, EventKind.STEP_FAILED):
            done.add(event.step_id)
    return again


def _usage_of(database_url: str, workflow_id: str) -> tuple[int, ...]:
    query = "SELECT input_tokens, output_tokens FROM perdure.run WHERE workflow_id = %s"
    with sql(database_url) as connection:
        return tuple(connection.execute(query, (workflow_id,)).fetchall()[0])


def _assert_states_follow(log: list[Event]) -> None:
    state: str | None = None
    for event in log:
        if event.kind is EventKind.STATE_CHANGED:
            assert event.data.get("from") in (state, None) or state is None, (state, dict(event.data))
            state = event.data["to"]


def assert_effects(database_url: str, run_id: str, log: list[Event], *expected: str, deaths: int) -> None:
    """Fails unless each effect happened, in order, and only steps in progress at a death were done again."""
    done = effects(database_url, run_id)
    repeated = len(done) - len(expected)
    chaos_report.judged(
        f"default.{run_id}.r",
        repeated=max(0, repeated),
        effects=len(done),
        lost=len(set(expected) - set(done)),
        doubled=max(0, repeated - deaths),
    )
    assert list(dict.fromkeys(done)) == list(expected)
    assert 0 <= repeated <= deaths, f"{repeated} effects repeated by {deaths} deaths: {done}"


def assert_ledger(run_id: str, rows: list[tuple[str, int, int]], key: str, amount: int, *, deaths: int) -> None:
    """Fails unless the one key of a run was booked once, asked for again by steps in progress at a death only."""
    booked = [(row_key, booked) for row_key, _, booked in rows]
    attempts = sum(attempts for _, attempts, _ in rows)
    chaos_report.judged(
        f"ledger of {run_id}",
        effects=attempts,
        lost=not rows,
        doubled=max(0, len(rows) - 1),
    )
    assert booked == [(key, amount)]
    assert 1 <= attempts <= 1 + deaths, f"the key was asked for {attempts} times with {deaths} deaths"


def assert_watched(seen: list[tuple[int, str]], log: list[Event], workflow_id: str) -> None:
    """Fails unless a watcher has seen a run's whole log, each event once and in order."""
    expected = [(event.sequence, str(event.kind)) for event in log]
    chaos_report.judged(
        f"watch of {workflow_id}",
        lost=len(set(expected) - set(seen)),
        doubled=len(seen) - len(set(seen)),
    )
    assert seen == expected


def text_of(log: list[Event], stream: str = "text") -> str:
    """Returns what a client has of a stream in the end: the deltas that no `attempt_reset` made void."""
    pieces: list[tuple[int, str]] = []
    for event in log:
        if event.kind is EventKind.ATTEMPT_RESET:
            pieces = [piece for piece in pieces if piece[0] != event.step_id]
        elif event.kind is EventKind.OUTPUT_DELTA and event.data["stream"] == stream:
            pieces.append((event.step_id, event.data["text"]))
    return "".join(text for _, text in pieces)


def output_of(database_url: str, workflow_id: str) -> Any:
    """Returns a run's output."""
    with sql(database_url) as connection:
        row = connection.execute("SELECT output FROM perdure.run WHERE workflow_id = %s", (workflow_id,)).fetchone()
    return None if row is None or row[0] is None else json.loads(row[0])
