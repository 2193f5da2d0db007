"""The commands that make a run from another one, and that delete runs: fork, delete."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Annotated, Any

import typer

from perdure_client._types import Deletion, RunState
from perdure_client.cli import _parse
from perdure_client.cli._context import OutputOption, RunArgument, complete_agent, complete_run, session_of
from perdure_client.cli._output import Output, chosen, say, write_line, write_value
from perdure_client.cli._runs import (
    DeadlineOption,
    LabelOption,
    StyleOption,
    ValidateOption,
    WaitOption,
    WatchOption,
    go_on,
)
from perdure_client.cli._text import clean

REFUSED = 3
INTERRUPTED = 130
NAMED = 3
"""Ids that a question shows."""


def fork(
    context: typer.Context,
    run: RunArgument,
    from_step: Annotated[
        int | None,
        typer.Option(
            "--from-step",
            min=1,
            metavar="N",
            help="The first step that runs again; see `perdure steps`. Without it: the first that did not succeed.",
        ),
    ] = None,
    input: Annotated[
        Any,
        typer.Option(
            "--input",
            "-i",
            parser=_parse.json_object,
            metavar="JSON|@FILE|-",
            help="Another input. Steps that are taken over keep their results.",
        ),
    ] = None,
    agent_version: Annotated[str, typer.Option("--version", help="Go on with this version of the agent.")] = "",
    run_id: Annotated[str | None, typer.Option(help="The id of the new run. Without it: a new one.")] = None,
    label: LabelOption = None,
    deadline: DeadlineOption = None,
    validate_only: ValidateOption = False,
    watch: WatchOption = False,
    wait: WaitOption = False,
    output: StyleOption = None,
) -> None:
    """Starts a new run from the recorded steps of another one: tries a run that failed again.

    What was recorded below the step is taken over and not done again; the forked run stays as it is.

    Examples:
      perdure fork run-0c1f --watch
      perdure fork run-0c1f --from-step 4 -i '{"question": "And a region?"}'
      perdure fork run-0c1f --from-step 1 --version 2 --validate-only
    """
    if watch and wait:
        raise typer.BadParameter("choose one of --watch and --wait")
    session = session_of(context)
    forked = session.client.fork(
        run,
        from_step=from_step,
        input=input,
        run_id=run_id,
        agent_version=agent_version,
        labels=_parse.labels(label or []) or None,
        deadline=deadline,
        validate_only=validate_only,
    )
    go_on(session, forked, watch=watch, wait=wait, validate_only=validate_only, style=output)


def delete(
    context: typer.Context,
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="These runs.", autocompletion=complete_run)
    ] = None,
    state: Annotated[
        list[RunState] | None,
        typer.Option(
            "--state",
            "-s",
            metavar="STATE",
            case_sensitive=False,
            help="That ended in this state: SUCCEEDED, FAILED, CANCELLED, EXPIRED; repeatable.",
        ),
    ] = None,
    agent: Annotated[str, typer.Option("--agent", "-a", help="Of this agent.", autocompletion=complete_agent)] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="With this label; repeatable.")
    ] = None,
    context_id: Annotated[str, typer.Option("--context", help="Of this context.")] = "",
    before: Annotated[
        datetime | None,
        typer.Option(parser=_parse.past, metavar="DURATION|TIME", help="That ended more than 30d … ago, or before."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many there are, and delete nothing.")] = False,
    output: OutputOption = None,
) -> None:
    """Deletes runs that have ended, with their children, logs and approvals. What has not ended is left alone.

    Examples:
      perdure delete run-0c1f run-0c20
      perdure delete --state SUCCEEDED --before 30d --dry-run
      perdure delete --agent research --before 2030-01-31 --yes
    """
    session, form = session_of(context), chosen(output)
    labels = _parse.labels(label or [])
    named = runs or []
    conditions: dict[str, Any] = {
        "states": state or (),
        "agent": agent,
        "labels": labels,
        "context_id": context_id,
        "until_end_time": before,
    }
    if not named and not any(conditions.values()):
        raise typer.BadParameter("say which: RUN …, or --state, --agent, --label, --context, --before")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise typer.BadParameter("nobody can be asked here; add --yes, or --dry-run to see how many there are")
    if not yes or dry_run:
        found = session.client.delete_runs(*named, **conditions, validate_only=True)
        if dry_run or not found.deleted_count:
            _show(found, form, "would be deleted")
            return
        _ask(found)
    deleted = session.client.delete_runs(*named, **conditions)
    _show(deleted, form, "deleted")
    if deleted.unfinished_run_ids:
        raise typer.Exit(REFUSED)


def _ask(found: Deletion) -> None:
    """Asks whether to go on; ends the command when not."""
    names = ", ".join(clean(run_id) for run_id in found.sample_run_ids[:NAMED])
    others = ", …" if found.deleted_count > NAMED else ""
    if not typer.confirm(f"Delete {_count(found)} with logs and approvals ({names}{others})?", err=True):
        say("Nothing was deleted.")
        raise typer.Exit(INTERRUPTED)


def _show(deletion: Deletion, form: Output, verb: str) -> None:
    if form is not Output.TABLE:
        write_value(deletion, form)
        return
    write_line(f"{_count(deletion)} {verb}.")
    for run_id in deletion.unfinished_run_ids:
        say(f"{run_id} was left alone: it, a child of it, or a run that may still read its result has not ended.")
    for run_id in deletion.missing_run_ids:
        say(f"There is no run {run_id}.")


def _count(deletion: Deletion) -> str:
    count = deletion.deleted_count
    return f"{'more than ' if deletion.more else ''}{count} {'run' if count == 1 and not deletion.more else 'runs'}"
