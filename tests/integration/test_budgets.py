"""What a run's model calls used, and the budget that ends it: counted once, through failed attempts and crashes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from perdure_client import Client, Run, Usage
from perdure_service.domain.events import Event, EventKind

from tests.helpers import eventually, judge
from tests.helpers.server import ServerProcess, create_effects_table, effects
from tests.helpers.spending import INPUT_TOKENS, OUTPUT_TOKENS

AGENTS = ("tests.helpers.agents", "tests.helpers.spending")


@pytest.fixture(scope="module")
def url(database_url: str) -> str:
    create_effects_table(database_url)
    return database_url


@pytest.fixture(scope="module")
def server(url: str) -> Iterator[ServerProcess]:
    with ServerProcess(url, *AGENTS) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def ended(client: Client, agent: str, run_id: str, **run_input: int) -> Run:
    return client.wait(client.start(agent, run_input, run_id=run_id), timeout=30)


def calls(count: int) -> Usage:
    return Usage(input_tokens=count * INPUT_TOKENS, output_tokens=count * OUTPUT_TOKENS)


def log_of(url: str, run: Run) -> list[Event]:
    """Returns the log, and fails unless the run's usage is what its events add up to."""
    log = judge.assert_consistent(url, f"default.{run.run_id}.r", str(run.state))
    used = [event.data for event in log if event.kind is EventKind.USAGE]
    assert run.usage == Usage(
        input_tokens=sum(data["input_tokens"] for data in used),
        output_tokens=sum(data["output_tokens"] for data in used),
    )
    return log


def of(log: list[Event], kind: EventKind) -> list[Event]:
    return [event for event in log if event.kind is kind]


def test_every_attempt_that_was_paid_for_counts_also_one_that_failed(client: Client, url: str) -> None:
    run = ended(client, "spender", "failed-attempts", steps=2, failures=2)
    assert run.usage == calls(6)
    used = of(log_of(url, run), EventKind.USAGE)
    assert [(event.step_name.rpartition(".")[2], event.attempt) for event in used] == [
        ("spend", n) for n in (1, 2, 3)
    ] * 2
    assert {event.data["model"] for event in used} == {"small"}


def test_a_call_whose_step_failed_for_good_counts(client: Client, url: str) -> None:
    run = ended(client, "spender", "failed-for-good", failures=9)
    assert (run.state, run.usage) == ("FAILED", calls(5))
    log_of(url, run)


def test_a_run_that_used_nothing_says_nothing(client: Client) -> None:
    assert ended(client, "spender", "nothing-used", steps=0).usage is None


def test_usage_is_said_in_a_step(client: Client) -> None:
    failure = ended(client, "usage-outside", "outside").failure
    assert failure is not None
    assert "inside a @DBOS.step()" in failure.message


@pytest.mark.parametrize(
    ("agent", "steps", "message"),
    [
        ("three-steps", 3, "the run's budget is 3 steps; this would be step 4"),
        ("thirty-tokens", 3, "the run's budget is 30 tokens; it has used 33"),
    ],
)
def test_a_run_that_would_begin_a_step_beyond_its_budget_fails_and_says_why(
    client: Client, url: str, agent: str, steps: int, message: str
) -> None:
    within = ended(client, agent, f"{agent}-within", steps=steps)
    assert within.state == "SUCCEEDED"
    beyond = ended(client, agent, f"{agent}-beyond", steps=steps + 1)
    assert beyond.state == "FAILED"
    assert beyond.failure is not None
    assert (beyond.failure.type, beyond.failure.message) == ("BudgetExceeded", message)
    assert not beyond.failure.retryable
    assert beyond.failure.step_name.endswith("spend")
    assert effects(url, beyond.run_id) == [f"spend {number}" for number in range(steps)]
    log = log_of(url, beyond)
    assert len(of(log, EventKind.STEP_STARTED)) == steps
    assert len(of(log, EventKind.STEP_FAILED)) == 1


def test_the_retries_of_a_step_end_with_the_budget(client: Client, url: str) -> None:
    run = ended(client, "thirty-tokens", "no-more-retries", failures=4)
    assert run.failure is not None
    assert (run.failure.type, run.usage) == ("BudgetExceeded", calls(3))
    assert effects(url, run.run_id) == ["spend 0"] * 3
    assert len(of(log_of(url, run), EventKind.STEP_RETRYING)) == 3


def test_an_agent_that_catches_it_gets_it_again_from_the_next_step(client: Client, url: str) -> None:
    run = ended(client, "deaf", "deaf")
    assert run.failure is not None
    assert run.failure.message == "the run's budget is 1 step; this would be step 4"
    assert effects(url, run.run_id) == ["spend 0"]
    assert [e.data["message"] for e in of(log_of(url, run), EventKind.LOG)] == ["refused 1", "refused 2"]


def test_an_agent_that_needs_a_model_says_what_to_set_where_there_is_none(client: Client) -> None:
    failure = client.wait(client.start("assistant", {"task": "x"}, run_id="no-model"), timeout=30).failure
    assert failure is not None
    assert (failure.type, failure.step_name) == ("ConfigurationError", "tools.ask_model")
    assert "PERDURE_MODEL__BASE_URL" in failure.message


def test_the_catalogue_says_what_a_run_may_use(client: Client) -> None:
    found = {agent.agent: (agent.max_steps, agent.max_tokens) for agent in client.agents()}
    assert found["three-steps"] == (3, 0)
    assert found["thirty-tokens"] == (0, 30)
    assert found["spender"] == (0, 0)


def test_what_was_used_before_a_kill_counts_after_it_and_what_was_done_counts_once(own_database_url: str) -> None:
    done = {"thirty-tokens": [0, 1, 1], "three-steps": [0, 1, 1, 2]}
    with ServerProcess(own_database_url, *AGENTS) as server, Client(server.address) as client:
        runs = [client.start(agent, {"steps": 4, "hold_at": 1}, run_id=agent) for agent in done]
        for run in runs:
            eventually(
                lambda run=run: client.get(run).usage == calls(2), 15, what="its second call's usage is committed"
            )
        server.kill()
        server.start()
        ends = [client.wait(run, timeout=30) for run in runs]
    for final in ends:
        assert final.failure is not None
        assert final.failure.type == "BudgetExceeded"
        assert effects(own_database_url, final.run_id) == [f"spend {number}" for number in done[final.agent]]
        assert final.usage == calls(len(done[final.agent]))
        assert final.execution == 2
        log_of(own_database_url, final)


def test_commits_whose_reply_is_lost_add_usage_once(own_database_url: str) -> None:
    agents = ("tests.helpers.chaos", "tests.helpers.spending")
    with (
        ServerProcess(own_database_url, *agents, PERDURE_CHAOS_AMBIGUOUS="1") as server,
        Client(server.address) as client,
    ):
        run = ended(client, "spender", "ambiguous", steps=4, failures=1)
    assert run.usage == calls(8)
    assert len(of(log_of(own_database_url, run), EventKind.USAGE)) == 8
