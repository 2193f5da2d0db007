"""Cursors: read as they were made, by their own run and view only, and never larger than what is active."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perdure_service.domain import tokens
from perdure_service.domain.cursors import MAX_ACTIVE_CHILDREN, Cursor
from perdure_service.errors import InvalidArgument, ViewTooLarge

sequences = st.integers(0, 2**60)
ids = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
children = st.dictionaries(ids | st.integers(1, 99).map(lambda n: f"default.foo.r-{n}"), sequences, max_size=6)


@given(st.text(max_size=40), sequences)
def test_a_cursor_is_read_as_it_was_made_and_by_its_own_run_only(workflow_id: str, sequence: int) -> None:
    cursor = Cursor(workflow_id, sequence)
    assert Cursor.decode(cursor.encode(), workflow_id, include_children=False) == cursor
    with pytest.raises(InvalidArgument, match="another run"):
        Cursor.decode(cursor.encode(), workflow_id + "x", include_children=False)


@given(st.just("default.foo.r") | ids, sequences, children)
def test_a_cursor_with_children_is_read_as_it_was_made(root: str, sequence: int, places: dict[str, int]) -> None:
    places.pop(root, None)
    cursor = Cursor(root, sequence, places)
    assert Cursor.decode(cursor.encode(), root, include_children=True) == cursor
    with pytest.raises(InvalidArgument, match="another run"):
        Cursor.decode(cursor.encode(), root + "x", include_children=True)


def test_the_two_kinds_of_view_do_not_continue_each_other() -> None:
    with pytest.raises(InvalidArgument, match="without children"):
        Cursor.decode(Cursor("w", 3).encode(), "w", include_children=True)
    with pytest.raises(InvalidArgument, match="with children"):
        Cursor.decode(Cursor("w", 3, {}).encode(), "w", include_children=False)


def test_an_event_of_a_run_moves_the_place_in_that_run_alone() -> None:
    cursor = Cursor("w", 3, {"w-1": 4, "w-2": 5})
    assert cursor.after("w", 9) == Cursor("w", 9, {"w-1": 4, "w-2": 5})
    assert cursor.after("w-2", 9) == Cursor("w", 3, {"w-1": 4, "w-2": 9})


def test_the_children_the_engine_names_take_few_characters_each() -> None:
    root = "default.a-run-with-a-rather-long-name.r"
    cursor = Cursor(root, 10**6, {f"{root}-{n}": 1_000 + n for n in range(MAX_ACTIVE_CHILDREN)})
    text = cursor.encode()
    assert len(text) < 20 * MAX_ACTIVE_CHILDREN <= tokens.MAX_CHARS
    assert Cursor.decode(text, root, include_children=True) == cursor


@pytest.mark.parametrize(
    "places",
    [
        {f"w-{n}": 1 for n in range(MAX_ACTIVE_CHILDREN + 1)},
        {f"{n}".ljust(200, "x"): 1 for n in range(200)},
    ],
)
def test_more_active_children_than_a_cursor_holds_are_refused(places: dict[str, int]) -> None:
    with pytest.raises(ViewTooLarge, match="children are active"):
        Cursor("w", 1, places).encode()


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")), st.booleans())
def test_what_is_no_cursor_is_refused_in_words(cursor: str, include_children: bool) -> None:
    with pytest.raises(InvalidArgument, match="cursor"):
        Cursor.decode(cursor, "w", include_children=include_children)


def test_a_cursor_of_nothing_but_brackets_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        Cursor.decode(base64.urlsafe_b64encode(b"[" * 3_000).decode(), "w", include_children=False)


@pytest.mark.parametrize(
    "content",
    [
        [2, "w", 1], [2, "w", 1, []], [2, "w", 1, {"-1": "3"}], [2, "w", 1, {"-1": -1}], [2, "w", 1, {"": 1}],
        [2, "w", 1, {"x": 1}], [2, "w", 1, {"-1": True}], [2, "w", 1, {}, 5], [2, 7, 1, {}], [2, "w", None, {}],
        [2, "w", 1, {"-1": 10**30}], [2, "w", 1, {"=w": 1}], [2, "w", 1, {"=a\0b": 1}], [2, "w", 1, {"=\ud800": 1}],
        [3, "w", 1, {}], [1, "w", 1, {}], [True, "w", 1], {"a": 1}, 7, None,
    ],
)  # fmt: skip
def test_a_forged_cursor_is_refused(content: object) -> None:
    text = base64.urlsafe_b64encode(json.dumps(content).encode()).decode()
    for include_children in (True, False):
        with pytest.raises(InvalidArgument):
            Cursor.decode(text, "w", include_children=include_children)
