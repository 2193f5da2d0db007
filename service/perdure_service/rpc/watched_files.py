"""Decides when a file that was read has changed since, so that secrets can be replaced while the server runs."""

from __future__ import annotations

from pathlib import Path

_State = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles:
    """Some files. A change is seen by time, size and inode, through symbolic links, as Kubernetes swaps them."""

    def __init__(self, *paths: Path) -> None:
        """Begins with the files as they are now; read them after this."""
        self._paths = paths
        self._seen = self._state()

    def changed(self) -> bool:
        """Returns whether a file is another than at the last call; read them after this, never before.

        So a change between the two is seen by the next call. One that was seen is not told of again, also when what
        was read then was no good.
        """
        state = self._state()
        changed = state != self._seen
        self._seen = state
        return changed

    def _state(self) -> _State:
        return tuple(map(_state_of, self._paths))


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
