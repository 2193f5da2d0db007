"""`perdure list --watch`, `fork`, `delete`, `-o yaml` and completion, against a scripted server."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import typer
import yaml
from google.protobuf.timestamp_pb2 import Timestamp
from perdure.v1 import agent_catalog_service_pb2 as catalog
from perdure.v1 import agent_run_service_pb2 as runs
from perdure.v1 import approval_service_pb2 as approvals
from perdure_client import Client
from perdure_client._transport import (
    DELETE_RUNS,
    FORK_RUN,
    GET_RUN,
    LIST_AGENTS,
    LIST_APPROVALS,
    LIST_RUN_EVENTS,
    LIST_RUNS,
    WAIT_RUN,
)
from perdure_client.cli import _list, _parse
from perdure_client.cli._context import Session
from perdure_client.cli._output import Output
from rich.console import Console

from tests.unit.client.scripted import Fail, ScriptedServer, log_event, run_message

Invoke = Callable[..., Awaitable[Any]]
GONE = Fail(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")
AWAY = Fail(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", retry_delay_s=0.01)


def page(*messages: Any, token: str = "") -> runs.ListRunsResponse:
    return runs.ListRunsResponse(runs=messages, next_page_token=token)


def made(run_id: str, state: str = "RUNNING", at: int = 1, **fields: Any) -> Any:
    return run_message(run_id, state, create_time=Timestamp(seconds=at), agent_version="1", **fields)


# ---- list ------------------------------------------------------------------------------------------------------------


async def test_list_asks_with_all_its_filters(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(LIST_RUNS, page(made("a")), page())
    arguments = ("list", "--parent", "p", "--since", "2h", "--until", "2030-01-31T09:00+00:00", "--all")
    result = await perdure(*arguments)
    assert result.exit_code == 0, result.output
    (request,) = server.asked(LIST_RUNS)
    assert (request.parent_run_id, request.page_size) == ("p", 200)
    since = request.from_create_time.ToDatetime(UTC)
    assert timedelta(hours=2) <= datetime.now(UTC) - since < timedelta(hours=2, minutes=1)
    assert request.until_create_time.ToDatetime(UTC) == datetime(2030, 1, 31, 9, tzinfo=UTC)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`list --watch` looks again at once, and is interrupted when the script of its looks is at its end."""

    class Clock:
        @staticmethod
        def sleep(seconds: float) -> None:
            assert seconds == _list.LOOK_INTERVAL_S

    monkeypatch.setattr(_list, "time", Clock)


async def test_a_watched_list_tells_of_what_is_new_or_has_changed(
    server: ScriptedServer, perdure: Invoke, looks: None
) -> None:
    server.script(
        LIST_RUNS,
        page(made("b", at=2), made("a", at=1)),
        page(made("b", at=2), made("a", at=1)),
        page(made("c", at=3), made("b", at=2, last_sequence=9)),
        page(made("c", at=3)),
    )  # fmt: skip
    server.script(GET_RUN, runs.GetRunResponse(run=made("a", "FAILED")), GONE)
    result = await perdure("list", "--state", "running", "--watch")
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(run["run_id"], run["state"], run["last_sequence"]) for run in told] == [
        ("a", "RUNNING", 0),
        ("b", "RUNNING", 0),
        ("a", "FAILED", 0),  # not running any more
        ("b", "RUNNING", 9),
        ("c", "RUNNING", 0),
        # b was deleted
    ]
    assert "SCRIPT_AT_ITS_END" in result.stderr
    assert result.exit_code == 3


async def test_what_is_pushed_out_of_a_watched_list_by_newer_runs_has_not_changed(
    server: ScriptedServer, perdure: Invoke, looks: None
) -> None:
    server.script(LIST_RUNS, page(made("b", at=2), made("a", at=1)), page(made("c", at=3), made("b", at=2)))
    result = await perdure("list", "--limit", "2", "--watch")
    assert [json.loads(line)["run_id"] for line in result.stdout.splitlines()] == ["a", "b", "c"]
    assert not server.asked(GET_RUN)


