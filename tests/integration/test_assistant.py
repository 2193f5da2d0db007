"""The assistant and the briefing on a real server: a scripted model, tools that work, and what becomes of mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from perdure_client import Client, Run, Usage
from perdure_client._run_view import RunView
from perdure_service.domain.events import Event, EventKind
from perdure_service.store import documents
from perdure_service.store.engine import create_engine

from tests.helpers import eventually, judge
from tests.helpers.model_endpoint import ModelEndpoint, Turn, serving
from tests.helpers.server import ServerProcess, create_effects_table
from tests.helpers.web import Web
from tests.helpers.web import serving as serving_web

TASK = "How many minutes are a hundred leases?"
FINAL = ("final_answer", {"answer": "25 minutes.", "sources": ["leases.md"]})
DONE = Turn(("Done. ",), (FINAL,))


@pytest.fixture(scope="module")
def url(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The module's database, with a document."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "leases.md").write_text("# Leases\n\nLeases expire after fifteen seconds.", encoding="utf-8")
    engine = create_engine(database_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    try:
        documents.load_folder(engine, folder, lambda _: None)
    finally:
        engine.dispose()
    return database_url


@pytest.fixture(scope="module")
def shared_endpoint() -> Iterator[ModelEndpoint]:
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(shared_endpoint: ModelEndpoint) -> Iterator[ModelEndpoint]:
    """The module's endpoint, as if it were new."""
    before = dict(vars(shared_endpoint))
    shared_endpoint.calls.clear()
    yield shared_endpoint
    shared_endpoint.script.clear()
    shared_endpoint.answers, shared_endpoint.usage = before["answers"], before["usage"]


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serving_web() as web:
        yield web


@pytest.fixture(scope="module")
def server(url: str, shared_endpoint: ModelEndpoint, web: Web) -> Iterator[ServerProcess]:
    create_effects_table(url)
    with ServerProcess(
        url,
        "tests.helpers.spending",
        PERDURE_MODEL__BASE_URL=shared_endpoint.url,
        PERDURE_MODEL__NAME="small",
        PERDURE_FETCH_ALLOW=f"127.0.0.1:{web.port}",
    ) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def assist(client: Client, run_id: str) -> Run:
    return client.wait(client.start("assistant", {"task": TASK}, run_id=run_id), timeout=60)


def log_of(url: str, run: Run) -> list[Event]:
    return judge.assert_consistent(url, f"default.{run.run_id}.r", str(run.state))


def steps_of(log: list[Event]) -> list[str]:
    return [event.step_name for event in log if event.kind is EventKind.STEP_STARTED]


def told(call: tuple[str, Any, dict[str, Any]]) -> list[str]:
    """Returns what a request tells the model that its tools returned."""
    return [message["content"] for message in call[2]["messages"] if message["role"] == "tool"]


def test_a_task_is_worked_on_with_tools_until_the_answer(
    client: Client, url: str, endpoint: ModelEndpoint, web: Web
) -> None:
    page = web.page("/leases", "A lease is fifteen seconds.")
    look = (("search_documents", {"question": "When do leases expire?"}), ("fetch_url", {"url": page}))
    endpoint.script += [
        Turn(("Let me ", "look. "), look),
        Turn(calls=(("calculate", {"expression": "100 * 15 / 60"}),)),
        DONE,
    ]
    run = assist(client, "worked-on")
    assert run.output == {
        "task": TASK, "answer": "25 minutes.", "sources": ["leases.md"], "model": "small-2",
        "tool_calls": ["search_documents", "fetch_url", "calculate"],
    }  # fmt: skip
    first, second, third = endpoint.calls
    assert {tool["function"]["name"] for tool in first[2]["tools"]} == {
        "final_answer", "search_documents", "fetch_url", "calculate",
    }  # fmt: skip
    passages, fetched = told(second)
    assert json.loads(passages)[0]["document"] == "leases.md"
    assert json.loads(fetched) == {"url": page, "text": "A lease is fifteen seconds."}
    assert told(third)[2] == "25"
    log = log_of(url, run)
    assert steps_of(log) == [
        "tools.ask_model", "assistant.search_documents", "assistant.fetch_url", "tools.ask_model",
        "assistant.calculate", "tools.ask_model",
    ]  # fmt: skip
    assert judge.text_of(log, "text") == "Let me look. Done. "
    assert judge.text_of(log, "answer") == "25 minutes."
    assert run.usage == Usage(input_tokens=3 * 30, output_tokens=3 * 12)


