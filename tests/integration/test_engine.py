"""Real errors of a real database, through each dialect and driver, as DBOS and our own store see them."""

import time
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
import sqlalchemy as sa
from dbos._sys_db_postgres import PostgresSystemDatabase
from dbos._utils import retriable_postgres_exception
from perdure_service.durable.retries import repeated
from perdure_service.errors import Contention, Overloaded, PerdureError, StoreUnavailable
from perdure_service.store import engine as engine_module
from perdure_service.store import sqlstates
from perdure_service.store.engine import AmbiguousResult, SerializationConflict, create_engine
from structlog.testing import capture_logs

from tests.helpers import eventually, free_port
from tests.helpers.databases import FORMS, DatabaseServer, url_in_form
from tests.helpers.proxy import DatabaseProxy

STATEMENT_TIMEOUT = timedelta(seconds=20)
REPEATED = {"40001", "40003", "40P01", "57P01", "57P02", "57P03", "53300", "08006", "25P03", "58C00", "58C01", "XXC02"}
NOT_REPEATED = {"23505", "23503", "55P03", "57014", "P0001", "42P01", "22012", "XXUUU"}


@pytest.fixture(scope="module", params=FORMS)
def engine(database_server: DatabaseServer, request: pytest.FixtureRequest) -> Iterator[sa.Engine]:
    if request.param not in database_server.forms:
        pytest.skip(f"CockroachDB is not reached by {request.param}")
    engine = create_engine(
        url_in_form(database_server.url, request.param), pool_size=5, statement_timeout=STATEMENT_TIMEOUT
    )
    yield engine
    engine.dispose()


def raising(engine: sa.Engine, code: str) -> str:
    """Returns a statement that fails with `code` on the server."""
    with engine.connect() as connection:
        if "CockroachDB" in connection.exec_driver_sql("SELECT version()").scalar_one():
            return f"SELECT crdb_internal.force_error('{code}', 'made to fail')"
    return f"DO $$ BEGIN RAISE EXCEPTION 'made to fail' USING ERRCODE = '{code}'; END $$"


def failure(engine: sa.Engine, code: str) -> sa.exc.DBAPIError:
    statement = raising(engine, code)
    with pytest.raises(sa.exc.DBAPIError) as failed, engine.begin() as connection:
        connection.exec_driver_sql(statement)
    return failed.value


def test_a_read_has_no_transaction_and_leaves_its_connection_to_transactions(engine: sa.Engine) -> None:
    single = create_engine(
        engine.url.render_as_string(hide_password=False), pool_size=1, statement_timeout=STATEMENT_TIMEOUT
    )
    now, isolation = sa.text("SELECT now()"), sa.text("SHOW transaction_isolation")

    def read(connection: sa.Connection) -> object:
        assert connection.connection.driver_connection.autocommit  # type: ignore[union-attr]
        # Each statement is a transaction of its own, with a time of its own.
        first, second = connection.execute(now).scalar_one(), connection.execute(now).scalar_one()
        assert first < second
        return connection.connection.driver_connection

    with single.begin() as connection:
        before = connection.execute(isolation).scalar_one()
    driver_connection = sqlstates.reading(single, "read", read)
    with single.begin() as connection:
        assert connection.connection.driver_connection is driver_connection
        assert not connection.connection.driver_connection.autocommit  # type: ignore[union-attr]
        assert connection.execute(isolation).scalar_one() == before
        assert connection.execute(now).scalar_one() == connection.execute(now).scalar_one()
    single.dispose()


@pytest.mark.parametrize("code", sorted(REPEATED | NOT_REPEATED))
def test_dbos_repeats_what_it_should_and_the_code_stays_known(engine: sa.Engine, code: str) -> None:
    error = failure(engine, code)
    assert retriable_postgres_exception(error) == (code in REPEATED)
    assert sqlstates.sqlstate_of(error) == code
    assert isinstance(error.orig, psycopg.Error)
    assert error.orig.sqlstate  # DBOS reads it without looking whether it is there
    assert "made to fail" in str(error)
    # The driver's own error is the cause.
    assert engine.dialect.loaded_dbapi.Error in type(error.__cause__).__mro__


