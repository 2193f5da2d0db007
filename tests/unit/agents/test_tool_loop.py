"""What can be a tool, what a model is told of it, and how text inside JSON is streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dbos import DBOS
from hypothesis import given
from hypothesis import strategies as st
from perdure_service.agents import chat
from perdure_service.agents.assistant import TOOLS
from perdure_service.agents.chat import Call, MemberStream, Reply, Streams
from perdure_service.agents.tool_loop import Tool
from perdure_service.errors import ConfigurationError
from perdure_service.settings import ModelSettings


@DBOS.step(name="tests.weigh")
async def weigh(item: str, pieces: int = 1) -> float:
    """Says what an item weighs.

    In kilograms.
    """
    return len(item) * pieces


def test_the_model_is_told_what_the_function_says() -> None:
    tool = Tool(weigh)
    offer = tool.offer()
    assert (tool.name, offer.name) == ("weigh", "weigh")
    assert offer.description == "Says what an item weighs.\n\nIn kilograms."
    assert offer.schema["required"] == ["item"]
    assert offer.schema["properties"]["pieces"] == {"type": "integer", "default": 1}
    assert not offer.schema["additionalProperties"]


async def no_step(item: str) -> str:
    """Is not a step."""
    return item


@DBOS.step(name="tests.blocking")
def blocking(item: str) -> str:
    """Blocks."""
    return item


@DBOS.step(name="tests.silent")
async def silent(item: str) -> str:
    return item


@DBOS.step(name="tests.untyped")
async def untyped(item) -> str:  # type: ignore[no-untyped-def]
    """Does not say what it takes."""
    return str(item)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (no_step, r"must be an `async def` with @DBOS.step"), (blocking, r"must be an `async def`"),
        (silent, "has no docstring"), (untyped, "`item` .* has no type"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_tool_says_what_to_change(function: Any, why: str) -> None:
    with pytest.raises(TypeError, match=why):
        Tool(function)


def test_the_assistants_tools_are_tools() -> None:
    assert [tool.name for tool in TOOLS] == ["search_documents", "calculate", "fetch_url"]


def test_a_reply_is_plain_json_and_reads_back() -> None:
    reply = Reply("text", "small", (Call("1", "weigh", "{not json"),))
    assert Reply.from_json(json.loads(json.dumps(reply.to_json()))) == reply


async def test_without_a_model_it_is_said_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match="set PERDURE_MODEL__BASE_URL"):
        await chat.ask("", [], ModelSettings(), Streams(print), lambda **_: None)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers()), st.text(max_size=30), st.data())
def test_a_member_is_streamed_whole_however_its_json_is_cut(
    others: dict[str, Any], answer: str, data: st.DataObject
) -> None:
    text = json.dumps({**others, "answer": answer}, ensure_ascii=data.draw(st.booleans()))
    pieces: list[str] = []
    stream = MemberStream("answer", pieces.append)
    rest = text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        stream.feed(rest[:size])
        rest = rest[size:]
    assert "".join(pieces) == answer


def test_what_is_no_object_writes_nothing() -> None:
    pieces: list[str] = []
    for text in ("[1, 2", '"answer', "nonsense", '{"answer": 5, ', "null"):
        MemberStream("answer", pieces.append).feed(text)
    assert pieces == []
