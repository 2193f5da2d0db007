"""Hints between servers: with polls of minutes everything comes at once, and without hints by the polls."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure_service.domain.runs import RunKey
from perdure_service.durable.executions import Execution, Executions
from perdure_service.durable.ledger import Ledger
from perdure_service.durable.owners import OwnerWatch
from perdure_service.durable.spans import Spans
from perdure_service.durable.waits import Waits
from perdure_service.store.dbos_tables import APPLICATION, STATUS
from perdure_service.store.engine import create_engine, dedicated_connection
from perdure_service.store.hints import EVERYTHING, Hint, NotifyFeed

from tests.helpers.databases import DatabaseServer, not_in_another_form
from tests.helpers.proxy import DatabaseProxy
from tests.helpers.rpc import Reading, Rpc, new_id, states_in
from tests.helpers.server import ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually, scaled

MINUTES = "120"
"""A poll that no test waits for, seconds."""
IDLE_S = 6.0
IDLE_STATEMENTS_PER_S = 6.0
"""12 before there were hints."""

pytestmark = pytest.mark.usefixtures("only_on_postgresql")


@pytest.fixture(scope="module")
def only_on_postgresql(database_server: DatabaseServer) -> None:
    if database_server.cockroach:
        pytest.skip("CockroachDB tells by a changefeed")


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_effects_table(database_url)
    return database_url


@pytest.fixture(scope="module")
def engine(url: str) -> Iterator[sa.Engine]:
    engine = create_engine(url, pool_size=4, statement_timeout=timedelta(seconds=30))
    yield engine
    engine.dispose()


# ---- the feed --------------------------------------------------------------------------------------------------------


@contextmanager
def feeding(engine: sa.Engine, sender: str, voice_s: float = 0.2) -> Iterator[tuple[NotifyFeed, list[Hint]]]:
    """A feed that listens, and what it has told."""
    heard: list[Hint] = []
    feed = NotifyFeed(lambda: dedicated_connection(engine), sender, heard.append, voice_s=scaled(voice_s))
    feed.start()
    try:
        eventually(lambda: heard == [EVERYTHING] and feed.arrives)
        yield feed, heard
    finally:
        feed.stop()
    assert not feed.arrives


def runs_in(heard: list[Hint]) -> set[str]:
    return {one for hint in heard for one in hint.runs}


def test_each_server_hears_the_others_and_not_itself(engine: sa.Engine) -> None:
    many = frozenset(f"default.{number:04}-{'x' * 50}.r" for number in range(500))
    with feeding(engine, "a") as (a, at_a), feeding(engine, "b") as (_, at_b):
        a.send(Hint(runs=many, queues=frozenset({"mail"})))
        a.send(Hint(runs=frozenset({"last"}), ended=frozenset({"last"}), approvals=True))
        eventually(lambda: runs_in(at_b) == many | {"last"})
        assert any(hint.approvals for hint in at_b)
        assert {one for hint in at_b for one in hint.ended} == {"last"}
        assert any("mail" in hint.queues for hint in at_b)
        assert at_a == [EVERYTHING]


def test_what_dbos_tells_of_comes_by_its_name(engine: sa.Engine) -> None:
    with feeding(engine, "a") as (_, heard):
        with engine.begin() as conn:
            conn.execute(sa.text("SELECT pg_notify('dbos_notifications_channel', 'some-run::topic')"))
        named = Hint(wakes=frozenset({("dbos_notifications_channel", "some-run::topic")}))
        eventually(lambda: named in heard)


def test_who_is_alone_tells_nobody_until_somebody_comes(engine: sa.Engine) -> None:
    with feeding(engine, "a", 0.1) as (a, _):
        assert not a.alone, "it does not know yet"
        eventually(lambda: a.alone)
        a.send(Hint(runs=frozenset({"unheard"})))
        with feeding(engine, "b", 0.1) as (_, at_b):
            eventually(lambda: not a.alone)
            a.send(Hint(runs=frozenset({"heard"})))
            eventually(lambda: runs_in(at_b) == {"heard"})
        eventually(lambda: a.alone)


@pytest.mark.parametrize("broken", ["cut", "freeze"])
def test_a_connection_that_is_lost_or_half_open_is_made_anew_and_everything_is_dirty(
    url: str, engine: sa.Engine, broken: str
) -> None:
    proxy = DatabaseProxy(url)
    through = create_engine(proxy.url, pool_size=1, statement_timeout=timedelta(seconds=30))
    try:
        with feeding(through, "a", 0.1) as (a, at_a), feeding(engine, "b", 0.1) as (b, _):
            getattr(proxy, broken)()
            eventually(lambda: not a.arrives, what="it is noticed")
            b.send(Hint(runs=frozenset({"missed"})))
            proxy.mend()
            # Waited for: it may have heard itself a moment ago, and so pass for listening before it has said so.
            told = "everything at the start, when it was lost, and when it was back"
            eventually(lambda: a.arrives and at_a.count(EVERYTHING) >= 3, 20, what=told)
            # Who has heard nobody else for a while tells nobody, until the other one's voice has come.
            eventually(lambda: not b.alone, what="the other one is heard again")
            b.send(Hint(runs=frozenset({"heard"})))
            eventually(lambda: "heard" in runs_in(at_a))
    finally:
        through.dispose()
        proxy.close()


# ---- what hints wake -------------------------------------------------------------------------------------------------


def write_status(engine: sa.Engine, workflow_id: str, status: str, owner_xid: str | None) -> None:
    """Writes a status row of DBOS's, or changes it."""
    with engine.begin() as conn:
        conn.execute(
            sa.text(
                f"INSERT INTO {STATUS} "
                "(workflow_uuid, status, name, owner_xid, application_name, created_at, updated_at) "
                "VALUES (:id, :status, 'x', :owner, :application, 0, 0)"
                " ON CONFLICT (workflow_uuid) DO UPDATE SET status = :status, owner_xid = :owner"
            ),
            {"id": workflow_id, "status": status, "owner": owner_xid, "application": APPLICATION},
        )


