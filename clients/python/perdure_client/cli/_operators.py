"""The commands for operators, who call the admin address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Annotated, TypeVar

import typer
from rich.text import Text

from perdure_client._config import DEFAULT_ADMIN_ADDRESS, is_loopback
from perdure_client._errors import ServerUnavailable
from perdure_client._types import ExecutorInfo, ExecutorState, QueueInfo
from perdure_client.cli._context import OutputOption, session_of
from perdure_client.cli._output import Output, chosen, say, write_json_line, write_rows
from perdure_client.cli._text import age, clean, jsonable, local_time, short_duration

T = TypeVar("T")

_STYLES = {ExecutorState.ALIVE: "green", ExecutorState.EXPIRED: "red", ExecutorState.GONE: "dim"}


AdminAddressOption = Annotated[
    str,
    typer.Option(envvar="PERDURE_ADMIN_ADDRESS", help="Where the server serves operators; another than --address."),
]


def executors(
    context: typer.Context,
    include_gone: Annotated[bool, typer.Option("--all", "-a", help="Those that are gone, too.")] = False,
    admin_address: AdminAddressOption = DEFAULT_ADMIN_ADDRESS,
    output: OutputOption = None,
) -> None:
    """Lists the processes that execute runs, the living first. Needs the role admin.

    Examples:
      perdure executors
      perdure executors --all --admin-address localhost:50053
    """
    form = chosen(output)
    with closing(replace(session_of(context), address=admin_address)) as session:
        found = _listed(session.client.executors(include_gone=include_gone))
        if form is Output.JSON:
            for executor in found:
                write_json_line(jsonable(executor))
        elif not write_rows(
            ("EXECUTOR", "STATE", "RUNS", "VERSION", "STARTED", "LEASE", "ADDRESS"), (_row(item) for item in found)
        ):
            say("No executors. Start one with `perdure-server dev` or `perdure-server serve`.")


def queues(
    context: typer.Context, admin_address: AdminAddressOption = DEFAULT_ADMIN_ADDRESS, output: OutputOption = None
) -> None:
    """Lists the queues: their limits, and what waits and runs in each. Needs the role admin.

    Examples:
      perdure queues
      perdure queues -o json | jq 'select(.queued > 0)'
    """
    form = chosen(output)
    with closing(replace(session_of(context), address=admin_address)) as session:
        found = _listed(session.client.queues())
        if form is Output.JSON:
            for queue in found:
                write_json_line(jsonable(queue))
        elif not write_rows(
            ("QUEUE", "QUEUED", "RUNNING", "OLDEST", "PER EXECUTOR", "AT ONCE", "RATE"),
            (_queue_row(item) for item in found),
        ):
            say("No queues. A server makes them when it starts.")


def _listed(items: Iterator[T]) -> list[T]:
    """Returns all that the admin address lists."""
    try:
        return list(items)
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


def _queue_row(queue: QueueInfo) -> tuple[str | Text, ...]:
    rate = (
        f"{queue.rate_limit} in {short_duration(queue.rate_period)}" if queue.rate_limit and queue.rate_period else ""
    )
    return (
        clean(queue.queue),
        str(queue.queued),
        str(queue.running),
        f"{age(queue.oldest_queued_time)} ago" if queue.oldest_queued_time else "",
        str(queue.worker_concurrency or ""),
        str(queue.global_concurrency or ""),
        rate,
    )
