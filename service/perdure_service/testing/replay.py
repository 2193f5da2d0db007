"""Whether an agent survives a crash after each of its steps: runs it once as it is, then once for each step.

Three things are looked for. *The same steps:* every crashed run must record the same steps in the same order as the
one that was left alone. *The same result.* *Nothing twice:* no step that was recorded before the crash runs again. The
last crash is right before the end: there every step is recorded, so the replay has exactly what the first execution
had, and what it makes of it can differ by the agent's own code only.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from perdure_service.domain.events import EventKind
from perdure_service.domain.runs import NON_DETERMINISTIC, Failure, Run
from perdure_service.durable import crash
from perdure_service.testing.points import CrashPoint

if TYPE_CHECKING:
    from perdure_service.testing.harness import AgentHarness
    from perdure_service.testing.runs import HarnessRun

Steps = list[tuple[int, str]]


class ReplayDiffers(AssertionError):
    """A run that crashed did not do what the run that was left alone did; the message names the first difference."""


async def check_replay(
    harness: AgentHarness,
    agent: str,
    run_input: Any = None,
    *,
    signals: Sequence[tuple[str, Any]] = (),
    same: Callable[[Any, Any], bool] = operator.eq,
    timeout_s: float | None = None,
) -> Steps:
    """Crashes runs of an agent after each step in turn; returns the steps, number and name.

    Approvals are decided as the harness was told to (`AgentHarness(decide=…)`).

    Args:
        harness: An open harness.
        agent: The agent's name.
        run_input: The input of every run.
        signals: What to send to each run, name and payload, in this order.
        same: Compares two outputs of different runs, in which run ids are replaced by `RUN`. Needed when steps return
            something else each time (a clock, a random number), as the steps after a crash are run anew.
        timeout_s: For each run.

    Raises:
        ReplayDiffers: A crashed run did something else.
        RunFailed: The run that was left alone was cancelled or has expired.
    """

    async def run_once(point: CrashPoint | None) -> tuple[Run, HarnessRun, list[Any]]:
        run_id = f"replay-{len(tried)}-{harness.mark()}"
        told: list[Any] = []
        tried.append(run_id)
        run = harness.known(run_id)
        if point is not None:
            at_end = crash.run_ended(run.key.workflow_id, told.append)
            after_step = crash.step_recorded(run.key.workflow_id, point.step_id)
            await harness.arm(run.key, at_end if point.before else after_step, point)
        await harness.start(agent, run_input, run_id=run_id)
        for number, (name, payload) in enumerate(signals):
            await harness.signal(run, name, payload, request_id=f"{run_id}-{number}")
        return await run.ended(timeout_s), run, told

    tried: list[str] = []
    alone, first_run, _ = await run_once(None)
    steps = await harness.recorded(first_run)
    for point in [*(CrashPoint(step_id, False) for step_id, _ in steps), CrashPoint(0, True)]:
        ended, run, told = await run_once(point)
        where = f"crashed after step {point.step_id} ({dict(steps)[point.step_id]})" if not point.before else (
            "crashed right before its end"
        )  # fmt: skip
        _compare_steps(where, steps, await harness.recorded(run), ended)
        if told:
            _compare(where, _result(ended), (_plain(told[0][0], ended), _failure(told[0][1], ended)), operator.eq)
        _compare(where, _result(ended), _result(alone), same)
        await _nothing_twice(where, run)
    return steps


def _compare_steps(where: str, expected: Steps, found: Steps, run: Run) -> None:
    if run.failure is not None and run.failure.type == NON_DETERMINISTIC:
        raise ReplayDiffers(f"the run that {where} left its recording: {run.failure.message}")
    for wanted, met in zip(expected, found, strict=False):
        if wanted != met:
            raise ReplayDiffers(
                f"the run that {where} differs from step {wanted[0]} on: {met[1]!r} instead of {wanted[1]!r}"
            )
    if len(expected) != len(found):
        longer = max(expected, found, key=len)[min(len(expected), len(found))]
        missing = "lacks" if len(found) < len(expected) else "has in addition"
        raise ReplayDiffers(f"the run that {where} {missing} step {longer[0]} ({longer[1]})")


def _compare(where: str, found: tuple[Any, Any], wanted: tuple[Any, Any], same: Callable[[Any, Any], bool]) -> None:
    if found[1] != wanted[1]:
        raise ReplayDiffers(f"the run that {where} ended otherwise: {found[1] or 'well'}, not {wanted[1] or 'well'}")
    if not same(found[0], wanted[0]):
        raise ReplayDiffers(f"the run that {where} has another result: {_short(found[0])}, not {_short(wanted[0])}")


async def _nothing_twice(where: str, run: HarnessRun) -> None:
    """Raises when the body of a step ran although an earlier execution had recorded it."""
    recorded: set[int] = set()
    for event in await run.events(EventKind.STEP_STARTED, EventKind.STEP_SUCCEEDED, EventKind.STEP_FAILED):
        if event.kind is EventKind.STEP_STARTED and event.step_id in recorded:
            raise ReplayDiffers(f"the run that {where} ran step {event.step_id} ({event.step_name}) again")
        if event.kind is not EventKind.STEP_STARTED:
            recorded.add(event.step_id)


def _result(run: Run) -> tuple[Any, Any]:
    """Returns a run's output and failure, comparable with another run's."""
    failure = (
        None if run.failure is None else f"{run.failure.type}: {run.failure.message}".replace(run.key.run_id, "RUN")
    )
    return _plain(run.output_json, run), failure or (None if run.state.value == "SUCCEEDED" else run.state.value)


def _failure(stored: str | None, run: Run) -> str | None:
    if stored is None:
        return None
    failure = Failure.from_json(json.loads(stored))
    return f"{failure.type}: {failure.message}".replace(run.key.run_id, "RUN")


def _plain(output_json: str | None, run: Run) -> Any:
    return None if output_json is None else json.loads(output_json.replace(run.key.run_id, "RUN"))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:299]}…"
