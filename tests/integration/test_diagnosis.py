"""Every way in which a database is not fit to serve is one sentence with the way out, and no secret in it."""

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg2
import psycopg2.extras
import pytest
import sqlalchemy as sa
from perdure_service.errors import ConfigurationError
from perdure_service.store import migrations
from perdure_service.store.diagnosis import Finding, diagnose
from perdure_service.store.engine import parse_url

from tests.helpers import eventually, free_port
from tests.helpers.databases import DatabaseServer, not_in_another_form, url_in_form

pytestmark = not_in_another_form

SECRET = "s3cr3t-pass"


def only(findings: list[Finding], severity: str = "error") -> str:
    """Returns the text of the one finding there should be, a single sentence."""
    (finding,) = findings
    assert finding.severity == severity, finding
    assert finding.text.endswith((".", "…"))
    assert "\n" not in finding.text
    assert SECRET not in finding.text
    return finding.text


@pytest.fixture
def server(database_server: DatabaseServer) -> DatabaseServer:
    if database_server.cockroach:
        pytest.skip("these states are PostgreSQL's")
    return database_server


@pytest.fixture
def user(server: DatabaseServer) -> Iterator[str]:
    """A user with nothing but a password."""
    name = f"user_{uuid.uuid4().hex[:8]}"
    server.execute(f"CREATE USER {name} PASSWORD '{SECRET}'")
    yield name
    server.execute(f"DROP OWNED BY {name}")
    server.execute(f"DROP USER {name}")


def as_user(url: str, user: str) -> str:
    return parse_url(url).set(username=user, password=SECRET).render_as_string(hide_password=False)


def in_database(server: DatabaseServer, url: str, statement: str) -> None:
    DatabaseServer(url, cockroach=False).execute(statement)


def test_a_migrated_database_has_nothing_wrong(database_url: str, database_server: DatabaseServer) -> None:
    assert diagnose(database_url) == []


def test_a_url_of_another_kind() -> None:
    assert "mysql://" in only(diagnose(f"mysql://u:{SECRET}@h/d"))
    assert "malformed" in only(diagnose(f"postgresql://u:{SECRET}@h:port/d"))


@pytest.mark.parametrize("form", ["postgresql", "cockroachdb+psycopg", "cockroachdb"])
def test_a_database_that_is_down(form: str) -> None:
    port = free_port()
    text = only(diagnose(f"{form}://u:{SECRET}@127.0.0.1:{port}/d"))
    assert text == f"The database d at 127.0.0.1:{port} is down; start it, or correct the URL."


@pytest.mark.parametrize("form", ["postgresql", "cockroachdb"])
def test_a_socket_without_a_database(form: str, tmp_path: Path) -> None:
    assert "is down; start it" in only(diagnose(f"{form}://u@/d?host={quote(str(tmp_path))}"))


@pytest.mark.parametrize("form", ["postgresql", "cockroachdb"])
def test_a_host_that_does_not_exist(form: str) -> None:
    assert "no such host" in only(diagnose(f"{form}://u:{SECRET}@nowhere.invalid/d"))


@pytest.mark.parametrize("form", ["postgresql+psycopg", "cockroachdb+psycopg2"])
def test_no_such_database(server: DatabaseServer, form: str) -> None:
    text = only(diagnose(server.url_of("no_such_one", form)))
    assert "The database no_such_one at" in text
    assert "does not exist; create it, or correct the URL." in text


@pytest.mark.parametrize("form", ["postgresql+psycopg", "cockroachdb+psycopg2"])
def test_an_unknown_user(server: DatabaseServer, form: str) -> None:
    text = only(diagnose(as_user(server.url_of("postgres", form), "stranger")))
    assert "does not let stranger in; correct user and password" in text


@pytest.fixture
def strict_server() -> Iterator[DatabaseServer]:
    """A server that wants passwords."""
    from perdure_service.store import embedded

    data_dir = Path(tempfile.mkdtemp(prefix="perdure-strict-"))
    with embedded.start(data_dir) as postgres:
        server = DatabaseServer(postgres.url("postgres"), cockroach=False)
        server.execute("CREATE USER careful PASSWORD 'right'")
        (data_dir / "postgres" / "pg_hba.conf").write_text("local all careful scram-sha-256\nlocal all all trust\n")
        server.execute("SELECT pg_reload_conf()")
        yield server
    shutil.rmtree(data_dir, ignore_errors=True)


def test_a_wrong_password_and_none(strict_server: DatabaseServer) -> None:
    for form in ("postgresql+psycopg", "cockroachdb+psycopg2"):
        url = strict_server.url_of("postgres", form)
        wrong = eventually(lambda url=url: diagnose(as_user(url, "careful")))
        assert "does not let careful in; correct user and password" in only(wrong)
        missing = diagnose(parse_url(url).set(username="careful").render_as_string())
        assert "wants a password for careful" in only(missing)


def test_a_database_that_was_not_migrated(empty_database_url: str) -> None:
    text = only(diagnose(empty_database_url))
    assert text == "The database has not been migrated; run `perdure-server migrate`."


