"""Large values of runs: stored once by their hash, with a pointer in DBOS's row, and read back wherever DBOS reads.

**Writing.** Whatever writes a large text into a row asks `stow` first. It returns what stands in the row instead, and
`write` then stores bytes and use in the transaction that writes the row (see `store/payloads.py`). An object store is
given the bytes by `stow`, before the transaction begins, under a key that is never used twice.

**Reading.** All that DBOS stores goes through the `deserialize` of one of its two formats; `install` makes both follow
a pointer. A small value costs a look at its beginning, and no statement. A pointer is followed on a connection of its
own, as what it leads to never changes while the row is there. Replays follow it in DBOS's thread for database calls,
before the loop that runs agents sees it.

**When the store is away**, a run waits: its step has done its work, and only its checkpoint is late. A caller is told
UNAVAILABLE after some seconds, and repeats its call.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from dbos._serialization import DBOSPortableJSONSerializer, DefaultSerializer

from perdure_service.domain.payloads import MARK, Pointer, parse
from perdure_service.durable.hops import refuse_to_block
from perdure_service.durable.substitutes import substitute
from perdure_service.errors import Contention, Overloaded, StoreUnavailable
from perdure_service.store import payloads
from perdure_service.store.objects import Objects
from perdure_service.store.sqlstates import JITTER, reading

T = TypeVar("T")

log = structlog.get_logger()

WAIT_S = (0.2, 5.0)
"""The first and the longest pause of a run that waits for a store that is away."""

ORPHAN_AGE = timedelta(days=1)
"""How old an object must be to be swept when no row tells of it. A row tells of none that is older than half of this:
a commit that has waited so long for its database stores the bytes anew."""

SWEEP_EVERY_S = 3600.0
SWEEP_OBJECTS = 500
"""Objects that are looked up in one statement."""

_plain_json: Callable[..., Any] = DBOSPortableJSONSerializer.deserialize
_plain_pickle: Callable[..., Any] = DefaultSerializer.deserialize


@dataclass(frozen=True, slots=True)
class Stowed:
    """Bytes that are ready to be used by a row.

    Attributes:
        pointer: What stands for them.
        data: The bytes.
        object_key: The object that holds them; None where none was needed.
        object_s: When that began to be written, by `time.monotonic`.
    """

    pointer: Pointer
    data: bytes
    object_key: str | None = None
    object_s: float = 0.0


class Payloads:
    """The large values of one server. Everything blocks."""

    def __init__(self, engine: sa.Engine, threshold_bytes: int, objects: Objects | None = None) -> None:
        """Creates it.

        Args:
            engine: The database.
            threshold_bytes: What is larger is stored apart.
            objects: Where bytes go; None for the table.
        """
        self._engine = engine
        self._threshold_bytes = threshold_bytes
        self._objects = objects
        self._closed = threading.Event()

    def install(self) -> None:
        """Makes DBOS follow pointers wherever it reads a stored value."""

        def from_json(serializer: Any, text: str | None) -> Any:
            return _plain_json(serializer, self.followed(text))

        def from_pickle(serializer: Any, text: str) -> Any:
            return _plain_pickle(serializer, self.followed(text))

        substitute(DBOSPortableJSONSerializer, "deserialize", from_json)
        substitute(DefaultSerializer, "deserialize", from_pickle)

    def close(self) -> None:
        """Ends the waits for a store that is away: their runs are continued elsewhere."""
        self._closed.set()

    # ---- writing -----------------------------------------------------------------------------------------------------

    def fits(self, text: str | None) -> bool:
        """Returns whether a text is certain to stay in its row; does not block."""
        # A character takes at most three bytes here, four as a surrogate pair of two.
        return text is None or len(text) * 4 <= self._threshold_bytes

    def stow(self, text: str | None, *, patient: bool = True) -> Stowed | None:
        """Returns a text as a payload when it is too large for a row, else None.

        Args:
            text: As it would be stored.
            patient: Whether to wait for an object store that is away, as a run does.

        Raises:
            StoreUnavailable: The object store is away, and nobody waits for it.
        """
        if text is None or self.fits(text) or text.startswith(MARK):
            return None
        data = text.encode()
        return self.stow_bytes(data, patient=patient) if len(data) > self._threshold_bytes else None

    def stow_bytes(self, data: bytes, *, patient: bool = True) -> Stowed:
        """Returns bytes as a payload, whatever their size; see `stow`."""
        pointer = Pointer.of(data)
        if self._objects is None:
            return Stowed(pointer, data)
        refuse_to_block()

        def put() -> Stowed:
            if reading(self._engine, "payloads.place", lambda conn: payloads.place(conn, pointer.sha256)):
                return Stowed(pointer, data)
            began_s = time.monotonic()
            return Stowed(pointer, data, self._put(pointer, data), began_s)

        return self._patiently(put) if patient else put()

    def _put(self, pointer: Pointer, data: bytes) -> str:
        """Stores an object under a key that no row has, nor ever had."""
        assert self._objects is not None, "asked with an object store only"
        key = f"{pointer.sha256}/{uuid.uuid4().hex}"
        self._objects.put(key, data)
        return key

    def write(self, conn: sa.Connection, workflow_id: str, stowed: Stowed | None) -> None:
        """Makes a run use a payload, in the transaction that writes the pointer to it; None does nothing."""
        if stowed is None:
            return

        def stored_object() -> str:
            # Rarely here: the payload that was there has just been deleted, or the database was away for long.
            fresh = time.monotonic() - stowed.object_s < ORPHAN_AGE.total_seconds() / 2
            if stowed.object_key is not None and fresh:
                return stowed.object_key
            return self._patiently(lambda: self._put(stowed.pointer, stowed.data))

        payloads.use(conn, workflow_id, stowed.pointer, stowed.data, None if self._objects is None else stored_object)

    def forget_objects(self, keys: list[str]) -> None:
        """Deletes objects that nothing tells of any more; what fails is left to the sweep."""
        if self._objects is None:
            return
        for key in keys:
            try:
                self._objects.delete(key)
            except StoreUnavailable:
                log.warning("payloads.object_left", count=len(keys))
                return

    def sweep(self, older_than: timedelta = ORPHAN_AGE) -> int:
        """Deletes objects that no row tells of, and that are so old that none ever will; returns how many.

        Raises:
            StoreUnavailable: A store is away; the next sweep goes on.
        """
        if self._objects is None:
            return 0
        now = reading(self._engine, "payloads.now", payloads.now)
        old = (key for key, written in self._objects.all() if now - written > older_than)
        deleted = 0
        while batch := list(islice(old, SWEEP_OBJECTS)):
            hashes = sorted({key.partition("/")[0] for key in batch})
            known = reading(
                self._engine,
                "payloads.known",
                lambda conn, hashes=hashes: payloads.known_objects(conn, hashes),  # type: ignore[misc]
            )
            for key in batch:
                if key not in known:
                    self._objects.delete(key)
                    deleted += 1
        return deleted

    def start(self) -> None:
        """Begins to sweep, when there is an object store."""
        if self._objects is not None:
            threading.Thread(target=self._sweeps, name="perdure-payloads", daemon=True).start()

    def _sweeps(self) -> None:
        # Not all servers at once, and not at the start of each.
        while not self._closed.wait(SWEEP_EVERY_S * JITTER.uniform(0.5, 1.5)):
            try:
                if deleted := self.sweep():
                    log.info("payloads.swept", count=deleted)
            except Exception as error:  # noqa: BLE001 - the next one goes on
                log.warning("payloads.sweep_failed", error=type(error).__name__)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def followed(self, text: str | None, *, patient: bool = True) -> Any:
        """Returns the text that a stored one stands for; most stand for themselves.

        Raises:
            StoreUnavailable: The store is away, and nobody waits for it.
            LookupError: There are no such bytes; they are lost.
        """
        pointer = parse(text) if isinstance(text, str) else None
        if pointer is None:
            return text

        def read() -> str:
            return b"".join(self.pieces(pointer)).decode()

        return self._patiently(read) if patient else read()

    def pieces(self, pointer: Pointer, offset: int = 0) -> Iterator[bytes]:
        """Yields the bytes of a payload from an offset in pieces of at most 512 KiB, each read when it is asked for.

        Raises:
            StoreUnavailable: The store is away.
            LookupError: There are no such bytes: the last run that used them was deleted.
        """
        refuse_to_block()
        place = reading(self._engine, "payloads.place", lambda conn: payloads.place(conn, pointer.sha256))
        if place is None:
            raise LookupError(f"there is no payload {pointer.sha256}")
        position = offset
        while position < pointer.size_bytes:
            if place.object_key is not None:
                if self._objects is None:
                    raise StoreUnavailable("the bytes are in an object store that this server is not told of")
                data = self._objects.read(place.object_key, position, payloads.PIECE_BYTES)
            else:
                number, skip = divmod(position, payloads.PIECE_BYTES)
                data = reading(
                    self._engine,
                    "payloads.read",
                    lambda conn, number=number: payloads.read_piece(conn, pointer.sha256, number),  # type: ignore[misc]
                )
                data = None if data is None else data[skip:]
            if not data:
                raise LookupError(f"the payload {pointer.sha256} ends after {position} bytes")
            yield data
            position += len(data)

    def _patiently(self, function: Callable[[], T]) -> T:
        """Returns what a function returns once the store is there.

        Raises:
            StoreUnavailable: The engine stops.
        """
        wait_s, longest_s = WAIT_S
        while True:
            try:
                return function()
            except (StoreUnavailable, Contention, Overloaded) as error:
                if self._closed.is_set():
                    raise
                log.warning("payloads.waits", error=type(error).__name__, wait_s=wait_s)
            self._closed.wait(wait_s)
            wait_s = min(wait_s * 2, longest_s)
