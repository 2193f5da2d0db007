"""Artifacts: bytes that an agent writes for its callers; and inputs and outputs that do not fit a message.

An artifact is a payload of the run and an event that tells its name, committed together. Of several of one name the
last one counts.

**Who may write it?** The run's owner only: the transaction checks that it still is. **What if we die on the next
line?** In the workflow's own code an artifact is an operation with a checkpoint: it is all there, and the replay skips
it, or nothing is, and the replay writes it. Inside a step it is committed at once, before the step is: an attempt that
is repeated writes it again, and the newer one counts. **What if the reply to COMMIT is lost?** The repeat presents the
same pack of events and the same use, and finds them. **What if two do it at once?** Two attempts of one step never
run at once under one owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import sqlalchemy as sa

from perdure_service.domain.events import EventKind
from perdure_service.domain.payloads import Pointer, parse
from perdure_service.domain.runs import Run
from perdure_service.durable.payloads import Payloads
from perdure_service.errors import ArtifactNotFound
from perdure_service.store import event_log, payloads, runs
from perdure_service.store.sqlstates import reading, retrying

SENT_BYTES = 256 * 1024
"""The bytes in one message of a stream."""
SHOWN_BYTES = 3 * 2**20
"""The most of input and output that a run shows: clients take messages of 4 MiB unless they say otherwise."""
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class ArtifactChoice:
    """What to read: the artifact of a name, or, with None, the output or the input."""

    name: str | None = None
    output: bool = False


@dataclass(frozen=True, slots=True)
class Artifact:
    """What is known of an artifact.

    Attributes:
        name: Its name; empty for an input or output.
        media_type: Its media type.
        size_bytes: How many bytes it has.
        sha256: Their SHA-256 (hex).
    """

    name: str
    media_type: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class OpenArtifact:
    """An artifact whose bytes can be read.

    Attributes:
        artifact: What it is.
        pieces: Yields its bytes from an offset; blocks.
    """

    artifact: Artifact
    pieces: Callable[[int], Iterator[bytes]]


def open_artifact(store: Payloads, engine: sa.Engine, run: Run, which: ArtifactChoice) -> OpenArtifact:
    """Returns an artifact of a run. Blocks.

    Args:
        store: Where payloads are.
        engine: The database.
        run: The run; with its input, and its output or a pointer to that, unless a name is asked for.
        which: What to read.

    Raises:
        ArtifactNotFound: There is none, or no output yet.
    """
    if which.name is not None:
        found = retrying(engine, "artifacts.find", lambda conn: _find(conn, run.key.workflow_id, which.name or ""))
        if found is None:
            raise ArtifactNotFound(f"run {run.key.run_id!r} has no artifact {which.name!r}")
        return _of_payload(store, engine, run, found)
    text = run.output_json if which.output else run.input_json
    if text is None:
        what = "output" if which.output else "input as JSON"
        raise ArtifactNotFound(f"run {run.key.run_id!r} has no {what}")
    pointer = parse(text)
    if pointer is not None:
        return _of_payload(store, engine, run, Artifact("", JSON, pointer.size_bytes, pointer.sha256))
    data = text.encode()
    pointer = Pointer.of(data)
    return OpenArtifact(
        Artifact("", JSON, pointer.size_bytes, pointer.sha256),
        lambda offset: iter([data[offset:]] if data[offset:] else []),
    )


def _of_payload(store: Payloads, engine: sa.Engine, run: Run, artifact: Artifact) -> OpenArtifact:
    """Returns a payload of a run, if the run uses it: a hash alone opens nothing."""
    workflow_id, sha256 = run.key.workflow_id, artifact.sha256
    used = reading(engine, "artifacts.used", lambda conn: payloads.is_used_by(conn, workflow_id, sha256))
    if not used:
        raise ArtifactNotFound(f"run {run.key.run_id!r} has no such artifact any more")
    pointer = Pointer(sha256, artifact.size_bytes)
    return OpenArtifact(artifact, lambda offset: store.pieces(pointer, offset))


def _find(conn: sa.Connection, workflow_id: str, name: str) -> Artifact | None:
    """Returns the artifact of a name that the run's log tells of last."""
    found = None
    after = 0
    while events := event_log.read(conn, workflow_id, after):
        after = events[-1].sequence
        for event in events:
            if event.kind is EventKind.ARTIFACT and event.data.get("name") == name:
                data = event.data
                found = Artifact(name, str(data["media_type"]), int(data["size_bytes"]), str(data["sha256"]))
    return found


def with_input(store: Payloads, run: Run) -> Run:
    """Returns a run with its input where the store has read a pointer to it. Blocks."""
    if parse(run.input_json) is None:
        return run
    stored = store.followed(run.input_json, patient=False)
    return replace(run, input_json=runs.input_json(stored, run.input_argument))


def fits_by_itself(run: Run) -> bool:
    """Returns whether `fit` has all that it needs, so that it does not block."""
    return parse(run.output_json) is None


def fit(store: Payloads, run: Run) -> Run:
    """Returns a run as a message can carry it, and how large its input and output are.

    Blocks when the store has read a pointer to the output.
    """
    pointer = parse(run.output_json)
    output_bytes = pointer.size_bytes if pointer else len((run.output_json or "").encode())
    input_bytes = len((run.input_json or "").encode())
    room = SHOWN_BYTES - output_bytes
    output = run.output_json
    if room < 0:
        output, room = None, SHOWN_BYTES
    elif pointer is not None:
        output = store.followed(output, patient=False)
    return replace(
        run,
        output_json=output,
        output_bytes=output_bytes,
        input_json=run.input_json if input_bytes <= room else None,
        input_bytes=input_bytes,
    )
