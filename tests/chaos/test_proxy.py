"""A database behind a proxy that breaks what lies between: replies of commits that never come, cuts, silence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.domain.events import EventKind

from tests.helpers import judge
from tests.helpers.databases import DatabaseServer, url_in_form
from tests.helpers.proxy import DatabaseProxy
from tests.helpers.rpc import Rpc, duration, new_id, state_of
from tests.helpers.server import ServerProcess, create_effects_table, sql
from tests.helpers.waiting import eventually, scaled

OUTPUT = {
    "count": 0,
    "failed": "as it should",
    "patched": True,
    "child": "child 1",
    "published": "published",
    "heard": "hello",
    "approved": True,
    "signal": "go",
    "last": 1,
}
"""Of `all-of-it`."""

EFFECTS = ("count 0", "fails", "published", "paid", "count 1")
"""What `all-of-it` does outside, in order."""

IN_A_RUN = {
    "a start": r"INSERT INTO perdure\.run .*\"to\":\"RUNNING\"",
    "a start of a child": r"\"child_started\"",
    "an event set": r"DBOS\.setEvent.*\"stage\"|\"stage\".*DBOS\.setEvent",
    "a stream written": r"\[\"output_delta\",\d+,\d+,\"DBOS\.writeStream\"",
    "a step": r"\[\"step_succeeded\",\d+,\d+,\"[^\"]*count_one\"",
    "a step that fails": r"\[\"step_failed\",\d+,\d+,\"[^\"]*failing_step\"",
    "a sleep": r"\[\"step_succeeded\",\d+,\d+,\"DBOS\.sleep\"",
    "a patch": r"DBOS\.patch-better",
    "the result of a child": r"DBOS\.getResult",
    "an event set in a step": r"\"from a step\".{0,40}published|\[\"published\",\d+,\d+,\"[^\"]*publishing_step\"",
    "a stream written in a step": r"\[\"output_delta\",\d+,\d+,\"[^\"]*publishing_step\"",
    "a message sent": r"DBOS\.send",
    "a message received": r"\[\"step_succeeded\",\d+,\d+,\"DBOS\.recv\"",
    "an approval asked": r"\"approval_requested\"",
    "an approval decided": r"\"approval_decided\"",
    "an approval answered": r"\[\"step_succeeded\",\d+,\d+,\"perdure\.approval\"",
    "a signal": r"\"signal_received\"",
    "an outcome": r"\"to\":\"SUCCEEDED\"",
    "events that ride alone": r"\[\[\"progress\"",
}
"""What the transaction of each kind of operation sends, and no other does."""

FROM_OUTSIDE = {
    "a start that is queued": r"INSERT INTO perdure\.run .*\"to\":\"SCHEDULED\"",
    "a delay that is over": r"\"its time has come\"",
    "a claim": r"\"from\":\"QUEUED\",\"to\":\"RUNNING\"",
    "a renewal": r"UPDATE perdure\.executor SET renewed_at",
    "a cancellation": r"\"to\":\"CANCELLED\"",
    "a fork": r"\[\"forked\"",
    "a deletion": r"DELETE FROM perdure\.run ",
    "a give-back": r"\[\"recovered\"",
}
"""The same of what others do to a run."""

TTL_S = scaled(2)


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_effects_table(database_url)
    with sql(database_url) as connection:
        connection.execute("CREATE TABLE public.test_payment (key TEXT PRIMARY KEY, tries INT)")
    return database_url


class Broken:
    """A server whose database is behind a proxy, and its stubs."""

    def __init__(self, url: str, proxy: DatabaseProxy, server: ServerProcess, rpc: Rpc) -> None:
        self.url, self.proxy, self.server, self.rpc = url, proxy, server, rpc


@pytest.fixture(scope="module")
def broken(url: str) -> Iterator[Broken]:
    yield from _serve_behind_a_proxy(url, PERDURE_LEASE_TTL=str(TTL_S), PERDURE_PARK_AFTER="3600")


def _serve_behind_a_proxy(url: str, **environment: str) -> Iterator[Broken]:
    proxy = DatabaseProxy(url)
    try:
        with (
            ServerProcess(proxy.url, "tests.helpers.trouble_agents", **environment) as server,
            Rpc(server.address) as rpc,
        ):
            yield Broken(url, proxy, server, rpc)
    finally:
        proxy.close()


def _run_everything(broken: Broken) -> str:
    """Starts `all-of-it`, tells it what it waits for, and waits for its end; returns its id. No call is repeated."""
    run_id = broken.rpc.start("all-of-it")
    approval = broken.rpc.approval_of(run_id)
    assert broken.rpc.decide(approval.approval_id).revision > approval.revision
    assert broken.rpc.signal(run_id, "go"), "it was this call that delivered it"
    assert broken.rpc.output_of(run_id) == OUTPUT
    return run_id


def _judge_everything(broken: Broken, run_id: str) -> None:
    log = judge.assert_consistent(broken.url, f"default.{run_id}.r")
    judge.assert_effects(broken.url, run_id, log, *EFFECTS, deaths=0)
    kinds = [event.kind for event in log]
    for kind in ("approval_requested", "approval_decided", "signal_received", "child_started"):
        assert kinds.count(EventKind(kind)) == 1, kind
    assert EventKind.RECOVERED not in kinds
    assert judge.text_of(log) == "words "
    with sql(broken.url) as connection:
        paid = connection.execute(
            "SELECT tries FROM public.test_payment WHERE key LIKE %s", (f"default.{run_id}.r:%",)
        ).fetchall()
    assert paid == [(1,)]


@pytest.mark.parametrize("what", IN_A_RUN)
def test_the_reply_to_a_commit_is_lost_and_nothing_is_lost_or_done_twice(broken: Broken, what: str) -> None:
    order = broken.proxy.lose_replies(IN_A_RUN[what])
    run_id = _run_everything(broken)
    broken.proxy.forget_orders()
    assert order.lost == 1, "a commit of this kind happened, and its reply was lost"
    _judge_everything(broken, run_id)


def _do_to_runs(broken: Broken) -> None:
    """Does to runs what is done to them from outside, and judges them."""
    rpc, url = broken.rpc, broken.url
    queued = rpc.start("counter", {"steps": 1}, delay=duration(0.2))
    assert rpc.output_of(queued) == {"total": 0}
    log = judge.assert_consistent(url, f"default.{queued}.r")
    judge.assert_effects(url, queued, log, "count 0", deaths=0)

    listening = rpc.start("listener")
    rpc.until(listening, "AWAITING_INPUT")
    assert state_of(rpc.cancel(listening)) == "CANCELLED"
    judge.assert_consistent(url, f"default.{listening}.r", "CANCELLED")

    request = pb.ForkRunRequest(run_id=queued, new_run_id=new_id("fork"), request_id=new_id("request"))
    forked = rpc.runs.ForkRun(request, timeout=scaled(20))
    assert forked.created
    assert rpc.output_of(forked.run.run_id) == {"total": 0}
    judge.assert_consistent(url, f"default.{forked.run.run_id}.r")

    deleted = rpc.runs.DeleteRuns(pb.DeleteRunsRequest(run_ids=[listening]), timeout=scaled(20))
    assert (deleted.deleted_count, list(deleted.missing_run_ids)) == (1, [])
    assert judge.log_of(url, f"default.{listening}.r") == []

    orphan = rpc.start("listener")
    rpc.until(orphan, "AWAITING_INPUT")
    with sql(url) as connection:
        connection.execute(
            "UPDATE dbos.workflow_status SET executor_id = 'a-ghost' WHERE workflow_uuid = %s",
            (f"default.{orphan}.r",),
        )
    eventually(lambda: rpc.get(orphan).execution == 2, 15, what="it was given back, and taken again")
    rpc.until(orphan, "AWAITING_INPUT")
    assert rpc.signal(orphan, "go on")
    assert rpc.output_of(orphan) == ["go on"]
    log = judge.assert_consistent(url, f"default.{orphan}.r")
    assert [event.kind for event in log].count(EventKind.RECOVERED) == 1


def test_the_reply_to_a_commit_about_runs_is_lost(broken: Broken) -> None:
    orders = {what: broken.proxy.lose_replies(pattern) for what, pattern in FROM_OUTSIDE.items()}
    _do_to_runs(broken)
    broken.proxy.forget_orders()
    assert [what for what, order in orders.items() if order.lost != 1] == []


def test_every_reply_is_lost_once_with_the_other_driver(url: str, database_server: DatabaseServer) -> None:
    """psycopg2 gives no SQLSTATE with a lost connection. One run, in which every kind of commit is hit.

    The last test here: its server takes the database, as `dev` does, from the one that the others share.
    """
    form = "cockroachdb+psycopg2"
    for broken in _serve_behind_a_proxy(
        url_in_form(url, form), PERDURE_LEASE_TTL=str(TTL_S), PERDURE_PARK_AFTER="3600"
    ):
        orders = {what: broken.proxy.lose_replies(pattern) for what, pattern in (IN_A_RUN | FROM_OUTSIDE).items()}
        run_id = _run_everything(broken)
        _judge_everything(broken, run_id)
        _do_to_runs(broken)
        assert [what for what, order in orders.items() if order.lost != 1] == []