def test_the_answer_is_streamed_while_the_model_writes_it(client: Client, endpoint: ModelEndpoint) -> None:
    endpoint.released.clear()
    endpoint.script.append(Turn(calls=(("final_answer", '{"answer":"A long answer, half","sources":[]}'),), hold=True))
    run = client.start("assistant", {"task": TASK}, run_id="streamed")
    view = RunView(run_id=run.run_id)
    for event in client.watch(run).events():
        view = view.apply(event)
        if "A long" in view.streams.get((1, "answer"), "") and not endpoint.released.is_set():
            assert not view.state.terminal
            endpoint.released.set()
    assert view.streams[1, "answer"] == "A long answer, half"


def test_mistakes_with_tools_go_to_the_model_and_not_to_the_run(
    client: Client, url: str, endpoint: ModelEndpoint, web: Web
) -> None:
    endpoint.script += [
        Turn(
            calls=(
                ("calculate", {"expression": 5}),
                ("calculate", {"expresion": "5"}),
                ("calculate", "{not json"),
                ("calculate", {"expression": "1/0"}),
                ("delete_everything", {}),
                ("fetch_url", {"url": "http://example.org/"}),
                ("fetch_url", {"url": f"{web.url}/missing"}),
            )
        ),
        DONE,
    ]
    run = assist(client, "mistakes")
    assert run.succeeded
    errors = told(endpoint.calls[1])
    assert len(errors) == 7
    parts = ("expression", "expresion", "not JSON", "divides by zero", "no tool 'delete_", "not on the list", "404")
    for text, part in zip(errors, parts, strict=True):
        assert text.startswith("error: ")
        assert part in text
    log = log_of(url, run)
    assert steps_of(log).count("assistant.calculate") == 1, "bad arguments begin no step"
    assert steps_of(log).count("assistant.fetch_url") == 2
    assert EventKind.STEP_RETRYING not in {event.kind for event in log}


def test_a_tool_has_its_own_retries_and_the_model_is_told_when_they_are_used_up(
    client: Client, url: str, endpoint: ModelEndpoint, web: Web
) -> None:
    busy = web.page("/busy", "", 503)
    endpoint.script += [Turn(calls=(("fetch_url", {"url": busy}),)), DONE]
    run = assist(client, "busy")
    assert run.succeeded
    assert web.reads["/busy"] == 3
    (text,) = told(endpoint.calls[1])
    assert text.startswith("error: the tool failed")
    retrying = [event for event in log_of(url, run) if event.kind is EventKind.STEP_RETRYING]
    assert [event.step_name for event in retrying] == ["assistant.fetch_url"] * 2


def test_a_failed_request_to_the_model_is_tried_again_and_its_half_text_is_void(
    client: Client, url: str, endpoint: ModelEndpoint
) -> None:
    endpoint.script += [503, "cut", DONE]
    run = assist(client, "model-retries")
    assert run.succeeded
    log = log_of(url, run)
    assert judge.text_of(log, "text") == "Done. "
    assert [event.attempt for event in log if event.kind is EventKind.ATTEMPT_RESET] == [3]
    assert len(endpoint.calls) == 3


@pytest.mark.parametrize(
    "wrong",
    [Turn(("25 minutes.",)), Turn(calls=(("final_answer", {"answer": ""}),)), Turn(calls=(("final_answer", "{"),))],
    ids=["only text", "does not fit", "no JSON"],
)
def test_a_result_that_does_not_fit_is_repaired_once(client: Client, endpoint: ModelEndpoint, wrong: Turn) -> None:
    run_id = f"repair-{len(wrong.pieces)}-{len(str(wrong.calls))}"
    endpoint.script += [wrong, DONE]
    assert assist(client, f"{run_id}-well").succeeded
    last = endpoint.calls[1][2]["messages"][-1]
    assert last["role"] == ("tool" if wrong.calls else "user")
    assert ("final_answer" if not wrong.calls else "error: ") in last["content"]
    endpoint.script += [wrong, wrong]
    failed = assist(client, f"{run_id}-badly")
    assert failed.failure is not None
    assert failed.failure.type == "OutputInvalid"
    assert len(endpoint.calls) == 4


