"""The commands about approvals and agents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, cast

import typer
from rich.text import Text

from perdure_client._types import AgentInfo, Approval, ApprovalState, Decision, JsonValue
from perdure_client.cli import _parse
from perdure_client.cli._context import (
    OutputOption,
    Session,
    complete_agent,
    complete_approval,
    complete_run,
    session_of,
)
from perdure_client.cli._output import (
    Output,
    chosen,
    console,
    say,
    say_unreachable,
    write_item,
    write_line,
    write_rows,
    write_value,
)
from perdure_client.cli._text import APPROVAL_STYLES, age, clean, local_time, one_line, value_text

ApprovalArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The approval's id: RUN/STEP.", autocompletion=complete_approval)
]
CommentOption = Annotated[str, typer.Option("--comment", "-c", help="For the record, and for the agent.")]
AnswerOption = Annotated[
    Any,
    typer.Option(
        "--answer", parser=_parse.json_value, metavar="JSON|@FILE|-", help="An answer, when the question asks for one."
    ),
]
RevisionOption = Annotated[
    int, typer.Option("--revision", min=0, help="Decide only if it is still at this revision; 0 for whatever it is.")
]


def approvals(
    context: typer.Context,
    approval_id: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="Show this one, with its contents.", autocompletion=complete_approval),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Only those of this run.", autocompletion=complete_run)
    ] = None,
    state: Annotated[
        list[ApprovalState] | None,
        typer.Option(
            "--state",
            "-s",
            metavar="STATE",
            case_sensitive=False,
            help="In this state: PENDING, APPROVED, REJECTED, EXPIRED, WITHDRAWN; repeatable. Without it: PENDING.",
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and show what comes, until Ctrl-C.")] = False,
    output: OutputOption = None,
) -> None:
    """Shows what waits for a decision.

    Examples:
      perdure approvals
      perdure approvals run-0c1f/5
      perdure approvals --watch
    """
    session = session_of(context)
    form = chosen(output)
    if approval_id is not None:
        _show_approval(session, session.client.get_approval(approval_id), form)
    elif watch:
        _watch_inbox(session, form, run, state)
    else:
        found = session.client.approvals(states=state or (), run=run, on_unreachable=say_unreachable)
        if form is not Output.TABLE:
            for approval in found:
                write_item(approval, form)
        elif write_rows(("ID", "QUESTION", "AGENT", "STATE", "ASKED", "UNTIL"), (_row(item) for item in found)):
            say(f"Decide: perdure{session.prefix} approve ID  or  reject ID")
        else:
            say("Nothing waits for a decision.")


def approve(
    context: typer.Context,
    approval_id: ApprovalArgument,
    comment: CommentOption = "",
    answer: AnswerOption = None,
    revision: RevisionOption = 0,
    output: OutputOption = None,
) -> None:
    """Says yes. The same decision again is fine.

    Examples:
      perdure approve run-0c1f/5
      perdure approve run-0c1f/5 --comment 'go ahead' --answer '{"limit": 3}'
    """
    _decide(context, approval_id, Decision.APPROVE, comment, answer, revision, output)


def reject(
    context: typer.Context,
    approval_id: ApprovalArgument,
    comment: CommentOption = "",
    answer: AnswerOption = None,
    revision: RevisionOption = 0,
    output: OutputOption = None,
) -> None:
    """Says no. The same decision again is fine.

    Example:
      perdure reject run-0c1f/5 --comment 'the second source is wrong'
    """
    _decide(context, approval_id, Decision.REJECT, comment, answer, revision, output)


def agents(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Show this one, with its schemas.", autocompletion=complete_agent),
    ] = None,
    agent_version: Annotated[str, typer.Option("--version", help="This version. Without it: the current one.")] = "",
    output: OutputOption = None,
) -> None:
    """Lists the agents that can be started, or shows one with its schemas and how to start it.

    Examples:
      perdure agents
      perdure agents research
      perdure agents research | jq .input_schema
    """
    session = session_of(context)
    form = chosen(output)
    if name is not None:
        found = session.client.get_agent(name, agent_version=agent_version)
        if form is not Output.TABLE:
            write_value(found, form)
        else:
            _show_agent(session, found)
        return
    listed = session.client.agents()
    if form is not Output.TABLE:
        for agent in listed:
            write_item(agent, form)
    elif not write_rows(("AGENT", "VERSION", "", "BUDGET", "WHAT IT DOES"), (_agent_row(agent) for agent in listed)):
        say("No agents. The server loads them with --agents, or from the entry points `perdure.agents`.")


def _decide(
    context: typer.Context,
    approval_id: str,
    decision: Decision,
    comment: str,
    answer: JsonValue,
    revision: int,
    output: Output | None,
) -> None:
    approval = session_of(context).client.decide(
        approval_id, decision, comment=comment, answer=answer, expected_revision=revision
    )
    form = chosen(output)
    if form is not Output.TABLE:
        write_value(approval, form)
    else:
        by = f" by {clean(approval.decided_by)}" if approval.decided_by else ""
        write_line(f"{clean(approval.approval_id)}  {approval.state}{by}")


def _watch_inbox(session: Session, form: Output, run: str | None, states: Iterable[ApprovalState] | None) -> None:
    wanted = set(states or ApprovalState)
    with session.client.watch_approvals(on_reconnect=lambda error, _: say(f"connection lost: {error}")) as inbox:
        for approval in inbox:
            if approval.state not in wanted or (run and approval.run_id != run):
                continue
            if form is not Output.TABLE:
                write_item(approval, form)
                continue
            time = local_time(approval.decide_time or approval.create_time)
            by = f" by {one_line(approval.decided_by)}" if approval.decided_by else ""
            write_line(f"{time}  {approval.state}{by}  {clean(approval.approval_id)}  {one_line(approval.title)}")
            if approval.state is ApprovalState.PENDING:
                write_line(f"          perdure{session.prefix} approve {clean(approval.approval_id)}")


def _row(approval: Approval) -> tuple[str | Text, ...]:
    return (
        approval.approval_id,
        one_line(approval.title),
        approval.agent,
        Text(str(approval.state), style=APPROVAL_STYLES.get(approval.state, "")),
        f"{age(approval.create_time)} ago" if approval.create_time else "",
        local_time(approval.deadline_time),
    )


def _show_approval(session: Session, approval: Approval, form: Output) -> None:
    if form is not Output.TABLE:
        write_value(approval, form)
        return
    screen = console()
    style = APPROVAL_STYLES.get(approval.state, "")
    screen.print(Text(clean(approval.title), style="bold"))
    screen.print(Text(f"{approval.state}", style=style), Text(f"revision {approval.revision}", style="dim"))
    until = f"until {local_time(approval.deadline_time)}, then {approval.on_timeout}" if approval.deadline_time else ""
    facts = (
        ("run", f"{clean(approval.run_id)} ({clean(approval.agent)})"),
        ("asked", local_time(approval.create_time)),
        ("deadline", until),
        ("asks", clean(", ".join(approval.assignees))),
        ("decided by", clean(approval.decided_by)),
        ("comment", clean(approval.comment)),
    )
    write_rows(("", ""), ((Text(name, style="dim"), text) for name, text in facts if text))
    for name, value in (
        ("about", approval.payload),
        ("answer schema", approval.answer_schema),
        ("answer", approval.answer),
    ):
        if value is not None:
            screen.print(Text(f"{name}:", style="dim"))
            screen.print(Text(value_text(value, indent=2)))
    if approval.state is ApprovalState.PENDING:
        for verb in ("approve", "reject"):
            screen.print(Text(f"perdure{session.prefix} {verb} {clean(approval.approval_id)}"))


def _agent_row(agent: AgentInfo) -> tuple[str | Text, ...]:
    current = "current" if agent.current else ""
    return agent.agent, agent.agent_version, current, _budget(agent), one_line(agent.description)


def _budget(agent: AgentInfo) -> str:
    """Returns what a run of an agent may use, for people; empty for no limit."""
    limits = ((agent.max_steps, "steps"), (agent.max_tokens, "tokens"))
    return ", ".join(f"{limit:,} {unit}" for limit, unit in limits if limit)


def _show_agent(session: Session, agent: AgentInfo) -> None:
    screen = console()
    screen.print(Text(f"{clean(agent.agent)}@{clean(agent.agent_version)}", style="bold"))
    if agent.description:
        screen.print(Text(clean(agent.description)))
    if budget := _budget(agent):
        screen.print(Text(f"a run may use {budget}", style="dim"))
    for name, schema in (("input", agent.input_schema), ("output", agent.output_schema)):
        if schema is not None:
            screen.print(Text(f"\n{name}:", style="dim"))
            screen.print(Text(clean(json.dumps(schema, ensure_ascii=False, indent=2))))
    example = json.dumps(_example(agent.input_schema), ensure_ascii=False)
    screen.print(Text("\nstart it:", style="dim"))
    screen.print(Text(f"perdure{session.prefix} start {clean(agent.agent)} -i '{clean(example)}' --watch"))


def _example(schema: JsonValue) -> dict[str, Any]:
    """Returns an input with a placeholder for each required member of a JSON Schema."""
    known = cast("dict[str, Any]", schema if isinstance(schema, dict) else {})
    members: dict[str, dict[str, Any]] = known.get("properties", {})
    required: list[str] = known.get("required", [])
    return {name: _placeholder(members.get(name, {})) for name in required}


def _placeholder(schema: dict[str, Any]) -> Any:
    if "default" in schema:
        return schema["default"]
    if schema.get("enum"):
        return schema["enum"][0]
    placeholders: dict[str, Any] = {
        "integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}, "null": None,
    }  # fmt: skip
    return placeholders.get(schema.get("type", ""), "…")
