"""How settings are told that are more than one value, and what is refused."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from perdure_service.errors import ConfigurationError
from perdure_service.settings import Settings, effective, load_settings, secrets_of


def test_each_namespace_keeps_its_runs_by_its_own_rule_or_else_by_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_NAMESPACES", "default,trials,audit")
    monkeypatch.setenv("PERDURE_RETENTION", "P90D")
    monkeypatch.setenv("PERDURE_NAMESPACE_RETENTION", " trials = 3600.5, audit=never ")
    settings = load_settings()
    assert settings.retentions == {
        "default": timedelta(days=90), "trials": timedelta(seconds=3600.5), "audit": None,
    }  # fmt: skip
    assert settings.event_retention is None
    lines = list(effective(settings))
    assert "PERDURE_RETENTION = 7776000 (set)" in lines
    assert "PERDURE_NAMESPACE_RETENTION = trials=3600.5,audit=never (set)" in lines


def test_without_a_word_everything_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERDURE_RETENTION", raising=False)
    assert load_settings().retentions == {"default": None}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NAMESPACE_RETENTION", "default", "'default' must be NAME=DURATION, or NAME=never"),
        ("NAMESPACE_RETENTION", "=1", "'=1' must be NAME=DURATION"),
        ("NAMESPACE_RETENTION", "default=", "'' must be a duration (seconds, as 15, or ISO 8601"),
        ("NAMESPACE_RETENTION", "default=30d?", "'30d?' must be a duration"),
        ("NAMESPACE_RETENTION", "default=0.5", "'0.5' must be at least 1 s"),
        ("NAMESPACE_RETENTION", "default=-P1D", "must be at least 1 s"),
        ("NAMESPACE_RETENTION", "default=1,default=2", "names a namespace twice"),
        ("NAMESPACE_RETENTION", "defualt=1", "names 'defualt', which PERDURE_NAMESPACES does not have"),
        ("RETENTION", "0", "greater than or equal to 1 second"),
        ("RETENTION", "soon", "(seconds, as 15, or ISO 8601, as PT15S)"),
        ("EVENT_RETENTION", "0", "greater than or equal to 1 second"),
    ],
)
def test_a_retention_that_is_none_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"PERDURE_{name}", value)
    with pytest.raises(ConfigurationError) as error:
        load_settings()
    assert error.value.message.startswith(f"PERDURE_{name}")
    assert said in error.value.message


ROOT = Path(__file__).resolve().parents[2]


def test_every_secret_may_be_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("postgresql://user:word@host/db\n")
    monkeypatch.setenv("PERDURE_PAYLOADS__S3_ACCESS_KEY_ID", "who")
    for variable in secrets_of(Settings):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(f"{variable}_FILE", str(path))
    settings = load_settings()
    found = [
        settings.database_url, settings.model.api_key, settings.embedder.api_key,
        settings.payloads.s3_secret_access_key,
    ]  # fmt: skip
    assert [one and one.get_secret_value() for one in found] == ["postgresql://user:word@host/db"] * 4
    assert len(found) == len(list(secrets_of(Settings))), "a secret that this test does not know"
    lines = list(effective(settings))
    assert "PERDURE_DATABASE_URL = ********** (set)" in lines
    assert not [line for line in lines if "word" in line]


def test_the_document_names_the_file_of_every_secret() -> None:
    text = (ROOT / "service" / "docs" / "settings.md").read_text()
    assert [variable for variable in secrets_of(Settings) if f"{variable}_FILE" not in text] == []


@pytest.mark.parametrize(
    ("content", "also", "said"),
    [
        (b"", None, "PERDURE_DATABASE_URL_FILE: {path} is empty"),
        (b"\n", None, "PERDURE_DATABASE_URL_FILE: {path} is empty"),
        (b"\xff", None, "PERDURE_DATABASE_URL_FILE: {path} cannot be read (it is not UTF-8)"),
        (None, None, "PERDURE_DATABASE_URL_FILE: {path} cannot be read (No such file or directory)"),
        (b"a", "b", "PERDURE_DATABASE_URL and PERDURE_DATABASE_URL_FILE are both set; unset one"),
    ],
)
def test_a_secret_that_cannot_be_read_from_its_file_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, also: str | None, said: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("PERDURE_DATABASE_URL_FILE", str(path))
    monkeypatch.setenv("PERDURE_DATABASE_URL", also or "")
    with pytest.raises(ConfigurationError) as error:
        load_settings()
    assert error.value.message == said.format(path=path)
