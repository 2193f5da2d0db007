"""How documents are cut into passages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from perdure_service.store.document_chunks import MAX_CHUNK_CHARACTERS, cut, sentences

MARKDOWN = """---
author: somebody
---
# The Manual

Intro line one
and two.

## Install ##

Run it.

```sh
# not a heading

make install
```

### On Windows

Do not.

## Use
"""


def test_headings_are_the_path_of_a_passage_and_the_first_is_the_title() -> None:
    title, chunks = cut(MARKDOWN, title="manual", markdown=True)
    assert title == "The Manual"
    assert [(chunk.ordinal, chunk.heading) for chunk in chunks] == [
        (0, "The Manual"),
        (1, "The Manual > Install"),
        (2, "The Manual > Install > On Windows"),
    ]
    assert chunks[0].body == "Intro line one\nand two."
    assert chunks[1].body == "Run it.\n\n```sh\n# not a heading\n\nmake install\n```"


def test_a_document_without_a_first_heading_has_the_files_name() -> None:
    title, chunks = cut("Words first.\n\n# Later\n\nMore.", title="file", markdown=True)
    assert title == "file"
    assert [chunk.heading for chunk in chunks] == ["file", "file > Later"]


def test_plain_text_has_no_headings() -> None:
    title, chunks = cut("# a\n\nb\n\n\n\nc", title="notes", markdown=False)
    assert (title, [chunk.body for chunk in chunks]) == ("notes", ["# a\n\nb\n\nc"])


def test_paragraphs_share_a_passage_while_they_fit() -> None:
    paragraph = "word " * 100
    _, chunks = cut("\n\n".join([paragraph] * 5), title="t", markdown=True)
    assert [chunk.body.count("\n\n") + 1 for chunk in chunks] == [2, 2, 1]


def test_a_long_paragraph_is_split_at_its_sentences() -> None:
    text = " ".join(f"Sentence number {number} ends here." for number in range(200))
    _, chunks = cut(text, title="t", markdown=True)
    assert len(chunks) > 4
    assert all(chunk.body.endswith(".") for chunk in chunks)
    assert " ".join(chunk.body for chunk in chunks) == text


def test_what_has_no_words_is_split_anywhere() -> None:
    _, chunks = cut("x" * 3_000, title="t", markdown=True)
    assert [len(chunk.body) for chunk in chunks] == [1_200, 1_200, 600]


def test_nothing_gives_no_passages() -> None:
    for text in ("", "\n\n", "# Only a heading", "---\na: b\n---\n"):
        assert cut(text, title="t", markdown=True)[1] == []


@given(
    st.text(alphabet=st.sampled_from("ab #\n`~-.!?>é漢" + " "), max_size=400).map(lambda text: text * 8), st.booleans()
)
def test_no_passage_is_too_long_and_no_word_is_lost(text: str, markdown: bool) -> None:
    _, chunks = cut(text, title="t", markdown=markdown)
    assert all(0 < len(chunk.body) <= MAX_CHUNK_CHARACTERS for chunk in chunks)
    if not markdown:
        kept = "".join("".join(chunk.body.split()) for chunk in chunks)
        assert kept == "".join(text.split())


def test_sentences_are_those_of_prose_and_the_items_of_lists() -> None:
    assert sentences("One is\nhere. Two!\n\n- three\n- four: 1.5 of it\n* five") == [
        "One is here.", "Two!", "- three", "- four: 1.5 of it", "* five",
    ]  # fmt: skip


def test_fenced_code_is_no_sentence() -> None:
    text = "It says:\n```sh\nperdure watch RUN. Then wait.\n```\nThat is all.\n\n~~~\na ``` b. c\n~~~"
    assert sentences(text) == ["It says:", "That is all."]


def test_code_that_is_too_long_for_a_passage_is_code_in_each_piece() -> None:
    lines = [f"x{number} = call({number})  # it waits. Then it goes on." for number in range(80)]
    _, chunks = cut("\n".join(["Like this:", "```python", *lines, "```", "", "So."]), title="t", markdown=True)
    assert len(chunks) > 2
    assert [sentence for chunk in chunks for sentence in sentences(chunk.body)] == ["Like this:", "So."]
    assert [line for chunk in chunks for line in chunk.body.split("\n") if line.startswith("x")] == lines
