"""The attempts of a step, seen where DBOS runs its body: events, spans, and the refusal to begin when it must not.

DBOS records a step when it is over; that it began, that an attempt failed and when the next one comes is visible only
around the body. `install` puts `observed_invoke_step` in the place of DBOS's own (`dbos._core.invoke_step`, which the
decorator, `run_step` and `run_step_async` all call): it wraps body and retry verdict, and leaves the rest to DBOS.

**The budget** is looked at when an attempt begins, and nowhere else. A step that is recorded has no attempt: it
replays, whatever the budget says. A refusal is the step's recorded failure, so that every replay gets the same one,
whatever was counted then. Before it is recorded nobody has seen it, and the next execution may decide anew:

* The number of steps is the step's place among those that the code has come to, recorded ones included. It depends on
  nothing but the code and its recorded results, as everything in a replay does.
* Tokens only grow: an execution begins with what its run's log holds, and adds what its steps report. What a killed
  process had not committed is not counted; what was committed is counted although the step's checkpoint was not.

The order of locks and rows does not matter, as nothing is read from the database here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from dbos import _core
from dbos._error import DBOSWorkflowConflictIDError

from perdure_service.domain.budgets import BudgetExceeded
from perdure_service.domain.events import Event, EventKind
from perdure_service.domain.trace_fold import next_attempt_ms
from perdure_service.durable import plain_steps, values
from perdure_service.durable.executions import Execution, Executions, Parked, StepProgress, now_ms
from perdure_service.durable.leases import Lease
from perdure_service.durable.parking import while_working
from perdure_service.durable.spans import Spans
from perdure_service.durable.substitutes import substitute
from perdure_service.telemetry import RunSpan

MAX_RETRY_DELAY_S = 3600.0
"""DBOS's bound of the delay between two attempts (dbos/_core.py, invoke_step)."""

_dbos_invoke_step = _core.invoke_step


@dataclass(frozen=True, slots=True)
class CurrentStep:
    """The attempt that this task or thread runs."""

    execution: Execution
    step_id: int
    attempt: int
    closed: list[bool]
    """Holds True once the attempt is over, so that its output streams close with it."""


current_step: ContextVar[CurrentStep | None] = ContextVar("perdure_current_step", default=None)


class Attempt:
    """See `StepObserver.attempt`. No generator: each step has one."""

    __slots__ = ("_observer", "here", "logged", "span", "step", "token")

    step: StepProgress
    here: CurrentStep
    token: Token[CurrentStep | None]
    logged: Mapping[str, Token[Any]]
    span: RunSpan

    def __init__(self, observer: StepObserver) -> None:
        self._observer = observer

    def __enter__(self) -> StepProgress:
        return self._observer.begin(self)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.here.execution.end_body()
        if error is not None:
            self.step.error = error
        self.span.leave()
        self.here.closed.append(True)
        structlog.contextvars.reset_contextvars(**self.logged)
        current_step.reset(self.token)


class StepObserver:
    """Watches one step of one execution."""

    def __init__(
        self,
        execution: Execution,
        step_id: int,
        name: str,
        spans: Spans,
        lease: Lease,
        *,
        max_attempts: int,
        interval_s: float,
        backoff: float,
    ) -> None:
        self._place = execution.meet_step()
        self._execution = execution
        self._step_id = step_id
        self._name = name
        self._spans = spans
        self.lease = lease
        self._max_attempts = max_attempts
        self._interval_s = interval_s
        self._backoff = backoff

    def attempt(self) -> Attempt:
        """Surrounds a body: refuses to begin in a dead execution or beyond the budget, and tells of the beginning."""
        return Attempt(self)

    def begin(self, attempt: Attempt) -> StepProgress:
        """Begins an attempt."""
        execution, step_id = self._execution, self._step_id
        if execution.parked:
            raise Parked(execution)
        if not execution.may_go_on:
            raise DBOSWorkflowConflictIDError(execution.key.workflow_id)
        execution.budget.check(steps=self._place, tokens=execution.tokens)
        step = execution.steps.get(step_id)
        if step is None:
            step = execution.steps[step_id] = StepProgress(self._name)
        step.attempt += 1
        step.error = None
        begins = self._event(EventKind.STEP_STARTED, {"max_attempts": self._max_attempts}, 1)
        start_ms, step.next_attempt_ms = step.next_attempt_ms or begins.time_ms, None
        if step.attempt == 1:
            execution.note(begins)
        elif step.wrote_output:
            step.wrote_output = False
            execution.note(self._event(EventKind.ATTEMPT_RESET, {}, step.attempt))
        execution.begin_body()
        attempt.step, attempt.here = step, CurrentStep(execution, step_id, step.attempt, [])
        attempt.token = current_step.set(attempt.here)
        attempt.logged = structlog.contextvars.bind_contextvars(step_name=self._name, attempt=step.attempt)
        attempt.span = self._spans.attempt(execution, step_id, step, start_ms)
        return step

    def verdict(self, error: BaseException, repeat: bool) -> bool:
        """Tells of a failed attempt that will be repeated; returns `repeat`."""
        step = self._execution.steps.get(self._step_id)
        if repeat and step is not None and step.attempt < self._max_attempts:
            delay_s = min(self._interval_s * self._backoff ** (step.attempt - 1), MAX_RETRY_DELAY_S)
            data = {"error": values.failure_of(error, self._name).to_json(), "delay_ms": int(delay_s * 1000)}
            retrying = self._event(EventKind.STEP_RETRYING, data, step.attempt)
            step.next_attempt_ms = next_attempt_ms(retrying)
            self._execution.note(retrying)
        return repeat

    def _event(self, kind: EventKind, data: dict[str, Any], attempt: int) -> Event:
        return Event(kind, now_ms(), data, self._step_id, self._name, attempt, self._execution.number)