async def test_a_watched_list_survives_an_outage_and_says_so_once(
    server: ScriptedServer, slept: list[float], looks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("perdure_client._retry.Patience.delay_before_repeat_s", lambda *_: None)
    server.script(LIST_RUNS, page(made("a")), AWAY, AWAY, page(made("a", "SUCCEEDED")))

    def watch() -> list[str]:
        session = Session(server.address, None, None, None, 5)
        states: list[str] = []
        try:
            for run in _list.changes(session, _list.Wanted(limit=50)):
                states.append(str(run.state))
                if run.done:
                    return states
        finally:
            session.close()
        raise AssertionError("it goes on until the user ends it")

    assert await asyncio.to_thread(watch) == ["RUNNING", "SUCCEEDED"]
    assert capsys.readouterr().err.count("no connection") == 1


async def test_on_a_terminal_a_watched_list_is_a_table_that_fits(
    server: ScriptedServer, slept: list[float], looks: None
) -> None:
    server.script(LIST_RUNS, page(*[made(f"run-{n}", at=n) for n in range(20, 0, -1)]), page(made("run-21", at=21)))
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=10, legacy_windows=False)

    def watch() -> None:
        session = Session(server.address, None, None, None, 5)
        try:
            _list._watch(session, _list.Wanted(limit=50), Output.TABLE, screen)
        finally:
            session.close()

    with pytest.raises(Exception, match="no script left"):
        await asyncio.to_thread(watch)
    drawn = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "run-20" in drawn
    assert "run-14" in drawn
    assert "run-13" not in drawn, "there is no room"
    assert "20 runs" in drawn
    assert "13 older ones do not fit" in drawn
    assert "run-21" in drawn


# ---- fork ------------------------------------------------------------------------------------------------------------


def forked(request: Any) -> runs.ForkRunResponse:
    step = request.from_step_id or 4
    run = made(request.new_run_id, "QUEUED", forked_from_run_id=request.run_id, forked_from_step_id=step)
    return runs.ForkRunResponse(run=run, created=True, from_step_id=step)


