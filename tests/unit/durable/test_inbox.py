"""What a watcher of the inbox is told: what is pending, then each approval as it is now, however slow it is."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from perdure_service.domain.approvals import Approval, ApprovalState
from perdure_service.durable.inbox import OVERLAP_S, Inbox, Mailbox

from tests.helpers.waiting import eventually_async
from tests.unit.rpc.doubles import an_approval

ANOTHER_CLOCK = datetime.now(UTC) - timedelta(hours=1)
"""A time of the database's, as a host sees it whose clock is an hour ahead."""
SHORT, LONG = timedelta(seconds=1), timedelta(seconds=2 * OVERLAP_S)


def asked(number: int, revision: int = 1, state: ApprovalState = ApprovalState.PENDING, **changes: object) -> Approval:
    return an_approval(approval_id=f"foo/{number}", revision=revision, state=state, **changes)


async def test_what_changes_is_told_once_and_as_it_is_at_last() -> None:
    mailbox = Mailbox("default")
    assert mailbox.begin([asked(1), asked(2, 2, ApprovalState.APPROVED)]) == [asked(1)]
    for _ in range(1_000):  # looks, while the watcher is busy
        mailbox.put([asked(1), asked(2, 2, ApprovalState.APPROVED), asked(3)])
        mailbox.put([asked(1, 2, ApprovalState.REJECTED), asked(3)])
    assert await mailbox.take() == [asked(3), asked(1, 2, ApprovalState.REJECTED)]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(mailbox.take(), 0.01)


async def test_what_came_before_the_first_reading_is_not_told_again() -> None:
    mailbox = Mailbox("default")
    mailbox.put([asked(1), asked(2, 2)])
    assert mailbox.begin([asked(1), asked(2, 1)]) == [asked(1), asked(2, 1)]
    assert await mailbox.take() == [asked(2, 2)]


async def test_what_was_decided_before_anybody_could_see_it_pending_is_told_if_it_is_new() -> None:
    mailbox = Mailbox("default")
    approved, asked_at = ApprovalState.APPROVED, ANOTHER_CLOCK
    decided = asked(1, 2, approved, create_time=asked_at, decide_time=asked_at + SHORT)
    mailbox.put([decided, asked(2, 2, approved, create_time=asked_at, decide_time=asked_at + LONG)])
    assert await mailbox.take() == [decided]


async def test_a_look_that_finds_nothing_new_wakes_nobody() -> None:
    looks = 0

    def look(_namespaces: object) -> list[Approval]:
        nonlocal looks
        looks += 1
        return [asked(1)]

    inbox = Inbox(look, 0.001)
    with inbox.watching(asked(1).key.namespace) as mailbox:
        mailbox.begin([asked(1)])
        taking = asyncio.create_task(mailbox.take())
        await eventually_async(lambda: looks > 3)
        assert not taking.done()
        taking.cancel()
    assert inbox.watchers == 0
