"""What DBOS hands to threads that needs none: answered on the agents' loop, for as long as nothing in it has to block.

DBOS runs each stage of an asynchronous step or workflow in a thread (`dbos._outcome`: `asyncio.to_thread`), as it may
ask the database. Most need not: a stage that only returns the next one, a check of a step of which it is known whether
it is recorded, a checkpoint that is handed to a batch. `install` puts `to_thread` in the place that `dbos._outcome`
calls. It runs those stages, which it knows by their code, where they are awaited, and everything else in a thread.

**Nothing blocks the loop.** While a stage is answered inline, `refuse_to_block` raises `NeedsThread`, and whatever may
wait (each transaction, each slot, each payload) calls it first. The same stage is then run in a thread, from its
beginning: up to that point it has changed nothing that is not there to be found.

**Nothing is said to be done before it is committed.** A stage that hands its work to a batch leaves the batch's promise
with its `Deferral` and returns as if it had succeeded; but DBOS, and through it the agent's code, gets that answer only
when the promise is kept: *True* is set after the COMMIT that holds the work has returned. If the answer is False, or
none ever comes because the batch failed, nothing is known; the same stage runs in a thread without a deferral, and does
what it would have done without a batch: it finds what is committed, and decides. If we die before the answer, DBOS has
not gone on, and the next execution finds the work recorded or does it again: as with a thread. If the task is cancelled
while it waits, the work still goes its way, as that of a thread would.

**But code may go ahead of a step's commit**, as far as nothing comes of it: a workflow's own code, also in a thread,
gets what its step returned while that is on its way to the database (`Ahead`). Before it does anything else that is
durable, or begins the body of another step, it waits for it. So if we die, the next execution runs the step again, and
its value has been seen by nobody but code that is run again, too. If the code ends there, its last step and its end
are one commit (`checkpoints`), which is what this is for.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import CodeType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from dbos import _core, _event_loop, _outcome, _sys_db
from dbos._event_loop import BackgroundEventLoop

from perdure_service import event_loop
from perdure_service.durable.promises import Promise
from perdure_service.durable.substitutes import substitute

T = TypeVar("T")

DECIDERS = 64
"""Threads for stages whose work a batch did not write; more than there are connections."""

_deciders = ThreadPoolExecutor(DECIDERS, thread_name_prefix="decider-")

LOOKS = 64
"""How many waits of a loop ask the database at a time, each in a thread, whether what they wait for is there. All of a
thousand runs that come to a wait at once would make a thousand threads, which stay, for twenty connections. A look may
wait for the slot of its execution, which whoever holds it gives back without another look having to begin."""

_looks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
_deciding = threading.Lock()
_plain_invoke_step = _core.invoke_step
_plain_submit_coroutine = BackgroundEventLoop.submit_coroutine


class NeedsThread(BaseException):
    """Raised in what is answered inline and would have to block; whoever answers runs it in a thread instead."""


class Deferral:
    """What a stage that is answered inline leaves to be done before its answer counts.

    Attributes:
        ahead: Whether the code that gets the answer may go on with it before that; then the stage may leave an `Ahead`
            with its execution instead.
    """

    __slots__ = ("_promise", "ahead")

    def __init__(self, *, ahead: bool = False) -> None:
        self._promise: Promise[bool] | None = None
        self.ahead = ahead

    def wait_for(self, promise: Promise[bool]) -> None:
        """Makes the stage's answer wait; call it once, last, and return as if the work were done.

        Args:
            promise: Set to True once the work is committed; to False when it was not written or nobody knows, and
                then the stage is run in a thread to decide.

        Raises:
            RuntimeError: The stage waits for something already: one stage is one commit.
        """
        if self._promise is not None:
            raise RuntimeError("a stage hands over one piece of work")
        self._promise = promise

    @property
    def promise(self) -> Promise[bool] | None:
        """What the answer waits for, None for nothing."""
        return self._promise


class Ahead:
    """Work that code has gone ahead of: see the module.

    If it turns out not to be written, or nobody knows, that is decided in a thread at once, whoever waits.
    """

    __slots__ = ("_again", "_decided", "_decider", "_hurry", "_promise")

    def __init__(self, promise: Promise[bool], hurry: Callable[[bool], None], again: Callable[[], object]) -> None:
        """Notes what is to be waited for.

        Args:
            promise: As of `Deferral.wait_for`. If it is cancelled, another commit has the work in it, and decides.
            hurry: Called when somebody comes to wait, with whether the thread is held up by that.
            again: Decides: does the work without a batch, in a thread.
        """
        self._promise = promise
        self._hurry = hurry
        self._again = again
        self._decided: Future[object] | None = None
        self._decider = 0
        self._promise.add_done_callback(lambda _: self._is_kept or self._decision())

    @property
    def over(self) -> bool:
        """Whether the work is committed, or cannot be."""
        return self._promise.done() and (self._is_kept or self._decision().done())

    @property
    def _is_kept(self) -> bool:
        """Whether nothing is to be decided; once it is settled."""
        return self._promise.cancelled() or _answer_of(self._promise)

    def _decision(self) -> Future[object]:
        """Returns what comes of deciding it, which is begun by whoever is first to see the need."""
        with _deciding:
            if self._decided is None:
                self._decided = _deciders.submit(self._decide)
            return self._decided

    def _decide(self) -> object:
        self._decider = threading.get_ident()
        return self._again()

    async def settled(self) -> None:
        """Waits until the work is committed, one turn of the loop at least.

        Raises:
            BaseException: It could not be, as is said then.
        """
        if not self._promise.done():
            self._hurry(False)
        if self._promise.done():
            await asyncio.sleep(0)  # or code whose steps are all answered at once would let nobody else run
        else:
            await _settled(self._promise)
        if not self._is_kept:
            await result_of(self._decision())

    def wait(self) -> None:
        """Does what `settled` does, in a thread; for the thread that decides there is nothing to wait for.

        Raises:
            BaseException: As `settled`.
        """
        if self._decider == threading.get_ident():
            return
        if not self._promise.done():
            self._hurry(True)
            self._promise.exception()
        if not self._is_kept:
            self._decision().result()


class _Here(threading.local):
    """What is true of the calls in this thread."""

    refuses = False
    deferral: Deferral | None = None
    to_wake: list[LoopCalls] | None = None
    """The loops that `waking_once` wakes at its end."""


_here = _Here()


def deferral() -> Deferral | None:
    """Returns where the stage under way may leave its work; None when it must do it itself."""
    return _here.deferral


def refuse_to_block() -> None:
    """Is called before anything that may wait.

    Raises:
        NeedsThread: It must not wait here; let it pass.
    """
    if _here.refuses:
        if _here.deferral is not None and _here.deferral.promise is not None:
            raise RuntimeError("a stage has handed over its work, and cannot be run again to do more")
        raise NeedsThread


class refusing:
    """Makes what may wait in this thread refuse to; `left` is where work may be left meanwhile. Each step has five."""

    __slots__ = ("_before", "_within")

    def __init__(self, left: Deferral | None = None, *, refuses: bool = True) -> None:
        self._within = refuses, left

    def __enter__(self) -> None:
        self._before = _here.refuses, _here.deferral
        _here.refuses, _here.deferral = self._within

    def __exit__(self, *_: object) -> None:
        _here.refuses, _here.deferral = self._before


def as_a_thread() -> refusing:
    """Surrounds what is done in a stage for everybody, as a thread of its own would do it: nothing of it is refused."""
    return refusing(refuses=False)


class LoopCalls:
    """Calls from other threads into a loop; all that come before the loop wakes share one wake-up.

    Within `waking_once` a thread's posts wait for its end: each wake-up lets go of the interpreter's lock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], object]] = deque()
        self._woken = False

    def post(self, call: Callable[[], object]) -> None:
        """Makes the loop call something soon, in order of the posts.

        Raises:
            RuntimeError: The loop is closed.
        """
        # First in, then look: `_empty` says that it has not been woken before it takes out the first.
        self._calls.append(call)
        if not self._woken:
            self._woken = True
            if _here.to_wake is None:
                self.wake()
            else:
                _here.to_wake.append(self)

    def wake(self) -> None:
        """Wakes the loop for what was posted."""
        event_loop.call_soon(self._loop, self._empty)

    def _empty(self) -> None:
        self._woken = False
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception as error:  # noqa: BLE001 - one call must not take the others with it
                self._loop.call_exception_handler({"message": "a call from another thread failed", "exception": error})


