"""A TCP proxy in front of a database, so that a test can cut the database off and give it back."""

from __future__ import annotations

import selectors
import socket
import threading
from pathlib import Path

import sqlalchemy as sa
from perdure_service.store.engine import parse_url

from tests.helpers.databases import url_in_form


class DatabaseProxy:
    """Forwards connections to the server of a URL while it is not cut."""

    def __init__(self, database_url: str) -> None:
        self._url = parse_url(database_url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._cut = False
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The database's URL through the proxy."""
        host, port = self._listener.getsockname()
        query = {name: value for name, value in self._url.query.items() if name not in ("host", "port")}
        # Not `set`, which would add to the query.
        url = sa.URL.create(
            self._url.drivername, self._url.username, self._url.password, host, port, self._url.database, query
        )
        return url_in_form(url)

    def cut(self) -> None:
        """Ends all connections; new ones are closed as soon as they are made."""
        with self._lock:
            self._cut = True
            for pair in self._pairs:
                for one in pair:
                    _shut(one)

    def mend(self) -> None:
        """Lets connections through again."""
        self._cut = False

    def close(self) -> None:
        """Ends everything."""
        self._closed = True
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._cut:
                client.close()
                continue
            try:
                upstream = self._connect()
            except OSError:
                client.close()
                continue
            with self._lock:
                self._pairs.add((client, upstream))
            threading.Thread(target=self._forward, args=(client, upstream), daemon=True).start()

    def _connect(self) -> socket.socket:
        host = self._url.query.get("host") or self._url.host or "localhost"
        assert isinstance(host, str)
        port = int(self._url.port or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(str(Path(host) / f".s.PGSQL.{port}"))
        return upstream

    def _forward(self, client: socket.socket, upstream: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, upstream)
            selector.register(upstream, selectors.EVENT_READ, client)
            try:
                while True:
                    for key, _ in selector.select():
                        source = key.fileobj
                        assert isinstance(source, socket.socket)
                        data = source.recv(2**16)
                        if not data:
                            return
                        key.data.sendall(data)
            except OSError:
                return
            finally:
                with self._lock:
                    self._pairs.discard((client, upstream))
                for one in (client, upstream):
                    _shut(one)
                    one.close()


def _shut(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
