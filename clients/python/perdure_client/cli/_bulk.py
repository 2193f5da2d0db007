"""The command that starts many runs from a file of JSON lines: start-many."""

from __future__ import annotations

import io
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from perdure_client._bulk import AgentStart
from perdure_client._bulk_waits import WaitResult
from perdure_client._errors import InvalidArgument, PerdureError
from perdure_client._types import ConflictPolicy, RunState, StartedRun
from perdure_client.cli import _parse
from perdure_client.cli._context import complete_agent, session_of
from perdure_client.cli._output import Output, chosen, say, write_json_line, write_line
from perdure_client.cli._runs import FAILED_RUN, ValidateOption
from perdure_client.cli._text import clean, jsonable, one_line, short_duration

USAGE = 2
REFUSED = 3

_TYPES: dict[str, type] = {
    "agent": str,
    "input": dict,
    "run_id": str,
    "agent_version": str,
    "labels": dict,
    "context_id": str,
    "delay": str,
    "start_time": str,
    "deadline": str,
    "queue": str,
    "priority": int,
    "home_region": str,
    "traceparent": str,
}
"""What a line may have. Durations and times are written as in the options of `start`."""
_TYPE_NAMES = {str: "string", dict: "object", int: "integer"}
_PARSED: dict[str, Callable[[str], Any]] = {
    "delay": _parse.duration,
    "start_time": _parse.moment,
    "deadline": _parse.duration_or_moment,
}


def start_many(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="JSON lines, one start each; - for standard input.")],
    agent: Annotated[
        str,
        typer.Option("--agent", "-a", help="The agent of lines that name none.", autocompletion=complete_agent),
    ] = "",
    fail_if_exists: Annotated[
        bool, typer.Option("--fail-if-exists", help="Take a run id that exists for an error, even with the same input.")
    ] = False,
    validate_only: ValidateOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the runs' ends, and tell of each as it ends.")] = False,
    output: Annotated[
        Output | None,
        typer.Option(
            "--output", "-o", help="table or json. Without it: progress on a terminal, JSON lines into a pipe."
        ),
    ] = None,
) -> None:
    """Starts a run for each line of a file, over one stream, and tells what came of each, in the file's order.

    A line is a JSON object with some of: agent, input, run_id, agent_version, labels, context_id, delay, start_time,
    deadline, queue, priority, home_region, traceparent. One that is wrong or refused is told of, and the others go on.
    Give lines a run_id, and you can do the whole again: what was started stays as it is.

    With --wait, once all are started, the runs are waited for over one stream, those too that existed. Each is told of
    when it has ended, in the order of the ends. Interrupted, the runs go on.

    Exit codes: 0 every line has its run; 2 a line, or its input, is wrong; 3 the server refused some, or has gone. With
    --wait, 1 if none of these is so and a run has not SUCCEEDED.

    Examples:
      perdure start-many starts.jsonl
      perdure start-many starts.jsonl --wait -o json > ends.jsonl
      jq -c '{input: {question: .}}' questions.json | perdure start-many - --agent research
      perdure start-many starts.jsonl -o json | jq -r 'select(.error) | .line'
    """
    form = chosen(output)
    if form is Output.YAML:
        raise typer.BadParameter("choose table or json", param_hint="--output")
    if wait and validate_only:
        raise typer.BadParameter("nothing is started with --validate-only", param_hint="--wait")
    options = {
        "conflict_policy": ConflictPolicy.FAIL if fail_if_exists else ConflictPolicy.USE_EXISTING,
        "validate_only": validate_only,
    }
    session = session_of(context)
    with ExitStack() as stack:
        source = _standard_input() if file == "-" else stack.enter_context(_opened(file))
        wrong: deque[tuple[int, InvalidArgument]] = deque()
        numbers: deque[int] = deque()
        report = stack.enter_context(_Report(form, validate_only=validate_only, wait=wait))
        for result in session.client.start_many(_starts(source, agent, options, numbers, wrong)):
            number = numbers.popleft()
            while wrong and wrong[0][0] < number:
                report.tell(*wrong.popleft())
            report.tell(number, result.error or result.run)
        while wrong:
            report.tell(*wrong.popleft())
        for end in session.client.wait_many(report.waited):
            report.tell_end(end)
    if report.wrong or report.refused:
        raise typer.Exit(USAGE if report.wrong else REFUSED)
    if report.unsuccessful:
        raise typer.Exit(FAILED_RUN)


