"""Decides how a document is cut into passages: by headings and paragraphs, each about one thing and short to quote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MAX_CHUNK_CHARACTERS = 1_200
"""About 300 tokens: a few passages fit any model's prompt, and each is still about one thing."""
MAX_HEADING_CHARACTERS = 200

_HEADING = re.compile(r"#{1,6}(?=[ \t]|$)")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_FRONT_MATTER = re.compile(r"---\n.*?\n---\n", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document. `heading` is the path of headings above it, `Title > Section > Subsection`."""

    ordinal: int
    heading: str
    body: str


def cut(text: str, *, title: str, markdown: bool) -> tuple[str, list[Chunk]]:
    """Returns a document's title and its passages: whole paragraphs up to `MAX_CHUNK_CHARACTERS`, split only if longer.

    Args:
        text: The document, lines ending in a newline character.
        title: Its title, unless it begins with a heading of the first level.
        markdown: Whether lines may be headings and code fences.
    """
    return cut_blocks(_blocks(text, markdown), title=title)


def cut_blocks(blocks: Iterable[tuple[int, str]], *, title: str) -> tuple[str, list[Chunk]]:
    """Returns a document's title and its passages; see `cut`.

    Args:
        blocks: (level, heading) from level 1, and (0, text) for paragraphs, in order.
        title: Its title, unless it begins with a heading of the first level.
    """
    above: dict[int, str] = {}
    sections: list[tuple[str, list[str]]] = []
    for level, block in blocks:
        if level:
            block = block[:MAX_HEADING_CHARACTERS]
            above = {upper: name for upper, name in above.items() if upper < level} | {level: block}
            if level == 1 and block and not sections:
                title = block
            continue
        names = [name for _, name in sorted(above.items()) if name]
        path = " > ".join(names if names and names[0] == title else [title, *names])
        if not sections or sections[-1][0] != path:
            sections.append((path, []))
        sections[-1][1].append(block)
    bodies = ((path, body) for path, blocks in sections for body in _pack(blocks))
    return title, [Chunk(ordinal, path, body) for ordinal, (path, body) in enumerate(bodies)]


def sentences(text: str) -> list[str]:
    """Returns the sentences of a passage, without its fenced code; items of lists count as sentences of their own."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*+|>]|\d+[.)])\s)", _without_code(text)):
        found += _SENTENCE_END.split(" ".join(paragraph.split()))
    return [sentence for sentence in found if sentence]


def _without_code(text: str) -> str:
    """Returns a passage with blank lines in the place of fenced code."""
    kept: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if mark:
            fence = "" if fence == mark[1] else fence or mark[1]
        kept.append("" if mark or fence else line)
    return "\n".join(kept)


def _blocks(text: str, markdown: bool) -> Iterator[tuple[int, str]]:
    """Yields (level, heading), and (0, text) for paragraphs and fenced code.

    Code that is too long for a passage is cut between lines, and each piece fenced: so each is known as code.
    """
    if markdown and text.startswith("---\n"):
        text = _FRONT_MATTER.sub("", text, count=1)
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        heading = _HEADING.match(line) if markdown and not fence else None
        if not fence and (heading or not line.strip()):
            if lines:
                yield 0, "\n".join(lines)
            lines = []
            if heading:
                yield heading.end(), line[heading.end() :].strip().rstrip("#").rstrip()
            continue
        mark = _FENCE.match(line) if markdown else None
        piece = "\n".join([*lines, line, fence]) if fence else ""
        if not mark and len(lines) > 1 and len(piece) > MAX_CHUNK_CHARACTERS:
            yield 0, "\n".join([*lines, fence])
            lines = [fence]
        if mark:
            fence = "" if fence == mark[1] else fence or mark[1]
        lines.append(line.rstrip())
    if any(lines):
        yield 0, "\n".join(lines).strip("\n")


def _pack(blocks: Sequence[str]) -> Iterator[str]:
    """Yields the blocks of a section, joined while they fit into a passage, and split where one alone does not."""
    body = ""
    for block in blocks:
        for piece in _split(block):
            if body and len(body) + 2 + len(piece) > MAX_CHUNK_CHARACTERS:
                yield body
                body = ""
            body = f"{body}\n\n{piece}" if body else piece
    if body:
        yield body


def _split(block: str) -> Iterator[str]:
    """Yields a block in pieces that fit: by sentences, then by words, then anywhere."""
    if len(block) <= MAX_CHUNK_CHARACTERS:
        yield block
        return
    piece = ""
    for sentence in _SENTENCE_END.split(block):
        for part in _by_words(sentence):
            if piece and len(piece) + 1 + len(part) > MAX_CHUNK_CHARACTERS:
                yield piece
                piece = ""
            piece = f"{piece} {part}" if piece else part
    if piece:
        yield piece


def _by_words(sentence: str) -> Iterator[str]:
    start = 0
    while len(sentence) - start > MAX_CHUNK_CHARACTERS:
        at = sentence.rfind(" ", start + 1, start + MAX_CHUNK_CHARACTERS)
        at = at if at > 0 else start + MAX_CHUNK_CHARACTERS
        yield sentence[start:at]
        start = at + (sentence[at] == " ")
    if start < len(sentence):
        yield sentence[start:]
