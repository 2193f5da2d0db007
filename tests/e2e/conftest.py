"""Fixtures for the end-to-end tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder to work in. Not one of pytest: root's database server is another user, and could not enter it."""
    made = Path(tempfile.mkdtemp(prefix="perdure-e2e-"))
    (made / "home").mkdir()
    yield made
    shutil.rmtree(made, ignore_errors=True)
