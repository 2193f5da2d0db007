"""Runs the installed programs as a user would: in a folder of their own, with nothing of ours in their environment."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers import marks
from tests.helpers.waiting import eventually, free_port, scaled

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
READY = "perdure serves on "
COMMAND_S = 30


def environment(home: Path, **more: str) -> dict[str, str]:
    """Returns what a user's shell has: no settings of perdure, and a home of its own."""
    dropped = ("PERDURE_", "OTEL_", "PG", "XDG_", "PYTHON", "DOCS", "QUESTION", "YES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = os.pathsep.join([str(PROGRAMS), kept.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "HOME": str(home), "XDG_DATA_HOME": str(home / "data"), **more}


def demonstration(home: Path, module: str, seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a demonstration to its end, where nobody can be asked; from the repository, whose examples it takes."""
    return subprocess.run(
        [sys.executable, "-m", module],
        env=environment(home, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=scaled(seconds),
        check=False,
    )


def block_of_readme(first_line: str, language: str = "python") -> str:
    """Returns the code block of the README that begins with a line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(first_line)]
    return str(found)


def _as_in_a_terminal() -> None:
    """Lets Ctrl-C interrupt a child, although a shell that started us in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class DevServer:
    """`perdure-server dev` as a user starts it in a terminal, with a PostgreSQL of its own."""

    def __init__(self, folder: Path, *agents: str, options: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.data_dir = folder / "home" / "data" / "perdure"
        self.address = f"127.0.0.1:{free_port()}"
        self._command = [str(PROGRAMS / "perdure-server"), "dev", "--address", self.address, *options]
        for module in agents:
            self._command += ["--agents", module]
        self._said = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def said(self) -> str:
        """What all of its starts have printed."""
        return self._said.read_text(encoding="utf-8", errors="replace") if self._said.exists() else ""

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it and waits until it says that it serves."""
        before = len(self.said)
        with self._said.open("ab") as said:
            self._process = process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=environment(self.folder / "home", PERDURE_MODEL__API_KEY=marks.SECRET),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, as in a terminal: Ctrl-C reaches its children, too
                preexec_fn=_as_in_a_terminal,
            )

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}:\n{self.said[before:][-4000:]}")
            return f"{READY}{self.address}" in self.said[before:]

        eventually(ready, 60, what="the server serves")

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit status."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGINT)
        status = self._process.wait(scaled(20))
        marks.check_log(self.said, "what the server has printed")
        return status

    def kill(self) -> None:
        """kill -9 of the server alone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        marks.check_log(self.said, "what the server has printed")


class Perdure:
    """The command `perdure` for one server; its output goes into a pipe."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder
        self._environment = environment(folder / "home", PERDURE_ADDRESS=address)

    def run(self, *arguments: str, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, and fails unless it has the exit status."""
        result = subprocess.run(
            [str(PROGRAMS / "perdure"), *arguments],
            cwd=self._folder,
            env=self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=scaled(COMMAND_S),
            check=False,
        )
        assert result.returncode == status, (arguments, result.returncode, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        return result

    def lines(self, *arguments: str, status: int = 0, stdin: str = "") -> list[Any]:
        """Runs a command; returns the JSON value of each line."""
        return [json.loads(line) for line in self.run(*arguments, status=status, stdin=stdin).stdout.splitlines()]

    def one(self, *arguments: str, status: int = 0) -> Any:
        """Runs a command whose output is one JSON line."""
        (value,) = self.lines(*arguments, status=status)
        return value

    def begin(self, *arguments: str) -> Following:
        """Begins a command that goes on."""
        return Following([str(PROGRAMS / "perdure"), *arguments], self._folder, self._environment)


class Following:
    """A command that goes on, and what it has written so far."""

    def __init__(self, command: list[str], folder: Path, variables: dict[str, str]) -> None:
        self._out, self._err = folder / "following.out", folder / "following.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                preexec_fn=_as_in_a_terminal,
            )

    @property
    def lines(self) -> list[Any]:
        """The JSON values of the lines that are whole."""
        return [json.loads(line) for line in self._out.read_text(encoding="utf-8").split("\n")[:-1]]

    @property
    def remarks(self) -> str:
        """What it wrote to standard error."""
        return self._err.read_text(encoding="utf-8")

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Waits for its end; returns the exit status."""
        return self._process.wait(scaled(COMMAND_S))

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
