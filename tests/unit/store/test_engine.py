from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.errors import ConfigurationError
from perdure_service.store.engine import create_engine, is_cockroach, parse_url
from sqlalchemy.dialects import postgresql

SECRET = "s3cr3t-pass"


def engine_for(url: str) -> sa.Engine:
    return create_engine(url, pool_size=3, statement_timeout=timedelta(seconds=7))


def connect_arguments(url: str) -> dict[str, object]:
    """Returns what the driver would be called with."""
    engine = engine_for(url)
    seen: dict[str, object] = {}

    @sa.event.listens_for(engine, "do_connect")
    def _capture(_dialect: object, _record: object, _args: object, kwargs: dict[str, object]) -> None:
        seen.update(kwargs)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        engine.connect()
    return seen


@pytest.mark.parametrize(
    ("url", "dialect", "driver"),
    [
        ("postgresql://u@h/d", "postgresql", "psycopg"),
        ("postgresql+psycopg://u@h/d", "postgresql", "psycopg"),
        ("cockroachdb+psycopg://u@h/d", "cockroachdb", "psycopg"),
        ("cockroachdb://u@h/d", "cockroachdb", "psycopg2"),
        ("cockroachdb+psycopg2://u@h/d", "cockroachdb", "psycopg2"),
    ],
)
def test_each_form_gets_its_driver(url: str, dialect: str, driver: str) -> None:
    engine = engine_for(url)
    assert (engine.dialect.name, engine.dialect.driver) == (dialect, driver)
    assert is_cockroach(engine) == (dialect == "cockroachdb")


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://u:{SECRET}@h/d",
        f"postgresql+psycopg2://u:{SECRET}@h/d",
        f"postgresql+asyncpg://u:{SECRET}@h/d",
        f"sqlite:///{SECRET}",
        f"postgresql://u:pa/{SECRET}@h:xyz/d",
        f"postgresql://u@h:{SECRET}/d",
        SECRET,
        "",
    ],
)
def test_another_url_is_refused_with_the_allowed_forms_and_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_url(url)
    assert "cockroachdb+psycopg://" in refused.value.message
    assert "postgresql://" in refused.value.message
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize("url", ["postgresql://u@h/d", "cockroachdb+psycopg://u@h/d", "cockroachdb://u@h/d"])
def test_a_session_is_set_when_it_is_opened(url: str) -> None:
    arguments = connect_arguments(url)
    assert arguments["application_name"] == "perdure"
    assert arguments["connect_timeout"] == 10
    assert "-c statement_timeout=7000" in str(arguments["options"])
    assert "-c idle_in_transaction_session_timeout=60000" in str(arguments["options"])
    assert "lock_timeout" not in str(arguments)  # DBOS would make a failed run of a wait


def test_only_postgresql_is_asked_to_be_writable() -> None:
    assert connect_arguments("postgresql://u@h/d")["target_session_attrs"] == "read-write"
    assert "target_session_attrs" not in connect_arguments("cockroachdb://u@h/d")


def test_what_the_url_says_wins() -> None:
    arguments = connect_arguments(
        "postgresql://u@h/d?application_name=mine&connect_timeout=3&options=-c%20statement_timeout%3D1"
        "&target_session_attrs=any"
    )
    assert arguments["application_name"] == "mine"
    assert arguments["connect_timeout"] == "3"
    assert arguments["target_session_attrs"] == "any"
    assert str(arguments["options"]).endswith("-c statement_timeout=1")


def test_extract_is_a_decimal_on_cockroachdb_and_untouched_elsewhere() -> None:
    epoch = sa.cast(sa.func.extract("epoch", sa.func.now()) * 1000, sa.BigInteger)
    assert "EXTRACT(epoch FROM now())::DECIMAL *" in str(epoch.compile(engine_for("cockroachdb+psycopg://h/d")))
    assert "DECIMAL" not in str(epoch.compile(dialect=postgresql.dialect()))
    assert "DECIMAL" not in str(epoch.compile())


def test_the_engine_hides_parameters_and_bounds_its_pool() -> None:
    engine = engine_for("postgresql://u@h/d")
    assert engine.hide_parameters
    assert engine.pool.size() == 3  # type: ignore[attr-defined]
    assert engine.pool._max_overflow == 0  # type: ignore[attr-defined]
