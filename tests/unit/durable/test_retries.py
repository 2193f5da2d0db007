import psycopg
import pytest
import sqlalchemy as sa
from perdure_service.durable import retries
from perdure_service.durable.retries import Pauses, repeated
from perdure_service.store.engine import (
    AmbiguousResult,
    CheckpointTooSlow,
    DataOutOfReach,
    SerializationConflict,
)

CONFLICT = SerializationConflict("conflict")
LOST = psycopg.OperationalError("server closed the connection unexpectedly")
POOL = sa.exc.TimeoutError("QueuePool limit")


def wrapped(original: Exception) -> Exception:
    """Returns an error as SQLAlchemy raises it."""
    if not isinstance(original, psycopg.Error):
        return original
    return sa.exc.OperationalError("SELECT 1", {}, original)


class Database:
    """What `repeated` looks at in a system database, and a transaction that fails as told."""

    def __init__(self, *errors: Exception, patience_left_s: float | None = None) -> None:
        self.errors = [wrapped(error) for error in errors]
        self.patience_left_s = patience_left_s
        self._retry_connection_errors = patience_left_s is None or patience_left_s > 0
        self.attempts = 0

    @repeated()
    def write(self) -> str:
        self.attempts += 1
        if self.errors:
            raise self.errors.pop(0)
        return "written"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, in seconds; none takes any time."""
    made: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", made.append)
    return made


@pytest.mark.parametrize(
    ("error", "at_most_s"),
    [
        (CONFLICT, 0.01),
        (AmbiguousResult("ambiguous"), 0.01),
        (psycopg.errors.DeadlockDetected("deadlock"), 0.01),
        (CheckpointTooSlow("slow"), 0.01),
        (LOST, 0.2),
        (DataOutOfReach("no quorum", "58C00"), 0.2),
        (DataOutOfReach("no licence", "XXC02"), 0.2),
        (psycopg.errors.AdminShutdown("ended"), 0.2),
        (psycopg.errors.TooManyConnections("full"), 0.2),
        (POOL, 0.2),
    ],
)
def test_a_transaction_of_a_run_is_repeated_soon(pauses: list[float], error: Exception, at_most_s: float) -> None:
    database = Database(error)
    assert database.write() == "written"
    assert database.attempts == 2
    (pause_s,) = pauses
    assert 0 < pause_s <= at_most_s


@pytest.mark.parametrize("error", [CONFLICT, LOST, POOL])
def test_a_run_never_gives_up_and_never_waits_long(pauses: list[float], error: Exception) -> None:
    database = Database(*[error] * 2_000)
    assert database.write() == "written"
    assert max(pauses) <= retries.MAX_LOST_PAUSE_S * 1.5
    assert len({round(pause, 6) for pause in pauses[-50:]}) > 40, "no two wait equally long"


def test_an_outage_does_not_slow_the_conflicts_after_it(pauses: list[float]) -> None:
    assert Database(*[LOST] * 20, CONFLICT).write() == "written"
    assert pauses[-1] < 0.01


def test_a_caller_is_patient_only_as_long_as_it_says(pauses: list[float]) -> None:
    assert Database(LOST, patience_left_s=0.01).write() == "written"
    assert pauses == [0.01], "the last attempt is made when the patience ends"
    impatient = Database(LOST, patience_left_s=0.0)
    with pytest.raises(sa.exc.OperationalError):
        impatient.write()
    assert impatient.attempts == 1


def test_a_caller_for_whom_no_connection_becomes_free_is_not_made_to_wait_again(pauses: list[float]) -> None:
    database = Database(POOL, patience_left_s=5.0)
    with pytest.raises(sa.exc.TimeoutError):
        database.write()
    assert (database.attempts, pauses) == (1, [])


@pytest.mark.parametrize(
    "error", [psycopg.errors.UniqueViolation("twice"), psycopg.errors.QueryCanceled("slow"), ValueError("a bug")]
)
def test_what_a_repeat_does_not_help_is_raised_at_once(pauses: list[float], error: Exception) -> None:
    database = Database(error)
    with pytest.raises((sa.exc.DBAPIError, ValueError)):
        database.write()
    assert (database.attempts, pauses) == (1, [])


def test_the_database_can_be_named_for_functions_that_are_not_its_methods(pauses: list[float]) -> None:
    calls: list[int] = []

    @repeated(sys_db=Database(patience_left_s=0.0))
    def closure() -> None:
        calls.append(1)
        raise wrapped(LOST)

    with pytest.raises(sa.exc.OperationalError):
        closure()
    assert calls == [1]


def test_the_causes_have_pauses_of_their_own() -> None:
    pauses = Pauses()
    for _ in range(10):
        pauses.next_s(wrapped(LOST))
    assert (pauses.next_s(wrapped(CONFLICT)) or 1) < 0.01
