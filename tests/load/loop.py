"""The closed loop of every load generator, and the lines by which its process is told what to do.

A load generator is a process of its own: it reads a line of JSON (`Order`), works, and answers with another one. So
every variant is driven in the same way, and what the generator itself costs is known apart from what it drives.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

READY = "ready"
Work = Callable[[], Awaitable[Any]]
"""One operation, from its start to its acknowledged end."""


async def closed_loop(work: Work, clients: int, seconds: float) -> dict[str, Any]:
    """Has some clients do one operation after the other for some seconds; returns the answer."""
    latencies_s: list[float] = []
    began = time.perf_counter()
    end = began + seconds

    async def client() -> None:
        while (begun := time.perf_counter()) < end:
            await work()
            latencies_s.append(time.perf_counter() - begun)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answer(latencies_s, time.perf_counter() - began)


def threads_loop(works: Sequence[Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """As `closed_loop`, each client a thread with work of its own."""
    latencies_s: list[list[float]] = [[] for _ in works]
    errors: list[BaseException] = []
    began = time.perf_counter()
    end = began + seconds

    def client(work: Callable[[], Any], mine: list[float]) -> None:
        try:
            while (begun := time.perf_counter()) < end:
                work()
                mine.append(time.perf_counter() - begun)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=client, args=(work, mine)) for work, mine in zip(works, latencies_s, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return answer([one for mine in latencies_s for one in mine], time.perf_counter() - began)


def answer(latencies_s: Sequence[float], seconds: float) -> dict[str, Any]:
    """Returns what a load generator answers: how many, in how long, and how long each took (ms, in order)."""
    return {
        "count": len(latencies_s),
        "seconds": seconds,
        "latencies_ms": [round(1000 * one, 3) for one in sorted(latencies_s)],
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Returns the value that this share of the ordered values is below; 0 of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def serve(handle: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> None:
    """Says that it is ready, and answers each line until there are no more."""
    print(READY, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await handle(json.loads(line))), flush=True)


def serve_blocking(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """As `serve`, without an event loop."""
    print(READY, flush=True)
    for line in sys.stdin:
        print(json.dumps(handle(json.loads(line))), flush=True)
