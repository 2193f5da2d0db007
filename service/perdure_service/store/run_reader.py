"""Reads single runs for whoever asks, many in one query: while queries are under way, what is asked for gathers.

There is no timer. What is asked for within one turn of the event loop is one query, and as soon as fewer than
`MAX_QUERIES` are under way everything that has gathered, at most `MAX_RUNS`, is the next one. A query begins after
everybody in it has asked, so whoever asks sees what was committed before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from perdure_service.domain.runs import Run
from perdure_service.errors import Draining, Overloaded, PerdureError

MAX_RUNS = 64
"""Who may share a query: more, and a message of the database becomes large while the first of them waits."""

MAX_QUERIES = 2
"""Queries at once: while the answer of one is unpacked, the database works on the other."""


Find = Callable[[Sequence[str], bool], Mapping[str, Run]]


@dataclass(eq=False, slots=True)
class _Asked:
    """What somebody waits for.

    Attributes:
        since: When it was asked for, on the loop's clock.
    """

    workflow_ids: tuple[str, ...]
    full: bool
    since: float
    answer: asyncio.Future[list[Run]]


class RunReader:
    """See the module. Used on one event loop."""

    def __init__(self, find: Find, *, max_waiting: int, patience_s: float) -> None:
        """Creates the reader.

        Args:
            find: Returns those of the runs that exist, by workflow id, with input and output when the second argument
                is true; blocks. What it raises that is a `PerdureError` concerns the database, and so everybody.
            max_waiting: How many may wait for their runs.
            patience_s: Who has waited for so long when a query fails is told so, instead of waiting for another one.
        """
        self._find_runs = find
        self._max_waiting = max_waiting
        self._patience_s = patience_s
        self._pool = ThreadPoolExecutor(MAX_QUERIES, thread_name_prefix="rpc-db-runs-")
        self._gathered: deque[_Asked] = deque()
        self._waiting = 0
        self._queries = 0
        self._turn_ends = False
        self._closed = False

    async def get(self, *workflow_ids: str, full: bool = False) -> list[Run]:
        """Returns those of these runs that exist, in this order; with input and output when `full`.

        Raises:
            Overloaded: As many wait as may.
            Draining: The reader is closed.
            PerdureError: As `find`.
        """
        if self._closed:
            raise Draining("this server is stopping; repeat the call")
        if self._waiting >= self._max_waiting:
            raise Overloaded("this server has more calls than it can serve; wait and repeat the call")
        loop = asyncio.get_running_loop()
        asked = _Asked(workflow_ids, full, loop.time(), loop.create_future())
        self._gathered.append(asked)
        if not self._turn_ends:
            self._turn_ends = True
            loop.call_soon(self._at_the_end_of_a_turn)
        self._waiting += 1
        try:
            return await asked.answer
        finally:
            self._waiting -= 1

    @property
    def waiting(self) -> int:
        """How many wait for their runs."""
        return self._waiting

    def close(self) -> None:
        """Ends the threads; whoever still waits is told that this server is stopping."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._refuse(self._gathered, Draining("this server is stopping; repeat the call"))
        self._gathered.clear()

    # ---- on the loop -------------------------------------------------------------------------------------------------

    def _at_the_end_of_a_turn(self) -> None:
        self._turn_ends = False
        self._begin()

    def _begin(self) -> None:
        """Begins as many queries as may be under way."""
        while self._queries < MAX_QUERIES and not self._closed and (batch := self._next()):
            self._queries += 1
            query = asyncio.get_running_loop().run_in_executor(self._pool, self._read, batch)
            query.add_done_callback(lambda done, batch=batch: self._deliver(batch, done))  # type: ignore[misc]

    def _next(self) -> list[_Asked]:
        """Takes what the next query is to read; who has given up meanwhile is left out."""
        batch: list[_Asked] = []
        while self._gathered and len(batch) < MAX_RUNS:
            asked = self._gathered.popleft()
            if not asked.answer.done():
                batch.append(asked)
        return batch

    def _deliver(self, batch: Sequence[_Asked], done: asyncio.Future[list[list[Run] | Exception]]) -> None:
        """Gives everybody in a query what is theirs, and begins the next one."""
        self._queries -= 1
        if done.cancelled():
            self._refuse(batch, Draining("this server is stopping; repeat the call"))
        elif (error := done.exception()) is not None:
            self._refuse(batch, error)
            late = asyncio.get_running_loop().time() - self._patience_s
            while self._gathered and self._gathered[0].since < late:
                self._refuse([self._gathered.popleft()], error)
        else:
            for asked, found in zip(batch, done.result(), strict=True):
                if isinstance(found, Exception):
                    self._refuse([asked], found)
                elif not asked.answer.done():
                    asked.answer.set_result(found)
        self._begin()

    @staticmethod
    def _refuse(those: Sequence[_Asked] | deque[_Asked], error: BaseException) -> None:
        for asked in those:
            if not asked.answer.done():
                asked.answer.set_exception(error)

    # ---- in a thread -------------------------------------------------------------------------------------------------

    def _read(self, batch: Sequence[_Asked]) -> list[list[Run] | Exception]:
        """Returns what each of a query has asked for, or its own error.

        Raises:
            PerdureError: The database's, which concerns all.
        """
        try:
            return [*self._find(batch)]
        except PerdureError:
            raise
        except Exception:  # noqa: BLE001 - found again below
            # An id that the database cannot take, a row that cannot be understood: somebody's, not everybody's.
            return [self._find_alone(asked) for asked in batch]

    def _find_alone(self, asked: _Asked) -> list[Run] | Exception:
        try:
            return self._find([asked])[0]
        except Exception as error:  # noqa: BLE001 - raised to whom it belongs
            return error

    def _find(self, batch: Sequence[_Asked]) -> list[list[Run]]:
        found: dict[bool, Mapping[str, Run]] = {}
        for full in {asked.full for asked in batch}:
            ids = sorted({one for asked in batch if asked.full is full for one in asked.workflow_ids})
            found[full] = self._find_runs(ids, full)
        return [[found[asked.full][one] for one in asked.workflow_ids if one in found[asked.full]] for asked in batch]
