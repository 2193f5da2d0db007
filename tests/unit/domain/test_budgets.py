"""What a budget refuses."""

from __future__ import annotations

import pickle

import pytest
from perdure_service.domain.budgets import Budget, BudgetExceeded


@pytest.mark.parametrize(
    ("budget", "steps", "tokens"),
    [
        (Budget(), 10**9, 10**9),
        (Budget(max_steps=3), 3, 10**9),
        (Budget(max_tokens=100), 10**9, 99),
    ],
)
def test_within_a_budget_a_step_begins(budget: Budget, steps: int, tokens: int) -> None:
    budget.check(steps=steps, tokens=tokens)


@pytest.mark.parametrize(
    ("budget", "steps", "tokens", "message"),
    [
        (Budget(max_steps=1), 2, 0, "the run's budget is 1 step; this would be step 2"),
        (Budget(max_steps=3), 4, 0, "the run's budget is 3 steps; this would be step 4"),
        (Budget(max_tokens=100), 1, 100, "the run's budget is 100 tokens; it has used 100"),
        (Budget(max_tokens=100), 1, 130, "the run's budget is 100 tokens; it has used 130"),
    ],
)
def test_beyond_a_budget_the_refusal_says_what_was_used_and_what_is_allowed(
    budget: Budget, steps: int, tokens: int, message: str
) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        budget.check(steps=steps, tokens=tokens)
    assert str(caught.value) == message


def test_a_refusal_is_a_steps_result_so_it_can_be_stored_and_read_back() -> None:
    error = pickle.loads(pickle.dumps(BudgetExceeded("used up")))
    assert isinstance(error, BudgetExceeded)
    assert str(error) == "used up"
