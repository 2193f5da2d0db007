"""The command `perdure` against a scripted server: output, exit codes, and errors in one line."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from perdure.v1 import agent_catalog_service_pb2 as catalog
from perdure.v1 import agent_run_service_pb2 as runs
from perdure.v1 import approval_service_pb2 as approvals
from perdure.v1 import operator_service_pb2 as operators
from perdure.v1 import run_event_pb2
from perdure_client import Client, RunState
from perdure_client._transport import (
    CANCEL_RUN,
    DECIDE_APPROVAL,
    EVACUATE_CELL,
    GET_AGENT,
    GET_APPROVAL,
    GET_RUN,
    LIST_AGENTS,
    LIST_APPROVALS,
    LIST_CELLS,
    LIST_EXECUTORS,
    LIST_QUEUES,
    LIST_RUN_EVENTS,
    LIST_RUNS,
    LIST_STEPS,
    LIST_STRANDED_RUNS,
    RETURN_CELL,
    SIGNAL_RUN,
    START_AGENT,
    WAIT_RUN,
    WATCH_APPROVALS,
    WATCH_RUN,
)
from perdure_client.cli import _parse
from perdure_client.cli._app import app, describe
from perdure_client.cli._follow import Detached, Style, follow
from perdure_client.cli._output import write_rows
from rich.console import Console
from typer.testing import CliRunner

from tests.unit.client.scripted import Fail, Hang, ScriptedServer, batch, end_event, log_event, run_message

Invoke = Callable[..., Awaitable[Any]]
COMMANDS = [
    "start",
    "watch",
    "get",
    "list",
    "steps",
    "events",
    "trace",
    "signal",
    "cancel",
    "fork",
    "delete",
    "approvals",
    "approve",
    "reject",
    "agents",
    "executors",
    "queues",
    "stranded",
]


def started(request: Any) -> runs.StartAgentResponse:
    return runs.StartAgentResponse(run=run_message(request.run_id, "QUEUED", agent_version="1"), created=True)


def waited(state: str, **fields: Any) -> runs.WaitRunResponse:
    return runs.WaitRunResponse(run=run_message(state=state, **fields))


def got(state: str = "SUCCEEDED", **fields: Any) -> runs.GetRunResponse:
    return runs.GetRunResponse(run=run_message(state=state, **fields))


def objects(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# ---- start -----------------------------------------------------------------------------------------------------------


async def test_start_sends_all_options_and_prints_the_run(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(START_AGENT, started)
    result = await perdure(
        "start", "research", "-i", '{"q": 1}', "--run-id", "mine", "--version", "2", "-l", "a=b", "-l", "c=d=e",
        "--context", "case", "--delay", "1m30s", "--deadline", "2h", "--fail-if-exists",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (run,) = objects(result)
    assert (run["run_id"], run["state"], run["created"]) == ("mine", "QUEUED", True)
    (request,) = server.asked(START_AGENT)
    assert (request.input_json, request.agent_version, dict(request.labels)) == ('{"q":1}', "2", {"a": "b", "c": "d=e"})
    assert (request.context_id, request.delay.seconds) == ("case", 90)
    assert request.conflict_policy == runs.CONFLICT_POLICY_FAIL
    left = request.deadline_time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert timedelta(minutes=119) < left <= timedelta(hours=2)


async def test_input_comes_from_a_file_or_standard_input(
    server: ScriptedServer, perdure: Invoke, tmp_path: Path
) -> None:
    (tmp_path / "in.json").write_text('{"from": "file"}', encoding="utf-8")
    server.script(START_AGENT, started, started)
    assert (await perdure("start", "research", "-i", f"@{tmp_path / 'in.json'}")).exit_code == 0
    assert (await perdure("start", "research", "-i", "-", stdin='{"from": "stdin"}')).exit_code == 0
    assert [request.input_json for request in server.asked(START_AGENT)] == ['{"from":"file"}', '{"from":"stdin"}']


@pytest.mark.parametrize(("state", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELLED", 1), ("EXPIRED", 1)])
async def test_wait_ends_with_the_run_and_its_exit_code(
    server: ScriptedServer, perdure: Invoke, state: str, code: int
) -> None:
    server.script(START_AGENT, started)
    server.script(WAIT_RUN, waited(state, output_json="[1]" if state == "SUCCEEDED" else ""))
    result = await perdure("start", "research", "--wait")
    assert result.exit_code == code
    (run,) = objects(result)
    assert (run["state"], run["output"]) == (state, [1] if state == "SUCCEEDED" else None)


async def test_start_can_watch_and_prints_events_as_json_lines(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(START_AGENT, started)
    server.script(WATCH_RUN, [batch([1, 2]), batch([3], end=True)])
    result = await perdure("start", "research", "--watch", "--run-id", "r")
    assert result.exit_code == 0
    assert [(event["sequence"], event["kind"]) for event in objects(result)] == [
        (1, "log"), (2, "log"), (3, "state_changed"),
    ]  # fmt: skip


async def test_for_people_start_says_how_to_follow(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(START_AGENT, started, started)
    result = await perdure("start", "research", "--run-id", "x", "-o", "lines")
    assert result.stdout.splitlines() == [
        "research@1  x  QUEUED",
        f"Follow it: perdure --address {server.address} watch x",
    ]
    result = await perdure("start", "research", "--validate-only", "-o", "lines")
    assert result.stdout == "Valid. Nothing was started.\n"


# ---- watch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "code"), [("SUCCEEDED", 0), ("FAILED", 1)])
async def test_watch_exits_as_the_run_ended(server: ScriptedServer, perdure: Invoke, state: str, code: int) -> None:
    last = runs.WatchRunResponse(events=[end_event(5, state)], end_of_run=True)
    server.script(WATCH_RUN, [last])
    result = await perdure("watch", "r", "--after", "4")
    assert result.exit_code == code
    assert server.asked(WATCH_RUN)[0].after_sequence == 4


async def test_watching_a_finished_run_from_its_end_knows_its_state(server: ScriptedServer, perdure: Invoke) -> None:
    over = runs.WatchRunResponse(snapshot=run_message(state="SUCCEEDED", last_sequence=5), end_of_run=True)
    server.script(WATCH_RUN, [over])
    result = await perdure("watch", "r", "--after", "5")
    assert (result.exit_code, result.stdout) == (0, "")


async def test_watch_reconnects_and_says_so_on_standard_error(server: ScriptedServer, perdure: Invoke) -> None:
    drain = Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING", "the server is stopping", retry_delay_s=0.5)
    server.script(WATCH_RUN, [batch([1]), drain], [drain], [batch([2], end=True)])
    result = await perdure("watch", "r")
    assert [event["sequence"] for event in objects(result)] == [1, 2]
    assert result.stderr == "connection lost, reconnecting: the server is stopping\n"


async def test_ctrl_c_leaves_the_run_alone_and_says_how_to_return(
    server: ScriptedServer, perdure: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(value: dict[str, Any]) -> None:
        if value["sequence"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("perdure_client.cli._follow.write_json_line", interrupted)
    server.script(WATCH_RUN, [batch([1, 2, 3]), Hang()])
    result = await perdure("watch", "r")
    assert result.exit_code == 130
    command = f"perdure --address {server.address} watch r --after 2"
    assert result.stderr == f"The run goes on. Return to it with: {command}\n"
    assert server.asked(CANCEL_RUN) == []


async def test_plain_lines_end_with_the_output_and_the_trace(server: ScriptedServer, perdure: Invoke) -> None:
    long = "x" * 300
    server.script(WATCH_RUN, [batch([1, 2], end=True)])
    server.script(GET_RUN, got(output_json=f'{{"a": "{long}"}}', trace_id="4bf9"))
    result = await perdure("watch", "r", "-o", "lines")
    assert result.exit_code == 0
    assert [re.sub(r"^\S+  ", "", line) for line in result.stdout.splitlines()] == [
        "1", "SUCCEEDED", "{", f'  "a": "{long}"', "}", "trace 4bf9",
    ]  # fmt: skip


def truncated(earliest: int, run_id: str = "r") -> Fail:
    metadata = {"earliest_sequence": str(earliest), "run_id": run_id}
    return Fail(grpc.StatusCode.OUT_OF_RANGE, "EVENTS_TRUNCATED", "gone", metadata=metadata)


async def test_a_log_without_its_beginning_is_shown_from_where_it_begins_now(
    server: ScriptedServer, perdure: Invoke
) -> None:
    server.script(WATCH_RUN, [truncated(3)], [batch([3], end=True)])
    result = await perdure("watch", "r")
    assert result.exit_code == 0
    assert [event["sequence"] for event in objects(result)] == [3]
    assert server.asked(WATCH_RUN)[1].after_sequence == 2
    assert result.stderr == "the events before 3 are no longer kept; here is what there is\n"


@pytest.mark.parametrize("how", [("--after", "1"), ("--children",)], ids=" ".join)
async def test_what_was_asked_for_and_is_no_longer_kept_is_an_error_with_the_ways_out(
    server: ScriptedServer, perdure: Invoke, how: tuple[str, ...]
) -> None:
    server.script(WATCH_RUN, [truncated(3)])
    result = await perdure("watch", "r", *how)
    assert result.exit_code != 0
    assert (result.stdout, len(server.asked(WATCH_RUN))) == ("", 1)
    assert "`perdure watch RUN` what is left of its events" in result.stderr


def child_started(sequence: int, child: str, run_id: str = "r") -> run_event_pb2.RunEvent:
    started = run_event_pb2.ChildStarted(child_run_id=child)
    return run_event_pb2.RunEvent(
        sequence=sequence, run_id=run_id, step_id=sequence, step_name="reader@1", child_started=started
    )


def with_children(*responses: tuple[str, list[run_event_pb2.RunEvent]]) -> list[Any]:
    """A script entry: one response for each (cursor, events)."""
    return [runs.WatchRunResponse(cursor=cursor, events=events) for cursor, events in responses]


async def test_lines_of_children_say_whose_they_are(server: ScriptedServer, perdure: Invoke) -> None:
    said = run_event_pb2.RunEvent(
        sequence=2, run_id="r.1", output_delta=run_event_pb2.OutputDelta(stream="s", text="a word\n")
    )
    events = [
        ("a", [child_started(1, "r.1")]), ("b", [log_event(1, "r.1"), said, end_event(3, run_id="r.1")]),
        ("c", [end_event(2)]),
    ]  # fmt: skip
    server.script(WATCH_RUN, [*with_children(*events), batch([], end=True)])
    server.script(GET_RUN, got())
    result = await perdure("watch", "r", "--children", "-o", "lines")
    assert result.exit_code == 0, result.output
    assert [re.sub(r"^(--:--:--| {8})  ", "", line) for line in result.stdout.splitlines()] == [
        "r  reader@1 started the run r.1", "r.1  1", "r.1  | a word", "r.1  SUCCEEDED", "r  SUCCEEDED",
    ]  # fmt: skip
    (request,) = server.asked(WATCH_RUN)
    assert request.include_children
    assert request.WhichOneof("position") is None


async def test_events_of_children_have_their_run_and_only_the_runs_own_end_is_the_exit_code(
    server: ScriptedServer, perdure: Invoke
) -> None:
    events = [("a", [child_started(1, "r.1")]), ("b", [end_event(2)]), ("c", [end_event(1, "FAILED", "r.1")])]
    server.script(START_AGENT, lambda request: runs.StartAgentResponse(run=run_message("r"), created=True))
    server.script(WATCH_RUN, [*with_children(*events), batch([], end=True)])
    result = await perdure("start", "research", "--watch", "--children")
    assert result.exit_code == 0
    assert [(event["run_id"], event["sequence"]) for event in objects(result)] == [("r", 1), ("r", 2), ("r.1", 1)]


async def test_pipes_get_the_run_alone_unless_asked_for_more(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(WATCH_RUN, [batch([1], end=True)])
    assert (await perdure("watch", "r")).exit_code == 0
    assert not server.asked(WATCH_RUN)[0].include_children


async def live(server: ScriptedServer, after: int = 0, children: bool | None = None) -> tuple[RunState, str]:
    """Follows `r` as on a terminal."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=30, highlight=False)
    with Client(server.address) as client:
        state = await asyncio.to_thread(
            follow, client, "r", after=after, style=Style.LIVE, console=screen, children=children
        )
    assert isinstance(screen.file, io.StringIO)
    return state, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())


