"""The command `perdure`: its options, its help, and what an error looks like. The commands are in their own modules."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from perdure_client._config import DEFAULT_ADDRESS, DEFAULT_NAMESPACE, DEFAULT_TIMEOUT_S, VERSION
from perdure_client._errors import ConfigurationError, InvalidArgument, PerdureError
from perdure_client.cli import _approvals, _artifacts, _bulk, _list, _manage, _operators, _runs, _trace
from perdure_client.cli._context import Session
from perdure_client.cli._output import say

USAGE = 2
SERVER = 3
INTERRUPTED = 130

HELP = """\
Start durable agent runs, follow every step of them, and decide what they ask.

\b
  perdure agents                                          what can be started
  perdure start research -i '{"question": "…"}' --watch   start a run and follow it
  perdure start-many starts.jsonl                         start a run for each line of a file
  perdure approvals                                       what waits for a decision
  perdure approve RUN/STEP                                decide it
  perdure watch RUN                                       follow a run, also one that has ended
  perdure trace RUN                                       see where its time went
  perdure fork RUN --watch                                try a run that failed again

On a terminal the output is for people; into a pipe it is JSON, one object per line. A token is taken from
PERDURE_TOKEN only, as other users can see arguments; it is sent over TLS, or to this machine.

\b
Exit codes:
  0    done; for start --wait, start --watch and watch: the run SUCCEEDED
  1    the run FAILED, was CANCELLED or EXPIRED
  2    the command, or its input, is wrong
  3    the server refused, failed, or cannot be reached
  130  interrupted; runs go on
"""


class _Errors(typer.core.TyperGroup):
    """Shows expected errors as one line with the way out, and turns them into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PerdureError as error:
            say(f"perdure: {describe(error)}")
            wrong_input = isinstance(error, InvalidArgument | ConfigurationError)
            raise typer.Exit(USAGE if wrong_input else SERVER) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def describe(error: PerdureError) -> str:
    """Returns an error as one line: the reason, what is wrong, and the way out."""
    text = " ".join(error.message.split())
    more = [f"{v.field}: {v.description}" for v in error.violations if v.description not in text]
    parts = [f"{error.reason}: {'; '.join([text, *more])}"]
    if error.error_id and error.error_id not in text:
        parts.append(f"Tell the server's operator the error id {error.error_id}.")
    if error.hint:
        parts.append(error.hint)
    return " ".join(part if part.endswith((".", "…", "?", "!")) else f"{part}." for part in parts)


app = typer.Typer(
    cls=_Errors,
    name="perdure",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"perdure {VERSION}")
        raise typer.Exit


@app.callback(help=HELP)
def _options(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(envvar="PERDURE_ADDRESS", help=f"host:port, or https://host:port. Default: {DEFAULT_ADDRESS}."),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(envvar="PERDURE_NAMESPACE", help=f"The namespace. Default: {DEFAULT_NAMESPACE}.")
    ] = None,
    tls: Annotated[
        bool | None,
        typer.Option("--tls/--no-tls", envvar="PERDURE_TLS", help="Speak TLS. Default: as the address says."),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(help="PEM file of the authorities to trust. Default: PERDURE_CA_FILE, else the public ones."),
    ] = None,
    client_cert: Annotated[
        Path | None,
        typer.Option(help="PEM file of your certificate (mutual TLS). Default: PERDURE_CLIENT_CERTIFICATE_FILE."),
    ] = None,
    client_key: Annotated[
        Path | None, typer.Option(help="PEM file of its private key. Default: PERDURE_CLIENT_KEY_FILE.")
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(envvar="PERDURE_SERVER_NAME", help="The name in the server's certificate, if not the address."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for one call in all, repeats included.")
    ] = DEFAULT_TIMEOUT_S,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version
    session = Session(
        address=address,
        namespace=namespace,
        tls=tls,
        ca_file=ca_file,
        timeout_s=timeout,
        client_certificate_file=client_cert,
        client_key_file=client_key,
        server_name=server_name,
    )
    context.obj = session
    context.call_on_close(session.close)


def _add(name: str, command: Callable[..., None]) -> None:
    """Adds a command; its help is its docstring, in which the examples keep their lines."""
    text = re.sub(r"^(Examples?:)$", "\b\n\\1", inspect.getdoc(command) or "", flags=re.MULTILINE)
    app.command(name, help=text)(command)


_add("start", _runs.start)
_add("start-many", _bulk.start_many)
_add("watch", _runs.watch)
_add("get", _runs.get)
_add("list", _list.list_runs)
_add("steps", _runs.steps)
_add("events", _runs.events)
_add("trace", _trace.trace)
_add("artifacts", _artifacts.artifacts)
_add("read", _artifacts.read)
_add("signal", _runs.signal)
_add("cancel", _runs.cancel)
_add("fork", _manage.fork)
_add("delete", _manage.delete)
_add("approvals", _approvals.approvals)
_add("approve", _approvals.approve)
_add("reject", _approvals.reject)
_add("agents", _approvals.agents)
_add("executors", _operators.executors)
_add("queues", _operators.queues)
_add("cells", _operators.cells)
_add("evacuate", _operators.evacuate)
_add("return", _operators.return_)
_add("stranded", _operators.stranded)
