"""The test agents for a server that hears no hints and sends none: `--agents tests.helpers.deaf_agents`."""

from __future__ import annotations

from perdure_service.store.hints import NotifyFeed

from tests.helpers import agents

__all__ = ["agents"]

NotifyFeed.start = lambda _feed: None  # type: ignore[method-assign]
