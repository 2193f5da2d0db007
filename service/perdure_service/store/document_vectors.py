"""Decides how passages are found by meaning: one vector for each, made by an embedder, in pgvector or CockroachDB."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sqlalchemy as sa
import structlog

from perdure_service.errors import ConfigurationError
from perdure_service.store import sqlstates
from perdure_service.store.documents import MAX_PASSAGES, Passage, passage_of
from perdure_service.store.engine import is_cockroach

EMBED_BATCH = 64
"""Passages sent to the embedder at once: about 20,000 tokens, under the limits of the endpoints we know."""

_VECTOR_LENGTH = re.compile(r"\((\d+)\)")

log = structlog.get_logger(__name__)


class Embedder(Protocol):
    """What turns text into vectors of `dimensions` numbers. Calls block, and may raise whatever the embedder raises."""

    @property
    def name(self) -> str:
        """The model; vectors of two models are never compared."""

    @property
    def dimensions(self) -> int:
        """The length of every vector."""

    def passages(self, texts: Sequence[str]) -> list[list[float]]:
        """Returns one vector for each text that is to be found."""

    def question(self, text: str) -> list[float]:
        """Returns the vector of a text to find others by."""


def create_vectors(engine: sa.Engine, dimensions: int) -> bool:
    """Creates the table of vectors if it is not there, and returns whether it has an index to search by.

    Without an index the search reads all vectors, which is right, and fast enough for some 10,000 passages. CockroachDB
    makes one when the cluster setting `feature.vector_index.enabled` is true, pgvector up to 2,000 dimensions.

    Raises:
        ConfigurationError: The database has no vectors, or those it has are of another length.
        StoreUnavailable: The database is not there.
    """
    if not is_cockroach(engine):
        try:
            _execute(engine, "CREATE EXTENSION IF NOT EXISTS vector")
        except sa.exc.DBAPIError as error:
            raise ConfigurationError(
                "An embedder is set, but this PostgreSQL lacks the extension `vector` (pgvector); install it, or have "
                "an administrator run CREATE EXTENSION vector"
            ) from error
    _execute(
        engine,
        f"""CREATE TABLE IF NOT EXISTS perdure.chunk_vector (
              chunk_id TEXT PRIMARY KEY REFERENCES perdure.chunk (chunk_id) ON DELETE CASCADE,
              model TEXT NOT NULL,
              embedding VECTOR({dimensions:d}) NOT NULL
            )""",
    )
    there = _length(engine)
    if there not in (None, dimensions):
        raise ConfigurationError(
            f"PERDURE_EMBEDDER__DIMENSIONS is {dimensions}, but the documents have vectors of {there}; set it back, or "
            f"drop the table perdure.chunk_vector and load the documents again"
        )
    kind, method = ("VECTOR INDEX", "") if is_cockroach(engine) else ("INDEX", "USING hnsw ")
    index = (
        f"CREATE {kind} IF NOT EXISTS chunk_vector_by_meaning "
        f"ON perdure.chunk_vector {method}(embedding vector_cosine_ops)"
    )
    try:
        _execute(engine, index)
    except sa.exc.DBAPIError as error:
        log.warning("documents.no_vector_index", reason=str(error.orig).partition("\n")[0])
        return False
    return True


def _execute(engine: sa.Engine, statement: str) -> None:
    def execute(connection: sa.Connection) -> None:
        connection.execute(sa.text(statement))

    try:
        sqlstates.retrying(engine, "documents.create_vectors", execute)
    except sa.exc.IntegrityError:
        # Another process creates it at this moment: IF NOT EXISTS does not wait for it. Now it has.
        sqlstates.retrying(engine, "documents.create_vectors", execute)


def _length(engine: sa.Engine) -> int | None:
    """Returns the length of the vectors that the table takes, None if the database does not say."""
    query = sa.text("""
        SELECT format_type(a.atttypid, a.atttypmod)
        FROM pg_catalog.pg_attribute AS a
        JOIN pg_catalog.pg_class AS c ON c.oid = a.attrelid
        JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = 'perdure' AND c.relname = 'chunk_vector' AND a.attname = 'embedding'
    """)

    def read(connection: sa.Connection) -> int | None:
        found = _VECTOR_LENGTH.search(str(connection.execute(query).scalar_one_or_none() or ""))
        return int(found[1]) if found else None

    return sqlstates.reading(engine, "documents.vector_length", read)


# ---- making them -----------------------------------------------------------------------------------------------------

_WITHOUT_VECTOR = sa.text("""
    SELECT c.chunk_id, c.heading, c.body
    FROM perdure.chunk AS c
    LEFT JOIN perdure.chunk_vector AS v ON v.chunk_id = c.chunk_id AND v.model = :model
    WHERE v.chunk_id IS NULL
    ORDER BY c.chunk_id
    LIMIT :limit
