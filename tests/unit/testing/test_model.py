"""The scripted model: what goes over the wire, for clients that stream and for those that do not."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from perdure_service.testing import Breaks, Calls, Fails, ModelCall, ScriptedModel
from perdure_service.testing.model import Reply


def ask(model: ScriptedModel, prompt: str = "why?", **more: Any) -> Any:
    body = {"model": "scripted", "messages": [{"role": "user", "content": prompt}], **more}
    request = urllib.request.Request(
        f"{model.url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read().decode()
    if not more.get("stream"):
        return json.loads(text)
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


@pytest.fixture
def model() -> Iterator[ScriptedModel]:
    replies: list[Reply] = ["one two", Calls("search", {"query": "tides"})]
    with ScriptedModel(replies).serving() as model:
        yield model


def test_replies_come_in_order_and_count_tokens(model: ScriptedModel) -> None:
    answer = ask(model, "tell me why")
    assert answer["choices"][0]["message"]["content"] == "one two"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    call = ask(model)["choices"][0]
    assert call["finish_reason"] == "tool_calls"
    function = call["message"]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("search", {"query": "tides"})
    assert [call.prompt for call in model.calls] == ["tell me why", "why?"]


def test_a_script_that_is_used_up_refuses_in_a_way_that_is_not_repeated(model: ScriptedModel) -> None:
    with model.scripted([]), pytest.raises(urllib.error.HTTPError, match="400"):
        ask(model)
    assert ask(model)["choices"][0]["message"]["content"] == "one two", "the first script goes on"


def test_a_stream_comes_in_pieces_and_says_that_it_has_ended(model: ScriptedModel) -> None:
    *chunks, done = ask(model, stream=True)
    assert done == "[DONE]"
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert [choice["delta"].get("content") for choice in choices] == ["one ", "two", None]
    assert choices[-1]["finish_reason"] == "stop"
    assert json.loads(chunks[-1])["usage"]["total_tokens"] == 3


def test_a_stream_that_breaks_has_no_end(model: ScriptedModel) -> None:
    with model.scripted([Breaks("half an ")]):
        chunks = ask(model, stream=True)
    assert [json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks] == ["half ", "an "]


def test_a_function_sees_the_call(model: ScriptedModel) -> None:
    def reply(call: ModelCall) -> Reply:
        return Fails(503) if len(model.calls) == 1 else f"re: {call.prompt}"

    with model.scripted(reply):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            ask(model)
        assert ask(model)["choices"][0]["message"]["content"] == "re: why?"


def test_the_settings_that_agents_read_name_it_while_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_MODEL__BASE_URL", "https://example.invalid/v1")
    monkeypatch.delenv("PERDURE_MODEL__NAME", raising=False)
    with ScriptedModel(["x"]).serving() as model:
        assert os.environ["PERDURE_MODEL__BASE_URL"] == model.url
        assert os.environ["PERDURE_MODEL__NAME"] == "scripted"
    assert os.environ["PERDURE_MODEL__BASE_URL"] == "https://example.invalid/v1"
    assert "PERDURE_MODEL__NAME" not in os.environ


def test_what_is_not_served_has_no_address() -> None:
    with pytest.raises(AssertionError, match="serve it first"):
        _ = ScriptedModel([]).url
