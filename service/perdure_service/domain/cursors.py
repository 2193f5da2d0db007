"""Where a watch stands: the position in every run of its view, as a text that any server can go on from.

A view with children is a tree that grows. Its cursor is bounded by the runs that are active, not by those there were:

* a child is joined when, and only when, its parent's `child_started` event is delivered, so the parent's position
  tells which children were joined;
* of those, the ones with an entry are still being delivered, and those without one have ended and are complete.

So a child that has ended costs nothing, and no server has to remember a watcher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from perdure_service.domain import tokens
from perdure_service.errors import InvalidArgument, ViewTooLarge

MAX_ACTIVE_CHILDREN = 1_000
"""Children in one view that have not ended. What they cost is their place in every cursor, about 15 characters each."""

_PLAIN, _WITH_CHILDREN = 1, 2
"""The first member of a token: the two kinds of view, which cannot continue each other."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a watch stands.

    Attributes:
        workflow_id: The watched run's workflow id.
        sequence: The last event of the watched run that was delivered.
        children: The last event delivered of every joined descendant that is not complete, by workflow id; None for a
            watch of one run alone.
    """

    workflow_id: str
    sequence: int = 0
    children: Mapping[str, int] | None = None

    def after(self, workflow_id: str, sequence: int) -> Cursor:
        """Returns the cursor when `sequence` of one of its runs is the last that was delivered of it."""
        if workflow_id == self.workflow_id:
            return replace(self, sequence=sequence)
        return replace(self, children={**(self.children or {}), workflow_id: sequence})

    def encode(self) -> str:
        """Returns the opaque text.

        Raises:
            ViewTooLarge: More children are active than a cursor holds.
        """
        if self.children is None:
            return tokens.encode([_PLAIN, self.workflow_id, self.sequence])
        # The engine's ids of children begin with their parent's; others are kept whole, behind a mark.
        short = {
            one[len(self.workflow_id) :] if one.startswith(self.workflow_id + "-") else "=" + one: sequence
            for one, sequence in self.children.items()
        }
        text = tokens.encode([_WITH_CHILDREN, self.workflow_id, self.sequence, short])
        if len(self.children) > MAX_ACTIVE_CHILDREN or len(text) > tokens.MAX_CHARS:
            raise ViewTooLarge(
                f"{len(self.children)} children are active, and one watch carries about {MAX_ACTIVE_CHILDREN}; "
                "watch the run without children, or the children one by one",
                limit=str(MAX_ACTIVE_CHILDREN),
            )
        return text

    @classmethod
    def decode(cls, text: str, workflow_id: str, *, include_children: bool) -> Cursor:
        """Returns the cursor of a text.

        Args:
            text: As a client gave it back.
            workflow_id: The run that is watched.
            include_children: Whether the watch has its children in the view.

        Raises:
            InvalidArgument: It is not a cursor, or one of another run or view.
        """
        try:
            kind, of_run, sequence, *rest = tokens.decode(text)
            children = _children(of_run, rest) if kind == _WITH_CHILDREN else None
        except (ValueError, TypeError):
            raise InvalidArgument("cursor", "is not a cursor of this service") from None
        known = kind == _WITH_CHILDREN or (kind == _PLAIN and not rest)
        if not known or isinstance(kind, bool) or not _is_sequence(sequence):
            raise InvalidArgument("cursor", "is not a cursor of this service")
        if of_run != workflow_id:
            raise InvalidArgument("cursor", "belongs to another run")
        if include_children and children is None:
            raise InvalidArgument("cursor", "is of a watch without children; begin such a watch without a cursor")
        if children is not None and not include_children:
            raise InvalidArgument("cursor", "is of a watch with children; set include_children to continue it")
        return cls(workflow_id, sequence, children)


def _children(workflow_id: Any, rest: Any) -> dict[str, int]:
    """Returns the positions of children in a token.

    Raises:
        ValueError: They are none.
    """
    (short,) = rest
    if not isinstance(short, dict) or not isinstance(workflow_id, str):
        raise ValueError("not the children of a cursor")
    if not all(key[:1] in ("-", "=") and _is_sequence(sequence) for key, sequence in short.items()):
        raise ValueError("not the children of a cursor")
    found = {key[1:] if key[0] == "=" else workflow_id + key: sequence for key, sequence in short.items()}
    # Cursors are not signed: not the watched run once more, nor what is no id of anything.
    if workflow_id in found or b"\0" in "".join(found).encode():
        raise ValueError("not the children of a cursor")
    return found


def _is_sequence(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
