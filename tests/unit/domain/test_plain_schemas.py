"""What is taken for a plain fit fits by the library, too; what does not fit is never taken for it."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from perdure_service.domain import agents

SEED = int(os.environ.get("PERDURE_TEST_SEED") or random.randrange(2**32))
VALUES: list[Any] = [None, True, False, 0, 1, -3, 2**70, 1.0, 1.5, "", "a", [], [1], ["a", 2], {}, {"a": 1}]
KINDS = ["object", "array", "string", "integer", "number", "boolean", "null", "nonsense"]


def a_schema(chance: random.Random, depth: int = 0) -> Any:
    if chance.random() < 0.1:
        return chance.choice([True, False, {}, {"type": ["string", "null"]}, {"$ref": "#"}])
    kind = chance.choice(KINDS[:7] if chance.random() < 0.95 else KINDS)
    schema: dict[str, Any] = {"type": kind}
    if chance.random() < 0.15:
        schema[chance.choice(["title", "description", "default", "minimum", "enum", "pattern", "minItems"])] = (
            chance.choice(["a", 1, ["a"]])
        )
    if depth < 3 and chance.random() < 0.8:
        if kind == "object" or chance.random() < 0.1:
            schema["properties"] = {name: a_schema(chance, depth + 1) for name in chance.sample("abc", 2)}
            if chance.random() < 0.5:
                schema["required"] = chance.sample("abc", chance.randrange(3))
            if chance.random() < 0.6:
                schema["additionalProperties"] = chance.choice([True, False, {"type": "string"}])
        if kind == "array" or chance.random() < 0.1:
            schema["items"] = a_schema(chance, depth + 1)
    return schema


def a_value(chance: random.Random, depth: int = 0) -> Any:
    if depth < 3 and chance.random() < 0.5:
        if chance.random() < 0.6:
            return {name: a_value(chance, depth + 1) for name in chance.sample("abcd", chance.randrange(4))}
        return [a_value(chance, depth + 1) for _ in range(chance.randrange(3))]
    return chance.choice(VALUES)


def test_whatever_is_taken_for_a_plain_fit_is_one() -> None:
    print(f"PERDURE_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    fits = 0
    for _ in range(4_000):
        schema = a_schema(chance)
        values = [a_value(chance) for _ in range(10)]
        for value in values:
            if agents._plainly_fits(schema, value):
                fits += 1
                assert agents.validator(schema).is_valid(value), (schema, value)
    assert fits > 100


@pytest.mark.parametrize(
    ("schema", "value", "fits"),
    [
        ({"type": "integer"}, True, False),
        ({"type": "integer"}, 1.0, False),  # the library says that it does
        ({"type": "number"}, 1, True),
        ({"type": "object"}, {"a": object()}, True),
        ({"type": "object", "additionalProperties": False}, {"a": 1}, False),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, {}, False),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, {"a": "x", "b": 1}, True),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, {"a": 1}, False),
        ({"type": "array", "items": {"type": "integer"}}, [1, 2], True),
        ({"type": "array", "items": {"type": "integer"}}, [1, "2"], False),
        ({"type": "string", "maxLength": 3}, "abc", False),  # not plain
        ({}, 1, False),
    ],
)
def test_plain_schemas(schema: Any, value: Any, fits: bool) -> None:
    assert agents._plainly_fits(schema, value) is fits
