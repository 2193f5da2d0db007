"""What tests share: waiting, ports, databases, seeds."""

from tests.helpers.waiting import eventually, eventually_async, free_port, scaled

__all__ = ["eventually", "eventually_async", "free_port", "scaled"]
