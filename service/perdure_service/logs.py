"""Decides how log lines look: one event name plus fields, JSON or for a person, with secrets and payloads left out.

Everything goes through it: structlog's own events and the records of `logging` (DBOS, gRPC, SQLAlchemy, warnings).
Fields bound with `structlog.contextvars` (run_id, step_name, attempt, executor_id, trace_id) are on every line.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from perdure_service.errors import ConfigurationError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "console")
QUIET_LIBRARIES = ("asyncio", "httpcore", "httpx", "openai", "opentelemetry", "sqlalchemy", "urllib3")
"""Never below WARNING: at DEBUG and INFO some of these log statements and request bodies."""
CENSORED = "***"
AUDIT_LOGGER = "perdure.audit"
"""Its lines are written at every level: who did what is not less true on a quiet server."""
MAX_DEPTH = 6

_SECRET_KEY = re.compile(
    r"(^|[_.])(password|passwd|passphrase|secret|token|authorization|api_?key|access_key|private_key|credentials?|cookie)$"
)
_PAYLOAD_KEY = re.compile(r"^(payload|input|inputs|output|arguments|answer|prompt|completion|parameters)$")
_URL_PASSWORD = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://[^\s:/?#\"'<>]*:)[^\s\"'<>]*(?=@)", re.IGNORECASE)
_KEYWORD_PASSWORD = re.compile(r"(?P<before>\b(?:password|passwd|api_?key|secret|token)\s*[=:]\s*)[^\s,;&\"')}]+", re.I)
_BEARER = re.compile(r"(?P<before>\b(?:bearer|basic)\s+)[a-z0-9._~+/=-]{8,}", re.IGNORECASE)


def configure_logs(log_format: str = "auto", level: str = "info", stream: TextIO | None = None) -> None:
    """Sends the logs of this process to `stream` (standard error), replacing what was configured before.

    Args:
        log_format: `json`, `console` (for a person), or `auto`: console on a terminal, else JSON.
        level: The least severe to log, one of `LEVELS`.
        stream: Where to write.

    Raises:
        ConfigurationError: There is no such format or level.
    """
    if log_format not in FORMATS or level not in LEVELS:
        raise ConfigurationError(f"Logs come as one of {FORMATS}, from one of the levels {LEVELS} on.")
    stream = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        )
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(_EXTRA_FIELDS)],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                censor,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.getLogger(AUDIT_LOGGER).setLevel(logging.INFO)
    _take_over_dbos(handler, root.level)
    logging.captureWarnings(True)


_EXTRA_FIELDS = ("executorID", "operationUUID", "traceId")
"""What DBOS adds to its records and is of use; its other additions repeat what the process knows."""


def _take_over_dbos(handler: logging.Handler, level: int) -> None:
    """DBOS adds a console handler of its own to its logger, unless that has one; so it gets ours."""
    dbos = logging.getLogger("dbos")
    for old in dbos.handlers[:]:
        dbos.removeHandler(old)
    dbos.addHandler(handler)
    dbos.propagate = False
    dbos.addFilter(_is_news)
    # DBOS tells at INFO what it is configured with, at every start and every migration.
    dbos.setLevel(logging.WARNING if level == logging.INFO else level)


def _is_news(record: logging.LogRecord) -> bool:
    """Returns False for what DBOS says of every run that is cancelled, or handed over by a server that stops."""
    return not record.getMessage().startswith("Asyncio task cancelled for workflow or step")


def censor(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Leaves secrets and payloads out of a line: by the field's name, and passwords and tokens out of any text."""
    return {key: _censored(key, value, 0) for key, value in event.items()}


def censor_text(text: str) -> str:
    """Returns `text` without the passwords of URLs and the values of `password=` and `Bearer`."""
    for pattern in (_URL_PASSWORD, _KEYWORD_PASSWORD, _BEARER):
        text = pattern.sub(rf"\g<before>{CENSORED}", text)
    return text


def _censored(key: str, value: Any, depth: int) -> Any:
    name = key.lower().replace("-", "_")
    if value is not None and (_SECRET_KEY.search(name) or _PAYLOAD_KEY.match(name)):
        return CENSORED
    if isinstance(value, bool | int | float) or value is None:
        return value
    if depth >= MAX_DEPTH:
        return CENSORED
    if isinstance(value, Mapping):
        return {str(inner): _censored(str(inner), item, depth + 1) for inner, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_censored("", item, depth + 1) for item in value]
    # Whatever else it is would be rendered by its text.
    return censor_text(value if isinstance(value, str) else str(value))