async def test_fork_sends_all_its_options(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(FORK_RUN, forked)
    result = await perdure(
        "fork", "old", "--from-step", "3", "-i", '{"q": 2}', "--version", "2", "--run-id", "new", "-l", "a=b",
        "--deadline", "1h",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    run = json.loads(result.stdout)
    assert (run["run_id"], run["forked_from_run_id"], run["forked_from_step_id"]) == ("new", "old", 3)
    (request,) = server.asked(FORK_RUN)
    assert (request.run_id, request.from_step_id, request.input_json, request.agent_version) == (
        "old",
        3,
        '{"q":2}',
        "2",
    )
    assert (dict(request.labels), request.HasField("deadline_time")) == ({"a": "b"}, True)
    assert request.request_id


async def test_a_fork_without_options_leaves_everything_open(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(FORK_RUN, forked)
    result = await perdure("fork", "old", "-o", "lines")
    (request,) = server.asked(FORK_RUN)
    assert request.WhichOneof("input_format") is None
    assert request.from_step_id == 0
    assert "from step 4 of old" in result.stdout
    assert f"perdure --address {server.address} watch {request.new_run_id}" in result.stdout


async def test_fork_can_wait_and_validate(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(FORK_RUN, forked, forked)
    server.script(WAIT_RUN, runs.WaitRunResponse(run=made("new", "FAILED")))
    assert (await perdure("fork", "old", "--wait")).exit_code == 1
    result = await perdure("fork", "old", "--validate-only", "-o", "lines")
    assert result.stdout == "Valid. Nothing was started. It would go on at step 4.\n"
    assert (await perdure("fork", "old", "--from-step", "0")).exit_code == 2


async def test_a_run_that_failed_is_shown_with_the_way_to_try_it_again(server: ScriptedServer, perdure: Invoke) -> None:
    run = made("x", "FAILED", forked_from_run_id="old", forked_from_step_id=2)
    server.script(GET_RUN, runs.GetRunResponse(run=run), runs.GetRunResponse(run=made("y", "SUCCEEDED")))
    result = await perdure("get", "x", "-o", "table")
    assert f"perdure --address {server.address} fork x --watch" in result.stderr
    assert "old, at step 2" in result.stdout
    assert "fork" not in (await perdure("get", "y", "-o", "table")).stderr


# ---- delete ----------------------------------------------------------------------------------------------------------


async def test_delete_sends_its_conditions_until_nothing_is_left(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(
        DELETE_RUNS,
        runs.DeleteRunsResponse(deleted_count=1000, sample_run_ids=["a"], more=True),
        runs.DeleteRunsResponse(deleted_count=5, sample_run_ids=["b"]),
    )
    result = await perdure(
        "delete", "-s", "failed", "-a", "research", "-l", "a=b", "--context", "c", "--before", "30d", "--yes"
    )
    assert result.exit_code == 0, result.output
    deletion = json.loads(result.stdout)
    assert (deletion["deleted_count"], deletion["sample_run_ids"], deletion["more"]) == (1005, ["a", "b"], False)
    first, second = server.asked(DELETE_RUNS)
    assert first == second
    assert (list(first.states), first.agent, dict(first.labels), first.context_id) == ([7], "research", {"a": "b"}, "c")
    age = datetime.now(UTC) - first.until_end_time.ToDatetime(UTC)
    assert timedelta(days=30) <= age < timedelta(days=30, minutes=1)


async def test_what_was_left_alone_is_told_and_is_an_exit_code(server: ScriptedServer, perdure: Invoke) -> None:
    response = runs.DeleteRunsResponse(deleted_count=1, unfinished_run_ids=["b"], missing_run_ids=["c"])
    server.script(DELETE_RUNS, response)
    result = await perdure("delete", "a", "b", "c", "--yes", "-o", "table")
    assert result.exit_code == 3
    assert result.stdout == "1 run deleted.\n"
    assert "b was left alone" in result.stderr
    assert "There is no run c." in result.stderr
    assert list(server.asked(DELETE_RUNS)[0].run_ids) == ["a", "b", "c"]


async def test_a_dry_run_counts_and_deletes_nothing(server: ScriptedServer, perdure: Invoke) -> None:
    server.script(DELETE_RUNS, runs.DeleteRunsResponse(deleted_count=1000, more=True))
    result = await perdure("delete", "--state", "succeeded", "--dry-run", "--yes", "-o", "table")
    assert result.stdout == "more than 1000 runs would be deleted.\n"
    assert [request.validate_only for request in server.asked(DELETE_RUNS)] == [True]


@pytest.mark.parametrize(("answer", "asked", "code"), [("y\n", [True, False], 0), ("n\n", [True], 130)])
async def test_on_a_terminal_delete_asks_first(
    server: ScriptedServer,
    perdure: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    asked: list[bool],
    code: int,
) -> None:
    monkeypatch.setattr("perdure_client.cli._manage.sys", type("Sys", (), {"stdin": type("In", (), {"isatty": bool})}))
    monkeypatch.setattr("perdure_client.cli._manage.sys.stdin.isatty", lambda: True)
    found = runs.DeleteRunsResponse(deleted_count=5, sample_run_ids=["a", "b", "c", "d"])
    server.script(DELETE_RUNS, found, found)
    result = await perdure("delete", "--agent", "research", "-o", "table", stdin=answer)
    assert result.exit_code == code, result.output
    assert "Delete 5 runs with logs and approvals (a, b, c, …)?" in result.stderr
    assert [request.validate_only for request in server.asked(DELETE_RUNS)] == asked


async def test_delete_refuses_to_guess(server: ScriptedServer, perdure: Invoke) -> None:
    assert "say which" in (await perdure("delete", "--yes")).stderr
    assert "--yes" in (await perdure("delete", "a")).stderr
    result = await perdure("delete", "a", "--agent", "research", "--yes")
    assert result.exit_code == 2
    assert "agent" in result.stderr
    assert not server.asked(DELETE_RUNS)


async def test_more_ids_than_one_call_takes_are_several_calls(server: ScriptedServer, slept: list[float]) -> None:
    responses = [
        runs.DeleteRunsResponse(deleted_count=600, more=True, missing_run_ids=["r1"], unfinished_run_ids=["r2"]),
        runs.DeleteRunsResponse(deleted_count=398, missing_run_ids=["r0", "r1"], unfinished_run_ids=["r2"]),
        runs.DeleteRunsResponse(deleted_count=1),
    ]
    server.script(DELETE_RUNS, *responses)

    def delete() -> Any:
        with Client(server.address) as client:
            return client.delete_runs(*[f"r{n}" for n in range(1001)], "r0")

    deletion = await asyncio.to_thread(delete)
    assert (deletion.deleted_count, deletion.missing_run_ids, deletion.unfinished_run_ids) == (999, ("r1",), ("r2",))
    assert [len(request.run_ids) for request in server.asked(DELETE_RUNS)] == [1000, 1000, 1]


# ---- yaml ------------------------------------------------------------------------------------------------------------


async def test_yaml_has_what_json_has(server: ScriptedServer, perdure: Invoke) -> None:
    run = made("x", "SUCCEEDED", output_json='{"text": "a: b\\n- c", "n": 9007199254740993, "é": null}')
    server.script(GET_RUN, *[runs.GetRunResponse(run=run)] * 2)
    as_json = json.loads((await perdure("get", "x")).stdout)
    as_yaml = await perdure("get", "x", "-o", "yaml")
    assert yaml.safe_load(as_yaml.stdout) == as_json
    assert as_yaml.stdout.startswith("namespace: default\nrun_id: x\n")
    server.script(LIST_RUNS, page(made("a"), made("b")))
    listed = (await perdure("list", "-o", "yaml")).stdout
    assert [one["run_id"] for one in yaml.safe_load_all(listed)] == ["a", "b"]
    server.script(LIST_RUN_EVENTS, runs.ListRunEventsResponse(events=[log_event(1), log_event(2)]))
    told = list(yaml.safe_load_all((await perdure("events", "x", "-o", "yaml")).stdout))
    assert [(event["sequence"], event["kind"]) for event in told] == [(1, "log"), (2, "log")]


def test_a_time_in_the_past_may_be_how_long_ago() -> None:
    assert _parse.past("2030-01-31T09:00+00:00") == datetime(2030, 1, 31, 9, tzinfo=UTC)
    then = _parse.past("1h30m")
    assert timedelta(minutes=90) <= datetime.now(UTC) - then < timedelta(minutes=91)
    for text in ("soon", "999999w"):
        with pytest.raises(typer.BadParameter):
            _parse.past(text)


# ---- completion ------------------------------------------------------------------------------------------------------


async def completed(*words: str) -> list[str]:
    """Returns what bash would propose for the last of these words."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from perdure_client.cli import main; main()",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "_PERDURE_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("perdure", *words)),
            "COMP_CWORD": str(len(words)),
        },
    )
    out, err = await process.communicate()
    assert err == b""
    return out.decode().split()


async def test_ids_and_names_are_completed_from_the_server(server: ScriptedServer) -> None:
    server.script(LIST_RUNS, *[page(made("run-1"), made("run-2"), made("other"))] * 2)
    where = ("--address", server.address)
    assert await completed(*where, "get", "run") == ["run-1", "run-2"]
    assert await completed(*where, "delete", "other", "o") == ["other"]
    agents = [catalog.Agent(agent=name, current=True) for name in ("research", "notes")]  # type: ignore[attr-defined]
    server.script(LIST_AGENTS, catalog.ListAgentsResponse(agents=agents))
    assert await completed(*where, "start", "re") == ["research"]
    pending = approvals.ListApprovalsResponse(approvals=[{"approval_id": "run-1/2"}])  # type: ignore[list-item]
    server.script(LIST_APPROVALS, pending)
    assert await completed(*where, "approve", "run-") == ["run-1/2"]


async def test_a_server_that_does_not_answer_completes_nothing_and_says_nothing() -> None:
    assert await completed("--address", "127.0.0.1:1", "get", "run") == []
    assert await completed("--address", "nonsense:port", "get", "run") == []
