"""Puts functions of ours in the place of DBOS's, and knows which, so that plain DBOS can be had back."""

from __future__ import annotations

from typing import Any

_originals: dict[tuple[Any, str], Any] = {}


def substitute(owner: Any, name: str, new: Any) -> None:
    """Puts `new` in the place of a module's or a class's own; the last one counts."""
    _originals.setdefault((owner, name), vars(owner)[name])
    setattr(owner, name, new)


def restore() -> None:
    """Puts everything back as DBOS has it: for a process that goes on when its last engine has stopped."""
    while _originals:
        (owner, name), original = _originals.popitem()
        setattr(owner, name, original)