""")
_UPSERT_VECTORS = sa.text("""
    INSERT INTO perdure.chunk_vector (chunk_id, model, embedding)
    SELECT c.chunk_id, :model, CAST(e.embedding AS VECTOR)
    FROM unnest(CAST(:chunk_ids AS TEXT[]), CAST(:embeddings AS TEXT[])) AS e (chunk_id, embedding)
    JOIN perdure.chunk AS c ON c.chunk_id = e.chunk_id
    ON CONFLICT (chunk_id) DO UPDATE SET model = excluded.model, embedding = excluded.embedding
""")


def embed_passages(engine: sa.Engine, embedder: Embedder, report: Callable[[str], None]) -> int:
    """Gives a vector to every passage that has none of this embedder, and returns to how many.

    It can be interrupted and repeated: every batch is kept. Call `create_vectors` first.

    Raises:
        ConfigurationError: The embedder's vectors are not as long as it says.
        StoreUnavailable: The database is not there.
        Exception: Whatever the embedder raises.
    """
    total = 0
    while True:
        batch = sqlstates.retrying(engine, "documents.without_vector", _reader(embedder.name))
        if not batch:
            return total
        vectors = embedder.passages([f"{row.heading}\n{row.body}" for row in batch])
        if len(vectors) != len(batch):
            raise ConfigurationError(f"The embedder returned {len(vectors)} vectors for {len(batch)} texts")
        parameters = {
            "model": embedder.name,
            "chunk_ids": [row.chunk_id for row in batch],
            "embeddings": [_vector_text(vector, embedder.dimensions) for vector in vectors],
        }
        sqlstates.retrying(engine, "documents.embed", _writer(parameters))
        total += len(batch)
        report(f"embedded {total} passages")


def _reader(model: str) -> Callable[[sa.Connection], Sequence[sa.Row[Any]]]:
    parameters = {"model": model, "limit": EMBED_BATCH}
    return lambda connection: connection.execute(_WITHOUT_VECTOR, parameters).all()


def _writer(parameters: dict[str, Any]) -> Callable[[sa.Connection], Any]:
    return lambda connection: connection.execute(_UPSERT_VECTORS, parameters).rowcount


def _vector_text(vector: Sequence[float], dimensions: int) -> str:
    """Returns a vector as both databases read it, `[0.1,0.2]`.

    Raises:
        ConfigurationError: It has another length, or numbers that are none.
    """
    if len(vector) != dimensions:
        raise ConfigurationError(
            f"The embedder's vectors have {len(vector)} numbers; set PERDURE_EMBEDDER__DIMENSIONS to that"
        )
    if not all(map(math.isfinite, vector)):
        raise ConfigurationError("The embedder returned a vector with NaN or an infinity")
    return "[" + ",".join(format(number, ".9g") for number in vector) + "]"


# ---- finding ---------------------------------------------------------------------------------------------------------

_NEAREST = sa.text("""
    SELECT c.chunk_id, d.path, d.title, c.heading, c.body, 1 - n.distance AS score
    FROM (
      SELECT chunk_id, embedding <=> CAST(:embedding AS VECTOR) AS distance
      FROM perdure.chunk_vector
      WHERE model = :model
      ORDER BY embedding <=> CAST(:embedding AS VECTOR)
      LIMIT :limit
    ) AS n
    JOIN perdure.chunk AS c ON c.chunk_id = n.chunk_id
    JOIN perdure.document AS d ON d.document_id = c.document_id
    ORDER BY n.distance, c.chunk_id
""")


def search_vectors(engine: sa.Engine, question: Sequence[float], model: str, limit: int) -> list[Passage]:
    """Returns the passages whose vectors are nearest to the question's, by cosine; none when no vectors were made yet.

    Args:
        engine: The database.
        question: The question's vector, from `Embedder.question`.
        model: The embedder's name.
        limit: Passages at most, up to `MAX_PASSAGES`.

    Raises:
        StoreUnavailable: The database is not there; try again later.
    """
    parameters = {
        "embedding": _vector_text(question, len(question)),
        "model": model,
        "limit": max(1, min(limit, MAX_PASSAGES)),
    }

    def find(connection: sa.Connection) -> list[Passage]:
        return [passage_of(row) for row in connection.execute(_NEAREST, parameters)]

    try:
        return sqlstates.reading(engine, "documents.search_vectors", find)
    except sa.exc.ProgrammingError as error:
        # No table, or (PostgreSQL without the extension) no such type.
        if sqlstates.sqlstate_of(error) in (sqlstates.UNDEFINED_TABLE, _UNDEFINED_OBJECT):
            return []
        raise


_UNDEFINED_OBJECT = "42704"
