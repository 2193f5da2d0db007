"""Decides what the text of an HTML page and of a PDF is: headings and blocks, as `document_chunks` cuts them.

What is read was written by others, so it may be broken or hostile: see `document_process`, which bounds the reading.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from perdure_service.errors import ConfigurationError

Block = tuple[int, str]
"""(level, heading), or (0, text)."""

MAX_PAGES = 2_000
"""Of a PDF: some 5,000,000 characters of prose."""
MAX_CHARACTERS = 20_000_000
"""Of a document's text: more is no document, but a bomb."""
MAX_OUTLINE_ENTRIES = 1_000

_DROPPED = frozenset({
    "script", "style", "noscript", "template", "nav", "aside", "footer", "form", "button", "select", "textarea", "svg",
    "math", "iframe", "object", "video", "audio", "canvas", "dialog", "head", "title",
})  # fmt: skip
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = frozenset({
    "address", "article", "blockquote", "body", "center", "details", "dd", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "header", "hr", "main", "ol", "p", "section", "summary", "table", "ul",
})  # fmt: skip
_LINES = frozenset({"br", "li", "tr"})
_DECLARED_AS = {"iso-8859-1": "windows-1252", "latin-1": "windows-1252", "us-ascii": "windows-1252"}
"""What the HTML standard takes declared names for (https://encoding.spec.whatwg.org/#names-and-labels)."""


class Document(NamedTuple):
    """The text of a document. `title` is None when it has none of its own."""

    title: str | None
    blocks: Sequence[Block]


class _Kind(NamedTuple):
    module: str
    package: str
    read: Callable[[bytes], Document]


def check_installed(suffixes: frozenset[str]) -> None:
    """Refuses to read files whose kind needs a package that is not there.

    Raises:
        ConfigurationError: It says what to install.
    """
    for suffix in sorted(suffixes & KINDS.keys()):
        kind = KINDS[suffix]
        if find_spec(kind.module) is None:
            raise ConfigurationError(
                f"the folder has {suffix} files, and {kind.package} is not installed; pip install 'perdure[service]'"
            )


def read(suffix: str, content: bytes) -> Document:
    """Returns the text of a document of a kind in `KINDS`.

    Raises:
        ValueError: It has none, or it cannot be read; in words that go with the file's name.
        Exception: Whatever else a broken file makes of a library.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how these libraries are used, or of the file; neither is for its reader
        document = KINDS[suffix].read(content)
    blocks = [(level, _storable(text)) for level, text in document.blocks]
    if sum(len(text) for _, text in blocks) > MAX_CHARACTERS:
        raise ValueError(f"has more than {MAX_CHARACTERS} characters of text")
    title = _storable(" ".join((document.title or "").split()))
    return Document(title or None, blocks)


def _storable(text: str) -> str:
    """Returns text without what databases cannot hold: NUL, and halves of surrogate pairs."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode()


# ---- HTML ------------------------------------------------------------------------------------------------------------


def _read_html(content: bytes) -> Document:
    from bs4 import BeautifulSoup

    text = _decoded(content)
    if "\0" in text:
        raise ValueError("holds NUL characters, so it is not text")
    page = BeautifulSoup(text, "html.parser")
    title = page.title.get_text(" ", strip=True) if page.title else None
    for tag in page.find_all(list(_DROPPED)):
        tag.extract()
    body = page.find("main") or page.body or page
    blocks = list(_html_blocks(body))
    if not any(level == 0 for level, _ in blocks):
        raise ValueError("holds no text")
    return Document(title, blocks)


def _decoded(content: bytes) -> str:
    """Returns the text of a page: by its byte order mark, by what it declares, as UTF-8, as browsers do without."""
    from bs4.dammit import EncodingDetector

    content, marked = EncodingDetector.strip_byte_order_mark(content)
    declared = (EncodingDetector.find_declared_encoding(content, is_html=True) or "").lower()
    if declared.startswith("utf-16"):
        declared = "utf-8"  # else the declaration could not have been read
    for encoding in (marked, _DECLARED_AS.get(declared, declared), "utf-8"):
        try:
            if encoding:
                return content.decode(encoding)
        except (LookupError, UnicodeDecodeError):
            continue
    return content.decode("windows-1252", "replace")