@pytest.mark.parametrize(
    ("status", "owner_xid", "inline", "lost"),
    [
        ("CANCELLED", None, False, True),
        ("ENQUEUED", None, False, True),
        ("PENDING", "another", False, True),
        ("PENDING", "mine", False, False),
        ("SUCCESS", None, False, False),  # by itself: it leaves in a moment
        ("ENQUEUED", None, True, False),  # its claim is not committed yet, as far as is known
    ],
)
def test_an_execution_whose_run_somebody_else_has_changed_is_marked_dead_by_the_hint(
    engine: sa.Engine, status: str, owner_xid: str | None, inline: bool, lost: bool
) -> None:
    executions = Executions()
    ledger = Ledger(Spans.__new__(Spans))
    watch = OwnerWatch(engine, "me", executions, ledger, lambda _ids: None, interval_s=3600)
    key = RunKey.of_api("default", new_id("owned"))
    execution = Execution(key, owner_xid="mine", agent="a", agent_version="1", number=1, trace_id="1", inline=inline)
    executions.add(execution)
    write_status(engine, key.workflow_id, status, owner_xid)
    watch.start()
    try:
        watch.changed(["another-run"])
        watch.changed([key.workflow_id])
        if lost:
            eventually(lambda: execution.dead)
        else:
            assert watch.look_at([key.workflow_id]) == []
            assert not execution.dead
    finally:
        watch.stop()


class Signals:
    """DBOS's map of waits, as far as it is asked."""

    def __init__(self, *waiting: tuple[str, str]) -> None:
        self._waiting = {f"{run}::{name}": (run, name, None) for run, name in waiting}
        self.woken: set[str] = set()

    def snapshot(self) -> list[tuple[str, tuple[str, str, None], Signal]]:
        return [(name, components, Signal(self.woken, name)) for name, components in self._waiting.items()]

    def get(self, name: str) -> Signal | None:
        return Signal(self.woken, name) if name in self._waiting else None


@dataclass(frozen=True)
class Signal:
    """One of them."""

    woken: set[str]
    name: str

    def set(self) -> None:
        self.woken.add(self.name)


def test_a_look_wakes_only_waits_for_which_something_is_there(engine: sa.Engine) -> None:
    run, other = new_id("waiter"), new_id("waiter")
    for one in (run, other):
        write_status(engine, one, "PENDING", None)
    with engine.begin() as conn:
        for topic, consumed in (("here", False), ("taken", True)):
            conn.execute(
                sa.text(
                    "INSERT INTO dbos.notifications (message_uuid, destination_uuid, topic, message, consumed) "
                    "VALUES (:message, :run, :topic, '1', :consumed)"
                ),
                {"message": new_id("message"), "run": run, "topic": topic, "consumed": consumed},
            )
        conn.execute(
            sa.text("INSERT INTO dbos.workflow_events (workflow_uuid, key, value) VALUES (:run, 'set', '1')"),
            {"run": run},
        )
    messages = Signals((run, "here"), (run, "taken"), (run, "never"), (other, "here"))
    values = Signals((run, "set"), (run, "unset"))
    streams = Signals((run, "stream"))
    waits = Waits(engine, lambda: True)
    waits.bind(messages, values, streams)
    waits.look({other})
    assert not messages.woken | values.woken | streams.woken
    waits.look(None)
    assert messages.woken == {f"{run}::here"}
    assert values.woken == {f"{run}::set"}
    assert streams.woken == {f"{run}::stream"}, "its reader looks for itself"


