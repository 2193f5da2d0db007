"""What cursors and page tokens are on the wire: a JSON value in URL-safe Base64, opaque to whoever gets one."""

from __future__ import annotations

import base64
import json
from typing import Any

MAX_CHARS = 32_768
"""Longer than any token: a filter has at most 32 labels of 63 and 256 characters, and cursors are bounded."""


def encode(value: Any) -> str:
    """Returns the token of a JSON value."""
    return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).decode().rstrip("=")


def decode(token: str) -> Any:
    """Returns the value of a token.

    Raises:
        ValueError: It is too long, or not a token.
    """
    if len(token) > MAX_CHARS:
        raise ValueError("too long for a token")
    try:
        return json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (TypeError, RecursionError):
        raise ValueError("not a token") from None
