"""A TCP proxy in front of a database, with which a test breaks what lies between, and counts what goes over it."""

from __future__ import annotations

import re
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
from perdure_service.store.engine import parse_url

from tests.helpers import chaos_report
from tests.helpers.databases import url_in_form

ENCRYPTION_REQUESTS = (80877103, 80877104)
"""SSLRequest and GSSENCRequest. https://www.postgresql.org/docs/current/protocol-message-formats.html"""
CHUNK_BYTES = 2**16
FROZEN_STEP_S = 0.005
_WRITES = re.compile(r"\b(INSERT INTO|(?<!FOR )(?<!NO KEY )UPDATE|DELETE FROM)\s", re.IGNORECASE)


@dataclass
class LostReply:
    """An order to lose the replies of some commits: the server commits, and the client never hears of it.

    Attributes:
        pattern: What the transaction must have sent: SQL, and parameters as they go over the wire.
        times: How many replies may still be lost.
        lost: How many were.
    """

    pattern: re.Pattern[bytes]
    times: int = 1
    lost: int = 0

    def wants(self, sent: bytes) -> bool:
        """Returns whether the reply to the COMMIT of a transaction that sent this is to be lost."""
        # Events are JSON, which may stand in JSON: its quotes are escaped. Twice, as one driver sends the parameters
        # after the SQL, and the other within it.
        return self.times > 0 and self.pattern.search(re.sub(rb"\\+\"", b'"', sent) * 2) is not None


@dataclass(eq=False)
class Transaction:
    """A transaction as it went over a proxy: a statement that commits by itself, or all from BEGIN to its end.

    **What a round trip is:** a change of direction. The client sends something after the server has said the last word
    on its connection; all that it sends until it hears again belongs to the same one, so a transaction that is sent as
    a whole (a pipeline) is one, however many statements and packets it has. That is what distance costs: so often the
    client has waited. What the server sends by itself (notifications, the rows of a changefeed) is none.

    Attributes:
        connection: Which of the proxy's it went over, in the order in which they were made.
        statements: The SQL that was executed, with its BEGIN and COMMIT.
        sent: The SQL and the parameters as they went over the wire, without BEGIN and COMMIT.
        round_trips: How many; with that of a prepared statement that was new. None if it shared one with what came
            before it.
        ended: Whether its end was sent.
    """

    connection: int
    statements: list[str] = field(default_factory=list)
    sent: bytes = b""
    round_trips: int = 0
    ended: bool = False

    @property
    def writes(self) -> bool:
        """Whether it has inserted, updated or deleted, and was not rolled back: then its end is a commit."""
        rolled_back = self.statements[-1:] == ["ROLLBACK"]
        return not rolled_back and any(_WRITES.search(statement) for statement in self.statements)

    def names(self, text: str) -> bool:
        """Returns whether a text, such as the id of a run, stands in what was sent."""
        return text.encode() in self.sent


@dataclass(eq=False)
class _Connection:
    """One connection of a client, and what goes on in it.

    Attributes:
        client: Its socket.
        upstream: The server's.
        began: Whether the startup message went through, after which each message has a type.
        sent: What the transaction under way has sent.
        statements: The SQL of prepared statements by name, of which a Bind names only that.
        explicit: Whether a BEGIN was sent for it.
        losing: The orders that wait for the server to commit.
        losing_explicit: Whether by a COMMIT.
        number: How many were made before it.
        answered: Whether the server has sent the last word.
        transaction: What is under way, or was last.
    """

    client: socket.socket
    upstream: socket.socket
    number: int
    began: bool = False
    sent: bytearray = field(default_factory=bytearray)
    statements: dict[bytes, bytes] = field(default_factory=dict)
    from_client: bytearray = field(default_factory=bytearray)
    from_server: bytearray = field(default_factory=bytearray)
    explicit: bool = False
    losing: list[LostReply] = field(default_factory=list)
    losing_explicit: bool = False
    answered: bool = True
    transaction: Transaction = field(default_factory=lambda: Transaction(-1, ended=True))


