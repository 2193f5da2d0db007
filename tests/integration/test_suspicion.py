"""Suspicion: who refuses connections and has missed a renewal is taken for gone, and nobody else ever is."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.durable.suspicion import Answer, Suspicion, connect
from perdure_service.store.engine import create_engine

from tests.helpers.rpc import Rpc, new_id, only
from tests.helpers.server import ServerProcess, create_effects_table, effects
from tests.helpers.waiting import eventually, scaled

RENEW_S = 2.0
RENEWED_S, SILENT_S = 2.9, 3.1
"""Ages of a last renewal: less, and more, than one and a half intervals."""


class Fleet:
    """Executors as rows, and what connecting to them comes to."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.answers: dict[str, Answer] = {}
        self.on_connect: Callable[[str], None] = lambda _address: None
        self.gone: list[str] = []
        self.taken_back = 0
        self.suspicion = Suspicion(
            engine, "me", renew_s=RENEW_S, take_back=self._take_back, gone=self.gone.extend, connect=self._connect
        )

    def add(self, *names: str) -> None:
        """Adds executors that are alive and were reached."""
        for name in names:
            self.answers[f"{name}:1"] = Answer.REACHED
            self._execute(
                "INSERT INTO perdure.executor (executor_id, application_version, address, max_running, expires_at) "
                "VALUES (:name, '1', :address, 1, now() + INTERVAL '1 hour')",
                name=name, address=f"{name}:1",
            )  # fmt: skip
        self.suspicion.look()

    def silence(self, *names: str, seconds: float = SILENT_S, answer: Answer = Answer.REFUSED) -> None:
        for name in names:
            self.answers[f"{name}:1"] = answer
            self._execute(
                "UPDATE perdure.executor SET renewed_at = now() - CAST(:s AS FLOAT8) * INTERVAL '1 second' "
                "WHERE executor_id = :name", name=name, s=seconds,
            )  # fmt: skip

    def renew(self, name: str) -> None:
        self._execute("UPDATE perdure.executor SET renewed_at = now() WHERE executor_id = :name", name=name)

    @property
    def tombstones(self) -> set[str]:
        with self.engine.connect() as conn:
            rows = conn.execute(sa.text("SELECT executor_id FROM perdure.executor WHERE tombstoned_at IS NOT NULL"))
            return {row[0] for row in rows}

    def _execute(self, statement: str, **values: object) -> None:
        with self.engine.begin() as conn:
            conn.execute(sa.text(statement), values)

    def _connect(self, address: str) -> Answer:
        self.on_connect(address)
        return self.answers[address]

    def _take_back(self) -> int:
        self.taken_back += 1
        return 0


@pytest.fixture
def fleet(database_url: str) -> Iterator[Fleet]:
    engine = create_engine(database_url, pool_size=2, statement_timeout=timedelta(seconds=30))
    with engine.begin() as conn:
        conn.execute(sa.text("DELETE FROM perdure.executor"))
    yield Fleet(engine)
    engine.dispose()


def test_who_refuses_and_is_silent_is_gone_and_its_runs_are_given_back(fleet: Fleet) -> None:
    fleet.add("a", "b", "c")
    fleet.silence("b")
    found = fleet.suspicion.look()
    assert found is not None
    assert found.executor_id == "b"
    assert (fleet.tombstones, fleet.gone, fleet.taken_back) == ({"b"}, ["b"], 1)
    assert fleet.suspicion.look() is None
    assert fleet.taken_back == 1


@pytest.mark.parametrize(
    ("seconds", "answer"),
    [
        (RENEWED_S - 0.5, Answer.REFUSED),
        (SILENT_S, Answer.UNKNOWN),
        (SILENT_S, Answer.REACHED),
    ],
    ids=["refuses but renews", "silent and unreachable", "silent but listens"],
)
def test_one_sign_alone_is_not_enough(fleet: Fleet, seconds: float, answer: Answer) -> None:
    fleet.add("a", "b", "c")
    fleet.silence("b", seconds=seconds, answer=answer)
    assert fleet.suspicion.look() is None
    assert fleet.tombstones == set()


