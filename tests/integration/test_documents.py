"""Documents on a real database: loaded from a folder, found by whole questions, in every dialect that we support."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from perdure_service.errors import ConfigurationError, StoreUnavailable
from perdure_service.store import documents
from perdure_service.store.document_process import DocumentProcess
from perdure_service.store.engine import create_engine

from tests.helpers.databases import DatabaseServer
from tests.helpers.pdfs import pdf

FILES = {
    "leases.md": """# Leases

## Renewal

An executor renews its lease every five seconds on the database's clock.

## Expiry

When a process was killed, its lease expires after fifteen seconds and other executors take over its runs.
""",
    "approvals.md": """# Approvals

A person decides whether an answer is published. Undecided approvals are rejected after two days.
""",
    "guide/streaming.md": """# Watching a run

Reconnect with the cursor of the last response: no event is missed and none is repeated.
""",
    "guide/cooking.txt": "Boil the pasta for nine minutes.\n\nVersion 3.4.0 of the recipe adds salt: food.org/pasta.",
}


@pytest.fixture
def engine(dialect_url: str) -> Iterator[sa.Engine]:
    """An engine on a database without documents."""
    engine = create_engine(dialect_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM perdure.document"))
        connection.execute(sa.text("DELETE FROM perdure.report"))
    yield engine
    engine.dispose()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "handbook"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def load(engine: sa.Engine, folder: Path, collection: str | None = None) -> tuple[documents.LoadReport, list[str]]:
    lines: list[str] = []
    return documents.load_folder(engine, folder, lines.append, collection=collection), lines


def paths(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(sa.text("SELECT path FROM perdure.document ORDER BY path")).scalars())


@pytest.mark.parametrize(
    ("question", "document", "heading"),
    [
        ("What happens to the runs of a process that was killed?", "leases.md", "Leases > Expiry"),
        ("How often does an executor renew its lease?", "leases.md", "Leases > Renewal"),
        ("Who decides if the answers get published, and what if nobody does?", "approvals.md", "Approvals"),
        (
            "If I lose the connection, how do I reconnect without missing events?",
            "guide/streaming.md",
            "Watching a run",
        ),
        ("How long must pasta boil?", "guide/cooking.txt", "cooking"),
        ("what is new in 3.4.0?", "guide/cooking.txt", "cooking"),
        ("WATCHING!!!", "guide/streaming.md", "Watching a run"),
    ],
)
def test_a_whole_question_finds_its_document(
    engine: sa.Engine, folder: Path, question: str, document: str, heading: str
) -> None:
    load(engine, folder)
    found = documents.search(engine, question, 3)
    assert (found[0].document, found[0].heading) == (document, heading)
    assert [passage.score for passage in found] == sorted((passage.score for passage in found), reverse=True)


def test_a_search_returns_as_many_passages_as_asked_for(engine: sa.Engine, folder: Path) -> None:
    load(engine, folder)
    question = "lease, approvals, cursor, pasta, expiry"
    assert len(documents.search(engine, question, 2)) == 2
    assert len(documents.search(engine, question, -1)) == 1
    everything = documents.search(engine, question, 10**9)
    assert len(everything) == len({passage.chunk_id for passage in everything}) == 5


@pytest.mark.parametrize(
    "question",
    [
        "", "   ", "the of and", "?!", "\0", "\ud800", "'", "''", "\\", "a\\'b", "'; DROP TABLE perdure.document; --",
        "' | '", "lease' & !'x", "%s %(x)s :words", "$$ | $1", "lease:* <-> (", "😀", "x" * 2_000, "a " * 1_000,
        "it's O'Reilly's \"book\"", "null\0byte lease", "SELECT * FROM x WHERE 'a'='a'",
    ],
)  # fmt: skip
def test_nothing_in_a_question_is_an_operator(engine: sa.Engine, folder: Path, question: str) -> None:
    load(engine, folder)
    found = documents.search(engine, question, 5)
    assert paths(engine) == sorted(FILES)
    assert bool(found) == ("lease" in question)


def test_quotes_and_backslashes_are_searched_for_as_they_are(engine: sa.Engine, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(r"The share is \\host\x'y and O'Reilly's.", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Another share.", encoding="utf-8")
    load(engine, tmp_path)
    for question in (r"\\host\x'y", r"/srv/x'y/host\x", "what about O'Reilly?"):
        assert all(passage.document == "a.txt" for passage in documents.search(engine, question, 3))
    assert documents.search(engine, "O'Reilly", 3)


def test_only_changed_files_are_written_again(engine: sa.Engine, folder: Path) -> None:
    first, lines = load(engine, folder)
    assert (first.loaded, first.unchanged, first.removed, first.failed) == (4, 0, 0, ())
    assert first.chunks == 5
    assert len(lines) == 4
    second, lines = load(engine, folder)
    assert (second.loaded, second.unchanged, second.chunks) == (0, 4, 0)
    assert lines == []
    before = documents.search(engine, "approvals", 1)[0]
    (folder / "approvals.md").write_text("# Approvals\n\nUndecided approvals wait for ever.\n", encoding="utf-8")
    third, lines = load(engine, folder)
    assert (third.loaded, third.unchanged) == (1, 3)
    after = documents.search(engine, "approvals", 9)
    assert [passage.body for passage in after] == ["Undecided approvals wait for ever."]
    assert after[0].chunk_id != before.chunk_id, "an old source must not point to new words"


def chunk_ids(engine: sa.Engine, path: str) -> list[str]:
    query = sa.text(
        "SELECT c.chunk_id FROM perdure.chunk AS c JOIN perdure.document AS d ON d.document_id = c.document_id "
        "WHERE d.path = :path ORDER BY c.ordinal"
    )
    with engine.connect() as connection:
        return list(connection.execute(query, {"path": path}).scalars())


def test_a_reload_writes_the_passages_that_changed_and_no_others(engine: sa.Engine, folder: Path) -> None:
    load(engine, folder)
    written: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: written.append(" ".join(args[2].split()[:3])))
    load(engine, folder)
    assert not [statement for statement in written if not statement.startswith("SELECT")]
    before = chunk_ids(engine, "leases.md")
    untouched = chunk_ids(engine, "approvals.md")
    written.clear()
    text = FILES["leases.md"].replace("# Leases\n", "# Leases\n\nAn introduction.\n").replace("fifteen", "sixteen")
    (folder / "leases.md").write_text(text, encoding="utf-8")
    report, lines = load(engine, folder)
    assert (report.loaded, report.unchanged, report.chunks) == (1, 3, 2)
    assert lines == ["loaded   leases.md: 3 passages, 2 new"]
    after = chunk_ids(engine, "leases.md")
    assert after[1] == before[0]
    assert not set(before[1:]) & set(after)
    assert chunk_ids(engine, "approvals.md") == untouched
    assert len([statement for statement in written if statement.startswith("INSERT INTO perdure.chunk")]) == 1
    assert documents.search(engine, "sixteen seconds", 1)[0].heading == "Leases > Expiry"


def test_the_same_words_twice_are_two_passages(engine: sa.Engine, tmp_path: Path) -> None:
    long = "A sentence about leases. " * 40
    (tmp_path / "twice.txt").write_text(f"{long}\n\n{long}", encoding="utf-8")
    report, _ = load(engine, tmp_path)
    assert report.chunks == len(set(chunk_ids(engine, "twice.txt"))) == 2


def test_html_and_pdf_are_found_by_their_words_with_the_place(engine: sa.Engine, tmp_path: Path) -> None:
    page = "<title>Gates</title><nav>zebra</nav><h1>Harbour</h1><h2>Locks</h2><p>The lock opens at high tide.</p>"
    (tmp_path / "harbour.html").write_text(page, encoding="utf-8")
    (tmp_path / "atlas.pdf").write_bytes(pdf("Ferries sail to the islands.", "Whales winter in the bay."))
    report, _ = load(engine, tmp_path)
    assert (report.loaded, report.failed) == (2, ())
    assert documents.search(engine, "when does the lock open?", 1)[0].heading == "Harbour > Locks"
    whales = documents.search(engine, "where do whales winter?", 1)[0]
    assert (whales.document, whales.heading) == ("atlas.pdf", "atlas > Page 2")
    assert documents.search(engine, "zebra", 1) == []
    again, lines = load(engine, tmp_path)
    assert (again.unchanged, lines) == (2, [])


def test_bad_pdfs_and_pages_are_reported_by_name_and_the_rest_is_loaded(engine: sa.Engine, folder: Path) -> None:
    (folder / "a-broken.pdf").write_bytes(pdf("words")[:200])
    (folder / "b-secret.pdf").write_bytes(pdf("words", password="secret"))
    (folder / "c-scan.pdf").write_bytes(pdf(""))
    (folder / "d-empty.html").write_text("<nav>menu</nav>", encoding="utf-8")
    (folder / "e-good.pdf").write_bytes(pdf("Whales winter in the bay."))
    report, lines = load(engine, folder)
    assert report.loaded == len(FILES) + 1
    failed = dict(report.failed)
    assert sorted(failed) == ["a-broken.pdf", "b-secret.pdf", "c-scan.pdf", "d-empty.html"]
    assert failed["a-broken.pdf"].startswith("is a broken PDF: ")
    assert failed["b-secret.pdf"] == "is encrypted; save it without a password"
    assert "OCR" in failed["c-scan.pdf"]
    assert failed["d-empty.html"] == "holds no text"
    assert sorted(line.split(":")[0] for line in lines if line.startswith("failed")) == [
        f"failed   {name}" for name in sorted(failed)
    ]


def test_a_file_that_takes_too_long_to_read_does_not_hold_up_the_rest(engine: sa.Engine, folder: Path) -> None:
    (folder / "slow.pdf").write_bytes(pdf("words"))
    lines: list[str] = []
    report = documents.load_folder(engine, folder, lines.append, reader=DocumentProcess(time_limit_s=0.001))
    assert report.failed == (("slow.pdf", "takes longer than 0.001 s to read"),)
    assert report.loaded == len(FILES)


def test_deleted_files_are_removed_from_their_collection_only(engine: sa.Engine, folder: Path, tmp_path: Path) -> None:
    load(engine, folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "leases.md").write_text("A flat's lease is signed.", encoding="utf-8")
    load(engine, other)
    (folder / "leases.md").unlink()
    report, lines = load(engine, folder)
    assert (report.removed, lines) == (1, ["removed  leases.md"])
    assert [passage.body for passage in documents.search(engine, "lease", 9)] == ["A flat's lease is signed."]
    report, _ = load(engine, folder, collection="other")
    assert report.loaded == 3
    assert report.removed == 1


def test_a_bad_file_is_reported_and_the_rest_is_loaded(engine: sa.Engine, folder: Path) -> None:
    load(engine, folder)
    (folder / "approvals.md").write_bytes(b"caf\xe9 au lait")
    (folder / "nul.md").write_bytes(b"a\0b")
    (folder / "huge.txt").write_bytes(b"x" * (documents.MAX_FILE_BYTES + 1))
    (folder / "new.md").write_text("\ufeffA new lease.\r\n\r\nOn life.\r\n", encoding="utf-8")
    report, lines = load(engine, folder)
    assert dict(report.failed) == {
        "approvals.md": "is not UTF-8 at byte 3",
        "huge.txt": "is over 10485760 bytes",
        "nul.md": "holds NUL characters, so it is not text",
    }
    assert len([line for line in lines if line.startswith("failed")]) == 3
    assert (report.loaded, report.removed) == (1, 0)
    assert documents.search(engine, "undecided", 1), "what was loaded of a bad file before stays"
    assert documents.search(engine, "life", 1)[0].body == "A new lease.\n\nOn life."


def test_names_that_no_text_can_hold_and_folders_of_that_name_are_survived(engine: sa.Engine, folder: Path) -> None:
    odd = os.fsencode(folder) + b"/b\xe9d.md"
    with open(odd, "w", encoding="utf-8") as file:
        file.write("lease")
    (folder / "folder.md").mkdir()
    (folder / "gone.md").symlink_to(folder / "nowhere")
    (folder / ".hidden.md").write_text("lease", encoding="utf-8")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.md").write_text("lease", encoding="utf-8")
    report, _ = load(engine, folder)
    assert [name for name, _ in report.failed] == ["b\\udce9d.md"]
    assert paths(engine) == sorted(FILES)


def test_an_unreadable_file_is_reported(engine: sa.Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "leases.md":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    report, _ = load(engine, folder)
    assert report.failed == (("leases.md", "[Errno 13] Permission denied"),)
    assert report.loaded == 3


def test_text_of_any_script_and_endless_words_are_loaded(engine: sa.Engine, tmp_path: Path) -> None:
    (tmp_path / "zh.md").write_text("漢字" * 3_000, encoding="utf-8")
    (tmp_path / "base64.txt").write_text("QUJD" * 5_000, encoding="utf-8")
    (tmp_path / "empty.md").write_text("", encoding="utf-8")
    (tmp_path / "emoji.txt").write_text("😀 smile", encoding="utf-8")
    report, _ = load(engine, tmp_path)
    assert (report.loaded, report.failed) == (4, ())
    assert documents.search(engine, "smiles", 1)[0].document == "emoji.txt"


def test_two_loaders_of_one_folder_do_not_hurt_each_other(engine: sa.Engine, folder: Path) -> None:
    for round_number in range(5):
        (folder / "leases.md").write_text(f"# Leases\n\nRound {round_number}.", encoding="utf-8")
        with ThreadPoolExecutor() as pool:
            reports = list(pool.map(lambda _: load(engine, folder)[0], range(4)))
        assert [report.failed for report in reports] == [()] * 4
        found = [passage.body for passage in documents.search(engine, "leases", 9)]
        assert f"Round {round_number}." in found
        assert len(documents.search(engine, "lease approvals cursor pasta", 99)) == 4


def test_several_loaders_of_new_files_do_not_hurt_each_other(engine: sa.Engine, folder: Path) -> None:
    for _ in range(20):
        with engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM perdure.chunk"))
            connection.execute(sa.text("DELETE FROM perdure.document"))
        with ThreadPoolExecutor() as pool:
            reports = list(pool.map(lambda _: load(engine, folder)[0], range(4)))
        assert [report.failed for report in reports] == [()] * 4


def test_a_folder_that_is_not_there_is_a_configuration_error(engine: sa.Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a folder"):
        load(engine, tmp_path / "nowhere")


def test_the_words_index_is_used(engine: sa.Engine, folder: Path, database_server: DatabaseServer) -> None:
    load(engine, folder)
    statement = sa.text("EXPLAIN SELECT chunk_id FROM perdure.chunk WHERE search @@ CAST(:words AS TSQUERY)")
    with engine.connect() as connection:
        if not database_server.cockroach:
            # PostgreSQL reads a table this small from end to end.
            connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
        plan = "\n".join(connection.execute(statement, {"words": "'leas' | 'expir'"}).scalars())
    assert "chunk_by_words" in plan


def test_the_schema_can_be_created_again(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        for statement in (*documents.DOCUMENT_MIGRATION_STATEMENTS, *documents.REPORT_MIGRATION_STATEMENTS):
            connection.execute(sa.text(statement))


def test_a_report_is_saved_once_and_replaced_by_that_of_a_later_run_of_the_same_id(engine: sa.Engine) -> None:
    def save(answer: str) -> tuple[str, list[dict[str, str]], datetime]:
        documents.save_report(
            engine, report_id="r:1", workflow_id="w", question="q", answer=answer, sources=[{"document": "d"}]
        )
        with engine.connect() as connection:
            rows = connection.execute(sa.text("SELECT answer, sources, created_at FROM perdure.report")).all()
        assert len(rows) == 1
        return tuple(rows[0])  # type: ignore[return-value]

    first = save("first\0\ud800")
    assert first[:2] == ("first ?", [{"document": "d"}])
    assert save("first\0\ud800") == first, "the repeat of a step"
    second = save("second")
    assert second[0] == "second"
    assert second[2] > first[2]


def test_a_database_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    engine = create_engine(
        f"postgresql://nobody@/none?host={tmp_path}", pool_size=1, statement_timeout=timedelta(seconds=1)
    )
    with pytest.raises(StoreUnavailable):
        documents.search(engine, "lease", 1)
    engine.dispose()
