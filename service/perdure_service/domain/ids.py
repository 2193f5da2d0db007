"""Random ids that nobody needs to guess and many are made of: drawn from the system a few hundred at a time.

`os.urandom` lets go of the interpreter's lock, and under load whoever does so stands in line for it again: five ids a
run cost more than everything else that is done to start it.
"""

from __future__ import annotations

import os

DRAWN = 256
"""Ids of one draw: 4 KiB."""

_HEX_DIGITS = 32

_drawn: list[str] = []


def random_hex() -> str:
    """Returns 128 random bits as 32 hexadecimal digits. Thread-safe, and no two processes get the same."""
    while True:
        try:
            return _drawn.pop()  # one step of the interpreter, so nobody else gets it
        except IndexError:
            text = os.urandom(DRAWN * _HEX_DIGITS // 2).hex()
            _drawn.extend(text[at : at + _HEX_DIGITS] for at in range(0, len(text), _HEX_DIGITS))


os.register_at_fork(after_in_child=_drawn.clear)
