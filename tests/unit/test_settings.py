"""How settings are told that are more than one value, and what is refused."""

from __future__ import annotations

from datetime import timedelta

import pytest
from perdure_service.errors import ConfigurationError
from perdure_service.settings import effective, load_settings


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
