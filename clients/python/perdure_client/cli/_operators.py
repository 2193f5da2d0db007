"""The commands for operators, who call the admin address."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Annotated, TypeVar

import typer
from rich.text import Text

from perdure_client._client import Client
from perdure_client._config import DEFAULT_ADMIN_ADDRESS, is_loopback
from perdure_client._errors import ServerUnavailable
from perdure_client._types import CellInfo, ExecutorInfo, ExecutorState, QueueInfo, StrandedRun
from perdure_client.cli._context import OutputOption, session_of
from perdure_client.cli._output import Output, chosen, say, write_item, write_json_line, write_rows
from perdure_client.cli._text import RUN_STYLES, age, clean, jsonable, local_time, short_duration

T = TypeVar("T")

_STYLES = {
    ExecutorState.ALIVE: "green",
    ExecutorState.STANDING_BY: "cyan",
    ExecutorState.EXPIRED: "red",
    ExecutorState.GONE: "dim",
}


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
        client = session.client
        found = _listed(lambda: client.executors(include_gone=include_gone))
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
        client = session.client
        found = _listed(lambda: client.queues())
        if form is Output.JSON:
            for queue in found:
                write_json_line(jsonable(queue))
        elif not write_rows(
            ("QUEUE", "QUEUED", "RUNNING", "OLDEST", "PER EXECUTOR", "AT ONCE", "RATE"),
            (_queue_row(item) for item in found),
        ):
            say("No queues. A server makes them when it starts.")


def cells(
    context: typer.Context, admin_address: AdminAddressOption = DEFAULT_ADMIN_ADDRESS, output: OutputOption = None
) -> None:
    """Lists the cells: where runs live, who executes them, and whether their servers answer. Needs the role admin.

    Who executes them is known of the cell of the server that is asked: the region, and how many servers; "+1" stand by.

    Examples:
      perdure cells
      perdure cells -o json | jq 'select(.reachable | not)'
    """
    form = chosen(output)
    with closing(replace(session_of(context), address=admin_address)) as session:
        client = session.client
        found = _listed(lambda: client.cells())
        if form is Output.JSON:
            for cell in found:
                write_json_line(jsonable(cell))
        elif not write_rows(
            ("CELL", "HOME", "SECONDARY", "SURVIVES", "SERVED BY", "SERVERS", "DATABASE", "ADDRESS", "NAMESPACES"),
            (_cell_row(item) for item in found),
        ):
            say("No cells: this service has no regions.")


CellArgument = Annotated[str, typer.Argument(metavar="CELL", help="The cell, e.g. use1; see `perdure cells`.")]


def evacuate(
    context: typer.Context,
    cell: CellArgument,
    admin_address: AdminAddressOption = DEFAULT_ADMIN_ADDRESS,
    output: OutputOption = None,
) -> None:
    """Gives the runs of a cell to the servers that stand by in its secondary region. Needs the role admin.

    For work on its home region. Steps in progress may end at home; nothing is repeated. Ask a server of the cell.

    Examples:
      perdure evacuate use1 --admin-address perdure.us-east1.example:50053
    """
    _move(context, admin_address, output, lambda client: client.evacuate_cell(cell))


def return_(
    context: typer.Context,
    cell: CellArgument,
    admin_address: AdminAddressOption = DEFAULT_ADMIN_ADDRESS,
    output: OutputOption = None,
) -> None:
    """Gives the runs of a cell back to the servers of its home region, which stand by. Needs the role admin.

    After `evacuate`, or when a lost region is back. Steps in progress may end where they are; nothing is repeated.

    Examples:
      perdure return use1 --admin-address perdure.us-east1.example:50053
    """
    _move(context, admin_address, output, lambda client: client.return_cell(cell))


def _move(
    context: typer.Context, admin_address: str, output: Output | None, move: Callable[[Client], CellInfo]
) -> None:
    form = chosen(output)
    with closing(replace(session_of(context), address=admin_address)) as session:
        client = session.client
        (cell,) = _listed(lambda: [move(client)])
        if form is Output.JSON:
            write_json_line(jsonable(cell))
        else:
            say(
                f"{cell.cell} is served by {cell.serving_region} (epoch {cell.epoch}). Its servers take over within "
                "seconds; `perdure executors` shows them."
            )


def stranded(
    context: typer.Context,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most this many.")] = 100,
    admin_address: AdminAddressOption = DEFAULT_ADMIN_ADDRESS,
    output: OutputOption = None,
) -> None:
    """Lists the runs that no living executor can continue, and what can be done. Needs the role admin.

    Examples:
      perdure stranded
      perdure stranded --limit 1000 -o json
    """
    form = chosen(output)
    with closing(replace(session_of(context), address=admin_address)) as session:
        client = session.client
        found = _listed(lambda: islice(client.stranded(), limit + 1))
        more, found = len(found) > limit, found[:limit]
        if form is not Output.TABLE:
            for run in found:
                write_item(run, form)
        elif not write_rows(
            ("RUN", "NAMESPACE", "AGENT", "STATE", "VERSION", "AGE", "REASON"), (_stranded_row(run) for run in found)
        ):
            say("No run is stranded.")
        else:
            # Runs of one version and agent have the same ways out: one of each is explained.
            told = {(run.application_version, run.agent, run.agent_version, run.reason): run for run in reversed(found)}
            for run in reversed(told.values()):
                say(f"{clean(run.run_id)}: {clean(run.advice)}")
        if more:
            say(f"There are more than these {limit}; see --limit.")


def _listed(read: Callable[[], Iterable[T]]) -> list[T]:
    """Returns what a call lists; explains the absence of a server on this machine."""
    try:
        return list(read())
    except ServerUnavailable as error:
        if is_loopback(error.metadata.get("address", "")):
            # A server that has been started need not have this port.
            raise ServerUnavailable(
                f"no perdure server serves operators at {error.metadata['address']} ({error.metadata['cause']}). "
                "Start one with PERDURE_ADMIN_ADDRESS set to it, or say which with --admin-address.",
                metadata=error.metadata,
            ) from None
        raise


def _stranded_row(run: StrandedRun) -> tuple[str | Text, ...]:
    return (
        run.run_id,
        run.namespace,
        f"{run.agent}@{run.agent_version}" if run.agent_version else run.agent,
        Text(str(run.state), style=RUN_STYLES.get(run.state, "")),
        run.application_version,
        age(run.create_time) if run.create_time else "",
        Text(str(run.reason), style="red"),
    )


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


def _served_by(item: CellInfo) -> str | Text:
    if not item.serving_region:
        return ""
    text = f"{clean(item.serving_region)}: {item.executors}" + (f"+{item.standing_by}" if item.standing_by else "")
    return text if item.serving_region == item.home_region and item.executors else Text(text, "yellow")


def _cell_row(item: CellInfo) -> tuple[str | Text, ...]:
    servers = "this one" if item.served_here else Text("answer", "green")
    return (
        clean(item.cell),
        clean(item.home_region),
        clean(item.secondary_region),
        item.survival_goal.lower(),
        _served_by(item),
        servers if item.reachable else Text("no answer", "red"),
        clean(item.database),
        clean(item.address),
        clean(", ".join(item.namespaces)),
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
