"""An OpenAI-compatible endpoint on the loopback interface that counts its calls and answers as a test orders."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from perdure_service.settings import ModelSettings

PIECES = ("Leases expire ", "after fifteen ", "seconds [2].")


class ModelEndpoint:
    """What a test sees of the endpoint.

    Attributes:
        calls: (path, headers, body) of every request.
        script: What the next requests get: a status, `cut` for a stream that ends too early, `hold` for one that stops
            before its last piece and waits for `released`; then all goes well.
        pause_s: Between the pieces of an answer.
        released: Set to let streams that hold go on.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.script: deque[int | str] = deque()
        self.pause_s = 0.0
        self.released = threading.Event()
        self.url = ""

    def settings(self, **more: Any) -> ModelSettings:
        return ModelSettings(base_url=self.url, name="small", timeout_s=10, **more)


@contextmanager
def serving() -> Iterator[ModelEndpoint]:
    """Serves an endpoint until the end of the `with`."""
    endpoint = ModelEndpoint()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            endpoint.calls.append((self.path, headers, body))
            order = endpoint.script.popleft() if endpoint.script else "well"
            if isinstance(order, int):
                self.answer(order, {"error": {"message": "as ordered"}})
            elif self.path.endswith("/embeddings"):
                vectors = [
                    {"object": "embedding", "index": index, "embedding": [float(len(text)), 1.0]}
                    for index, text in enumerate(body["input"])
                ]
                self.answer(200, {"object": "list", "model": "e", "data": vectors[::-1], "usage": {}})
            else:
                with suppress(ConnectionError):  # the caller was killed
                    self.stream(order)

        def answer(self, status: int, body: dict[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def stream(self, order: str) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for piece in PIECES[:-1] if order == "cut" else PIECES:
                if order == "hold" and piece == PIECES[-1]:
                    endpoint.released.wait()
                self.chunk({"index": 0, "delta": {"content": piece}, "finish_reason": None})
                time.sleep(endpoint.pause_s)
            if order != "cut":
                self.chunk({"index": 0, "delta": {}, "finish_reason": "stop"})
                self.wfile.write(b"data: [DONE]\n\n")

        def chunk(self, choice: dict[str, Any]) -> None:
            data = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "small-2", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
