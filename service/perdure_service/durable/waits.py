"""Wakes what agents' code waits for in memory: messages, values, entries of streams, and the ends of other runs.

DBOS keeps the first three in maps by workflow and name, and has a listener of its own for them, which on PostgreSQL
needs a connection and on CockroachDB asks once for every wait, four times a second. Here the hints wake them
(`durable.hints`): by name, where the hint has one, else by one query for all waits that it may concern. A wait for a
value takes its waking for the arrival, so it is woken only for what is there; what has been published stays. A message
is taken: the hint of one may come late and wake the wait for the next, which looks (`durable.parking`).

All of them together are looked at every now and then, whatever hints say: a hint that is lost, or what a foreign client
did unseen, costs a delay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
import structlog

from perdure_service.durable.executions import Wait
from perdure_service.store.dbos_tables import NOTIFICATION_CHANNELS, NOTIFICATIONS, WORKFLOW_EVENTS
from perdure_service.store.sqlstates import retrying

LOOK_S = 0.5
"""How often all waits are looked at while no hints arrive."""

HINTED_LOOK_S = 15.0
"""How often while they do."""

PAUSE_S = 0.05
"""After a look at all waits: a feed that does not tell for whom messages come may tell of many."""

STOP_POLL_S = 0.25

_MESSAGES, _VALUES, _STREAMS = NOTIFICATION_CHANNELS

_ARRIVED: Mapping[str, sa.TextClause] = {
    _MESSAGES: sa.text(
        f"SELECT DISTINCT destination_uuid, topic FROM {NOTIFICATIONS} "
        "WHERE destination_uuid = ANY(:ids) AND consumed = false"
    ),
    _VALUES: sa.text(f"SELECT workflow_uuid, key FROM {WORKFLOW_EVENTS} WHERE workflow_uuid = ANY(:ids)"),
}

log = structlog.get_logger()


class Waits:
    """See the module. `look_for`, `wake` and `ended` may be called from any thread, and return at once."""

    def __init__(self, engine: sa.Engine, hinted: Callable[[], bool]) -> None:
        """Creates it; `run` does the work.

        Args:
            engine: The database.
            hinted: Whether hints are known to arrive.
        """
        self._engine = engine
        self._hinted = hinted
        self._maps: Mapping[str, Any] = {}
        self._changed = threading.Condition()
        self._ids: set[str] = set()
        self._all = False
        self._results: dict[str, set[Wait]] = {}
        self._results_lock = threading.Lock()

    def bind(self, messages: Any, values: Any, streams: Any) -> None:
        """Sets DBOS's maps of waits, before anything waits."""
        self._maps = {_MESSAGES: messages, _VALUES: values, _STREAMS: streams}

    @property
    def hinted(self) -> bool:
        """Whether hints are known to arrive: then a wait needs to look by itself only seldom."""
        return self._hinted()

    # ---- results -----------------------------------------------------------------------------------------------------

    @contextmanager
    def for_results(self, workflow_ids: Sequence[str], wait: Wait) -> Iterator[None]:
        """Surrounds a wait for the end of any of these runs, from before it first looks."""
        with self._results_lock:
            for workflow_id in workflow_ids:
                self._results.setdefault(workflow_id, set()).add(wait)
        try:
            yield
        finally:
            with self._results_lock:
                for workflow_id in workflow_ids:
                    waits = self._results.get(workflow_id, set())
                    waits.discard(wait)
                    if not waits:
                        self._results.pop(workflow_id, None)

    def ended(self, workflow_ids: Collection[str] | None) -> None:
        """Wakes whoever waits for the end of these runs; None for all. Who is woken looks."""
        with self._results_lock:
            chosen = list(self._results) if workflow_ids is None else workflow_ids
            woken = [wait for one in chosen for wait in self._results.get(one, ())]
        for wait in woken:
            wait.event.set()

    # ---- messages, values, streams -----------------------------------------------------------------------------------

    def wake(self, channel: str, name: str) -> None:
        """Wakes the waits of this name: what they wait for is there, or has been."""
        found = self._maps[channel].get(name) if channel in self._maps else None
        if found is not None:
            found.set()

    def look_for(self, workflow_ids: Collection[str] | None) -> None:
        """Says that something may have come for the waits of these runs; None for all."""
        if workflow_ids is None:
            with self._changed:
                self._all = True
                self._changed.notify()
            return
        waited_for = {components[0] for _, _, components in self._waiting((_MESSAGES, _VALUES))}
        concerned = waited_for.intersection(workflow_ids) if waited_for else ()
        if concerned:
            with self._changed:
                self._ids.update(concerned)
                self._changed.notify()

    def run(self, going_on: Callable[[], bool]) -> None:
        """Looks whenever it is told to, and every now and then, as long as `going_on`. Blocks the thread."""
        last_look = time.monotonic()
        while going_on():
            interval_s = HINTED_LOOK_S if self._hinted() else LOOK_S
            with self._changed:
                if not self._ids and not self._all:
                    self._changed.wait(min(STOP_POLL_S, max(0.0, last_look + interval_s - time.monotonic())))
                everything = self._all or time.monotonic() >= last_look + interval_s
                ids, self._ids, self._all = self._ids, set(), False
            if everything:
                last_look = time.monotonic()
            if everything or ids:
                try:
                    self.look(None if everything else ids)
                except Exception as error:  # noqa: BLE001 - logged; the next look tries again
                    log.warning("waits.look_failed", error=type(error).__name__)
            if everything:
                time.sleep(PAUSE_S)

    def look(self, workflow_ids: Collection[str] | None) -> None:
        """Wakes the waits, of some runs or of all, for which something is there. Blocks."""
        for channel, statement in _ARRIVED.items():
            waiting: dict[tuple[str, str], Any] = {}
            for _, signal, (workflow_id, name, *_) in self._waiting((channel,)):
                if workflow_ids is None or workflow_id in workflow_ids:
                    waiting[workflow_id, name] = signal
            if waiting:
                ids = sorted({workflow_id for workflow_id, _ in waiting})
                for row in self._read(statement, ids):
                    signal = waiting.get((row[0], row[1]))
                    if signal is not None:
                        signal.set()
        if workflow_ids is None:
            for _, signal, _ in self._waiting((_STREAMS,)):
                signal.set()  # a reader of a stream looks for itself

    def _waiting(self, channels: Sequence[str]) -> Iterator[tuple[str, Any, Sequence[Any]]]:
        for channel in channels:
            if channel in self._maps:
                for name, components, signal in self._maps[channel].snapshot():
                    yield name, signal, components

    def _read(self, statement: sa.TextClause, ids: Sequence[str]) -> Sequence[Any]:
        return retrying(self._engine, "waits.look", lambda conn: conn.execute(statement, {"ids": ids}).fetchall())