# ---- servers ---------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two servers, and the stubs of each."""

    a: ServerProcess
    b: ServerProcess
    at_a: Rpc
    at_b: Rpc


@contextmanager
def pair(url: str, agents: str, poll_s: str) -> Iterator[Pair]:
    """Serves a database with two servers that have one slot each."""
    settings = {
        "PERDURE_QUEUE_POLL_INTERVAL": poll_s,
        "PERDURE_WATCH_POLL_INTERVAL": poll_s,
        "PERDURE_MAX_RUNNING": "1",
    }
    with ExitStack() as stack:
        servers = [ServerProcess(url, agents, command="serve", **settings) for _ in range(2)]
        for server in servers:
            stack.callback(server.__exit__)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ServerProcess.start, servers))
        yield Pair(*servers, *(stack.enter_context(Rpc(server.address)) for server in servers))


@pytest.fixture(scope="module")
def both(url: str) -> Iterator[Pair]:
    with pair(url, "tests.helpers.agents", MINUTES) as servers:
        yield servers


def watched_signalled_and_ended(both: Pair) -> None:
    """A run at one server is watched, signalled and waited for at the other."""
    run_id = both.at_a.start("listener", {"signals": 1})
    watch = Reading(both.at_b.watch(run_id, timeout=60))
    eventually(lambda: "AWAITING_INPUT" in states_in(watch.events), what="what happens is seen at the other one")
    assert both.at_b.signal(run_id, 7)
    eventually(lambda: "SUCCEEDED" in states_in(watch.events), what="a signal of the other one arrives")
    watch.join()
    assert json.loads(both.at_b.end_of(run_id).output_json) == [7]


@not_in_another_form
def test_a_run_is_watched_and_signalled_at_another_server_without_any_poll(both: Pair) -> None:
    watched_signalled_and_ended(both)


@not_in_another_form
def test_a_run_that_one_server_queues_is_taken_by_another_at_once(both: Pair) -> None:
    busy = both.at_a.start("listener", {})
    both.at_a.until(busy, "AWAITING_INPUT")
    run_id = both.at_a.start("counter", {"steps": 1})
    run = both.at_a.end_of(run_id)
    assert run.execution == 1
    assert both.at_a.get(busy).executor_id
    both.at_b.cancel(busy)
    # The place that the cancelled run had is free again, although its code only waits.
    assert json.loads(both.at_a.end_of(both.at_a.start("counter", {"steps": 1})).output_json) == {"total": 0}


@not_in_another_form
def test_an_approval_is_in_the_other_servers_inbox_at_once(both: Pair) -> None:
    inbox = Reading(both.at_b.approvals.WatchApprovals(approval_pb.WatchApprovalsRequest(), timeout=scaled(30)))
    eventually(lambda: inbox.responses)
    run_id = both.at_a.start("asker", {})
    eventually(lambda: any(run_id in str(response) for response in inbox.responses), what="it is in the inbox")
    inbox.close()
    both.at_b.decide(both.at_b.approval_of(run_id).approval_id)
    assert both.at_a.output_of(run_id)["approved"] is True


@not_in_another_form
def test_a_feed_whose_connection_the_database_ends_comes_back(url: str, both: Pair) -> None:
    with sql(url) as conn:
        ended = conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND (query LIKE 'LISTEN %' OR query LIKE '%pg_notify(%') AND pid <> pg_backend_pid()"
        ).fetchall()
    assert len(ended) >= 2
    watched_signalled_and_ended(both)


def test_without_any_hint_the_polls_bring_everything(own_database_url: str) -> None:
    with pair(own_database_url, "tests.helpers.deaf_agents", "0.2") as deaf:
        watched_signalled_and_ended(deaf)


def test_an_idle_server_asks_the_database_little(own_database_url: str, tmp_path: Path) -> None:
    statements = tmp_path / "statements"
    statements.touch()
    server = ServerProcess(
        own_database_url,
        "tests.helpers.statements",
        command="serve",
        PERDURE_TEST_STATEMENTS=str(statements),
        PERDURE_TEST_STATEMENTS_OF="all",
        PERDURE_QUEUE_POLL_INTERVAL="0.5",
        PERDURE_WATCH_POLL_INTERVAL="1",
    )

    def seen() -> list[str]:
        # In its first minute DBOS looks for schedules every second, later every half minute.
        return [line for line in statements.read_text().splitlines() if "workflow_schedules" not in line]

    with server:
        started = time.monotonic()
        eventually(lambda: time.monotonic() > started + IDLE_S, IDLE_S + 1, what="what a start does is over")
        before, began = len(seen()), time.monotonic()
        eventually(lambda: time.monotonic() > began + IDLE_S, IDLE_S + 1, what="it was idle for a while")
        per_second = (len(seen()) - before) / (time.monotonic() - began)
    assert per_second < IDLE_STATEMENTS_PER_S, seen()[before:]
