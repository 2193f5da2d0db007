"""Small PDFs, written as programs write them: text in a font, outlines, titles, passwords."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject


def pdf(*pages: str, title: str = "", outline: Mapping[str, int] | None = None, password: str | None = None) -> bytes:
    """Returns a PDF with a page for each text; lines are separated by newlines, and an empty text is an empty page.

    Args:
        pages: The texts.
        title: In the metadata.
        outline: The page, from 1, on which each chapter begins.
        password: To open it; empty for an encrypted file that opens without.
    """
    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(612, 792)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): _font()})}
        )
        stream = DecodedStreamObject()
        stream.set_data(_drawing(text.split("\n")))
        page[NameObject("/Contents")] = writer._add_object(stream)
    for name, number in (outline or {}).items():
        writer.add_outline_item(title=name, page_number=number - 1)
    if title:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt(password, "owner", algorithm="RC4-128")
    target = io.BytesIO()
    writer.write(target)
    return target.getvalue()


def _font() -> DictionaryObject:
    return DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )


def _drawing(lines: Sequence[str]) -> bytes:
    shown = [f"1 0 0 1 72 {720 - 14 * number} Tm ({line}) Tj" for number, line in enumerate(lines) if line]
    return ("BT /F1 12 Tf " + " ".join(shown) + " ET").encode("latin-1")
