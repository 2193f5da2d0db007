"""The documents: what they say of settings, errors, files and code is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from perdure_service import errors
from perdure_service.settings import Settings
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "service" / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "clients").glob("*.md"),
        *(ROOT / "k8s").glob("*.md"),
        *(ROOT / "service").glob("*.md"),
        *DOCS.rglob("*.md"),
    ]
)
DECISIONS = sorted((DOCS / "adr").glob("*.md"))

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(?P<text>.+)$", re.MULTILINE)


def settings_of(model: type[BaseModel], prefix: str = "PERDURE_") -> Iterator[tuple[str, Any]]:
    """Yields the variable and the default of each setting."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings_of(kind, f"{prefix}{name.upper()}__")
        else:
            yield prefix + name.upper(), None if field.default is PydanticUndefined else field.default


def told(default: Any) -> str:
    """Returns a default as settings.md writes it."""
    if default in (None, ()):
        return "unset"
    if isinstance(default, timedelta):
        return f"`{default.total_seconds():g}`"
    if isinstance(default, bool):
        return f"`{int(default)}`"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def all_errors(kind: type[errors.PerdureError] = errors.PerdureError) -> Iterator[type[errors.PerdureError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from all_errors(one)


ERRORS = [kind for kind in all_errors() if kind is not errors.NotFound and kind.__module__ == errors.__name__]


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Returns a page without its code."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("variable", "default"), list(settings_of(Settings)))
def test_every_setting_is_documented_with_its_default(variable: str, default: Any) -> None:
    rows = [line for line in (DOCS / "settings.md").read_text().splitlines() if line.startswith(f"| `{variable}` |")]
    assert len(rows) == 1, f"settings.md has {len(rows)} rows about {variable}"
    assert rows[0].split("|")[2].strip() == told(default)


def test_no_setting_is_documented_that_does_not_exist() -> None:
    documented = set(re.findall(r"^\| `(PERDURE_\w+)` \|", (DOCS / "settings.md").read_text(), re.MULTILINE))
    theirs = {
        "PERDURE_TOKEN", "PERDURE_NAMESPACE", "PERDURE_TLS", "PERDURE_CA_FILE", "PERDURE_CLIENT_CERTIFICATE_FILE",
        "PERDURE_CLIENT_KEY_FILE", "PERDURE_SERVER_NAME",
    }  # fmt: skip
    assert documented <= {variable for variable, _ in settings_of(Settings)} | theirs


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_is_documented_with_its_code_and_reason(kind: type[errors.PerdureError]) -> None:
    rows = [line for line in (DOCS / "errors.md").read_text().splitlines() if line.startswith(f"| `{kind.__name__}`")]
    assert len(rows) == 1, f"errors.md has {len(rows)} rows about {kind.__name__}"
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    delay = "" if kind.retry_delay_s is None else f"{kind.retry_delay_s:g} s"
    assert (cells[1], cells[2], cells[4]) == (kind.status, kind.reason, delay)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(found), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_piece_of_python_compiles(page: Path) -> None:
    for language, body in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(body, filename=relative(page))


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "writing-agents.md"], ids=relative)
def test_the_examples_import_what_exists(page: Path) -> None:
    for language, body in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("perdure"):
                module = __import__(node.module or "", fromlist=["*"])
                missing = [one.name for one in node.names if not hasattr(module, one.name)]
                assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("page", DECISIONS, ids=relative)
def test_every_decision_has_its_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    number = int(page.name[:4])
    assert text.startswith(f"# {number}. ")
    assert re.search(r"^Status: (accepted|superseded by \d+) · Date: \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert {"Context", "Decision", "Consequences"} <= set(_HEADING.findall(text))


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))
