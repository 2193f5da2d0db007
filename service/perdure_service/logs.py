"""Decides how log lines look: one event name plus fields, JSON or for a person, with secrets and payloads left out.

What an agent raises may quote its input, so of an exception in a library's record (DBOS logs what a workflow or step
raised) only types and places are told; the message is in the run, `AgentRun.failure`, and not in the log.

Everything goes through it: structlog's own events and the records of `logging` (DBOS, gRPC, SQLAlchemy, warnings).
Fields bound with `structlog.contextvars` (run_id, step_name, attempt, executor_id, trace_id) are on every line, and so
are `call_id` and `rpc` of what is done for a call.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from perdure_service import event_loop
from perdure_service.errors import ConfigurationError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "console")
QUIET_LIBRARIES = (
    "asyncio", "httpcore", "httpcore2", "httpx", "httpx2", "openai", "opentelemetry", "sqlalchemy", "urllib3",
    "watchfiles",
)  # fmt: skip
"""Never below WARNING: at DEBUG and INFO some of these log statements, request bodies, headers, the URLs that an agent
reads, or what we say ourselves."""
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
# Where PostgreSQL quotes rows ("Failing row contains …", "Key (…)=(…)"), up to what SQLAlchemy or a traceback adds.
_ROW = re.compile(
    r"(?P<before>\n(?:DETAIL|CONTEXT|QUERY):).*?(?=\n\[SQL: |\n\(Background on |\n\nThe above exception |"
    r"\n\nDuring handling |\Z)",
    re.DOTALL,
)
_NAME_ALONE = re.compile(r"[\w./@+-]*")
"""An id, a name, a path: nothing of these can be in it, as each needs a space, a colon, `=` or a newline. Most texts of
a line are such, and every start of a run writes one."""
_BEARER = re.compile(r"(?P<before>\b(?:bearer|basic)\s+)[a-z0-9._~+/=-]{8,}", re.IGNORECASE)


_call: ContextVar[tuple[str, str] | None] = ContextVar("perdure_logged_call", default=None)


def tell_call(call_id: str, rpc: str) -> None:
    """Has the lines of this context tell for which call it works: one variable, as every call sets it."""
    _call.set((call_id, rpc))


def add_call(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Adds to a line for which call it is; a processor."""
    if (call := _call.get()) is not None:
        event.setdefault("call_id", call[0])
        event.setdefault("rpc", call[1])
    return event


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
        add_call,
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
    handler.addFilter(_without_payloads)
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
    _audit.lines = GatheredLines(stream) if as_json else None
    _audit.configured = None if _audit.lines is None else _StraightAuditLog(_audit.lines)
    _take_over_dbos(handler, root.level)
    logging.captureWarnings(True)


class _Audit:
    """The audit log of this process, once it is configured and not for a person."""

    configured: _StraightAuditLog | None = None
    lines: GatheredLines | None = None


_audit = _Audit()


class GatheredLines:
    """Lines of one loop, written together: each write lets go of the interpreter's lock, and stands in line for it.

    What is said while the loop answers other calls, too, goes out by one write at the end of that round; whoever must
    not go on before waits for `written`. Without a loop a line is written at once.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text: list[str] = []
        self._waiting: list[asyncio.Future[None]] = []

    def write(self, text: str) -> None:
        """Takes a line."""
        self._text.append(text)

    def flush(self) -> None:
        """Writes what was taken, or has the running loop do so."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._write_all()
            return
        if len(self._text) == 1:
            loop.call_soon(self._write_all)

    async def written(self) -> None:
        """Returns when everything that was taken is written.

        Raises:
            OSError: It could not be.
        """
        if self._text:
            done = asyncio.get_running_loop().create_future()
            self._waiting.append(done)
            if event_loop.only_one_waits():  # that write, which nobody can share: no need to wait for its turn
                self._write_all()
            await done

    def _write_all(self) -> None:
        if not self._text:
            return  # it was written before its turn
        text, self._text = self._text, []
        waiting, self._waiting = self._waiting, []
        failed: Exception | None = None
        try:
            self._stream.write("".join(text))
            self._stream.flush()
        except Exception as error:  # noqa: BLE001 - raised to those whose lines they were
            failed = error
        for one in waiting:
            if one.done():
                continue
            if failed is None:
                one.set_result(None)
            else:
                one.set_exception(failed)


