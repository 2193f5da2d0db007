"""The plainest agent: ordinary DBOS code, which the last line puts into the catalogue as it is."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from dbos import DBOS

from perdure_service.agents import expose, models, run
from perdure_service.agents.resources import resources
from perdure_service.store import documents
from perdure_service.store.documents import Passage


@DBOS.step(retries_allowed=True)
def find_passages(question: str, limit: int) -> list[dict[str, Any]]:
    """Finds what the documents say."""
    return [asdict(passage) for passage in documents.search(resources().engine, question, limit)]


@DBOS.step(retries_allowed=True, max_attempts=4)
def call_model(question: str, passages: list[dict[str, Any]]) -> str:
    """Has the note written, by the model that is set or of quotes."""
    found = [Passage(**passage) for passage in passages]
    asked = models.answer(question, found, resources().settings.model, lambda _: None, run.usage)
    return asyncio.run(asked).text


@DBOS.step(retries_allowed=True, max_attempts=10)
def save_note(question: str, note: str, passages: list[dict[str, Any]]) -> str:
    """Saves the note under a key that a second try has too."""
    note_id = f"{DBOS.workflow_id}:{DBOS.step_id}"
    sources = [{"document": passage["document"], "chunk_id": passage["chunk_id"]} for passage in passages]
    documents.save_report(
        resources().engine,
        report_id=note_id,
        workflow_id=str(DBOS.workflow_id),
        question=question,
        answer=note,
        sources=sources,
    )
    return note_id


@DBOS.workflow()
def notes(question: str, limit: int = 3) -> dict[str, Any]:
    """Writes a note about a question from the loaded documents, without asking anybody."""
    DBOS.set_event("progress", {"message": "Searching", "completed": 0, "total": 3})
    passages = find_passages(question, limit)
    DBOS.set_event("progress", {"message": "Writing", "completed": 1, "total": 3})
    note = call_model(question, passages) if passages else "The documents say nothing about this."
    DBOS.set_event("progress", {"message": "Saving", "completed": 2, "total": 3})
    note_id = save_note(question, note, passages)
    return {"note_id": note_id, "note": note}


expose(notes, name="notes", version="1")
