"""Single calls against a real server: what is sent, what is repeated, and when a caller is told to give up."""

from __future__ import annotations

import asyncio
import hashlib
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import grpc
import pytest
from perdure.v1 import agent_catalog_service_pb2 as catalog
from perdure.v1 import agent_run_service_pb2 as runs
from perdure.v1 import approval_service_pb2 as approvals
from perdure_client import (
    ApprovalState,
    AsyncClient,
    Client,
    ClientClosed,
    ConflictPolicy,
    Contention,
    DeadlineExceeded,
    Decision,
    Draining,
    EventKind,
    IncompleteListing,
    InvalidArgument,
    PayloadTooLarge,
    RevisionConflict,
    Run,
    RunFailed,
    RunState,
    ServerUnavailable,
    StepState,
    WaitTimeout,
)
from perdure_client._transport import (
    CANCEL_RUN,
    DECIDE_APPROVAL,
    GET_AGENT,
    GET_APPROVAL,
    GET_RUN,
    LIST_AGENTS,
    LIST_APPROVALS,
    LIST_RUN_EVENTS,
    LIST_RUNS,
    LIST_STEPS,
    READ_ARTIFACT,
    SIGNAL_RUN,
    START_AGENT,
    WAIT_RUN,
)

from tests.unit.client.scripted import Clock, CuttableProxy, Fail, Hang, ScriptedServer, log_event, run_message

SERVER_MADE = re.compile(r"[a-z0-9]+-[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
DRAINING = Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_delay_s=0.5)


def started(request: Any) -> runs.StartAgentResponse:
    return runs.StartAgentResponse(run=run_message(request.run_id, "QUEUED"), created=True)


def got(**fields: Any) -> runs.GetRunResponse:
    return runs.GetRunResponse(run=run_message(**fields))


# ---- start -----------------------------------------------------------------------------------------------------------


async def test_a_start_has_ids_of_its_own(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(START_AGENT, started, started)
    first, second = await client.start("research", {"question": "?"}), await client.start("research")
    requests = server.asked(START_AGENT)
    assert first.run_id == requests[0].run_id != second.run_id
    assert re.fullmatch(r"run-[0-9a-f]{32}", first.run_id)
    assert not SERVER_MADE.fullmatch(first.run_id)
    assert requests[0].request_id
    assert requests[0].request_id != requests[1].request_id
    assert (first.created, first.state) == (True, RunState.QUEUED)
    assert (requests[0].input_json, requests[1].input_json) == ('{"question":"?"}', "{}")


@pytest.mark.parametrize(
    "fail",
    [
        DRAINING,
        Fail(grpc.StatusCode.UNAVAILABLE, message="Connection reset by peer"),
        Fail(grpc.StatusCode.INTERNAL, message="Received RST_STREAM with error code 2"),
        Fail(grpc.StatusCode.CANCELLED, message="CANCELLED"),
        Fail(grpc.StatusCode.ABORTED, "CONTENTION", retry_delay_s=0.2),
        Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_delay_s=1.0),
        Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", retry_delay_s=1.0),
    ],
    ids=lambda fail: fail.reason or fail.message,
)
async def test_repeats_of_a_start_are_the_same_request(
    server: ScriptedServer, client: AsyncClient, slept: list[float], fail: Fail
) -> None:
    server.script(START_AGENT, fail, fail, started)
    run = await client.start("research", {"n": 1}, deadline=timedelta(hours=1))
    first, second, third = server.asked(START_AGENT)
    assert first == second == third
    assert run.run_id == first.run_id
    assert len(slept) == 2
    assert all(delay >= (fail.retry_delay_s or 0) for delay in slept)


async def test_a_start_whose_answer_was_lost_is_repeated_with_the_same_ids(
    server: ScriptedServer, slept: list[float]
) -> None:
    proxy = CuttableProxy(server.port)
    await proxy.start()
    hang = Hang()
    server.script(START_AGENT, hang, started)
    try:
        async with AsyncClient(f"127.0.0.1:{proxy.port}") as client:
            starting = asyncio.ensure_future(client.start("research"))
            await hang.reached.wait()
            proxy.cut()
            run = await starting
        lost, repeated = server.asked(START_AGENT)
        assert lost == repeated
        assert run.run_id == lost.run_id
    finally:
        await proxy.stop()


