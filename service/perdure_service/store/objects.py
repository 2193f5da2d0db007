"""What this service asks of an object store."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Protocol


class Objects(Protocol):
    """Objects by keys, which are never written twice. Everything blocks, and retries what passes by itself."""

    def put(self, key: str, data: bytes) -> None:
        """Stores an object.

        Raises:
            StoreUnavailable: The store is away; the object may be there.
        """

    def read(self, key: str, offset: int, size: int) -> bytes | None:
        """Returns bytes of an object, None when there is no such object.

        Raises:
            StoreUnavailable: The store is away.
        """

    def delete(self, key: str) -> None:
        """Deletes an object, if it is there.

        Raises:
            StoreUnavailable: The store is away.
        """

    def all(self) -> Iterator[tuple[str, datetime]]:
        """Yields the keys of all objects, and when each was written, by the store's clock.

        Raises:
            StoreUnavailable: The store is away.
        """
