import asyncio
import gc
import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog
from perdure_service import event_loop
from perdure_service.errors import ConfigurationError
from perdure_service.logs import AUDIT_LOGGER, audit_log, audit_written, censor_text, configure_logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the logs go; logging is as before in the end."""
    root, dbos = logging.getLogger(), logging.getLogger("dbos")
    before = (root.handlers[:], root.level, dbos.handlers[:], dbos.level, dbos.propagate)
    yield io.StringIO()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:], root.level, dbos.handlers[:], dbos.level, dbos.propagate = before
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_events_and_records_come_out_alike_with_what_is_bound(stream: io.StringIO) -> None:
    configure_logs("json", "info", stream)
    structlog.contextvars.bind_contextvars(run_id="r1", step_name="ask", attempt=2, executor_id="e", trace_id="t")
    structlog.get_logger("perdure_service.x").info("step.ended", duration_ms=3)
    logging.getLogger("dbos").warning("Database %s failed", "connection")
    logging.getLogger("grpc._server").error("broken")
    event, dbos, grpc = lines(stream)
    for line in (event, dbos, grpc):
        assert line["run_id"] == "r1"
        assert (line["step_name"], line["attempt"], line["executor_id"], line["trace_id"]) == ("ask", 2, "e", "t")
        assert str(line["timestamp"]).endswith("Z")
    assert (event["event"], event["duration_ms"], event["level"]) == ("step.ended", 3, "info")
    assert (dbos["event"], dbos["logger"], dbos["level"]) == ("Database connection failed", "dbos", "warning")
    assert grpc["logger"] == "grpc._server"


def test_what_is_less_severe_is_left_out(stream: io.StringIO) -> None:
    configure_logs("json", "warning", stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("dbos").info("quiet")
    logging.getLogger("httpx").info("quiet")
    assert lines(stream) == []


def test_the_libraries_that_are_quieted_are_those_that_log_what_is_sent(stream: io.StringIO) -> None:
    """By the names that the installed ones use: a rename of theirs must be noticed."""
    import httpcore2._async.http11
    import httpx2._client
    import openai._base_client

    loggers = [module.__dict__[name] for module, name in (
        (httpcore2._async.http11, "logger"), (httpx2._client, "logger"), (openai._base_client, "log"),
    )]  # fmt: skip
    configure_logs("json", "debug", stream)
    for logger in loggers:
        logger.info("HTTP Request: GET https://docs.example/?q=of-a-user")
        logger.debug("receive_response_headers.complete [(b'Set-Cookie', b'x')]")
    assert lines(stream) == []


def test_the_audit_is_never_left_out(stream: io.StringIO) -> None:
    configure_logs("json", "error", stream)
    structlog.get_logger(AUDIT_LOGGER).info("audit", caller="ann")
    audit_log().info("audit", caller="ann", token="secret")
    assert [(line["event"], line["logger"], line["caller"]) for line in lines(stream)] == [
        ("audit", AUDIT_LOGGER, "ann")
    ] * 2
    assert "secret" not in stream.getvalue()


class Writes(io.StringIO):
    """A stream that counts writes, and can refuse them."""

    def __init__(self, *, refuses: bool = False) -> None:
        super().__init__()
        self.writes: list[str] = []
        self._refuses = refuses

    def write(self, text: str) -> int:
        if self._refuses:
            raise OSError("the disk is full")
        self.writes.append(text)
        return super().write(text)


async def test_the_audit_lines_of_one_round_are_one_write_and_nobody_goes_on_before_it() -> None:
    stream = Writes()
    configure_logs("json", "error", stream)
    written_before: list[int] = []

    async def call(number: int) -> None:
        audit_log().info("audit", caller=f"c{number}")
        await audit_written()
        written_before.append(len(lines(stream)))

    await asyncio.gather(*(call(number) for number in range(5)))
    assert len(stream.writes) == 1
    assert [line["caller"] for line in lines(stream)] == [f"c{number}" for number in range(5)]
    assert written_before == [5] * 5
    await call(5)
    assert written_before[-1] == 6
    await asyncio.wait_for(audit_written(), 1)  # nothing is left to wait for


async def test_an_audit_line_is_written_although_its_call_does_not_wait() -> None:
    stream = Writes()
    configure_logs("json", "error", stream)

    async def cancelled() -> None:
        audit_log().info("audit", caller="gone")
        await audit_written()

    task = asyncio.create_task(cancelled())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert [line["caller"] for line in lines(stream)] == ["gone"]


def test_a_call_alone_writes_its_audit_line_at_once_and_is_told_if_that_fails() -> None:
    stream = Writes()
    configure_logs("json", "error", stream)

    async def main() -> None:
        audit_log().info("audit", caller="ann")
        with pytest.raises(StopIteration):  # it is over without a turn of the loop
            audit_written().send(None)
        assert [line["caller"] for line in lines(stream)] == ["ann"]
        await asyncio.sleep(0)
        assert len(stream.writes) == 1, "nothing is left for the turn"

        asyncio.get_running_loop().call_soon(audit_log().info, "audit")
        audit_log().info("audit", caller="bob")
        await audit_written()
        assert len(stream.writes) == 2, "another callback may have had more to write"
        assert len(lines(stream)) == 3

        configure_logs("json", "error", Writes(refuses=True))
        audit_log().info("audit", caller="joe")
        with pytest.raises(OSError, match="full"):
            await audit_written()

    event_loop.run(main())


async def test_whoever_waits_for_an_audit_line_that_cannot_be_written_is_told() -> None:
    configure_logs("json", "error", Writes(refuses=True))
    audit_log().info("audit", caller="ann")
    with pytest.raises(OSError, match="full"):
        await audit_written()


def test_dbos_does_not_log_twice_after_it_set_up_its_own_logging(stream: io.StringIO) -> None:
    from dbos._logger import init_logger

    configure_logs("json", "info", stream)
    init_logger()
    logging.getLogger("dbos").info("not at all: DBOS tells its configuration at every start")
    logging.getLogger("dbos").warning("once")
    assert [line["event"] for line in lines(stream)] == ["once"]


def test_what_dbos_says_of_every_cancelled_run_is_left_out(stream: io.StringIO) -> None:
    configure_logs("json", "info", stream)
    logging.getLogger("dbos").warning("Asyncio task cancelled for workflow or step %s", "x")
    logging.getLogger("dbos").warning("something else")
    assert [line["event"] for line in lines(stream)] == ["something else"]


def test_secrets_and_payloads_are_left_out_however_deep(stream: io.StringIO) -> None:
    configure_logs("json", "info", stream)
    structlog.get_logger().info(
        "connecting to postgresql+psycopg://u:hush@h/d",
        password="hush",
        api_key="hush",
        Authorization="Bearer hushhushhush",
        payload={"text": "hush"},
        output="hush",
        headers={"x-api-key": "hush", "accept": "json", "more": [{"refresh_token": "hush"}]},
        said="authorization: Bearer hushhushhush and password=hush",
        input_tokens=12,
    )
    assert "hush" not in stream.getvalue()
    (line,) = lines(stream)
    assert line["event"] == "connecting to postgresql+psycopg://u:***@h/d"
    assert line["input_tokens"] == 12
    assert line["headers"] == {"x-api-key": "***", "accept": "json", "more": [{"refresh_token": "***"}]}


def test_a_traceback_of_ours_is_kept_but_not_its_secrets(stream: io.StringIO) -> None:
    configure_logs("json", "info", stream)
    try:
        raise ValueError("cannot reach postgresql://u:hu@sh@h/d")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "sh@" not in stream.getvalue()
    (line,) = lines(stream)
    assert "ValueError: cannot reach postgresql://u:***@h/d" in str(line["exception"])


class QuotingError(Exception):
    """An error of an agent, which quotes its input."""


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("logger", ["dbos", "asyncio", "concurrent.futures", "grpc._cython.cygrpc"])
def test_of_an_error_in_a_librarys_record_types_and_places_are_told_and_no_message(
    stream: io.StringIO, logger: str, log_format: str
) -> None:
    configure_logs(log_format, "info", stream)
    try:
        try:
            raise KeyError("hush")
        except KeyError as error:
            raise QuotingError("hush") from error
    except QuotingError:
        logging.getLogger(logger).exception("failed")
    try:
        raise ExceptionGroup("hush", [QuotingError("hush"), ValueError("hush")])
    except ExceptionGroup as error:
        logging.getLogger(logger).error("failed", exc_info=error)
    text = stream.getvalue()
    assert "hush" not in text
    assert text.count("failed") >= 2
    for told in ("QuotingError", "KeyError", "ExceptionGroup", "test_logs.py:"):
        assert told in text


async def test_a_task_that_nobody_waited_for_is_told_of_without_its_error(stream: io.StringIO) -> None:
    configure_logs("json", "info", stream)

    async def fail() -> None:
        raise QuotingError("hush")

    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    del task
    gc.collect()
    (line,) = lines(stream)
    assert line["event"] == "Task exception was never retrieved"
    assert "QuotingError" in str(line["exception"])
    assert "hush" not in stream.getvalue()


def test_a_value_that_dbos_quotes_because_it_cannot_store_it_is_left_out(stream: io.StringIO) -> None:
    from dbos._serialization import DBOSDefaultSerializer

    configure_logs("json", "info", stream)
    with pytest.raises(Exception, match="pickle"):
        DBOSDefaultSerializer.serialize({"text": "hush", "lambda": lambda: None})
    assert "hush" not in stream.getvalue()
    (line,) = lines(stream)
    assert line["event"] == "Error serializing object: ***"
    assert "raised in" in str(line["exception"])


def test_a_person_reads_one_line_an_event(stream: io.StringIO) -> None:
    configure_logs("console", "info", stream)
    structlog.get_logger().info("run.started", run_id="r1", token="hush")
    (line,) = stream.getvalue().splitlines()
    assert "run.started" in line
    assert "run_id=r1" in line
    assert "hush" not in line


def test_auto_is_json_where_nobody_watches(stream: io.StringIO) -> None:
    configure_logs("auto", "info", stream)
    structlog.get_logger().info("x")
    assert lines(stream)[0]["event"] == "x"


def test_warnings_are_logged(stream: io.StringIO) -> None:
    configure_logs("json", "info", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old way", stacklevel=1)
    assert "old way" in str(lines(stream)[0]["event"])


@pytest.mark.parametrize(("log_format", "level"), [("xml", "info"), ("json", "loud")])
def test_another_format_or_level_is_refused(log_format: str, level: str) -> None:
    with pytest.raises(ConfigurationError):
        configure_logs(log_format, level)


@pytest.mark.parametrize(
    ("text", "censored"),
    [
        ("postgresql://user:pw@host:5432/db?x=y", "postgresql://user:***@host:5432/db?x=y"),
        ("postgresql://user@host:5432/db", "postgresql://user@host:5432/db"),
        ("https://host/path", "https://host/path"),
        ("redis://:pw@host", "redis://:***@host"),
        ("dsn password=abc host=h", "dsn password=*** host=h"),
        ("nothing here", "nothing here"),
        ("no null\nDETAIL:  Failing row (a,\n\nb).\n[SQL: INSERT]", "no null\nDETAIL:***\n[SQL: INSERT]"),
        (
            "unique\nDETAIL:  Key (a)=(b)\nCONTEXT:  x\n\nThe above exception was",
            "unique\nDETAIL:***\n\nThe above exception was",
        ),
    ],
)
def test_text_keeps_everything_but_passwords(text: str, censored: str) -> None:
    assert censor_text(text) == censored