async def test_everything_about_a_start_is_sent(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(START_AGENT, started, started)
    at = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    big = 2**60 + 1
    await client.start(
        "research",
        {"n": big, "text": "ü"},
        run_id="mine",
        agent_version="2",
        labels={"team": "blue"},
        context_id="case-1",
        delay=1.5,
        deadline=at,
        conflict_policy=ConflictPolicy.FAIL,
        validate_only=True,
    )
    await client.start("research", start_time=at)
    first, second = server.asked(START_AGENT)
    assert (first.namespace, first.agent, first.agent_version, first.run_id) == ("default", "research", "2", "mine")
    assert first.input_json == f'{{"n":{big},"text":"ü"}}'
    assert (dict(first.labels), first.context_id, first.validate_only) == ({"team": "blue"}, "case-1", True)
    assert first.delay.ToTimedelta() == timedelta(seconds=1.5)
    assert first.deadline_time.ToDatetime(tzinfo=UTC) == at
    assert first.conflict_policy == runs.CONFLICT_POLICY_FAIL
    assert second.start_time.ToDatetime(tzinfo=UTC) == at
    assert not second.HasField("deadline_time")
    assert second.conflict_policy == runs.CONFLICT_POLICY_USE_EXISTING


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"input": [1]}, "input"),
        ({"input": {"x": float("nan")}}, "input"),
        ({"input": {"x": object()}}, "input"),
        ({"delay": -1}, "delay"),
        ({"delay": float("inf")}, "delay"),
        ({"delay": 1, "start_time": datetime.now(UTC)}, "delay"),
        ({"start_time": datetime(2030, 1, 1)}, "start_time"),
        ({"deadline": datetime(2030, 1, 1)}, "deadline"),
    ],
)
async def test_what_cannot_be_sent_is_refused_here(
    server: ScriptedServer, client: AsyncClient, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await client.start("research", **arguments)
    assert [violation.field for violation in raised.value.violations] == [field]
    assert server.requests == {}


# ---- repeats and deadlines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (Fail(grpc.StatusCode.ABORTED, "REVISION_CONFLICT"), RevisionConflict),
        (Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE"), PayloadTooLarge),
        (Fail(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), InvalidArgument),
    ],
)
async def test_what_repeating_does_not_help_is_not_repeated(
    server: ScriptedServer, client: AsyncClient, slept: list[float], fail: Fail, error: type[Exception]
) -> None:
    server.script(GET_RUN, fail)
    with pytest.raises(error):
        await client.get("r")
    assert slept == []


@pytest.mark.parametrize(("reason", "error"), [("DRAINING", Draining), ("CONTENTION", Contention)])
async def test_repeats_end_with_the_timeout_and_the_last_error(
    server: ScriptedServer, slept: list[float], reason: str, error: type[Exception]
) -> None:
    code = grpc.StatusCode.UNAVAILABLE if reason == "DRAINING" else grpc.StatusCode.ABORTED
    server.script(GET_RUN, Fail(code, reason, retry_delay_s=2.0))
    async with AsyncClient(server.address, timeout=1.5) as client:
        with pytest.raises(error):
            await client.get("r")
    assert slept == []  # the delay alone is longer than the time there is