def test_who_was_never_reached_is_never_suspected(fleet: Fleet) -> None:
    fleet.on_connect = lambda address: fleet.answers.update({address: Answer.REFUSED})
    fleet.add("a", "b", "c")
    fleet.silence("a")
    assert fleet.suspicion.look() is None
    assert fleet.tombstones == set(), "a policy that lets nobody through makes nobody suspect"


def test_a_renewal_that_comes_while_it_is_looked_at_wins(fleet: Fleet) -> None:
    fleet.add("a", "b", "c")
    fleet.silence("b")
    fleet.on_connect = lambda _address: fleet.renew("b")
    assert fleet.suspicion.look() is None
    assert (fleet.tombstones, fleet.gone, fleet.taken_back) == (set(), [], 0)


def test_one_that_refuses_only_once_is_left_alone(fleet: Fleet) -> None:
    fleet.add("a", "b", "c")
    fleet.silence("b")
    asked: list[str] = []

    def then_listens(address: str) -> None:
        asked.append(address)
        if len(asked) == 2:
            fleet.answers[address] = Answer.REACHED

    fleet.on_connect = then_listens
    assert fleet.suspicion.look() is None
    assert (len(asked), fleet.tombstones) == (2, set())


def test_while_most_are_silent_nobody_is_suspected(fleet: Fleet) -> None:
    fleet.add("a", "b", "c")
    fleet.silence("a", "b")
    assert fleet.suspicion.look() is None
    assert fleet.tombstones == set()
    fleet.renew("a")
    fleet.answers["a:1"] = Answer.REACHED
    assert fleet.suspicion.look() is not None
    assert fleet.tombstones == {"b"}


def test_one_at_a_time_and_first_the_one_that_is_silent_longest(fleet: Fleet) -> None:
    fleet.add("a", "b", "c", "d", "e")
    fleet.silence("a", seconds=SILENT_S)
    fleet.silence("b", seconds=2 * SILENT_S)
    fleet.suspicion.look()
    assert fleet.tombstones == {"b"}
    fleet.suspicion.look()
    assert fleet.tombstones == {"a", "b"}


def test_the_only_other_one_may_be_suspected(fleet: Fleet) -> None:
    fleet.add("a")
    fleet.silence("a")
    assert fleet.suspicion.look() is not None


def test_only_a_refusal_of_every_address_counts_as_one() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        listening.listen()
        assert connect(f"127.0.0.1:{port}") is Answer.REACHED
        assert connect(f"localhost:{port}") is Answer.REACHED
    assert connect(f"127.0.0.1:{port}") is Answer.REFUSED
    for address in ("nowhere.invalid:1", "127.0.0.1:no", "127.0.0.1", ""):
        assert connect(address) is Answer.UNKNOWN, address


def test_a_killed_servers_runs_go_on_before_its_lease_is_over(own_database_url: str) -> None:
    ttl_s = scaled(9)
    servers = [ServerProcess(own_database_url, command="serve", PERDURE_LEASE_TTL=str(ttl_s)) for _ in range(2)]
    create_effects_table(own_database_url)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ServerProcess.start, servers))
        victim, survivor = servers
        with Rpc(victim.address) as at_victim, Rpc(survivor.address) as at_survivor:
            steps, looked_around = int(scaled(60)), int(scaled(25))
            run_id = at_victim.start("counter", {"steps": steps, "delay_s": 0.05}, run_id=new_id())
            eventually(lambda: len(effects(own_database_url, run_id)) > looked_around, what="both have looked around")
            victim.kill()
            eventually(lambda: "executor.suspected" in survivor.log, ttl_s, what="it is suspected")
            assert at_survivor.output_of(run_id) == {"total": steps * (steps - 1) // 2}
            (recovered,) = only(at_survivor.events(run_id), "recovered")
            gap_s = recovered.recovered.gap.ToTimedelta().total_seconds()
            assert ttl_s / 3 < gap_s < ttl_s, "after a missed renewal, before the lease was over"
    finally:
        for server in servers:
            server.__exit__()
