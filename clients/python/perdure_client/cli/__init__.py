"""The command `perdure`. It needs the extra `cli`; without it, `main` says so."""

from __future__ import annotations

import os
import sys

NEEDS_EXTRA = "perdure: the command needs typer, rich and pyyaml. Install them with: pip install 'perdure[cli]'"


def main() -> None:
    """Runs the command and ends the process; see `perdure --help` for the exit codes."""
    # gRPC writes remarks about lost connections to standard error, in the middle of the live view.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import rich
        import typer
        import yaml
    except ImportError:
        print(NEEDS_EXTRA, file=sys.stderr)
        sys.exit(2)
    del rich, typer, yaml
    from perdure_client.cli._app import app

    app(prog_name="perdure")
