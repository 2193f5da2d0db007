"""A server killed in the middle of the tool loop: nothing that was finished, request or call, is made again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from perdure_client import ChildStarted, Client, Run, RunEvent, Usage
from perdure_client._run_view import RunView
from perdure_service.domain.events import EventKind
from perdure_service.store import documents
from perdure_service.store.engine import create_engine

from tests.helpers import eventually, judge, scaled
from tests.helpers.model_endpoint import ModelEndpoint, Turn, serving
from tests.helpers.server import ServerProcess
from tests.helpers.web import Web
from tests.helpers.web import serving as serving_web

ANSWER = "A hundred leases are 25 minutes."


@pytest.fixture
def endpoint() -> Iterator[ModelEndpoint]:
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def web() -> Iterator[Web]:
    with serving_web() as web:
        yield web


@pytest.fixture
def server(database_url: str, endpoint: ModelEndpoint, web: Web) -> Iterator[ServerProcess]:
    with ServerProcess(
        database_url,
        PERDURE_MODEL__BASE_URL=endpoint.url,
        PERDURE_MODEL__NAME="small",
        PERDURE_FETCH_ALLOW=f"127.0.0.1:{web.port}",
    ) as server:
        yield server


@pytest.mark.timeout(300)
def test_kills_in_a_tool_and_in_the_model_repeat_only_what_was_in_progress(
    server: ServerProcess, database_url: str, endpoint: ModelEndpoint, web: Web
) -> None:
    first, second = web.page("/first", "one"), web.page("/second", "two")
    final = ("final_answer", {"answer": ANSWER, "sources": [first, second]})
    looks = Turn(("Looking. ",), (("fetch_url", {"url": first}), ("calculate", {"expression": "100 * 15 / 60"})))
    answers = Turn(("I have it. ",), (final,))
    endpoint.script += [looks, Turn(calls=(("fetch_url", {"url": second}),))]
    endpoint.answers = lambda _body: answers
    web.held.add("/second")
    events: list[RunEvent] = []
    with Client(server.address) as client:
        run = client.start("assistant", {"task": "How long are a hundred leases?"}, run_id="killed-twice")
        following = threading.Thread(target=lambda: events.extend(client.watch(run).events()), daemon=True)
        following.start()

        eventually(lambda: web.reads["/second"] == 1, 30, what="the second page is being read")
        eventually(lambda: any((e.step_id, e.kind) == (5, "step_started") for e in events), 30, what="it is told")
        endpoint.script.append(Turn(answers.pieces, answers.calls, hold=True))
        server.kill()
        server.start()
        eventually(lambda: len(endpoint.calls) == 3, 30, what="the model is asked for the last time")
        eventually(lambda: "I have it." in _view(run, events).streams.get((6, "text"), ""), 30)
        server.kill()
        server.start()
        ended = client.wait(run, timeout=60)
        following.join(scaled(30))

    assert ended.succeeded, ended.failure
    assert ended.execution == 3
    assert web.reads == {"/first": 1, "/second": 2}
    assert len(endpoint.calls) == 4
    assert endpoint.calls[2][2] == endpoint.calls[3][2], "the same conversation, from the recorded steps"
    log = judge.assert_consistent(database_url, "default.killed-twice.r")
    assert [event.sequence for event in events] == list(range(1, len(log) + 1))
    began = Counter((event.step_id, event.step_name) for event in log if event.kind is EventKind.STEP_STARTED)
    assert began == {
        (1, "tools.ask_model"): 1, (2, "assistant.fetch_url"): 1, (3, "assistant.calculate"): 1,
        (4, "tools.ask_model"): 1, (5, "assistant.fetch_url"): 2, (6, "tools.ask_model"): 2,
    }  # fmt: skip
    assert judge.text_of(log, "text") == "Looking. I have it. "
    assert judge.text_of(log, "answer") == ANSWER == _view(run, events).streams[6, "answer"]
    # The call that was cut off by the kill had not been told what it used: the endpoint says so at its end.
    assert ended.usage == Usage(input_tokens=3 * 30, output_tokens=3 * 12)


def _view(run: Run, events: list[RunEvent]) -> RunView:
    view = RunView(run_id=run.run_id)
    for event in list(events):
        view = view.apply(event)
    return view


@pytest.mark.timeout(300)
def test_a_kill_while_children_work_starts_no_child_again_and_repeats_no_finished_one(
    server: ServerProcess, database_url: str, endpoint: ModelEndpoint, tmp_path: Path
) -> None:
    (tmp_path / "leases.md").write_text("# Leases\n\nLeases expire after fifteen seconds.", encoding="utf-8")
    engine = create_engine(database_url, pool_size=2, statement_timeout=timedelta(seconds=30))
    documents.load_folder(engine, tmp_path, lambda _: None)
    engine.dispose()
    quick, slow = "When do leases expire?", "Why do leases expire?"

    def answer(body: dict[str, Any]) -> Turn:
        return Turn(("Fifteen ", "seconds [1]."), hold=slow in body["messages"][-1]["content"])

    endpoint.answers = answer
    with Client(server.address) as client:
        run = client.start("briefing", {"topic": "Leases", "questions": [quick, slow]}, run_id="children")

        def one_is_done() -> bool:
            children = [event.data.child_run_id for event in client.events(run) if isinstance(event.data, ChildStarted)]
            return sorted(client.get(child).state for child in children) == ["RUNNING", "SUCCEEDED"]

        eventually(lambda: one_is_done() and len(endpoint.calls) == 2, 30, what="one child is done, one asks the model")
        endpoint.answers = lambda _body: Turn(("Fifteen ", "seconds [1]."))
        server.kill()
        server.start()
        ended = client.wait(run, timeout=60)
    assert ended.succeeded, ended.failure
    assert [section["answer"] for section in ended.output["sections"]] == ["Fifteen seconds [1]."] * 2  # type: ignore[call-overload, index]
    asked = Counter(call[2]["messages"][-1]["content"].rpartition("Question: ")[2] for call in endpoint.calls)
    assert (asked[quick], asked[slow]) == (1, 2)
    assert sum(asked.values()) == 4, "the fourth asked for the summary"
    log = judge.assert_consistent(database_url, "default.children.r")
    started = [event.data["child_run_id"] for event in log if event.kind is EventKind.CHILD_STARTED]
    assert len(started) == len(set(started)) == 2
    for child in started:
        judge.assert_consistent(database_url, f"default.{child.replace('children.', 'children.r-')}")
