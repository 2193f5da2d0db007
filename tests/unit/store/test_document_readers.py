"""What HTML and PDF say: headings and text, in any encoding, and why some files say nothing."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure_service.errors import ConfigurationError
from perdure_service.store import document_readers
from perdure_service.store.document_chunks import cut_blocks
from perdure_service.store.document_readers import read

from tests.helpers.pdfs import pdf

PAGE = """<!doctype html>
<html><head><title>The  handbook
 of leases</title><style>p { color: red }</style><script>alert("no")</script></head>
<body>
<header><a href="/">Home page</a></header>
<nav><ul><li>Menu item</li></ul></nav>
<h1>Leases</h1>
<p>An executor <b>renews</b> its
lease.<br>Every five seconds.</p><!-- a comment -->
<h2>Expiry &amp; <em>after</em></h2>
<ul><li>one</li><li>two <i>words</i></ul>
<pre>  code
    stays</pre>
<table><tr><th>name</th><th>value</th></tr><tr><td>ttl</td><td>15 s</td></tr></table>
<div>Loose text <div>nested</div> and more</div>
<footer>Imprint</footer>
</body></html>"""


def html(text: str) -> document_readers.Document:
    return read(".html", text.encode())


def test_a_page_is_headings_and_text_without_what_is_around_it() -> None:
    document = html(PAGE)
    assert document.title == "The handbook of leases"
    assert list(document.blocks) == [
        (0, "Home page"),
        (1, "Leases"),
        (0, "An executor renews its lease.\nEvery five seconds."),
        (2, "Expiry & after"),
        (0, "- one\n- two words"),
        (0, "  code\n    stays"),
        (0, "name | value\nttl | 15 s"),
        (0, "Loose text"),
        (0, "nested"),
        (0, "and more"),
    ]


def test_the_main_part_of_a_page_is_all_that_counts_and_its_headings_are_the_path() -> None:
    document = html(PAGE.replace("<h1>", "<main><h1>").replace("<footer>", "</main>Beside<footer>"))
    title, chunks = cut_blocks(document.blocks, title=document.title or "x")
    assert title == "Leases"
    assert [chunk.heading for chunk in chunks] == ["Leases", "Leases > Expiry & after"]
    assert "Beside" not in "".join(chunk.body for chunk in chunks)


def test_a_page_without_a_body_or_tags_is_text() -> None:
    assert list(html("just words").blocks) == [(0, "just words")]
    assert list(html("<p>one<p>two").blocks) == [(0, "one"), (0, "two")]


@pytest.mark.parametrize(
    "content",
    [
        "<meta charset='iso-8859-1'><p>é “q”</p>".encode("windows-1252"),
        "<?xml version='1.0' encoding='windows-1252'?><p>é “q”</p>".encode("windows-1252"),
        "<meta http-equiv=Content-Type content='text/html; charset=utf-8'><p>é “q”</p>".encode(),
        "<p>é “q”</p>".encode(),
        "<p>é “q”</p>".encode("windows-1252"),
        "<meta charset=utf-8><p>é “q”</p>".encode("windows-1252"),
        "<meta charset=utf-16><p>é “q”</p>".encode(),
        "<meta charset=nonsense><p>é “q”</p>".encode(),
        "<p>é “q”</p>".encode("utf-8-sig"),
        "<p>é “q”</p>".encode("utf-16"),
    ],
)
def test_a_pages_encoding_is_found_as_browsers_find_it(content: bytes) -> None:
    assert [text for _, text in read(".html", content).blocks][-1] == "é “q”"


def test_japanese_pages_of_their_own_encoding_are_read() -> None:
    content = "<meta charset=shift_jis><p>耐久性</p>".encode("shift_jis")
    assert list(read(".htm", content).blocks) == [(0, "耐久性")]


@pytest.mark.parametrize("text", ["", "<script>x</script>", "<nav>menu</nav>", "<h1>Only a heading</h1>", "<p> </p>"])
def test_a_page_without_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="holds no text"):
        html(text)


def test_a_page_with_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        read(".html", b"<p>a\0b</p>")


def test_a_page_may_be_nested_as_deeply_as_it_likes() -> None:
    document = html("<div>" * 30_000 + "deep" + "</div>" * 30_000)
    assert list(document.blocks) == [(0, "deep")]


@settings(max_examples=60)
@given(st.text(alphabet="<>/!-ab ph1lituedr=\"'&;\n", max_size=200))
def test_any_tag_soup_is_read_or_refused_in_words(text: str) -> None:
    blocks: list[tuple[int, str]] = []
    with suppress(ValueError):
        blocks += html(text).blocks
    assert not blocks or any(level == 0 and words.strip() for level, words in blocks)


# ---- PDF -------------------------------------------------------------------------------------------------------------


def test_the_pages_of_a_pdf_are_headings_below_its_chapters() -> None:
    content = pdf(
        "A preface", "First words\nsecond line", "", "More words", title="The handbook",
        outline={"Leases": 2, "Approvals": 4},
    )  # fmt: skip
    document = read(".pdf", content)
    assert document.title == "The handbook"
    title, chunks = cut_blocks(document.blocks, title=document.title or "x")
    assert title == "The handbook"
    assert [(chunk.heading, chunk.body) for chunk in chunks] == [
        ("The handbook > Page 1", "A preface"),
        ("The handbook > Leases > Page 2", "First words\nsecond line"),
        ("The handbook > Approvals > Page 4", "More words"),
    ]


def test_a_pdf_without_title_and_outline_has_pages() -> None:
    document = read(".pdf", pdf("words"))
    assert document == (None, [(3, "Page 1"), (0, "words")])


def test_an_encrypted_pdf_is_read_if_it_opens_without_a_password() -> None:
    assert read(".pdf", pdf("words", password="")).blocks[-1] == (0, "words")
    with pytest.raises(ValueError, match="is encrypted"):
        read(".pdf", pdf("words", password="secret"))


@pytest.mark.parametrize(
    "content", [b"", b"not a pdf", b"%PDF-1.7\n%%EOF", pdf("words" * 50)[:300], pdf("words")[150:]]
)
def test_a_broken_pdf_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="is a broken PDF"):
        read(".pdf", content)


def test_a_pdf_of_pictures_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="OCR"):
        read(".pdf", pdf("", ""))


def test_a_pdf_of_too_many_pages_or_too_much_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_readers, "MAX_PAGES", 2)
    with pytest.raises(ValueError, match="has 3 pages, more than 2"):
        read(".pdf", pdf("a", "b", "c"))
    monkeypatch.setattr(document_readers, "MAX_CHARACTERS", 10)
    with pytest.raises(ValueError, match="more than 10 characters"):
        read(".pdf", pdf("many words here"))
    with pytest.raises(ValueError, match="more than 10 characters"):
        html("<p>many words here</p>")


def test_what_databases_cannot_hold_is_replaced() -> None:
    [(_, text)] = html("<p>a&#xD800;b&#0;c</p>").blocks
    assert text.isprintable()


def test_a_missing_package_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_readers, "find_spec", lambda name: None if name == "pypdf" else name)
    document_readers.check_installed(frozenset({".md", ".html"}))
    with pytest.raises(ConfigurationError, match=r"\.pdf files, and pypdf is not installed; pip install"):
        document_readers.check_installed(frozenset({".md", ".pdf"}))
