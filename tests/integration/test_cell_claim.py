"""The claim of a cell in its database: who may take it from whom, and what an executor does when it has moved."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from perdure_service.durable.cell_claim import CellClaim
from perdure_service.durable.drain import Drain
from perdure_service.durable.executions import Executions
from perdure_service.durable.placement import Placement
from perdure_service.store import cells, executors
from perdure_service.store.cells import CellRow
from perdure_service.store.engine import create_engine

from tests.helpers.cells import Cluster, cluster_of_copies
from tests.helpers.databases import DatabaseServer
from tests.helpers.rpc import new_id

TTL = timedelta(seconds=30)
LEASE_TTL = timedelta(hours=1)
HOME, AWAY = "north", "south"


@pytest.fixture
def conn(dialect_url: str) -> Iterator[sa.Connection]:
    """A transaction that nobody else sees, in the database of a cell that is at home in the north; nobody is there."""
    engine = create_engine(dialect_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    with engine.connect() as connection:
        connection.execute(sa.text("DELETE FROM perdure.executor"))
        insert_cell(connection)
        yield connection
        connection.rollback()
    engine.dispose()


def insert_cell(conn: sa.Connection) -> None:
    conn.execute(
        sa.text(
            "INSERT INTO perdure.cell (id, cell, home_region, region, epoch) VALUES (1, 'nn1', 'north', 'north', 1)"
        )
    )


def add(conn: sa.Connection, region: str, *, silent_s: float = 0, standing_by: bool = False) -> str:
    """Adds an executor that has last renewed its lease so long ago; returns its id."""
    executor_id = new_id("executor")
    executors.register(
        conn,
        executor_id,
        application_version="1",
        address="host:1",
        max_running=1,
        ttl=LEASE_TTL,
        region=region,
        standing_by=standing_by,
    )
    conn.execute(
        sa.text(
            "UPDATE perdure.executor SET renewed_at = now() - CAST(:s AS FLOAT8) * INTERVAL '1 second' "
            "WHERE executor_id = :e"
        ),
        {"s": silent_s, "e": executor_id},
    )
    return executor_id


def row_of(conn: sa.Connection) -> CellRow:
    row = cells.read(conn)
    assert row is not None
    return row


def taken(conn: sa.Connection, region: str = AWAY) -> bool:
    """Tries to take the cell over; what the row says then is checked."""
    before = row_of(conn)
    answer = cells.take_over(conn, before, region, TTL)
    after = row_of(conn)
    assert (after.region, after.epoch) == ((region, before.epoch + 1) if answer else (before.region, before.epoch))
    assert (after.claimed_at is not None) or not answer
    return answer


def aged(conn: sa.Connection, seconds: float) -> None:
    """Makes the claim so old."""
    conn.execute(
        sa.text("UPDATE perdure.cell SET claimed_at = now() - CAST(:s AS FLOAT8) * INTERVAL '1 second'"), {"s": seconds}
    )


@pytest.mark.parametrize(
    ("silent_s", "others", "gone"),
    [
        ([0], [], False),
        ([29], [], False),
        ([31], [], True),
        ([31, 29], [], False),
        ([31, 100], [], True),
        ([31], [AWAY], True),
        ([], [], False),
        ([], [AWAY], False),
    ],
)
def test_a_home_is_gone_when_none_of_its_executors_has_renewed_for_so_long(
    conn: sa.Connection, silent_s: list[float], others: list[str], *, gone: bool
) -> None:
    for seconds in silent_s:
        add(conn, HOME, silent_s=seconds)
    for region in others:
        add(conn, region, standing_by=True)
    assert taken(conn) is gone


def test_who_stands_by_at_home_keeps_no_claim(conn: sa.Connection) -> None:
    add(conn, HOME, silent_s=31)
    add(conn, HOME, standing_by=True)
    assert taken(conn)


def test_an_executor_that_knows_no_regions_is_at_home(conn: sa.Connection) -> None:
    add(conn, "")
    assert not taken(conn)


def test_an_executor_that_has_ended_in_good_order_lived_until_then(conn: sa.Connection) -> None:
    executor_id = add(conn, HOME, silent_s=100)
    executors.remove(conn, executor_id)
    assert not taken(conn), "its successor may be starting"


def test_a_new_claim_holds_for_a_while_though_nobody_has_come_yet(conn: sa.Connection) -> None:
    add(conn, HOME, silent_s=31)
    assert taken(conn)
    assert not taken(conn, HOME), "its executors are about to see it"
    aged(conn, 31)
    add(conn, AWAY)
    assert not taken(conn, HOME)
    conn.execute(sa.text("UPDATE perdure.executor SET renewed_at = now() - INTERVAL '31 seconds'"))
    assert taken(conn, HOME), "a claim whose holder died before it did anything is taken back"


def test_what_was_read_before_somebody_else_took_it_takes_nothing(conn: sa.Connection) -> None:
    add(conn, HOME, silent_s=31)
    seen = row_of(conn)
    assert cells.take_over(conn, seen, AWAY, TTL)
    aged(conn, 31)
    assert not cells.take_over(conn, seen, HOME, TTL), "another epoch"


def test_a_cell_is_given_only_to_a_region_in_which_somebody_stands_by(conn: sa.Connection) -> None:
    add(conn, HOME)
    assert not cells.give(conn, row_of(conn), AWAY), "nobody"
    add(conn, AWAY)
    assert not cells.give(conn, row_of(conn), AWAY), "an executor of a version that takes runs wherever it is"
    late = add(conn, AWAY, standing_by=True)
    conn.execute(sa.text("UPDATE perdure.executor SET expires_at = now() WHERE executor_id = :e"), {"e": late})
    leaving = add(conn, AWAY, standing_by=True)
    executors.drain(conn, leaving)
    assert not cells.give(conn, row_of(conn), AWAY), "one that is dead, and one that goes"
    add(conn, AWAY, standing_by=True)
    assert cells.give(conn, row_of(conn), AWAY)
    found = cells.status(conn)
    assert found is not None
    assert (found.row.region, found.row.epoch, found.executors, found.standing_by) == (AWAY, 2, 2, 1)


# ---- what an executor does -------------------------------------------------------------------------------------------


class _Lease:
    """A lease that says how long it has held."""

    def __init__(self) -> None:
        self.held = True

    def held_for(self, duration: timedelta) -> bool:
        assert duration == TTL
        return self.held


class _Drain(Drain):
    """What is executed, none, and whether it is to be handed over."""

    def __init__(self, executions: Executions) -> None:
        super().__init__(None, executions, None, None)  # type: ignore[arg-type]


class Member:
    """An executor of the cell: its claim, without the rest."""

    def __init__(self, cluster: Cluster, engine: sa.Engine, region: str) -> None:
        self.engine, self.region = engine, region
        self.lease = _Lease()
        self.executions = Executions()
        self.placement = Placement(self.executions, 4, dict)
        self.looked_for_runs = 0
        self.executor_id = new_id("executor")
        place = cluster.place("nn1")
        self.claim = CellClaim(
            engine,
            self.executor_id,
            type(place)(place.regions, place.cell, region),
            ttl=TTL,
            lease_ttl=LEASE_TTL,
            lease=self.lease,  # type: ignore[arg-type]
            placement=self.placement,
            drain=_Drain(self.executions),
            look_for_runs=self._look_for_runs,
        )
        self.claim.begin()
        with engine.begin() as conn:
            executors.register(
                conn, self.executor_id, application_version="1", address="host:1", max_running=1, ttl=LEASE_TTL,
                region=region, standing_by=self.placement.standing_by,
            )  # fmt: skip

    def _look_for_runs(self) -> None:
        self.looked_for_runs += 1

    @property
    def begins(self) -> bool:
        """Whether a run that is started here begins here."""
        with self.placement.start("main", ("a", "1")) as here:
            return here

    @property
    def says(self) -> bool:
        """Whether it says in the database that it stands by."""
        with self.engine.connect() as conn:
            return bool(
                conn.execute(
                    sa.text("SELECT standing_by FROM perdure.executor WHERE executor_id = :e"), {"e": self.executor_id}
                ).scalar_one()
            )

    def dies(self) -> None:
        with self.engine.begin() as conn:
            conn.execute(
                sa.text(
                    "UPDATE perdure.executor SET renewed_at = now() - INTERVAL '31 seconds' WHERE executor_id = :e"
                ),
                {"e": self.executor_id},
            )


@pytest.fixture(scope="module")
def cluster(database_server: DatabaseServer) -> Iterator[Cluster]:
    with cluster_of_copies(database_server) as cluster:
        yield cluster


@pytest.fixture
def engine(cluster: Cluster) -> Iterator[sa.Engine]:
    engine = create_engine(cluster.url_of("nn1"), pool_size=8, statement_timeout=timedelta(seconds=30))
    with engine.begin() as conn:
        conn.execute(sa.text("DELETE FROM perdure.executor"))
        conn.execute(sa.text("DELETE FROM perdure.cell"))
        insert_cell(conn)
    yield engine
    engine.dispose()


@pytest.fixture
def pair(cluster: Cluster, engine: sa.Engine) -> tuple[Member, Member]:
    """An executor at home, and one that stands by elsewhere."""
    return Member(cluster, engine, HOME), Member(cluster, engine, AWAY)


def test_who_stands_by_takes_nothing_while_the_home_lives(pair: tuple[Member, Member]) -> None:
    home, away = pair
    for _ in range(3):
        home.claim.look()
        away.claim.look()
    assert (home.begins, away.begins) == (True, False)
    assert (home.says, away.says) == (False, True)


def test_a_cell_whose_home_is_gone_is_taken_over_and_returned(pair: tuple[Member, Member]) -> None:
    home, away = pair
    home.dies()
    away.claim.look()
    assert (away.begins, away.says, away.looked_for_runs) == (True, False, 1)
    assert home.begins, "it does not know yet; its leases are over, and its commits are fenced"
    home.claim.look()
    assert (home.begins, home.says) == (False, True)
    assert home.executions._retiring, "what it has is handed over"
    with home.engine.begin() as conn:
        assert cells.give(conn, row_of(conn), HOME)
    home.claim.look()
    away.claim.look()
    assert (home.begins, home.says, home.looked_for_runs) == (True, False, 1)
    assert (away.begins, away.says) == (False, True)
    assert not home.executions._retiring
    assert away.executions._retiring


def test_nobody_judges_whose_own_lease_has_lapsed(pair: tuple[Member, Member]) -> None:
    home, away = pair
    home.dies()
    away.lease.held = False  # after an outage of the database everybody looks dead
    away.claim.look()
    assert not away.begins
    away.lease.held = True
    away.claim.look()
    assert away.begins


def test_what_could_not_be_told_is_told_later(pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch) -> None:
    home, away = pair
    home.dies()
    away.claim.look()

    def fails(*_: Any) -> None:
        raise RuntimeError("the database went away for longer than is tried")

    with monkeypatch.context() as patch:
        patch.setattr(executors, "stand_by", fails)
        with pytest.raises(RuntimeError):
            home.claim.look()
    assert (home.begins, home.says) == (False, False)
    home.claim.look()
    assert home.says


def test_of_many_that_take_over_at_once_one_does(cluster: Cluster, engine: sa.Engine) -> None:
    home = Member(cluster, engine, HOME)
    standing = [Member(cluster, engine, AWAY) for _ in range(6)]
    home.dies()
    with ThreadPoolExecutor(len(standing)) as pool:
        list(pool.map(lambda one: one.claim.look(), standing))
    with engine.connect() as conn:
        assert (row_of(conn).region, row_of(conn).epoch) == (AWAY, 2)
    for one in standing:
        one.claim.look()
    assert all(one.begins and not one.says for one in standing), "they are executors of one region"


def test_a_take_over_that_died_after_its_commit_is_gone_on_with_by_the_next_of_its_region(
    cluster: Cluster, engine: sa.Engine
) -> None:
    home, away = Member(cluster, engine, HOME), Member(cluster, engine, AWAY)
    home.dies()
    with engine.begin() as conn:
        assert cells.take_over(conn, row_of(conn), AWAY, TTL)
    away.claim.look()
    assert away.begins
    assert Member(cluster, engine, AWAY).begins, "one that starts now takes runs at once"
    assert not Member(cluster, engine, HOME).begins, "and one at home stands by"
