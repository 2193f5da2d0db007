"""The checkpoint writer on a loop: who writes when, and what happens when the loop does not come to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.store import checkpoint_writer, hot_statements, pace
from perdure_service.store.checkpoints import Written
from perdure_service.store.engine import create_engine, is_cockroach
from perdure_service.store.silence import SilenceWatch, watch_for_silence
from perdure_service.store.sqlstates import is_connection_lost

from tests.helpers.waiting import eventually, scaled
from tests.helpers.writing import Writing, a_loop, a_start, a_step, an_end, steps_of, writing_on

THE_LOOP = "the loop"
THREADS = {"checkpoint-writer-0", "checkpoint-writer-1"}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with a_loop() as loop:
        yield loop


@pytest.fixture(scope="module")
def direct_url(dialect_url: str) -> str:
    """The module's database, where the driver can be asked without waiting."""
    if sa.make_url(dialect_url).get_driver_name() != "psycopg":
        pytest.skip("psycopg2 is waited for by threads")
    return dialect_url


@pytest.fixture(scope="module")
def of_module(direct_url: str, loop: asyncio.AbstractEventLoop) -> Iterator[Writing]:
    with writing_on(direct_url, loop) as writing:
        yield writing


@pytest.fixture
def writing(of_module: Writing) -> Iterator[Writing]:
    of_module.alone = False
    eventually(lambda: _writes_by_loop(of_module), what="the loop writes")
    of_module.threads.clear()
    yield of_module
    of_module.alone = False


def _writes_by_loop(writing: Writing) -> bool:
    writing.started()
    return writing.threads[-1] == THE_LOOP