class waking_once:
    """Surrounds what posts calls to loops, and waits for nothing: each loop is woken once, at the end."""

    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer, _here.to_wake = _here.to_wake, []

    def __exit__(self, *_: object) -> None:
        woken, _here.to_wake = _here.to_wake, self._outer
        for calls in woken or ():
            with suppress(RuntimeError):  # the loop is closed, and with it everything that waited
                calls.wake()


_loop_calls: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopCalls] = WeakKeyDictionary()
_loop_calls_lock = threading.Lock()


def calls_into(loop: asyncio.AbstractEventLoop) -> LoopCalls:
    """Returns what calls into a loop. Thread-safe."""
    with _loop_calls_lock:
        found = _loop_calls.get(loop)
        if found is None:
            found = _loop_calls[loop] = LoopCalls(loop)
        return found


async def answer(function: Callable[..., Any], *arguments: Any, ahead: bool = False) -> Any:
    """Returns or raises what a stage does: inline if it need not block, else as `asyncio.to_thread` does it.

    Args:
        function: The stage; running it twice must be the same as once.
        arguments: For it.
        ahead: See `Deferral`.
    """
    left = Deferral(ahead=ahead)
    error: BaseException | None = None
    result = None
    try:
        with refusing(left):
            result = contextvars.copy_context().run(function, *arguments)
    except NeedsThread:
        return await asyncio.to_thread(function, *arguments)
    except BaseException as raised:
        if left.promise is None:
            raise
        error = raised
    if left.promise is not None and not await _kept(left.promise, function, *arguments):
        return await asyncio.shield(_decide(function, *arguments))  # cancelled or not: somebody's commit hangs on it
    if error is None:
        return result
    try:
        raise error
    finally:
        del error  # or its traceback would keep it, and this frame, until the collector comes


