"""Decides how the research agents' documents are kept and found by their words, and where their reports are kept.

Every statement runs on PostgreSQL and CockroachDB alike. Vectors, which are optional, are in `document_vectors`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from perdure_service.errors import ConfigurationError
from perdure_service.store import document_readers, sqlstates
from perdure_service.store.document_chunks import Chunk, cut, cut_blocks
from perdure_service.store.document_process import DocumentProcess

TEXT_SUFFIXES = frozenset({".md", ".markdown", ".txt"})
SUFFIXES = TEXT_SUFFIXES | document_readers.KINDS.keys()
MAX_FILE_BYTES = 10 * 2**20
MAX_PDF_BYTES = 50 * 2**20
"""Pictures and fonts are the most of a large PDF."""
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
    """What `load_folder` did, in files. `chunks` are the new passages of the loaded ones.

    `failed` holds (path, why); of those stays what was loaded before.
    """

    loaded: int
    unchanged: int
    removed: int
    chunks: int
    failed: tuple[tuple[str, str], ...]


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_folder(
    engine: sa.Engine,
    folder: Path,
    report: Callable[[str], None],
    *,
    collection: str | None = None,
    reader: DocumentProcess | None = None,
) -> LoadReport:
    """Makes a collection equal to the documents of a folder and its subfolders, and returns what it did.

    Documents are the files of `SUFFIXES`: Markdown, text, HTML and PDF. Files and folders whose name begins with a dot
    are left out. Only files whose bytes have changed are read and written, each in a transaction of its own, so that
    it can be interrupted and repeated; the passages of the others stay as they are, with their ids and vectors.

    Args:
        engine: The database.
        folder: Where the files are.
        report: Is told a line about every file that was loaded, removed or could not be read.
        collection: What the files belong to; the folder's name by default. Documents of the collection that have no
            file any more are removed.
        reader: Reads HTML and PDF; by default one with the usual bounds.

    Raises:
        ConfigurationError: There is no such folder, or a package that it needs is missing.
        StoreUnavailable: The database is not there; what was loaded before stays.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is not a folder")
    collection = folder.resolve().name if collection is None else collection
    files = list(_files(folder))
    document_readers.check_installed(frozenset(path.suffix.lower() for path in files))
    known = _known_documents(engine, collection)
    with reader or DocumentProcess() as process:
        result = _load_files(engine, folder, files, collection, known, process, report)
    seen = {path.relative_to(folder).as_posix() for path in files}
    gone = sorted(known.keys() - seen)
    if gone:
        _remove(engine, [_document_id(collection, name) for name in gone])
    for name in gone:
        report(f"removed  {name}")
    return replace(result, removed=len(gone))


