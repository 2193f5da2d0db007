"""What stands in a row for a value that is too large for it: a pointer, which no stored value can be taken for.

DBOS stores JSON or base64 of pickle, and our own rows JSON. None of these begins with `MARK`: JSON text begins with one
of `{["-0123456789tfn`, and base64 has neither hyphen nor colon. So nothing that a user sends, returns or names is ever
read as a pointer, and nothing has to be escaped. A reader that knows no pointers fails with its format's own error.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

MARK = "perdure-payload:"
_POINTER = re.compile(re.escape(MARK) + r"1:([0-9a-f]{64}):([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where the bytes of a value are.

    Attributes:
        sha256: Their SHA-256 (hex), by which they are stored, once.
        size_bytes: How many they are.
    """

    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, data: bytes) -> Pointer:
        """Returns the pointer to some bytes."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))

    @property
    def text(self) -> str:
        """What stands in the row."""
        return f"{MARK}1:{self.sha256}:{self.size_bytes}"


def parse(text: str | None) -> Pointer | None:
    """Returns the pointer that a stored text is, None when it is a value itself.

    Raises:
        ValueError: It is a pointer of a later version of this service.
    """
    if text is None or not text.startswith(MARK):
        return None
    found = _POINTER.fullmatch(text)
    if found is None:
        raise ValueError("a pointer to a payload that this version cannot read")
    return Pointer(found[1], int(found[2]))


def stored_bytes(text: str | None) -> int:
    """Returns how many bytes a stored value has, itself or where it points to."""
    pointer = parse(text)
    return pointer.size_bytes if pointer else len((text or "").encode())
