"""Objects in an S3-compatible store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from perdure_service.errors import ConfigurationError, StoreUnavailable

if TYPE_CHECKING:
    from perdure_service.settings import PayloadSettings

PART_BYTES = 8 * 2**20
"""What is larger is sent in parts of this size."""
TIMEOUT_S = 10.0
"""How long a connection, or an answer, is waited for."""
ATTEMPTS = 3
"""How often one request is tried before the store counts as away."""


class S3Objects:
    """See `store.objects.Objects`. From any thread."""

    def __init__(self, settings: PayloadSettings) -> None:
        """Creates it; nothing is asked of the store yet.

        Raises:
            ConfigurationError: The library is not installed (the extra `s3`).
        """
        try:
            import boto3
            from boto3.s3.transfer import TransferConfig
            from botocore.config import Config
        except ImportError:
            raise ConfigurationError(
                "PERDURE_PAYLOADS__S3_BUCKET needs the extra `s3`: pip install 'perdure[service,s3]'"
            ) from None
        secret = settings.s3_secret_access_key
        # A client of its own session is used by any number of threads.
        self._client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=settings.s3_endpoint,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key_id,
            aws_secret_access_key=None if secret is None else secret.get_secret_value(),
            config=Config(
                connect_timeout=TIMEOUT_S,
                read_timeout=TIMEOUT_S,
                retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
                max_pool_connections=32,
                s3={"addressing_style": "path"} if settings.s3_endpoint else {},
            ),
        )
        self._parts = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=1, use_threads=False
        )
        self._bucket = settings.s3_bucket
        self._prefix = settings.s3_prefix

    def put(self, key: str, data: bytes) -> None:
        """See `Objects`. Until the last part is there, the object is not."""
        from io import BytesIO

        with _translated():
            self._client.upload_fileobj(BytesIO(data), self._bucket, self._prefix + key, Config=self._parts)

    def read(self, key: str, offset: int, size: int) -> bytes | None:
        """See `Objects`."""
        from botocore.exceptions import ClientError

        with _translated():
            try:
                found = self._client.get_object(
                    Bucket=self._bucket, Key=self._prefix + key, Range=f"bytes={offset}-{offset + size - 1}"
                )
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") == "NoSuchKey":
                    return None
                raise
            data: bytes = found["Body"].read()
            return data

    def delete(self, key: str) -> None:
        """See `Objects`."""
        with _translated():
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def all(self) -> Iterator[tuple[str, datetime]]:
        """See `Objects`."""
        with _translated():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            for page in pages:
                for found in page.get("Contents", ()):
                    yield found["Key"].removeprefix(self._prefix), found["LastModified"]


@contextmanager
def _translated() -> Iterator[None]:
    """Tells of a store that is away, or refuses, as StoreUnavailable: a run waits until somebody mends it."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))[:64]
        raise StoreUnavailable(f"The object store refuses ({code}); wait and repeat the call.") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StoreUnavailable(
            f"The object store cannot be reached ({type(error).__name__}); wait and repeat the call."
        ) from error
