"""What the live view and the plain lines show, at any width."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from perdure_client import (
    ApprovalDecided,
    ApprovalRequested,
    ApprovalState,
    AttemptReset,
    ChildStarted,
    EventData,
    Failure,
    LogLine,
    ModelUsage,
    OutputDelta,
    Progress,
    Published,
    Recovered,
    Run,
    RunEvent,
    RunForked,
    RunState,
    SignalReceived,
    StateChanged,
    StepFailed,
    StepRetrying,
    StepStarted,
    StepSucceeded,
)
from perdure_client._family_view import FamilyView
from perdure_client._run_view import RunView
from perdure_client.cli._lines import EventLines
from perdure_client.cli._render import RunDisplay
from perdure_client.cli._text import clean, jsonable, short_duration
from rich.cells import cell_len
from rich.console import Console

BEGAN = datetime(2030, 1, 1, 12, tzinfo=UTC)
RUN_ID = "run-0c1f6a7b8c9d0e1f2a3b4c5d6e7f8a9b"
ERROR = Failure(type="RateLimitError", message="429 too many requests\nslow down")


def events(*data: tuple[EventData, int] | EventData) -> list[RunEvent]:
    return [
        RunEvent(
            sequence=number,
            event_time=BEGAN + timedelta(seconds=number),
            run_id=RUN_ID,
            step_id=item[1] if isinstance(item, tuple) else 0,
            step_name=f"step_{item[1]}" if isinstance(item, tuple) else "",
            attempt=1,
            execution=1,
            data=item[0] if isinstance(item, tuple) else item,
        )
        for number, item in enumerate(data, start=1)
    ]


def view_of(*data: tuple[EventData, int] | EventData, state: RunState = RunState.RUNNING, **fields: Any) -> RunView:
    run = Run(namespace="default", run_id=RUN_ID, agent="research", agent_version="1", state=state, **fields)
    view = RunView(run_id=RUN_ID).with_run(run)
    for event in events(*data):
        view = view.apply(event)
    return view


def drawn(view: RunView, *, width: int = 100, height: int = 40, encoding: str = "utf-8", **options: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None, highlight=False)
    console.print(RunDisplay(view, clock=lambda: BEGAN + timedelta(seconds=10), **options))
    raw = file.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode(encoding)


EVERYTHING: tuple[tuple[EventData, int] | EventData, ...] = (
    StateChanged(to_state=RunState.RUNNING),
    (StepStarted(max_attempts=3), 1),
    (StepSucceeded(duration=timedelta(milliseconds=320), output_preview="five passages"), 1),
    Progress(message="retrieved", completed=1, total=3),
    (StepStarted(max_attempts=4), 2),
    (StepRetrying(error=ERROR, delay=timedelta(seconds=8)), 2),
    (OutputDelta(stream="answer", text="It survives.\nMore of it"), 2),
    Published(key="draft", value={"a": 1}),
    LogLine(message="careful", level="warning"),
    (ApprovalRequested(approval_id=f"{RUN_ID}/3", title="Publish?", deadline_time=BEGAN + timedelta(hours=1)), 3),
)


def test_everything_a_watcher_wants_is_there() -> None:
    text = drawn(view_of(*EVERYTHING), notice="no connection, trying again in 2.0 s", command_prefix=" --namespace x")
    for part in (
        "research@1",
        RUN_ID,
        "RUNNING  9.0 s",
        "✔ step_1",
        "320 ms",
        "five passages",
        "↻ step_2",
        "attempt 2/4",
        "again in 4.0 s",
        "RateLimitError: 429 too many requests slow down",
        "1/3",
        "retrieved",
        "answer:",
        "It survives.",
        'draft = {"a": 1}',
        "careful",
        "? Publish?  (59 min 50 s left)",
        f"perdure --namespace x approve {RUN_ID}/3",
        "no connection, trying again",
    ):
        assert part in text, part


@pytest.mark.parametrize("width", [10, 20, 40, 60, 71, 72, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_the_id_is_whole(width: int) -> None:
    text = drawn(view_of(*EVERYTHING), width=width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    if width >= 20:
        assert RUN_ID in text.replace("\n", "").replace(" ", "")


def family(*data: tuple[str, EventData]) -> FamilyView:
    """A family after events of some runs, a second apart."""
    view = FamilyView(root=RunView(run_id="r"))
    sequences: dict[str, int] = {}
    for second, (run_id, item) in enumerate(data, start=1):
        sequences[run_id] = sequences.get(run_id, 0) + 1
        at = BEGAN + timedelta(seconds=second)
        event = RunEvent(
            sequence=sequences[run_id], event_time=at, run_id=run_id, step_id=1, step_name="ask", execution=1, data=item
        )
        view = view.apply(event)
    return view


def test_children_have_a_line_each_while_they_go_on_and_are_counted_when_they_have_ended() -> None:
    running, done = StateChanged(to_state=RunState.RUNNING), StateChanged(to_state=RunState.SUCCEEDED)
    failed = StateChanged(to_state=RunState.FAILED, failure=ERROR)
    view = family(
        ("r", running), ("r", ChildStarted(child_run_id="r.1")), ("r.1", running),
        ("r", ChildStarted(child_run_id="r.2")), ("r.2", running), ("r.2", done),
        ("r.1", ChildStarted(child_run_id="r.1.1")), ("r.1.1", running), ("r.1.1", StepStarted()),
        ("r", ChildStarted(child_run_id="r.3")), ("r.3", running), ("r.3", failed),
        ("r.1.1", ApprovalRequested(approval_id="r.1.1/4", title="Go on?")),
    )  # fmt: skip
    assert list(view.children) == ["r.1", "r.1.1", "r.2", "r.3"]
    assert [child.depth for child in view.children.values()] == [1, 2, 1, 1]
    assert view.children["r.1.1"].doing == "ask"
    console = Console(file=io.StringIO(), width=100, height=30, color_system=None)
    now = BEGAN + timedelta(seconds=20)
    console.print(RunDisplay(view.root, clock=lambda: now, children=view.children))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    at = lines.index("4 child runs: 1 FAILED, 1 SUCCEEDED")
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["●", "r.1", "RUNNING", "17.0", "s", "ask"],
        ["●", "r.1.1", "RUNNING", "12.0", "s", "ask"],
        ["✘", "r.3", "FAILED", "1.0", "s", "RateLimitError:", "429", "too", "many", "requests", "slow", "down"],
    ]
    assert lines[at + 2].index("●") == lines[at + 1].index("●") + 2
    assert any("perdure approve r.1.1/4" in line for line in lines)


def test_many_children_leave_room_for_the_rest() -> None:
    starts = [("r", ChildStarted(child_run_id=f"r.{number}")) for number in range(60)]
    view = family(*starts)
    console = Console(file=io.StringIO(), width=100, height=24, color_system=None)
    console.print(RunDisplay(view.root, children=view.children))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(text.splitlines()) <= 24
    assert "60 child runs: 52 more go on or failed" in text


def test_a_terminal_without_unicode_gets_ascii_glyphs() -> None:
    text = drawn(view_of(*EVERYTHING[:6]), encoding="ascii", width=100)
    assert "+ step_1" in text
    assert "~ step_2" in text


def test_many_steps_on_a_low_terminal_show_the_latest_and_those_that_run() -> None:
    begun: list[tuple[EventData, int] | EventData] = [(StepStarted(), number) for number in range(1, 101)]
    ended: list[tuple[EventData, int] | EventData] = [(StepSucceeded(), number) for number in range(2, 101)]
    text = drawn(view_of(*begun, *ended), height=15)
    assert len(text.splitlines()) <= 15
    assert "step_1 " in text
    assert "step_100" in text
    assert "step_50" not in text
    assert "earlier steps" in text


def test_the_final_view_shows_all_steps_the_output_and_the_trace() -> None:
    view = view_of(*[(StepSucceeded(), number) for number in range(1, 60)])
    done = Run(
        namespace="default", run_id=RUN_ID, agent="research", state=RunState.SUCCEEDED, output={"answer": "yes"},
        start_time=BEGAN, end_time=BEGAN + timedelta(seconds=75), trace_id="4bf9",
    )  # fmt: skip
    text = drawn(view.with_run(done), final=True, height=10)
    assert "SUCCEEDED  1 min 15 s" in text
    assert all(f"step_{number} " in text for number in range(1, 60))
    assert '"answer": "yes"' in text
    assert "trace 4bf9" in text


def test_the_final_view_of_a_failure_says_why() -> None:
    failure = Failure(type="ValueError", message="bad", step_name="ask", cause="KeyError: x", retryable=True)
    over = StateChanged(to_state=RunState.FAILED, failure=failure)
    view = view_of((StepStarted(), 1), over, start_time=BEGAN)
    done = Run(
        namespace="n",
        run_id=RUN_ID,
        agent="a",
        state=RunState.FAILED,
        failure=failure,
        end_time=BEGAN,
        create_time=BEGAN,
    )
    text = drawn(view.with_run(done), final=True)
    assert "ValueError: bad" in text
    assert "in step ask, caused by KeyError: x, running it again may succeed" in text
    assert "did not end" in text


def test_text_of_others_cannot_steer_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202edesrever"
    data: list[tuple[EventData, int] | EventData] = [
        LogLine(message=evil),
        Published(key=evil, value=evil),
        Progress(message=evil),
        (OutputDelta(stream=evil, text=evil), 1),
        (StepFailed(error=Failure(type=evil, message=evil)), 1),
        (ApprovalRequested(approval_id=evil, title=evil), 2),
    ]
    view = view_of(*data, state_reason=evil, labels={evil: evil})
    texts = [
        drawn(view),
        drawn(view, final=True),
        *(line for event in events(*data) for line in EventLines().lines(event)),
    ]
    for text in texts:
        assert not set(text) & set("\x07\x9b\u202e")
        assert "\x1b]" not in text
        assert "\x1b[2J" not in text


def lines_of(*data: tuple[EventData, int] | EventData) -> list[str]:
    formatted = EventLines()
    return [line.partition("  ")[2] for event in events(*data) for line in formatted.lines(event)]


def test_plain_lines_tell_the_same_story() -> None:
    assert lines_of(
        StateChanged(to_state=RunState.RUNNING),
        (StepStarted(max_attempts=4), 2),
        (StepRetrying(error=ERROR, delay=timedelta(seconds=8)), 2),
        (StepSucceeded(duration=timedelta(seconds=2), output_preview="ok"), 2),
        (StepFailed(error=ERROR, duration=timedelta(seconds=1)), 3),
        (ChildStarted(child_run_id="r.4"), 4),
        Progress(message="half", completed=1, total=2),
        Published(key="k", value=[1]),
        (ApprovalDecided(approval_id="r/3", state=ApprovalState.APPROVED, decided_by="me", comment="ok"), 3),
        SignalReceived(name="go", sender="me"),
        Recovered(gap=timedelta(seconds=3)),
        LogLine(message="careful", level="warning"),
        RunForked(from_run_id="old", from_step_id=3),
        StateChanged(to_state=RunState.FAILED, failure=ERROR),
    ) == [
        "RUNNING",
        "step_2 began",
        "step_2 failed in attempt 1, again in 8.0 s: RateLimitError: 429 too many requests slow down",
        "step_2 succeeded in 2.0 s: ok",
        "step_3 FAILED after 1.0 s: RateLimitError: 429 too many requests slow down",
        "step_4 started the run r.4",
        "progress 1/2  half",
        "k = [1]",
        "APPROVED by me: ok",
        "signal go from me",
        "recovered after its executor was gone; stood still for 3.0 s",
        "warning: careful",
        "forked from old, goes on at step 3; what is told of earlier steps is its",
        "FAILED: RateLimitError: 429 too many requests slow down",
    ]


def test_a_run_that_is_parked_is_not_told_to_ask_again() -> None:
    asks, waits = "asks: Publish?", RunState.AWAITING_INPUT
    assert lines_of(
        StateChanged(to_state=waits, from_state=RunState.RUNNING, reason=asks),
        StateChanged(to_state=waits, from_state=waits, reason=asks),
    ) == ["AWAITING_INPUT: asks: Publish?", "parked, still AWAITING_INPUT"]


def test_streamed_text_comes_in_whole_lines_and_what_is_left_before_the_next_event_of_its_step() -> None:
    formatted = EventLines()
    told = [
        list(formatted.lines(event))
        for event in events(
            (OutputDelta(stream="a", text="one "), 1),
            (OutputDelta(stream="a", text="line\nand a "), 1),
            LogLine(message="x"),
            (OutputDelta(stream="a", text="rest"), 1),
            (AttemptReset(), 1),
        )
    ]
    margin = "          | "
    assert told[0] == []
    assert told[1] == [f"{margin}one line"]
    assert told[2][0].endswith("info: x")
    assert told[3] == []
    assert told[4][0] == f"{margin}and a rest"
    assert told[4][1].endswith("step_1: the text above is void, its attempt was lost")


def test_a_question_comes_with_the_commands_that_answer_it() -> None:
    (event,) = events((ApprovalRequested(approval_id="r/3", title="Publish?"), 3))
    lines = list(EventLines(" --address a:1").lines(event))
    assert lines[0].endswith("? Publish?")
    assert lines[1].strip() == "| perdure --address a:1 approve r/3"
    assert lines[2].strip() == "| perdure --address a:1 reject r/3"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 ms"),
        (0.32, "320 ms"),
        (0.9999, "1.0 s"),
        (12.44, "12.4 s"),
        (59.96, "1 min 00 s"),
        (184, "3 min 04 s"),
        (7_500, "2 h 05 min"),
        (97_200, "1 d 3 h"),
    ],
)
def test_durations_read_in_two_units(seconds: float, text: str) -> None:
    assert short_duration(timedelta(seconds=seconds)) == text


def test_json_has_iso_times_durations_in_seconds_and_the_kind() -> None:
    (event,) = events((StepRetrying(error=ERROR, delay=timedelta(seconds=1.5)), 1))
    plain = jsonable(event)
    assert list(plain)[:2] == ["sequence", "kind"]
    assert plain["kind"] == "step_retrying"
    assert plain["event_time"] == "2030-01-01T12:00:01+00:00"
    assert plain["data"]["delay_s"] == 1.5
    assert plain["data"]["error"]["type"] == "RateLimitError"


def test_clean_keeps_what_is_text() -> None:
    assert clean("ä\tb\n漢🙂") == "ä\tb\n漢🙂"


def test_what_the_model_calls_used_is_shown_live_and_as_a_line() -> None:
    used = ModelUsage(model="small", input_tokens=1200, output_tokens=34)
    assert "1,200 + 34 tokens" in drawn(view_of((StepStarted(), 1), (used, 1)))
    assert "tokens" not in drawn(view_of((StepStarted(), 1)))
    (line,) = EventLines().lines(events((used, 1))[0])
    assert line.endswith("step_1 asked small: 1200 tokens sent, 34 received")
