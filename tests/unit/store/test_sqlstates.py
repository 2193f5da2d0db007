from collections.abc import Callable
from datetime import timedelta

import psycopg
import pytest
import sqlalchemy as sa
from perdure_service.errors import ConfigurationError, Contention, Overloaded, PerdureError, StoreUnavailable
from perdure_service.store import sqlstates
from structlog.testing import capture_logs


def database_error(code: str | None, *, invalidated: bool = False, text: str = "said") -> sa.exc.DBAPIError:
    original = psycopg.errors.lookup(code)(text) if code else psycopg.OperationalError(text)
    return sa.exc.OperationalError("SELECT 1", {}, original, connection_invalidated=invalidated)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> sa.Engine:
    """Any database will do: what is tried is the repeating, and the errors are made here."""
    monkeypatch.setattr(sqlstates, "FIRST_BACKOFF_S", 0.0)
    return sa.create_engine("sqlite://", poolclass=sa.NullPool)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("40001", Contention),
        ("40P01", Contention),
        ("55P03", Contention),
        ("40003", StoreUnavailable),
        ("57014", StoreUnavailable),
        ("57P01", StoreUnavailable),
        ("57P02", StoreUnavailable),
        ("57P03", StoreUnavailable),
        ("25P03", StoreUnavailable),
        ("08006", StoreUnavailable),
        ("53300", StoreUnavailable),
        ("53100", StoreUnavailable),
        (None, StoreUnavailable),
        ("23505", None),
        ("23503", None),
        ("42P01", None),
        ("22012", None),
    ],
)
def test_callers_are_told_what_they_can_do(code: str | None, told: type[PerdureError] | None) -> None:
    answer = sqlstates.translate(database_error(code))
    assert type(answer) is (told or type(None))
    if answer is not None:
        assert answer.retry_delay_s


def test_a_timeout_of_a_statement_and_of_the_pool_are_told_apart() -> None:
    canceled = sqlstates.translate(database_error("57014"))
    no_connection = sqlstates.translate(sa.exc.TimeoutError("QueuePool limit"))
    assert canceled is not None
    assert "statement timeout" in canceled.message
    assert isinstance(no_connection, Overloaded)
    assert "in use" in no_connection.message


def test_other_errors_are_none_of_its_business() -> None:
    assert sqlstates.translate(ValueError()) is None
    assert sqlstates.translate(ConfigurationError("x")) is None
    assert sqlstates.sqlstate_of(ValueError()) is None


@pytest.mark.parametrize("repeating", [sqlstates.retrying, sqlstates.reading])
@pytest.mark.parametrize("code", ["40001", "40003", "40P01", "57P01", None])
def test_a_transaction_and_a_read_are_repeated_as_a_whole(
    engine: sa.Engine, code: str | None, repeating: Callable[..., int]
) -> None:
    calls = 0

    def fn(connection: sa.Connection) -> int:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise database_error(code)
        return connection.execute(sa.text("SELECT 42")).scalar_one()

    with capture_logs() as lines:
        assert repeating(engine, "answer", fn) == 42
    assert [line["attempt"] for line in lines] == [1, 2, 3]
    assert {line["transaction"] for line in lines} == {"answer"}
    assert {line["sqlstate"] for line in lines} == {code}


@pytest.mark.parametrize("repeating", [sqlstates.retrying, sqlstates.reading])
@pytest.mark.parametrize(
    ("code", "told", "calls_expected"),
    [
        ("40001", Contention, sqlstates.MAX_ATTEMPTS),
        ("57P03", StoreUnavailable, sqlstates.MAX_ATTEMPTS),
        ("55P03", Contention, 1),
        ("57014", StoreUnavailable, 1),
        ("53300", StoreUnavailable, 1),
        ("23505", sa.exc.OperationalError, 1),
    ],
)
def test_what_cannot_be_helped_is_raised(
    engine: sa.Engine, code: str, told: type[Exception], calls_expected: int, repeating: Callable[..., None]
) -> None:
    calls = 0

    def fn(_connection: sa.Connection) -> None:
        nonlocal calls
        calls += 1
        raise database_error(code)

    with capture_logs(), pytest.raises(told):
        repeating(engine, "vain", fn)
    assert calls == calls_expected


def test_no_attempt_begins_after_the_budget(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlstates, "FIRST_BACKOFF_S", 10.0)
    calls = 0

    def fn(_connection: sa.Connection) -> None:
        nonlocal calls
        calls += 1
        raise database_error("40001")

    with capture_logs(), pytest.raises(Contention):
        sqlstates.retrying(engine, "late", fn, budget=timedelta(milliseconds=1))
    assert calls == 1


def test_an_error_of_the_function_itself_passes(engine: sa.Engine) -> None:
    def fn(_connection: sa.Connection) -> None:
        raise ConfigurationError("its own")

    with pytest.raises(ConfigurationError, match="its own"):
        sqlstates.retrying(engine, "own", fn)
