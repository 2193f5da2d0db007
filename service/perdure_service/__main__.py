"""The command `perdure-server`: dev, serve, migrate, check, database, documents load."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from perdure_service.errors import PerdureError

DESCRIPTION = """\
Hosts DBOS workflows as durable agent runs and serves them over gRPC.

  perdure-server dev --agents my.module     everything on this machine, with its own PostgreSQL
  perdure-server migrate                    bring the database's schema up to date, once per deployment
  perdure-server serve --agents my.module   a server for the configured database
  perdure-server check                      the effective settings, and what would keep `serve` from serving

Settings are PERDURE_… variables (see `check`); traces go where OTEL_EXPORTER_OTLP_ENDPOINT says.
"""


# gRPC's core prints connections that go away, as if that were news.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process: 0 is good, 1 says on standard error what is wrong, 2 is wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        status = _run(options)
    except PerdureError as error:
        if getattr(options, "reload_child", False):
            from perdure_service import reloading

            reloading.show_cause(error)
        print(f"perdure-server: {error.message}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:  # noqa: BLE001 - the end of the process, whatever it was
        status = _report_failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a synchronous agent that still waits would hold its thread, and so the process, for days.
    os._exit(status)


def _report_failure(error: Exception) -> int:
    """Says what went wrong in one sentence when it is the database, else shows the traceback; returns 1."""
    from perdure_service.store.sqlstates import translate

    told = translate(error)
    if told is None:
        traceback.print_exception(error)
    else:
        print(f"perdure-server: {told.message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perdure-server", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"perdure-server {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("dev", "serve on this machine, migrating first; without a configured database, on an embedded PostgreSQL"),
        ("serve", "serve the configured database, which must be migrated"),
    ):
        command = _command(commands, name, text)
        command.add_argument(
            "--agents",
            action="append",
            metavar="MODULE",
            help="a module that declares agents, e.g. my.module; repeatable",
        )
        command.add_argument(
            "--address", metavar="HOST:PORT", help="where to listen (PERDURE_ADDRESS, 127.0.0.1:50051)"
        )
        if name == "dev":
            command.add_argument(
                "--data-dir", type=Path, metavar="DIR", help="where the embedded PostgreSQL keeps its data"
            )
            command.add_argument("--documents", type=Path, metavar="DIR", help="load these documents before serving")
            command.add_argument(
                "--reload",
                action="store_true",
                help="start again with the new code whenever a Python file of the agents or of this folder changes",
            )
            command.add_argument("--reload-child", action="store_true", help=argparse.SUPPRESS)
    migrate = _command(
        commands,
        "migrate",
        "bring the schema of the configured database up to date",
        "Once per deployment, before the servers; safe to repeat. `dev` does it itself. With PERDURE_REGIONS_FILE it "
        "makes the databases of the cells, their role and rights, too; the configured one is any other of the cluster.",
    )
    migrate.add_argument("--plan", action="store_true", help="print the SQL and do nothing")
    migrate.add_argument(
        "--cell", action="append", default=[], metavar="CELL", help="with regions, only this cell; repeatable"
    )
    _command(
        commands,
        "check",
        "print the effective settings and try the database",
        "Says what would keep `serve` from serving, and how to change it. Exit status 0: ready to serve; 1: not.",
    )
    database = _command(
        commands,
        "database",
        "run the embedded PostgreSQL alone until it is told to stop, and print its URL",
        "For several servers on one machine: set PERDURE_DATABASE_URL to it, migrate, and serve.",
    )
    database.add_argument("--data-dir", type=Path, metavar="DIR", help="where it keeps its data")
    documents = _command(commands, "documents", "the documents that the research agent reads")
    verbs = documents.add_subparsers(dest="verb", required=True, metavar="VERB")
    load = _command(
        verbs,
        "load",
        "make the documents of a folder searchable: Markdown, text, HTML, PDF",
        "Again: only what has changed is read. A file that cannot be read is named with the reason, the rest is "
        "loaded, and the exit status is 1. Without a configured database: into that of `dev`.",
    )
    load.add_argument("folder", type=Path, metavar="DIR", help="the folder; files that it no longer has are forgotten")
    load.add_argument("--data-dir", type=Path, metavar="DIR", help="the data folder of a `dev` server")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, more: str = ""
) -> argparse.ArgumentParser:
    """Adds a command, whose own help says what the list of commands says, and more."""
    return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}")


def _run(options: argparse.Namespace) -> int:
    # Imported here: `--help` and a wrong option need neither DBOS nor gRPC.
    from perdure_service import app
    from perdure_service.logs import configure_logs
    from perdure_service.settings import configured_database_url, load_settings

    overrides: dict[str, Any] = {
        "address": getattr(options, "address", None),
        "data_dir": getattr(options, "data_dir", None),
    }
    settings = load_settings(**overrides)
    if getattr(options, "agents", None):
        modules = tuple(part for value in options.agents for part in value.split(",") if part)
        settings = load_settings(**overrides, agents=(*settings.agents, *modules))
    if options.command == "dev":
        settings = load_settings(**overrides, agents=settings.agents, reflection=True)
    configure_logs(settings.log_format, settings.log_level)

    def report(line: str) -> None:
        print(line, flush=True)

    match options.command:
        case "dev" | "serve":
            dev = options.command == "dev"
            if dev and (options.reload or options.reload_child):
                from perdure_service import reloading

                if options.reload:
                    return reloading.run(settings, options.documents, report)
                reloading.end_with_parent()
            folder = options.documents if dev else None
            return app.run_server(settings, dev=dev, documents_folder=folder, report=report)
        case "migrate":
            app.migrate_database(settings, report, cells_named=options.cell, plan=options.plan)
            if not options.plan:
                report("the schema is up to date")
            return 0
        case "check":
            return _check(settings, report)
        case "database":
            app.run_database(settings, report)
            return 0
        case _:
            from perdure_service.store import embedded
            from perdure_service.store.engine import create_engine

            url = configured_database_url(settings) or embedded.start(settings.data_dir).url()
            engine = create_engine(url, pool_size=4, statement_timeout=settings.statement_timeout)
            return 0 if app.load_documents(engine, settings, options.folder, report) else 1


def _check(settings: Any, report: Any) -> int:
    from perdure_service import app
    from perdure_service.logs import censor_text
    from perdure_service.settings import effective

    for line in effective(settings):
        report(censor_text(line))  # an endpoint's URL may hold a password
    good = app.check(settings, report)
    report("ready to serve" if good else "not ready to serve")
    return 0 if good else 1


def _version() -> str:
    try:
        return version("perdure")
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
