"""The stream contract of WatchRun with `include_children`: a view of a run and of all that it has started."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import pytest
from perdure.v1 import run_event_pb2 as event_pb
from perdure_client import Client

from tests.helpers.rpc import Reading, Rpc, events_of, kind_of, kinds_of, new_id, only, refused, sequences, state_name
from tests.helpers.server import ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually, scaled

AGENTS = ("tests.helpers.families",)
Events = list[event_pb.RunEvent]


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[ServerProcess]:
    create_effects_table(database_url)
    with ServerProcess(database_url, *AGENTS) as process:
        yield process


@pytest.fixture(scope="module")
def tree(rpc: Rpc) -> str:
    """A run that has ended, with three children, and three of each of those."""
    run_id = rpc.start("family", {"steps": 2, "children": 3, "depth": 2, "text": "x"})
    assert rpc.output_of(run_id) == 13
    return run_id


@pytest.fixture(scope="module")
def tree_events(rpc: Rpc, tree: str) -> Events:
    return rpc.events(tree, include_children=True)


def by_run(events: Iterable[event_pb.RunEvent]) -> dict[str, Events]:
    found: dict[str, Events] = {}
    for event in events:
        found.setdefault(event.run_id, []).append(event)
    return found


def ends(event: event_pb.RunEvent) -> bool:
    return kind_of(event) == "state_changed" and state_name(event.state_changed.to_state) in (
        "SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED",
    )  # fmt: skip


def check(rpc: Rpc, root: str, events: Events, runs: int | None = None) -> None:
    """Every run from its first event to its last, as a watch of it alone has it, and none before it was started."""
    started = {root}
    for event in events:
        assert event.run_id in started, f"{event.run_id} came before the event that started it"
        if kind_of(event) == "child_started":
            started.add(event.child_started.child_run_id)
    found = by_run(events)
    assert set(found) == started
    assert runs is None or len(found) == runs
    for run_id, own in found.items():
        assert sequences(own) == list(range(1, len(own) + 1)), run_id
        assert [ends(event) for event in own] == [False] * (len(own) - 1) + [True]
        assert own == rpc.events(run_id)


def rest_of(responses: list[Any], index: int) -> dict[str, Events]:
    return by_run(events_of(responses[index + 1 :]))


# ---- order, density, ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["call", "start", "queue"])
def test_a_view_has_every_run_whole_and_after_its_start_however_it_was_started(rpc: Rpc, how: str) -> None:
    run_id = rpc.start("family", {"steps": 2, "children": 2, "depth": 2, "how": how, "delay_s": 0.02, "text": "x"})
    call = rpc.watch(run_id, include_children=True)
    responses = list(call)
    assert call.code() is grpc.StatusCode.OK
    check(rpc, run_id, events_of(responses), runs=7)
    assert [response.end_of_run for response in responses] == [False] * (len(responses) - 1) + [True]
    assert [response.HasField("snapshot") for response in responses] == [True] + [False] * (len(responses) - 1)
    assert responses[0].snapshot.run_id == run_id
    assert responses[-1].last_sequence == rpc.get(run_id).last_sequence
    assert rpc.output_of(run_id) == 7


def test_a_view_of_a_finished_tree_is_replayed_whole(rpc: Rpc, tree: str, tree_events: Events) -> None:
    check(rpc, tree, tree_events, runs=13)
    assert rpc.events(tree, include_children=True) == tree_events


def test_what_has_ended_is_complete_before_its_parent_goes_on(rpc: Rpc, tree: str) -> None:
    """So the cursor of a view with any number of finished children stays small."""
    responses = rpc.stream(tree, include_children=True)
    open_runs = 0
    for event in events_of(responses):
        open_runs += kind_of(event) == "child_started"
        open_runs -= ends(event)
        assert open_runs <= 2
    assert max(len(response.cursor) for response in responses) < len(responses[0].cursor) + 60


def test_without_children_the_stream_is_of_one_run(rpc: Rpc, tree: str, tree_events: Events) -> None:
    assert rpc.events(tree) == by_run(tree_events)[tree]
    assert len(only(rpc.events(tree), "child_started")) == 3


def test_a_run_without_children_looks_the_same_in_both_views(rpc: Rpc) -> None:
    run_id = rpc.start("family", {"steps": 3})
    rpc.end_of(run_id)
    plain, view = rpc.stream(run_id), rpc.stream(run_id, include_children=True)
    for response in (*plain, *view):
        response.ClearField("cursor")
    assert plain == view


def test_fifty_children_at_once(rpc: Rpc) -> None:
    run_id = rpc.start("family", {"steps": 1, "children": 50, "depth": 1, "delay_s": 0.05, "text": "word "})
    reading = Reading(rpc.watch(run_id, include_children=True, timeout=60))
    events = events_of(reading.join(60))
    check(rpc, run_id, events, runs=51)
    check(rpc, run_id, rpc.events(run_id, include_children=True), runs=51)


def test_a_view_lasts_until_the_last_child_that_outlives_its_parent_has_ended(rpc: Rpc) -> None:
    run_id = rpc.start("family", {"children": 2, "depth": 1, "leave": True, "child_waits": True})
    reading = Reading(rpc.watch(run_id, include_children=True))
    assert rpc.output_of(run_id) == 1
    children = [event.child_started.child_run_id for event in only(rpc.events(run_id), "child_started")]
    for child in children:
        rpc.until(child, "AWAITING_INPUT")
    eventually(lambda: reading.responses[-1].caught_up and any(ends(event) for event in reading.events))
    late = reading.responses[-1].cursor
    rpc.signal(children[0])
    eventually(lambda: sum(ends(event) for event in reading.events) == 2)
    assert reading.open
    again = Reading(rpc.watch(run_id, include_children=True, cursor=late))
    rpc.signal(children[1])
    check(rpc, run_id, events_of(reading.join()), runs=3)
    assert {event.run_id for event in events_of(again.join())} == set(children)
    assert [event.run_id for event in again.events if ends(event)][-1] == children[1]


# ---- cursors ---------------------------------------------------------------------------------------------------------


def test_every_cursor_of_a_view_gives_exactly_the_rest_of_every_run(rpc: Rpc, tree: str) -> None:
    responses = rpc.stream(tree, include_children=True)
    for index, response in enumerate(responses):
        rest = rpc.stream(tree, include_children=True, cursor=response.cursor)
        assert by_run(events_of(rest)) == rest_of(responses, index), index
        assert rest[-1].end_of_run


def test_every_cursor_of_a_live_view_gives_exactly_the_rest_of_every_run(rpc: Rpc) -> None:
    run_id = rpc.start("family", {"steps": 2, "children": 3, "depth": 2, "delay_s": 0.05})
    responses = rpc.stream(run_id, include_children=True)
    check(rpc, run_id, events_of(responses), runs=13)
    for index, response in enumerate(responses):
        rest = rpc.events(run_id, include_children=True, cursor=response.cursor)
        assert by_run(rest) == rest_of(responses, index), index


def test_a_reader_that_breaks_off_at_every_response_of_a_live_view_sees_everything_once(rpc: Rpc) -> None:
    run_id = rpc.start("family", {"steps": 2, "children": 2, "depth": 2, "delay_s": 0.03})
    cursor, streams, over = "", 0, False
    seen: Events = []
    while not over:
        streams += 1
        call = rpc.watch(run_id, include_children=True, **({"cursor": cursor} if cursor else {}))
        for response in call:
            seen += response.events
            cursor, over = response.cursor, response.end_of_run
            if response.events:
                break
        call.cancel()
    assert streams > 7
    check(rpc, run_id, seen, runs=7)


def cursor_of(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def content_of(cursor: str) -> list[Any]:
    return json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))  # type: ignore[no-any-return]


def test_a_sequence_is_no_place_in_a_view(rpc: Rpc, tree: str) -> None:
    for sequence in (0, 3):
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", "after_sequence"):
            rpc.stream(tree, include_children=True, after_sequence=sequence)


def test_cursors_of_the_two_views_are_told_apart(rpc: Rpc, tree: str) -> None:
    plain = rpc.stream(tree)[-1].cursor
    view = rpc.stream(tree, include_children=True)[-1].cursor
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cursor") as error:
        rpc.stream(tree, include_children=True, cursor=plain)
    assert "without children" in error.text
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cursor") as error:
        rpc.stream(tree, cursor=view)
    assert "include_children" in error.text


def test_a_cursor_from_the_future_of_a_child_is_refused(rpc: Rpc, tree: str) -> None:
    responses = rpc.stream(tree, include_children=True)
    content = next(content_of(r.cursor) for r in responses if content_of(r.cursor)[3])
    child = next(iter(content[3]))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cursor"):
        rpc.stream(tree, include_children=True, cursor=cursor_of([*content[:3], {child: 1_000}]))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cursor"):
        rpc.stream(tree, include_children=True, cursor=cursor_of([*content[:2], 1_000, {}]))


# ---- from now on, kinds ----------------------------------------------------------------------------------------------


def test_from_now_the_view_has_what_comes_of_every_run_that_has_not_ended(rpc: Rpc) -> None:
    run_id = rpc.start("family", {"children": 2, "depth": 1, "child_waits": True})
    children = [f"{run_id}.{step}" for step in _steps_of_children(rpc, run_id, 2)]
    rpc.until(children[0], "AWAITING_INPUT")
    rpc.signal(children[0])
    rpc.end_of(children[0])
    rpc.until(children[1], "AWAITING_INPUT")
    last_child = _steps_of_children(rpc, run_id, 2)[-1]

    def has_result() -> bool:
        steps = rpc.runs.ListSteps(_steps_request(run_id), timeout=scaled(10)).steps
        return any(step.step_id > last_child for step in steps)

    eventually(has_result, what="the parent has the result of the first child")
    known = {one: rpc.get(one).last_sequence for one in (run_id, children[1])}
    reading = Reading(rpc.watch(run_id, include_children=True, from_now=True))
    eventually(lambda: reading.responses)
    assert reading.responses[0].caught_up
    assert reading.responses[0].last_sequence <= reading.responses[0].snapshot.last_sequence
    rpc.signal(children[1])
    found = by_run(events_of(reading.join()))
    assert set(found) == {run_id, children[1]}
    assert found[children[1]] == rpc.events(children[1])[known[children[1]] :]
    assert found[run_id][-1] == rpc.events(run_id)[-1]
    assert rpc.stream(run_id, include_children=True, from_now=True)[-1].end_of_run


def _steps_of_children(rpc: Rpc, run_id: str, count: int) -> list[int]:
    def started() -> list[int]:
        page = rpc.runs.ListSteps(_steps_request(run_id), timeout=scaled(10)).steps
        found = [step.step_id for step in page if step.child_run_id]
        assert len(found) == count
        return found

    return eventually(started)


def _steps_request(run_id: str) -> Any:
    from perdure.v1 import agent_run_service_pb2

    return agent_run_service_pb2.ListStepsRequest(run_id=run_id)


def test_a_filter_is_of_every_run_and_the_ends_are_always_sent(rpc: Rpc, tree: str, tree_events: Events) -> None:
    kinds = [event_pb.RUN_EVENT_KIND_OUTPUT_DELTA]
    responses = rpc.stream(tree, include_children=True, kinds=kinds)
    wanted = [event for event in tree_events if kind_of(event) == "output_delta" or ends(event)]
    assert by_run(events_of(responses)) == by_run(wanted)
    for index, response in enumerate(responses):
        rest = rpc.events(tree, include_children=True, kinds=kinds, cursor=response.cursor)
        assert by_run(rest) == rest_of(responses, index)


# ---- what is deleted, started twice, or another's --------------------------------------------------------------------


def forget(database_url: str, run_id: str) -> None:
    """Removes a run as a deletion does."""
    root, _, path = run_id.partition(".")
    workflow_id = f"default.{root}.r" + ("-" + path.replace(".", "-") if path else "")
    with sql(database_url) as connection:
        for table, column in (
            ("perdure.run_event", "workflow_id"), ("perdure.approval", "workflow_id"), ("perdure.run", "workflow_id"),
            ("dbos.workflow_status", "workflow_uuid"),
        ):  # fmt: skip
            connection.execute(f"DELETE FROM {table} WHERE {column} = %s", (workflow_id,))


def test_a_child_that_was_deleted_is_not_in_the_view_any_more(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("family", {"children": 3, "depth": 1})
    before = rpc.stream(run_id, include_children=True)
    children = [event.child_started.child_run_id for event in only(events_of(before), "child_started")]
    in_it = next(r.cursor for r in before if r.events and r.events[-1].run_id == children[1])
    forget(database_url, children[1])
    after = rpc.stream(run_id, include_children=True)
    assert set(by_run(events_of(after))) == {run_id, children[0], children[2]}
    assert after[-1].end_of_run
    assert rpc.stream(run_id, include_children=True, cursor=in_it)[-1].end_of_run


def test_a_run_that_is_deleted_while_it_is_watched_does_not_keep_the_watch(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("family", {"children": 1, "depth": 1, "leave": True, "child_waits": True})
    rpc.end_of(run_id)
    (step,) = _steps_of_children(rpc, run_id, 1)
    child = f"{run_id}.{step}"
    rpc.until(child, "AWAITING_INPUT")
    view, alone = Reading(rpc.watch(run_id, include_children=True)), Reading(rpc.watch(child))
    for reading in (view, alone):
        eventually(lambda reading=reading: reading.responses and reading.responses[-1].caught_up)
    forget(database_url, child)
    assert view.join()[-1].end_of_run
    alone.join()
    assert alone.refusal is not None
    assert (alone.refusal.code.name, alone.refusal.reason) == ("NOT_FOUND", "RUN_NOT_FOUND")


def test_a_child_that_is_started_twice_or_is_anothers_is_in_the_view_once_or_not_at_all(rpc: Rpc, tree: str) -> None:
    child = new_id("own-child")
    run_id = rpc.start("adopter", {"child_id": child, "others": f"default.{tree}.r"})
    responses = rpc.stream(run_id, include_children=True)
    found = by_run(events_of(responses))
    assert set(found) == {run_id, child}
    started = [event.child_started.child_run_id for event in only(found[run_id], "child_started")]
    assert started.count(child) >= 2
    for events in found.values():
        assert sequences(events) == list(range(1, len(events) + 1))
    for index, response in enumerate(responses):
        rest = rpc.events(run_id, include_children=True, cursor=response.cursor)
        assert by_run(rest) == rest_of(responses, index), index


# ---- slow readers, restarts ------------------------------------------------------------------------------------------


def test_a_slow_reader_of_a_view_loses_nothing(rpc: Rpc, server: ServerProcess) -> None:
    with Rpc(server.address) as other:
        run_id = rpc.start("family", {"steps": 12, "children": 10, "depth": 1, "text": "x" * 20_000})
        slow = other.watch(run_id, timeout=60, include_children=True)
        first = next(slow)
        quick = Reading(rpc.watch(run_id, timeout=60, include_children=True))
        assert rpc.output_of(run_id) == 11
        quick_events = events_of(quick.join())
        slow_events = events_of([first, *slow])
    check(rpc, run_id, quick_events, runs=11)
    check(rpc, run_id, slow_events, runs=11)


def test_a_view_sees_every_run_once_though_the_server_is_killed(own_database_url: str) -> None:
    own_server = ServerProcess(own_database_url, *AGENTS)
    try:
        own_server.start()
        with Client(own_server.address) as client, Rpc(own_server.address) as rpc:
            run = client.start("family", {"steps": 4, "children": 4, "depth": 1, "delay_s": 0.25, "text": "word "})
            seen: list[tuple[str, int]] = []
            breaks: list[object] = []

            def follow() -> None:
                watch = client.watch(run, include_children=True, on_reconnect=lambda *facts: breaks.append(facts))
                seen.extend((event.run_id, event.sequence) for event in watch.events())

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            _steps_of_children(rpc, run.run_id, 4)
            own_server.kill()
            own_server.start()
            thread.join(scaled(40))
            assert not thread.is_alive()
            assert breaks
            assert client.get(run).output == 5
            runs = dict.fromkeys(run_id for run_id, _ in seen)
            assert len(runs) == 5
            for run_id in runs:
                own = [sequence for one, sequence in seen if one == run_id]
                assert own == sequences(rpc.events(run_id))
            assert "recovered" in [kind for run_id in runs for kind in kinds_of(rpc.events(run_id))]
    finally:
        own_server.__exit__()