class DatabaseProxy:
    """Forwards connections to the server of a URL, unless it is told otherwise.

    Attributes:
        accepted: When a client has tried to connect, seconds of the monotonic clock, whatever became of it.
    """

    def __init__(self, database_url: str) -> None:
        self._url = parse_url(database_url)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._orders: list[LostReply] = []
        self._cut = False
        self._frozen = threading.Event()
        self._closed = False
        self._counting: list[list[Transaction]] = []
        self.accepted: list[float] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The database's URL through the proxy."""
        return self.url_at(self._port)

    @property
    def address(self) -> str:
        """Where it listens, host:port."""
        return f"127.0.0.1:{self._port}"

    def url_at(self, port: int) -> str:
        """Returns the database's URL through something on this machine that leads to the proxy."""
        query = {name: value for name, value in self._url.query.items() if name not in ("host", "port")}
        # Not `set`, which would add to the query.
        url = sa.URL.create(
            self._url.drivername,
            self._url.username,
            self._url.password,
            "127.0.0.1",
            port,
            self._url.database,
            query,
        )
        return url_in_form(url)

    @property
    def open_connections(self) -> int:
        """How many connections go through at the moment."""
        return len(self._connections)

    # ---- what is counted ---------------------------------------------------------------------------------------------

    @contextmanager
    def counted(self) -> Iterator[list[Transaction]]:
        """Yields a list to which all transactions are added that begin from here on, until it is left."""
        found: list[Transaction] = []
        with self._lock:
            self._counting.append(found)
        try:
            yield found
        finally:
            with self._lock:
                self._counting = [one for one in self._counting if one is not found]

    def _turn(self, connection: _Connection) -> None:
        """Notes that a client sends something: a round trip, unless the server has yet to answer what came before."""
        if connection.answered:
            connection.answered = False
            self._transaction(connection).round_trips += 1

    def _transaction(self, connection: _Connection) -> Transaction:
        """Returns what is under way, a new one if that has ended."""
        if connection.transaction.ended:
            connection.transaction = Transaction(connection.number)
            with self._lock:
                for found in self._counting:
                    found.append(connection.transaction)
        return connection.transaction

    @staticmethod
    def _end(connection: _Connection) -> None:
        connection.transaction.sent, connection.transaction.ended = bytes(connection.sent), True
        connection.sent.clear()

    # ---- what can be broken ------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Ends all connections; new ones are closed as soon as they are made."""
        if not self._closed:
            chaos_report.fault("database away")
        with self._lock:
            self._cut = True
            self._end_all()

    def refuse(self) -> None:
        """Ends all connections; new ones are refused, as by a host where nobody listens."""
        chaos_report.fault("database away")
        with self._lock:
            self._cut = True
            _shut(self._listener)
            self._listener.close()
            self._end_all()

    def mend(self) -> None:
        """Lets connections through again; what was half open is closed."""
        with self._lock:
            if self._frozen.is_set():
                self._end_all()
                self._frozen.clear()
            self._cut = False
            if self._listener.fileno() < 0:
                self._listener = socket.create_server(("127.0.0.1", self._port), backlog=512)
                threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """Makes all connections half open: they are accepted, and kept, and nothing goes through any more."""
        chaos_report.fault("database silent")
        self._frozen.set()

    def lose_replies(self, pattern: str, times: int = 1) -> LostReply:
        """Loses the replies of the next commits whose transactions have sent what `pattern` matches.

        The server has committed by then. The client finds its connection closed.
        """
        order = LostReply(re.compile(pattern.encode(), re.DOTALL), times)
        with self._lock:
            self._orders.append(order)
        return order

    def forget_orders(self) -> None:
        """Loses no more replies."""
        with self._lock:
            self._orders.clear()

    def close(self) -> None:
        """Ends everything."""
        self._closed = True
        self._frozen.clear()
        self.cut()
        _shut(self._listener)
        self._listener.close()

    def _end_all(self) -> None:
        for connection in self._connections:
            _shut(connection.client)
            _shut(connection.upstream)

    # ---- forwarding --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        listener = self._listener
        while not self._closed:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted.append(time.monotonic())
            if self._cut:
                client.close()
                continue
            try:
                upstream = self._connect()
            except OSError:
                client.close()
                continue
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(client, upstream, len(self.accepted) - 1)
            with self._lock:
                self._connections.add(connection)
            threading.Thread(target=self._forward, args=(connection,), daemon=True).start()

    def _connect(self) -> socket.socket:
        host = self._url.query.get("host") or self._url.host or "localhost"
        assert isinstance(host, str)
        port = int(self._url.port or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(str(Path(host) / f".s.PGSQL.{port}"))
        return upstream

    def _forward(self, connection: _Connection) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(connection.client, selectors.EVENT_READ, self._from_client)
                selector.register(connection.upstream, selectors.EVENT_READ, self._from_server)
                while True:
                    for key, _ in selector.select():
                        source = key.fileobj
                        assert isinstance(source, socket.socket)
                        data = source.recv(CHUNK_BYTES)
                        if self._frozen.is_set():
                            while self._frozen.is_set():
                                time.sleep(FROZEN_STEP_S)
                            return
                        if not data or not key.data(connection, data):
                            return
        except OSError:
            return
        finally:
            with self._lock:
                self._connections.discard(connection)
            for one in (connection.client, connection.upstream):
                _shut(one)
                one.close()

    def _from_client(self, connection: _Connection, data: bytes) -> bool:
        connection.from_client += data
        if not connection.began and not _begin(connection):
            return True
        if connection.from_client and not connection.from_client.startswith(b"X"):  # nobody waits after a Terminate
            self._turn(connection)
        for message in _messages(connection.from_client):
            self._note(connection, message)
            connection.upstream.sendall(message)
        return True

    def _note(self, connection: _Connection, message: bytes) -> None:
        """Remembers what a transaction sends, and decides about the reply to its COMMIT."""
        kind, body = message[:1], message[5:]
        if kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            connection.statements[name] = text
        elif kind in (b"Q", b"B"):
            text = body if kind == b"Q" else connection.statements.get(body.split(b"\0", 2)[1], b"")
            self._transaction(connection).statements.append(text.rstrip(b"\0").decode(errors="replace"))
            command = text.rstrip(b"\0 ;").upper()
            if command.startswith(b"BEGIN"):
                connection.explicit = True
                connection.sent.clear()
            elif command in (b"COMMIT", b"ROLLBACK"):
                if command == b"COMMIT":
                    self._decide(connection)
                connection.explicit = False
                self._end(connection)
                return
            else:
                connection.sent += text + b"\n" + (body if kind == b"B" else b"") + b"\n"
        if kind in (b"S", b"Q") and not connection.explicit and connection.sent:
            self._decide(connection)  # a statement that commits by itself
            self._end(connection)

    def _decide(self, connection: _Connection) -> None:
        with self._lock:
            wanting = [order for order in self._orders if order.wants(bytes(connection.sent))]
            connection.losing, connection.losing_explicit = wanting, connection.explicit
            for order in wanting:
                order.times -= 1

    def _from_server(self, connection: _Connection, data: bytes) -> bool:
        connection.answered = True
        if not connection.losing:
            connection.client.sendall(data)
            return True
        connection.from_server += data
        for message in _messages(connection.from_server, keep=True):
            if _has_committed(message, explicit=connection.losing_explicit):
                for order in connection.losing:
                    order.lost += 1
                chaos_report.fault("replies to COMMIT lost")
                return False
            if message[:1] == b"E" or (message[:1] == b"C" and connection.losing_explicit):
                # The server has not committed: there is nothing to lose. The next one counts.
                for order in connection.losing:
                    order.times += 1
                connection.losing = []
                connection.client.sendall(bytes(connection.from_server))
                connection.from_server.clear()
                break
        return True


def _has_committed(message: bytes, *, explicit: bool) -> bool:
    """Returns whether a message of the server says that a transaction is committed: its COMMIT, or its statement."""
    if explicit:
        return message[:1] == b"C" and message[5:].startswith(b"COMMIT")
    return message[:1] == b"Z" and message[5:6] == b"I"


def _begin(connection: _Connection) -> bool:
    """Handles what comes before messages have types; returns whether that is over. Encryption is refused."""
    while len(connection.from_client) >= 8:
        length, code = struct.unpack("!II", connection.from_client[:8])
        if code in ENCRYPTION_REQUESTS:
            del connection.from_client[:8]
            connection.client.sendall(b"N")
            continue
        if len(connection.from_client) < length:
            return False
        connection.upstream.sendall(bytes(connection.from_client[:length]))
        del connection.from_client[:length]
        connection.began = True
        return True
    return False


def _messages(buffer: bytearray, *, keep: bool = False) -> Iterator[bytes]:
    """Yields the whole messages in a buffer, and removes them from it unless they are to be kept."""
    at = 0
    while len(buffer) >= at + 5:
        end = at + 1 + struct.unpack("!I", buffer[at + 1 : at + 5])[0]
        if len(buffer) < end:
            break
        message = bytes(buffer[at:end])
        at = end
        if not keep:
            del buffer[:end]
            at = 0
        yield message


def _shut(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
