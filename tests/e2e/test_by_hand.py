"""The README's chapter "By hand", with the real commands: a server with its own database, killed, stopped, used."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from perdure_service.store import embedded

from tests.e2e.commands import DevServer, Perdure, block_of_readme
from tests.helpers.waiting import eventually, free_port, scaled

OTHER_AGENTS = '''
from datetime import timedelta
from typing import Any

from dbos import DBOS

from perdure_service.agents import agent, run


@agent(name="listener")
async def listener() -> Any:
    """Waits for a note."""
    return await run.signal("add-note")


@DBOS.step()
def fail() -> None:
    raise ValueError("it cannot be done")


@agent(name="failing")
async def failing() -> None:
    """Fails."""
    fail()
'''


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[DevServer]:
    (folder / "my_agents.py").write_text(block_of_readme("from datetime import timedelta"), encoding="utf-8")
    (folder / "other_agents.py").write_text(OTHER_AGENTS, encoding="utf-8")
    server = DevServer(folder, "my_agents", "other_agents")
    try:
        server.start()
        yield server
    finally:
        if server.alive:
            server.kill()
        if (server.data_dir / "postgres" / "postmaster.pid").exists():  # a killed server leaves its database running
            embedded.start(server.data_dir).stop()


@pytest.fixture(scope="module")
def perdure(folder: Path, server: DevServer) -> Perdure:
    return Perdure(folder, server.address)


def waits(perdure: Perdure, run_id: str) -> Any:
    """Waits until a run waits for a person or a signal; returns it."""

    def arrived() -> Any:
        run = perdure.one("get", run_id)
        assert run["state"] == "AWAITING_INPUT", run
        return run

    return eventually(arrived, 20)


def approval_of(perdure: Perdure, run_id: str) -> str:
    """Waits until a run asks; returns the approval's id."""
    found = eventually(lambda: perdure.lines("approvals", "--run", run_id), 20)
    return str(found[0]["approval_id"])


def test_the_agents_of_the_modules_and_of_the_product_are_listed(perdure: Perdure) -> None:
    found = {line["agent"]: line for line in perdure.lines("agents")}
    assert {"brief", "echo", "listener", "failing", "research", "notes"} <= set(found)
    assert found["brief"]["description"] == "Writes a brief, asks a person, and publishes it."
    assert perdure.one("agents", "brief")["input_schema"]["properties"]["topic"] == {"title": "Topic", "type": "string"}


def test_the_readmes_commands_in_their_order(perdure: Perdure) -> None:
    started = perdure.one("start", "brief", "-i", '{"topic": "tides"}', "--run-id", "tides-1")
    assert (started["run_id"], started["created"]) == ("tides-1", True)
    with perdure.begin("watch", "tides-1") as watch:
        approval_id = approval_of(perdure, "tides-1")
        assert approval_id == "tides-1/2"
        assert [line["approval_id"] for line in perdure.lines("approvals")] == [approval_id]
        assert perdure.one("approvals", approval_id)["payload"] == {"text": "Three facts about tides."}
        assert perdure.one("approve", approval_id, "--comment", "go ahead")["state"] == "APPROVED"
        assert watch.wait() == 0
        events = watch.lines
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    text = "".join(event["data"]["text"] for event in events if event["kind"] == "output_delta")
    assert text == "Three facts about tides. "
    run = perdure.one("get", "tides-1")
    assert (run["state"], run["output"]) == ("SUCCEEDED", {"text": "Three facts about tides.", "published": True})
    names = [step["step_name"] for step in perdure.lines("steps", "tides-1")]
    assert names[0] == "write_draft"
    assert names[-1] == "publish_brief"
    changes = perdure.lines("events", "tides-1", "--kind", "state_changed")
    assert {event["kind"] for event in changes} == {"state_changed"}
    assert changes[-1] == events[-1]
    listed = perdure.lines("list", "--state", "SUCCEEDED", "--agent", "brief")
    assert "tides-1" in [line["run_id"] for line in listed]
    assert perdure.lines("approvals") == []


def test_a_rejected_brief_is_not_published(perdure: Perdure) -> None:
    perdure.run("start", "brief", "-i", '{"topic": "mud"}', "--run-id", "rejected")
    assert perdure.one("reject", approval_of(perdure, "rejected"), "-c", "no")["state"] == "REJECTED"
    (*_, last) = perdure.lines("watch", "rejected")
    assert last["data"]["to_state"] == "SUCCEEDED"
    assert perdure.one("get", "rejected")["output"]["published"] is False


def test_a_signal_reaches_the_run_that_waits_for_it(perdure: Perdure) -> None:
    perdure.run("start", "listener", "--run-id", "listening")
    waits(perdure, "listening")
    sent = perdure.run("signal", "listening", "add-note", "--payload", '{"text": "look at chapter 3"}')
    assert sent.stdout == ""
    perdure.run("watch", "listening")
    assert perdure.one("get", "listening")["output"] == {"text": "look at chapter 3"}