async def audit_written() -> None:
    """Returns when the audit lines so far are written: who is answered is in the log.

    Raises:
        OSError: They could not be.
    """
    if _audit.lines is not None:
        await _audit.lines.written()


def audit_log() -> Any:
    """Returns the logger of audit lines: each start of a run writes one, so as JSON it goes straight to the stream.

    Through `logging` a line costs several times as much.
    """
    return _audit.configured or structlog.get_logger(AUDIT_LOGGER)


class _StraightAuditLog:
    """Writes lines as the configured processors would, without them: each start of a run has one."""

    def __init__(self, lines: GatheredLines) -> None:
        self._lines = lines

    def info(self, event: str, **facts: Any) -> None:
        """Writes a line."""
        said: EventDict = {**structlog.contextvars.get_contextvars(), **facts}
        line = {
            **censor(None, "info", add_call(None, "info", said)),
            "event": event,
            "level": "info",
            "logger": AUDIT_LOGGER,
            "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        }
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()


_EXTRA_FIELDS = ("executorID", "operationUUID", "traceId", "exception")
"""What DBOS adds to its records and is of use (its other additions repeat what the process knows), and what
`_without_payloads` makes of an exception."""
_QUOTES_AN_OBJECT = "Error serializing object: "
"""How DBOS begins the record of a value that pickle cannot store; the value follows."""
MAX_LINES = 300
"""Of a traceback."""


def _without_payloads(record: logging.LogRecord) -> bool:
    """Leaves out of a library's record what may be a payload: messages of exceptions, and a value that DBOS quotes."""
    if isinstance(record.msg, dict):  # structlog's own event, whose fields `censor` sees
        return True
    if isinstance(record.msg, str) and record.msg.startswith(_QUOTES_AN_OBJECT):
        record.msg, record.args = f"{_QUOTES_AN_OBJECT}{CENSORED}", ()
    if record.name == "asyncio":  # the lines after its first are the task with its error or result
        record.msg, record.args = record.getMessage().partition("\n")[0], ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exception = "\n".join(_places(record.exc_info[1]))
    record.exc_info = record.exc_text = None
    return True


def _places(error: BaseException) -> list[str]:
    """Returns the lines of a traceback without its messages: types and places of an error and of its causes."""
    lines: list[str] = []
    current: BaseException | None = error
    while current is not None and len(lines) < MAX_LINES:
        lines.append(f"{type(current).__module__}.{type(current).__qualname__}, raised in")
        lines += [
            f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(current.__traceback__)
        ]
        if isinstance(current, BaseExceptionGroup):
            lines.append(f"  of {len(current.exceptions)}, the first:")
            current = current.exceptions[0]
        elif current.__cause__ is not None or not current.__suppress_context__:
            current = current.__cause__ or current.__context__
        else:
            current = None
    return lines


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
    """Returns `text` without passwords of URLs, values of `password=` and `Bearer`, and rows that are quoted."""
    if _NAME_ALONE.fullmatch(text):
        return text
    for pattern in (_URL_PASSWORD, _KEYWORD_PASSWORD, _BEARER, _ROW):
        text = pattern.sub(rf"\g<before>{CENSORED}", text)
    return text


def _censored(key: str, value: Any, depth: int) -> Any:
    if value is not None and _is_secret(key):
        return CENSORED
    if isinstance(value, str):
        return censor_text(value)
    if isinstance(value, bool | int | float) or value is None:
        return value
    if depth >= MAX_DEPTH:
        return CENSORED
    if isinstance(value, Mapping):
        return {str(inner): _censored(str(inner), item, depth + 1) for inner, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_censored("", item, depth + 1) for item in value]
    # Whatever else it is would be rendered by its text.
    return censor_text(str(value))


@lru_cache(maxsize=1_024)  # field names are few; those inside a value could be anything
def _is_secret(key: str) -> bool:
    name = key.lower().replace("-", "_")
    return bool(_SECRET_KEY.search(name) or _PAYLOAD_KEY.match(name))