def test_a_schema_too_old_and_too_new(database_url: str) -> None:
    newer = [*migrations.shipped()]
    newer.append(migrations.Migration(len(newer) + 1, "later", ()))
    too_old = diagnose(database_url, [lambda engine: migrations.verify(engine, newer)])
    assert "is older than this server needs" in only(too_old)
    assert "run `perdure-server migrate`" in only(too_old)
    too_new = diagnose(database_url, [lambda engine: migrations.verify(engine, newer[:2])])
    assert "upgrade the server" in only(too_new)


def test_the_checks_of_others_are_asked_in_turn(database_url: str) -> None:
    def dbos(_engine: sa.Engine) -> None:
        raise ConfigurationError("DBOS's tables are old; run `perdure-server migrate`.")

    assert "DBOS's tables are old" in only(diagnose(database_url, [migrations.verify, dbos]))


def test_missing_rights_are_named(server: DatabaseServer, database_url: str, user: str) -> None:
    url = as_user(database_url, user)
    text = only(diagnose(url))
    assert f"The database user {user} may not read and write" in text
    assert "GRANT" in text
    in_database(server, database_url, f"GRANT USAGE ON SCHEMA perdure, dbos TO {user}")
    in_database(
        server, database_url, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA perdure, dbos TO {user}"
    )
    assert diagnose(url) == []
    in_database(server, database_url, f"REVOKE UPDATE ON perdure.run_event FROM {user}")
    assert "may not read and write perdure.run_event; GRANT" in only(diagnose(url))
    in_database(server, database_url, f"DROP OWNED BY {user}")


def test_commits_that_are_not_waited_for_are_an_error(server: DatabaseServer, database_url: str) -> None:
    text = only(diagnose(f"{database_url}&options=-c%20synchronous_commit%3Doff"))
    assert "synchronous_commit = off" in text
    assert diagnose(f"{database_url}&options=-c%20synchronous_commit%3Dlocal") == []


def test_an_asynchronous_standby_is_a_warning(server: DatabaseServer, database_url: str) -> None:
    """The server takes whoever streams its log for a standby."""
    url = parse_url(server.url)
    connection = psycopg2.connect(
        host=url.query.get("host", url.host),
        port=url.port,
        user=url.username,
        password=url.password,
        connection_factory=psycopg2.extras.PhysicalReplicationConnection,
    )
    try:
        cursor = connection.cursor()
        cursor.execute("IDENTIFY_SYSTEM")
        position = cursor.fetchone()[2]
        cursor.start_replication(start_lsn=position)
        cursor.send_feedback(force=True)
        findings = eventually(lambda: diagnose(database_url))
        assert "1 standby server(s) replicate asynchronously" in only(findings, "warning")
    finally:
        connection.close()
    eventually(lambda: diagnose(database_url) == [])


def test_the_dialect_of_the_other_database_is_a_warning(server: DatabaseServer, database_url: str) -> None:
    text = only(diagnose(url_in_form(database_url, "cockroachdb+psycopg")), "warning")
    assert "use postgresql://" in text


@pytest.fixture
def said_by_the_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets every connection fail with a text, for servers that are hard to come by."""

    def say(text: str) -> None:
        import psycopg

        def connect(*_: object, **__: object) -> None:
            raise psycopg.OperationalError(f'connection failed: connection to server at "h", port 1 failed: {text}')

        monkeypatch.setattr(psycopg, "connect", connect)
        monkeypatch.setattr(psycopg.Connection, "connect", connect)

    return say


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("timeout expired", "does not answer; check network and firewall"),
        ("FATAL:  sorry, too many clients already", "has no connection left"),
        ("session is read-only", "is a read-only standby; give the URL of the primary"),
        ("server does not support SSL, but SSL was required", "TLS fails"),
        ("SSL error: certificate verify failed", "TLS fails"),
        ("FATAL:  the database system is starting up", "is down"),
        ('FATAL:  permission denied for database "d"', "GRANT CONNECT"),
        ('FATAL:  no pg_hba.conf entry for host "1.2.3.4"', "does not let u in"),
        (f"something new about {SECRET}", "cannot be reached; see its log"),
    ],
)
def test_what_a_server_says_is_understood(said_by_the_server: Callable[[str], None], said: str, told: str) -> None:
    said_by_the_server(said)
    assert told in only(diagnose(f"postgresql://u:{SECRET}@h:1/d"))


def test_cockroachdb_behind_a_postgresql_url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLAlchemy's PostgreSQL dialect reads the version when it first connects, and trips over CockroachDB's."""
    from sqlalchemy.dialects.postgresql.base import PGDialect

    def trip(*_: object) -> None:
        raise AssertionError("Could not determine version from string 'CockroachDB CCL v26.1.0'")

    monkeypatch.setattr(PGDialect, "_get_server_version_info", trip)
    url = url_in_form(database_url, "postgresql+psycopg")
    assert "is CockroachDB; use a URL that begins with cockroachdb+psycopg://" in only(diagnose(url))