async def _kept(promise: Promise[bool], function: Callable[..., Any], *arguments: Any) -> bool:
    """Waits for a promise; returns whether it was kept, after one turn of the loop at least.

    If the task is cancelled meanwhile and the promise is not kept, the stage still runs in a thread: its work is
    somebody's commit, and the events that ride on it are somebody's news.
    """
    context = contextvars.copy_context()

    def decide_alone() -> None:
        if not _answer_of(promise):
            again = context.run(_decide, function, *arguments)
            again.add_done_callback(lambda done: done.cancelled() or done.exception())

    if not promise.done():
        await _settled(promise, nobody_waits=decide_alone)
    elif _answer_of(promise):
        await asyncio.sleep(0)  # or code whose steps are all answered at once would let nobody else run
    return _answer_of(promise)


def _decide(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Runs a stage, whose work nobody knows to be done, in a thread that is kept for such.

    DBOS's own threads may all be waiting for what this stage holds: the slot of its execution.
    """
    again = functools.partial(contextvars.copy_context().run, function, *arguments)
    return asyncio.get_running_loop().run_in_executor(_deciders, again)


async def in_few_threads(function: Callable[..., T], /, *arguments: Any, **named: Any) -> T:
    """Does what `asyncio.to_thread` does, for what asks the database and runs no code of agents; see `LOOKS`."""
    loop = asyncio.get_running_loop()
    looks = _looks.get(loop)
    if looks is None:
        looks = _looks[loop] = asyncio.Semaphore(LOOKS)
    async with looks:
        return await asyncio.to_thread(function, *arguments, **named)


def _answer_of(promise: Promise[bool]) -> bool:
    """Returns the answer of a promise that is settled; one that was cancelled or failed says as little as a False."""
    return not promise.cancelled() and promise.exception() is None and promise.result()


async def result_of(promise: Promise[T] | Future[T]) -> T:
    """Waits for a promise that is kept in another thread, which goes its way when nobody waits any more."""
    await _settled(promise)
    return promise.result()


async def _settled(promise: Promise[T] | Future[T], nobody_waits: Callable[[], None] = lambda: None) -> None:
    """Waits until a promise is settled in another thread; `nobody_waits` is called on the loop if nobody does then."""
    if promise.done():
        return
    loop = asyncio.get_running_loop()
    settled: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if settled.done():
            nobody_waits()
        else:
            settled.set_result(None)

    def tell(_promise: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it everything that waited
            calls_into(loop).post(settle)

    promise.add_done_callback(tell)
    try:
        await settled
    except asyncio.CancelledError:
        if settled.done() and not settled.cancelled():  # it was told in the very turn in which it is cancelled
            nobody_waits()
        raise


def chain(source: Future[T], promise: Promise[T]) -> None:
    """Makes a promise end as what a thread does."""

    def settle(done: Future[T]) -> None:
        error = done.exception()
        if error is None:
            promise.set_result(done.result())
        else:
            promise.set_exception(error)

    source.add_done_callback(settle)


# ---- DBOS's stages ---------------------------------------------------------------------------------------------------


def code_within(code: CodeType, *path: str) -> CodeType:
    """Returns the code of a function that is defined inside another one, by the names on the way to it.

    Raises:
        LookupError: There is no such function, or more than one.
    """
    for name in path:
        found = [inner for inner in code.co_consts if isinstance(inner, CodeType) and inner.co_name == name]
        if len(found) != 1:
            raise LookupError(f"{code.co_name} defines {len(found)} functions {name!r}")
        code = found[0]
    return code


def stages() -> frozenset[CodeType]:
    """Returns the code of DBOS's own stages that can be answered inline."""
    return frozenset(
        {
            code_within(_plain_invoke_step.__code__, "check_existing_result"),
            code_within(_plain_invoke_step.__code__, "record_step_result"),
            code_within(_outcome.Pending.then.__code__, "<lambda>", "<lambda>"),
        }
    )


def start_of_task() -> CodeType:
    """Returns the code of the coroutine by which DBOS begins an asynchronous workflow on its loop."""
    return code_within(_core.execute_dequeued_workflow.__code__, "start_workflow_task")


class _Asyncio:
    """The module `asyncio`, for a module of DBOS's that is to get some of it from here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


class _AsyncioOfOutcomes(_Asyncio):
    """As `dbos._outcome` gets it: its `to_thread` needs no thread for stages that are known."""

    def __init__(self, known: Collection[CodeType]) -> None:
        self._known = known

    async def to_thread(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
        if named or getattr(function, "__code__", None) not in self._known:
            return await asyncio.to_thread(function, *arguments, **named)
        return await answer(function, *arguments)


class _AsyncioOfWaits(_Asyncio):
    """As `dbos._sys_db` gets it, whose waits look at the database in threads."""

    to_thread = staticmethod(in_few_threads)


class _AsyncioOfLoops(_Asyncio):
    """As `dbos._event_loop` gets it."""

    new_event_loop = staticmethod(event_loop.new)


def install(*ours: CodeType) -> None:
    """Makes DBOS's asynchronous steps and workflows answer their stages inline, and begin without being waited for.

    Args:
        ours: The code of functions of ours that are stages, too.
    """
    substitute(_event_loop, "asyncio", _AsyncioOfLoops())
    substitute(_outcome, "asyncio", _AsyncioOfOutcomes(stages() | set(ours)))
    substitute(_sys_db, "asyncio", _AsyncioOfWaits())
    begins = start_of_task()

    def submit_coroutine(background: BackgroundEventLoop, coroutine: Any) -> Any:
        if getattr(coroutine, "cr_code", None) is not begins:
            return _plain_submit_coroutine(background, coroutine)
        loop = background.target_loop()
        if loop is None:
            coroutine.close()
            raise RuntimeError("there is no loop to begin on")
        calls_into(loop).post(functools.partial(contextvars.copy_context().run, _begin, coroutine))
        return None

    substitute(BackgroundEventLoop, "submit_coroutine", submit_coroutine)


def _begin(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine that makes a task and waits for nothing.

    Until it has run, the execution is counted by us and owned by this process, as it is a moment later; if it never
    does, because the loop ends, the run is given back with all others.
    """
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("DBOS waits before it begins a workflow")
