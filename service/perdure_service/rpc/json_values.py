"""Reads JSON that callers send, as text or as a Struct, into plain values, and refuses what others would misread."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value

from perdure_service.domain.runs import canonical_json
from perdure_service.errors import InvalidArgument, PayloadTooLarge

MAX_DEPTH = 64
"""How deep objects and lists may nest. Everything behind (SQL, JSON Schema, other languages) takes at least this."""
MAX_GROWTH = 6
"""How many times as long as a JSON text its canonical form may be at most. Three times by escapes: two bytes of UTF-8
become six characters, four become twelve. Less than five by numbers: 1e15 becomes 1000000000000000.0, and larger ones
keep their exponent."""
MAX_EXACT = 2**53
"""Integers up to here are exact in a Struct, whose numbers are doubles."""

# NUL cannot be stored by PostgreSQL; half a surrogate pair is not Unicode and cannot be encoded.
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")

_HARMLESS = frozenset({int, bool, type(None)})

_Path = tuple[Any, "str | int"] | None
"""A place in a value as (the place around it, key or index): building text is left to the rare error."""


class _Repeating(dict[str, Any]):
    """An object whose text had a key twice."""

    repeated = ""


def read_text(text: str, *, field: str, root: str, max_bytes: int) -> Any:
    """Returns the value of JSON text from a caller.

    Args:
        text: The text.
        field: The request's field, for errors about the text.
        root: The path of the value, for errors inside it.
        max_bytes: The most it may take, as text and in its canonical form.

    Raises:
        InvalidArgument: It is not JSON (RFC 8259), names a key twice, has a number that is not finite, text with NUL or
            half a surrogate pair, or is nested deeper than 64. The path tells where.
        PayloadTooLarge: It is over `max_bytes`.
    """
    size_bytes = len(text.encode())
    _check_size(size_bytes, root, max_bytes)
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise InvalidArgument(root, _too_deep()) from None
    except ValueError as error:
        raise InvalidArgument(field, f"is not JSON: {error}"[:200]) from None
    _check(value, root)
    if size_bytes * MAX_GROWTH > max_bytes:
        _check_canonical_size(value, root, max_bytes)
    return value


def read_struct(struct: Struct, *, root: str, max_bytes: int) -> dict[str, Any]:
    """Returns the object that a Struct holds; numbers without a fraction become integers.

    Raises:
        InvalidArgument: As in `read_text`, or a value is not set.
        PayloadTooLarge: It is over `max_bytes`.
    """
    value = _of_struct(struct, root, None, 1)
    _check_canonical_size(value, root, max_bytes)
    return value


def read_value(value: Value, *, root: str, max_bytes: int) -> Any:
    """Returns what a Value holds; as `read_struct`."""
    plain = _of_value(value, root, None, 0)
    _check_canonical_size(plain, root, max_bytes)
    return plain


def path_of(root: str, parts: Iterable[str | int]) -> str:
    """Returns the path of a place in a value, e.g. `input.limits[0]["a b"]`."""
    path = root
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _PLAIN_KEY.fullmatch(part):
            path += f".{part}"
        else:
            path += f"[{json.dumps(part[:64])}]"
    return path


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object; one with a repeated key is marked, as only the walk knows its path."""
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    marked = _Repeating(plain)
    seen: set[str] = set()
    marked.repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return marked


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _check(root_value: Any, root: str) -> None:
    """Walks a parsed value without recursion and refuses what JSON allows and we do not."""
    todo: list[tuple[Any, _Path, int]] = []
    _check_scalar(root_value, root, None)
    if isinstance(root_value, (dict, list)):
        todo.append((root_value, None, 1))
    while todo:
        container, path, depth = todo.pop()
        items: Iterable[tuple[str | int, Any]]
        if isinstance(container, dict):
            _check_keys(container, root, path)
            items = container.items()
        else:
            items = enumerate(container)
        for part, item in items:
            kind = type(item)
            if kind in _HARMLESS:  # first, as a list may have half a million
                continue
            if kind is str or kind is float:
                _check_scalar(item, root, (path, part))
            elif depth == MAX_DEPTH:
                raise InvalidArgument(root, _too_deep())
            elif item:
                todo.append((item, (path, part), depth + 1))


def _check_keys(container: dict[str, Any], root: str, path: _Path) -> None:
    if isinstance(container, _Repeating):
        raise InvalidArgument(_text(root, (path, container.repeated)), "is there twice")
    for key in container:
        if _NOT_TEXT.search(key):
            raise InvalidArgument(_text(root, (path, key)), _not_text("has a key with"))


def _of_struct(struct: Struct, root: str, path: _Path, depth: int) -> dict[str, Any]:
    if depth > MAX_DEPTH:
        raise InvalidArgument(root, _too_deep())
    result = {}
    for key, value in struct.fields.items():
        if _NOT_TEXT.search(key):
            raise InvalidArgument(_text(root, (path, key)), _not_text("has a key with"))
        result[key] = _of_value(value, root, (path, key), depth)
    return result


def _of_value(value: Value, root: str, path: _Path, depth: int) -> Any:
    """Returns a plain value; `depth` is that of the container around it."""
    match value.WhichOneof("kind"):
        case "null_value":
            return None
        case "bool_value":
            return value.bool_value
        case "string_value":
            _check_scalar(value.string_value, root, path)
            return value.string_value
        case "number_value":
            number = value.number_value
            _check_scalar(number, root, path)
            return int(number) if number.is_integer() and abs(number) <= MAX_EXACT else number
        case "struct_value":
            return _of_struct(value.struct_value, root, path, depth + 1)
        case "list_value":
            if depth >= MAX_DEPTH:
                raise InvalidArgument(root, _too_deep())
            items = value.list_value.values
            return [_of_value(item, root, (path, index), depth + 1) for index, item in enumerate(items)]
        case _:
            raise InvalidArgument(_text(root, path), "is a Value of no kind; null is `null_value`")


def _check_scalar(value: Any, root: str, path: _Path) -> None:
    if isinstance(value, str):
        if _NOT_TEXT.search(value):
            raise InvalidArgument(_text(root, path), _not_text("has"))
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidArgument(_text(root, path), "is not a finite number")


def _check_canonical_size(value: Any, root: str, max_bytes: int) -> None:
    _check_size(len(canonical_json(value)), root, max_bytes)


def _check_size(size_bytes: int, root: str, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise PayloadTooLarge(
            f"{root} takes {size_bytes} bytes as JSON, more than {max_bytes}; send a reference to it instead",
            field=root,
            limit_bytes=str(max_bytes),
        )


def _text(root: str, path: _Path) -> str:
    parts: list[str | int] = []
    while path is not None:
        path, part = path
        parts.append(part)
    return path_of(root, reversed(parts))


def _too_deep() -> str:
    return f"is nested deeper than {MAX_DEPTH}"


def _not_text(verb: str) -> str:
    return f"{verb} a character that is not text: NUL or half of a surrogate pair"
