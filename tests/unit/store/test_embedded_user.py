"""The system user of the embedded server is made once, whoever else makes it."""

from __future__ import annotations

import pwd
import subprocess
from typing import Any

import pytest
from perdure_service.errors import ConfigurationError
from perdure_service.store import embedded


class Host:
    """A host without the user: `useradd` fails as often as it is told, and another process makes the user meanwhile."""

    def __init__(self, failures: int, made_by_others_after: int) -> None:
        self.calls = 0
        self._failures = failures
        self._made_by_others_after = made_by_others_after
        self._made = False

    def getpwnam(self, name: str) -> Any:
        if self._made or self.calls >= self._made_by_others_after:
            return name
        raise KeyError(name)

    def run(self, command: list[str], **_: Any) -> None:
        self.calls += 1
        if self.calls <= self._failures:
            raise subprocess.CalledProcessError(1, command)
        self._made = True


@pytest.mark.parametrize(("failures", "made_by_others_after", "calls"), [(0, 99, 1), (99, 1, 1), (2, 99, 3), (0, 0, 0)])
def test_the_user_is_made_unless_another_process_has_made_it(
    monkeypatch: pytest.MonkeyPatch, failures: int, made_by_others_after: int, calls: int
) -> None:
    host = Host(failures, made_by_others_after)
    monkeypatch.setattr(pwd, "getpwnam", host.getpwnam)
    monkeypatch.setattr(subprocess, "run", host.run)
    monkeypatch.setattr(embedded, "USER_PAUSE_S", 0.0)
    embedded._make_system_user()
    assert host.calls == calls


def test_a_user_that_cannot_be_made_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(99, 99)
    monkeypatch.setattr(pwd, "getpwnam", host.getpwnam)
    monkeypatch.setattr(subprocess, "run", host.run)
    monkeypatch.setattr(embedded, "USER_PAUSE_S", 0.0)
    with pytest.raises(ConfigurationError, match="PERDURE_DATABASE_URL"):
        embedded._make_system_user()
    assert host.calls == embedded.USER_ATTEMPTS