async def test_the_live_view_ends_with_the_whole_story(server: ScriptedServer, slept: list[float]) -> None:
    step = run_event_pb2.RunEvent(
        sequence=1, run_id="r", step_id=1, step_name="retrieve", step_succeeded=run_event_pb2.StepSucceeded()
    )
    first = runs.WatchRunResponse(events=[step], snapshot=run_message())
    drain = Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING")
    server.script(WATCH_RUN, [first, drain], [batch([2], end=True)])
    server.script(GET_RUN, got(output_json='"the answer"', trace_id="4bf9", agent_version="3"))
    state, text = await live(server)
    assert state is RunState.SUCCEEDED
    for part in ("research@3  r  SUCCEEDED", "retrieve", "the answer", "trace 4bf9"):
        assert part in text


async def test_the_live_view_knows_questions_from_before_it_began(server: ScriptedServer, slept: list[float]) -> None:
    first = runs.WatchRunResponse(snapshot=run_message(state="AWAITING_INPUT", pending_approvals=1, last_sequence=4))
    pending = {"approval_id": "r/3", "title": "Publish?", "state": "APPROVAL_STATE_PENDING"}
    server.script(WATCH_RUN, [first, batch([5], end=True)])
    server.script(LIST_APPROVALS, approvals.ListApprovalsResponse(approvals=[pending]))  # type: ignore[list-item]
    server.script(GET_RUN, got())
    await live(server, after=4)
    assert server.asked(LIST_APPROVALS)[0].run_id == "r"


