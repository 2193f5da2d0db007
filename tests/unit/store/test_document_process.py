"""Reading in a process of its own: what is slow, swells or crashes costs that process, and is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from perdure_service.store import document_process
from perdure_service.store.document_process import DocumentProcess

from tests.helpers.pdfs import pdf
from tests.helpers.waiting import scaled


@pytest.fixture
def process() -> Iterator[DocumentProcess]:
    with DocumentProcess(time_limit_s=scaled(20)) as process:
        yield process


def test_one_process_reads_many_documents_and_outlives_broken_ones(process: DocumentProcess) -> None:
    assert process.read(".html", b"<p>words</p>").blocks == [(0, "words")]
    number = process._process.pid  # type: ignore[union-attr]
    for content in (b"nonsense", b"", os.urandom(1_000), pdf("x")[:200]):
        with pytest.raises(ValueError, match="is a broken PDF"):
            process.read(".pdf", content)
    assert process.read(".pdf", pdf("words")).blocks[-1] == (0, "words")
    assert process._process.pid == number  # type: ignore[union-attr]


def test_a_file_that_takes_too_long_costs_its_process_and_the_next_one_is_read() -> None:
    with DocumentProcess(time_limit_s=0.01) as process:
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"takes longer than 0\.01 s"):
            process.read(".pdf", pdf("words"))
        assert time.monotonic() - began < scaled(5)
        process._time_limit_s = scaled(20)
        assert process.read(".pdf", pdf("words")).blocks[-1] == (0, "words")


def test_a_process_that_dies_is_told_and_replaced(process: DocumentProcess) -> None:
    process.read(".html", b"<p>words</p>")
    process._process.kill()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="ended the process that read it"):
        process.read(".html", b"<p>words</p>")
    assert process.read(".html", b"<p>words</p>").blocks == [(0, "words")]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("/Root"), "is broken: KeyError: '/Root'"),
        (RecursionError("maximum"), "is nested too deeply to be read"),
        (MemoryError(), "needs too much memory to be read"),
        (ValueError("holds no text"), "holds no text"),
    ],
)
def test_whatever_a_library_raises_becomes_words(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    def fail(suffix: str, content: bytes) -> None:
        raise error

    monkeypatch.setattr(document_process.document_readers, "read", fail)
    assert document_process._read(".pdf", b"") == text
