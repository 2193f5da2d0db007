"""What is over a limit gets an error that says which, and leaves a server that goes on as if it had not come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from perdure.v1 import agent_run_service_pb2 as pb

from tests.helpers.rpc import Reading, Refusal, Rpc, kinds_of, new_id, refusal_of, refused, state_of
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import eventually, scaled

MAX_OUTPUT = 20_000
THREADS, WAITING = 8, 3


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[ServerProcess]:
    """A server with small limits."""
    create_effects_table(database_url)
    limits = {
        "PERDURE_MAX_OUTPUT_BYTES": str(MAX_OUTPUT),
        "PERDURE_MAX_THREADS": str(THREADS),
        "PERDURE_MAX_WAITING_CALLS": str(WAITING),
        "PERDURE_DATABASE_POOL_SIZE": "40",
        "PERDURE_MAX_WATCHES": "3",
        "PERDURE_STATEMENT_TIMEOUT": str(scaled(10)),
        "PERDURE_NAMESPACES": "default,slow,other",
    }
    with ServerProcess(database_url, "tests.helpers.agents", "tests.helpers.bulky_agents", **limits) as process:
        yield process


# ---- what agents produce ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["bulky", "blocking-bulky", "plain-bulky"])
def test_a_run_whose_output_is_too_large_fails_and_says_so(rpc: Rpc, server: ServerProcess, agent: str) -> None:
    fits = rpc.start(agent, {"size": MAX_OUTPUT - 2})
    too_large = rpc.start(agent, {"size": MAX_OUTPUT - 1})
    assert len(rpc.output_of(fits)) == MAX_OUTPUT - 2
    run = rpc.end_of(too_large)
    assert (state_of(run), run.failure.type, run.output_json) == ("FAILED", "OutputTooLarge", "")
    assert run.failure.message == (
        f"the output of the run takes {MAX_OUTPUT + 1} bytes, more than {MAX_OUTPUT} (PERDURE_MAX_OUTPUT_BYTES); "
        "keep it elsewhere and return a reference"
    )
    assert run.execution == 1
    assert rpc.events(too_large)[-1].state_changed.failure.type == "OutputTooLarge"


def test_bytes_count_and_not_characters(rpc: Rpc) -> None:
    assert state_of(rpc.end_of(rpc.start("bulky", {"size": MAX_OUTPUT // 4, "text": "🙂"}))) == "FAILED"
    assert len(rpc.output_of(rpc.start("bulky", {"size": MAX_OUTPUT // 4 - 1, "text": "🙂"}))) == MAX_OUTPUT // 4 - 1


def test_a_parent_gets_the_error_of_a_child_whose_output_is_too_large(rpc: Rpc) -> None:
    assert "bytes, more than" in rpc.output_of(rpc.start("bulky-parent", {"size": MAX_OUTPUT}))


def test_a_step_with_too_large_a_result_fails_once_and_is_not_retried(
    rpc: Rpc, server: ServerProcess, database_url: str
) -> None:
    run_id = rpc.start("bulky-stepper", {"size": MAX_OUTPUT})
    run = rpc.end_of(run_id)
    assert (state_of(run), run.failure.type) == ("FAILED", "OutputTooLarge")
    assert "bulky_step" in run.failure.message
    assert effects(database_url, run_id) == ["bulky step"]
    assert kinds_of(rpc.events(run_id)).count("step_failed") == 1
    assert rpc.output_of(rpc.start("bulky-stepper", {"size": MAX_OUTPUT // 2})) == "fits"


@pytest.mark.parametrize("how", ["set_event", "write_stream", "set_event in a step", "write_stream in a step"])
def test_a_published_value_that_is_too_large_fails_the_run(rpc: Rpc, database_url: str, how: str) -> None:
    run_id = rpc.start("bulky-publisher", {"size": MAX_OUTPUT, "how": how})
    run = rpc.end_of(run_id)
    assert (state_of(run), run.failure.type) == ("FAILED", "OutputTooLarge")
    kinds = kinds_of(rpc.events(run_id))
    assert "published" not in kinds
    assert "output_delta" not in kinds
    assert rpc.output_of(rpc.start("bulky-publisher", {"size": MAX_OUTPUT - 2, "how": how})) == "published"


def test_an_approval_with_too_large_a_payload_is_not_asked(rpc: Rpc) -> None:
    run_id = rpc.start("bulky-asker", {"size": MAX_OUTPUT})
    run = rpc.end_of(run_id)
    assert (state_of(run), run.failure.type) == ("FAILED", "OutputTooLarge")
    assert "approval_requested" not in kinds_of(rpc.events(run_id))


@pytest.mark.parametrize("agent", ["no-text", "async-no-text"])
@pytest.mark.parametrize("how", ["return", "raise"])
@pytest.mark.parametrize("text", ["\\ud800", "a\\u0000b"])
def test_what_no_database_takes_as_text_ends_the_run_all_the_same(rpc: Rpc, agent: str, how: str, text: str) -> None:
    run_id = rpc.start(agent, {"how": how, "text": text})
    run = rpc.end_of(run_id)
    if state_of(run) == "SUCCEEDED":
        assert json.loads(run.output_json) == {"text": json.loads(f'"{text}"')}
    else:
        assert how == "raise" or (agent, text) == ("async-no-text", "\\ud800"), run
        assert run.failure.type in ("ValueError", "PydanticSerializationError"), run
    assert rpc.events(run_id)[-1].state_changed.to_state == run.state


def test_a_step_that_was_refused_stays_refused_when_it_is_replayed_even_if_the_limit_is_higher_then(
    rpc: Rpc, server: ServerProcess, database_url: str
) -> None:
    run_id = rpc.start("bulky-stepper", {"size": MAX_OUTPUT, "catch": True})
    rpc.until(run_id, "AWAITING_INPUT")
    server.kill()
    server.start(PERDURE_MAX_OUTPUT_BYTES=str(10 * MAX_OUTPUT))
    rpc.until(run_id, "AWAITING_INPUT", timeout=20)
    rpc.signal(run_id)
    assert rpc.output_of(run_id) == "OutputTooLarge"
    assert effects(database_url, run_id) == ["bulky step"]


# ---- what callers ask for --------------------------------------------------------------------------------------------


def test_as_many_streams_as_the_server_takes_are_open_and_no_more(rpc: Rpc) -> None:
    run_id = rpc.start("listener")
    with ExitStack() as open_streams:
        for _ in range(3):
            reading = Reading(rpc.watch(run_id))
            open_streams.callback(reading.close)
            eventually(lambda reading=reading: reading.responses)
        with refused("RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS") as error:
            rpc.stream(run_id)
        assert (error.metadata, error.retry_delay_s) == ({"limit": "3"}, 5.0)
    eventually(lambda: refusal_of(lambda: next(iter(rpc.watch(run_id)))) is None)
    rpc.cancel(run_id)


def test_calls_that_the_database_keeps_waiting_are_bounded_and_the_rest_is_refused_at_once(
    rpc: Rpc, server: ServerProcess, database_url: str
) -> None:
    most = THREADS + WAITING
    run_id = rpc.start("listener", {"signals": 10 * most})
    rpc.until(run_id, "AWAITING_INPUT")
    sent: list[Future[bool]] = []
    refusals: list[Refusal] = []
    with ThreadPoolExecutor(10 * most) as pool:
        with sql(database_url) as connection:
            connection.execute(
                "SELECT 1 FROM dbos.workflow_status WHERE workflow_uuid = %s FOR UPDATE", (f"default.{run_id}.r",)
            )

            def one_is_refused() -> bool:
                sent.append(pool.submit(rpc.signal, run_id))
                refusals.extend(Refusal.of(f.exception()) for f in sent if f.done())  # type: ignore[arg-type]
                return bool(refusals)

            eventually(one_is_refused)
        # The lock is gone: whatever waited is served.
        served = [future for future in sent if future.exception(scaled(20)) is None]
    assert THREADS <= len(served) < len(sent), "one was refused at once"
    assert {(refusal.code.name, refusal.reason, refusal.retry_delay_s) for refusal in refusals} == {
        ("RESOURCE_EXHAUSTED", "OVERLOADED", 1.0)
    }
    rpc.cancel(run_id)


# ---- starts in a second: a server of its own, as its quota is everybody's -----------------------------------------


@pytest.fixture(scope="module")
def slow_rpc(database_url: str) -> Iterator[Rpc]:
    """The stubs of a server that lets two runs start at once, and then one in some seconds."""
    settings = {"PERDURE_MAX_STARTS_PER_SECOND": "0.2", "PERDURE_NAMESPACES": "default,slow,other"}
    create_effects_table(database_url)
    with ServerProcess(database_url, command="serve", **settings) as process, Rpc(process.address) as stubs:
        yield stubs


def test_a_start_over_the_quota_is_told_how_long_to_wait_and_a_repeat_is_served(slow_rpc: Rpc) -> None:
    first = {"namespace": "slow", "run_id": new_id(), "request_id": new_id()}
    made_by_server = {"namespace": "other", "request_id": new_id()}
    assert slow_rpc.start_call("counter", {"steps": 1}, **first).created
    with refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED") as error:
        slow_rpc.start_call("counter", {"steps": 1}, namespace="slow", run_id=new_id())
    assert error.metadata == {"limit_per_second": "0.2"}
    assert 0 < error.retry_delay_s <= 5
    # A repeat has its run already, by its own id or by the request's.
    for _ in range(3):
        assert slow_rpc.start_call("counter", {"steps": 1}, **first).run.run_id == first["run_id"]
    again = slow_rpc.start_call("counter", {"steps": 1}, **{**first, "request_id": new_id()})
    assert (again.created, again.run.run_id) == (False, first["run_id"])
    made = slow_rpc.start_call("counter", {"steps": 1}, **made_by_server).run.run_id
    assert slow_rpc.start_call("counter", {"steps": 1}, **made_by_server).run.run_id == made
    # Neither repeats nor what only validates have taken or made a start.
    assert slow_rpc.start_call("counter", namespace="slow", run_id=new_id(), validate_only=True).run
    with refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"):
        slow_rpc.start_call("counter", {"steps": 1}, namespace="slow", run_id=new_id())
    # Other namespaces, and everything that is no start, are not concerned.
    assert slow_rpc.start_call("counter", {"steps": 1}, run_id=new_id()).created
    assert slow_rpc.runs.ListRuns(pb.ListRunsRequest(namespace="slow")).runs
