"""The research agent: finds passages, has an answer written from them, asks a person, and publishes it as a report.

A refused answer is an outcome and not a failure: the run succeeds with `approved` false, and nothing is kept but the
run itself. The same when nothing was found; then nobody is asked.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from dbos import DBOS
from pydantic import BaseModel, ConfigDict, Field

from perdure_service.agents import agent, chat, models, run
from perdure_service.agents.embedder import embedder_of
from perdure_service.agents.resources import Resources, resources
from perdure_service.errors import ConfigurationError, PerdureError
from perdure_service.store import document_vectors, documents
from perdure_service.store.documents import Passage

STAGES = 4
NOTHING_FOUND = (
    "No document that was loaded has anything to do with this question. "
    "An operator loads documents with `perdure-server documents load DIR`."
)
_FUSION_CONSTANT = 60
"""Of reciprocal rank fusion, as its authors found it (Cormack, Clarke, Büttcher, SIGIR 2009)."""


class ResearchRequest(BaseModel):
    """What to find out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1, max_length=2_000, description="The question, in plain words.")
    limit: int = Field(default=6, ge=1, le=20, description="Passages to answer from, at most.")
    require_approval: bool = Field(default=True, description="Whether a person decides if the answer is published.")
    approval_timeout_s: float = Field(
        default=172_800,
        gt=0,
        le=31_536_000,
        description="Seconds that person has; after them the answer is not published.",
    )


class Source(BaseModel):
    """A passage that the answer rests on."""

    model_config = ConfigDict(frozen=True)

    document: str = Field(description="The document's path in its collection.")
    heading: str = Field(description="The headings above the passage, from the document's title down.")
    chunk_id: str = Field(description="The passage; another one as soon as the document's text changes.")
    quote: str = Field(description="The sentence of the passage that is nearest to the question.")


class ResearchReport(BaseModel):
    """What was found out."""

    model_config = ConfigDict(frozen=True)

    question: str
    answer: str
    sources: list[Source]
    model: str = Field(description="The model that wrote the answer; `extractive` when it is quotes and no model was.")
    approved: bool = Field(description="Whether the answer was published. False: refused, not decided, or no answer.")
    approved_by: str = Field(default="", description="Who approved it; empty when nobody was asked.")
    report_id: str = Field(default="", description="The published report; empty when it was not.")


@agent(name="research", version="1", max_steps=10, max_tokens=200_000)
async def research(request: ResearchRequest) -> ResearchReport:
    """Answers a question from the loaded documents, with sources, after a person's approval."""
    run.progress("Searching the documents", 0, STAGES)
    passages = await retrieve(request.question, request.limit)
    if not passages:
        run.progress("Nothing found", STAGES, STAGES)
        return ResearchReport(
            question=request.question, answer=NOTHING_FOUND, sources=[], model=models.EXTRACTIVE, approved=False
        )
    run.progress(f"Writing from {len(passages)} passages", 1, STAGES)
    draft = await write(request.question, passages)
    approved_by = ""
    if request.require_approval:
        run.progress("Waiting for approval", 2, STAGES)
        decision = await run.approval(
            "Publish this answer?",
            payload={"question": request.question, **draft},
            timeout=timedelta(seconds=request.approval_timeout_s),
        )
        if not decision.approved:
            run.progress("Not published", STAGES, STAGES)
            return ResearchReport(question=request.question, **draft, approved=False)
        approved_by = decision.decided_by
    run.progress("Publishing", 3, STAGES)
    report_id = await publish(request.question, draft)
    run.progress("Published", STAGES, STAGES)
    return ResearchReport(
        question=request.question, **draft, approved=True, approved_by=approved_by, report_id=report_id
    )


def may_help(error: BaseException) -> bool:
    """Returns whether to try a step again: not when the server itself is set up wrongly."""
    return not isinstance(error, ConfigurationError) and (
        not isinstance(error, PerdureError) or error.retry_delay_s is not None
    )


@DBOS.step(name="research.retrieve", retries_allowed=True, max_attempts=5, interval_seconds=0.5, should_retry=may_help)
async def retrieve(question: str, limit: int) -> list[dict[str, Any]]:
    """Returns the passages to answer from, the best first."""
    found = await asyncio.to_thread(find, resources(), question, limit)
    return [asdict(passage) for passage in found]


@DBOS.step(
    name="research.write", retries_allowed=True, max_attempts=4, interval_seconds=1.0, should_retry=chat.is_transient
)
async def write(question: str, passages: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns answer, model and sources; watchers see the answer as it is written."""
    found = [Passage(**passage) for passage in passages]
    stream = run.output("answer")
    answer = await models.answer(question, found, resources().settings.model, stream.write, run.usage)
    sources = [_source(question, found[index]) for index in answer.cited]
    return {"answer": answer.text, "model": answer.model, "sources": sources}


@DBOS.step(name="research.publish", retries_allowed=True, max_attempts=10, interval_seconds=0.5, should_retry=may_help)
async def publish(question: str, draft: dict[str, Any]) -> str:
    """Saves the report and returns its id: this step's key, so that a second try finds the first one's report."""
    report_id = run.idempotency_key()
    await asyncio.to_thread(
        documents.save_report,
        resources().engine,
        report_id=report_id,
        workflow_id=str(DBOS.workflow_id),
        question=question,
        answer=draft["answer"],
        sources=draft["sources"],
    )
    return report_id


def find(available: Resources, question: str, limit: int) -> list[Passage]:
    """Returns what words find and, with an embedder, what meaning finds, merged by rank."""
    by_words = documents.search(available.engine, question, limit)
    embedder = embedder_of(available.settings.embedder)
    if embedder is None:
        return by_words
    try:
        vector = embedder.question(question)
        by_meaning = document_vectors.search_vectors(available.engine, vector, embedder.name, limit)
    except PerdureError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever an embedder raises
        # The embedder is an addition; an answer from words alone is better than none.
        run.log(f"searched by words only, as the embedder failed: {type(error).__name__}: {error}", "warning")
        return by_words
    return _fused([by_words, by_meaning])[:limit]


def _fused(rankings: list[list[Passage]]) -> list[Passage]:
    scores: dict[str, float] = {}
    passages: dict[str, Passage] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, start=1):
            passages.setdefault(passage.chunk_id, passage)
            scores[passage.chunk_id] = scores.get(passage.chunk_id, 0.0) + 1 / (_FUSION_CONSTANT + rank)
    return sorted(passages.values(), key=lambda passage: (-scores[passage.chunk_id], passage.chunk_id))


def _source(question: str, passage: Passage) -> dict[str, Any]:
    return {
        "document": passage.document,
        "heading": passage.heading,
        "chunk_id": passage.chunk_id,
        "quote": models.best_sentence(question, passage),
    }
