"""Counts what the tests of this folder break and find, for the summary at the end (`tests.helpers.chaos_report`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import chaos_report


@pytest.fixture(scope="module", autouse=True)
def counted(chaos_folder: str) -> Iterator[None]:
    """What runs in this module, and its servers, are counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(chaos_report.FOLDER, chaos_folder)
        yield