@contextmanager
def blocked(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Blocks a loop, as code of an agent may."""
    blocks, go_on = threading.Event(), threading.Event()

    def block() -> None:
        blocks.set()
        go_on.wait(scaled(20))

    loop.call_soon_threadsafe(block)
    assert blocks.wait(scaled(20))
    try:
        yield
    finally:
        go_on.set()


@contextmanager
def held_up(writing: Writing) -> Iterator[Callable[[], None]]:
    """Makes each commit wait until what it gives is called."""
    if is_cockroach(writing.engine):
        pytest.skip("CockroachDB has no LOCK TABLE")
    with writing.engine.connect() as conn:
        transaction = conn.begin()
        conn.exec_driver_sql("SET LOCAL statement_timeout = 0")
        conn.exec_driver_sql("LOCK TABLE perdure.run_event IN EXCLUSIVE MODE")

        def release() -> None:
            if transaction.is_active:
                transaction.rollback()

        try:
            yield release
        finally:
            release()


def on(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Calls something on a loop, and waits for its end."""
    done = threading.Event()

    def run() -> None:
        try:
            call()
        finally:
            done.set()

    loop.call_soon_threadsafe(run)
    assert done.wait(scaled(20))


def backends(writing: Writing) -> list[int]:
    """Returns the sessions that wait for a lock, or have been in such a statement."""
    return [
        pid
        for (pid,) in writing.all(
            "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database() "
            "AND wait_event_type = 'Lock'"
        )
    ]


def test_the_loop_writes_what_comes_from_it_and_from_others(writing: Writing, loop: asyncio.AbstractEventLoop) -> None:
    runs = [writing.started() for _ in range(3)]
    steps = [a_step(run) for run in runs]
    on(loop, lambda: [writing.writer.submit(step) for step in steps])
    assert None not in writing.wait_for(*steps)
    assert set(writing.threads) == {THE_LOOP}
    assert writing.batches[-1] == 3, "those of one turn are one batch"


def test_when_large_batches_are_wanted_the_threads_write_and_afterwards_the_loop_again(
    writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pace.Pace, "rows", lambda _pace: float(checkpoint_writer.MANY_ROWS))
        writing.started()
        writing.threads.clear()
        for _ in range(3):
            assert None not in writing.submit(a_step(writing.started()), a_start())
        assert set(writing.threads) <= THREADS
    assert _writes_by_loop(writing)


def test_while_code_blocks_the_loop_the_thread_writes_and_afterwards_the_loop_again(
    writing: Writing, loop: asyncio.AbstractEventLoop
) -> None:
    with blocked(loop), pytest.MonkeyPatch.context() as patch:
        writing.started()
        patch.setattr(checkpoint_writer, "JOIN_AFTER_S", 3600.0)  # what it knows, it does not wait for again
        for _ in range(3):
            run = writing.started()
            assert None not in writing.submit(a_step(run))
            assert None not in writing.submit(a_start(), a_start())
        assert set(writing.threads) <= THREADS
    eventually(lambda: _writes_by_loop(writing), what="the loop writes again")


def test_an_answer_that_a_blocked_loop_leaves_is_taken_by_the_thread(
    writing: Writing, loop: asyncio.AbstractEventLoop
) -> None:
    step = a_step(writing.started())
    with held_up(writing) as release:
        assert writing.writer.submit(step)
        eventually(lambda: backends(writing), what="its commit waits")
        with blocked(loop):
            release()
            assert writing.wait_for(step) != [None]
            assert writing.threads[-1] in THREADS
            assert None not in writing.submit(a_start())
    eventually(lambda: _writes_by_loop(writing), what="the loop writes again")
    assert steps_of(writing, step) == [1]


@pytest.mark.parametrize("blocks", [False, True])
def test_a_connection_that_is_lost_under_a_batch_costs_no_row_and_is_made_again(
    writing: Writing, loop: asyncio.AbstractEventLoop, blocks: bool
) -> None:
    runs = [writing.started() for _ in range(3)]
    steps = [a_step(run) for run in runs]
    with held_up(writing) as release:
        writing.give(*steps)
        [pid] = eventually(lambda: backends(writing), what="its commit waits")
        if blocks:
            with blocked(loop):
                writing.all("SELECT pg_terminate_backend(:pid)", pid=pid)
                release()
                assert None not in writing.wait_for(*steps)
                assert writing.threads[-1] in THREADS
        else:
            writing.all("SELECT pg_terminate_backend(:pid)", pid=pid)
            release()
            assert None not in writing.wait_for(*steps)
    assert [steps_of(writing, run) for run in runs] == [[1]] * 3
    eventually(lambda: _writes_by_loop(writing), what="the loop writes again")


def test_a_silent_server_loses_a_connection_for_whose_answer_no_thread_waits(direct_url: str) -> None:
    engine = create_engine(direct_url, pool_size=1, statement_timeout=timedelta(0))
    watch_for_silence(engine, 0.1, SilenceWatch())
    with engine.connect() as conn:
        conn = conn.execution_options(isolation_level="AUTOCOMMIT")
        exchange = hot_statements.Exchange(conn, [("SELECT pg_sleep(60), %(x)s AS x", {"x": 1})])
        exchange.begin_waiting()
        assert not exchange.wait(0.001), "it is asked to wait for no longer"
        eventually(exchange.advance, what="the connection is lost")
        exchange.end_waiting()
        with pytest.raises(sa.exc.DBAPIError) as raised:
            exchange.rows()
        assert is_connection_lost(raised.value)
        conn.invalidate()
    engine.dispose()


def test_a_batch_that_the_socket_does_not_take_at_once_is_sent_by_the_loop(
    writing: Writing, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Now the statement for several is prepared, and does not wait for that.
    assert None not in writing.submit(*(a_step(writing.started()) for _ in range(2)))
    steps = [a_step(writing.started(), output='"' + "x" * 3_000_000 + '"') for _ in range(6)]
    monkeypatch.setattr(checkpoint_writer, "JOIN_AFTER_S", 3600.0)
    with held_up(writing) as release:
        writing.give(*steps)
        eventually(lambda: backends(writing), what="its commit waits")
        still_sends: list[bool] = []
        on(loop, lambda: still_sends.append(loop.remove_writer(writing.writer._session.watched_socket)))
        assert still_sends == [False], "it would not let the loop rest"
        release()
    assert None not in writing.wait_for(*steps)
    assert writing.threads[-1] == THE_LOOP
    assert [steps_of(writing, step) for step in steps] == [[1]] * 6


def test_a_batch_that_cannot_be_watched_is_written_and_keeps_no_other_one_from_being_told(
    writing: Writing, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = (a_step(writing.started()) for _ in range(3))

    def refuse(*_: object) -> None:
        raise OSError("the selector is full")

    with held_up(writing) as release, monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "JOIN_AFTER_S", 3600.0)  # until the first one is answered nobody joins
        writing.give(first)
        eventually(lambda: backends(writing), what="its commit waits")
        with writing.writer._changed:
            assert all(writing.writer.submit(other) for other in others)
        patch.setattr(loop, "add_reader", refuse)
        release()
        assert writing.wait_for(first) != [None]
        patch.setattr(checkpoint_writer, "JOIN_AFTER_S", 0.02)
        with writing.writer._changed:
            writing.writer._changed.notify_all()  # or the thread would still look after an hour
        assert None not in writing.wait_for(*others)
    assert [steps_of(writing, step) for step in (first, *others)] == [[1]] * 3


# ---- here and now ----------------------------------------------------------------------------------------------------


def _submit_and_look(writing: Writing, row: checkpoint_writer.CheckpointRow) -> list[str]:
    """Submits a row; returns who has answered it by then."""
    writing.answers.clear()
    writing.threads.clear()
    assert writing.writer.submit(row)
    return list(writing.threads)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes commits fast enough for whoever submits, however slow the machine is."""
    monkeypatch.setattr(checkpoint_writer, "HERE_S", scaled(10))


@pytest.mark.usefixtures("patient")
def test_a_run_that_moves_alone_is_answered_where_it_submits(writing: Writing, loop: asyncio.AbstractEventLoop) -> None:
    writing.alone = True
    start = a_start()
    assert _submit_and_look(writing, start) == [threading.current_thread().name]
    step = a_step(start)
    seen: list[str] = []
    on(loop, lambda: seen.extend(_submit_and_look(writing, step)))
    assert seen == [THE_LOOP]
    assert _submit_and_look(writing, an_end(step)) == [threading.current_thread().name]
    assert steps_of(writing, start) == [1]
    assert writing.all("SELECT status FROM dbos.workflow_status WHERE workflow_uuid = :id", id=start.workflow_id) == [
        ("SUCCESS",)
    ]


@pytest.mark.usefixtures("patient")
def test_a_loop_that_is_not_the_writers_waits_for_nothing(writing: Writing) -> None:
    writing.alone = True
    start = a_start()
    with a_loop("another loop") as other:
        seen: list[list[str]] = []
        with held_up(writing) as release:
            on(other, lambda: seen.append(_submit_and_look(writing, start)))
            release()
        assert seen == [[]]
    assert writing.wait_for(start) != [None]
    assert writing.threads == [THE_LOOP]


def test_a_commit_that_takes_longer_is_left_to_the_loop_and_the_next_one_does_not_try(
    writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float | None] = []
    wait = hot_statements.Exchange.wait

    def noted(exchange: hot_statements.Exchange, timeout_s: float | None = None) -> bool:
        waited.append(timeout_s)
        return wait(exchange, timeout_s)

    first, second = writing.started(), writing.started()
    monkeypatch.setattr(hot_statements.Exchange, "wait", noted)
    writing.alone = True
    writing.writer._took = 0.0
    step = a_step(first)
    with held_up(writing) as release:
        assert _submit_and_look(writing, step) == []
        release()
    assert writing.wait_for(step) != [None]
    assert writing.threads == [THE_LOOP]
    writing.writer._took = checkpoint_writer.HERE_S
    other = a_step(second)
    with held_up(writing) as release:
        assert _submit_and_look(writing, other) == []
        assert waited == [checkpoint_writer.HERE_S], "the first one only"
        release()
    assert writing.wait_for(other) != [None]
    assert [steps_of(writing, run) for run in (first, second)] == [[1], [1]]


def test_what_was_waited_for_in_vain_is_watched_for_a_loop_that_is_blocked(
    writing: Writing, loop: asyncio.AbstractEventLoop
) -> None:
    step = a_step(writing.started())
    eventually(lambda: not writing.writer._clock_watched, what="no thread has anything to look at")
    writing.alone = True
    writing.writer._took = 0.0
    with held_up(writing) as release, blocked(loop):
        assert _submit_and_look(writing, step) == []
        release()
        assert writing.wait_for(step) != [None]
    assert set(writing.threads) <= THREADS


@pytest.mark.usefixtures("patient")
def test_what_fails_here_is_repeated_by_the_thread(writing: Writing) -> None:
    run, other = writing.started(), writing.started()
    writing.alone = True
    refused = a_step(run, output="a\0b")
    assert _submit_and_look(writing, refused) == []
    assert writing.wait_for(refused) == [None]
    eventually(lambda: writing.writer._busy == 0)
    writing.writer._took = 0.0
    assert _submit_and_look(writing, a_step(other)) == [threading.current_thread().name]


@pytest.mark.usefixtures("patient")
def test_who_submits_while_another_one_is_answered_here_is_written_too(writing: Writing) -> None:
    """From many threads at once, which all believe that they are alone."""
    runs = [writing.started() for _ in range(20)]
    writing.alone = True
    writing.writer._took = 0.0
    steps = [a_step(run) for run in runs]
    threads = [threading.Thread(target=writing.writer.submit, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in writing.wait_for(*steps)
    assert [steps_of(writing, run) for run in runs] == [[1]] * 20


# ---- the end ---------------------------------------------------------------------------------------------------------


def _stopping(writing: Writing) -> threading.Thread:
    thread = threading.Thread(target=writing.writer.stop)
    thread.start()
    return thread


@pytest.mark.usefixtures("patient")
def test_who_waits_when_it_is_stopped_is_answered(direct_url: str) -> None:
    with a_loop() as loop, writing_on(direct_url, loop) as writing:
        step = a_step(writing.started())
        writing.alone = True
        with held_up(writing) as release:
            waiting = threading.Thread(target=_submit_and_look, args=(writing, step), name="who waits")
            waiting.start()
            eventually(lambda: backends(writing), what="its commit waits")
            stopping = _stopping(writing)
            eventually(lambda: not writing.writer._open)
            release()
            stopping.join()
            waiting.join()
        assert writing.wait_for(step) != [None]
        assert writing.threads[-1] == "who waits"
        assert not any(thread.is_alive() for thread in writing.writer._threads)


@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_under_way_when_it_is_stopped_is_written_and_told(direct_url: str, blocks: bool) -> None:
    with a_loop() as loop, writing_on(direct_url, loop) as writing:
        step = a_step(writing.started())
        with held_up(writing) as release:
            assert writing.writer.submit(step)
            eventually(lambda: backends(writing), what="its commit waits")
            if blocks:
                with blocked(loop):
                    stopping = _stopping(writing)
                    release()
                    stopping.join()
                    answered: list[Written | None] = writing.wait_for(step)
            else:
                stopping = _stopping(writing)
                release()
                stopping.join()
                answered = writing.wait_for(step)
        assert answered != [None]
        assert not writing.writer.submit(a_start())


def test_a_row_is_waited_for_when_its_run_comes_to_wait_and_not_before(
    writing: Writing, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "HERE_S", scaled(20))
    writing.started()  # which was fast enough for the next one to be waited for
    row, answered = a_step(writing.started()), list[bool]()
    writing.alone = True

    def submit_and_wait() -> None:
        assert writing.writer.submit(row, soon=False)
        answered.append(id(row) in writing.answers)
        writing.writer.hurry(row)
        answered.append(id(row) in writing.answers)
        writing.writer.hurry(row)  # nothing is left to be hurried

    writing.answers.clear()
    on(loop, submit_and_wait)
    assert answered == [False, True]
    assert writing.threads[-1] == THE_LOOP


@pytest.mark.parametrize("under_way", [False, True])
def test_the_threads_write_at_once_for_one_who_is_about_to_block_the_loop(
    writing: Writing, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, under_way: bool
) -> None:
    row = a_step(writing.started())
    for name in ("JOIN_AFTER_S", "GRACE_S"):  # that is, they do not come by themselves
        monkeypatch.setattr(checkpoint_writer, name, scaled(60))
    if under_way:
        with held_up(writing) as release:
            on(loop, lambda: writing.writer.submit(row))
            eventually(lambda: backends(writing), what="its commit waits")

            def stand_in() -> None:
                writing.writer.stand_in()
                release()
                assert writing.wait_for(row) != [None]

            on(loop, stand_in)
    else:

        def submit_and_block() -> None:
            writing.answers.clear()
            assert writing.writer.submit(row, soon=False)
            writing.writer.stand_in()
            assert writing.wait_for(row) != [None]

        on(loop, submit_and_block)
    assert writing.threads[-1] in THREADS


def test_who_does_not_block_the_loop_does_not_send_it_away(writing: Writing) -> None:
    writing.writer.stand_in()
    writing.started()
    assert writing.threads[-1] == THE_LOOP


def test_the_loop_sets_no_clock_while_two_write_already(writing: Writing, loop: asyncio.AbstractEventLoop) -> None:
    writer, row = writing.writer, a_step(writing.started())
    clocks: list[object] = []

    def look() -> None:
        with writer._changed:  # as if both threads were at it, and had been for long
            writer._busy, writer._busy_since = checkpoint_writer.WRITERS, time.monotonic() - scaled(60)
            writer._rows.append(row)
        writer._turn()
        clocks.append(writer._timer)
        with writer._changed:
            writer._busy = 0
            writer._call()

    writing.answers.clear()
    on(loop, look)
    assert clocks == [None]
    assert writing.wait_for(row) != [None]


def test_when_the_loop_has_ended_the_thread_writes(dialect_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_loop() as loop:
        writing_there = writing_on(dialect_url, loop)
        writing = writing_there.__enter__()
        direct = hot_statements.is_direct(writing.engine)
        writing.started()
    try:
        assert loop.is_closed()
        writing.started()
        if direct:
            monkeypatch.setattr(checkpoint_writer, "JOIN_AFTER_S", 3600.0)
        run = writing.started()
        assert writing.submit(a_step(run)) != [None]
        assert not direct or writing.threads[-1] in THREADS
    finally:
        writing_there.__exit__(None, None, None)
