"""What an executor is: a process that runs runs, and its claim to be alive, on the database's clock."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Executor:
    """An executor's lease as the database has it."""

    executor_id: str
    application_version: str
    address: str
    max_running: int
    expires_at: datetime
    alive: bool
    tombstoned: bool


def new_executor_id() -> str:
    """Returns an id that no process has had before: host name and 8 random hex digits."""
    return f"{socket.gethostname()[:40].lower()}-{secrets.token_hex(4)}"
