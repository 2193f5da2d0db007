"""A model that answers as a test orders: an OpenAI-compatible endpoint on the loopback interface, scripted."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL_NAME = "scripted"

_PIECE = re.compile(r"\S+\s*|\s+")


@dataclass(frozen=True, slots=True)
class Fails:
    """The endpoint refuses the request with a status."""

    status: int = 500
    message: str = "as the script says"


@dataclass(frozen=True, slots=True)
class Breaks:
    """The endpoint streams some text and closes the connection: no end of the answer comes."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class Calls:
    """The model calls a tool instead of answering."""

    tool: str
    arguments: dict[str, Any] = field(default_factory=dict)


Reply = str | Fails | Breaks | Calls
"""What the model replies: text, or one of the above."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A request that the endpoint got."""

    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The last message's text."""
        messages = self.body.get("messages") or [{}]
        content = messages[-1].get("content") or ""
        if isinstance(content, str):
            return content
        return "".join(str(part.get("text", "")) for part in content)


Replies = Iterable[Reply] | Callable[[ModelCall], Reply]
"""A script: one reply for each request, in order, or a function of the request."""


class ScriptedModel:
    """A scripted model: give it to `AgentHarness(model=…)`, or serve it yourself and hand out `url`.

    Attributes:
        calls: Every request, in order. The crash of an engine does not reset it: a model is another system.
    """

    def __init__(self, replies: Replies) -> None:
        """Creates it.

        Args:
            replies: One for each request, in order; or a function of the request. A list that is used up answers with
                status 400, which clients do not repeat.
        """
        self.calls: list[ModelCall] = []
        self._lock = threading.Lock()
        self._url = ""
        self._next = _script(replies)

    @property
    def url(self) -> str:
        """The endpoint's base URL, while it is served."""
        assert self._url, "serve it first: `with model.serving():`, or give it to a harness"
        return self._url

    def variables(self) -> dict[str, str]:
        """Returns the variables of the environment with which agents ask this model, while it is served."""
        return {
            "PERDURE_MODEL__BASE_URL": self.url,
            "PERDURE_MODEL__NAME": MODEL_NAME,
            "PERDURE_MODEL__API_KEY": "scripted",
            "PERDURE_MODEL__TIMEOUT_S": "10",
        }

    def reply(self, call: ModelCall) -> Reply:
        """Counts a request and returns what the script says."""
        with self._lock:
            self.calls.append(call)
            return self._next(call)

    @contextmanager
    def scripted(self, replies: Replies) -> Iterator[None]:
        """Replies by another script for the time of a `with`."""
        before, self._next = self._next, _script(replies)
        try:
            yield
        finally:
            self._next = before

    @contextmanager
    def serving(self) -> Iterator[ScriptedModel]:
        """Serves the endpoint until the end of the `with`, and sets the variables with which agents ask it."""
        model = self

        class Handler(_Handler):
            scripted = model

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self._url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="scripted-model")
        thread.start()
        try:
            with _environment(self.variables()):
                yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            self._url = ""


def _script(replies: Replies) -> Callable[[ModelCall], Reply]:
    if callable(replies):
        return replies
    rest = iter(replies)
    return lambda _call: next(rest, Fails(400, "the test's script has no more replies"))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment for the time of a `with`: agents may read them where settings do."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Handler(BaseHTTPRequestHandler):
    scripted: ScriptedModel

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with suppress(ConnectionError):  # whoever asked has crashed
            if not self.path.endswith("/chat/completions"):
                self._answer(404, {"error": {"message": f"the scripted model has no {self.path}"}})
                return
            reply = self.scripted.reply(ModelCall(body))
            if isinstance(reply, Fails):
                self._answer(reply.status, {"error": {"message": reply.message}})
            elif body.get("stream"):
                self._stream(reply, body)
            else:
                self._complete(reply, body)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _complete(self, reply: str | Breaks | Calls, body: dict[str, Any]) -> None:
        if isinstance(reply, Breaks):
            return  # the connection closes without an answer
        message: dict[str, Any] = {"role": "assistant", "content": None if isinstance(reply, Calls) else reply}
        if isinstance(reply, Calls):
            message["tool_calls"] = [_tool_call(reply)]
        choice = {"index": 0, "message": message, "finish_reason": _reason(reply)}
        self._answer(200, {**_frame("chat.completion"), "choices": [choice], "usage": _usage(body, reply)})

    def _stream(self, reply: str | Breaks | Calls, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if isinstance(reply, Calls):
            self._chunk({"role": "assistant", "tool_calls": [{"index": 0, **_tool_call(reply)}]})
        else:
            for piece in _PIECE.findall(reply.text if isinstance(reply, Breaks) else reply):
                self._chunk({"content": piece})
        if isinstance(reply, Breaks):
            return
        self._chunk({}, _reason(reply))
        usage = {**_frame("chat.completion.chunk"), "choices": [], "usage": _usage(body, reply)}
        self.wfile.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        data = {**_frame("chat.completion.chunk"), "choices": [choice]}
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


def _frame(kind: str) -> dict[str, Any]:
    return {"id": "scripted-1", "object": kind, "created": 1, "model": MODEL_NAME}


def _reason(reply: Reply) -> str:
    return "tool_calls" if isinstance(reply, Calls) else "stop"


def _tool_call(reply: Calls) -> dict[str, Any]:
    function = {"name": reply.tool, "arguments": json.dumps(reply.arguments)}
    return {"id": f"call-{reply.tool}", "type": "function", "function": function}


def _usage(body: dict[str, Any], reply: Reply) -> dict[str, int]:
    """Returns tokens, a word a token."""
    prompt = sum(len(str(message.get("content") or "").split()) for message in body.get("messages", []))
    answer = len(reply.split()) if isinstance(reply, str) else 1
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
