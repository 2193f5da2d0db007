"""Objects in an S3-compatible store."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from perdure_service.errors import ConfigurationError, StoreUnavailable

if TYPE_CHECKING:
    from perdure_service.settings import PayloadSettings

PART_BYTES = 8 * 2**20
"""What is larger is sent in parts of this size."""
CONNECT_TIMEOUT, TIMEOUT = timedelta(seconds=3), timedelta(seconds=30)
"""How long a connection, and one whole request, may take."""
RETRIES, RETRY_TIMEOUT = 2, timedelta(seconds=5)
"""How often, and for how long, a request is repeated before the store counts as away."""
NO_BUCKET = "NoSuchBucket"
"""What S3 says instead of NoSuchKey. The library tells of both as a file that is not there."""


class S3Objects:
    """See `store.objects.Objects`. From any thread."""

    def __init__(self, settings: PayloadSettings) -> None:
        """Creates it; nothing is asked of the store yet.

        Raises:
            ConfigurationError: The library is not installed (the extra `s3`).
        """
        try:
            from obstore.store import S3Store
        except ImportError:
            raise ConfigurationError(
                "PERDURE_PAYLOADS__S3_BUCKET needs the extra `s3`: pip install 'perdure[service,s3]'"
            ) from None
        secret = settings.s3_secret_access_key
        given: dict[str, str | None] = {
            "endpoint": settings.s3_endpoint,
            "access_key_id": settings.s3_access_key_id,
            "secret_access_key": None if secret is None else secret.get_secret_value(),
        }
        self._store: Any = S3Store(
            settings.s3_bucket or "",
            region=settings.s3_region,
            client_options={"timeout": TIMEOUT, "connect_timeout": CONNECT_TIMEOUT, "allow_http": True},
            retry_config={"max_retries": RETRIES, "retry_timeout": RETRY_TIMEOUT},
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
        self._prefix = settings.s3_prefix

    def put(self, key: str, data: bytes) -> None:
        """See `Objects`. Until the last part is there, the object is not."""
        import obstore

        with _translated():
            obstore.put(self._store, self._prefix + key, data, chunk_size=PART_BYTES, max_concurrency=2)

    def read(self, key: str, offset: int, size: int) -> bytes | None:
        """See `Objects`."""
        import obstore

        with _translated():
            try:
                return bytes(obstore.get_range(self._store, self._prefix + key, start=offset, length=size))
            except FileNotFoundError as error:
                if NO_BUCKET in str(error):
                    raise
                return None

    def delete(self, key: str) -> None:
        """See `Objects`."""
        import obstore

        with _translated():
            try:
                obstore.delete(self._store, self._prefix + key)
            except FileNotFoundError as error:
                if NO_BUCKET in str(error):
                    raise

    def all(self) -> Iterator[tuple[str, datetime]]:
        """See `Objects`."""
        import obstore

        with _translated():
            for page in obstore.list(self._store, prefix=self._prefix):
                for found in page:
                    yield found["path"].removeprefix(self._prefix), found["last_modified"]

    def try_out(self) -> None:
        """Writes an object of its own, reads, lists and deletes it. What it leaves when it fails is swept.

        Raises:
            StoreUnavailable: The store is away, or refuses one of these.
        """
        key = f"check/{uuid.uuid4()}"
        self.put(key, b"perdure")
        self.read(key, 0, 1)
        next(self.all(), None)
        self.delete(key)


@contextmanager
def _translated() -> Iterator[None]:
    """Tells of a store that is away, or refuses, as StoreUnavailable: a run waits until somebody mends it."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise StoreUnavailable(
            f"The object store is away, or refuses ({type(error).__name__}); wait and repeat the call."
        ) from error