async def test_every_call_has_a_deadline(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(GET_RUN, got())
    await client.get("r")
    (deadline_s,) = server.deadlines_s
    assert deadline_s is not None
    assert 25 < deadline_s < 31


async def get(address: str, *, blocking: bool, **options: float) -> None:
    """One call of a new client of either kind."""
    if blocking:
        with Client(address, **options) as blocking_client:
            await asyncio.to_thread(blocking_client.get, "r")
    else:
        async with AsyncClient(address, **options) as client:
            await client.get("r")


@pytest.mark.parametrize("blocking", [False, True])
async def test_a_call_without_an_answer_ends_at_its_timeout(server: ScriptedServer, blocking: bool) -> None:
    server.script(GET_RUN, Hang())
    with pytest.raises(DeadlineExceeded, match=re.escape(server.address)) as raised:
        await get(server.address, blocking=blocking, timeout=0.05)
    assert isinstance(raised.value, TimeoutError)


@pytest.mark.parametrize("blocking", [False, True])
async def test_no_server_is_said_with_the_address_and_the_way_out(slept: list[float], blocking: bool) -> None:
    with pytest.raises(ServerUnavailable) as raised:
        await get("127.0.0.1:1", blocking=blocking, connect_timeout=0.05)
    text = str(raised.value)
    assert text.startswith("no perdure server answers at 127.0.0.1:1 (")
    assert "Connection refused" in text
    assert text.endswith("Start one with `perdure-server dev`, or set PERDURE_ADDRESS.")
    assert isinstance(raised.value.__cause__, grpc.RpcError)


async def test_a_closed_client_says_so(server: ScriptedServer) -> None:
    client, blocking_client = AsyncClient(server.address), Client(server.address)
    await client.close()
    await client.close()
    blocking_client.close()
    blocking_client.close()
    with pytest.raises(ClientClosed):
        await client.get("r")
    with pytest.raises(ClientClosed):
        blocking_client.get("r")
    with pytest.raises(ClientClosed):
        next(blocking_client.watch("r"))


@pytest.mark.parametrize("blocking", [False, True])
async def test_closing_a_client_ends_its_calls_with_an_error_of_ours(server: ScriptedServer, blocking: bool) -> None:
    hang = Hang()
    server.script(GET_RUN, hang)
    if blocking:
        blocking_client = Client(server.address)
        getting: Any = asyncio.ensure_future(asyncio.to_thread(blocking_client.get, "r"))
        await hang.reached.wait()
        blocking_client.close()
    else:
        client = AsyncClient(server.address)
        getting = asyncio.ensure_future(client.get("r"))
        await hang.reached.wait()
        await client.close()
    with pytest.raises(ClientClosed):
        await getting


async def test_a_cancelled_task_is_cancelled_and_nothing_else(server: ScriptedServer, client: AsyncClient) -> None:
    hang = Hang()
    server.script(GET_RUN, hang)
    getting = asyncio.ensure_future(client.get("r"))
    await hang.reached.wait()
    getting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await getting
    await asyncio.wait_for(hang.left.wait(), 5)


async def test_a_client_may_be_made_without_an_event_loop(server: ScriptedServer) -> None:
    made_elsewhere = await asyncio.to_thread(AsyncClient, server.address)
    server.script(GET_RUN, got())
    async with made_elsewhere as client:
        assert (await client.get("r")).run_id == "r"


async def test_a_blocking_client_works_where_an_event_loop_runs(
    server: ScriptedServer, blocking_client: Client
) -> None:
    server.script(GET_RUN, got())

    async def inside() -> str:
        return blocking_client.get("r").run_id

    assert await asyncio.to_thread(asyncio.run, inside()) == "r"


# ---- metadata --------------------------------------------------------------------------------------------------------


async def test_the_token_travels_over_loopback(server: ScriptedServer) -> None:
    server.script(GET_RUN, got(), got())
    async with AsyncClient(server.address, token="secret") as client:
        await client.get("r")
    with Client(server.address) as blocking_client:
        await asyncio.to_thread(blocking_client.get, "r")
    assert server.metadata[0]["authorization"] == "Bearer secret"
    assert "authorization" not in server.metadata[1]
    assert str(server.metadata[0]["user-agent"]).startswith("perdure-python/")


async def test_the_callers_trace_goes_with_the_call(server: ScriptedServer, client: AsyncClient) -> None:
    from opentelemetry import trace

    server.script(GET_RUN, got(), got())
    context = trace.SpanContext(int("a" * 32, 16), int("b" * 16, 16), is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        await client.get("r")
    await client.get("r")
    assert server.metadata[0]["traceparent"] == f"00-{'a' * 32}-{'b' * 16}-01"
    assert "traceparent" not in server.metadata[1]


# ---- wait and run ----------------------------------------------------------------------------------------------------


def waited(state: str = "RUNNING", *, timed_out: bool = False, **fields: Any) -> runs.WaitRunResponse:
    return runs.WaitRunResponse(run=run_message(state=state, **fields), timed_out=timed_out)


async def test_a_wait_asks_again_until_the_run_has_ended(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(WAIT_RUN, waited(timed_out=True), DRAINING, waited("SUCCEEDED", output_json='{"a":1}'))
    run = await client.wait("r")
    assert (run.state, run.output) == (RunState.SUCCEEDED, {"a": 1})
    assert all(deadline_s is not None and 50 < deadline_s < 61 for deadline_s in server.deadlines_s)


@pytest.mark.parametrize("of", ["wait", "run"])
async def test_a_server_that_dies_under_a_long_wait_was_reached_and_is_looked_for_as_long_as_it_takes(
    server: ScriptedServer, slept: list[float], monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    clock = Clock.of("_retry", "_core", "_rpc_errors", patch=monkeypatch)
    proxy, hang = CuttableProxy(server.port), Hang()
    await proxy.start()
    if of == "wait":
        server.script(WAIT_RUN, hang, waited("SUCCEEDED", output_json="1"))
    else:
        run = run_message(state="SUCCEEDED", output_json="1", output_bytes=1)
        server.script(START_AGENT, hang, runs.StartAgentResponse(run=run))
    try:
        async with AsyncClient(f"127.0.0.1:{proxy.port}", connect_timeout=4) as client:
            waiting = asyncio.ensure_future(client.wait("r") if of == "wait" else client.run("research"))
            await hang.reached.wait()
            clock.ahead_s = 4.9
            proxy.cut()
            found = await waiting
        assert found == 1 or (isinstance(found, Run) and found.output == 1)
    finally:
        await proxy.stop()


async def test_what_hangs_up_at_once_is_not_asked_for_longer_than_it_takes_to_connect(
    server: ScriptedServer, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock.of("_retry", "_core", "_rpc_errors", patch=monkeypatch)

    def hang_up(_request: Any) -> Fail:
        clock.ahead_s += 0.9
        return Fail(grpc.StatusCode.UNAVAILABLE, message="Socket closed")

    server.script(WAIT_RUN, *[hang_up] * 50)
    async with AsyncClient(server.address, connect_timeout=4) as client:
        with pytest.raises(ServerUnavailable):
            await client.wait("r")
    assert 3 <= len(server.asked(WAIT_RUN)) <= 5


@pytest.mark.parametrize("answers", [True, False])
async def test_a_wait_ends_with_the_callers_timeout(server: ScriptedServer, client: AsyncClient, answers: bool) -> None:
    server.script(WAIT_RUN, *([waited("SLEEPING", timed_out=True)] if answers else []), Hang())
    with pytest.raises(WaitTimeout, match=r"did not end within 0\.1 s") as raised:
        await client.wait("r", timeout=0.1)
    assert isinstance(raised.value, TimeoutError)
    assert (raised.value.run and raised.value.run.state) == (RunState.SLEEPING if answers else None)


async def test_run_returns_the_output(server: ScriptedServer, client: AsyncClient, blocking_client: Client) -> None:
    server.script(START_AGENT, started, started)
    server.script(WAIT_RUN, waited("SUCCEEDED", output_json="[1]"), waited("SUCCEEDED", output_json="null"))
    assert await client.run("research", {"q": 1}) == [1]
    assert await asyncio.to_thread(blocking_client.run, "research", {"q": 1}) is None


@pytest.mark.parametrize(("patience_s", "asked_s"), [(None, 5), (60, 5), (2, 2), (0, 0)])
async def test_run_of_a_short_run_is_one_call(
    server: ScriptedServer, client: AsyncClient, patience_s: float | None, asked_s: float
) -> None:
    run = run_message(state="SUCCEEDED", output_json='{"a":1}', output_bytes=7)
    server.script(START_AGENT, DRAINING, runs.StartAgentResponse(run=run, created=True))
    assert await client.run("research", timeout=patience_s) == {"a": 1}
    first, second = server.asked(START_AGENT)
    assert first == second
    assert first.wait.ToTimedelta().total_seconds() == asked_s
    assert not server.asked(WAIT_RUN)


async def test_run_reads_an_output_that_did_not_fit_the_answer(server: ScriptedServer, client: AsyncClient) -> None:
    run = run_message("x", state="SUCCEEDED", output_bytes=3)
    server.script(START_AGENT, runs.StartAgentResponse(run=run))
    info = runs.ArtifactInfo(size_bytes=3, sha256=hashlib.sha256(b"123").hexdigest())
    server.script(READ_ARTIFACT, [runs.ReadArtifactResponse(artifact=info), runs.ReadArtifactResponse(data=b"123")])
    assert await client.run("research") == 123


async def test_run_asks_a_server_that_does_not_know_waiting_for_the_output(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.script(START_AGENT, runs.StartAgentResponse(run=run_message("x", state="SUCCEEDED")))
    server.script(WAIT_RUN, waited("SUCCEEDED", output_json="2"))
    assert await client.run("research", run_id="x") == 2


async def test_a_start_by_itself_does_not_wait(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(START_AGENT, started)
    await client.start("research")
    assert not server.asked(START_AGENT)[0].HasField("wait")


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "EXPIRED"])
async def test_run_raises_when_the_run_has_no_output(server: ScriptedServer, client: AsyncClient, state: str) -> None:
    failure = {"type": "ValueError", "message": "no"} if state == "FAILED" else None
    server.script(START_AGENT, started)
    server.script(WAIT_RUN, waited(state, run_id="x", failure=failure, state_reason="because"))
    with pytest.raises(RunFailed) as raised:
        await client.run("research")
    assert raised.value.run.state == state
    assert raised.value.reason == f"RUN_{state}"
    assert str(raised.value) == f"run x ended as {state}: " + ("ValueError: no" if failure else "because")


# ---- the rest --------------------------------------------------------------------------------------------------------


async def test_lists_page_by_themselves(server: ScriptedServer, client: AsyncClient, blocking_client: Client) -> None:
    def page(request: runs.ListRunsRequest) -> runs.ListRunsResponse:
        names = {"": ["a", "b"], "2": [], "3": ["c"]}[request.page_token]
        token = {"": "2", "2": "3", "3": ""}[request.page_token]
        return runs.ListRunsResponse(runs=[run_message(name) for name in names], next_page_token=token)

    server.script(LIST_RUNS, *[page] * 7)
    listed = [
        run.run_id async for run in client.list(states=[RunState.FAILED], agent="x", labels={"k": "v"}, context_id="c")
    ]
    assert listed == ["a", "b", "c"]
    assert [run.run_id for run in await asyncio.to_thread(list, blocking_client.list())] == ["a", "b", "c"]
    assert [run.run_id async for run in client.list(limit=1)] == ["a"]
    first = server.asked(LIST_RUNS)[0]
    assert (list(first.states), first.agent, dict(first.labels), first.context_id) == ([7], "x", {"k": "v"}, "c")
    assert server.asked(LIST_RUNS)[-1].page_size == 1
    assert [run.run_id async for run in client.list(limit=0)] == []


async def test_a_listing_tells_once_which_regions_are_missing(server: ScriptedServer, client: AsyncClient) -> None:
    def page(request: runs.ListRunsRequest) -> runs.ListRunsResponse:
        lost = ["west"] if not request.page_token else ["north", "west"]
        return runs.ListRunsResponse(
            runs=[run_message("a")], next_page_token="" if request.page_token else "2", unreachable=lost
        )

    server.script(LIST_RUNS, *[page] * 4)
    told: list[list[str]] = []
    assert len([run async for run in client.list(on_unreachable=lambda regions: told.append(list(regions)))]) == 2
    assert told == [["west"], ["north"]]
    with pytest.warns(IncompleteListing) as warned:
        assert len([run async for run in client.list()]) == 2
    assert [str(one.message).partition(":")[0] for one in warned] == ["could not ask west", "could not ask north"]


async def test_approvals_tell_which_regions_are_missing(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(LIST_APPROVALS, approvals.ListApprovalsResponse(unreachable=["west"]))
    told: list[str] = []
    assert [one async for one in client.approvals(on_unreachable=told.extend)] == []
    assert told == ["west"]


async def test_a_start_with_a_home_region_leaves_the_id_to_the_server(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.script(START_AGENT, started)
    await client.start("research", home_region="south")
    (sent,) = server.asked(START_AGENT)
    assert (sent.run_id, sent.home_region) == ("", "south")
    assert sent.request_id, "by which a repeat finds the run"
    with pytest.raises(InvalidArgument, match="home_region"):
        await client.start("research", home_region="south", run_id="mine")


async def test_steps_and_events_are_listed(server: ScriptedServer, client: AsyncClient) -> None:
    step = runs.Step(step_id=1, step_name="ask", state=runs.STEP_STATE_INTERRUPTED, attempts=2)
    step.start_time.FromSeconds(10)
    step.end_time.FromMilliseconds(12_500)
    server.script(LIST_STEPS, runs.ListStepsResponse(steps=[step]))
    server.script(LIST_RUN_EVENTS, runs.ListRunEventsResponse(events=[log_event(1), log_event(2)]))
    (only,) = [step async for step in client.steps("r")]
    assert (only.step_name, only.state, only.duration) == ("ask", StepState.INTERRUPTED, timedelta(seconds=2.5))
    events = [event async for event in client.events("r", kinds=[EventKind.LOG])]
    assert [(event.sequence, event.kind) for event in events] == [(1, EventKind.LOG), (2, EventKind.LOG)]
    assert list(server.asked(LIST_RUN_EVENTS)[0].kinds) == [15]


async def test_signal_and_cancel(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(SIGNAL_RUN, DRAINING, runs.SignalRunResponse(created=True), runs.SignalRunResponse())
    server.script(CANCEL_RUN, runs.CancelRunResponse(run=run_message(state="CANCELLED")))
    assert await client.signal("r", "go", [1, "x"])
    assert not await client.signal("r", "go")
    first, repeated, second = server.asked(SIGNAL_RUN)
    assert first == repeated
    assert first.request_id != second.request_id
    assert (first.payload_json, second.payload_json) == ('[1,"x"]', "{}")
    assert (await client.cancel("r", reason="enough")).state is RunState.CANCELLED
    assert server.asked(CANCEL_RUN)[0].reason == "enough"


async def test_an_approval_is_decided_at_the_revision_that_was_seen(
    server: ScriptedServer, client: AsyncClient
) -> None:
    pending = {"approval_id": "r/3", "run_id": "r", "title": "Publish?", "payload_json": "[1]", "revision": 4}
    answer = lambda _: approvals.DecideApprovalResponse(approval=dict(pending, state="APPROVAL_STATE_APPROVED"))  # noqa: E731
    server.script(GET_APPROVAL, approvals.GetApprovalResponse(approval=pending))  # type: ignore[arg-type]
    server.script(LIST_APPROVALS, approvals.ListApprovalsResponse(approvals=[pending]))  # type: ignore[list-item]
    server.script(DECIDE_APPROVAL, answer, answer, answer)
    approval = await client.get_approval("r/3")
    assert approval.payload == [1]
    assert (await client.approve(approval, comment="ok", answer={"n": 2})).state is ApprovalState.APPROVED
    await client.reject("r/3")
    await client.decide("r/3", Decision.APPROVE, expected_revision=9)
    first, second, third = server.asked(DECIDE_APPROVAL)
    assert (first.expected_revision, first.decision, first.comment) == (4, approvals.DECISION_APPROVE, "ok")
    assert dict(first.answer.struct_value) == {"n": 2}
    assert (second.expected_revision, second.decision) == (0, approvals.DECISION_REJECT)
    assert not second.HasField("answer")
    assert third.expected_revision == 9
    listed = [item.approval_id async for item in client.approvals(run="r", states=[ApprovalState.PENDING])]
    assert listed == ["r/3"]
    assert server.asked(LIST_APPROVALS)[0].run_id == "r"


async def test_an_answer_never_loses_digits_silently(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgument, match="send it as a string"):
        await client.approve("r/1", answer={"n": [2**53 + 1]})


async def test_agents(server: ScriptedServer, client: AsyncClient) -> None:
    agent = catalog.Agent(agent="research", agent_version="1", input_schema_json='{"type":"object"}', current=True)
    server.script(LIST_AGENTS, catalog.ListAgentsResponse(agents=[agent]))
    server.script(GET_AGENT, catalog.GetAgentResponse(agent=agent))
    (listed,) = [info async for info in client.agents()]
    assert listed == await client.get_agent("research", agent_version="1")
    assert (listed.input_schema, listed.output_schema, listed.current) == ({"type": "object"}, None, True)


async def test_runs_can_be_given_as_themselves(server: ScriptedServer, client: AsyncClient) -> None:
    server.script(GET_RUN, got(), got())
    run = await client.get("r")
    await client.get(run, full=False)
    assert [request.run_id for request in server.asked(GET_RUN)] == ["r", "r"]
    assert [request.view for request in server.asked(GET_RUN)] == [2, 1]
    with pytest.raises(InvalidArgument, match="run_id: is empty"):
        await client.get("")


async def _first(updates: Any) -> Any:
    return await anext(aiter(updates))


WEST = timezone(timedelta(hours=-9))
WRONG: dict[str, Any] = {
    "run_id": lambda client: client.get("\ud800"),
    "run_id of a number": lambda client: client.get(5),
    "input_json": lambda client: client.start("a", {"text": "\ud800"}),
    "labels": lambda client: client.start("a", labels={"team": 5}),
    "labels of a list": lambda client: client.start("a", labels=["team"]),
    "start_time": lambda client: client.start("a", start_time="2030"),
    "start_time outside of UTC": lambda client: client.start("a", start_time=datetime.max.replace(tzinfo=WEST)),
    "deadline": lambda client: client.start("a", deadline=timedelta.max),
    "delay": lambda client: client.start("a", delay="soon"),
    "priority": lambda client: client.start("a", priority="high"),
    "from_step_id": lambda client: client.fork("a", from_step=2**40),
    "input_json of a fork": lambda client: client.fork("a", input={"text": "\ud800"}),
    "conflict_policy": lambda client: client.start("a", conflict_policy="NOPE"),
    "decision": lambda client: client.decide("a", "NOPE"),
    "kinds": lambda client: _first(client.watch("a", kinds=["nope"])),
    "cursor": lambda client: _first(client.watch("a", cursor="\ud800")),
    "states": lambda client: client.delete_runs(states=["NOPE"]),
    "reason": lambda client: client.cancel("a", reason="\ud800"),
    "payload_json": lambda client: client.signal("a", "go", "\ud800"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_cannot_be_sent_is_refused_here_and_its_field_named(server: ScriptedServer, what: str) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(InvalidArgument, match=f"^{what.partition(' ')[0]}: ") as raised:
            await WRONG[what](client)
    assert "\ud800" not in raised.value.message, "it may be a payload"


async def test_a_state_given_as_its_name_alone_is_that_state(server: ScriptedServer) -> None:
    server.script(LIST_RUNS, runs.ListRunsResponse())
    async with AsyncClient(server.address) as client:
        assert [run async for run in client.list(states="SUCCEEDED")] == []  # type: ignore[arg-type]
    (asked,) = server.asked(LIST_RUNS)
    assert len(asked.states) == 1
