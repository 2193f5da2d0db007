"""A database behind a proxy that breaks what lies between: replies of commits that never come, cuts, silence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from perdure_service.domain.events import EventKind

from tests.helpers import judge
from tests.helpers.proxy import DatabaseProxy
from tests.helpers.rpc import Rpc
from tests.helpers.server import ServerProcess, create_effects_table, sql

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
    yield from _serve_behind_a_proxy(url)


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
