"""Says what is wrong with a database, or an object store, before a server starts on it.

A sentence each, with the way out, no secrets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa
from sqlalchemy.engine import URL

from perdure_service.errors import ConfigurationError, StoreUnavailable
from perdure_service.store import migrations, sqlstates, stranded
from perdure_service.store.engine import create_engine, is_cockroach
from perdure_service.store.s3 import S3Objects

if TYPE_CHECKING:
    from perdure_service.settings import PayloadSettings

STATEMENT_TIMEOUT = timedelta(seconds=10)
TABLES_SHOWN = 3

Verify = Callable[[sa.Engine], None]
"""Raises ConfigurationError when a server cannot work with the database."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: A server does not start with an `error`; with a `warning` it does, and logs it.
        text: One sentence, with the way out.
    """

    severity: Literal["error", "warning"]
    text: str


def diagnose(url: str, verify: Sequence[Verify] = (migrations.verify,)) -> list[Finding]:
    """Returns what is wrong with the database of `url`; nothing when a server can start.

    Args:
        url: As given by the user.
        verify: The checks of the schema, in order: ours, and DBOS's from the durable layer.
    """
    try:
        engine = create_engine(url, pool_size=1, statement_timeout=STATEMENT_TIMEOUT)
    except ConfigurationError as error:
        return [Finding("error", error.message)]
    try:
        return list(_findings(engine, verify))
    except (sa.exc.DBAPIError, AssertionError) as error:
        return [Finding("error", _why_not_connected(engine.url, error))]
    finally:
        engine.dispose()


def _findings(engine: sa.Engine, verify: Sequence[Verify]) -> Iterator[Finding]:
    with engine.connect() as connection:
        cockroach = "CockroachDB" in str(connection.execute(sa.text("SELECT version()")).scalar())
        if is_cockroach(engine) and not cockroach:
            yield Finding("warning", "The URL is for CockroachDB and this is PostgreSQL; use postgresql://… for it.")
        if not cockroach:
            yield from _durability(connection)
        missing = list(_missing_rights(connection))
    yield from missing
    if missing:
        return
    for check in verify:
        try:
            check(engine)
        except ConfigurationError as error:
            yield Finding("error", error.message)
            return
        except StoreUnavailable:
            yield Finding(
                "error", f"The database {_place(engine.url)} went away while it was being checked; try again."
            )
            return


def stranded_runs(url: str, application_version: str) -> list[Finding]:
    """Returns a warning when runs are stranded.

    Args:
        url: A database without an error.
        application_version: Of the server that is about to start; what waits for such a server only is not counted.
    """
    engine = create_engine(url, pool_size=1, statement_timeout=STATEMENT_TIMEOUT)
    try:
        with engine.connect() as connection:
            count = stranded.count(connection, except_version=application_version)
    except sa.exc.DBAPIError as error:
        return [Finding("warning", f"Stranded runs cannot be counted: {_why_not_connected(engine.url, error)}")]
    finally:
        engine.dispose()
    if not count:
        return []
    counted = "1 run is" if count == 1 else f"{count} runs are"
    text = f"{counted} stranded: no living executor has the version and the agent; `perdure stranded` says what to do."
    return [Finding("warning", text)]


def object_store(settings: PayloadSettings) -> list[Finding]:
    """Returns what is wrong with the object store, if one is set. Writes an object there, and deletes it."""
    if settings.s3_bucket is None:
        return []
    try:
        S3Objects(settings).try_out()
    except ConfigurationError as error:
        return [Finding("error", error.message)]
    except StoreUnavailable as error:
        # A warning: `serve` starts, and what is large waits until the store can be used.
        why = _why_no_object(str(error.__cause__))
        return [Finding("warning", f"The object store {why} Large values wait until it can be used.")]
    return []


_SETTINGS = "SELECT current_setting('synchronous_commit'), current_setting('fsync')"
# A logical subscriber is no copy to fail over to, and a base backup is over soon.
_STANDBYS = """
    SELECT count(*) FILTER (WHERE r.sync_state = 'async'), count(*) FILTER (WHERE r.sync_state IN ('sync', 'quorum'))
    FROM pg_stat_replication AS r LEFT JOIN pg_replication_slots AS s ON s.active_pid = r.pid
    WHERE coalesce(s.slot_type, 'physical') = 'physical' AND r.state = 'streaming'"""


def _durability(connection: sa.Connection) -> Iterator[Finding]:
    """What was acknowledged is committed: https://www.postgresql.org/docs/current/runtime-config-wal.html ."""
    synchronous_commit, fsync = connection.execute(sa.text(_SETTINGS)).one()
    asynchronous, synchronous = connection.execute(sa.text(_STANDBYS)).one()
    if synchronous_commit == "off":
        yield Finding(
            "error",
            "The database acknowledges commits before they are on disk (synchronous_commit = off), so a crash would "
            "lose acknowledged work; set it to on, for the database, its user and in the URL's options.",
        )
    if fsync == "off":
        yield Finding("warning", "The database does not flush to disk (fsync = off): fit for tests only; set it to on.")
    if asynchronous and (not synchronous or synchronous_commit == "local"):
        yield Finding(
            "warning",
            f"The database's {asynchronous} standby server(s) replicate asynchronously, so a failover to one would "
            "lose acknowledged work; set synchronous_standby_names.",
        )


