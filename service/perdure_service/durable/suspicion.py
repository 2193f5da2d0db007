"""Finds executors that are gone before their leases are over: whose address refuses connections, and who fell silent.

A process that was killed leaves a host which answers for it at once: nobody listens (RST). Together with a renewal that
did not come that is enough to give its runs to others, seconds before its lease expires. It is no more than a hint to
look earlier: the claim is ended by the reaper's own means, a tombstone by compare-and-set, if the renewal that was seen
is still the last one. An executor that is wrongly suspected ends itself, as one does whose lease was lost, and no step
of it is recorded twice; so being wrong costs time, and the rules are there to make that rare:

* *Refused* means every address of its name refused. A timeout, an unreachable host or network, or a name that does not
  resolve says nothing: that is what a partition looks like.
* It must have been reached from here before. A policy that never let us through, or an address that is not its own,
  makes nobody suspect. Behind a fleet that listens on loopback or under names that others cannot resolve, there is no
  suspicion, and the leases do.
* Silent for more than one and a half renewal intervals, by the database's clock.
* Not while most others are silent: then it is the database, or the network.
* One at a time, the one that has been silent longest, refused twice in a row.

**What if we die on the next line?** The tombstone is committed, so everybody's next look gives its runs back: the rule
is "no living executor". **What if the reply to COMMIT is lost?** The same. **What if two suspect it at once?** One sets
the tombstone; both may give runs back, which locks rows and skips what the other one has. **What if it renews?** Then
the renewal that was seen is not the last one, and nothing is changed.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum

import sqlalchemy as sa
import structlog

from perdure_service.store import suspects
from perdure_service.store.sqlstates import JITTER, reading, retrying
from perdure_service.store.suspects import Peer

SILENT_INTERVALS = 1.5
"""Renewal intervals without a renewal after which an executor is silent."""
LOOKS_AT_THE_SILENT = 4
"""In a renewal interval, while somebody is silent and does not refuse. Else the next is when somebody may become so."""
SHORTEST_PAUSE_S = 0.1
LOOK_PER_PEER_S = 0.05
"""The time between two looks, at least, for every other executor: all of a fleet look 20 times a second at most."""
CONNECT_TIMEOUT_S = 0.5
"""A host of the same region answers within milliseconds, also that nobody listens."""
SECOND_LOOK_S = 0.1
"""Between the two attempts that must both be refused."""
INTRODUCTIONS = 8
"""Executors that one look connects to for the first time."""
INTRODUCE_AGAIN_S = 30.0
"""After which one that could not be reached is tried again."""

log = structlog.get_logger()


class Answer(StrEnum):
    """What came of a connection attempt."""

    REACHED = "reached"
    REFUSED = "refused"
    UNKNOWN = "unknown"


def connect(address: str) -> Answer:
    """Tries to connect to `host:port`; returns REFUSED only when each address of the name refused. Blocks."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S, all_errors=True):
            return Answer.REACHED
    except ExceptionGroup as errors:
        refused = all(isinstance(error, ConnectionRefusedError) for error in errors.exceptions)
        return Answer.REFUSED if refused else Answer.UNKNOWN
    except (OSError, ValueError):  # a name that does not resolve; no port
        return Answer.UNKNOWN


class Suspicion:
    """See the module. Looks from a thread of its own."""

    def __init__(
        self,
        engine: sa.Engine,
        executor_id: str,
        *,
        renew_s: float,
        take_back: Callable[[], int],
        gone: Callable[[Sequence[str]], None],
        connect: Callable[[str], Answer] = connect,
    ) -> None:
        """Creates it.

        Args:
            engine: The database.
            executor_id: This process's.
            renew_s: How often executors renew their leases.
            take_back: Gives back the runs of executors that are gone.
            gone: Told of executors that this one has declared gone.
            connect: Tries an address.
        """
        self._engine = engine
        self._executor_id = executor_id
        self._renew_s = renew_s
        self._take_back = take_back
        self._gone = gone
        self._connect = connect
        self._reached: set[str] = set()
        self._tried_s: dict[str, float] = {}
        self._pause_s = renew_s / LOOKS_AT_THE_SILENT
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="suspicion", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def look(self) -> Peer | None:
        """Ends the claim of an executor that is surely gone, and gives its runs back; returns it. Blocks."""
        peers = reading(self._engine, "suspicion.peers", lambda conn: suspects.peers(conn, self._executor_id))
        self._reached &= {one.executor_id for one in peers}
        limit_s = SILENT_INTERVALS * self._renew_s
        silent = [one for one in peers if one.silent_s > limit_s]
        others = [one for one in peers if one.silent_s <= limit_s]
        longest_s = self._renew_s / LOOKS_AT_THE_SILENT if silent else self._renew_s
        soonest_s = min((limit_s - one.silent_s for one in others), default=longest_s)
        self._pause_s = max(SHORTEST_PAUSE_S, LOOK_PER_PEER_S * len(peers), min(soonest_s, longest_s))
        self._introduce(others)
        if len(silent) > 1 and 2 * len(silent) > len(peers):
            return None
        for one in sorted(silent, key=lambda peer: peer.renewed_at):
            if one.executor_id in self._reached and self._refused_twice(one):
                return one if self._declare_gone(one) else None
        return None

    def _introduce(self, peers: Sequence[Peer]) -> None:
        """Notes which living executors can be reached from here."""
        now = time.monotonic()
        self._tried_s = {one.executor_id: self._tried_s.get(one.executor_id, -INTRODUCE_AGAIN_S) for one in peers}
        strangers = [
            one
            for one in peers
            if one.executor_id not in self._reached and now - self._tried_s[one.executor_id] >= INTRODUCE_AGAIN_S
        ]
        for one in strangers[:INTRODUCTIONS]:
            self._tried_s[one.executor_id] = now
            if self._connect(one.address) is Answer.REACHED:
                self._reached.add(one.executor_id)

    def _refused_twice(self, peer: Peer) -> bool:
        if self._connect(peer.address) is not Answer.REFUSED:
            return False
        self._stop.wait(SECOND_LOOK_S)
        return self._connect(peer.address) is Answer.REFUSED

    def _declare_gone(self, peer: Peer) -> bool:
        declared = retrying(self._engine, "suspicion.tombstone", lambda conn: suspects.tombstone_unchanged(conn, peer))
        if declared:
            log.warning("executor.suspected", suspect_id=peer.executor_id, silent_s=round(peer.silent_s, 1))
            self._gone([peer.executor_id])
            self._take_back()
        return declared

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s * JITTER.uniform(1.0, 1.1)):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 - logged; the leases do it all the same
                log.warning("suspicion.failed", error=type(error).__name__)