@pytest.mark.parametrize(("children", "streams"), [(None, 1), (True, 1), (False, 1)])
async def test_the_live_view_shows_children_and_ends_with_the_run_unless_they_were_asked_for(
    server: ScriptedServer, slept: list[float], children: bool | None, streams: int
) -> None:
    first = [child_started(1, "r.1"), child_started(2, "r.2")]
    failed = end_event(1, "FAILED", "r.2")
    failed.state_changed.failure.type = "ValueError"
    rest = [("a", first), ("b", [failed]), ("c", [end_event(3)])]
    if children is False:
        rest = [("a", first), ("c", [end_event(3)])]
    last = [Hang()] if children is None else [*with_children(("d", [end_event(1, run_id="r.1")])), batch([], end=True)]
    if children is False:
        last = [batch([], end=True)]
    server.script(WATCH_RUN, [*with_children(*rest), *last])
    server.script(GET_RUN, got())
    state, text = await live(server, children=children)
    assert state is RunState.SUCCEEDED
    assert server.asked(WATCH_RUN)[0].include_children is (children is not False)
    assert ("2 child runs: 1 FAILED" in text) is (children is not False)
    assert ("1 SUCCEEDED" in text) is (children is True)
    assert ("ValueError" in text) is (children is not False)


async def test_the_live_view_goes_on_without_children_when_there_are_too_many(
    server: ScriptedServer, slept: list[float]
) -> None:
    too_many = Fail(grpc.StatusCode.FAILED_PRECONDITION, "VIEW_TOO_LARGE", "1001 children are active")
    server.script(WATCH_RUN, [*with_children(("a", [child_started(1, "r.1")])), too_many], [batch([2], end=True)])
    server.script(GET_RUN, got())
    state, text = await live(server)
    assert state is RunState.SUCCEEDED
    again = server.asked(WATCH_RUN)[1]
    assert (again.include_children, again.after_sequence) == (False, 1)
    assert "1001 children are active; here it goes on without them" in text


