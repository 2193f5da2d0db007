"""The parts of the demonstration that do not need a real server; `make demo` itself is an end-to-end test."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path

import pytest
from perdure_client import Approval, ApprovalState, Decision, Run, RunState, demo
from rich.console import Console


def program(folder: Path, code: str) -> Path:
    path = folder / "perdure-server"
    path.write_text(f"#!{sys.executable}\nimport json, os, signal, sys\n{code}", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


SERVES = """
def stop(*_):
    print("stopped politely", file=sys.stderr, flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
print(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}), file=sys.stderr, flush=True)
print('{"event": "a log line"}\\n3/13 perdure.run …\\nstarting …\\nperdure serves on 127.0.0.1:5', flush=True)
signal.pause()
"""


def test_the_server_is_started_alone_shown_and_stopped_politely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = program(tmp_path, SERVES)
    monkeypatch.setattr("shutil.which", lambda *_, **__: str(path))
    monkeypatch.setenv("PERDURE_NAMESPACES", "other")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "kept, too")
    monkeypatch.setenv("PERDURE_MODEL__NAME", "kept")
    log = tmp_path / "log"
    with demo.dev_server(tmp_path, tmp_path / "data", log) as address:
        assert address == "127.0.0.1:5"
    assert capsys.readouterr().out == "  starting …\n  perdure serves on 127.0.0.1:5\n"
    text = log.read_text(encoding="utf-8")
    assert text.endswith("stopped politely\n")
    for part in ("--documents", "127.0.0.1:0", '"kept"', '"kept, too"'):
        assert part in text
    assert "PERDURE_NAMESPACES" not in text


def test_a_server_that_does_not_start_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path, 'sys.exit("no database")')
    monkeypatch.setattr("shutil.which", lambda *_, **__: str(path))
    server = demo.dev_server(tmp_path, tmp_path / "data", tmp_path / "log")
    with pytest.raises(demo.DemoFailed, match="stopped with status 1\nno database"), server:
        pass


def test_without_a_server_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    server = demo.dev_server(tmp_path, tmp_path / "data", tmp_path / "log")
    with pytest.raises(demo.DemoFailed, match="pip install"), server:
        pass


def test_the_documents_are_those_named_or_the_repositorys_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCS", str(tmp_path))
    assert demo._documents(tmp_path) == tmp_path
    monkeypatch.setenv("DOCS", str(tmp_path / "nowhere"))
    with pytest.raises(demo.DemoFailed, match="is no folder"):
        demo._documents(tmp_path)
    monkeypatch.delenv("DOCS")
    repository = tmp_path / "repository"
    (repository / "service" / "docs").mkdir(parents=True)
    (repository / "service" / "docs" / "a.md").write_text("a", encoding="utf-8")
    (repository / "README.md").write_text("r", encoding="utf-8")
    monkeypatch.chdir(repository)
    found = demo._documents(tmp_path / "work")
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*.md")) == ["README.md", "docs/a.md"]


class Decisions:
    """Stands for a client: remembers what is decided."""

    def __init__(self) -> None:
        self.made: list[Decision] = []

    def decide(self, approval: Approval, decision: Decision, *, comment: str) -> None:
        self.made.append(decision)


@pytest.mark.parametrize(
    ("yes", "terminal", "typed", "decision", "told"),
    [
        ("1", False, "", Decision.APPROVE, "as YES=1 says"),
        ("", False, "", Decision.REJECT, "Nobody can be asked"),
        ("", True, "y\n", Decision.APPROVE, ""),
        ("", True, "\n", Decision.REJECT, ""),
        ("", True, "", Decision.REJECT, ""),
    ],
)
def test_a_decision_is_asked_for_or_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    yes: str,
    terminal: bool,
    typed: str,
    decision: Decision,
    told: str,
) -> None:
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setenv("YES", yes)
    monkeypatch.setattr("sys.stdin", Typed(typed))
    approval = Approval(
        approval_id="r/3", namespace="n", run_id="r", title="Publish?", state=ApprovalState.PENDING,
        payload={"answer": "the answer"},
    )  # fmt: skip
    decisions = Decisions()
    demo._decide(decisions, approval, Console(file=io.StringIO()))  # type: ignore[arg-type]
    assert decisions.made == [decision]
    out = capsys.readouterr().out
    assert "the answer" in out
    assert told in out


def test_the_answer_is_printed_with_its_sources_and_the_final_state(capsys: pytest.CaptureFixture[str]) -> None:
    source = {"document": "a.md", "heading": "Crashes", "chunk_id": "1", "quote": "It survives."}
    output = {"question": "?", "answer": "Yes.", "sources": [source], "model": "m", "approved": False}
    run = Run(namespace="n", run_id="r", agent="research", state=RunState.SUCCEEDED, output=output)
    screen = io.StringIO()
    demo._print_answer(run, Console(file=screen))
    assert capsys.readouterr().out.splitlines() == [
        "Yes.", "  [1] a.md, Crashes", "      “It survives.”", "  Written by: m",
    ]  # fmt: skip
    assert screen.getvalue() == "The run r ended as SUCCEEDED, and not published.\n"


def test_a_demonstration_that_cannot_begin_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCS", str(tmp_path / "nowhere"))
    assert demo.main() == 1
    assert "The demonstration failed" in capsys.readouterr().out
    assert os.environ["DOCS"].endswith("nowhere")
