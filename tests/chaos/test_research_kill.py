"""A server killed or stopped in the middle of the research agent: a finished call of the model is never made again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from perdure_client import Client, OutputDelta, Run, RunEvent
from perdure_client._run_view import RunView
from perdure_service.domain.events import Event, EventKind
from perdure_service.store import documents
from perdure_service.store.engine import create_engine

from tests.helpers import eventually, judge, scaled
from tests.helpers.model_endpoint import PIECES, ModelEndpoint, serving
from tests.helpers.server import ServerProcess, sql

QUESTION = "When do leases expire?"
ANSWER = "".join(PIECES)
STEPS = ["research.retrieve", "research.write", "research.publish"]


@pytest.fixture(scope="module")
def url(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The module's database, with two documents."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "leases.md").write_text("# Leases\n\nLeases expire after fifteen seconds.", encoding="utf-8")
    (folder / "approvals.md").write_text("# Approvals\n\nApprovals expire after two days.", encoding="utf-8")
    engine = create_engine(database_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    try:
        documents.load_folder(engine, folder, lambda _: None)
    finally:
        engine.dispose()
    return database_url


@pytest.fixture
def endpoint() -> Iterator[ModelEndpoint]:
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def server(url: str, endpoint: ModelEndpoint) -> Iterator[ServerProcess]:
    server = ServerProcess(url, PERDURE_MODEL__BASE_URL=endpoint.url, PERDURE_MODEL__NAME="small")
    with server:
        yield server


class Watcher:
    """Follows a run with the client library, through whatever happens to the server.

    Attributes:
        events: What it saw.
        view: What it would show.
    """

    def __init__(self, client: Client, run: Run) -> None:
        self.events: list[RunEvent] = []
        self.view = RunView(run_id=run.run_id)
        self._watch = client.watch(run)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """All text that came, the void pieces too."""
        return "".join(event.data.text for event in self.events if isinstance(event.data, OutputDelta))

    def _follow(self) -> None:
        for event in self._watch.events():
            self.events.append(event)
            self.view = self.view.apply(event)

    def join(self) -> None:
        """Waits for the end of the run."""
        self._thread.join(scaled(30))
        assert not self._thread.is_alive(), "the watch is still open"


def _start(client: Client, run_id: str) -> tuple[Run, Watcher]:
    run = client.start("research", {"question": QUESTION}, run_id=run_id)
    return run, Watcher(client, run)


def _wait_until_it_asks(client: Client, run: Run, execution: int) -> None:
    def asks() -> bool:
        found = client.get(run)
        assert (found.state, found.execution) == ("AWAITING_INPUT", execution)
        return True

    eventually(asks, 15)


def _approve(client: Client, run: Run, watcher: Watcher) -> Run:
    """Approves what the run asks, and returns the run as it ended, when the watcher has seen that, too."""
    (approval,) = eventually(lambda: list(client.approvals(run=run)), 15)
    assert approval.payload["answer"] == ANSWER  # type: ignore[call-overload, index]
    client.approve(approval, comment="go ahead")
    final = client.wait(run, timeout=30)
    assert final.state == "SUCCEEDED", final
    watcher.join()
    return final


def _reports(url: str, workflow_id: str) -> list[tuple[str, str]]:
    with sql(url) as connection:
        return connection.execute(
            "SELECT report_id, answer FROM perdure.report WHERE workflow_id = %s", (workflow_id,)
        ).fetchall()


def _began(log: list[Event], kind: EventKind = EventKind.STEP_STARTED) -> list[str]:
    return [event.step_name for event in log if event.kind is kind and event.step_name.startswith("research.")]


def _assert_published_once(url: str, final: Run, watcher: Watcher) -> list[Event]:
    """Fails unless log, watcher, output and report tell the same; returns the log."""
    workflow_id = f"default.{final.run_id}.r"
    log = judge.assert_consistent(url, workflow_id)
    assert [event.sequence for event in watcher.events] == list(range(1, len(log) + 1))
    output: Any = final.output
    assert judge.text_of(log, "answer") == ANSWER
    assert [text for (_, stream), text in watcher.view.streams.items() if stream == "answer"] == [ANSWER]
    assert output["answer"] == ANSWER
    assert (output["approved"], output["model"]) == (True, "small-2")
    assert [source["document"] for source in output["sources"]] != []
    assert _reports(url, workflow_id) == [(output["report_id"], ANSWER)]
    assert _began(log, EventKind.STEP_SUCCEEDED) == STEPS
    kinds = [event.kind for event in log]
    assert kinds.count(EventKind.APPROVAL_REQUESTED) == 1
    assert kinds.count(EventKind.APPROVAL_DECIDED) == 1
    return log


@pytest.mark.parametrize(
    ("end", "name"), [(ServerProcess.kill, "killed"), (ServerProcess.stop, "stopped")], ids=["kill -9", "SIGTERM"]
)
def test_a_server_that_ends_while_the_run_waits_repeats_no_step_and_no_call_of_the_model(
    server: ServerProcess, url: str, endpoint: ModelEndpoint, end: Callable[[ServerProcess], object], name: str
) -> None:
    with Client(server.address) as client:
        run, watcher = _start(client, f"{name}-while-it-waits")
        _wait_until_it_asks(client, run, execution=1)
        end(server)
        server.start()
        _wait_until_it_asks(client, run, execution=2)
        final = _approve(client, run, watcher)
    assert len(endpoint.calls) == 1
    log = _assert_published_once(url, final, watcher)
    assert _began(log) == STEPS
    assert final.execution == 2
    assert EventKind.ATTEMPT_RESET not in {event.kind for event in log}


def test_a_kill_while_the_model_writes_voids_the_half_answer_and_asks_the_model_again(
    server: ServerProcess, url: str, endpoint: ModelEndpoint
) -> None:
    endpoint.script.append("hold")
    with Client(server.address) as client:
        run, watcher = _start(client, "killed-while-it-writes")
        half = "".join(PIECES[:-1])
        eventually(lambda: watcher.text == half, 15, what="the watcher has half an answer")
        server.kill()
        server.start()
        final = _approve(client, run, watcher)
    assert len(endpoint.calls) == 2
    assert endpoint.calls[0][2] == endpoint.calls[1][2], "the same passages, from the recorded step"
    log = _assert_published_once(url, final, watcher)
    assert _began(log) == ["research.retrieve", "research.write", "research.write", "research.publish"]
    assert watcher.text == half + ANSWER
    (reset,) = [event for event in log if event.kind is EventKind.ATTEMPT_RESET]
    deltas = [event for event in log if event.kind is EventKind.OUTPUT_DELTA]
    before = "".join(event.data["text"] for event in deltas if event.sequence < reset.sequence)
    after = "".join(event.data["text"] for event in deltas if event.sequence > reset.sequence)
    assert (before, after) == (half, ANSWER)
    assert {event.step_id for event in deltas} == {reset.step_id}
    assert final.execution == 2


def test_a_stop_lets_the_model_finish_and_its_answer_is_kept(
    server: ServerProcess, url: str, endpoint: ModelEndpoint
) -> None:
    endpoint.script.append("hold")
    with Client(server.address) as client:
        run, watcher = _start(client, "stopped-while-it-writes")
        eventually(lambda: watcher.text == "".join(PIECES[:-1]), 15, what="the watcher has half an answer")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        eventually(lambda: "server.stopping" in server.log)
        endpoint.released.set()
        stopping.join(scaled(30))
        assert not stopping.is_alive()
        server.start()
        final = _approve(client, run, watcher)
    assert len(endpoint.calls) == 1
    log = _assert_published_once(url, final, watcher)
    assert _began(log) == STEPS
    assert final.execution == 2