async def test_the_live_view_can_be_left(
    server: ScriptedServer, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure_client._run_view.RunView.apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    server.script(WATCH_RUN, [batch([8]), Hang()])
    with pytest.raises(Detached) as detached:
        await live(server, after=7)
    assert detached.value.last_sequence == 7


# ---- the other commands ----------------------------------------------------------------------------------------------


async def test_get_as_json_and_for_people(server: ScriptedServer, perdure: Invoke) -> None:
    failed = {"failure": {"type": "E", "message": "m"}, "usage": {"input_tokens": 1_500, "output_tokens": 20}}
    server.script(GET_RUN, *[got("FAILED", input_json='{"q": 1}', **failed)] * 2)
    (run,) = objects(await perdure("get", "r"))
    assert (run["input"], run["failure"]["type"]) == ({"q": 1}, "E")
    assert run["usage"] == {"input_tokens": 1_500, "output_tokens": 20}
    result = await perdure("get", "r", "-o", "table")
    assert (result.exit_code, '{"q": 1}' in result.stdout, "E: m" in result.stdout) == (0, True, True)
    assert "1,500 + 20 tokens" in result.stdout


async def test_list_filters_and_limits(server: ScriptedServer, perdure: Invoke) -> None:
    page = runs.ListRunsResponse(runs=[run_message("a"), run_message("b"), run_message("c")])
    server.script(LIST_RUNS, page, page, runs.ListRunsResponse())
    arguments = ("list", "--state", "running", "-a", "research", "-l", "a=b", "--context", "c", "--limit", "2")
    assert [run["run_id"] for run in objects(await perdure(*arguments))] == ["a", "b"]
    (request,) = server.asked(LIST_RUNS)
    assert (list(request.states), request.agent, dict(request.labels), request.context_id) == (
        [3], "research", {"a": "b"}, "c",
    )  # fmt: skip
    result = await perdure("list", "-n", "2", "-o", "table")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["RUN", "a", "b"]
    assert "There are more" in result.stderr
    result = await perdure("list", "-o", "table")
    assert (result.stdout, result.stderr) == ("", "No runs. Start one: perdure start AGENT\n")


def test_a_narrow_table_keeps_its_ids_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    screen = Console(file=file, width=50, force_terminal=True, color_system=None)
    monkeypatch.setattr("perdure_client.cli._output.console", lambda: screen)
    rows = [(f"run-{'0' * 32}", "research@1", "SUCCEEDED", "what it does is long")]
    assert write_rows(("RUN", "AGENT", "STATE", "WHAT"), rows) == 1
    lines = file.getvalue().splitlines()
    assert lines[1].startswith(f"run-{'0' * 32} ")
    assert all(len(line) <= 50 for line in lines)


async def test_steps_and_events(server: ScriptedServer, perdure: Invoke) -> None:
    step = runs.Step(step_id=1, step_name="ask", state=runs.STEP_STATE_FAILED, error={"type": "E"})  # type: ignore[arg-type]
    server.script(LIST_STEPS, *[runs.ListStepsResponse(steps=[step])] * 2)
    server.script(LIST_RUN_EVENTS, *[runs.ListRunEventsResponse(events=[log_event(1), log_event(2)])] * 2)
    assert [step["state"] for step in objects(await perdure("steps", "r"))] == ["FAILED"]
    assert "ask" in (await perdure("steps", "r", "-o", "table")).stdout
    events = objects(await perdure("events", "r", "--kind", "log", "--after", "1"))
    assert [event["sequence"] for event in events] == [2]
    assert list(server.asked(LIST_RUN_EVENTS)[0].kinds) == [15]
    assert len((await perdure("events", "r", "-o", "table")).stdout.splitlines()) == 2


async def test_events_of_a_log_without_its_beginning_say_so(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(LIST_RUN_EVENTS, *[runs.ListRunEventsResponse(events=[log_event(5)])] * 3)
    result = await perdure("events", "r")
    assert [event["sequence"] for event in objects(result)] == [5]
    assert result.stderr == "the events before 5 are no longer kept\n"
    for choice in (("--kind", "log"), ("--after", "4")):
        assert (await perdure("events", "r", *choice)).stderr == ""


async def test_signal_and_cancel(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(SIGNAL_RUN, runs.SignalRunResponse(created=True))
    server.script(CANCEL_RUN, runs.CancelRunResponse(run=run_message(state="CANCELLED")))
    assert (await perdure("signal", "r", "go", "-p", "[1]")).exit_code == 0
    assert server.asked(SIGNAL_RUN)[0].payload_json == "[1]"
    result = await perdure("cancel", "r", "--reason", "enough", "-o", "table")
    assert result.stdout == "r  CANCELLED\n"
    assert server.asked(CANCEL_RUN)[0].reason == "enough"


PENDING: dict[str, Any] = {
    "approval_id": "r/3",
    "run_id": "r",
    "title": "Publish?",
    "payload_json": '{"draft": "x"}',
    "state": "APPROVAL_STATE_PENDING",
}


async def test_approvals_are_listed_shown_and_decided(server: ScriptedServer, perdure: Invoke) -> None:
    decided = dict(PENDING, state="APPROVAL_STATE_APPROVED", decided_by="me")
    server.script(LIST_APPROVALS, *[approvals.ListApprovalsResponse(approvals=[PENDING])] * 2)  # type: ignore[list-item]
    server.script(GET_APPROVAL, approvals.GetApprovalResponse(approval=PENDING))  # type: ignore[arg-type]
    server.script(DECIDE_APPROVAL, *[approvals.DecideApprovalResponse(approval=decided)] * 2)  # type: ignore[arg-type]
    assert [item["approval_id"] for item in objects(await perdure("approvals", "--run", "r"))] == ["r/3"]
    assert server.asked(LIST_APPROVALS)[0].run_id == "r"
    assert "Publish?" in (await perdure("approvals", "-o", "table")).stdout
    shown = (await perdure("approvals", "r/3", "-o", "table")).stdout
    assert '"draft": "x"' in shown
    assert "approve r/3" in shown
    result = await perdure("approve", "r/3", "-c", "ok", "--answer", '{"n": 1}', "--revision", "4", "-o", "table")
    assert result.stdout == "r/3  APPROVED by me\n"
    await perdure("reject", "r/3")
    yes, no = server.asked(DECIDE_APPROVAL)
    assert (yes.decision, yes.comment, yes.expected_revision) == (approvals.DECISION_APPROVE, "ok", 4)
    assert dict(yes.answer.struct_value) == {"n": 1}
    assert no.decision == approvals.DECISION_REJECT


async def test_the_inbox_can_be_watched(
    server: ScriptedServer, perdure: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[Any] = []

    def print_one(value: Any, _form: object) -> None:
        printed.append(value)
        raise KeyboardInterrupt

    monkeypatch.setattr("perdure_client.cli._approvals.write_item", print_one)
    response = approvals.WatchApprovalsResponse(approvals=[PENDING])  # type: ignore[list-item]
    server.script(WATCH_APPROVALS, [response, Hang()])
    assert (await perdure("approvals", "--watch")).exit_code == 130
    assert [item.approval_id for item in printed] == ["r/3"]


async def test_agents_are_listed_and_one_is_shown_with_how_to_start_it(server: ScriptedServer, perdure: Invoke) -> None:
    schema = {"properties": {"question": {"type": "string"}, "limit": {"default": 6}}, "required": ["question"]}
    agent = catalog.Agent(agent="research", agent_version="1", input_schema_json=json.dumps(schema), current=True)
    agent.max_steps, agent.max_tokens = 10, 200_000
    server.script(LIST_AGENTS, *[catalog.ListAgentsResponse(agents=[agent])] * 2)
    server.script(GET_AGENT, *[catalog.GetAgentResponse(agent=agent)] * 2)
    assert [item["agent"] for item in objects(await perdure("agents"))] == ["research"]
    listed = (await perdure("agents", "-o", "table")).stdout
    assert "research" in listed
    assert "10 steps, 200,000 tokens" in listed
    assert objects(await perdure("agents", "research"))[0]["input_schema"] == schema
    shown = (await perdure("agents", "research", "-o", "table")).stdout
    assert "a run may use 10 steps, 200,000 tokens" in shown
    assert f"""perdure --address {server.address} start research -i '{{"question": "…"}}' --watch""" in shown


# ---- errors and help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail", "code", "line"),
    [
        (
            Fail(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND", "no run x"),
            3,
            "perdure: RUN_NOT_FOUND: no run x. `perdure list` shows the runs of the namespace.",
        ),
        (
            Fail(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "run_id: bad", violations=(("run_id", "bad"),)),
            2,
            "perdure: INVALID_FIELD: run_id: bad.",
        ),
        (
            Fail(grpc.StatusCode.INTERNAL, "INTERNAL", "internal error", {"error_id": "e1"}),
            3,
            "perdure: INTERNAL: internal error. Tell the server's operator the error id e1.",
        ),
    ],
)
async def test_an_expected_error_is_one_line_with_the_way_out(
    server: ScriptedServer, perdure: Invoke, fail: Fail, code: int, line: str
) -> None:
    server.script(GET_RUN, fail)
    result = await perdure("get", "x")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"{line}\n")


async def test_an_unreachable_server_is_one_line(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure_client.cli._context.CONNECT_TIMEOUT_S", 0.05)
    for command in (["get", "x"], ["watch", "x"]):
        result = CliRunner().invoke(app, ["--address", "127.0.0.1:1", *command])
        assert result.exit_code == 3
        assert result.stderr == (
            "perdure: SERVER_UNAVAILABLE: no perdure server answers at 127.0.0.1:1 (Connection refused). "
            "Start one with `perdure-server dev`, or set PERDURE_ADDRESS.\n"
        )


def test_more_violations_than_the_message_names_are_all_told() -> None:
    from perdure_client import InvalidArgument, Violation

    error = InvalidArgument("a: bad", violations=[Violation("a", "bad"), Violation("b", "worse")])
    assert describe(error) == "INVALID_FIELD: a: bad; b: worse."


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["start", "x", "--delay", "soon"], "is no duration"),
        (["start", "x", "--deadline", "soon"], "neither a duration"),
        (["start", "x", "--at", "soon"], "is no time"),
        (["start", "x", "-i", "[1]"], "must be a JSON object"),
        (["start", "x", "-i", "{"], "is not JSON"),
        (["start", "x", "-i", "@/no/such/file"], "cannot read"),
        (["start", "x", "-l", "nolabel"], "write key=value"),
        (["start", "x", "--watch", "--wait"], "choose one"),
        (["start", "x", "--children"], "go with --watch"),
        (["watch", "r", "--children", "--after", "3"], "of a single run"),
        (["start"], "Missing argument"),
        (["nonsense"], "No such command"),
        (["--ca-file", "/no/such/file", "list"], "cannot read"),
        (["--ca-file", "/dev/null", "--no-tls", "list"], "TLS is off"),
        (["list", "--state", "UNKNOWN"], "cannot be asked for"),
        (["start", "x", "--delay", "99999999999d"], "longer than there are times"),
        (["start", "x", "--deadline", "9999999d"], "later than there are times"),
        (["list", "--since", "9999-12-31T23:59-14:00"], "neither a duration"),
        (["start", "x", "-i", '{"a": "\\ud800"}'], "input_json: has half of a surrogate pair"),
        (["start", "x", "-i", "[" * 100_000], "nested too deeply"),
        (["start", "x", "--run-id", "\udcff"], "run_id: has half of a surrogate pair"),
        (["get", "\udcff"], "run_id: has half of a surrogate pair"),
        (["watch", "r", "--after", "99999999999999999999999"], "after_sequence: is out of range"),
        (["fork", "r", "--from-step", "99999999999999"], "from_step_id: is out of range"),
        (["signal", "r", "go", "-p", "null"], "must not be null"),
        (["signal", "r", "go", "-p", '"\\ud800"'], "payload_json: has half of a surrogate pair"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["--address", "127.0.0.1:1", *arguments])
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())


def test_help_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    main = CliRunner().invoke(app, ["--help"]).stdout
    assert "Exit codes:" in main
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", main, re.MULTILINE), command
        text = CliRunner().invoke(app, [command, "--help"]).stdout
        assert re.search(rf"^  Examples?:\n(    perdure {command}.*\n)+", text, re.MULTILINE), command


def test_without_arguments_there_is_help_and_with_version_a_version() -> None:
    assert "Usage: perdure" in CliRunner().invoke(app, [], prog_name="perdure").output
    assert re.fullmatch(r"perdure \S+\n", CliRunner().invoke(app, ["--version"]).stdout)


def test_the_address_and_namespace_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from perdure_client.cli._context import Session

    monkeypatch.setenv("PERDURE_ADDRESS", "localhost:1")
    known = Session(address="localhost:1", namespace=None, tls=None, ca_file=None, timeout_s=1)
    assert known.prefix == ""
    given = Session(address="localhost:2", namespace="x", tls=True, ca_file=Path("ca.pem"), timeout_s=1)
    assert given.prefix == " --address localhost:2 --namespace x --tls --ca-file ca.pem"
    mutual = Session(
        address=None, namespace=None, tls=None, ca_file=None, timeout_s=1,
        client_certificate_file=Path("c.pem"), client_key_file=Path("k.pem"), server_name="s",
    )  # fmt: skip
    assert mutual.prefix == " --client-cert c.pem --client-key k.pem --server-name s"


async def test_executors_are_listed_from_the_admin_address(
    server: ScriptedServer, perdure: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    alive = operators.Executor(
        executor_id="host-1", address="host:50051", application_version="1", running=3, max_running=10,
        state=operators.EXECUTOR_STATE_ALIVE, start_time=now, expire_time=now,
    )  # fmt: skip
    newer = operators.Executor(executor_id="host-2", state=77)
    answer = operators.ListExecutorsResponse(executors=[alive, newer])
    server.script(LIST_EXECUTORS, answer, answer, Fail(grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED"))
    elsewhere = ("--address", "localhost:1")
    result = await perdure(*elsewhere, "executors", "--all", "--admin-address", server.address)
    first, second = objects(result)
    assert (first["executor_id"], first["state"], first["running"], first["max_running"]) == ("host-1", "ALIVE", 3, 10)
    assert (second["state"], second["start_time"]) == ("UNKNOWN", None)
    assert server.asked(LIST_EXECUTORS)[0].include_gone
    monkeypatch.setenv("PERDURE_ADMIN_ADDRESS", server.address)
    result = await perdure(*elsewhere, "executors", "-o", "table")
    assert re.search(r"host-1 +ALIVE +3/10 +1 ", result.stdout), result.output
    assert not server.asked(LIST_EXECUTORS)[1].include_gone
    assert (await perdure(*elsewhere, "executors")).exit_code == 3


async def test_queues_are_listed_with_their_limits(server: ScriptedServer, perdure: Invoke) -> None:
    wide = operators.Queue(queue="perdure", running=7)
    mail = operators.Queue(queue="mail", global_concurrency=4, rate_limit=10, queued=2, running=4, worker_concurrency=3)
    mail.rate_period.FromTimedelta(timedelta(minutes=1))
    mail.oldest_queued_time.FromDatetime(datetime.now(UTC) - timedelta(minutes=5))
    answer = operators.ListQueuesResponse(queues=[mail, wide])
    server.script(LIST_QUEUES, answer, answer)
    first, second = objects(await perdure("queues", "-o", "json", "--admin-address", server.address))
    assert (first["queue"], first["global_concurrency"], first["queued"]) == ("mail", 4, 2)
    assert (second["rate_period"], second["oldest_queued_time"]) == (None, None)
    result = await perdure("queues", "-o", "table", "--admin-address", server.address)
    assert re.search(r"mail +2 +4 +5 min .* ago +3 +4 +10 in 1 min", result.stdout), result.output


async def test_cells_are_listed_with_who_answers(server: ScriptedServer, perdure: Invoke) -> None:
    north = operators.Cell(
        cell="nn1", home_region="north", secondary_region="south", survival_goal=operators.SURVIVAL_GOAL_REGION,
        database="perdure_nn1", address="north:1", namespaces=["default", "lab"], served_here=True, reachable=True,
        serving_region="south", epoch=2, executors=3, standing_by=1,
    )  # fmt: skip
    south = operators.Cell(cell="ss1", home_region="south", survival_goal=operators.SURVIVAL_GOAL_ZONE)
    answer = operators.ListCellsResponse(cells=[north, south])
    server.script(LIST_CELLS, answer, answer, operators.ListCellsResponse())
    first, second = objects(await perdure("cells", "-o", "json", "--admin-address", server.address))
    assert (first["cell"], first["survival_goal"], first["namespaces"]) == ("nn1", "REGION", ["default", "lab"])
    assert (second["survival_goal"], second["reachable"]) == ("ZONE", False)
    result = await perdure("cells", "-o", "table", "--admin-address", server.address)
    assert re.search(r"nn1 +north +south +region +south: 3\+1 +this one +perdure_nn1", result.stdout), result.output
    assert re.search(r"ss1 +south +zone +no answer", result.stdout), result.output
    result = await perdure("cells", "-o", "table", "--admin-address", server.address)
    assert "no regions" in result.output


@pytest.mark.parametrize(
    ("command", "method", "answer"),
    [
        ("evacuate", EVACUATE_CELL, operators.EvacuateCellResponse),
        ("return", RETURN_CELL, operators.ReturnCellResponse),
    ],
)
async def test_a_cell_is_moved_and_its_new_region_told(
    server: ScriptedServer, perdure: Invoke, command: str, method: Any, answer: Any
) -> None:
    cell = operators.Cell(cell="nn1", home_region="north", serving_region="south", epoch=2, standing_by=1)
    server.script(method, answer(cell=cell), answer(cell=cell))
    result = await perdure(command, "nn1", "-o", "table", "--admin-address", server.address)
    assert "nn1 is served by south (epoch 2)" in result.output
    (shown,) = objects(await perdure(command, "nn1", "-o", "json", "--admin-address", server.address))
    assert (shown["cell"], shown["serving_region"], shown["standing_by"]) == ("nn1", "south", 1)
    assert [request.cell for request in server.asked(method)] == ["nn1", "nn1"]


async def test_stranded_runs_are_listed_with_what_can_be_done(server: ScriptedServer, perdure: Invoke) -> None:
    runs_found = [
        operators.StrandedRun(
            namespace="a", run_id=f"run-{number}", agent="greet", agent_version="3", application_version="7",
            state=run_message(state="QUEUED").state, reason=operators.STRANDED_REASON_NO_EXECUTOR_OF_VERSION,
            advice=f"fork run-{number}", create_time=datetime.now(UTC),
        )
        for number in range(3)
    ]  # fmt: skip
    newer = operators.StrandedRun(run_id="run-9", agent="other", reason=77, advice="wait")  # type: ignore[arg-type]
    answer = operators.ListStrandedRunsResponse(runs=[*runs_found, newer])
    server.script(LIST_STRANDED_RUNS, answer, answer, answer, operators.ListStrandedRunsResponse())
    there = ("stranded", "--admin-address", server.address)
    result = await perdure(*there)
    first, *_, last = objects(result)
    assert (first["namespace"], first["run_id"], first["agent_version"], first["application_version"]) == (
        "a", "run-0", "3", "7",
    )  # fmt: skip
    assert (first["state"], first["reason"], first["advice"]) == ("QUEUED", "NO_EXECUTOR_OF_VERSION", "fork run-0")
    assert (last["reason"], last["create_time"]) == ("UNKNOWN", None)
    result = await perdure(*there, "-o", "table")
    assert re.search(r"run-2 +a +greet@3 +QUEUED +7 ", result.stdout), result.output
    assert result.stderr.splitlines() == ["run-0: fork run-0", "run-9: wait"], "each kind is explained once"
    result = await perdure(*there, "-n", "2")
    assert len(objects(result)) == 2
    assert "There are more than these 2" in result.stderr
    result = await perdure(*there, "-o", "table")
    assert (result.stdout, result.stderr) == ("", "No run is stranded.\n")


async def test_a_server_without_an_admin_port_is_told_from_one_that_is_not_there(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure_client.cli._context.CONNECT_TIMEOUT_S", 0.05)
    result = CliRunner().invoke(app, ["executors", "--admin-address", "127.0.0.1:1"])
    assert result.exit_code == 3
    assert result.stderr == (
        "perdure: SERVER_UNAVAILABLE: no perdure server serves operators at 127.0.0.1:1 (Connection refused). "
        "Start one with PERDURE_ADMIN_ADDRESS set to it, or say which with --admin-address.\n"
    )


async def test_a_file_that_cannot_be_read_is_wrong_usage(perdure: Invoke, tmp_path: Path) -> None:
    for option in ("--ca-file", "--client-cert", "--client-key"):
        result = await perdure(option, str(tmp_path / "none.pem"), "agents")
        assert (result.exit_code, option in result.output) == (2, True)


def test_standard_input_that_is_no_text_is_wrong_usage() -> None:
    result = CliRunner().invoke(app, ["--address", "127.0.0.1:1", "start", "x", "-i", "-"], input=b"\xff")
    assert result.exit_code == 2
    assert "cannot read standard input" in " ".join(result.stderr.split())


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from perdure_client.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "perdure: the command needs typer, rich and pyyaml. Install them with: pip install 'perdure[cli]'\n"
    )


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; sys.argv = ['perdure', '--help']; from perdure_client.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 10), ("1.5", 1.5), ("500ms", 0.5), ("10s", 10), ("5m", 300), ("1h30m", 5400), ("1d", 86400)],
)
def test_durations_are_understood(text: str, seconds: float) -> None:
    assert _parse.duration(text).total_seconds() == seconds


def test_a_time_without_a_zone_is_local() -> None:
    assert _parse.moment("2030-01-31T09:00+00:00") == datetime(2030, 1, 31, 9, tzinfo=UTC)
    assert _parse.moment("2030-01-31T09:00").tzinfo is not None
    with pytest.raises(typer.BadParameter):
        _parse.moment("tomorrow")
