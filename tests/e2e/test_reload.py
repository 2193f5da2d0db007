"""`perdure-server dev --reload`: the code changes, and the runs go on in it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from perdure_client import Client

from tests.e2e.commands import READY, DevServer
from tests.helpers.waiting import eventually

AGENTS = '''\
from dbos import DBOS
from perdure_service.agents import agent, run


@DBOS.step()
async def prepare() -> str:
    return "prepared"


@agent(name="asker")
async def asker() -> list[str]:
    """Prepares, asks, says which code goes on."""
    prepared = await prepare()
    await run.approval("Go on?")
    return [prepared, "old code"]
'''


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[DevServer]:
    (folder / "my_agents.py").write_text(AGENTS)
    server = DevServer(folder, "my_agents", options=("--reload",))
    server.start()
    yield server
    if server.alive:
        server.kill()


def write(server: DevServer, text: str, says: str) -> None:
    """Changes the agents, and waits until the server says something new about it."""
    before = len(server.said)
    (server.folder / "my_agents.py").write_text(text)
    eventually(lambda: says in server.said[before:], 60, what=f"the server says {says!r}")


def answers(server: DevServer) -> bool:
    """Whether anybody listens at its address."""
    host, _, port = server.address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), 1):
            return True
    except ConnectionRefusedError:
        return False


def test_a_run_that_waits_goes_on_in_the_new_code(server: DevServer) -> None:
    with Client(server.address) as client:
        run = client.start("asker", run_id="reloaded")
        eventually(lambda: client.get(run).state == "AWAITING_INPUT", 20)
        postgres = (server.data_dir / "postgres" / "postmaster.pid").read_text()
        write(server, AGENTS.replace("old code", "new code"), f"{READY}{server.address}")
        assert "my_agents.py changed; starting again" in server.said
        client.approve(next(iter(client.approvals(run=run))))
        ended = client.wait(run, timeout=30)
        assert (ended.state, ended.output) == ("SUCCEEDED", ["prepared", "new code"])
        assert ended.execution == 2
    assert (server.data_dir / "postgres" / "postmaster.pid").read_text() == postgres, "the database has run on"


def test_code_that_cannot_be_loaded_is_shown_and_the_next_change_waited_for(server: DevServer) -> None:
    write(server, AGENTS + "\ndef broken(:\n", "it is started again at the next change of a file")
    assert "SyntaxError" in server.said
    assert "def broken(:" in server.said
    assert server.alive
    write(server, AGENTS, f"{READY}{server.address}")
    with Client(server.address) as client:
        run = client.start("asker", run_id="mended")
        eventually(lambda: client.get(run).state == "AWAITING_INPUT", 20)


def test_files_that_are_not_code_change_nothing_and_one_interrupt_ends_all(server: DevServer) -> None:
    before = len(server.said)
    (server.folder / "notes.txt").write_text("not code")
    assert server.interrupt() == 0
    assert "starting again" not in server.said[before:]
    assert not answers(server)
    assert not (server.data_dir / "postgres" / "postmaster.pid").exists(), "its database runs on"


def test_a_server_whose_supervisor_was_killed_stops_by_itself(server: DevServer) -> None:
    server.start()
    server.kill()
    eventually(lambda: not answers(server), 30)
    eventually(lambda: not (server.data_dir / "postgres" / "postmaster.pid").exists(), 30, what="its database stops")
