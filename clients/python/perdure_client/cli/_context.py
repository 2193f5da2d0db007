"""What the commands share: the session with the server, options that mean the same everywhere, and completion."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from perdure_client._client import Client
from perdure_client.cli._output import Output
from perdure_client.cli._text import age, clean, one_line

CONNECT_TIMEOUT_S = 3.0
"""A person would rather be told."""

OutputOption = Annotated[
    Output | None,
    typer.Option(
        "--output", "-o", help="table, json or yaml. Without it: table on a terminal, JSON lines into a pipe."
    ),
]


@dataclass
class Session:
    """Where the server is, as the options and the environment say. The client is made when it is needed."""

    address: str | None
    namespace: str | None
    tls: bool | None
    ca_file: Path | None
    timeout_s: float
    client_certificate_file: Path | None = None
    client_key_file: Path | None = None
    server_name: str | None = None
    connect_timeout_s: float = CONNECT_TIMEOUT_S

    @cached_property
    def client(self) -> Client:
        """The client of this command.

        Raises:
            typer.BadParameter: A file with certificates, or a key, cannot be read.
            ConfigurationError: The options contradict each other.
        """
        return Client(
            self.address,
            namespace=self.namespace,
            tls=self.tls,
            root_certificates=_content(self.ca_file, "--ca-file"),
            client_certificate=_content(self.client_certificate_file, "--client-cert"),
            client_key=_content(self.client_key_file, "--client-key"),
            server_name=self.server_name,
            timeout=self.timeout_s,
            connect_timeout=self.connect_timeout_s,
        )

    @property
    def prefix(self) -> str:
        """What a proposed command needs between `perdure` and the rest, so that it means the same server."""
        parts = ""
        if self.address and self.address != os.environ.get("PERDURE_ADDRESS"):
            parts += f" --address {self.address}"
        if self.namespace and self.namespace != os.environ.get("PERDURE_NAMESPACE"):
            parts += f" --namespace {self.namespace}"
        if self.tls is not None and not os.environ.get("PERDURE_TLS"):
            parts += " --tls" if self.tls else " --no-tls"
        if self.ca_file:
            parts += f" --ca-file {self.ca_file}"
        if self.client_certificate_file:
            parts += f" --client-cert {self.client_certificate_file}"
        if self.client_key_file:
            parts += f" --client-key {self.client_key_file}"
        if self.server_name and self.server_name != os.environ.get("PERDURE_SERVER_NAME"):
            parts += f" --server-name {self.server_name}"
        return parts

    def close(self) -> None:
        """Ends the connection, if there is one."""
        if "client" in self.__dict__:
            self.client.close()


def _content(path: Path | None, option: str) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}", param_hint=option) from None


def session_of(context: typer.Context) -> Session:
    """Returns the session of a command."""
    session = context.obj
    assert isinstance(session, Session)
    return session


# ---- completion ------------------------------------------------------------------------------------------------------

COMPLETION_TIMEOUT_S = 1.0
"""How long a key press may wait for the server; then nothing is proposed."""
COMPLETION_RUNS = 200
"""The newest runs that are proposed."""

Proposals = list[tuple[str, str]]
"""What may be written, and what it is."""


def complete_run(context: typer.Context, incomplete: str) -> Proposals:
    """Proposes the ids of the newest runs."""
    return _proposed(
        context,
        incomplete,
        lambda client: (
            (run.run_id, f"{run.agent} {run.state} {age(run.create_time)}")
            for run in client.list(limit=COMPLETION_RUNS, on_unreachable=_nothing)
        ),
    )


def complete_agent(context: typer.Context, incomplete: str) -> Proposals:
    """Proposes the names of agents."""
    return _proposed(
        context,
        incomplete,
        lambda client: ((one.agent, one_line(one.description)) for one in client.agents() if one.current),
    )


def complete_approval(context: typer.Context, incomplete: str) -> Proposals:
    """Proposes the ids of the approvals that wait for a decision."""
    return _proposed(
        context,
        incomplete,
        lambda client: ((one.approval_id, one_line(one.title)) for one in client.approvals(on_unreachable=_nothing)),
    )


def _nothing(_regions: Sequence[str]) -> None:
    """Says nothing of missing regions: a key press is no time for it."""


def _proposed(
    context: typer.Context, incomplete: str, find: Callable[[Client], Iterable[tuple[str, str]]]
) -> Proposals:
    """Returns what begins as the user has; nothing when the server does not tell in time, whatever the reason."""
    # While words are completed no command runs: the options before it are in the context above.
    options: dict[str, Any] = context.find_root().params
    session = Session(
        address=options.get("address"),
        namespace=options.get("namespace"),
        tls=options.get("tls"),
        ca_file=options.get("ca_file"),
        timeout_s=COMPLETION_TIMEOUT_S,
        connect_timeout_s=COMPLETION_TIMEOUT_S,
    )
    try:
        return [(value, clean(text)) for value, text in find(session.client) if value.startswith(incomplete)]
    except Exception:  # noqa: BLE001 - a remark in the middle of a command line helps nobody
        return []
    finally:
        session.close()


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.", autocompletion=complete_run)]
