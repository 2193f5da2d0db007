"""Vectors of passages on a real database, with an embedder that is a function of the words and needs no model."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from perdure_service.errors import ConfigurationError
from perdure_service.store import document_vectors, documents
from perdure_service.store.engine import create_engine

from tests.helpers.databases import not_in_another_form

pytestmark = not_in_another_form
SYNONYMS = {"automobile": "car", "vehicle": "car", "physician": "doctor", "medic": "doctor"}


class WordEmbedder:
    """A bag of words hashed into few dimensions; synonyms are one word, which full text cannot know."""

    def __init__(self, name: str = "words", dimensions: int = 64) -> None:
        self.name = name
        self.dimensions = dimensions
        self.texts = 0

    def passages(self, texts: Sequence[str]) -> list[list[float]]:
        self.texts += len(texts)
        return [self.question(text) for text in texts]

    def question(self, text: str) -> list[float]:
        vector = [1e-3] * self.dimensions
        for word in re.findall(r"\w+", text.lower()):
            digest = hashlib.sha256(SYNONYMS.get(word, word).encode()).digest()
            vector[digest[0] % self.dimensions] += 1.0
        length = math.sqrt(sum(number * number for number in vector))
        return [number / length for number in vector]


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    """An engine on a database without documents and without vectors."""
    engine = create_engine(database_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS perdure.chunk_vector"))
        connection.execute(sa.text("DELETE FROM perdure.document"))
    yield engine
    engine.dispose()


@pytest.fixture
def folder(engine: sa.Engine, tmp_path: Path) -> Path:
    (tmp_path / "car.md").write_text("# Transport\n\nThe car needs new tyres.", encoding="utf-8")
    (tmp_path / "doctor.md").write_text("# Health\n\nThe doctor is in on Mondays.", encoding="utf-8")
    (tmp_path / "pasta.md").write_text("# Kitchen\n\nBoil pasta in salted water.", encoding="utf-8")
    documents.load_folder(engine, tmp_path, lambda _: None)
    return tmp_path


def nearest(engine: sa.Engine, embedder: WordEmbedder, question: str, limit: int = 3) -> list[str]:
    vector = embedder.question(question)
    found = document_vectors.search_vectors(engine, vector, embedder.name, limit)
    assert [passage.score for passage in found] == sorted((passage.score for passage in found), reverse=True)
    return [passage.document for passage in found]


def embed(engine: sa.Engine, embedder: WordEmbedder) -> int:
    return document_vectors.embed_passages(engine, embedder, lambda _: None)


def test_meaning_finds_what_words_do_not(engine: sa.Engine, folder: Path) -> None:
    embedder = WordEmbedder()
    assert document_vectors.create_vectors(engine, 64) in (True, False)
    assert embed(engine, embedder) == 3
    assert documents.search(engine, "automobile", 3) == []
    assert nearest(engine, embedder, "the automobile")[0] == "car.md"
    assert nearest(engine, embedder, "Is the physician in?", 1) == ["doctor.md"]
    assert len(nearest(engine, embedder, "anything", 9)) == 3


def test_only_new_passages_are_embedded_and_those_of_removed_files_go(engine: sa.Engine, folder: Path) -> None:
    embedder = WordEmbedder()
    document_vectors.create_vectors(engine, 64)
    embed(engine, embedder)
    assert embed(engine, embedder) == 0
    (folder / "pasta.md").write_text("# Kitchen\n\nThe vehicle is a food truck.", encoding="utf-8")
    (folder / "car.md").unlink()
    documents.load_folder(engine, folder, lambda _: None)
    assert embed(engine, embedder) == 1
    assert embedder.texts == 4
    assert nearest(engine, embedder, "the vehicle", 9) == ["pasta.md", "doctor.md"]


def test_of_a_changed_document_only_the_changed_passages_are_embedded_again(engine: sa.Engine, folder: Path) -> None:
    sections = "".join(f"\n\n## Part {number}\n\nPart {number} has a car." for number in range(20))
    (folder / "long.md").write_text(f"# Long{sections}", encoding="utf-8")
    documents.load_folder(engine, folder, lambda _: None)
    embedder = WordEmbedder()
    document_vectors.create_vectors(engine, 64)
    assert embed(engine, embedder) == 23
    (folder / "long.md").write_text(f"# Long{sections.replace('7 has a car', '7 has a boat')}", encoding="utf-8")
    documents.load_folder(engine, folder, lambda _: None)
    assert embed(engine, embedder) == 2  # parts 7 and 17
    assert embedder.texts == 25


def test_another_model_makes_all_vectors_anew_and_sees_none_of_the_old(engine: sa.Engine, folder: Path) -> None:
    document_vectors.create_vectors(engine, 64)
    embed(engine, WordEmbedder())
    other = WordEmbedder("other")
    assert nearest(engine, other, "car") == []
    assert embed(engine, other) == 3
    assert nearest(engine, other, "car")[0] == "car.md"
    assert nearest(engine, WordEmbedder(), "car") == []


def test_before_anything_was_embedded_nothing_is_found(engine: sa.Engine, folder: Path) -> None:
    assert nearest(engine, WordEmbedder(), "car") == []
    document_vectors.create_vectors(engine, 64)
    assert nearest(engine, WordEmbedder(), "car") == []


def test_many_passages_are_embedded_in_batches(engine: sa.Engine, tmp_path: Path) -> None:
    text = "\n\n".join(f"# Part {number}\n\nText of part {number}." for number in range(150))
    (tmp_path / "many.md").write_text(text, encoding="utf-8")
    documents.load_folder(engine, tmp_path, lambda _: None)
    document_vectors.create_vectors(engine, 64)
    lines: list[str] = []
    assert document_vectors.embed_passages(engine, WordEmbedder(), lines.append) == 150
    assert lines == ["embedded 64 passages", "embedded 128 passages", "embedded 150 passages"]


def test_vectors_of_another_length_are_refused_with_the_way_out(engine: sa.Engine, folder: Path) -> None:
    document_vectors.create_vectors(engine, 64)
    document_vectors.create_vectors(engine, 64)
    with pytest.raises(ConfigurationError, match=r"PERDURE_EMBEDDER__DIMENSIONS is 8, but .* of 64"):
        document_vectors.create_vectors(engine, 8)
    lying = WordEmbedder()
    lying.passages = lambda texts: [[0.5] * 7 for _ in texts]  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="have 7 numbers"):
        embed(engine, lying)
    broken = WordEmbedder()
    broken.passages = lambda texts: [[math.nan] * 64 for _ in texts]  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="NaN"):
        embed(engine, broken)
    short = WordEmbedder()
    short.passages = lambda texts: []  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="0 vectors for 3 texts"):
        embed(engine, short)


def test_too_many_dimensions_for_an_index_work_without_one(engine: sa.Engine, folder: Path) -> None:
    embedder = WordEmbedder(dimensions=3_000)
    document_vectors.create_vectors(engine, 3_000)
    embed(engine, embedder)
    assert nearest(engine, embedder, "medic")[0] == "doctor.md"


def test_every_driver_reads_and_writes_vectors(engine: sa.Engine, folder: Path, dialect_url: str) -> None:
    document_vectors.create_vectors(engine, 64)
    other = create_engine(dialect_url, pool_size=1, statement_timeout=timedelta(seconds=30))
    # CockroachDB's index is not PostgreSQL's: without one it works too.
    document_vectors.create_vectors(other, 64)
    assert embed(other, WordEmbedder()) == 3
    assert nearest(other, WordEmbedder(), "the automobile")[0] == "car.md"
    other.dispose()