# By oid, as asking by name needs a right on the schema.
_TABLES_WITHOUT_RIGHTS = """
    SELECT n.nspname || '.' || c.relname
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname IN ('perdure', 'dbos') AND c.relkind IN ('r', 'p')
      AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
           AND has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE')
           AND has_table_privilege(c.oid, 'DELETE'))
    ORDER BY 1"""


def _missing_rights(connection: sa.Connection) -> Iterator[Finding]:
    tables = list(connection.execute(sa.text(_TABLES_WITHOUT_RIGHTS)).scalars())
    if tables:
        user = connection.execute(sa.text("SELECT current_user")).scalar()
        shown = ", ".join(tables[:TABLES_SHOWN]) + (" …" if len(tables) > TABLES_SHOWN else "")
        yield Finding(
            "error",
            f"The database user {user} may not read and write {shown}; GRANT USAGE ON SCHEMA perdure, dbos and "
            f"SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA perdure, dbos TO {user}.",
        )


def _place(url: URL) -> str:
    """Returns where the URL points, without user and password."""
    hosts = url.query.get("host", ()) or url.host or "localhost"
    host = hosts if isinstance(hosts, str) else ",".join(hosts)
    port = f":{url.port}" if url.port else ""
    return f"{url.database or url.username or ''} at {host}{port}"


# What libpq and the servers say when no session begins. libpq does not give the SQLSTATE of it.
_REASONS: tuple[tuple[str, str], ...] = (
    (
        r"could not determine version|CockroachDB",
        "{place} is CockroachDB; use a URL that begins with cockroachdb+psycopg://.",
    ),
    (r"no password supplied", "{place} wants a password for {user}; put it into the URL."),
    (
        r"password authentication failed|authentication failed|role \".*\" does not exist|pg_hba\.conf",
        "{place} does not let {user} in; correct user and password in the URL, or let the user in there.",
    ),
    (
        r"permission denied for database|not allowed to connect",
        "{place} may not be used by {user}; GRANT CONNECT on it.",
    ),
    (r"database \".*\" does not exist", "{place} does not exist; create it, or correct the URL."),
    (r"could not translate host name|resolve|name or service not known", "{place}: no such host; correct the URL."),
    (
        r"refused|no such file or directory|server closed the connection|starting up|shutting down|in recovery",
        "{place} is down; start it, or correct the URL.",
    ),
    (
        r"timeout|timed out|unreachable|no route",
        "{place} does not answer; check network and firewall, or correct the URL.",
    ),
    (r"too many (clients|connections)|remaining connection slots", "{place} has no connection left; raise its limit."),
    (r"read-only|hot standby", "{place} is a read-only standby; give the URL of the primary."),
    (r"\bSSL\b|certificate", "{place}: TLS fails; correct sslmode and certificates in the URL."),
)


# What the store says, by S3's own codes. The text has more than these, and is not for people.
_OBJECT_REASONS: tuple[tuple[str, str], ...] = (
    (r"NoSuchBucket", "has no such bucket; create it, or correct PERDURE_PAYLOADS__S3_BUCKET."),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch",
        "does not know the key; correct PERDURE_PAYLOADS__S3_ACCESS_KEY_ID and PERDURE_PAYLOADS__S3_SECRET_ACCESS_KEY.",
    ),
    (r"AuthorizationHeaderMalformed|PermanentRedirect", "is in another region; correct PERDURE_PAYLOADS__S3_REGION."),
    (r"AccessDenied", "refuses; let the key put, get, list and delete objects of the bucket."),
    (r"error sending request", "does not answer; start it, or correct PERDURE_PAYLOADS__S3_ENDPOINT."),
)


def _why_no_object(said: str) -> str:
    for pattern, text in _OBJECT_REASONS:
        if re.search(pattern, said):
            return text
    return "cannot be used; see its log, and the settings PERDURE_PAYLOADS__S3_…."


def _why_not_connected(url: URL, error: BaseException) -> str:
    place = f"The database {_place(url)}"
    user = url.username or "the user"
    said = str(error.orig if isinstance(error, sa.exc.DBAPIError) else error)
    for pattern, text in _REASONS:
        if re.search(pattern, said, re.IGNORECASE):
            return text.format(place=place, user=user)
    if isinstance(error, sa.exc.DBAPIError) and not sqlstates.is_connection_lost(error):
        return f"{place} cannot be checked: {said.partition(chr(10))[0]}"
    # Unknown, and libpq may repeat parts of the URL: better no reason than a secret.
    return f"{place} cannot be reached; see its log, or try the same URL with psql."
