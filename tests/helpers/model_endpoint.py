"""An OpenAI-compatible endpoint on the loopback interface that counts its calls and answers as a test orders."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from perdure_service.settings import ModelSettings

PIECES = ("Leases expire ", "after fifteen ", "seconds [2].")


@dataclass(frozen=True)
class Turn:
    """What the model says: text in pieces, and calls of tools with their arguments (as JSON text, or to become it).

    It stops before its last piece and waits for `released` when it is to `hold`.
    """

    pieces: tuple[str, ...] = ()
    calls: tuple[tuple[str, Any], ...] = ()
    hold: bool = False

    def deltas(self) -> Iterator[dict[str, Any]]:
        """Yields the pieces of the stream; arguments come in halves, as real ones come in pieces."""
        for piece in self.pieces:
            yield {"content": piece}
        for index, (name, arguments) in enumerate(self.calls):
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            half = len(text) // 2
            first = {"name": name, "arguments": text[:half]}
            yield {"tool_calls": [{"index": index, "id": f"call-{index}", "type": "function", "function": first}]}
            yield {"tool_calls": [{"index": index, "function": {"arguments": text[half:]}}]}


class ModelEndpoint:
    """What a test sees of the endpoint.

    Attributes:
        calls: (path, headers, body) of every request.
        script: What the next requests get: a status, `cut` for a stream that ends too early, `hold` for one that stops
            before its last piece and waits for `released`, a `Turn`; then all goes well.
        answers: Returns what a request gets that the script says nothing of, as the script would; by default `PIECES`.
        usage: Tokens sent and received that each whole answer tells; None for an endpoint that does not say.
        pause_s: Between the pieces of an answer.
        released: Set to let streams that hold go on.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.script: deque[int | str | Turn] = deque()
        self.answers: Callable[[dict[str, Any]], int | str | Turn] = lambda _body: Turn(PIECES)
        self.usage: tuple[int, int] | None = (30, 12)
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
            order = endpoint.script.popleft() if endpoint.script else endpoint.answers(body)
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
                    self.stream(order, body)

        def answer(self, status: int, body: dict[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def stream(self, order: str | Turn, body: dict[str, Any]) -> None:
            turn = order if isinstance(order, Turn) else Turn(PIECES)
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            *deltas, last = turn.deltas()
            for delta in deltas:
                self.chunk({"index": 0, "delta": delta, "finish_reason": None})
                time.sleep(endpoint.pause_s)
            if order == "cut":
                return
            if order == "hold" or turn.hold:
                endpoint.released.wait()
            self.chunk({"index": 0, "delta": last, "finish_reason": None})
            self.chunk({"index": 0, "delta": {}, "finish_reason": "tool_calls" if turn.calls else "stop"})
            if endpoint.usage and body.get("stream_options", {}).get("include_usage"):
                sent, received = endpoint.usage
                self.chunk(
                    usage={"prompt_tokens": sent, "completion_tokens": received, "total_tokens": sent + received}
                )
            self.wfile.write(b"data: [DONE]\n\n")

        def chunk(self, *choices: dict[str, Any], **more: Any) -> None:
            data = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "small-2"}
            data |= {"choices": list(choices), **more}
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