def _html_blocks(body: Any) -> Iterator[Block]:
    """Yields headings and texts in the page's order. Without recursion: a page may be nested as deeply as it likes."""
    from bs4.element import NavigableString, Tag

    pending: list[str] = []

    def flush() -> Iterator[Block]:
        lines = (" ".join(line.split()).removesuffix(" |") for line in "".join(pending).split("\n"))
        pending.clear()
        text = "\n".join(line for line in lines if line and line != "-")
        if text:
            yield 0, text

    ends: list[Any] = [iter((body,))]
    names: list[str] = [""]
    while ends:
        node = next(ends[-1], None)
        if node is None:
            ends.pop()
            name = names.pop()
            if name in _BLOCKS:
                yield from flush()
            elif name in ("td", "th"):
                pending.append(" | ")
        elif isinstance(node, Tag):
            if node.name in _HEADINGS or node.name == "pre":
                yield from flush()
                level = _HEADINGS.get(node.name, 0)
                text = " ".join(node.get_text(" ").split()) if level else node.get_text().strip("\n")
                if text.strip():
                    yield level, text
                continue
            if node.name in _BLOCKS:
                yield from flush()
            elif node.name in _LINES:
                pending.append("\n- " if node.name == "li" else "\n")
            ends.append(iter(node.contents))
            names.append(node.name)
        elif type(node) is NavigableString:  # not a comment, a declaration …
            pending.append(re.sub(r"\s+", " ", node))
    yield from flush()


# ---- PDF -------------------------------------------------------------------------------------------------------------


def _read_pdf(content: bytes) -> Document:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PdfReadError

    try:
        pdf = PdfReader(io.BytesIO(content))
        if pdf.is_encrypted and not pdf.decrypt(""):
            raise ValueError("is encrypted; save it without a password")
        count = len(pdf.pages)
    except DependencyError:
        raise ValueError("is encrypted; save it without a password") from None
    except PdfReadError as error:
        raise ValueError(f"is a broken PDF: {error}") from None
    if count > MAX_PAGES:
        raise ValueError(f"has {count} pages, more than {MAX_PAGES}")
    chapters = _chapters(pdf)
    blocks: list[Block] = []
    characters = 0
    for number, page in enumerate(pdf.pages, start=1):
        if number in chapters:
            blocks.append((2, chapters[number]))
        text = page.extract_text()
        characters += len(text)
        if characters > MAX_CHARACTERS:
            raise ValueError(f"has more than {MAX_CHARACTERS} characters of text")
        if text.strip():
            blocks.append((3, f"Page {number}"))
            blocks += [(0, part.strip("\n")) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not any(level == 0 for level, _ in blocks):
        raise ValueError(f"has no text on its {count} pages, which may be pictures; make text of them (OCR) first")
    title = pdf.metadata.title if pdf.metadata else None
    return Document(title if isinstance(title, str) else None, blocks)


def _chapters(pdf: Any) -> dict[int, str]:
    """Returns the titles of a PDF's outline, the outermost only, by the page they begin on; none of a broken one."""
    found: dict[int, str] = {}
    try:
        for entry in list(pdf.outline)[:MAX_OUTLINE_ENTRIES]:
            if not isinstance(entry, list):
                number = pdf.get_destination_page_number(entry)
                if number is not None:
                    found.setdefault(number + 1, " ".join(str(entry.title).split()))
    except Exception:  # noqa: BLE001 - an outline is an extra, and a broken one is no reason to lose the text
        return {}
    return found


_HTML = _Kind("bs4", "beautifulsoup4", _read_html)
KINDS = {".html": _HTML, ".htm": _HTML, ".xhtml": _HTML, ".pdf": _Kind("pypdf", "pypdf", _read_pdf)}
"""The kinds of files that need a library, by their suffix."""
