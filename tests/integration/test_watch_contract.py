"""The stream contract of WatchRun, sentence by sentence, on a real server."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import grpc
import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import run_event_pb2 as event_pb
from perdure_client import Client, EventKind

from tests.helpers.rpc import (
    Reading,
    Rpc,
    duration,
    events_of,
    kind_of,
    kinds_of,
    new_id,
    only,
    refusal_of,
    refused,
    sequences,
    state_name,
    state_of,
    states_in,
    valid_text,
)
from tests.helpers.server import ServerProcess, effects, sql
from tests.helpers.waiting import eventually, scaled


@pytest.fixture(scope="module")
def finished(rpc: Rpc) -> str:
    """A run that has ended, with events of many kinds."""
    run_id = rpc.start("flaky", {"failures": 2})
    assert rpc.output_of(run_id) == "after 3"
    return run_id


@pytest.fixture(scope="module")
def finished_events(rpc: Rpc, finished: str) -> list[event_pb.RunEvent]:
    return rpc.events(finished)


@pytest.fixture
def live(rpc: Rpc) -> Iterator[str]:
    """A run that goes on until it has got a signal."""
    run_id = rpc.start("listener", {})
    rpc.until(run_id, "AWAITING_INPUT")
    yield run_id
    rpc.cancel(run_id)


def ended(event: event_pb.RunEvent) -> bool:
    return kind_of(event) == "state_changed" and state_name(event.state_changed.to_state) in (
        "SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED",
    )  # fmt: skip


# ---- 1. dense, in order, exactly once --------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["counter", "flaky", "plain", "sleeper", "parent", "failing", "talker"])
def test_sequences_are_dense_from_one_and_the_end_is_last(rpc: Rpc, agent: str) -> None:
    run_id = rpc.start(agent, {"name": "x"} if agent == "plain" else {})
    events = rpc.events(run_id)
    assert sequences(events) == list(range(1, len(events) + 1))
    assert [ended(event) for event in events] == [False] * (len(events) - 1) + [True]
    assert {event.run_id for event in events} == {run_id}
    assert rpc.get(run_id).last_sequence == len(events)
    assert rpc.events(run_id) == events


def test_every_after_sequence_gives_exactly_the_rest(
    rpc: Rpc, finished: str, finished_events: list[event_pb.RunEvent]
) -> None:
    for seen in range(len(finished_events) + 1):
        assert rpc.events(finished, after_sequence=seen) == finished_events[seen:]


def test_every_cursor_of_a_stream_gives_exactly_the_rest(
    rpc: Rpc, finished: str, finished_events: list[event_pb.RunEvent]
) -> None:
    responses = rpc.stream(finished)
    assert all(response.cursor for response in responses)
    for index, response in enumerate(responses):
        rest = events_of(responses[index + 1 :])
        assert rpc.events(finished, cursor=response.cursor) == rest
        assert response.last_sequence == len(finished_events) - len(rest)


def test_every_cursor_of_a_live_stream_gives_exactly_the_rest(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 12, "delay_s": 0.02})
    responses = rpc.stream(run_id)
    all_events = events_of(responses)
    assert len(responses) > 5
    for index, response in enumerate(responses):
        assert rpc.events(run_id, cursor=response.cursor) == events_of(responses[index + 1 :])
    assert sequences(all_events) == list(range(1, len(all_events) + 1))


def test_a_reader_that_breaks_off_at_every_response_of_a_live_run_sees_everything_once(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 15, "delay_s": 0.02})
    cursor, seen, streams = "", [], 0
    over = False
    while not over:
        streams += 1
        call = rpc.watch(run_id, **({"cursor": cursor} if cursor else {}))
        for response in call:
            seen += list(response.events)
            cursor, over = response.cursor, response.end_of_run
            if response.events:
                break
        call.cancel()
    assert streams > 5
    assert sequences(seen) == list(range(1, len(seen) + 1))
    assert seen == rpc.events(run_id)


def test_two_watchers_of_a_live_run_see_the_same(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 10, "delay_s": 0.02, "text": "words "})
    readings = [Reading(rpc.watch(run_id)) for _ in range(4)]
    streams = [events_of(reading.join()) for reading in readings]
    assert all(stream == streams[0] for stream in streams)
    assert all(reading.refusal is None for reading in readings)
    assert streams[0] == rpc.events(run_id)


def test_the_pages_of_the_log_are_what_the_stream_sent(
    rpc: Rpc, finished: str, finished_events: list[event_pb.RunEvent]
) -> None:
    found: list[event_pb.RunEvent] = []
    token = ""
    while True:
        page = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=finished, page_size=2, page_token=token))
        assert 0 < len(page.events) <= 2
        found += page.events
        token = page.next_page_token
        if not token:
            break
    assert found == finished_events


# ---- 3. snapshot, rest, live -----------------------------------------------------------------------------------------


def test_the_first_response_alone_has_the_snapshot(rpc: Rpc, finished: str) -> None:
    responses = rpc.stream(finished)
    assert [response.HasField("snapshot") for response in responses] == [True] + [False] * (len(responses) - 1)
    snapshot = responses[0].snapshot
    assert (snapshot.run_id, state_of(snapshot)) == (finished, "SUCCEEDED")
    assert snapshot.last_sequence == len(events_of(responses))


def test_a_snapshot_of_a_live_run_is_followed_by_what_came_after_it(rpc: Rpc, live: str) -> None:
    reading = Reading(rpc.watch(live))
    eventually(lambda: reading.responses and reading.responses[-1].caught_up)
    snapshot = reading.responses[0].snapshot
    assert state_of(snapshot) == "AWAITING_INPUT"
    assert reading.events[-1].sequence == snapshot.last_sequence
    rpc.signal(live)
    reading.join()
    assert sequences(reading.events) == list(range(1, len(reading.events) + 1))
    assert states_in(reading.events)[-1] == "SUCCEEDED"


def test_from_now_sends_only_what_comes(rpc: Rpc, live: str) -> None:
    known = rpc.get(live).last_sequence
    reading = Reading(rpc.watch(live, from_now=True))
    eventually(lambda: reading.responses)
    assert reading.responses[0].snapshot.last_sequence == known
    assert reading.responses[0].last_sequence == known
    assert reading.responses[0].caught_up
    rpc.signal(live)
    reading.join()
    assert sequences(reading.events) == list(range(known + 1, known + 1 + len(reading.events)))
    assert kinds_of(reading.events)[0] == "signal_received"
    assert ended(reading.events[-1])


def test_from_now_on_a_finished_run_ends_at_once(rpc: Rpc, finished: str) -> None:
    (response,) = rpc.stream(finished, from_now=True)
    assert response.end_of_run
    assert not response.events


def test_events_arrive_while_the_run_goes_on(rpc: Rpc) -> None:
    run_id = rpc.start("counter", {"steps": 8, "delay_s": 0.1})
    arrived: dict[int, float] = {}
    began = time.monotonic()
    for response in rpc.watch(run_id):
        for event in response.events:
            arrived[event.sequence] = time.monotonic() - began
    assert max(arrived.values()) - min(arrived.values()) > 0.5
    assert len(set(arrived.values())) >= 8


def test_a_stream_says_when_it_has_caught_up(rpc: Rpc, live: str) -> None:
    reading = Reading(rpc.watch(live))
    eventually(lambda: any(response.caught_up for response in reading.responses))
    first = next(index for index, response in enumerate(reading.responses) if response.caught_up)
    assert len(events_of(reading.responses[: first + 1])) == rpc.get(live).last_sequence
    reading.close()


# ---- 4. filters ------------------------------------------------------------------------------------------------------


def test_a_filter_lets_through_its_kinds_and_the_end(
    rpc: Rpc, finished: str, finished_events: list[event_pb.RunEvent]
) -> None:
    events = rpc.events(finished, kinds=[event_pb.RUN_EVENT_KIND_STEP_RETRYING])
    wanted = [event for event in finished_events if kind_of(event) == "step_retrying" or ended(event)]
    assert len(wanted) == 3
    assert events == wanted


@pytest.mark.parametrize("kind", [number for number in event_pb.RunEventKind.values() if number])
def test_every_kind_can_be_asked_for_and_the_end_is_always_sent(
    rpc: Rpc, finished: str, finished_events: list[event_pb.RunEvent], kind: event_pb.RunEventKind
) -> None:
    name = event_pb.RunEventKind.Name(kind).removeprefix("RUN_EVENT_KIND_").lower()
    events = rpc.events(finished, kinds=[kind])
    assert events == [event for event in finished_events if kind_of(event) == name or ended(event)]


def test_a_filtered_stream_continues_its_view_at_every_cursor(
    rpc: Rpc, finished: str, finished_events: list[event_pb.RunEvent]
) -> None:
    kinds = [event_pb.RUN_EVENT_KIND_OUTPUT_DELTA, event_pb.RUN_EVENT_KIND_ATTEMPT_RESET]
    responses = rpc.stream(finished, kinds=kinds)
    assert responses[-1].last_sequence == len(finished_events)
    for index, response in enumerate(responses):
        assert rpc.events(finished, kinds=kinds, cursor=response.cursor) == events_of(responses[index + 1 :])
    whole = rpc.events(finished, kinds=kinds)
    for seen in range(len(finished_events) + 1):
        expected = [event for event in whole if event.sequence > seen]
        assert rpc.events(finished, kinds=kinds, after_sequence=seen) == expected


def test_a_cursor_of_a_filtered_stream_covers_what_was_filtered_out(rpc: Rpc, live: str) -> None:
    reading = Reading(rpc.watch(live, kinds=[event_pb.RUN_EVENT_KIND_LOG]))
    eventually(lambda: reading.responses and reading.responses[-1].caught_up)
    assert reading.events == []
    last = reading.responses[-1]
    assert last.last_sequence == rpc.get(live).last_sequence
    reading.close()
    again = Reading(rpc.watch(live, cursor=last.cursor))
    eventually(lambda: again.responses)
    assert again.events == []
    again.close()


def test_the_unspecified_kind_is_refused(rpc: Rpc, finished: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "kinds[0]"):
        rpc.stream(finished, kinds=[event_pb.RUN_EVENT_KIND_UNSPECIFIED])


# ---- 5. the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agent", "state"), [("counter", "SUCCEEDED"), ("failing", "FAILED"), ("flaky", "SUCCEEDED")])
def test_the_terminal_event_is_last_and_the_stream_ends_well(rpc: Rpc, agent: str, state: str) -> None:
    run_id = rpc.start(agent, {})
    call = rpc.watch(run_id)
    responses = list(call)
    assert call.code() is grpc.StatusCode.OK
    assert [response.end_of_run for response in responses] == [False] * (len(responses) - 1) + [True]
    last = events_of(responses)[-1]
    assert state_name(last.state_changed.to_state) == state
    replay = rpc.watch(run_id)
    assert events_of(replay) == events_of(responses)
    assert replay.code() is grpc.StatusCode.OK


def test_a_cancelled_run_ends_its_streams_well(rpc: Rpc) -> None:
    run_id = rpc.start("sleeper", {"seconds": 600})
    rpc.until(run_id, "SLEEPING")
    reading = Reading(rpc.watch(run_id))
    eventually(lambda: reading.responses)
    rpc.cancel(run_id)
    reading.join()
    assert reading.refusal is None
    assert states_in(reading.events)[-1] == "CANCELLED"
    assert reading.responses[-1].end_of_run


# ---- 6. cursors that do not fit --------------------------------------------------------------------------------------


def cursor_of(*content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(list(content)).encode()).decode().rstrip("=")


def test_an_after_sequence_from_the_future_is_refused(rpc: Rpc, live: str) -> None:
    known = rpc.get(live).last_sequence
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "after_sequence"):
        rpc.stream(live, after_sequence=known + 1)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "after_sequence"):
        rpc.stream(live, after_sequence=2**63 - 1)


def test_a_negative_after_sequence_is_refused(rpc: Rpc, finished: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "after_sequence"):
        rpc.stream(finished, after_sequence=-1)


def test_a_cursor_from_the_future_is_refused(rpc: Rpc, finished: str) -> None:
    cursor = rpc.stream(finished)[-1].cursor
    version, workflow, sequence = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cursor"):
        rpc.stream(finished, cursor=cursor_of(version, workflow, sequence + 1))


def test_a_cursor_of_another_run_is_refused(rpc: Rpc, finished: str, live: str) -> None:
    cursor = rpc.stream(finished)[0].cursor
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cursor"):
        rpc.stream(live, cursor=cursor)


@pytest.mark.parametrize(
    "cursor",
    [
        "nonsense", "ä", "🙂", " ", "!!!!", "e30", "bnVsbA", "W10", "x" * 4096, "x" * 5000, "\x00",
        cursor_of(1), cursor_of(1, "default.x.r", "3"), cursor_of(2, "default.x.r", 3), cursor_of(1, None, -1),
        cursor_of(1, "default.x.r", 1.5), cursor_of(1, "default.x.r", True), cursor_of(1, ["x"], 10**400),
        base64.urlsafe_b64encode(b"[" * 3000).decode(), base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    ],
)  # fmt: skip
def test_what_is_not_a_cursor_is_refused(rpc: Rpc, finished: str, cursor: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cursor"):
        rpc.stream(finished, cursor=cursor)


def test_an_empty_cursor_begins_at_the_first_event(
    rpc: Rpc, finished: str, finished_events: list[event_pb.RunEvent]
) -> None:
    assert rpc.events(finished, cursor="") == finished_events


def test_a_run_that_does_not_exist_cannot_be_watched(rpc: Rpc) -> None:
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        rpc.stream(new_id())


def test_events_that_are_no_longer_kept_are_told_with_the_earliest_that_is(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("counter", {"steps": 8, "delay_s": 0.01})
    rpc.end_of(run_id)
    responses = rpc.stream(run_id)
    events = events_of(responses)
    with sql(database_url) as connection:
        packs = connection.execute(
            "SELECT first_sequence FROM perdure.run_event WHERE workflow_id = %s ORDER BY first_sequence",
            (f"default.{run_id}.r",),
        ).fetchall()
        earliest = packs[len(packs) // 2][0]
        connection.execute(
            "DELETE FROM perdure.run_event WHERE workflow_id = %s AND first_sequence < %s",
            (f"default.{run_id}.r", earliest),
        )
    with refused("OUT_OF_RANGE", "EVENTS_TRUNCATED") as error:
        rpc.stream(run_id)
    assert error.metadata["earliest_sequence"] == str(earliest)
    with refused("OUT_OF_RANGE", "EVENTS_TRUNCATED"):
        rpc.stream(run_id, after_sequence=earliest - 2)
    with refused("OUT_OF_RANGE", "EVENTS_TRUNCATED"):
        rpc.stream(run_id, cursor=responses[0].cursor)
    assert rpc.events(run_id, after_sequence=earliest - 1) == events[earliest - 1 :]
    assert rpc.stream(run_id, from_now=True)[-1].end_of_run
    assert state_of(rpc.get(run_id)) == "SUCCEEDED"


def test_a_truncated_log_is_listed_from_the_earliest_event_that_is_kept(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("counter", {"steps": 4})
    events = rpc.events(run_id)
    with sql(database_url) as connection:
        connection.execute(
            "DELETE FROM perdure.run_event WHERE workflow_id = %s AND first_sequence = 1", (f"default.{run_id}.r",)
        )
    found = rpc.runs.ListRunEvents(pb.ListRunEventsRequest(run_id=run_id)).events
    assert list(found) == events[-len(found) :]
    assert 0 < len(found) < len(events)


# ---- 8. slow readers -------------------------------------------------------------------------------------------------


def test_a_slow_reader_loses_nothing_and_delays_nobody(rpc: Rpc, server: ServerProcess) -> None:
    with Rpc(server.address) as other:
        run_id = rpc.start("talker", {"pieces": 400, "size": 20_000, "pause_s": 0.005})
        slow = other.watch(run_id, timeout=60)
        first = next(slow)
        quick = Reading(rpc.watch(run_id))
        # The slow one reads nothing more until the run has ended and the quick one has everything.
        assert rpc.output_of(run_id) == 400
        quick_events = events_of(quick.join())
        slow_events = events_of([first, *slow])
    expected = "".join(f"{number:08d}".ljust(20_000, ".") for number in range(400))
    assert valid_text(quick_events) == expected
    assert slow_events == quick_events


def test_a_large_log_is_sent_in_messages_of_an_ordinary_size(rpc: Rpc) -> None:
    run_id = rpc.start("talker", {"pieces": 60, "size": 100_000})
    rpc.end_of(run_id)
    responses = rpc.stream(run_id)
    assert max(response.ByteSize() for response in responses) < 4 * 2**20
    assert len(valid_text(events_of(responses))) == 6_000_000


# ---- heartbeats ------------------------------------------------------------------------------------------------------


def test_a_quiet_stream_has_heartbeats_without_events(rpc: Rpc, live: str) -> None:
    reading = Reading(rpc.watch(live, heartbeat_interval=duration(5)))
    eventually(lambda: reading.responses and reading.responses[-1].caught_up)
    known = len(reading.responses)

    def beats() -> list[int]:  # the run may be parked meanwhile, and tells of that
        return [place for place, one in enumerate(reading.responses) if place >= known and not one.events]

    place = eventually(beats, 13)[0]
    beat = reading.responses[place]
    assert not beat.end_of_run
    assert beat.last_sequence == rpc.get(live).last_sequence
    assert beat.cursor == reading.responses[place - 1].cursor
    reading.close()


@pytest.mark.parametrize("seconds", [0, 4.9, 61, -5])
def test_a_heartbeat_interval_out_of_bounds_is_refused(rpc: Rpc, finished: str, seconds: float) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "heartbeat_interval"):
        rpc.stream(finished, heartbeat_interval=duration(seconds))


# ---- 9. deltas -------------------------------------------------------------------------------------------------------


def test_text_is_coalesced_and_complete(rpc: Rpc) -> None:
    run_id = rpc.start("talker", {"pieces": 1000, "size": 20})
    events = rpc.events(run_id)
    assert valid_text(events) == "".join(f"{number:08d}".ljust(20, ".") for number in range(1000))
    assert len(only(events, "output_delta")) <= 50


def test_text_written_over_time_comes_in_few_events_and_soon(rpc: Rpc) -> None:
    run_id = rpc.start("talker", {"pieces": 200, "size": 10, "pause_s": 0.005})
    arrivals: list[float] = []
    events: list[event_pb.RunEvent] = []
    for response in rpc.watch(run_id):
        events += response.events
        arrivals += [time.monotonic()] * len(only(response.events, "output_delta"))
    assert valid_text(events) == "".join(f"{number:08d}".ljust(10, ".") for number in range(200))
    assert 5 <= len(arrivals) <= 60
    assert arrivals[-1] - arrivals[0] > 0.5


def test_a_retry_voids_the_text_of_the_attempt_before(rpc: Rpc, finished_events: list[event_pb.RunEvent]) -> None:
    deltas = only(finished_events, "output_delta")
    assert [(delta.attempt, delta.output_delta.text) for delta in deltas] == [
        (1, "attempt 1"), (2, "attempt 2"), (3, "attempt 3"),
    ]  # fmt: skip
    assert len(only(finished_events, "attempt_reset")) == 2
    assert valid_text(finished_events) == "attempt 3"
    order = [kind for kind in kinds_of(finished_events) if kind in ("output_delta", "attempt_reset", "step_retrying")]
    assert order == ["output_delta", "step_retrying", "attempt_reset"] * 2 + ["output_delta"]


# ---- 10. closing a stream --------------------------------------------------------------------------------------------


def test_closing_a_stream_does_not_cancel_the_run(rpc: Rpc, database_url: str) -> None:
    run_id = rpc.start("counter", {"steps": 6, "delay_s": 0.05})
    reading = Reading(rpc.watch(run_id))
    eventually(lambda: reading.events)
    reading.close()
    assert reading.refusal is not None
    assert rpc.output_of(run_id) == {"total": 15}
    assert len(effects(database_url, run_id)) == 6


def test_the_connection_of_the_client_that_started_it_may_go_away(rpc: Rpc, server: ServerProcess) -> None:
    with Rpc(server.address) as other:
        run_id = other.start("counter", {"steps": 6, "delay_s": 0.05})
        Reading(other.watch(run_id))
    assert rpc.output_of(run_id) == {"total": 15}


def test_many_watchers_of_many_runs_get_their_own(rpc: Rpc) -> None:
    runs = [rpc.start("counter", {"steps": 5, "delay_s": 0.02, "text": f"{number} "}) for number in range(20)]
    readings = [Reading(rpc.watch(run_id)) for run_id in runs for _ in range(3)]
    for index, reading in enumerate(readings):
        events = events_of(reading.join())
        assert {event.run_id for event in events} == {runs[index // 3]}
        assert sequences(events) == list(range(1, len(events) + 1))
        assert valid_text(events).strip().replace(f"{index // 3} ", "") in ("", str(index // 3))


# ---- 2. and 7. restarts ----------------------------------------------------------------------------------------------


def test_a_watch_sees_everything_once_though_the_server_is_killed(own_server: ServerProcess) -> None:
    own_server.start()
    with Client(own_server.address) as client:
        run = client.start("counter", {"steps": 40, "delay_s": 0.1, "text": "word "})
        seen: list[int] = []
        breaks: list[object] = []
        kinds: list[EventKind] = []

        def follow() -> None:
            watch = client.watch(run, on_reconnect=lambda *facts: breaks.append(facts))
            for event in watch.events():
                seen.append(event.sequence)
                kinds.append(event.kind)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        eventually(lambda: seen)
        for least in (3, 10):
            # By what the run has done, not by what the watcher has seen: it may take a while to reconnect.
            eventually(lambda least=least: len(effects(own_server.database_url, run.run_id)) > least)
            own_server.kill()
            own_server.start()
        thread.join(scaled(30))
        assert not thread.is_alive()
        assert breaks
        assert seen == list(range(1, len(seen) + 1))
        final = client.get(run)
        assert final.output == {"total": 780}
        assert final.execution == 3
        assert kinds.count(EventKind.RECOVERED) == 2
    done = effects(own_server.database_url, run.run_id)
    assert sorted(set(done)) == sorted(f"count {number}" for number in range(40))
    assert len(done) <= 42


def test_a_cursor_outlives_the_server_and_half_written_text_is_void(own_server: ServerProcess) -> None:
    own_server.start()
    with Rpc(own_server.address) as rpc:
        run_id = rpc.start("talker", {"pieces": 150, "size": 10, "pause_s": 0.01})
        reading = Reading(rpc.watch(run_id))
        eventually(lambda: len(only(reading.events, "output_delta")) >= 4)
        own_server.kill()
        reading.join()
        assert reading.refusal is not None
        assert reading.refusal.code is grpc.StatusCode.UNAVAILABLE
        before = reading.events
        own_server.start()
        rest = eventually(lambda: _whole(rpc, run_id, reading.responses[-1].cursor), 15)
    events = before + rest
    assert sequences(events) == list(range(1, len(events) + 1))
    assert valid_text(before)
    assert valid_text(events) == "".join(f"{number:08d}".ljust(10, ".") for number in range(150))
    (reset,) = only(events, "attempt_reset")
    assert reset.step_id == only(before, "output_delta")[0].step_id
    (recovered,) = only(events, "recovered")
    assert recovered.recovered.from_executor_id == events[0].state_changed.executor_id
    assert recovered.recovered.HasField("gap")
    assert states_in(events) == ["RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]


def _whole(rpc: Rpc, run_id: str, cursor: str) -> list[event_pb.RunEvent]:
    found: list[event_pb.RunEvent] = []
    refusal = refusal_of(lambda: found.extend(rpc.events(run_id, cursor=cursor)))
    assert refusal is None or refusal.code is grpc.StatusCode.UNAVAILABLE, refusal
    return [] if refusal else found


def test_a_server_that_is_asked_to_stop_ends_streams_with_unavailable_and_retry_info(
    own_server: ServerProcess,
) -> None:
    own_server.start()
    with Rpc(own_server.address) as rpc:
        run_id = rpc.start("listener", {})
        rpc.until(run_id, "AWAITING_INPUT")
        reading = Reading(rpc.watch(run_id))
        inbox = Reading(rpc.approvals.WatchApprovals(_inbox_request(), timeout=scaled(30)))
        waiting = Reading(OneAnswer(lambda: rpc.runs.WaitRun(pb.WaitRunRequest(run_id=run_id), timeout=scaled(30))))
        eventually(lambda: reading.responses and inbox.responses, 30)
        began = time.monotonic()
        assert own_server.stop() == 0
        assert time.monotonic() - began < scaled(10)
        for one in (reading, inbox, waiting):
            one.join()
            assert one.refusal is not None
            assert (one.refusal.code.name, one.refusal.reason) == ("UNAVAILABLE", "DRAINING")
            assert one.refusal.retry_delay_s
        known = reading.responses[-1]
        own_server.start()
        again = Reading(rpc.runs.WatchRun(pb.WatchRunRequest(run_id=run_id, cursor=known.cursor), wait_for_ready=True))
        # While the server was away, gRPC has come to wait for some seconds between its attempts to connect.
        eventually(lambda: again.responses, 30)
        eventually(lambda: state_of(rpc.get(run_id)) == "AWAITING_INPUT", 30)
        rpc.signal(run_id, {"a": 1})
        again.join()
        assert sequences(again.events)[0] == known.last_sequence + 1
        assert states_in(again.events)[-1] == "SUCCEEDED"
        assert rpc.output_of(run_id) == [{"a": 1}]


def _inbox_request() -> object:
    from perdure.v1 import approval_service_pb2

    return approval_service_pb2.WatchApprovalsRequest()


class OneAnswer:
    """A unary call as a stream of one."""

    def __init__(self, call: object) -> None:
        self._call = call

    def __iter__(self) -> Iterator[object]:
        yield self._call()  # type: ignore[operator]

    def cancel(self) -> None:
        """Nothing: it ends by itself."""


def test_a_stop_lets_a_running_step_finish_and_the_run_goes_on_elsewhere(own_server: ServerProcess) -> None:
    own_server.start()
    with Rpc(own_server.address) as rpc:
        run_id = rpc.start("counter", {"steps": 10, "delay_s": 0.1})
        eventually(lambda: len(effects(own_server.database_url, run_id)) >= 3)
        assert own_server.stop() == 0
        own_server.start()
        with closing(rpc.channel):
            run = eventually(lambda: state_of(rpc.get(run_id)) == "SUCCEEDED" and rpc.get(run_id), 15)
            events = rpc.events(run_id)
    assert json.loads(run.output_json) == {"total": 45}
    assert sequences(events) == list(range(1, len(events) + 1))
    assert len(effects(own_server.database_url, run_id)) in (10, 11)
