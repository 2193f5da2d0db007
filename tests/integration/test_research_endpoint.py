"""Asking a model and an embedder, at an endpoint on the loopback interface that counts its calls."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from perdure_service.agents import chat, models
from perdure_service.agents.embedder import embedder_of
from perdure_service.settings import EmbedderSettings, ModelSettings
from perdure_service.store.documents import Passage
from pydantic import SecretStr
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

from tests.helpers.model_endpoint import PIECES, ModelEndpoint, serving

PASSAGES = [
    Passage("c1", "approvals.md", "Approvals", "Approvals", "Approvals expire after two days.", 0.4),
    Passage("c2", "leases.md", "Leases", "Leases > Expiry", "A lease expires after fifteen seconds.", 0.9),
]


@pytest.fixture
def endpoint() -> Iterator[ModelEndpoint]:
    with serving() as endpoint:
        yield endpoint


def nobody(**_: Any) -> None:
    """Does not want to know what a call used."""


async def ask(settings: ModelSettings) -> tuple[models.Answer, list[str]]:
    pieces: list[str] = []
    used: dict[str, Any] = {}
    answer = await models.answer("When do leases expire?", PASSAGES, settings, pieces.append, used.update)
    assert used == {"input_tokens": 30, "output_tokens": 12, "model": "small-2"}
    return answer, pieces


async def test_a_models_answer_is_streamed_with_its_name_and_sources(endpoint: ModelEndpoint) -> None:
    answer, pieces = await ask(endpoint.settings(api_key=SecretStr("sk-1")))
    assert pieces == list(PIECES)
    assert answer == models.Answer("".join(PIECES), "small-2", (1,))
    path, headers, body = endpoint.calls[0]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer sk-1")
    assert body["model"] == "small"
    assert body["stream"] is True
    system, user = (message["content"] for message in body["messages"])
    assert "numbered passages" in system
    assert "[2] Leases > Expiry\nA lease expires after fifteen seconds." in user
    assert user.endswith("Question: When do leases expire?")


async def test_the_text_comes_while_the_model_writes(endpoint: ModelEndpoint) -> None:
    endpoint.pause_s = 0.1
    times: list[float] = []
    await models.answer("q", PASSAGES, endpoint.settings(), lambda _: times.append(time.monotonic()), nobody)
    assert times[-1] - times[0] > 0.1


async def test_without_a_key_none_is_sent(endpoint: ModelEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses")
    await ask(endpoint.settings())
    embedder = embedder_of(EmbedderSettings(base_url=endpoint.url))
    assert embedder is not None
    embedder.question("x")
    assert len(endpoint.calls) == 2
    assert all("authorization" not in headers for _, headers, _ in endpoint.calls)


@pytest.mark.parametrize(("order", "again"), [(401, False), (400, False), (429, True), (503, True), ("cut", True)])
async def test_a_failed_call_is_made_once_and_says_whether_to_repeat_it(
    endpoint: ModelEndpoint, order: int | str, again: bool
) -> None:
    endpoint.script.append(order)
    with pytest.raises(Exception, match=r"status_code|broke off") as caught:
        await ask(endpoint.settings())
    assert len(endpoint.calls) == 1, "retries are the step's"
    assert chat.is_transient(caught.value) is again


async def test_an_endpoint_that_is_not_there_is_tried_again() -> None:
    with pytest.raises(Exception, match="onnection") as caught:
        await ask(ModelSettings(base_url="http://127.0.0.1:9/v1"))
    assert chat.is_transient(caught.value)


async def test_model_spans_have_no_content(endpoint: ModelEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("pydantic_ai.models.instrumented.get_tracer_provider", lambda: provider)
    await ask(endpoint.settings())
    spans = {span.name: dict(span.attributes or {}) for span in exporter.get_finished_spans()}
    chat_span = spans["chat small"]
    assert chat_span["gen_ai.operation.name"] == "chat"
    assert chat_span["gen_ai.response.model"] == "small-2"
    assert (chat_span["gen_ai.usage.input_tokens"], chat_span["gen_ai.usage.output_tokens"]) == (30, 12)
    text = json.dumps(list(spans.values()), default=str)
    assert "expire" not in text
    assert "passages" not in text


async def test_prepare_has_every_pydantic_ai_agent_traced_without_content(
    endpoint: ModelEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("pydantic_ai.models.instrumented.get_tracer_provider", lambda: provider)
    try:
        models.prepare(endpoint.settings())
        await Agent(TestModel(custom_output_text="private"), name="somebodys").run("secret")
    finally:
        Agent.instrument_all(False)
    spans = {span.name: dict(span.attributes or {}) for span in exporter.get_finished_spans()}
    assert "invoke_agent somebodys" in spans
    text = json.dumps(list(spans.values()), default=str)
    assert "private" not in text
    assert "secret" not in text


def test_an_embedders_vectors_come_in_the_order_of_the_texts(endpoint: ModelEndpoint) -> None:
    settings = EmbedderSettings(base_url=endpoint.url, api_key=SecretStr("sk-2"), name="e5", dimensions=2)
    embedder = embedder_of(settings)
    assert embedder is not None
    assert embedder.passages(["a", "bbb", "cc"]) == [[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]]
    assert embedder.question("four") == [4.0, 1.0]
    path, headers, body = endpoint.calls[0]
    assert (path, headers["authorization"], body["model"]) == ("/v1/embeddings", "Bearer sk-2", "e5")
    assert len(endpoint.calls) == 2