def test_a_model_that_never_ends_is_ended_by_the_budget(client: Client, url: str, endpoint: ModelEndpoint) -> None:
    endpoint.usage = (100_000, 50_000)
    endpoint.answers = lambda _body: Turn(calls=(("calculate", {"expression": "1 + 1"}),))
    run = assist(client, "never-ends")
    assert run.failure is not None
    assert (run.failure.type, run.failure.retryable) == ("BudgetExceeded", False)
    assert run.failure.message == "the run's budget is 300000 tokens; it has used 300000"
    assert len(endpoint.calls) == 2
    assert steps_of(log_of(url, run)) == ["tools.ask_model", "assistant.calculate", "tools.ask_model"]


def test_an_agent_can_be_a_tool_and_is_a_child_run_then(client: Client, url: str, endpoint: ModelEndpoint) -> None:
    endpoint.script += [Turn(calls=(("spender", {"steps": 2}),)), Turn(calls=(("final_answer", {"calls": 2}),))]
    run = client.wait(client.start("delegator", {"task": "spend"}, run_id="delegated"), timeout=60)
    assert run.succeeded, run.failure
    assert run.output == {"calls": 2}
    assert told(endpoint.calls[1]) == ["2"]
    (child,) = [event.data["child_run_id"] for event in log_of(url, run) if event.kind is EventKind.CHILD_STARTED]
    found = client.get(child)
    assert (found.agent, found.input, found.output) == ("spender", {"steps": 2}, 2)
    assert found.usage == Usage(input_tokens=20, output_tokens=2)


# ---- sub-agents ------------------------------------------------------------------------------------------------------

QUESTIONS = ["When do leases expire?", "Do leases FAIL?", "What are leases?"]


def brief(client: Client, run_id: str, questions: list[str]) -> Run:
    return client.start("briefing", {"topic": "Leases", "questions": questions}, run_id=run_id)


def failing_where_it_says_so(body: dict[str, Any]) -> int | str | Turn:
    asked = body["messages"][-1]["content"]
    if asked.startswith("Topic:"):
        return Turn(("All is ", "clear."))
    return 400 if "FAIL" in asked else Turn(("Fifteen seconds [1].",))


def test_a_briefing_has_its_questions_researched_by_children_and_tells_which_failed(
    client: Client, url: str, endpoint: ModelEndpoint
) -> None:
    endpoint.answers = failing_where_it_says_so
    run = client.wait(brief(client, "briefing", QUESTIONS), timeout=60)
    assert run.succeeded, run.failure
    output: Any = run.output
    assert output["summary"] == "All is clear."
    assert [section["question"] for section in output["sections"]] == QUESTIONS
    assert [bool(section["failure"]) for section in output["sections"]] == [False, True, False]
    assert output["sections"][0]["documents"] == ["leases.md"]
    log = log_of(url, run)
    children = sorted(event.data["child_run_id"] for event in log if event.kind is EventKind.CHILD_STARTED)
    found = [client.get(child) for child in children]
    assert [child.input["question"] for child in found] == QUESTIONS, "ids in the order of the questions"  # type: ignore[index, call-overload]
    assert [child.parent_run_id for child in found] == ["briefing"] * 3
    assert [child.state for child in found] == ["SUCCEEDED", "FAILED", "SUCCEEDED"]
    assert [child.usage for child in found] == [Usage(input_tokens=30, output_tokens=12), None] * 1 + [
        Usage(input_tokens=30, output_tokens=12)
    ]
    assert run.usage == Usage(input_tokens=30, output_tokens=12), "its own call; the children's are theirs"
    assert steps_of(log) == ["briefing.combine"]


def test_a_briefing_whose_every_question_fails_fails(client: Client, endpoint: ModelEndpoint) -> None:
    endpoint.answers = failing_where_it_says_so
    run = client.wait(brief(client, "briefing-fails", ["FAIL about leases", "FAIL when leases expire"]), timeout=60)
    assert run.failure is not None
    assert run.failure.type == "BriefingFailed"


def test_a_cancel_of_the_briefing_cancels_its_children(client: Client, url: str, endpoint: ModelEndpoint) -> None:
    endpoint.released.clear()
    endpoint.answers = lambda _body: "hold"
    run = brief(client, "briefing-cancelled", QUESTIONS)
    eventually(lambda: len(endpoint.calls) == 3, 30, what="every child asks the model")
    client.cancel(run)
    endpoint.released.set()
    assert client.wait(run, timeout=30).state == "CANCELLED"
    children = [
        event.data["child_run_id"]
        for event in judge.log_of(url, "default.briefing-cancelled.r")
        if event.kind is EventKind.CHILD_STARTED
    ]
    assert [client.wait(child, timeout=30).state for child in children] == ["CANCELLED"] * 3
