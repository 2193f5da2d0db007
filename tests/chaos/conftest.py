"""What each chaos test has counted goes with its report; see `tests/helpers/chaos_report.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import chaos_report


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Iterator[None]:
    chaos_report.take()
    yield
    request.node.user_properties.append((chaos_report.PROPERTY, chaos_report.take()))