def _observed_body(func: Callable[..., Any], observer: StepObserver, *, asynchronous: bool) -> Callable[..., Any]:
    # DBOS has its name, and calls it: a dressed-up copy for each call would be of no use.
    if asynchronous:

        async def async_body(*args: Any, **kwargs: Any) -> Any:
            if not observer.lease.open:
                await observer.lease.gate_async()
            with observer.attempt() as step:
                result = await func(*args, **kwargs)
                step.preview = values.preview(result)
                return result

        return async_body

    def body(*args: Any, **kwargs: Any) -> Any:
        observer.lease.gate()
        with observer.attempt() as step:
            result = func(*args, **kwargs)
            step.preview = values.preview(result)
            return result

    return body


def _observed_verdict(
    func: Callable[..., Any], should_retry: Callable[..., Any] | None, observer: StepObserver
) -> Callable[..., Any] | None:
    if inspect.iscoroutinefunction(should_retry) and not inspect.iscoroutinefunction(func):
        return should_retry  # DBOS refuses this, with its own words
    if inspect.iscoroutinefunction(func):

        async def async_verdict(error: BaseException) -> bool:
            if isinstance(error, BudgetExceeded):
                return False
            repeat = True if should_retry is None else should_retry(error)
            return observer.verdict(error, bool(await repeat if inspect.isawaitable(repeat) else repeat))

        return async_verdict

    def verdict(error: BaseException) -> bool:
        if isinstance(error, BudgetExceeded):
            return False
        return observer.verdict(error, True if should_retry is None else bool(should_retry(error)))

    return verdict


def install(executions: Executions, spans: Spans, lease: Lease) -> None:
    """Makes DBOS run every step under observation.

    Args:
        executions: Where to find the execution a step belongs to; a step of none runs unobserved.
        spans: Where attempts are traced.
        lease: Says when no body may begin.
    """

    def observed_invoke_step(
        dbos: Any, step_ctx: Any, func: Callable[..., Any], args: Any, kwargs: Any, **options: Any
    ) -> Any:
        execution = executions.find(step_ctx.workflow_id, step_ctx.owner_xid)
        if execution is None:
            return _dbos_invoke_step(dbos, step_ctx, func, args, kwargs, **options)
        retries = bool(options["retries_allowed"])
        observer = StepObserver(
            execution,
            step_ctx.function_id,
            options["step_name"],
            spans,
            lease,
            max_attempts=options["max_attempts"] if retries else 1,
            interval_s=options["interval_seconds"],
            backoff=options["backoff_rate"],
        )
        if retries:
            options["should_retry"] = _observed_verdict(func, options.get("should_retry"), observer)
        asynchronous = inspect.iscoroutinefunction(func)
        body = _observed_body(func, observer, asynchronous=asynchronous)
        if asynchronous and plain_steps.is_plain(options):
            called = partial(body, *args, **kwargs)
            return plain_steps.run(dbos, step_ctx, execution, options["step_name"], called, now_ms())
        # From before its check until after its checkpoint: in between its run is not parked.
        return while_working(execution, lambda: _dbos_invoke_step(dbos, step_ctx, body, args, kwargs, **options))

    substitute(_core, "invoke_step", observed_invoke_step)
