"""Decides how the research agents' documents are kept and found by their words, and where their reports are kept.

Every statement runs on PostgreSQL and CockroachDB alike. Vectors, which are optional, are in `document_vectors`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from perdure_service.errors import ConfigurationError
from perdure_service.store import sqlstates
from perdure_service.store.document_chunks import Chunk, cut

SUFFIXES = frozenset({".md", ".markdown", ".txt"})
MAX_FILE_BYTES = 10 * 2**20
MAX_PASSAGES = 100

DOCUMENT_MIGRATION_STATEMENTS: tuple[str, ...] = (
    """CREATE TABLE IF NOT EXISTS perdure.document (
         document_id TEXT PRIMARY KEY,
         collection TEXT NOT NULL,
         path TEXT NOT NULL,
         title TEXT NOT NULL,
         sha256 TEXT NOT NULL,
         loaded_at TIMESTAMPTZ NOT NULL DEFAULT now(),
         UNIQUE (collection, path)
       )""",
    """CREATE TABLE IF NOT EXISTS perdure.chunk (
         chunk_id TEXT PRIMARY KEY,
         document_id TEXT NOT NULL REFERENCES perdure.document (document_id) ON DELETE CASCADE,
         ordinal INT NOT NULL,
         heading TEXT NOT NULL,
         body TEXT NOT NULL,
         search TSVECTOR GENERATED ALWAYS AS (to_tsvector('english', heading || ' ' || body)) STORED
       )""",
    "CREATE INDEX IF NOT EXISTS chunk_by_document ON perdure.chunk (document_id, ordinal)",
    "CREATE INDEX IF NOT EXISTS chunk_by_words ON perdure.chunk USING GIN (search)",
)
"""The schema of documents, one idempotent statement each."""

REPORT_MIGRATION_STATEMENTS: tuple[str, ...] = (
    """CREATE TABLE IF NOT EXISTS perdure.report (
         report_id TEXT PRIMARY KEY,
         workflow_id TEXT NOT NULL,
         question TEXT NOT NULL,
         answer TEXT NOT NULL,
         sources JSONB NOT NULL,
         created_at TIMESTAMPTZ NOT NULL DEFAULT now()
       )""",
)
"""The schema of what the research agents publish."""

_LEXEME = re.compile(r"'(?:[^'\\]|''|\\.)*'", re.DOTALL)
"""A quoted lexeme in the text form of a tsvector, with the escapes that the text form of a tsquery has too."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document that was found. `score` compares within one search only; higher is better."""

    chunk_id: str
    document: str
    title: str
    heading: str
    body: str
    score: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load_folder` did, in files. `failed` holds (path, why); of those stays what was loaded before."""

    loaded: int
    unchanged: int
    removed: int
    chunks: int
    failed: tuple[tuple[str, str], ...]


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_folder(
    engine: sa.Engine, folder: Path, report: Callable[[str], None], *, collection: str | None = None
) -> LoadReport:
    """Makes a collection equal to the Markdown and text files of a folder and its subfolders, and returns what it did.

    Files and folders whose name begins with a dot are left out. Only changed files are written, each in a transaction
    of its own, so that it can be interrupted and repeated.

    Args:
        engine: The database.
        folder: Where the files are.
        report: Is told a line about every file that was loaded, removed or could not be read.
        collection: What the files belong to; the folder's name by default. Documents of the collection that have no
            file any more are removed.

    Raises:
        ConfigurationError: There is no such folder.
        StoreUnavailable: The database is not there; what was loaded before stays.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is not a folder")
    collection = folder.resolve().name if collection is None else collection
    known = _known_documents(engine, collection)
    failed: list[tuple[str, str]] = []
    loaded = unchanged = chunk_count = 0
    seen: set[str] = set()
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        seen.add(name)
        try:
            text, sha256 = _read(path)
            if known.get(name) == sha256:
                unchanged += 1
                continue
            title, chunks = cut(text, title=path.stem, markdown=path.suffix.lower() != ".txt")
            _write(engine, collection, name, title, sha256, chunks)
        except (OSError, ValueError, sa.exc.DBAPIError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            failed.append((_printable(name), why))
            report(f"failed   {_printable(name)}: {why}")
            continue
        loaded += 1
        chunk_count += len(chunks)
        report(f"loaded   {name}: {len(chunks)} passages")
    gone = sorted(known.keys() - seen)
    if gone:
        _remove(engine, [_document_id(collection, name) for name in gone])
    for name in gone:
        report(f"removed  {name}")
    return LoadReport(loaded, unchanged, len(gone), chunk_count, tuple(failed))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix.lower() in SUFFIXES and path.is_file():
            yield path


def _read(path: Path) -> tuple[str, str]:
    """Returns a file's text and the hash of its bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too long or not text.
    """
    path.as_posix().encode("utf-8")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"is over {MAX_FILE_BYTES} bytes")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    if "\0" in text:
        raise ValueError("holds NUL characters, so it is not text")
    return text.replace("\r\n", "\n").replace("\r", "\n"), hashlib.sha256(content).hexdigest()


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _document_id(collection: str, path: str) -> str:
    return hashlib.sha256(f"{collection}\0{path}".encode()).hexdigest()[:32]


def _known_documents(engine: sa.Engine, collection: str) -> dict[str, str]:
    """Returns path and hash of every document of a collection."""
    query = sa.text("SELECT path, sha256 FROM perdure.document WHERE collection = :collection")

    def read(connection: sa.Connection) -> dict[str, str]:
        return {row.path: row.sha256 for row in connection.execute(query, {"collection": collection})}

    return sqlstates.retrying(engine, "documents.known", read)


_UPSERT_DOCUMENT = sa.text("""
    INSERT INTO perdure.document (document_id, collection, path, title, sha256, loaded_at)
    VALUES (:document_id, :collection, :path, :title, :sha256, now())
    ON CONFLICT (document_id) DO UPDATE
    SET title = excluded.title, sha256 = excluded.sha256, loaded_at = excluded.loaded_at
""")
_DELETE_CHUNKS = sa.text("DELETE FROM perdure.chunk WHERE document_id = :document_id")
_INSERT_CHUNKS = sa.text("""
    INSERT INTO perdure.chunk (chunk_id, document_id, ordinal, heading, body)
    SELECT c.chunk_id, :document_id, c.ordinal, c.heading, c.body
    FROM unnest(
      CAST(:chunk_ids AS TEXT[]), CAST(:ordinals AS INT[]), CAST(:headings AS TEXT[]), CAST(:bodies AS TEXT[])
    ) AS c (chunk_id, ordinal, heading, body)
""")


def _write(engine: sa.Engine, collection: str, path: str, title: str, sha256: str, chunks: Sequence[Chunk]) -> None:
    document_id = _document_id(collection, path)
    document = {
        "document_id": document_id, "collection": collection, "path": path, "title": title, "sha256": sha256,
    }  # fmt: skip
    passages = {
        "document_id": document_id,
        # The content is in the id, so that an old report's source never points to other words.
        "chunk_ids": [f"{document_id[:16]}-{sha256[:8]}-{chunk.ordinal}" for chunk in chunks],
        "ordinals": [chunk.ordinal for chunk in chunks],
        "headings": [chunk.heading for chunk in chunks],
        "bodies": [chunk.body for chunk in chunks],
    }

    def write(connection: sa.Connection) -> None:
        # The document first: its lock keeps a second loader of the same file waiting.
        connection.execute(_UPSERT_DOCUMENT, document)
        connection.execute(_DELETE_CHUNKS, {"document_id": document_id})
        if chunks:
            connection.execute(_INSERT_CHUNKS, passages)

    sqlstates.retrying(engine, "documents.write", write)


def _remove(engine: sa.Engine, document_ids: Sequence[str]) -> None:
    statement = sa.text("DELETE FROM perdure.document WHERE document_id = ANY(CAST(:ids AS TEXT[]))")

    def remove(connection: sa.Connection) -> None:
        connection.execute(statement, {"ids": list(document_ids)})

    sqlstates.retrying(engine, "documents.remove", remove)


# ---- finding ---------------------------------------------------------------------------------------------------------

_TO_LEXEMES = sa.text("SELECT CAST(to_tsvector('english', :question) AS TEXT)")
_SEARCH = sa.text("""
    SELECT c.chunk_id, d.path, d.title, c.heading, c.body, ts_rank(c.search, CAST(:words AS TSQUERY)) AS score
    FROM perdure.chunk AS c JOIN perdure.document AS d ON d.document_id = c.document_id
    WHERE c.search @@ CAST(:words AS TSQUERY)
    ORDER BY score DESC, c.chunk_id
    LIMIT :limit
""")


def search(engine: sa.Engine, question: str, limit: int) -> list[Passage]:
    """Returns the passages that share words with a question, those that share more of them first.

    Any of the words will do, in any of their English forms, and words like "the" do not count: PostgreSQL's
    `websearch_to_tsquery` would ask for all of them, and CockroachDB does not have it.

    Args:
        engine: The database.
        question: Any text; nothing in it is an operator.
        limit: Passages at most, up to `MAX_PASSAGES`.

    Raises:
        StoreUnavailable: The database is not there; try again later.
    """
    parameters = {"question": _storable(question), "limit": max(1, min(limit, MAX_PASSAGES))}

    def find(connection: sa.Connection) -> list[Passage]:
        lexemes = _LEXEME.findall(connection.execute(_TO_LEXEMES, parameters).scalar_one())
        if not lexemes:
            return []
        rows = connection.execute(_SEARCH, {"words": " | ".join(lexemes), "limit": parameters["limit"]})
        return [passage_of(row) for row in rows]

    return sqlstates.retrying(engine, "documents.search", find)


def passage_of(row: sa.Row[Any]) -> Passage:
    """Returns the passage in a row of chunk_id, path, title, heading, body, score."""
    return Passage(row.chunk_id, row.path, row.title, row.heading, row.body, float(row.score))


def _storable(text: str) -> str:
    """Returns the text without what the databases' TEXT cannot hold: NUL, and halves of surrogate pairs."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode()


# ---- reports ---------------------------------------------------------------------------------------------------------

_INSERT_REPORT = sa.text("""
    INSERT INTO perdure.report (report_id, workflow_id, question, answer, sources)
    VALUES (:report_id, :workflow_id, :question, :answer, CAST(:sources AS JSONB))
    ON CONFLICT (report_id) DO NOTHING
""")


def save_report(
    engine: sa.Engine,
    *,
    report_id: str,
    workflow_id: str,
    question: str,
    answer: str,
    sources: Sequence[Mapping[str, Any]],
) -> None:
    """Saves a report, once: the same `report_id` again changes nothing.

    Raises:
        StoreUnavailable: The database is not there; try again later, which is safe.
    """
    report = {
        "report_id": report_id,
        "workflow_id": workflow_id,
        "question": _storable(question),
        "answer": _storable(answer),
        "sources": json.dumps([dict(source) for source in sources]),
    }

    def save(connection: sa.Connection) -> None:
        connection.execute(_INSERT_REPORT, report)

    sqlstates.retrying(engine, "documents.save_report", save)