def test_dbos_recognizes_constraint_violations(engine: sa.Engine) -> None:
    unique, foreign = failure(engine, "23505"), failure(engine, "23503")
    database = PostgresSystemDatabase.__new__(PostgresSystemDatabase)
    assert isinstance(unique, sa.exc.IntegrityError)
    assert database._is_unique_constraint_violation(unique)
    assert not database._is_unique_constraint_violation(foreign)
    assert database._is_foreign_key_violation(foreign)
    assert database._is_statement_timeout(failure(engine, "57014"))


def test_dbos_queue_poller_still_sees_conflicts_and_locks(engine: sa.Engine) -> None:
    """Its claims are not repeated by `db_retry`: it backs off from 40001 and comes again soon after 55P03."""
    database = PostgresSystemDatabase.__new__(PostgresSystemDatabase)
    assert database.is_serialization_conflict(failure(engine, "40001"))
    assert database.is_lock_conflict(failure(engine, "55P03"))
    assert not database.is_serialization_conflict(failure(engine, "40003"))
    assert not database.is_lock_conflict(failure(engine, "40001"))
    assert isinstance(failure(engine, "40001").orig, SerializationConflict)
    assert isinstance(failure(engine, "40003").orig, AmbiguousResult)


def test_a_real_serialization_failure_is_repeated(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS pair")
        connection.exec_driver_sql("CREATE TABLE pair (name TEXT PRIMARY KEY, amount INT)")
        connection.exec_driver_sql("INSERT INTO pair VALUES ('a', 1), ('b', 1)")
    serializable = engine.execution_options(isolation_level="SERIALIZABLE")
    attempts = 0

    def take_a_if_b(connection: sa.Connection) -> int:
        nonlocal attempts
        attempts += 1
        total = connection.exec_driver_sql("SELECT sum(amount) FROM pair").scalar_one()
        if attempts == 1:
            with serializable.begin() as other:
                other.exec_driver_sql("SELECT sum(amount) FROM pair").scalar_one()
                other.exec_driver_sql("UPDATE pair SET amount = 0 WHERE name = 'b'")
        connection.exec_driver_sql("UPDATE pair SET amount = 0 WHERE name = 'a'")
        return int(total)

    with capture_logs() as lines:
        total = sqlstates.retrying(serializable, "take_a_if_b", take_a_if_b)
    assert (total, attempts) == (1, 2)
    assert [line["sqlstate"] for line in lines] == ["40001"]


def test_a_held_lock_is_contention(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS held (id INT PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO held VALUES (1) ON CONFLICT DO NOTHING")
    with engine.begin() as holder:
        holder.exec_driver_sql("SELECT * FROM held WHERE id = 1 FOR UPDATE")
        with capture_logs(), pytest.raises(Contention):
            sqlstates.retrying(engine, "held", lambda c: c.exec_driver_sql("SELECT * FROM held FOR UPDATE NOWAIT"))


def test_a_statement_has_its_timeout_and_is_not_repeated(engine: sa.Engine) -> None:
    short = create_engine(
        engine.url.render_as_string(hide_password=False), pool_size=1, statement_timeout=timedelta(milliseconds=50)
    )
    with pytest.raises(sa.exc.DBAPIError) as failed, short.begin() as connection:
        connection.exec_driver_sql("SELECT pg_sleep(30)")
    assert sqlstates.sqlstate_of(failed.value) == "57014"
    assert not retriable_postgres_exception(failed.value)
    assert isinstance(sqlstates.translate(failed.value), StoreUnavailable)
    short.dispose()


def test_a_session_has_its_settings(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar_one()
            for name in ("application_name", "statement_timeout", "idle_in_transaction_session_timeout")
        }
        connection.rollback()
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() == settings["statement_timeout"]
    assert settings == {
        "application_name": "perdure",
        "statement_timeout": settings["statement_timeout"],
        "idle_in_transaction_session_timeout": settings["idle_in_transaction_session_timeout"],
    }
    assert settings["statement_timeout"] in ("20s", "20000")
    assert settings["idle_in_transaction_session_timeout"] in ("1min", "60000")


@pytest.mark.parametrize("form", FORMS)
def test_a_refused_connection_is_repeated_by_dbos_and_unavailable_to_us(form: str) -> None:
    engine = create_engine(
        f"{form}://u:s3cr3t@127.0.0.1:{free_port()}/d", pool_size=1, statement_timeout=STATEMENT_TIMEOUT
    )
    with pytest.raises(sa.exc.DBAPIError) as refused:
        engine.connect()
    assert retriable_postgres_exception(refused.value)
    assert isinstance(sqlstates.translate(refused.value), StoreUnavailable)
    assert "s3cr3t" not in str(refused.value)
    with capture_logs(), pytest.raises(StoreUnavailable):
        sqlstates.retrying(engine, "refused", lambda _connection: None, budget=timedelta(seconds=0.1))


def end_session(engine: sa.Engine, pid: int) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")
    eventually(lambda: not _backend_lives(engine, pid))


def _backend_lives(engine: sa.Engine, pid: int) -> bool:
    with engine.connect() as connection:
        return bool(connection.exec_driver_sql(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}").scalar_one())


@pytest.fixture
def postgresql_only(database_server: DatabaseServer) -> None:
    if database_server.cockroach:
        pytest.skip("CockroachDB has no pg_terminate_backend")


@pytest.mark.usefixtures("postgresql_only")
def test_a_session_that_was_ended_is_repeated_by_dbos(engine: sa.Engine) -> None:
    def use_it() -> None:
        with engine.begin() as connection:
            end_session(engine, connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
            connection.exec_driver_sql("SELECT 1")

    with pytest.raises(sa.exc.DBAPIError) as lost:
        use_it()
    assert retriable_postgres_exception(lost.value)
    assert lost.value.connection_invalidated
    assert isinstance(sqlstates.translate(lost.value), StoreUnavailable)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1


@pytest.mark.usefixtures("postgresql_only")
def test_a_transaction_survives_the_end_of_its_session(engine: sa.Engine) -> None:
    attempts = 0

    def fn(connection: sa.Connection) -> int:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            end_session(engine, connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
        return int(connection.exec_driver_sql("SELECT 42").scalar_one())

    with capture_logs():
        assert sqlstates.retrying(engine, "survivor", fn) == 42
    assert attempts == 2


@pytest.mark.usefixtures("postgresql_only")
def test_a_connection_that_idled_is_tried_before_it_is_used(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PING_AFTER_IDLE_S", 0.0)
    other = create_engine(
        engine.url.render_as_string(hide_password=False), pool_size=1, statement_timeout=STATEMENT_TIMEOUT
    )
    with other.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    end_session(engine, pid)
    with other.connect() as connection:
        assert connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() != pid
    other.dispose()


def test_dbos_clock_is_a_whole_number_of_milliseconds(engine: sa.Engine) -> None:
    """`PostgresSystemDatabase._now_ms_sql`, which CockroachDB refuses from psycopg 3 without the DECIMAL."""
    with engine.connect() as connection:
        now_ms = connection.execute(
            sa.select(sa.cast(sa.func.extract("epoch", sa.func.now()) * 1000, sa.BigInteger))
        ).scalar_one()
    assert now_ms > 1_700_000_000_000


def test_the_servers_own_isolation_is_kept(engine: sa.Engine, database_server: DatabaseServer) -> None:
    with engine.connect() as connection:
        isolation = connection.exec_driver_sql("SHOW transaction_isolation").scalar_one()
    assert isolation == ("serializable" if database_server.cockroach else "read committed")


# ---- what a caller is told, and what lies between ------------------------------------------------------------------

TOLD: dict[str, type[PerdureError]] = {
    "40001": Contention,
    "40P01": Contention,
    "55P03": Contention,
    "40003": StoreUnavailable,
    "57014": StoreUnavailable,
    "57P01": StoreUnavailable,
    "57P02": StoreUnavailable,
    "57P03": StoreUnavailable,
    "25P03": StoreUnavailable,
    "58C00": StoreUnavailable,
    "58C01": StoreUnavailable,
    "XXC02": StoreUnavailable,
    "08000": StoreUnavailable,
    "08006": StoreUnavailable,
    "53300": StoreUnavailable,
}


@pytest.mark.parametrize("code", sorted(TOLD))
def test_a_caller_is_told_what_helps_and_when(engine: sa.Engine, code: str) -> None:
    told = sqlstates.translate(failure(engine, code))
    assert type(told) is TOLD[code]
    assert told.status in ("ABORTED", "UNAVAILABLE")
    assert told.retry_delay_s
    assert "made to fail" not in told.message


@pytest.fixture
def proxy(database_server: DatabaseServer) -> Iterator[DatabaseProxy]:
    proxy = DatabaseProxy(database_server.url)
    yield proxy
    proxy.close()


@pytest.fixture(params=FORMS)
def proxied(
    database_server: DatabaseServer, proxy: DatabaseProxy, request: pytest.FixtureRequest
) -> Iterator[sa.Engine]:
    """An engine whose connections go through the proxy."""
    if request.param not in database_server.forms:
        pytest.skip(f"CockroachDB is not reached by {request.param}")
    engine = create_engine(url_in_form(proxy.url, request.param), pool_size=2, statement_timeout=timedelta(seconds=0.3))
    yield engine
    engine.dispose()


@pytest.mark.parametrize("whose", ["ours", "DBOS's"])
def test_a_reset_in_commit_is_repeated_and_what_was_committed_is_found(
    proxied: sa.Engine, proxy: DatabaseProxy, whose: str
) -> None:
    with proxied.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS committed")
        connection.exec_driver_sql("CREATE TABLE committed (id INT PRIMARY KEY)")
    order = proxy.lose_replies("INSERT INTO committed")
    inserted: list[int] = []

    def insert(connection: sa.Connection) -> None:
        statement = "INSERT INTO committed VALUES (1) ON CONFLICT DO NOTHING"
        inserted.append(connection.exec_driver_sql(statement).rowcount)

    @repeated()
    def insert_as_dbos() -> None:
        with proxied.begin() as connection:
            insert(connection)

    with capture_logs():
        if whose == "ours":
            sqlstates.retrying(proxied, "insert", insert)
        else:
            insert_as_dbos()
    assert (order.lost, inserted) == (1, [1, 0])


def test_a_peer_that_says_nothing_any_more_is_a_lost_connection(proxied: sa.Engine, proxy: DatabaseProxy) -> None:
    with proxied.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        proxy.freeze()
        with capture_logs(), pytest.raises(sa.exc.DBAPIError) as lost:
            connection.exec_driver_sql("SELECT 2")
    assert retriable_postgres_exception(lost.value)
    assert isinstance(sqlstates.translate(lost.value), StoreUnavailable)
    proxy.mend()
    with proxied.connect() as connection:
        assert connection.exec_driver_sql("SELECT 3").scalar_one() == 3


def test_who_is_waited_for_does_not_wait_long_for_a_connection(engine: sa.Engine) -> None:
    small = create_engine(
        engine.url.render_as_string(hide_password=False), pool_size=1, statement_timeout=STATEMENT_TIMEOUT
    )
    with small.connect():
        began = time.monotonic()
        with engine_module.waits_for_a_connection(0.05), pytest.raises(sa.exc.TimeoutError) as full:
            small.connect()
        assert time.monotonic() - began < engine_module.POOL_TIMEOUT_S / 2
    assert isinstance(sqlstates.translate(full.value), Overloaded)
    small.dispose()
