"""Pages on the loopback interface, which count how often each was read and answer as a test orders."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web:
    """What a test sees of the pages.

    Attributes:
        pages: By path: (status, headers, body).
        reads: How often each path was asked for.
        hosts: The `Host` of every request.
        held: Paths whose next reader waits for `released`.
        released: Set to let them go on.
    """

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.reads: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.held: set[str] = set()
        self.released = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def page(self, path: str, text: str, status: int = 200, kind: str = "text/plain", **headers: str) -> str:
        """Adds a page and returns its URL."""
        self.pages[path] = (status, {"content-type": kind, **headers}, text.encode())
        return self.url + path


@contextmanager
def serving() -> Iterator[Web]:
    """Serves pages until the end of the `with`."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            web.reads[self.path] += 1
            web.hosts.append(self.headers["host"])
            if self.path in web.held:
                web.held.discard(self.path)
                web.released.wait()
            status, headers, body = web.pages.get(self.path, (404, {}, b""))
            with suppress(ConnectionError):  # the reader was killed, or has read enough
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        web.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
