"""The commands `artifacts` and `read`: what a run's agent kept for its callers."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from perdure_client._events import ArtifactWritten, EventKind
from perdure_client.cli._context import OutputOption, RunArgument, session_of
from perdure_client.cli._output import Output, chosen, say, write_json_line, write_rows
from perdure_client.cli._text import clean, jsonable

TELL_BYTES = 8 * 2**20
"""How often reading a large artifact says how far it is."""


def artifacts(context: typer.Context, run: RunArgument, output: OutputOption = None) -> None:
    """Shows the artifacts of a run; of several of one name the last one.

    Example:
      perdure artifacts run-0c1f
    """
    events = session_of(context).client.events(run, kinds=[EventKind.ARTIFACT])
    found = {event.data.name: event.data for event in events if isinstance(event.data, ArtifactWritten)}
    if chosen(output) is Output.JSON:
        for one in found.values():
            write_json_line(jsonable(one))
    elif not write_rows(
        ("NAME", "TYPE", "BYTES", "SHA-256"),
        ((clean(one.name), clean(one.media_type), str(one.size_bytes), one.sha256[:12]) for one in found.values()),
    ):
        say("No artifacts.")


def read(
    context: typer.Context,
    run: RunArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The artifact's name.", show_default=False)],
) -> None:
    """Writes the bytes of an artifact to standard output.

    Example:
      perdure read run-0c1f report.pdf > report.pdf
    """
    done = told = 0
    for piece in session_of(context).client.artifact(run, name):
        sys.stdout.buffer.write(piece)
        done += len(piece)
        if done - told >= TELL_BYTES:
            told = done
            say(f"{done} bytes of {clean(name)}")
    sys.stdout.buffer.flush()
