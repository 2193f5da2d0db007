"""How many starts a namespace may make in a second, and how long one must wait that comes too early."""

from __future__ import annotations

import pytest
from perdure_service.domain.quotas import StartQuota


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def taken(quota: StartQuota, namespace: str = "default", tries: int = 100) -> int:
    return sum(quota.take(namespace) == 0 for _ in range(tries))


def test_a_seconds_worth_may_start_at_once_and_then_as_many_as_time_allows() -> None:
    clock = Clock()
    quota = StartQuota(10, clock)
    assert taken(quota) == 10
    clock.now_s += 0.35
    assert taken(quota) == 3
    clock.now_s += 3_600
    assert taken(quota) == 10


def test_who_waits_as_long_as_told_may_start() -> None:
    clock = Clock()
    quota = StartQuota(4, clock)
    assert taken(quota) == 4
    wait_s = quota.take("default")
    assert wait_s == pytest.approx(0.25)
    clock.now_s += wait_s * 0.99
    assert quota.take("default") > 0
    clock.now_s += wait_s * 0.02
    assert quota.take("default") == 0


def test_less_than_one_a_second_still_lets_one_start() -> None:
    clock = Clock()
    quota = StartQuota(0.1, clock)
    assert taken(quota) == 1
    assert quota.take("default") == pytest.approx(10)


def test_namespaces_do_not_take_from_each_other() -> None:
    quota = StartQuota(2, Clock())
    assert taken(quota, "a") == 2
    assert taken(quota, "b") == 2


def test_what_is_given_back_may_be_taken_again_but_never_more_than_a_full_bucket() -> None:
    quota = StartQuota(3, Clock())
    assert taken(quota) == 3
    quota.give_back("default")
    assert taken(quota) == 1
    for _ in range(10):
        quota.give_back("default")
    assert taken(quota) == 3


def test_without_a_limit_everything_may_start() -> None:
    quota = StartQuota(None, Clock())
    assert taken(quota, tries=10_000) == 10_000
    quota.give_back("default")