def test_start_and_follow_in_one_command(perdure: Perdure) -> None:
    run = perdure.one("start", "echo", "-i", '{"text": "hello"}', "--wait")
    assert run["output"] == {"text": "HELLO"}
    watched = perdure.lines("start", "echo", "-i", "-", "--watch", stdin='{"text": "from a pipe"}')
    assert watched[-1]["data"]["to_state"] == "SUCCEEDED"


def test_a_cancelled_or_failed_run_ends_the_commands_that_follow_it_with_1(perdure: Perdure) -> None:
    perdure.run("start", "listener", "--run-id", "unneeded")
    assert perdure.one("cancel", "unneeded", "--reason", "not needed")["state"] == "CANCELLED"
    assert perdure.lines("watch", "unneeded", status=1)[-1]["data"]["reason"] == "cancelled by dev: not needed"
    run = perdure.one("start", "failing", "--wait", status=1)
    assert (run["state"], run["failure"]["message"]) == ("FAILED", "it cannot be done")
    assert perdure.lines("start", "failing", "--watch", status=1)[-1]["data"]["to_state"] == "FAILED"
    assert perdure.one("get", run["run_id"])["state"] == "FAILED", "to look at it is no failure"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("start",), "Missing argument"),
        (("nothing",), "No such command"),
        (("start", "brief", "-i", "{"), "JSON"),
        (("start", "brief", "-i", '{"topic": 3}'), "INPUT_SCHEMA_VIOLATION"),
        (("list", "--state", "NOWHERE"), "NOWHERE"),
    ],
    ids=["no agent", "no such command", "no JSON", "input that does not fit", "no such state"],
)
def test_a_wrong_command_ends_with_2(perdure: Perdure, arguments: tuple[str, ...], said: str) -> None:
    result = perdure.run(*arguments, status=2)
    assert said in result.stderr
    assert result.stdout == ""


def test_what_the_server_refuses_ends_with_3(perdure: Perdure) -> None:
    for arguments, reason in (
        (("get", "no-such-run"), "RUN_NOT_FOUND"),
        (("start", "no-such-agent"), "AGENT_NOT_FOUND"),
        (("approve", "no-such-run/1"), "APPROVAL_NOT_FOUND"),
    ):
        result = perdure.run(*arguments, status=3)
        assert reason in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_server_that_cannot_be_reached_ends_the_command_with_3_and_one_line(folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    result = Perdure(folder, address).run("list", status=3)
    (line,) = result.stderr.splitlines()
    assert address in line
    assert "perdure-server dev" in line


def test_interrupting_a_watch_leaves_the_run_and_says_how_to_return(perdure: Perdure) -> None:
    perdure.run("start", "brief", "-i", '{"topic": "left"}', "--run-id", "left")
    approval_id = approval_of(perdure, "left")
    with perdure.begin("watch", "left") as watch:
        eventually(lambda: any(event["kind"] == "approval_requested" for event in watch.lines))
        watch.interrupt()
        assert watch.wait() == 130
        seen = watch.lines[-1]["sequence"]
        (remark,) = watch.remarks.splitlines()
    assert "The run goes on" in remark
    assert remark.endswith(f"perdure watch left --after {seen}")
    assert perdure.one("get", "left")["state"] == "AWAITING_INPUT"
    perdure.run("approve", approval_id)
    rest = perdure.lines(*remark.partition("perdure ")[2].split())
    assert rest[0]["sequence"] == seen + 1
    assert rest[-1]["data"]["to_state"] == "SUCCEEDED"


def test_a_server_killed_while_a_run_waits_and_the_watch_that_reconnects(perdure: Perdure, server: DevServer) -> None:
    perdure.run("start", "brief", "-i", '{"topic": "storms"}', "--run-id", "storms")
    approval_id = approval_of(perdure, "storms")
    with perdure.begin("watch", "storms") as watch:
        eventually(lambda: any(event["kind"] == "approval_requested" for event in watch.lines))
        server.kill()
        eventually(lambda: "connection lost" in watch.remarks, what="the watch says so")
        server.start()
        assert perdure.one("approve", approval_id)["state"] == "APPROVED"
        assert watch.wait() == 0
        events = watch.lines
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    began = [event["step_name"] for event in events if event["kind"] == "step_started"]
    assert began.count("write_draft") == 1, "the step that had finished is not run again"
    assert "recovered" in [event["kind"] for event in events]


def test_ctrl_c_stops_the_server_soon_and_the_next_start_continues_what_waits(
    perdure: Perdure, server: DevServer
) -> None:
    perdure.run("start", "listener", "--run-id", "patient")
    waits(perdure, "patient")
    began = time.monotonic()
    assert server.interrupt() == 0
    assert time.monotonic() - began < scaled(10)
    last_words = server.said.rpartition("server.stopping")[2]
    assert "server.stopped" in last_words
    assert "Traceback" not in last_words
    assert not (server.data_dir / "postgres" / "postmaster.pid").exists(), "its database has stopped, too"
    server.start()
    perdure.run("signal", "patient", "add-note", "--payload", "7")
    perdure.run("watch", "patient")
    run = perdure.one("get", "patient")
    assert (run["output"], run["execution"]) == (7, 2)
    assert perdure.one("get", "tides-1")["state"] == "SUCCEEDED", "and what had ended is still there"
    assert server.interrupt() == 0
