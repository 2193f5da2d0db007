"""Finds the SQL in the product's source: what each text is, as a database gets it, and where it stands.

Strings that begin with one of SQL's verbs count, wherever they stand: constants of modules and classes (alone, in
`sa.text`, in tuples, in migrations), and what functions put together. What is put together from more than constants has
gaps; it is returned as a `Template`, which some statement of a running server should fit.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import sqlalchemy as sa

SERVICE = Path(__file__).parents[2] / "service"
PACKAGE = "perdure_service"
VERBS = (
    "ALTER",
    "BEGIN",
    "CALL",
    "CANCEL",
    "COMMENT",
    "COMMIT",
    "COPY",
    "CREATE",
    "DELETE",
    "DO",
    "DROP",
    "EXPERIMENTAL",
    "EXPLAIN",
    "GRANT",
    "INSERT",
    "LISTEN",
    "LOCK",
    "NOTIFY",
    "RESET",
    "REVOKE",
    "SELECT",
    "SET",
    "SHOW",
    "TRUNCATE",
    "UNLISTEN",
    "UPDATE",
    "UPSERT",
    "VALUES",
    "WITH",
)
_IS_SQL = re.compile(rf"\s*({'|'.join(VERBS)})\s+\S")
_PARAMETER = re.compile(r"(?<![:\w\\]):(\w+)(?!:)|%\((\w+)\)s|%s|%%")
"""As `sa.text` knows them, and as the drivers do."""
_GAP = "\0"


@dataclasses.dataclass(frozen=True, order=True)
class Statement:
    """A text of SQL, with its parameters as `$1`, `$2` …

    Attributes:
        place: File and line, from the folder of the package.
        text: In one line.
    """

    place: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, order=True)
class Template:
    """A statement with gaps, which are known only when it is sent."""

    place: str
    text: str

    def fits(self, statement: Statement) -> bool:
        """Returns whether a statement may be this one."""
        return self._pattern.fullmatch(statement.text) is not None

    @property
    def _pattern(self) -> re.Pattern[str]:
        parts = [re.sub(r"\\\$\d+", r"\\$\\d+(?:::[A-Z]+)?", re.escape(part)) for part in self.text.split(_GAP)]
        return re.compile(".*".join(parts))

    def __str__(self) -> str:
        return self.text.replace(_GAP, "…")


def numbered(text: str) -> str:
    """Returns a statement in one line, its parameters (`:name`, `%(name)s`, `%s`) as `$1`, `$2` …"""
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        name = match[1] or match[2] or str(match.start())
        return f"${numbers.setdefault(name, len(numbers) + 1)}"

    return " ".join(_PARAMETER.sub(number, text).split())


def is_sql(text: str) -> bool:
    """Returns whether a text begins as a statement does: with a verb in capitals, and something after it."""
    return _IS_SQL.match(text) is not None


@functools.cache
def in_source() -> tuple[list[Statement], list[Template]]:
    """Returns what stands in the service's source, in the order of its files."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((SERVICE / PACKAGE).rglob("*.py"))}
    parts = {name for tree in trees.values() for name in _names_of_parts(tree)}
    found: set[Statement | Template] = set()
    for path, tree in trees.items():
        place = path.relative_to(SERVICE)
        module = importlib.import_module(".".join(place.with_suffix("").parts).removesuffix(".__init__"))
        for line, text in [*_of_constants(tree, module, parts), *_of_functions(tree, module)]:
            kind = Template if _GAP in text else Statement
            found.add(kind(f"{place}:{line}", numbered(text)))
    return (
        sorted(each for each in found if isinstance(each, Statement)),
        sorted(each for each in found if isinstance(each, Template)),
    )


def _of_constants(
    tree: ast.Module | ast.ClassDef, owner: ModuleType | type, parts: set[str]
) -> Iterator[tuple[int, str]]:
    """Yields what the names of a module and of its classes hold, but not what other strings are put together from."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _of_constants(node, vars(owner)[node.name], parts)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            name = _name(target)
            if name is not None and name not in parts:
                for text in _texts(vars(owner).get(name)):
                    if is_sql(text):
                        yield node.lineno, text


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case sa.TextClause():
            yield value.text
        case Mapping():
            yield from (text for each in value.values() for text in _texts(each))
        case list() | tuple() | set() | frozenset():
            yield from (text for each in value for text in _texts(each))
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from (text for field in dataclasses.fields(value) for text in _texts(getattr(value, field.name)))


def _of_functions(tree: ast.Module, module: ModuleType) -> Iterator[tuple[int, str]]:
    """Yields what functions hold or put together, the outermost expression each; what is added to later has a gap."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in _outermost(function):
                text = _put_together(node, module)
                if is_sql(text):
                    yield node.lineno, text + _GAP * _is_begun(node, function)


def _outermost(node: ast.AST) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        if isinstance(child, ast.JoinedStr | ast.Constant | ast.BinOp) or _formatted(child) is not None:
            yield child  # type: ignore[misc]
        else:
            yield from _outermost(child)


def _is_begun(text: ast.expr, function: ast.AST) -> bool:
    """Returns whether a text is kept under a name by which `function` goes on to make a longer one."""
    parts = set(_names_of_parts(function))
    return any(
        isinstance(node, ast.Assign) and node.value is text and any(_name(target) in parts for target in node.targets)
        for node in ast.walk(function)
    )


def _name(node: ast.AST | None) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _formatted(node: ast.AST) -> ast.expr | None:
    """Returns X of `X.format(…)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return node.func.value
    return None


def _put_together(node: ast.expr, module: ModuleType) -> str:
    """Returns the text of an expression, with gaps where it depends on more than constants."""
    match node:
        case ast.Constant():
            return node.value if isinstance(node.value, str) else _GAP
        case ast.JoinedStr():
            return "".join(_put_together(part, module) for part in node.values)
        case ast.FormattedValue():
            return _GAP if node.format_spec else _put_together(node.value, module)
        case ast.BinOp(op=ast.Add()):
            return _put_together(node.left, module) + _put_together(node.right, module)
        case ast.Name():
            value = vars(module).get(node.id)
            return str(value) if isinstance(value, str | int) else _GAP
    template = _formatted(node)
    if template is None:
        return _GAP
    pieces = string.Formatter().parse(_put_together(template, module))
    return "".join(literal + (_GAP if field is not None else "") for literal, field, _, _ in pieces)


def _names_of_parts(tree: ast.AST) -> Iterator[str]:
    """Yields the names from which longer strings are put together."""
    for node in ast.walk(tree):
        within: Sequence[ast.AST | None] = ()
        match node:
            case ast.JoinedStr():
                within = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            case ast.BinOp(op=ast.Add()):
                within = [node.left, node.right]
            case ast.AugAssign(op=ast.Add()):
                within = [node.target]
            case _:
                within = [_formatted(node)]
        yield from (name for part in within if (name := _name(part)) is not None)
