"""The checkpoint writer's statements go to the driver in one round trip, and fail as SQLAlchemy has them fail."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
import sqlalchemy as sa
from perdure_service.store import hot_statements
from perdure_service.store.engine import create_engine, is_cockroach
from perdure_service.store.silence import SilenceWatch, watch_for_silence
from perdure_service.store.sqlstates import UNIQUE_VIOLATION, is_connection_lost, sqlstate_of

INSERT = "INSERT INTO public.hot (id) VALUES (%(id)s) RETURNING id, id + 1 AS next"


@pytest.fixture(scope="module")
def engine(dialect_url: str) -> Iterator[sa.Engine]:
    engine = create_engine(dialect_url, pool_size=2, statement_timeout=timedelta(seconds=30))
    with engine.begin() as conn:
        conn.execute(sa.text("CREATE TABLE public.hot (id INT PRIMARY KEY)"))
    yield engine
    with engine.begin() as conn:
        conn.execute(sa.text("DROP TABLE public.hot"))
    engine.dispose()


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as conn:
        conn = conn.execution_options(isolation_level="AUTOCOMMIT")
        conn.exec_driver_sql("DELETE FROM public.hot")
        yield conn


def ids(engine: sa.Engine) -> list[int]:
    with engine.begin() as conn:
        return [row[0] for row in conn.execute(sa.text("SELECT id FROM public.hot ORDER BY 1"))]


def driver_of(conn: sa.Connection) -> psycopg.Connection:
    driver = conn.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        pytest.skip("psycopg2 goes through SQLAlchemy, which is tested elsewhere")
    return driver


def test_each_statement_returns_its_rows_by_name(engine: sa.Engine, conn: sa.Connection) -> None:
    for number in range(0, 40, 4):  # often enough that the driver prepares them
        found = hot_statements.commit(conn, [(INSERT, {"id": number + n}) for n in range(3)])
        assert found == [[{"id": number + n, "next": number + n + 1}] for n in range(3)]
        assert hot_statements.commit(conn, [(INSERT, {"id": number + 3})]) == [[{"id": number + 3, "next": number + 4}]]
    assert ids(engine) == list(range(40))


def test_a_parameter_may_be_there_twice_and_be_a_list(conn: sa.Connection) -> None:
    text = "SELECT CAST(%(a)s AS TEXT[]) || CAST(%(b)s AS TEXT) AS one, (CAST(%(a)s AS TEXT[]))[2] AS two"
    assert hot_statements.commit(conn, [(text, {"a": ["x", None], "b": 'y",'})]) == [
        [{"one": ["x", None, 'y",'], "two": None}]
    ]


def test_a_statement_whose_first_use_failed_is_good_for_the_next_one(engine: sa.Engine, conn: sa.Connection) -> None:
    for _ in range(2):
        with pytest.raises(sa.exc.DBAPIError):
            hot_statements.commit(conn, [(INSERT, {"id": 1}), ("SELECT 1 / CAST(%(x)s AS INT) AS x", {"x": 0})])
    assert hot_statements.commit(conn, [("SELECT 1 / CAST(%(x)s AS INT) AS x", {"x": 1})]) == [[{"x": 1}]]
    hot_statements.commit(conn, [(INSERT, {"id": 1})])
    assert ids(engine) == [1]


@pytest.mark.parametrize("count", [1, 3])
def test_statements_that_a_session_has_lost_are_prepared_again(
    engine: sa.Engine, conn: sa.Connection, count: int
) -> None:
    for number in range(0, 3 * count, count):
        hot_statements.commit(conn, [(INSERT, {"id": number + n}) for n in range(count)])
        conn.exec_driver_sql("DEALLOCATE ALL")
    assert ids(engine) == list(range(3 * count))


def test_a_statement_whose_table_has_changed_is_prepared_again(conn: sa.Connection) -> None:
    text = "SELECT * FROM public.hot WHERE id = %(id)s"
    hot_statements.commit(conn, [(INSERT, {"id": 1})])
    assert hot_statements.commit(conn, [(text, {"id": 1})]) == [[{"id": 1}]]
    conn.exec_driver_sql("ALTER TABLE public.hot ADD COLUMN more INT DEFAULT 7")
    try:
        assert hot_statements.commit(conn, [(text, {"id": 1})]) == [[{"id": 1, "more": 7}]]
    finally:
        conn.exec_driver_sql("ALTER TABLE public.hot DROP COLUMN more")


def test_a_value_that_the_driver_refuses_leaves_the_connection_usable(engine: sa.Engine, conn: sa.Connection) -> None:
    text = "SELECT CAST(%(x)s AS TEXT) AS x"
    with pytest.raises((sa.exc.DBAPIError, ValueError)):
        hot_statements.commit(conn, [(INSERT, {"id": 1}), (text, {"x": "a\0b"})])
    assert ids(engine) == []
    assert hot_statements.commit(conn, [(INSERT, {"id": 2}), (text, {"x": "b"})])[1] == [{"x": "b"}]


def test_more_than_the_socket_takes_at_once_goes_and_comes(conn: sa.Connection) -> None:
    text = "SELECT CAST(%(x)s AS TEXT) AS x"
    long = "x" * 4_000_000
    assert hot_statements.commit(conn, [(text, {"x": long})] * 4) == [[{"x": long}]] * 4


def test_statements_together_are_one_transaction(engine: sa.Engine, conn: sa.Connection) -> None:
    with pytest.raises(sa.exc.IntegrityError) as raised:
        hot_statements.commit(
            conn, [(INSERT, {"id": 1}), (INSERT, {"id": 2}), (INSERT, {"id": 1}), (INSERT, {"id": 3})]
        )
    assert sqlstate_of(raised.value) == UNIQUE_VIOLATION
    assert not is_connection_lost(raised.value)
    assert ids(engine) == []
    # Nothing is left open in which the next ones would fail, or wait for a COMMIT.
    hot_statements.commit(conn, [(INSERT, {"id": 1}), (INSERT, {"id": 2})])
    assert ids(engine) == [1, 2]


def test_a_statement_in_a_transaction_of_its_connection_is_committed_with_it(engine: sa.Engine) -> None:
    with engine.connect() as conn, conn.begin() as transaction:
        conn.exec_driver_sql("SELECT 1")
        assert hot_statements.run(conn, (INSERT, {"id": 77})) == [{"id": 77, "next": 78}]
        transaction.rollback()
    assert 77 not in ids(engine)


def test_what_fails_at_the_commit_itself_is_not_said_to_be_committed(engine: sa.Engine, conn: sa.Connection) -> None:
    if is_cockroach(engine):
        pytest.skip("CockroachDB has no deferred constraints")
    conn.exec_driver_sql("CREATE TABLE public.late (id INT, UNIQUE (id) DEFERRABLE INITIALLY DEFERRED)")
    try:
        insert = "INSERT INTO public.late (id) VALUES (%(id)s) RETURNING id"
        with pytest.raises(sa.exc.IntegrityError):
            hot_statements.commit(conn, [(insert, {"id": 1}), (insert, {"id": 1})])
        assert conn.exec_driver_sql("SELECT count(*) FROM public.late").scalar() == 0
    finally:
        conn.exec_driver_sql("DROP TABLE public.late")


def test_a_connection_that_is_lost_on_the_way_is_told_as_lost(engine: sa.Engine, conn: sa.Connection) -> None:
    if is_cockroach(engine):
        pytest.skip("CockroachDB has no pg_terminate_backend")
    end = "SELECT pg_terminate_backend(pg_backend_pid()), %(x)s AS x"
    with pytest.raises(sa.exc.DBAPIError) as raised:
        hot_statements.commit(conn, [(INSERT, {"id": 5}), (end, {"x": 1})])
    assert is_connection_lost(raised.value)
    conn.invalidate()
    assert ids(engine) == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_says_nothing_loses_the_connection(dialect_url: str, count: int) -> None:
    engine = create_engine(dialect_url, pool_size=1, statement_timeout=timedelta(0))
    watch_for_silence(engine, 0.1, SilenceWatch())
    with engine.connect() as conn:
        conn = conn.execution_options(isolation_level="AUTOCOMMIT")
        driver_of(conn)
        with pytest.raises(sa.exc.DBAPIError) as raised:
            hot_statements.commit(conn, [("SELECT pg_sleep(60), %(x)s AS x", {"x": 1})] * count)
        assert is_connection_lost(raised.value)
        conn.invalidate()
    engine.dispose()
