"""The commands about one run: start, watch, get, steps, events, signal, cancel."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from itertools import islice
from typing import Annotated, Any

import typer
from rich.text import Text

from perdure_client._events import EventKind
from perdure_client._types import ConflictPolicy, JsonValue, Run, RunState, Step
from perdure_client.cli import _parse
from perdure_client.cli._context import OutputOption, RunArgument, Session, session_of
from perdure_client.cli._follow import Detached, Style, follow, show_run
from perdure_client.cli._lines import EventLines
from perdure_client.cli._output import (
    Output,
    chosen,
    console,
    say,
    write_json_line,
    write_line,
    write_rows,
    write_value,
)
from perdure_client.cli._text import (
    RUN_STYLES,
    STEP_STYLES,
    age,
    clean,
    jsonable,
    local_time,
    one_line,
    short_duration,
    tokens,
    value_text,
)

FAILED_RUN = 1
INTERRUPTED = 130

StyleOption = Annotated[
    Style | None,
    typer.Option(
        "--output", "-o", help="live, lines or json. Without it: live on a terminal, JSON lines (events) into a pipe."
    ),
]
ChildrenOption = Annotated[
    bool | None,
    typer.Option(
        "--children/--no-children",
        help="Show the runs that it starts, and theirs, until the last one has ended. Without either: "
        "the live view shows them while the run itself goes on.",
    ),
]
AfterOption = Annotated[int, typer.Option(min=0, metavar="N", help="Show only what came after event N.")]


def start(
    context: typer.Context,
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="The agent's name; see `perdure agents`.")],
    input: Annotated[
        Any,
        typer.Option(
            "--input",
            "-i",
            parser=_parse.json_object,
            metavar="JSON|@FILE|-",
            help="The input: a JSON object, @file, or - for standard input. Without it: {}.",
        ),
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(help="Your own id: the same start again finds the same run. Without it: a new one.")
    ] = None,
    agent_version: Annotated[
        str, typer.Option("--version", help="This version only. Without it: the current one.")
    ] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="To find the run by; repeatable.")
    ] = None,
    context_id: Annotated[str, typer.Option("--context", help="Your grouping of runs: a conversation, a case.")] = "",
    delay: Annotated[
        timedelta | None, typer.Option(parser=_parse.duration, metavar="DURATION", help="Begin after 10s, 5m, 2h …")
    ] = None,
    start_time: Annotated[
        datetime | None, typer.Option("--at", parser=_parse.moment, metavar="TIME", help="Begin at 2030-01-31T09:00.")
    ] = None,
    deadline: Annotated[
        Any,
        typer.Option(
            parser=_parse.duration_or_moment,
            metavar="DURATION|TIME",
            help="End the run as EXPIRED after 2h …, or at a time.",
        ),
    ] = None,
    fail_if_exists: Annotated[
        bool, typer.Option("--fail-if-exists", help="Fail when the run id exists, even with the same input.")
    ] = False,
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check everything and start nothing.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the run until its end.")] = False,
    children: ChildrenOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the run's end, then show it.")] = False,
    output: StyleOption = None,
) -> None:
    """Starts an agent. From then on the run survives every crash.

    Examples:
      perdure start research -i '{"question": "What survives a crash?"}' --watch
      perdure start research -i @question.json --run-id nightly-2030-01-31 --label team=blue
      perdure start research -i @question.json --wait -o json | jq .output
    """
    if watch and wait:
        raise typer.BadParameter("choose one of --watch and --wait")
    if children is not None and not watch:
        raise typer.BadParameter("--children and --no-children go with --watch")
    session = session_of(context)
    run = session.client.start(
        agent,
        input,
        run_id=run_id,
        agent_version=agent_version,
        labels=_parse.labels(label or []),
        context_id=context_id,
        delay=delay,
        start_time=start_time,
        deadline=deadline,
        conflict_policy=ConflictPolicy.FAIL if fail_if_exists else ConflictPolicy.USE_EXISTING,
        validate_only=validate_only,
    )
    form = Output.JSON if output is Style.JSON else chosen(None if output is None else Output.TABLE)
    if watch and not validate_only:
        _follow_to_the_end(session, run.run_id, 0, output, children)
    elif wait and not validate_only:
        _wait(session, run.run_id, form)
    elif form is Output.JSON:
        write_value(run)
    elif validate_only:
        write_line("Valid. Nothing was started.")
    else:
        existed = "" if run.created else "  (it existed already)"
        write_line(f"{clean(run.agent)}@{clean(run.agent_version)}  {clean(run.run_id)}  {run.state}{existed}")
        write_line(f"Follow it: perdure{session.prefix} watch {clean(run.run_id)}")


def watch(
    context: typer.Context,
    run: RunArgument,
    after: AfterOption = 0,
    children: ChildrenOption = None,
    output: StyleOption = None,
) -> None:
    """Follows a run until its end, through restarts of servers; one that has ended is shown from its log.

    Ctrl-C stops the watching, never the run.

    Examples:
      perdure watch run-0c1f
      perdure watch run-0c1f --after 17
      perdure watch run-0c1f --children -o lines
      perdure watch run-0c1f | jq -r 'select(.kind == "output_delta") | .data.text'
    """
    if children and after:
        raise typer.BadParameter("--after is of a single run; leave it out, or --children")
    _follow_to_the_end(session_of(context), run, after, output, children)


def get(context: typer.Context, run: RunArgument, output: OutputOption = None) -> None:
    """Shows a run with its input, and its output or failure.

    Examples:
      perdure get run-0c1f
      perdure get run-0c1f -o json | jq .output
    """
    found = session_of(context).client.get(run)
    if chosen(output) is Output.JSON:
        write_value(found)
        return
    write_rows(("", ""), ((Text(name, style="dim"), text) for name, text in _facts(found) if text))
    show_run(found, console())


def list_runs(
    context: typer.Context,
    state: Annotated[
        list[RunState] | None,
        typer.Option(
            "--state",
            "-s",
            metavar="STATE",
            case_sensitive=False,
            help="In this state: QUEUED, RUNNING, AWAITING_INPUT, SUCCEEDED, FAILED …; repeatable.",
        ),
    ] = None,
    agent: Annotated[str, typer.Option("--agent", "-a", help="Of this agent.")] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="With this label; repeatable.")
    ] = None,
    context_id: Annotated[str, typer.Option("--context", help="Of this context.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="At most so many; 0 for all.")] = 50,
    output: OutputOption = None,
) -> None:
    """Lists runs, newest first.

    Examples:
      perdure list
      perdure list --state RUNNING --state AWAITING_INPUT --agent research
      perdure list --label team=blue --limit 0 | jq -r .run_id
    """
    runs = session_of(context).client.list(
        states=state or (),
        agent=agent,
        labels=_parse.labels(label or []),
        context_id=context_id,
        limit=limit + 1 if limit else None,
    )
    if chosen(output) is Output.JSON:
        for found in islice(runs, limit or None):
            write_json_line(jsonable(found))
        return
    rows = [_row(found) for found in runs]
    if not write_rows(("RUN", "AGENT", "STATE", "AGE", "TOOK", "PROGRESS"), rows[: limit or None]):
        say("No runs. Start one: perdure start AGENT")
    elif limit and len(rows) > limit:
        say(f"There are more; the {limit} newest are shown (--limit).")


def steps(context: typer.Context, run: RunArgument, output: OutputOption = None) -> None:
    """Lists the steps of a run in the order in which they began.

    Example:
      perdure steps run-0c1f
    """
    found = session_of(context).client.steps(run)
    if chosen(output) is Output.JSON:
        for step in found:
            write_json_line(jsonable(step))
    elif not write_rows(("STEP", "NAME", "STATE", "TRIES", "BEGAN", "TOOK", ""), (_step_row(step) for step in found)):
        say("No steps yet.")


def events(
    context: typer.Context,
    run: RunArgument,
    kind: Annotated[
        list[EventKind] | None,
        typer.Option("--kind", "-k", metavar="KIND", help="Only events of this kind, such as step_failed; repeatable."),
    ] = None,
    after: AfterOption = 0,
    output: OutputOption = None,
) -> None:
    """Shows the log of a run as it is now.

    Examples:
      perdure events run-0c1f
      perdure events run-0c1f --kind step_retrying --kind step_failed
    """
    formatted = EventLines(session_of(context).prefix)
    as_json = chosen(output) is Output.JSON
    for event in session_of(context).client.events(run, kinds=kind or ()):
        if event.sequence <= after:
            continue
        if as_json:
            write_json_line(jsonable(event))
        else:
            for line in formatted.lines(event):
                write_line(line)


def signal(
    context: typer.Context,
    run: RunArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the agent waits for.")],
    payload: Annotated[
        Any,
        typer.Option(
            "--payload", "-p", parser=_parse.json_value, metavar="JSON|@FILE|-", help="Any JSON. Without it: {}."
        ),
    ] = None,
) -> None:
    """Sends a named input to a run. It is kept until the run asks for it.

    Example:
      perdure signal run-0c1f add-note --payload '{"text": "look at chapter 3"}'
    """
    session_of(context).client.signal(run, name, payload)
    if sys.stdout.isatty():
        write_line(f"Signal {clean(name)} is with {clean(run)}.")


def cancel(
    context: typer.Context,
    run: RunArgument,
    reason: Annotated[str, typer.Option(help="Why, for people.")] = "",
    output: OutputOption = None,
) -> None:
    """Cancels a run and its children. One that has ended stays as it is.

    Example:
      perdure cancel run-0c1f --reason 'asked the wrong question'
    """
    found = session_of(context).client.cancel(run, reason=reason)
    if chosen(output) is Output.JSON:
        write_value(found)
    else:
        write_line(f"{clean(found.run_id)}  {found.state}")


def _follow_to_the_end(session: Session, run_id: str, after: int, style: Style | None, children: bool | None) -> None:
    screen = console()
    if style is None:
        style = Style.JSON if not sys.stdout.isatty() else Style.LINES if screen.is_dumb_terminal else Style.LIVE
    try:
        state = follow(
            session.client,
            run_id,
            after=after,
            style=style,
            console=screen,
            command_prefix=session.prefix,
            children=children,
        )
    except Detached as detached:
        _say_how_to_return(session, run_id, detached.last_sequence, children=bool(children))
        raise typer.Exit(INTERRUPTED) from None
    _exit_as(state)


def _wait(session: Session, run_id: str, form: Output) -> None:
    try:
        run = session.client.wait(run_id)
    except KeyboardInterrupt:
        _say_how_to_return(session, run_id, 0)
        raise typer.Exit(INTERRUPTED) from None
    if form is Output.JSON:
        write_value(run)
    else:
        show_run(run, console())
    _exit_as(run.state)


def _say_how_to_return(session: Session, run_id: str, last_sequence: int, *, children: bool = False) -> None:
    where = " --children" if children else f" --after {last_sequence}" if last_sequence else ""
    say(f"The run goes on. Return to it with: perdure{session.prefix} watch {run_id}{where}")


def _exit_as(state: RunState) -> None:
    if state is not RunState.SUCCEEDED:
        raise typer.Exit(FAILED_RUN)


def _facts(run: Run) -> list[tuple[str, str]]:
    return [
        ("created", local_time(run.create_time)),
        ("by", clean(run.caller)),
        ("began", local_time(run.start_time)),
        ("ended", local_time(run.end_time)),
        ("deadline", local_time(run.deadline_time)),
        ("executor", clean(run.executor_id)),
        ("labels", clean(" ".join(f"{key}={value}" for key, value in sorted(run.labels.items())))),
        ("context", clean(run.context_id)),
        ("parent", clean(run.parent_run_id)),
        ("events", str(run.last_sequence)),
        ("used", tokens(run.usage) if run.usage else ""),
        ("to decide", str(run.pending_approvals or "")),
        ("input", _value_cell(run.input)),
    ]


def _value_cell(value: JsonValue) -> str:
    return "" if value is None else value_text(value)


def _row(run: Run) -> tuple[str | Text, ...]:
    took = short_duration(run.end_time - run.start_time) if run.end_time and run.start_time else ""
    progress = ""
    if run.failure:
        progress = one_line(str(run.failure))
    elif run.progress and not run.done:
        count = f"{run.progress.completed}/{run.progress.total} " if run.progress.total else ""
        progress = count + one_line(run.progress.message)
    state = Text(str(run.state), style=RUN_STYLES.get(run.state, ""))
    return run.run_id, f"{run.agent}@{run.agent_version}", state, age(run.create_time), took, progress


def _step_row(step: Step) -> tuple[str | Text, ...]:
    detail = str(step.error) if step.error else step.child_run_id or step.output_preview
    return (
        str(step.step_id),
        one_line(step.step_name),
        Text(str(step.state), style=STEP_STYLES.get(step.state, "")),
        str(step.attempts),
        local_time(step.start_time),
        "" if step.duration is None else short_duration(step.duration),
        one_line(detail),
    )
