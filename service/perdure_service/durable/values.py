"""How DBOS's stored values become what watchers and callers may see: JSON text, previews, failures."""

from __future__ import annotations

import json
from typing import Any

from dbos._error import DBOSMaxStepRetriesExceeded
from dbos._serialization import PortableWorkflowError, Serializer, deserialize_exception, deserialize_value
from pydantic_core import to_jsonable_python

from perdure_service.domain.runs import Failure

PREVIEW_CHARS = 200
"""How much of a step's output its event shows."""

MESSAGE_CHARS = 2_000
"""How much of an error's message a failure keeps."""


_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, default=str).encode
_FOR_PEOPLE = json.JSONEncoder(ensure_ascii=False, default=str).encode


def to_json(value: Any) -> str:
    """Returns the JSON text of any value; what JSON does not know is written as its `str`."""
    return _COMPACT(_plain(value))


def _plain(value: Any) -> Any:
    return to_jsonable_python(value, fallback=str, inf_nan_mode="null", serialize_unknown=True, bytes_mode="base64")


def preview(value: Any) -> str:
    """Returns the beginning of a value, for people; empty for None."""
    if value is None:
        return ""
    try:
        text = value if isinstance(value, str) else _FOR_PEOPLE(_plain(value))
    except Exception:  # noqa: BLE001 - a value that cannot be shown must not fail the step
        text = f"<{type(value).__name__}>"
    return text if len(text) <= PREVIEW_CHARS else text[: PREVIEW_CHARS - 1] + "…"


def output_json(output: str | None, serialization: str | None, serializer: Serializer) -> str | None:
    """Returns the JSON text of a run's stored output.

    Reads only what this very process has just serialized, so unpickling it runs no foreign code.
    """
    if output is None:
        return None
    return to_json(deserialize_value(output, serialization, serializer))


def failure_of(error: BaseException, step_name: str = "") -> Failure:
    """Returns what a caller may know of an error."""
    cause = error.__cause__
    name = error.name if isinstance(error, PortableWorkflowError) else type(error).__name__
    retryable = name == DBOSMaxStepRetriesExceeded.__name__
    if retryable and getattr(error, "errors", None):
        cause = error.errors[-1]  # type: ignore[attr-defined]
    return Failure(
        type=name,
        message=_message(error),
        step_name=step_name,
        retryable=retryable,
        cause="" if cause is None else f"{type(cause).__name__}: {_message(cause)}",
    )


def stored_failure(
    error: str,
    serialization: str | None,
    serializer: Serializer,
    step_name: str = "",
    seen: BaseException | None = None,
) -> Failure:
    """Returns the failure in an error that this process has just serialized.

    Args:
        error: As stored.
        serialization: How.
        serializer: DBOS's, for formats of its own.
        step_name: The step that raised it.
        seen: The exception itself, if it was seen: for classes that pickle cannot read back.
    """
    try:
        return failure_of(deserialize_exception(error, serialization, serializer), step_name)
    except Exception as broken:  # noqa: BLE001 - an error that cannot be read back is still a failure
        if seen is not None:
            return failure_of(seen, step_name)
        return Failure(type=type(broken).__name__, message="the error cannot be read back", step_name=step_name)


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a broken __str__ of an agent's error
        text = "<no message>"
    return text[:MESSAGE_CHARS]
