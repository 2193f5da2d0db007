"""The commands for operators, who call the admin address."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Annotated

import typer
from rich.text import Text

from perdure_client._client import Client
from perdure_client._config import DEFAULT_ADMIN_ADDRESS, is_loopback
from perdure_client._errors import ServerUnavailable
from perdure_client._types import ExecutorInfo, ExecutorState
from perdure_client.cli._context import OutputOption, session_of
from perdure_client.cli._output import Output, chosen, say, write_json_line, write_rows
from perdure_client.cli._text import age, jsonable, local_time

_STYLES = {ExecutorState.ALIVE: "green", ExecutorState.EXPIRED: "red", ExecutorState.GONE: "dim"}


def executors(
    context: typer.Context,
    include_gone: Annotated[bool, typer.Option("--all", "-a", help="Those that are gone, too.")] = False,
    admin_address: Annotated[
        str,
        typer.Option(envvar="PERDURE_ADMIN_ADDRESS", help="Where the server serves operators; another than --address."),
    ] = DEFAULT_ADMIN_ADDRESS,
    output: OutputOption = None,
) -> None:
    """Lists the processes that execute runs, the living first. Needs the role admin.

    Examples:
      perdure executors
      perdure executors --all --admin-address localhost:50053
    """
    form = chosen(output)
    with closing(replace(session_of(context), address=admin_address)) as session:
        found = _listed(session.client, include_gone)
        if form is Output.JSON:
            for executor in found:
                write_json_line(jsonable(executor))
        elif not write_rows(
            ("EXECUTOR", "STATE", "RUNS", "VERSION", "STARTED", "LEASE", "ADDRESS"), (_row(item) for item in found)
        ):
            say("No executors. Start one with `perdure-server dev` or `perdure-server serve`.")


def _listed(client: Client, include_gone: bool) -> list[ExecutorInfo]:
    try:
        return list(client.executors(include_gone=include_gone))
    except ServerUnavailable as error:
        if is_loopback(error.metadata.get("address", "")):
            # A server that has been started need not have this port.
            raise ServerUnavailable(
                f"no perdure server serves operators at {error.metadata['address']} ({error.metadata['cause']}). "
                "Start one with PERDURE_ADMIN_ADDRESS set to it, or say which with --admin-address.",
                metadata=error.metadata,
            ) from None
        raise


def _row(executor: ExecutorInfo) -> tuple[str | Text, ...]:
    return (
        executor.executor_id,
        Text(str(executor.state), style=_STYLES.get(executor.state, "")),
        f"{executor.running}/{executor.max_running}",
        executor.application_version,
        f"{age(executor.start_time)} ago" if executor.start_time else "",
        local_time(executor.expire_time),
        executor.address,
    )
