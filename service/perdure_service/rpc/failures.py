"""Decides what a caller learns of an error, and writes the one line of log that a failed call gets."""

from __future__ import annotations

import asyncio
import secrets
import traceback
from typing import Any

import grpc.aio
import structlog

from perdure_service.errors import ConfigurationError, Draining, InvalidArgument, PerdureError
from perdure_service.logs import censor_text
from perdure_service.rpc.calls import Call
from perdure_service.rpc.status import WireError, internal_error, wire_error

SERVER_FAULTS = frozenset({"INTERNAL", "UNAVAILABLE"})
"""Status codes that make a server's span one that failed (OpenTelemetry's conventions for gRPC)."""
MAX_CAUSE = 300
"""Characters of a cause in the log."""

_log = structlog.get_logger(__name__)


def passes(error: BaseException) -> bool:
    """Returns whether an exception is gRPC's or Python's own business."""
    if isinstance(error, asyncio.CancelledError):
        # The client went away, which is how most streams end, or the server stops. When nobody cancelled this task,
        # something that the call waited for was cancelled, and gRPC would leave the client without an answer.
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    # AbortError: a servicer of gRPC's own (health) has answered.
    return isinstance(error, (grpc.aio.AbortError, GeneratorExit, KeyboardInterrupt, SystemExit))


def described(error: BaseException, call: Call, duration_s: float) -> tuple[WireError, str]:
    """Returns what the caller learns and the reason, and writes the one line of log that a failed call gets."""
    public = _public(error)
    facts: dict[str, Any] = {"caller": call.caller, "duration_ms": round(duration_s * 1_000)}
    if public is None:
        error_id = secrets.token_hex(8)
        _hide_parameters(error)
        # As text, not as exc_info: a renderer may print local variables, and with them what users wrote.
        facts["exception"] = "".join(traceback.format_exception(error))
        _log.error("rpc.failed", code="INTERNAL", reason="INTERNAL", error_id=error_id, **facts)
        return internal_error(error_id), "INTERNAL"
    cause = public.__cause__ or (None if public is error else error)
    if cause is not None:
        # Censored before it is cut: of half a URL nobody could tell where its password is.
        facts["cause"] = censor_text(f"{type(cause).__qualname__}: {getattr(cause, 'orig', None) or cause}")[:MAX_CAUSE]
    if isinstance(public, InvalidArgument):  # what a violation says may quote the input; its path does not
        facts["fields"] = [path for path, _ in public.violations]
    else:
        facts["error"] = public.message[:MAX_CAUSE]
    getattr(_log, _level(public))("rpc.failed", code=public.status, reason=public.reason, **facts)
    return wire_error(public), public.reason


def _level(error: PerdureError) -> str:
    if isinstance(error, Draining):  # by design, and of every open stream at once
        return "debug"
    return "warning" if error.status in SERVER_FAULTS else "info"


def _public(error: BaseException) -> PerdureError | None:
    """Returns the error that the caller may see; None when the caller may see none."""
    if not isinstance(error, PerdureError):
        translated = _translated(error)
        if translated is None:
            return None
        error = translated
    if isinstance(error, ConfigurationError) or error.status == "INTERNAL":
        return None
    return error


def _translated(error: BaseException) -> PerdureError | None:
    """Returns what an error of the database that nobody translated means, if it is one."""
    if not isinstance(error, Exception):
        return None
    from perdure_service.store.sqlstates import translate  # only now: it brings the whole of SQLAlchemy

    try:
        return translate(error)
    except Exception:  # noqa: BLE001 - whatever is wrong with the translation, the call still gets an answer
        _log.exception("rpc.untranslatable", error_type=type(error).__qualname__)
        return None


def _hide_parameters(error: BaseException) -> None:
    """Keeps what users wrote out of the log: SQLAlchemy's errors print the statement's parameters unless told."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if hasattr(current, "hide_parameters"):
            current.hide_parameters = True
        todo += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]
