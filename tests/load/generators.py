"""Load generators as seen from the benchmark: processes that are told how long and with how many clients to work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.load.loop import READY, quantile

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Answer:
    """What a load generator did.

    Attributes:
        count: Operations that ended.
        seconds: In which they did.
        latencies_ms: Of each, the shortest first; with the repeats of their calls.
        repeats: Calls that were repeated, as the server was too busy.
    """

    count: int
    seconds: float
    latencies_ms: list[float]
    repeats: int = 0

    @property
    def per_second(self) -> float:
        return self.count / self.seconds

    def latency_ms(self, share: float) -> float:
        """Returns the latency that this share of the operations is below."""
        return quantile(self.latencies_ms, share)


class Generator:
    """A load generator in a process of its own: `python -m tests.load.<module> arguments`, see `loop`."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        # A file, as nobody reads a pipe while it works.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.load.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "GRPC_VERBOSITY": "ERROR", **(environment or {})},
        )
        self.process = psutil.Process(self._process.pid)
        self._read(until=READY)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Sends an order; returns the answer.

        Raises:
            RuntimeError: It has ended instead; the message is what it said.
        """
        self.send(**order)
        return self.receive()

    def send(self, **order: Any) -> None:
        """Sends an order, and does not wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Waits for an answer."""
        found: dict[str, Any] = json.loads(self._read())
        return found

    def load(self, clients: int, seconds: float, **more: Any) -> Answer:
        """Has it work, with some clients at a time."""
        found = self.ask(clients=clients, seconds=seconds, **more)
        return Answer(found["count"], found["seconds"], found["latencies_ms"], found.get("repeats", 0))

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _read(self, until: str = "") -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and (line := self._process.stdout.readline()):
            if line.startswith(until or "{"):
                return line
        self._errors.seek(0)
        raise RuntimeError(f"{self._process.args!r} has ended:\n{self._errors.read()[-4000:]}")
