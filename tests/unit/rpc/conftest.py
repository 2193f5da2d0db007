"""Fixtures of the RPC layer's tests."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import pytest
import structlog
from perdure_service import logs
from perdure_service.rpc import failures
from structlog.testing import LogCapture

from tests.unit.rpc.doubles import ScriptedService


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def rpc_log(monkeypatch: pytest.MonkeyPatch) -> list[MutableMapping[str, Any]]:
    """What is logged of failed calls, context variables included."""
    capture = LogCapture()
    logger = structlog.wrap_logger(None, processors=[structlog.contextvars.merge_contextvars, logs.add_call, capture])
    monkeypatch.setattr(failures, "_log", logger)
    return capture.entries
