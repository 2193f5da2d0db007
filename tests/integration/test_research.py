"""The shipped agents under plain DBOS, with a double of what a run offers: the real one is tested with the server."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from dbos import DBOS, SetWorkflowID
from perdure_service.agents import agent, catalogue, context, resources
from perdure_service.agents.embedder import EndpointEmbedder
from perdure_service.agents.notes import notes
from perdure_service.agents.research import NOTHING_FOUND, ResearchReport, ResearchRequest, research
from perdure_service.agents.resources import Resources
from perdure_service.domain.approvals import ApprovalResult, ApprovalState
from perdure_service.domain.runs import uuid7
from perdure_service.settings import EmbedderSettings, Settings
from perdure_service.store import document_vectors, documents
from perdure_service.store.engine import create_engine
from pydantic import BaseModel

from tests.helpers.databases import not_in_another_form
from tests.integration.test_research_endpoint import PIECES, ModelEndpoint, serving

QUESTION = "When does the lease of a killed process expire?"
FILES = {
    "leases.md": "# Leases\n\n## Expiry\n\nWhen a process was killed, its lease expires after fifteen seconds.\n",
    "approvals.md": "# Approvals\n\nUndecided approvals expire after two days.\n",
}


class Stream:
    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write


class RunDouble:
    """`RunContext` on plain DBOS: approvals are messages, everything else is remembered by workflow."""

    def __init__(self) -> None:
        self.said: dict[str, list[str]] = defaultdict(list)
        self.written: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self.used: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        self.asked: dict[str, dict[str, Any]] = {}

    @property
    def id(self) -> str:
        assert DBOS.workflow_id is not None
        return DBOS.workflow_id

    namespace = "default"

    def progress(self, message: str, completed: int = 0, total: int = 0) -> None:
        self.said[self.id].append(f"{message} {completed}/{total}")

    def log(self, message: str, level: str = "info") -> None:
        self.said[self.id].append(f"{level}: {message}")

    def usage(self, *, input_tokens: int, output_tokens: int, model: str = "") -> None:
        self.used[self.id].append((input_tokens, output_tokens, model))

    def output(self, stream: str = "output") -> Stream:
        assert stream == "answer"
        attempt = (DBOS.step_status.current_attempt or 0) + 1 if DBOS.step_status else 0
        run_id = self.id
        return Stream(lambda text: self.written[run_id].append((attempt, text)))

    async def approval(
        self,
        title: str,
        *,
        payload: Any = None,
        timeout: timedelta | None = None,  # noqa: ASYNC109
        assignees: Sequence[str] = (),
        **_: Any,
    ) -> ApprovalResult:
        self.asked[self.id] = {"title": title, "payload": payload, "timeout": timeout}
        assert timeout is not None
        said = await DBOS.recv_async("approval", timeout_seconds=timeout.total_seconds())
        if said is None:
            return ApprovalResult(False, ApprovalState.EXPIRED)
        return ApprovalResult(said["approve"], ApprovalState.APPROVED, said["by"])

    async def signal(self, name: str, *, timeout: timedelta | None = None) -> Any:  # noqa: ASYNC109
        raise NotImplementedError

    def idempotency_key(self) -> str:
        assert DBOS.step_id is not None
        return f"{self.id}:{DBOS.step_id}"


@pytest.fixture(scope="module")
def engine(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """A database with documents, and DBOS running on it."""
    engine = create_engine(database_url, pool_size=8, statement_timeout=timedelta(seconds=30))
    folder = tmp_path_factory.mktemp("documents")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    documents.load_folder(engine, folder, lambda _: None)
    DBOS(
        config={
            "name": "research-tests",
            "system_database_engine": engine,
            "system_database_url": database_url,
            "application_version": "1",
            "executor_id": f"tests-{uuid7()}",
            "log_level": "ERROR",
        }
    )
    DBOS.launch()
    yield engine
    DBOS.destroy()
    engine.dispose()


@pytest.fixture
def run(engine: sa.Engine) -> Iterator[RunDouble]:
    double = RunDouble()
    previous = context.bind(lambda: double if DBOS.workflow_id else None)
    resources.bind(Resources(engine, Settings()))
    yield double
    resources.bind(None)
    context.bind(previous)


@pytest.fixture
def endpoint(engine: sa.Engine, run: RunDouble) -> Iterator[ModelEndpoint]:
    with serving() as endpoint:
        resources.bind(Resources(engine, Settings(model=endpoint.settings())))
        yield endpoint


def start(workflow: Callable[..., Any], **arguments: Any) -> Any:
    with SetWorkflowID(f"local-{uuid7()}"):
        return DBOS.start_workflow(workflow, **arguments)


def decide(run_id: str, approve: bool) -> None:
    DBOS.send(run_id, {"approve": approve, "by": "ann"}, topic="approval")


def reports(engine: sa.Engine, run_id: str) -> list[tuple[str, str, Any]]:
    query = sa.text("SELECT report_id, answer, sources FROM perdure.report WHERE workflow_id = :id")
    with engine.connect() as connection:
        return [(row.report_id, row.answer, row.sources) for row in connection.execute(query, {"id": run_id})]


def steps(run_id: str) -> list[str]:
    return [step["function_name"] for step in DBOS.list_workflow_steps(run_id)]


def test_an_approved_answer_is_published_with_its_sources(
    engine: sa.Engine, run: RunDouble, endpoint: ModelEndpoint
) -> None:
    handle = start(research, request={"question": QUESTION, "limit": 2})
    decide(handle.workflow_id, True)
    report = ResearchReport.model_validate(handle.get_result())
    assert report.answer == "".join(PIECES)
    assert (report.model, report.approved, report.approved_by) == ("small-2", True, "ann")
    assert [source.document for source in report.sources] == ["approvals.md"], "the one that the answer names, [2]"
    assert report.sources[0].quote == "Undecided approvals expire after two days."
    assert reports(engine, handle.workflow_id) == [
        (report.report_id, report.answer, [source.model_dump() for source in report.sources])
    ]
    assert report.report_id.startswith(f"{handle.workflow_id}:")
    asked = run.asked[handle.workflow_id]
    assert asked["timeout"] == timedelta(days=2)
    assert asked["payload"]["question"] == QUESTION
    assert asked["payload"]["answer"] == report.answer
    assert run.written[handle.workflow_id] == [(1, piece) for piece in PIECES]
    assert [said.rsplit(" ", 1)[1] for said in run.said[handle.workflow_id]] == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    assert [step for step in steps(handle.workflow_id) if not step.startswith("DBOS.")] == [
        "research.retrieve", "research.write", "research.publish",
    ]  # fmt: skip
    assert len(endpoint.calls) == 1


def test_a_refused_answer_is_an_outcome_and_is_not_kept(engine: sa.Engine, run: RunDouble) -> None:
    handle = start(research, request={"question": QUESTION})
    decide(handle.workflow_id, False)
    report = ResearchReport.model_validate(handle.get_result())
    assert (report.approved, report.approved_by, report.report_id) == (False, "", "")
    assert report.answer
    assert reports(engine, handle.workflow_id) == []
    assert "research.publish" not in steps(handle.workflow_id)


def test_so_is_one_that_nobody_decides_about(engine: sa.Engine, run: RunDouble) -> None:
    handle = start(research, request={"question": QUESTION, "approval_timeout_s": 0.05})
    assert not handle.get_result()["approved"]
    assert reports(engine, handle.workflow_id) == []


def test_without_a_model_the_answer_is_quotes(engine: sa.Engine, run: RunDouble) -> None:
    handle = start(research, request={"question": QUESTION, "require_approval": False})
    report = ResearchReport.model_validate(handle.get_result())
    assert (report.model, report.approved, report.approved_by) == ("extractive", True, "")
    assert "No model was asked." in report.answer
    assert "“When a process was killed, its lease expires after fifteen seconds.” [1]" in report.answer
    assert report.sources[0].document == "leases.md"
    assert run.asked == {}
    assert "".join(text for _, text in run.written[handle.workflow_id]) == report.answer


def test_nothing_found_asks_nobody(run: RunDouble, endpoint: ModelEndpoint) -> None:
    handle = start(research, request={"question": "Xylophone?"})
    report = ResearchReport.model_validate(handle.get_result())
    assert (report.answer, report.approved, report.sources) == (NOTHING_FOUND, False, [])
    assert endpoint.calls == []
    assert run.asked == {}


def test_a_failed_call_is_repeated_and_each_attempt_streams_by_itself(run: RunDouble, endpoint: ModelEndpoint) -> None:
    endpoint.script.extend([503, "cut"])
    handle = start(research, request={"question": QUESTION, "require_approval": False})
    assert handle.get_result()["answer"] == "".join(PIECES)
    assert len(endpoint.calls) == 3
    written = run.written[handle.workflow_id]
    assert [text for attempt, text in written if attempt == 2] == list(PIECES[:-1])
    assert [text for attempt, text in written if attempt == 3] == list(PIECES)


def test_a_call_that_cannot_succeed_is_made_once_and_fails_the_run(run: RunDouble, endpoint: ModelEndpoint) -> None:
    endpoint.script.extend([401] * 9)
    handle = start(research, request={"question": QUESTION})
    with pytest.raises(Exception, match="401"):
        handle.get_result()
    assert len(endpoint.calls) == 1


def test_a_replay_repeats_no_step(run: RunDouble, endpoint: ModelEndpoint) -> None:
    handle = start(research, request={"question": QUESTION, "require_approval": False})
    first = handle.get_result()
    again = DBOS.fork_workflow(handle.workflow_id, 4)
    assert again.get_result() == first
    assert len(endpoint.calls) == 1


def test_a_failing_embedder_leaves_the_words(engine: sa.Engine, run: RunDouble, endpoint: ModelEndpoint) -> None:
    embedder = EmbedderSettings(base_url=endpoint.url, dimensions=2)
    resources.bind(Resources(engine, Settings(embedder=embedder)))
    endpoint.script.extend([400])
    handle = start(research, request={"question": QUESTION, "require_approval": False})
    assert handle.get_result()["sources"]
    assert any(said.startswith("warning: searched by words only") for said in run.said[handle.workflow_id])


@not_in_another_form
def test_meaning_and_words_are_searched_together(engine: sa.Engine, run: RunDouble, endpoint: ModelEndpoint) -> None:
    settings = EmbedderSettings(base_url=endpoint.url, dimensions=2)
    resources.bind(Resources(engine, Settings(embedder=settings)))
    document_vectors.create_vectors(engine, 2)
    document_vectors.embed_passages(engine, EndpointEmbedder(settings), lambda _: None)
    handle = start(research, request={"question": "fifteen", "require_approval": False, "limit": 2})
    # Full text finds one of them only.
    assert len(documents.search(engine, "fifteen", 9)) == 1
    found = DBOS.list_workflow_steps(handle.get_result() and handle.workflow_id)[0]["output"]
    assert {passage["document"] for passage in found} == set(FILES)
    assert found[0]["document"] == "leases.md"


# ---- notes, the plain workflow ---------------------------------------------------------------------------------------


def test_notes_is_ordinary_dbos_code_exposed_as_it_is(
    engine: sa.Engine, run: RunDouble, endpoint: ModelEndpoint
) -> None:
    registered = catalogue.find("notes")
    assert registered is not None
    assert registered.workflow is notes
    assert registered.workflow_name == "notes"
    handle = start(notes, **registered.arguments({"question": QUESTION}))
    result = handle.get_result()
    assert handle.get_status().name == "notes"
    assert result["note"] == "".join(PIECES)
    assert [report_id for report_id, _, _ in reports(engine, handle.workflow_id)] == [result["note_id"]]
    assert DBOS.get_event(handle.workflow_id, "progress", 1) == {"message": "Saving", "completed": 2, "total": 3}
    assert [step for step in steps(handle.workflow_id) if not step.startswith("DBOS.")] == [
        "find_passages", "call_model", "save_note",
    ]  # fmt: skip


# ---- agents that call agents -----------------------------------------------------------------------------------------


class Answers(BaseModel):
    reports: list[ResearchReport]


@agent(name="asks-research")
async def asks_research(questions: list[str]) -> Answers:
    """Asks the research agent each of the questions."""
    found = [await research(ResearchRequest(question=question, require_approval=False)) for question in questions]
    assert all(type(report) is ResearchReport for report in found)
    return Answers(reports=found)


@agent(name="shouts")
def shouts(word: str, *, times: int = 2) -> tuple[str, ...]:
    """Shouts."""
    return (word.upper(),) * times


@agent(name="asks-shouts")
def asks_shouts(word: str) -> dict[str, Any]:
    """Lets another agent shout."""
    shouted = shouts(word, times=3)
    return {"is_tuple": isinstance(shouted, tuple), "shouted": shouted}


def test_a_child_is_called_with_types_and_answers_with_types_live_and_in_replay(run: RunDouble) -> None:
    handle = start(asks_research, questions=[QUESTION, "Undecided approvals?"])
    first = handle.get_result()
    assert [report["question"] for report in first["reports"]] == [QUESTION, "Undecided approvals?"]
    children = [step["child_workflow_id"] for step in DBOS.list_workflow_steps(handle.workflow_id)]
    assert len({child for child in children if child}) == 2
    child = DBOS.retrieve_workflow(next(child for child in children if child)).get_status()
    assert child.name == "research@1"
    assert child.input == {
        "args": (),
        "kwargs": {"request": ResearchRequest(question=QUESTION, require_approval=False).model_dump(mode="json")},
    }
    last = len(children)
    assert DBOS.fork_workflow(handle.workflow_id, last + 1).get_result() == first


def test_a_sync_agent_calls_a_sync_agent() -> None:
    registered = catalogue.find("asks-shouts")
    assert registered is not None
    handle = start(asks_shouts, **registered.arguments({"word": "go"}))
    assert handle.get_result() == {"is_tuple": True, "shouted": ["GO", "GO", "GO"]}
    again = DBOS.fork_workflow(handle.workflow_id, len(DBOS.list_workflow_steps(handle.workflow_id)) + 1)
    assert again.get_result() == handle.get_result()


def test_an_agent_called_from_outside_is_a_run_with_typed_values(engine: sa.Engine) -> None:
    assert shouts("hey") == ("HEY", "HEY")


def test_a_stored_input_that_no_longer_fits_fails_the_run_with_the_reason(run: RunDouble) -> None:
    handle = start(research, request={"question": ""})
    with pytest.raises(Exception, match="at least 1 character"):
        handle.get_result()