class _Report:
    """Tells what came of each line, and the sum at the end, also of what was interrupted.

    Attributes:
        waited: The runs whose ends are to be told, by id, with the lines that they are of.
        ended: How many have ended, by state.
    """

    def __init__(self, form: Output, *, validate_only: bool, wait: bool) -> None:
        self._form = form
        self._validate_only = validate_only
        self._wait = wait
        self.waited: dict[str, list[int]] = {}
        self.ended: Counter[RunState] = Counter()
        self._told = 0
        self._began_s = time.monotonic()
        self._took_s: float | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            disable=form is not Output.TABLE or not sys.stdout.isatty(),
            transient=True,
        )
        self._task = self._progress.add_task("")
        self.started = self.existed = self.wrong = self.refused = 0

    def __enter__(self) -> _Report:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        say(self._sum())

    def tell(self, number: int, outcome: StartedRun | PerdureError | None) -> None:
        """Tells of one line."""
        if isinstance(outcome, PerdureError):
            self.wrong += isinstance(outcome, InvalidArgument)
            self.refused += not isinstance(outcome, InvalidArgument)
            self._write_error(number, "", outcome)
        else:
            created = outcome is not None and outcome.created
            self.started += created
            self.existed += not created
            self._took_s = time.monotonic() - self._began_s
            if self._wait and outcome is not None:
                self.waited.setdefault(outcome.run_id, []).append(number)
                self._show_progress()
                return
            text = "" if outcome is None else f"line {number}  {clean(outcome.run_id)}  {outcome.state}"
            self._write({"line": number, "run": jsonable(outcome)}, text, always=False)

    def tell_end(self, result: WaitResult) -> None:
        """Tells of the end of a run, for each of its lines."""
        run, error = result.run, result.error
        self._told += 1
        if run is not None:
            self.ended[run.state] += 1
        self.refused += error is not None
        for number in self.waited[result.run_id]:
            if run is not None:
                text = f"line {number}  {clean(run.run_id)}  {run.state}"
                why = "" if run.failure is None else f"  {one_line(run.failure.message)}"
                self._write({"line": number, "run": jsonable(run)}, text + why, always=not run.succeeded)
            elif error is not None:
                self._write_error(number, f"{clean(result.run_id)}  ", error)

    @property
    def unsuccessful(self) -> int:
        """How many runs have ended otherwise than they should."""
        return self.ended.total() - self.ended[RunState.SUCCEEDED]

    def _write_error(self, number: int, of_run: str, error: PerdureError) -> None:
        told = {"line": number, "error": {"reason": error.reason, "message": error.message}}
        self._write(told, f"line {number}  {of_run}{error.reason}: {one_line(error.message)}", always=True)

    def _write(self, told: dict[str, Any], text: str, *, always: bool) -> None:
        """Writes a line, on a terminal only one that must be seen: the progress is there for the others."""
        if self._form is Output.JSON:
            write_json_line(told)
        elif self._progress.disable:
            write_line(text)
        elif always:
            self._progress.console.print(text, markup=False, highlight=False)
        self._show_progress()

    def _show_progress(self) -> None:
        ended = f", {self.ended.total():,} of {len(self.waited):,} ended" if self._wait else ""
        self._progress.update(self._task, description=f"{self.started + self.existed:,} started{ended}")

    def _sum(self) -> str:
        seconds = self._took_s or time.monotonic() - self._began_s
        done = self.started + self.existed
        took = f"in {short_duration(timedelta(seconds=seconds))} ({self.started / seconds:,.0f} a second)"
        if self._validate_only:
            parts = [f"{done:,} valid, nothing was started"]
        else:
            parts = [f"{self.started:,} started {took}"]
            parts += [f"{self.existed:,} existed already"] if self.existed else []
        parts += [f"{count:,} {state}" for state, count in sorted(self.ended.items())]
        goes_on = len(self.waited) - self._told
        parts += [f"{goes_on:,} go on"] if goes_on > 0 else []
        parts += [f"{self.wrong:,} wrong"] if self.wrong else []
        parts += [f"{self.refused:,} refused"] if self.refused else []
        return "; ".join(parts) + "."


def _standard_input() -> TextIO:
    with suppress(AttributeError):  # somebody has put another reader in its place
        cast(io.TextIOWrapper, sys.stdin).reconfigure(errors="surrogateescape")
    return sys.stdin


def _opened(file: str) -> TextIO:
    try:
        return Path(file).open(encoding="utf-8", errors="surrogateescape")  # so that it is one line's error
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from None


def _starts(
    source: Iterable[str],
    agent: str,
    options: dict[str, Any],
    numbers: deque[int],
    wrong: deque[tuple[int, InvalidArgument]],
) -> Iterator[AgentStart]:
    """Yields the starts of a file, and notes the number of each line, and which lines are none."""
    for number, text in enumerate(source, 1):
        if not text.strip():
            continue
        try:
            start = AgentStart(**{"agent": agent} | _attributes(text), **options)
        except (ValueError, typer.BadParameter) as error:
            wrong.append((number, InvalidArgument(str(error))))
        except RecursionError:
            wrong.append((number, InvalidArgument("is nested too deeply")))
        else:
            numbers.append(number)
            yield start


def _attributes(text: str) -> dict[str, Any]:
    """Returns what a line says of a start.

    Raises:
        ValueError: It is no JSON object, has a name that is none of a start's, or a value of another type.
        typer.BadParameter: A duration or a time is none.
    """
    line: Any = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError('is no JSON object, such as {"agent": "research", "input": {}}')
    given = cast(dict[str, Any], line)
    found: dict[str, Any] = {}
    for name, value in given.items():
        wanted = _TYPES.get(name)
        if wanted is None:
            raise ValueError(f"has {name!r}, which is none of {', '.join(_TYPES)}")
        if type(value) is not wanted:
            raise ValueError(f"{name}: must be of type {_TYPE_NAMES[wanted]}")
        found[name] = _PARSED[name](str(value)) if name in _PARSED else value
    return found