def _load_files(
    engine: sa.Engine,
    folder: Path,
    files: Sequence[Path],
    collection: str,
    known: Mapping[str, str],
    process: DocumentProcess,
    report: Callable[[str], None],
) -> LoadReport:
    """Loads those of the files that have changed."""
    failed: list[tuple[str, str]] = []
    loaded = unchanged = chunk_count = 0
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            content = _read(path)
            sha256 = hashlib.sha256(content).hexdigest()
            if known.get(name) == sha256:
                unchanged += 1
                continue
            title, chunks = _cut(path, content, process)
            new = _write(engine, collection, name, title, sha256, chunks)
        except (OSError, ValueError, sa.exc.DBAPIError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            failed.append((_printable(name), why))
            report(f"failed   {_printable(name)}: {why}")
            continue
        loaded += 1
        chunk_count += new
        report(f"loaded   {name}: {len(chunks)} passages" + (f", {new} new" if new < len(chunks) else ""))
    return LoadReport(loaded, unchanged, 0, chunk_count, tuple(failed))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix.lower() in SUFFIXES and path.is_file():
            yield path


def _read(path: Path) -> bytes:
    """Returns a file's content.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too long, or has a name that is not text.
    """
    path.as_posix().encode("utf-8")
    limit = MAX_PDF_BYTES if path.suffix.lower() == ".pdf" else MAX_FILE_BYTES
    if path.stat().st_size > limit:
        raise ValueError(f"is over {limit} bytes")
    return path.read_bytes()


def _cut(path: Path, content: bytes, process: DocumentProcess) -> tuple[str, list[Chunk]]:
    """Returns the title and the passages of a file.

    Raises:
        ValueError: It cannot be read, or is not text.
    """
    suffix = path.suffix.lower()
    if suffix in document_readers.KINDS:
        document = process.read(suffix, content)
        return cut_blocks(document.blocks, title=document.title or path.stem)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    if "\0" in text:
        raise ValueError("holds NUL characters, so it is not text")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return cut(text, title=path.stem, markdown=suffix != ".txt")


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _document_id(collection: str, path: str) -> str:
    return hashlib.sha256(f"{collection}\0{path}".encode()).hexdigest()[:32]


def _known_documents(engine: sa.Engine, collection: str) -> dict[str, str]:
    """Returns path and hash of every document of a collection."""
    query = sa.text("SELECT path, sha256 FROM perdure.document WHERE collection = :collection")

    def read(connection: sa.Connection) -> dict[str, str]:
        return {row.path: row.sha256 for row in connection.execute(query, {"collection": collection})}

    return sqlstates.reading(engine, "documents.known", read)


# Not ON CONFLICT (document_id) DO UPDATE: two loaders of a new file may meet at the other key, which that leaves out.
_INSERT_DOCUMENT = sa.text("""
    INSERT INTO perdure.document (document_id, collection, path, title, sha256, loaded_at)
    VALUES (:document_id, :collection, :path, :title, :sha256, now())
    ON CONFLICT DO NOTHING
""")
_CHANGE_DOCUMENT = sa.text("""
    UPDATE perdure.document SET title = :title, sha256 = :sha256, loaded_at = now() WHERE document_id = :document_id
""")
_KNOWN_CHUNKS = sa.text("SELECT chunk_id, ordinal FROM perdure.chunk WHERE document_id = :document_id")
_DELETE_CHUNKS = sa.text("DELETE FROM perdure.chunk WHERE chunk_id = ANY(CAST(:chunk_ids AS TEXT[]))")
_MOVE_CHUNKS = sa.text("""
    UPDATE perdure.chunk AS c SET ordinal = m.ordinal
    FROM unnest(CAST(:chunk_ids AS TEXT[]), CAST(:ordinals AS INT[])) AS m (chunk_id, ordinal)
    WHERE c.chunk_id = m.chunk_id
""")
_INSERT_CHUNKS = sa.text("""
    INSERT INTO perdure.chunk (chunk_id, document_id, ordinal, heading, body)
    SELECT c.chunk_id, :document_id, c.ordinal, c.heading, c.body
    FROM unnest(
      CAST(:chunk_ids AS TEXT[]), CAST(:ordinals AS INT[]), CAST(:headings AS TEXT[]), CAST(:bodies AS TEXT[])
    ) AS c (chunk_id, ordinal, heading, body)
""")


def _write(engine: sa.Engine, collection: str, path: str, title: str, sha256: str, chunks: Sequence[Chunk]) -> int:
    """Makes a document equal to its file and returns how many passages are new; others stay, with their vectors."""
    document_id = _document_id(collection, path)
    document = {
        "document_id": document_id, "collection": collection, "path": path, "title": title, "sha256": sha256,
    }  # fmt: skip
    wanted = _with_ids(document_id, chunks)

    def write(connection: sa.Connection) -> int:
        # The document first: its lock keeps a second loader of the same file waiting.
        connection.execute(_INSERT_DOCUMENT, document)
        connection.execute(_CHANGE_DOCUMENT, document)
        known = {row.chunk_id: row.ordinal for row in connection.execute(_KNOWN_CHUNKS, {"document_id": document_id})}
        gone = [chunk_id for chunk_id in known if chunk_id not in wanted]
        moved = {one: chunk.ordinal for one, chunk in wanted.items() if known.get(one, chunk.ordinal) != chunk.ordinal}
        new = {chunk_id: chunk for chunk_id, chunk in wanted.items() if chunk_id not in known}
        if gone:
            connection.execute(_DELETE_CHUNKS, {"chunk_ids": gone})
        if moved:
            connection.execute(_MOVE_CHUNKS, {"chunk_ids": list(moved), "ordinals": list(moved.values())})
        if new:
            passages = {
                "document_id": document_id,
                "chunk_ids": list(new),
                "ordinals": [chunk.ordinal for chunk in new.values()],
                "headings": [chunk.heading for chunk in new.values()],
                "bodies": [chunk.body for chunk in new.values()],
            }
            connection.execute(_INSERT_CHUNKS, passages)
        return len(new)

    return sqlstates.retrying(engine, "documents.write", write)


def _with_ids(document_id: str, chunks: Sequence[Chunk]) -> dict[str, Chunk]:
    """Returns passages by their ids, which are made of their words: an old report's source never points to others."""
    found: dict[str, Chunk] = {}
    for chunk in chunks:
        digest = hashlib.sha256(f"{chunk.heading}\0{chunk.body}".encode()).hexdigest()[:16]
        base = f"{document_id[:16]}-{digest}"
        chunk_id, copy = base, 1
        while chunk_id in found:  # the same words again, under the same heading
            copy += 1
            chunk_id = f"{base}-{copy}"
        found[chunk_id] = chunk
    return found


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

# The id is the key of a step: a repeat saves the same again, and another report under it is of a later run that was
# started under the id of a deleted one.
_SAVE_REPORT = sa.text("""
    INSERT INTO perdure.report AS r (report_id, workflow_id, question, answer, sources)
    VALUES (:report_id, :workflow_id, :question, :answer, CAST(:sources AS JSONB))
    ON CONFLICT (report_id) DO UPDATE
    SET question = excluded.question, answer = excluded.answer, sources = excluded.sources,
        created_at = excluded.created_at
    WHERE r.question <> excluded.question OR r.answer <> excluded.answer OR r.sources <> excluded.sources
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
    """Saves a report, once: the same again changes nothing, another one of the same `report_id` replaces it.

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
        connection.execute(_SAVE_REPORT, report)

    sqlstates.retrying(engine, "documents.save_report", save)
