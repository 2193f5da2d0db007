"""The commands about one run: start, watch, get, steps, events, signal, cancel. Others are in their own modules."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from rich.text import Text

from perdure_client._events import EventKind
from perdure_client._types import ConflictPolicy, JsonValue, Run, RunState, StartedRun, Step
from perdure_client.cli import _parse
from perdure_client.cli._context import OutputOption, RunArgument, Session, complete_agent, session_of
from perdure_client.cli._follow import Detached, Style, follow, show_run
from perdure_client.cli._lines import EventLines
from perdure_client.cli._output import (
    Output,
    chosen,
    console,
    say,
    write_item,
    write_line,
    write_rows,
    write_value,
)
from perdure_client.cli._text import (
    STEP_STYLES,
    clean,
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
WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Follow the run until its end.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for the run's end, then show it.")]
ValidateOption = Annotated[bool, typer.Option("--validate-only", help="Check everything and start nothing.")]
LabelOption = Annotated[
    list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="To find the run by; repeatable.")
]
DeadlineOption = Annotated[
    Any,
    typer.Option(
        "--deadline",
        parser=_parse.duration_or_moment,
        metavar="DURATION|TIME",
        help="End the run as EXPIRED after 2h …, or at a time.",
    ),
]
AfterOption = Annotated[int, typer.Option(min=0, metavar="N", help="Show only what came after event N.")]


def start(
    context: typer.Context,
    agent: Annotated[
        str,
        typer.Argument(metavar="AGENT", help="The agent's name; see `perdure agents`.", autocompletion=complete_agent),
    ],
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
    label: LabelOption = None,
    context_id: Annotated[str, typer.Option("--context", help="Your grouping of runs: a conversation, a case.")] = "",
    delay: Annotated[
        timedelta | None, typer.Option(parser=_parse.duration, metavar="DURATION", help="Begin after 10s, 5m, 2h …")
    ] = None,
    start_time: Annotated[
        datetime | None, typer.Option("--at", parser=_parse.moment, metavar="TIME", help="Begin at 2030-01-31T09:00.")
    ] = None,
    deadline: DeadlineOption = None,
    fail_if_exists: Annotated[
        bool, typer.Option("--fail-if-exists", help="Fail when the run id exists, even with the same input.")
    ] = False,
    queue: Annotated[str, typer.Option(help="The queue whose limits count for it. Without it: the agent's own.")] = "",
    priority: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Which waiting runs of a queue come first: the lower the sooner.")
    ] = 0,
    home_region: Annotated[
        str, typer.Option("--region", help="The region where it shall live. Without it: the home of the namespace.")
    ] = "",
    validate_only: ValidateOption = False,
    watch: WatchOption = False,
    children: ChildrenOption = None,
    wait: WaitOption = False,
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
    if home_region and run_id is not None:
        raise typer.BadParameter("choose one of --region and --run-id: the server makes the id in that region")
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
        queue=queue,
        priority=priority,
        home_region=home_region,
    )
    go_on(session, run, watch=watch, wait=wait, validate_only=validate_only, style=output, children=children)


def go_on(
    session: Session,
    run: StartedRun,
    *,
    watch: bool,
    wait: bool,
    validate_only: bool,
    style: Style | None,
    children: bool | None = None,
) -> None:
    """Does what was asked for after a start: follow the run, wait for it, or just show it."""
    form = Output.JSON if style is Style.JSON else chosen(None if style is None else Output.TABLE)
    if watch and not validate_only:
        _follow_to_the_end(session, run.run_id, 0, style, children)
    elif wait and not validate_only:
        _wait(session, run.run_id, form)
    elif form is Output.JSON:
        write_value(run)
    elif validate_only:
        at = f" It would go on at step {run.forked_from_step_id}." if run.forked_from_run_id else ""
        write_line(f"Valid. Nothing was started.{at}")
    else:
        existed = "" if run.created else "  (it existed already)"
        at = (
            f"  from step {run.forked_from_step_id} of {clean(run.forked_from_run_id)}"
            if run.forked_from_run_id
            else ""
        )
        write_line(f"{clean(run.agent)}@{clean(run.agent_version)}  {clean(run.run_id)}  {run.state}{at}{existed}")
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
      perdure get run-0c1f -o yaml
    """
    session, form = session_of(context), chosen(output)
    found = session.client.get(run)
    if form is not Output.TABLE:
        write_value(found, form)
        return
    write_rows(("", ""), ((Text(name, style="dim"), text) for name, text in _facts(found) if text))
    show_run(found, console())
    if found.done and not found.succeeded:
        again = "Try it again from the first step that did not succeed"
        say(f"{again}: perdure{session.prefix} fork {found.run_id} --watch")


def steps(context: typer.Context, run: RunArgument, output: OutputOption = None) -> None:
    """Lists the steps of a run in the order in which they began.

    Example:
      perdure steps run-0c1f
    """
    found, form = session_of(context).client.steps(run), chosen(output)
    if form is not Output.TABLE:
        for step in found:
            write_item(step, form)
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
    form = chosen(output)
    first = True
    for event in session_of(context).client.events(run, kinds=kind or ()):
        if first and not kind and event.sequence > max(1, after + 1):
            say(f"the events before {event.sequence} are no longer kept")
        first = False
        if event.sequence <= after:
            continue
        if form is not Output.TABLE:
            write_item(event, form)
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
            "--payload", "-p", parser=_parse.payload, metavar="JSON|@FILE|-", help="Any JSON. Without it: {}."
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
    found, form = session_of(context).client.cancel(run, reason=reason), chosen(output)
    if form is not Output.TABLE:
        write_value(found, form)
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
        ("queue", clean(run.queue + (f", priority {run.priority}" if run.priority else ""))),
        ("labels", clean(" ".join(f"{key}={value}" for key, value in sorted(run.labels.items())))),
        ("context", clean(run.context_id)),
        ("parent", clean(run.parent_run_id)),
        (
            "forked from",
            clean(f"{run.forked_from_run_id}, at step {run.forked_from_step_id}") if run.forked_from_run_id else "",
        ),
        ("events", str(run.last_sequence)),
        ("used", tokens(run.usage) if run.usage else ""),
        ("to decide", str(run.pending_approvals or "")),
        ("input", _value_cell(run.input)),
    ]


def _value_cell(value: JsonValue) -> str:
    return "" if value is None else value_text(value)


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
